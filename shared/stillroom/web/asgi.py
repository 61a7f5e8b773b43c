"""Middleware for ASGI apps (ASGI 3): `app = StillroomMiddleware(app, AsyncStillroom())`."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from functools import partial
from typing import Any, TypeAlias

from stillroom.errors import SessionStoreUnavailable
from stillroom.limits import Route
from stillroom.room import AsyncStillroom
from stillroom.web.ending import Header, ending, lacking, report_loss
from stillroom.web.gate import Asked, Middleware
from stillroom.web.problem import Answer, denied, failed
from stillroom.web.request_session import AsyncWebSession
from stillroom.wire import Budget

log = logging.getLogger("stillroom.web")

KEY = "stillroom.session"
LIMITED = "stillroom.limited"  # its limits have been checked, further out

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class StillroomMiddleware(Middleware[App, AsyncStillroom]):
    """Keeps the limits of a route table, and gives each request its session.

    `routes`: those a request may not exceed; it is answered with 429, or 503, before the app is called, and each
    response says how its client stands. None: no limits. `subject` says what is counted besides the address.

    `scope["stillroom.session"]` is the session: see AsyncWebSession. It is written when the response begins. A
    response of 5xx writes nothing. Redis away while it is read or written: 503 with Retry-After, also in place of
    the app's own 500, and the cookie is left as it is. `sessions=False`: there is none.

    Around an app that is mounted in another one: what the outer one has done is not done again. Websockets and
    lifespan pass through untouched. All Redis calls of a request, up to its response, share `request_timeout`.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = None if LIMITED in scope else self._gate.route(scope["method"], scope["path"])
        gives_session = self._has_sessions and KEY not in scope
        if route is None and not gives_session:
            await self.app(scope, receive, send)
            return
        token = self._cookie.read(_cookies(scope)) if gives_session else None
        session = AsyncWebSession(self._room._sessions_body, self._room.state, self._cookie, token)
        seen = {**scope, KEY: session} if gives_session else {**scope}
        with self._room.request() as budget:
            await self._respond(route, session, budget, seen, receive, send)
        report_loss(session)

    async def _respond(
        self,
        route: Route | None,
        session: AsyncWebSession,
        budget: Budget,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        method = scope["method"]
        headers = _decoded(scope["headers"]) if self._gate.reads_headers else []
        asked = Asked(method, scope["path"], _peer(scope), headers)
        said: list[Header] = []
        if route is not None:
            scope[LIMITED] = True
            decision = await self._room.state.run(self._gate.asking(route, asked, session))
            if not decision:
                await _send_answer(send, denied(decision, method))
                return
            said = list(decision.headers().items())
        tell = partial(self._gate.tell, route, asked, session)
        response = _Response(session, self._room, budget, method, said, tell, send)
        try:
            await response.of(self.app, scope, receive)
        finally:
            self._gate.learn(route, session)


class _Response:
    """A response on its way out: the session is written before its first message."""

    def __init__(
        self,
        session: AsyncWebSession,
        room: AsyncStillroom,
        budget: Budget,
        method: str,
        said: list[Header],
        tell: Callable[[int], None],
        send: Send,
    ) -> None:
        self._session = session
        self._room = room
        self._budget = budget
        self._method = method
        self._said = said  # of the limits
        self._tell = tell  # the status
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
        raw = list(message.get("headers", ()))
        headers = _decoded(raw)
        self._tell(message["status"])
        end = await self._room.state.run(
            ending(self._session, message["status"], headers, self._method)
        )
        if end.instead is not None:
            await self._answer(end.instead)
            return
        self._has_begun = True
        self._budget.left = math.inf  # a stream may be hours long
        more = _encoded([*end.headers, *lacking(headers, self._said)])
        await self._really_send({**message, "headers": [*raw, *more]})

    async def _answer(self, answer: Answer) -> None:
        self._has_begun = self._is_replaced = True
        headers = [*answer.headers, *lacking(answer.headers, self._said)]
        await _send_answer(self._really_send, answer._replace(headers=headers))


async def _send_answer(send: Send, answer: Answer) -> None:
    start = {"status": answer.status, "headers": _encoded(answer.headers)}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": answer.body})


def _peer(scope: Scope) -> str | None:
    client = scope.get("client")
    return client[0] if client else None


def _cookies(scope: Scope) -> str:
    """All Cookie headers as one: HTTP/2 may send several."""
    found = [value for name, value in scope["headers"] if name == b"cookie"]
    return b"; ".join(found).decode("latin-1")


def _decoded(headers: Iterable[tuple[bytes, bytes]]) -> list[Header]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _encoded(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers]
