"""A registry of images in memory, of which an engine on this machine can push and pull (OCI distribution 1.1)."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

BLOB = re.compile(r"/v2/(.+)/blobs/(sha256:\w+)")
UPLOADS = re.compile(r"/v2/(.+)/blobs/uploads/(\S*)")
MANIFEST = re.compile(r"/v2/(.+)/manifests/(\S+)")


class _Registry(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}  # tag or digest → media type, text


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Registry

    def do_GET(self) -> None:
        if found := BLOB.fullmatch(self.path):
            self._send(self.server.blobs.get(found[2]), "application/octet-stream", found[2])
        elif found := MANIFEST.fullmatch(self.path):
            kind, text = self.server.manifests.get(found[2], ("", None))
            self._send(text, kind, _digest(text or b""))
        else:
            self._send(b"{}", "application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        name = UPLOADS.fullmatch(self.path)
        assert name is not None
        place = uuid.uuid4().hex
        self.server.uploads[place] = self._body()
        self._answer(202, f"/v2/{name[1]}/blobs/uploads/{place}")

    def do_PATCH(self) -> None:
        place = urlsplit(self.path).path
        known = self.server.uploads[place.rpartition("/")[2]] + self._body()
        self.server.uploads[place.rpartition("/")[2]] = known
        self._answer(202, place, received=len(known))

    def do_PUT(self) -> None:
        asked = urlsplit(self.path)
        if found := MANIFEST.fullmatch(asked.path):
            text = self._body()
            for name in (found[2], _digest(text)):
                self.server.manifests[name] = self.headers["Content-Type"], text
            self._answer(201, asked.path, _digest(text))
            return
        (digest,) = parse_qs(asked.query)["digest"]
        text = self.server.uploads.pop(asked.path.rpartition("/")[2]) + self._body()
        assert _digest(text) == digest
        self.server.blobs[digest] = text
        self._answer(201, asked.path, digest)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while length := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, location: str, digest: str = "", received: int = 0) -> None:
        self.send_response(status)
        self.send_header("Range", f"0-{max(0, received - 1)}")
        self.send_header("Location", location)
        self.send_header("Docker-Content-Digest", digest) if digest else None
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, text: bytes | None, kind: str, digest: str = "") -> None:
        self.send_response(404 if text is None else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Docker-Content-Digest", digest) if digest else None
        self.send_header("Content-Length", str(len(text or b"")))
        self.end_headers()
        if self.command == "GET" and text:
            self.wfile.write(text)


def _digest(text: bytes) -> str:
    return f"sha256:{sha256(text).hexdigest()}"


@contextmanager
def registry() -> Iterator[str]:
    """Serve an empty registry; yield its address. An engine takes one on 127.0.0.1 without TLS."""
    with _Registry() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
