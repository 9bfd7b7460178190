"""A Hugging Face hub of a few files on this machine: as much of its HTTP interface as its clients ask for."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.hub_uploads import Uploads
from helpers.paths import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repos = dict[str, dict[str, bytes]]
"""Repository path, as "ORG/NAME" for models and "datasets/ORG/NAME" for datasets -> file name -> content."""


@contextmanager
def fake_hub(repos: Repos, **state: object) -> Iterator[str]:
    """Serve `repos`, which clients may change; yields the endpoint. `state`: attributes of Uploads."""
    state = {"private": set(), "stored": {}, "token": "a token", "messages": {}} | state | {"repos": repos}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), state))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run_against(endpoint: str, script: str, folder: Path, **settings: str) -> str:
    """Output of a Python script whose hub is `endpoint` and whose caches lie in `folder`.

    In a process of its own, as the hub's clients read their settings when they are imported.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
    environment |= {"GPTQ_AWQ_CACHE": str(folder / "own"), **settings}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class _Handler(Uploads, BaseHTTPRequestHandler):
    repos: Repos
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.uploads(unquote(urlsplit(self.path).path).strip("/"), sent):
            return
        body = sent.decode()
        fields = json.loads(body) if body.startswith("{") else parse_qs(body)
        self.answer(fields.get("paths"))

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.stored[self.path.rpartition("/")[2]] = content
        self.send(b"")

    def do_GET(self) -> None:
        self.answer(None)

    def answer(self, wanted: list[str] | None) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if not path:
            return self.send(b"a hub")
        is_api, path = path.startswith("api/"), path.removeprefix("api/").removeprefix("models/")
        repo = next((name for name in self.repos if path == name or path.startswith(name + "/")), None)
        if repo is None:
            return self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        verb, _, rest = path.removeprefix(repo).strip("/").partition("/")
        revision = rest.partition("/")[0]
        files = self.repos.get(f"{repo}@{revision}", self.repos[repo])
        if is_api and verb in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            found = {"id": repo.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings}
            return self.send_json(found | {"private": repo in self.private})
        if is_api and verb == "paths-info":
            return self.send_json([_entry(name, files) for name in files if name in (wanted or ())])
        if is_api and verb == "tree":
            return self.send_json(_tree(files, rest.partition("/")[2], "recursive=true" in self.path))
        name = rest.partition("/")[2]
        if verb == "resolve" and name in files:
            return self.send_file(files[name])
        return self.send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    def send_file(self, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes="):
            return self.send(content, 200, headers | {"Accept-Ranges": "bytes"})
        first, last = asked.removeprefix("bytes=").split("-")
        end = min(int(last or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        return self.send(content[int(first) : end + 1], 206, headers)

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    inside = [name for name in files if name.startswith(folder + "/" if folder else "")]
    depth = len(folder.split("/")) + 1 if folder else 1
    shown = inside if recursive else {"/".join(name.split("/")[:depth]) for name in inside}
    return [_entry(name, files) for name in shown]


def _entry(name: str, files: dict[str, bytes]) -> dict:
    if name not in files:
        return {"type": "directory", "path": name, "oid": "0"}
    oid = hashlib.sha256(files[name]).hexdigest()
    return {"type": "file", "path": name, "size": len(files[name]), "oid": oid}
