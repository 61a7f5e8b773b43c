"""Middleware for ASGI apps (ASGI 3): `app = StillroomMiddleware(app, AsyncStillroom())`."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from functools import partial
from typing import Any, TypeAlias

from stillroom.errors import SessionStoreUnavailable
from stillroom.limits import Route
from stillroom.operation import Driver
from stillroom.room import AsyncStillroom
from stillroom.web.ending import Header, ending, lacking, report_loss
from stillroom.web.gate import Asked, Middleware
from stillroom.web.problem import Answer, denied, failed, foreign
from stillroom.web.request_session import AsyncWebSession
from stillroom.web.scope_session import Ahead, ScopeSession
from stillroom.web.sockets import POLICY_VIOLATION, Handshake, refuse
from stillroom.wire import Budget

log = logging.getLogger("stillroom.web")

KEY = "stillroom.session"
STARLETTES = "session"  # where request.session is looked for
TEST_CLIENT = ("testclient", 50000)
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

    `scope["stillroom.session"]` is the session: see AsyncWebSession; `scope["session"]`, which is
    `request.session`, is the same as a dict. It is written when the response begins. A response of 5xx writes
    nothing. Redis away while it is read or written: 503 with Retry-After, also in place of the app's own 500, and
    the cookie is left as it is. `sessions=False`: there is none. `same_origin=True` refuses what another site's
    page sends (403): unsafe methods, and websockets, by Sec-Fetch-Site and Origin; a list names the origins that
    may.

    A websocket has its session too, which is written when it is accepted; after that a change is SessionTooLate.
    Around an app that is mounted in another one: what the outer one has done is not done again. Lifespan passes
    through untouched. All Redis calls of a request, up to its response, share `request_timeout`.
    """

    def _prepare(self) -> None:
        self._test_cookie = self._cookie.for_test_client()
        self._at_once = Driver(self._room.state_wire.for_threads)
        self._ahead = Ahead()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and self._origin and self._is_refused(scope):
            await _refuse(scope, send)
            return
        if scope["type"] == "websocket" and self._has_sessions and KEY not in scope:
            await self._connect(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = None if LIMITED in scope else self._gate.route(scope["method"], scope["path"])
        gives_session = self._has_sessions and KEY not in scope
        if route is None and not gives_session:
            await self.app(scope, receive, send)
            return
        session = self._session(scope, gives_session)
        seen = self._with_session(scope, session) if gives_session else {**scope}
        with self._room.request() as budget:
            if gives_session and route is None and scope["path"] in self._ahead:
                await self._room.state.run(session.reading_ahead())
            await self._respond(route, session, budget, seen, receive, send)
        report_loss(session)

    def _is_refused(self, scope: Scope) -> bool:
        """Whether another site's page made this request, or opens this websocket."""
        assert self._origin is not None
        found = {name: value.decode("latin-1") for name, value in scope["headers"]}
        said = [found.get(name, "") for name in (b"sec-fetch-site", b"origin", b"host")]
        if scope["type"] == "websocket":
            return self._origin.is_foreign(*said)
        return self._origin.refuses(scope["method"], *said)

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A websocket."""
        session = self._session(scope, True)
        seen = self._with_session(scope, session)
        with self._room.request() as budget:
            handshake = Handshake(session, self._room, budget, scope, send)
            await handshake.of(self.app, seen, receive)
        report_loss(session)

    def _session(self, scope: Scope, is_given: bool) -> AsyncWebSession:
        cookie = self._test_cookie if _is_test(scope) else self._cookie
        token = cookie.read(_cookies(scope)) if is_given else None
        return AsyncWebSession(self._room._sessions_body, self._room.state, cookie, token, scope)

    def _with_session(self, scope: Scope, session: AsyncWebSession) -> Scope:
        seen = {**scope, KEY: session}
        if STARLETTES not in scope:
            seen[STARLETTES] = ScopeSession(session, self._at_once, self._ahead, scope["path"])
        return seen

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
        if end.without:
            raw = [pair for pair in raw if pair[0].decode("latin-1").lower() not in end.without]
        more = _encoded([*end.headers, *lacking(headers, self._said)])
        await self._really_send({**message, "headers": [*raw, *more]})

    async def _answer(self, answer: Answer) -> None:
        self._has_begun = self._is_replaced = True
        headers = [*answer.headers, *lacking(answer.headers, self._said)]
        await _send_answer(self._really_send, answer._replace(headers=headers))


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "http":
        await _send_answer(send, foreign(scope["method"]))
    else:
        can_answer = "websocket.http.response" in (scope.get("extensions") or {})
        await refuse(send, foreign(), can_answer, POLICY_VIOLATION)


async def _send_answer(send: Send, answer: Answer) -> None:
    start = {"status": answer.status, "headers": _encoded(answer.headers)}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": answer.body})


def _is_test(scope: Scope) -> bool:
    """Whether this is Starlette's own test client, on plain http. It keeps cookies as strictly as a browser."""
    return scope.get("client") == TEST_CLIENT and scope.get("scheme") in ("http", "ws")


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
