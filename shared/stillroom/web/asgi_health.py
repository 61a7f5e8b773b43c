"""The health endpoints as an ASGI app."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from stillroom.background import aside
from stillroom.health import Report
from stillroom.health.past import NOT_TOLD
from stillroom.limits.routes import below
from stillroom.misuse import explained
from stillroom.room import AsyncStillroom
from stillroom.web.asgi_types import App, Receive, Scope, Send
from stillroom.web.headers import decoded, encoded
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


@explained
class HealthASGI:
    """See HealthWSGI: the same for ASGI servers. `app.add_middleware(HealthASGI, room=room)` wraps an app too."""

    def __init__(
        self,
        *given: App | AsyncStillroom | None,
        app: App | None = None,
        room: AsyncStillroom | None = None,
    ) -> None:
        inner, room = app_and_room(given, app, room, AsyncStillroom, "HealthASGI")
        self.app: App | None = inner
        self._endpoints = Endpoints(room.settings)
        self._health = room.health
        self._loaders = room.cache.loaders
        self._reports = Reports(room.health.check)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        request = _request(scope) if is_http else None
        if self.app is not None and (request is None or self._endpoints.route(request) is None):
            return await self.app(scope, receive, send)
        if scope["type"] == "lifespan":
            return await _live(receive, send)
        if request is None:
            return None  # a WebSocket: closed by the server, for it was not accepted
        response = self._endpoints.at_once(request)
        if response is None and self._endpoints.is_operating(request):
            if self._endpoints.is_act(request):
                request = request._replace(body=await _body(receive))
            response = await asyncio.to_thread(self._endpoints.operate, request, self._loaders)
        if response is None:
            response = await self._answer(request, await self._reports.newest())
        return await _send(request, response, send)

    async def _answer(self, request: Request, held: Held | None) -> Response:
        if not self._endpoints.is_page(request):
            return self._endpoints.answer(request, held)
        hours = self._endpoints.hours(request)
        past = await self._health.past(hours) if has_past(held) else NOT_TOLD
        return await aside(self._endpoints.page, request, held, past)


class Reports:
    """Keep the newest report. One task makes a new one when it is too old. All others wait for it, not long."""

    def __init__(self, check: Callable[[], Awaitable[Report]]) -> None:
        self._check = check
        self._held: Held | None = None
        self._task: asyncio.Task[None] | None = None

    async def newest(self) -> Held | None:
        """See wsgi_health.Reports.newest."""
        if self._held is not None and self._held.is_fresh:
            return self._held
        await asyncio.wait([self._begun()], timeout=WAIT_S)
        held = self._held
        return held if held is not None and held.age() < STALE_S else None

    def _begun(self) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._make())
        return self._task

    async def _make(self) -> None:
        self._held = Held(await self._check(), time.monotonic())


def _request(scope: Scope) -> Request:
    headers = {name.lower(): value for name, value in decoded(scope["headers"])}
    root: str = scope.get("root_path", "")
    path = below(root, scope["path"])  # servers differ in whether the path includes the root
    client = scope.get("client")
    query = scope.get("query_string", b"").decode("latin-1")
    return Request(scope["method"], path, root, client[0] if client else None, headers, query)


async def _body(receive: Receive) -> bytes:
    """Return the body of a form, or nothing if it is too long."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > BODY_LIMIT:
            return b""
    return body


async def _send(request: Request, response: Response, send: Send) -> None:
    headers = encoded(sized(response))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    body = b"" if request.method == "HEAD" else response.body
    await send({"type": "http.response.body", "body": body})


async def _live(receive: Receive, send: Send) -> None:
    """Answer a server's lifespan: this app has nothing to start or stop."""
    while True:
        stage = (await receive())["type"]
        await send({"type": f"{stage}.complete"})
        if stage == "lifespan.shutdown":
            return
