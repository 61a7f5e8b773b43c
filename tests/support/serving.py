"""Real HTTP servers around WSGI and ASGI apps, in threads of the test, and a client that asks them."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.validate import validator

WITHIN = 10.0


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


def ask(
    port: int,
    path: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN)
    try:
        connection.request(method, path, body, headers=dict(headers or {}))
        response = connection.getresponse()
        named = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, named, response.read())
    finally:
        connection.close()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class _Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 512


@contextmanager
def serve_wsgi(app: Any) -> Iterator[int]:
    """Serve the app and yield the port. The standard library's validator checks every exchange."""
    server = _Threaded(("127.0.0.1", 0), _Quiet)
    server.set_app(validator(app))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(WITHIN)
        server.server_close()


class AsgiServer:
    """A server with enough of HTTP/1.1 to ask an ASGI app for things: one request a connection."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")
            method, target, _ = first.split(" ")
            headers = [tuple(line.split(": ", 1)) for line in lines if line]
            scope = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "method": method,
                "path": target.partition("?")[0],
                "query_string": target.partition("?")[2].encode(),
                "root_path": "",
                "headers": [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in headers],
                "client": writer.get_extra_info("peername")[:2],
            }

            length = next((int(v) for n, v in headers if n.lower() == "content-length"), 0)

            async def receive() -> dict[str, Any]:
                body = await reader.readexactly(length)
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    fields = [b"%b: %b" % pair for pair in message["headers"]]
                    lead = b"HTTP/1.1 %d -" % message["status"]
                    writer.write(b"\r\n".join([lead, *fields, b"Connection: close", b"", b""]))
                else:
                    writer.write(message["body"])

            await self._app(scope, receive, send)
            await writer.drain()
        finally:
            writer.close()


@contextmanager
def serve_asgi(make_app: Any) -> Iterator[int]:
    """Serve the app and yield the port.

    `make_app()` runs in the event loop and gives (app, coroutine function to close).
    """
    started: threading.Event = threading.Event()
    port, loop, ended = 0, asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        nonlocal port
        app, close = make_app()
        server = await asyncio.start_server(AsgiServer(app).handle, "127.0.0.1", 0, backlog=512)
        port = server.sockets[0].getsockname()[1]
        started.set()
        await ended.wait()
        server.close()
        await close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(WITHIN)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(WITHIN)
        loop.close()
