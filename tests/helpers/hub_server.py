"""A small imitation of the hub's HTTP interface: repositories of files in folders of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves root/KIND/OWNER/NAME, where KIND is `datasets` or `models`.

    Attributes:
        root: The folder of all repositories.
        commits: Revision -> commit, of every repository.
        private: Names of repositories that ask for a token.
        requests: What was asked for.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.commits = {"main": COMMIT}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """Its HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Nothing is printed."""

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes = b""):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        parts = path.split("/")
        is_api = parts[0] == "api"
        if is_api:
            parts = parts[1:]
        kind = parts[0] if parts[0] in ("datasets", "models") else "models"
        parts = parts[1:] if parts[0] in ("datasets", "models") else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.root / kind / name
        if not folder.is_dir() or name in self.server.private:
            return self._refuse(401, "RepoNotFound")
        self.folder, self.kind, self.name = folder, kind, name
        verb, *rest = rest or ["revision", "main"]
        revision, *names = rest or ["main"]
        commits = self.server.commits
        commit = commits.get(revision, revision if revision in commits.values() else None)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if is_api:
            return self._describe(verb, commit, "/".join(names), body)
        if name in self.server.gated:
            return self._refuse(403, "GatedRepo")
        return self._send_file(folder / "/".join(names), commit)

    def _describe(self, verb: str, commit: str, below: str, body: bytes):
        files = [f for f in sorted(self.folder.rglob("*")) if f.is_file()]
        if verb == "revision":
            siblings = [{"rfilename": f.relative_to(self.folder).as_posix()} for f in files]
            facts = {"id": self.name, "sha": commit, "siblings": siblings, "private": False}
            return self._send_json({**facts, "gated": False, "tags": [], "downloads": 0})
        if verb == "tree":
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            found = self._list(
                self.folder / below,
                query.get("recursive") == ["True"] or query.get("recursive") == ["true"],
            )
            if not (self.folder / below).is_dir():
                return self._refuse(404, "EntryNotFound")
            return self._send_json(found)
        if verb == "paths-info":
            values = (
                dict(urllib.parse.parse_qs(body.decode()))
                if not body.startswith(b"{")
                else json.loads(body)
            )
            found = [
                self._entry(self.folder / p) for p in values["paths"] if (self.folder / p).exists()
            ]
            return self._send_json(found)
        return self._refuse(404, "EntryNotFound")

    def _list(self, folder: Path, recursive: bool) -> list[dict]:
        paths = sorted(folder.rglob("*") if recursive else folder.glob("*"))
        return [self._entry(path) for path in paths]

    def _entry(self, path: Path) -> dict:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {
                "type": "directory",
                "path": "" if name == "." else name,
                "oid": "0" * 40,
                "size": 0,
            }
        return {"type": "file", "path": name, "oid": _digest(path), "size": path.stat().st_size}

    def _send_file(self, path: Path, commit: str):
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", commit)
        data = path.read_bytes()
        headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self._send(200, data, "application/octet-stream", headers)

    def _send_json(self, values):
        self._send(200, json.dumps(values).encode(), "application/json")

    def _refuse(self, status: int, code: str, commit: str | None = None):
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, json.dumps({"error": code}).encode(), "application/json", headers)

    def _send(self, status: int, data: bytes, kind: str, headers=()):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serve_hub(root: Path):
    """Serve the repositories of a folder."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
