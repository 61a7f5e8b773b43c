"""Middleware for ASGI apps (ASGI 3):

app = StillroomMiddleware(app, AsyncStillroom())
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from stillroom.errors import SessionStoreUnavailable
from stillroom.room import AsyncStillroom
from stillroom.web.ending import ending, report_loss
from stillroom.web.problem import Answer, failed
from stillroom.web.request_session import AsyncWebSession
from stillroom.web.session_cookie import SessionCookie
from stillroom.wire import Budget

log = logging.getLogger("stillroom.web")

KEY = "stillroom.session"

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class StillroomMiddleware:
    """Gives each HTTP request its session, `scope["stillroom.session"]`: see AsyncWebSession.

    It is written when the response begins. A response of 5xx writes nothing. Redis away while it is read or
    written: 503 with Retry-After, also in place of the app's own 500, and the cookie is left as it is. In an app
    that is mounted in another one's, the outer session is used. Websockets and lifespan pass through untouched.
    All Redis calls of a request, up to its response, share `request_timeout` seconds.
    """

    def __init__(
        self, app: App, room: AsyncStillroom, *, cookie: SessionCookie | None = None
    ) -> None:
        self.app = app
        self._room = room
        self._cookie = cookie or SessionCookie()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or KEY in scope:
            await self.app(scope, receive, send)
            return
        room = self._room
        token = self._cookie.read(_cookies(scope))
        session = AsyncWebSession(room._sessions_body, room.state, self._cookie, token)
        with room.request() as budget:
            response = _Response(session, room, budget, scope["method"], send)
            await response.of(self.app, {**scope, KEY: session}, receive)
        report_loss(session)


class _Response:
    """A response on its way out: the session is written before its first message."""

    def __init__(
        self,
        session: AsyncWebSession,
        room: AsyncStillroom,
        budget: Budget,
        method: str,
        send: Send,
    ) -> None:
        self._session = session
        self._room = room
        self._budget = budget
        self._method = method
        self._really_send = send
        self._has_begun = False
        self._is_replaced = False

    async def of(self, app: App, scope: Scope, receive: Receive) -> None:
        try:
            await app(scope, receive, self._send)
        except SessionStoreUnavailable as error:
            # Raised through a framework that has answered with 500 already: that became a 503.
            if error is not self._session.failure or (self._has_begun and not self._is_replaced):
                raise
            log.warning("a request was not answered for want of its session: %s", error)
            if not self._has_begun:
                await self._answer(failed(error, self._method))

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._has_begun:
            await self._begin(message)
        elif not self._is_replaced:
            await self._really_send(message)

    async def _begin(self, message: Message) -> None:
        headers = list(message.get("headers", ()))
        names = {name.decode("latin-1").lower() for name, _ in headers}
        end = await self._room.state.run(
            ending(self._session, message["status"], names, self._method)
        )
        if end.instead is not None:
            await self._answer(end.instead)
            return
        self._has_begun = True
        self._budget.left = math.inf  # a stream may be hours long
        await self._really_send({**message, "headers": [*headers, *_encoded(end.headers)]})

    async def _answer(self, answer: Answer) -> None:
        self._has_begun = self._is_replaced = True
        start = {"status": answer.status, "headers": _encoded(answer.headers)}
        await self._really_send({"type": "http.response.start", **start})
        await self._really_send({"type": "http.response.body", "body": answer.body})


def _cookies(scope: Scope) -> str:
    """All Cookie headers as one: HTTP/2 may send several."""
    found = [value for name, value in scope["headers"] if name == b"cookie"]
    return b"; ".join(found).decode("latin-1")


def _encoded(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers]
