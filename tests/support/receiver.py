"""A receiver of a webhook, which keeps the requests and answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """`answers`: a status for each request to come, then 200s; 0: the connection is closed without an answer."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    @property
    def events(self) -> list[dict[str, Any]]:
        """Return all events of the requests that were answered well."""
        return [event for body in self.bodies for event in body["events"]]

    @property
    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver that listens on this machine."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = receiver.answers.pop(0) if receiver.answers else 200
            if not status:
                self.connection.close()
                return
            receiver.raw.append(body)
            receiver.headers.append({k.lower(): v for k, v in self.headers.items()})
            if 200 <= status < 300:
                receiver.bodies.append(json.loads(body))
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}/a-secret-path"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
