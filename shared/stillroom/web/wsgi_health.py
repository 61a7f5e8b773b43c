"""The health endpoints as a WSGI app."""

from __future__ import annotations

import http
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from stillroom.background import started
from stillroom.health.past import NOT_TOLD
from stillroom.misuse import explained
from stillroom.room import Stillroom
from stillroom.web.health import (
    STALE_S,
    WAIT_S,
    Endpoints,
    Held,
    Request,
    Response,
    has_past,
    sized,
)
from stillroom.web.operate import BODY_LIMIT
from stillroom.web.placing import app_and_room
from stillroom.whole import number_in
from stillroom.wire import reset_after_fork

Application = Callable[[dict[str, Any], Callable[..., Any]], Any]  # see App in wsgi.py


@explained
class HealthWSGI:
    """`/health`, `/health/live`, `/health/ready`, `/metrics` and the page `/status`.

    Mount it anywhere as `HealthWSGI(room)`, or let it wrap your app: `application = HealthWSGI(application, room)`.
    Raises SettingsError for a room of the other face.
    Whatever Redis or the resolver does, an answer takes 250 ms at the most; the page, which reads a day, some more.
    """

    def __init__(
        self,
        *given: Application | Stillroom | None,
        app: Application | None = None,
        room: Stillroom | None = None,
    ) -> None:
        inner, room = app_and_room(given, app, room, Stillroom, "HealthWSGI")
        self.app: Application | None = inner
        self._endpoints = Endpoints(room.settings)
        self._health = room.health
        self._loaders = room.cache.loaders
        self._reports = Reports(room.health.check)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        request = _request(environ)
        if self.app is not None and self._endpoints.route(request) is None:
            body: Iterable[bytes] = self.app(environ, start_response)
            return body
        response = self._endpoints.at_once(request)
        if response is None and self._endpoints.is_operating(request):
            if self._endpoints.is_act(request):
                request = request._replace(body=_body(environ))
            response = self._endpoints.operate(request, self._loaders)
        if response is None:
            response = self._answer(request, self._reports.newest())
        return _send(request, response, start_response)

    def _answer(self, request: Request, held: Held | None) -> Response:
        if not self._endpoints.is_page(request):
            return self._endpoints.answer(request, held)
        hours = self._endpoints.hours(request)
        past = self._health.past(hours) if has_past(held) else NOT_TOLD
        return self._endpoints.page(request, held, past)


class Reports:
    """Keep the newest report. One thread makes a new one when it is too old. All others wait for it, not long."""

    def __init__(self, check: Callable[[], Any]) -> None:
        self._check = check
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Begin without report and thread: a thread does not survive a fork."""
        self._held: Held | None = None
        self._lock = threading.RLock()  # a signal handler may call while this thread holds it
        self._thread: threading.Thread | None = None

    def newest(self) -> Held | None:
        """Return a report of the last 2 s; if none can be had in time, one of the last 30 s; else None."""
        if not self._is_fresh() and (thread := self._at_work()) is not None:
            thread.join(WAIT_S)
        return self._held if self._held is not None and self._held.age() < STALE_S else None

    def _is_fresh(self) -> bool:
        return self._held is not None and self._held.is_fresh

    def _at_work(self) -> threading.Thread | None:
        """Return the one thread that makes the report for every caller, started if a report is due."""
        with self._lock:
            is_at_work = self._thread is not None and self._thread.is_alive()
            if not is_at_work and not self._is_fresh():
                self._thread = started(self._make, "stillroom health")
            return self._thread  # None where none is free: the last report is used

    def _make(self) -> None:
        self._held = Held(self._check(), time.monotonic())


def _request(environ: dict[str, Any]) -> Request:
    headers = {
        name[5:].replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    method, path = environ.get("REQUEST_METHOD", "GET"), environ.get("PATH_INFO", "")
    mount, query = environ.get("SCRIPT_NAME", ""), environ.get("QUERY_STRING", "")
    return Request(method, path, mount, environ.get("REMOTE_ADDR"), headers, query)


def _body(environ: dict[str, Any]) -> bytes:
    """Return the body of a form, or nothing if it is too long or has no length."""
    length = number_in(environ.get("CONTENT_LENGTH") or "0")
    if length is None or length > BODY_LIMIT:
        return b""
    body: bytes = environ["wsgi.input"].read(length)
    return body


def _send(
    request: Request, response: Response, start_response: Callable[..., Any]
) -> Iterable[bytes]:
    phrase = http.HTTPStatus(response.status).phrase
    start_response(f"{response.status} {phrase}", sized(response))
    return [] if request.method == "HEAD" else [response.body]
