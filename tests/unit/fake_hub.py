"""A Hub on this machine: as much of huggingface.co's API as one commit of a model takes, over HTTP.

Large files come by the LFS protocol (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), small ones inside
the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

LFS_ENDINGS = (".safetensors", ".bin")


class Hub:
    """What lies on it, and what was asked of it.

    Attributes:
        files: bytes by path, of the one repository.
        private: None before the repository is made.
        commits: number of commits.
        damage: path of a file of which a bit flips on the way.
        refuse: whether commits are not allowed.
        tokens: authorizations that came with requests.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.private: bool | None = None
        self.commits = 0
        self.damage = ""
        self.refuse = False
        self.tokens: set[str] = set()
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, query: dict[str, list[str]]) -> tuple[int, Any]:
        """Status and content for a request."""
        if path == "/api/repos/create":
            self.private = json.loads(body)["visibility"] == "private"
            return 200, {"url": f"{self.url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if method == "PUT":
            self.blobs[path.rpartition("/")[2]] = body
            return 200, None
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]}
        if self.private is None:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if "/commit/" in path:
            return self._commit([json.loads(line) for line in body.splitlines()])
        if "/paths-info/" in path:
            asked = parse_qs(body.decode())["paths"]
            return 200, [self._describe(name) for name in asked if name in self.files]
        siblings = [{"rfilename": name} for name in self.files]
        return 200, {"id": path.removeprefix("/api/models/"), "private": self.private, "siblings": siblings}

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/blobs/{wanted['oid']}"}}}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LFS_ENDINGS) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _commit(self, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        if self.refuse:
            return 403, {"error": "you have no right to write here"}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        if self.damage:
            data = self.files[self.damage]
            self.files[self.damage] = data[:-1] + bytes([data[-1] ^ 1])
        self.commits += 1
        oid = f"{self.commits:040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/llamas/hum/commit/{oid}"}

    def _describe(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        sha256, blob = hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}} if path.endswith(LFS_ENDINGS) else {}
        return {"type": "file", "path": path, "size": len(data), "oid": blob, **lfs}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at its `url` meanwhile."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            asked = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            hub.tokens.add(self.headers.get("Authorization", ""))
            status, content = hub.answer(self.command, asked.path, body, parse_qs(asked.query))
            data = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return data

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
