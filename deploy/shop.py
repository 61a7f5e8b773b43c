"""A small web app for the stack: until yours takes its place, and for the tests that kill things under it.

`python -m shop` serves it on port 8000; workers load this module for its loaders (STILLROOM_LOADERS=shop).

    GET  /product/7        the page, from the cache until somebody changes it; its slow database is in this file
    GET  /stock/7          as good as a second old, or as the last load: a worker refreshes it behind the request
    POST /product/7        the price was changed: what was cached under its tag is dead when this returns
    POST /order/7          the same by a worker, soon: written down before this returns; /order/7-9: of three
    POST /login            a session; its token comes back as text, as a cookie would carry it
    GET  /me               with the token in X-Session: whose it is
    GET  /health/live      for the container's health check: this process answers; it does not ask Redis
    GET  /health, /metrics, /status      what operators look at, for whom the health token opens them
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from stillroom import SessionStoreUnavailable, Stillroom, StillroomError
from stillroom.web import HealthWSGI

PORT = int(os.environ.get("PORT", "8000"))
BODY_LIMIT = 64 * 1024  # bytes
AT_ONCE = 100  # products that one order changes
is_id = re.compile(r"[0-9]{1,9}", re.ASCII).fullmatch
ids_in = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII).fullmatch
Environ = dict[str, Any]
Answer = tuple[HTTPStatus, Any]

room = Stillroom()


@room.cache.cached("product:{id}", ttl=3_600, tags=["product:{id}"], name="product")
def load_product(id: int) -> dict[str, Any]:
    return _query(id)


@room.cache.cached("stock:{id}", ttl=1, swr=3_600, name="stock")
def load_stock(id: int) -> dict[str, Any]:
    return _query(id)


def _query(id: int) -> dict[str, Any]:
    """Answer as slowly as a database. `loaded` shows which load a page was made from."""
    time.sleep(0.01)
    return {"id": id, "loaded": time.time()}


def shop(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """One request. Redis away is no reason to fail: a page is loaded, a change waits, a session answers 503."""
    page, _, about = environ["PATH_INFO"].strip("/").partition("/")
    with room.request():
        if environ["REQUEST_METHOD"] == "POST":
            status, body = _post(page, about)
        else:
            status, body = _get(page, about, environ)
    start_response(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]


def _get(page: str, about: str, environ: Environ) -> Answer:
    match page, about:
        case "product", id if is_id(id):
            return HTTPStatus.OK, load_product(int(id))
        case "stock", id if is_id(id):
            return HTTPStatus.OK, load_stock(int(id))
        case "me", "":
            return _me(environ.get("HTTP_X_SESSION", ""))
    return HTTPStatus.NOT_FOUND, "no such page"


def _me(token: str) -> Answer:
    try:
        session = room.sessions.get(token)
    except SessionStoreUnavailable:
        return HTTPStatus.SERVICE_UNAVAILABLE, "nobody can say just now"
    return (HTTPStatus.OK, session.user_id) if session else (HTTPStatus.UNAUTHORIZED, "log in")


def _post(page: str, about: str) -> Answer:
    try:
        match page, about:
            case "product", id if is_id(id):
                room.cache.invalidate_by_tag(f"product:{id}", defer=True)
            case "order", ids if found := ids_in(ids):
                products = range(int(found[1]), int(found[2] or found[1]) + 1)[:AT_ONCE]
                room.tasks.invalidate_tags(*(f"product:{one}" for one in products))
            case "login", "":
                return HTTPStatus.CREATED, room.sessions.create("u1", {}).token
            case _:
                return HTTPStatus.NOT_FOUND, "no such page"
    except StillroomError as error:
        return HTTPStatus.SERVICE_UNAVAILABLE, type(error).__name__
    return HTTPStatus.ACCEPTED, "done"


application = HealthWSGI(room=room, app=shop)


class Gateway(BaseHTTPRequestHandler):
    """Calls a WSGI application for each request, over connections that stay open: a server without a dependency."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length") or "0"
        is_known = is_id(length) and "Transfer-Encoding" not in self.headers
        if not is_known or int(length) > BODY_LIMIT:
            # What is left of it would be the next request on this connection, which may be somebody else's.
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)  # and closes it
            return
        sent = self.rfile.read(int(length))
        answer: list[Any] = []
        body = b"".join(application(self._environ(sent), lambda *given: answer.extend(given)))
        status, headers, *_ = answer
        code, _, phrase = status.partition(" ")
        self.send_response(int(code), phrase)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Traefik writes the access log."""

    def _environ(self, body: bytes) -> Environ:
        path, _, query = self.path.partition("?")
        fields = {
            f"HTTP_{name.upper().replace('-', '_')}": value for name, value in self.headers.items()
        }
        return {
            "REQUEST_METHOD": self.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote(path, "latin-1"),
            "QUERY_STRING": query,
            "REMOTE_ADDR": self.client_address[0],
            "SERVER_NAME": "shop",
            "SERVER_PORT": str(PORT),
            "SERVER_PROTOCOL": self.request_version,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.url_scheme": "http",
            **fields,
        }


def main() -> None:
    """Serve until SIGTERM; then finish what was begun."""
    server = ThreadingHTTPServer(("", PORT), Gateway)
    server.daemon_threads = False

    def stop(*_: Any) -> None:
        threading.Thread(target=server.shutdown).start()  # it waits for the loop that we interrupt

    signal.signal(signal.SIGTERM, stop)
    with room, server:
        server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
