"""A small imitation of the hub's HTTP interface: repositories of files in folders of this machine.

Files are fetched from it, and pushed to it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

COMMIT = "a" * 40  # of a repository that nobody has pushed to


class Hub(ThreadingHTTPServer):
    """Serves root/KIND/OWNER/NAME, where KIND is `datasets` or `models`.

    Attributes:
        root: The folder of all repositories.
        pushes: Name -> number of pushes.
        private: Names of repositories that ask for a token.
        gated: Names of repositories that ask for permission.
        requests: What was asked for.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.pushes: dict[str, int] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """Its HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def find_commit(self, name: str) -> str:
        """The newest commit of a repository."""
        pushes = self.pushes.get(name)
        return f"{pushes:040x}" if pushes else COMMIT

    def list_files(self, name: str) -> set[str]:
        """Names of a model's files."""
        folder = self.root / "models" / name
        return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        """Nothing is printed."""

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer(self._read_body())

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes = b""):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        if path == "api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self._create(json.loads(body))
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
        commit = self.server.find_commit(name)
        if revision not in ("main", commit):
            return self._refuse(404, "RevisionNotFound")
        if is_api and self.command == "POST" and verb in ("preupload", "commit"):
            return self._receive(verb, body)
        if is_api:
            return self._describe(verb, commit, "/".join(names), body)
        if name in self.server.gated:
            return self._refuse(403, "GatedRepo")
        return self._send_file(folder / "/".join(names), commit)

    # Pushing

    def _create(self, values: dict):
        name = f"{values.get('organization') or 'me'}/{values['name']}"
        (self.server.root / "models" / name).mkdir(parents=True, exist_ok=True)
        self._send_json({"url": f"{self.server.url}/{name}", "id": name})

    def _receive(self, verb: str, body: bytes):
        """Answer how files are to be sent, or take them."""
        if verb == "preupload":
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **mode} for file in json.loads(body)["files"]]
            return self._send_json({"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = self.folder / entry["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(entry["value"]["content"]))
        self.server.pushes[self.name] = self.server.pushes.get(self.name, 0) + 1
        commit = self.server.find_commit(self.name)
        address = f"{self.server.url}/{self.name}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": address})

    # Fetching

    def _describe(self, verb: str, commit: str, below: str, body: bytes):
        files = [f for f in sorted(self.folder.rglob("*")) if f.is_file()]
        if verb == "revision":
            siblings = [{"rfilename": f.relative_to(self.folder).as_posix()} for f in files]
            facts = {"id": self.name, "sha": commit, "siblings": siblings, "private": False}
            facts["cardData"] = self._read_header()
            return self._send_json({**facts, "gated": False, "tags": [], "downloads": 0})
        if verb == "tree":
            if not (self.folder / below).is_dir():
                return self._refuse(404, "EntryNotFound")
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            recursive = query.get("recursive", [""])[0].lower() == "true"
            return self._send_json(self._list(self.folder / below, recursive))
        if verb == "paths-info":
            is_json = body.startswith(b"{")
            values = json.loads(body) if is_json else urllib.parse.parse_qs(body.decode())
            paths = [self.folder / path for path in values["paths"]]
            return self._send_json([self._entry(path) for path in paths if path.exists()])
        return self._refuse(404, "EntryNotFound")

    def _read_header(self) -> dict | None:
        """What the header of the repository's card says."""
        card = self.folder / "README.md"
        parts = card.read_text().split("---\n") if card.is_file() else []
        return yaml.safe_load(parts[1]) if len(parts) > 2 else None

    def _list(self, folder: Path, recursive: bool) -> list[dict]:
        paths = sorted(folder.rglob("*") if recursive else folder.glob("*"))
        return [self._entry(path) for path in paths]

    def _entry(self, path: Path) -> dict:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            shown = "" if name == "." else name
            return {"type": "directory", "path": shown, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": name, "oid": _digest(path), "size": path.stat().st_size}

    def _send_file(self, path: Path, commit: str):
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", commit)
        headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self._send(200, path.read_bytes(), "application/octet-stream", headers)

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
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serve the repositories of a folder."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
