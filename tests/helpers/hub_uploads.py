"""What a hub answers to clients that upload: as much of its HTTP interface as create_repo and create_commit ask for."""

import base64
import json
from typing import Any

LARGE = 1000
"""Files of more bytes are stored apart, as git LFS does, and smaller ones come with the commit."""


class Uploads:
    """A request handler's part: repositories made, files received, commits; those of a branch lie beneath NAME@BRANCH.

    Attributes:
        repos: repository → file name → content.
        private: repositories that only their owners see.
        stored: sha256 → content of the large files that came.
        token: the token that a client must have.
        messages: messages of the commits, by repository.
    """

    repos: dict[str, dict[str, bytes]]
    private: set[str]
    stored: dict[str, bytes]
    token: str
    messages: dict[str, str]
    path: str
    headers: Any

    def send_json(self, value: object, status: int = 200) -> None:
        raise NotImplementedError

    def uploads(self, path: str, body: bytes) -> bool:
        """Answer a request that changes something; False for one that does not."""
        name, verb, rest = _parsed(path.removeprefix("api/models/"))
        written = verb in ("preupload", "commit", "branch") or path == "api/repos/create" or ".git/info/lfs" in path
        if written and self.headers.get("Authorization") != f"Bearer {self.token}":
            self.send_json({"error": "this token may not write"}, 403)
        elif path == "api/repos/create":
            self._create(json.loads(body))
        elif path == "api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif verb == "branch":
            self.repos.setdefault(f"{name}@{rest}", dict(self.repos[name]))
            self.send_json({})
        elif verb == "preupload":
            self.send_json({"files": [_mode(file) for file in json.loads(body)["files"]]})
        elif ".git/info/lfs" in path:
            self.send_json({"transfer": "basic", "objects": [self._wanted(x) for x in json.loads(body)["objects"]]})
        elif verb == "commit":
            self._commit(name if rest == "main" else f"{name}@{rest}", body.decode().splitlines())
        else:
            return False
        return True

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.repos
        self.repos.setdefault(name, {})
        if asked.get("visibility") == "private" and not known:
            self.private.add(name)
        self.send_json({"url": f"http://{self.headers['Host']}/{name}"}, 409 if known else 200)

    def _wanted(self, asked: dict) -> dict:
        href = f"http://{self.headers['Host']}/stored/{asked['oid']}"
        return {**asked, "actions": {"upload": {"href": href}}}

    def _commit(self, repo: str, lines: list[str]) -> None:
        files = self.repos[repo]
        for entry in map(json.loads, lines):
            value = entry["value"]
            if entry["key"] == "header":
                self.messages[repo] = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            else:
                del files[value["path"]]
        self.send_json({"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/1", "commitOid": "1" * 40})


def _parsed(path: str) -> tuple[str, str, str]:
    """A repository's name, what is asked of it, and the rest of a path."""
    org, _, rest = path.partition("/")
    name, _, rest = rest.partition("/")
    verb, _, rest = rest.partition("/")
    return f"{org}/{name}", verb, rest


def _mode(file: dict) -> dict:
    kind = "lfs" if file["size"] > LARGE else "regular"
    return {"path": file["path"], "uploadMode": kind, "shouldIgnore": False, "oid": None}
