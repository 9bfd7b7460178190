"""A wandb server on this machine, as far as following a run needs one: runs, their history, no tables."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeWandb:
    """Messages to the server: per run id its fields and history lines. `silent`: it accepts and never answers."""

    silent: bool = False
    deleted: str | None = None
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: dict[str, list[str]] = field(default_factory=dict)

    def rows(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history.get(run, [])]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = query.split("(")[0].split("{")[0].split()[-1]
        known = {"Viewer": self._viewer, "RunResumeStatus": self._status, "UpsertBucket": self._upsert}
        return known[name](variables or {}) if name in known else {"errors": [{"message": f"{name}: not here"}]}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        part = (body.get("files") or {}).get("wandb-history.jsonl")
        if part:
            self.history.setdefault(run, [])[part["offset"] :] = part["content"]

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        user = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": user}}

    def _project(self) -> dict[str, Any]:
        return {"id": "p", "name": "gptq_awq", "entity": {"id": "e", "name": "me"}}

    def _status(self, variables: dict[str, Any]) -> dict[str, Any]:
        name, bucket = variables["name"], None
        if name in self.runs:
            lines = self.history.get(name, [])
            counts = {"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0}
            tails = {"historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "summaryMetrics": "{}"}
            more = {"displayName": None, "config": "{}", "tags": [], "notes": None, "wandbConfig": '{"t": 1}'}
            bucket = {"id": "b", "name": name} | counts | tails | more
        return {"data": {"model": self._project() | {"bucket": bucket}}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        if name == self.deleted:
            return {"errors": [{"message": f"run {name} was previously created and deleted; try a new run name"}]}
        told = {key: value for key, value in variables.items() if value is not None}
        inserted = name not in self.runs
        self.runs[name] = self.runs.get(name, {}) | told
        bucket = {"id": "b", "name": name, "project": self._project(), "config": "{}", "historyLineCount": 0}
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": inserted}}}


@contextmanager
def serving(fake: FakeWandb) -> Iterator[str]:
    """Within: the server's address."""
    closed = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if fake.silent:
                closed.wait()
                return
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/graphql":
                asked = json.loads(body)
                self._respond(fake.answer(asked["query"], asked.get("variables")))
                return
            if self.path.endswith("/file_stream"):
                fake.stream(self.path.split("/")[-2], json.loads(body))
            self._respond({})

        def _respond(self, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        closed.set()
        server.shutdown()
        server.server_close()
