"""An imitation of the Hugging Face hub: a server in this process that keeps repositories in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class HubHandler(BaseHTTPRequestHandler):
    """Answers what pushing and downloading models asks for."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]

    def log_message(self, *args):
        pass

    def answer(self, code: int, content: bytes | dict | list, **headers) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, code: int, reason: str) -> None:
        self.answer(code, {"error": reason}, **{"X-Error-Code": reason})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        body = self.read_body()
        base = f"http://{self.headers['Host']}"
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values.get('organization') or 'me'}/{values['name']}"
            self.repositories.setdefault(name, {})
            return self.answer(200, {"url": f"{base}/{name}", "id": name})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.*", self.path):
            files = []
            for file in json.loads(body)["files"]:
                files.append({"path": file["path"], "uploadMode": "regular", "shouldIgnore": False})
            return self.answer(200, {"files": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.repositories[found[1]][entry["value"]["path"]] = content
            address = f"{base}/{found[1]}/commit/{COMMIT}"
            return self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": address})
        return self.fail(404, "RepoNotFound")

    def do_GET(self):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if found[1] not in self.repositories:
                return self.fail(404, "RepoNotFound")
            files = [{"rfilename": name} for name in self.repositories[found[1]]]
            facts = {"id": found[1], "sha": COMMIT, "siblings": files, "private": False}
            return self.answer(200, {**facts, "tags": [], "downloads": 0, "likes": 0})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            files = []
            for name, content in self.repositories.get(found[1], {}).items():
                if name.startswith(found[2]):
                    file = {"type": "file", "path": name, "size": len(content)}
                    files.append({**file, "oid": "0" * 40})
            return self.answer(200, files) if files else self.fail(404, "EntryNotFound")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            if found[1] not in self.repositories:
                return self.fail(404, "RepoNotFound")
            content = self.repositories[found[1]].get(found[2])
            if content is None:
                return self.fail(404, "EntryNotFound")
            digest = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, ETag=f'"{digest}"', X_Repo_Commit=COMMIT)
        return self.fail(404, "RepoNotFound")

    do_HEAD = do_GET


@contextlib.contextmanager
def imitate_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Run the imitation.

    Yields:
        Its address (for HF_ENDPOINT), and its repositories: name -> file -> content.
    """
    handler = type("Handler", (HubHandler,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
