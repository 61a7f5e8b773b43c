"""A small web app for the stack: until yours takes its place, and for the tests that kill things under it.

`python -m shop` serves it on port 8000; workers load this module for its loaders (STILLROOM_LOADERS=shop).

    GET  /product/7        the page, from the cache until somebody changes it; its slow database is in this file
    GET  /stock/7          as good as a second old, or as the last load: a worker refreshes it behind the request
    POST /product/7        the price was changed: what was cached under its tag is dead when this returns
    POST /order/7          the same by a worker, soon: written down before this returns; /order/7-9: of three
    POST /login            a session; its token comes back as text, as a cookie would carry it
    GET  /me               with the token in X-Session: whose it is
    GET  /health/live      for the container's health check: this process answers; it does not ask Redis
"""

from __future__ import annotations

import json
import signal
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from stillroom import SessionStoreUnavailable, Stillroom, StillroomError

PORT = 8000
Answer = tuple[HTTPStatus, Any]

room = Stillroom()


@room.cache.cached("product:{id}", ttl=3_600, tags=["product:{id}"], name="product")
def load_product(id: int) -> dict[str, Any]:
    return _query(id)


@room.cache.cached("stock:{id}", ttl=1, swr=3_600, name="stock")
def load_stock(id: int) -> dict[str, Any]:
    return _query(id)


def _query(id: int) -> dict[str, Any]:
    """As slow as a database. `loaded` shows which load a page was made from."""
    time.sleep(0.01)
    return {"id": id, "loaded": time.time()}


class Shop(BaseHTTPRequestHandler):
    """One request. Redis away is no reason to fail: a page is loaded, a change waits, a session answers 503."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with room.request():
            self._answer(*self._get(*self.path.strip("/").split("/")))

    def do_POST(self) -> None:
        with room.request():
            self._answer(*self._post(*self.path.strip("/").split("/")))

    def log_message(self, format: str, *args: Any) -> None:
        """Traefik writes the access log."""

    def _get(self, page: str, about: str = "") -> Answer:
        match page, about:
            case "health", "live":
                return HTTPStatus.OK, "alive"
            case "product", id if id.isdecimal():
                return HTTPStatus.OK, load_product(int(id))
            case "stock", id if id.isdecimal():
                return HTTPStatus.OK, load_stock(int(id))
            case "me", "":
                return self._me()
        return HTTPStatus.NOT_FOUND, "no such page"

    def _me(self) -> Answer:
        try:
            session = room.sessions.get(self.headers.get("X-Session", ""))
        except SessionStoreUnavailable:
            return HTTPStatus.SERVICE_UNAVAILABLE, "nobody can say just now"
        return (HTTPStatus.OK, session.user_id) if session else (HTTPStatus.UNAUTHORIZED, "log in")

    def _post(self, page: str, about: str = "") -> Answer:
        try:
            match page, about:
                case "product", id if id.isdecimal():
                    room.cache.invalidate_by_tag(f"product:{id}", defer=True)
                case "order", ids if ids.replace("-", "", 1).isdecimal():
                    first, _, last = ids.partition("-")
                    products = range(int(first), int(last or first) + 1)
                    room.tasks.invalidate_tags(*(f"product:{one}" for one in products))
                case "login", "":
                    return HTTPStatus.CREATED, room.sessions.create("u1", {}).token
                case _:
                    return HTTPStatus.NOT_FOUND, "no such page"
        except StillroomError as error:
            return HTTPStatus.SERVICE_UNAVAILABLE, type(error).__name__
        return HTTPStatus.ACCEPTED, "done"

    def _answer(self, status: HTTPStatus, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Serve until SIGTERM; then finish what was begun."""
    server = ThreadingHTTPServer(("", PORT), Shop)
    server.daemon_threads = False

    def stop(*_: Any) -> None:
        threading.Thread(target=server.shutdown).start()  # it waits for the loop that we interrupt

    signal.signal(signal.SIGTERM, stop)
    with room, server:
        server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
