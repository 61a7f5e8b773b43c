"""Middleware for ASGI apps (ASGI 3): `app = StillroomMiddleware(app, AsyncStillroom())`."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

from stillroom.limits import Route
from stillroom.limits.routes import below
from stillroom.misuse import explained
from stillroom.operation import Driver, Operation
from stillroom.room import AsyncStillroom
from stillroom.shown import repr_of, shown
from stillroom.web.asgi_types import App, Message, Receive, Scope, Send
from stillroom.web.cors import Learned, asking_for, kept, with_exposed
from stillroom.web.ending import Ending, answer_to, report_loss
from stillroom.web.explain import ExplainASGI
from stillroom.web.fetched import is_meant_in_scope
from stillroom.web.gate import PREFLIGHT, Asked, Middleware
from stillroom.web.headers import Header, decoded, encoded, length_of
from stillroom.web.limited import Charge
from stillroom.web.problem import Answer, foreign
from stillroom.web.request_session import AsyncWebSession
from stillroom.web.scope_session import Ahead, ScopeSession
from stillroom.web.sockets import (
    FORBIDDEN,
    POLICY_VIOLATION,
    SWITCHING,
    Handshake,
    can_answer,
    refuse,
)
from stillroom.web.visit import KEY, LIMITED, VISIT, Visit
from stillroom.wire import Budget, to_its_end

log = logging.getLogger("stillroom.web")

STARLETTES = "session"  # where request.session is looked for
TEST_CLIENT = ("testclient", 50000)
LIMITER = "stillroom.limiter"  # the middleware that began the visit
# What an app writes into its scope for middlewares further out, such as Starlette's own for OpenTelemetry.
FOUND = frozenset(
    ["route", "endpoint", "path_params", "root_path", "app_root_path", "state", "user", "auth"]
)

_OURS = ScopeSession, type(None)


@explained
class StillroomMiddleware(Middleware[App, AsyncStillroom]):
    """Keeps limits, of a route table and of endpoints, and gives each request its session.

    `routes`: a table of limits by path. A request over one of them is answered with 429, or 503, before the app is
    called, and each response says how its client stands. None: only limits of endpoints (see stillroom.web.fastapi
    and .starlette). `subject` says what is counted besides the address and the session's user; `exempt_when` which
    requests the table passes over; `render` answers a refusal in the app's own words (see stillroom.web.Refusal).

    `scope["stillroom.session"]` is the session: see AsyncWebSession; `scope["session"]`, which is
    `request.session`, is the same as a dict. It is written when the response begins. A response of 5xx writes
    nothing. Redis away while it is read or written: 503 with Retry-After, also in place of the app's own 500, and
    the cookie is left as it is. `sessions=False`: there is none. `same_origin=True` refuses what another site's
    page sends (403): unsafe methods, and websockets, by Sec-Fetch-Site and Origin; a list names the origins that
    may.

    A websocket has its session too, which is written when it is accepted; after that a change is SessionTooLate.
    Its handshake is limited as GET is: one that is refused is answered with 429 where the server can, else closed
    with 1008, which is 403, as for a banned client. An app that is mounted in another one may have a middleware of
    its own: the session is the outer one's, both tables are looked at, and a limit that both name counts once.
    Lifespan passes through untouched. All Redis calls of a request, up to its response, share `request_timeout`.
    Raises SettingsError for a Stillroom, and InvalidLimit for a table that makes no sense.
    """

    _kind = AsyncStillroom
    charges_endpoints = True  # see carriers.py

    def _prepare(self) -> None:
        if self._room.settings.explain_header:
            self.app = ExplainASGI(self.app, self._room)
        self._test_cookie = self._cookie.for_test_client()
        self._at_once = Driver(self._room.state_wire.for_threads)
        self._ahead = Ahead()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._misfits:
            misfits, self._misfits = self._misfits, None
            misfits.tell(self.app, scope.get("root_path", ""))
        kind = scope["type"]
        if kind != "http":
            await self._pass_other(kind, scope, receive, send)
            return
        if self._origin and self._is_foreign(scope):
            await _refuse(scope, send)
            return
        route = None if LIMITED in scope else self._route(scope, scope["method"])
        gives_session = self._gives_session(scope)
        given = dict(scope["headers"])
        session = self._session(scope, given, gives_session)
        seen = self._with_session(scope, session) if gives_session else {**scope}
        visit, is_inner = self._enter(seen, given, scope["method"])
        with self._room.request() as budget:
            if gives_session and route is None and scope["path"] in self._ahead:
                await self._room.state.run(session.reading_ahead())
            if route is None or await self._admits(route, visit, seen, send):
                has_origin = bool(given.get(b"origin"))
                response = _Response(
                    self, route, session, visit, scope, seen, budget, send, is_inner, has_origin
                )
                try:
                    await response.of(receive)
                finally:
                    self._gate.learn(visit)
                    if visit.is_holding and not is_inner:
                        await to_its_end(self._room.state.run(visit.over(self._gate.body)))
        report_loss(session)

    async def _pass_other(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a scope that is no request: a websocket, or lifespan."""
        if kind != "websocket":
            await self.app(scope, receive, send)
        elif self._origin and self._is_foreign(scope):
            await _refuse(scope, send)
        else:
            await self._connect(scope, receive, send)

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Connect a websocket, whose handshake is a GET and is limited as one."""
        route = None if LIMITED in scope else self._route(scope, "GET")
        gives_session = self._gives_session(scope)
        given = dict(scope["headers"])
        session = self._session(scope, given, gives_session)
        seen = self._with_session(scope, session) if gives_session else {**scope}
        visit, is_inner = self._enter(seen, given, "GET")

        def ending(status: int, headers: list[Header]) -> Operation[Ending]:
            """End a handshake as a request ends: what does not count is given back, however long it stays open."""
            _show(scope, seen)
            self._gate.tell(route, visit, status, session.unknown_token)
            return self._gate.ending(visit, session, status, headers)

        with self._room.request() as budget:
            if route is None or await self._admits(route, visit, seen, send):
                keeps = self._has_sessions
                handshake = Handshake(session, self._room, budget, seen, send, ending, keeps)
                try:
                    await handshake.of(self.app, seen, receive)
                finally:
                    _show(scope, seen)
                    if visit.is_holding and not is_inner:
                        status = SWITCHING if handshake.is_accepted else FORBIDDEN
                        await to_its_end(self._room.state.run(self._gate.closing(visit, status)))
        report_loss(session)

    def _is_foreign(self, scope: Scope) -> bool:
        """Return whether another site's page made this request, or opens this websocket."""
        assert self._origin is not None
        found = {name: value.decode("latin-1") for name, value in scope["headers"]}
        said = [found.get(name, "") for name in (b"sec-fetch-site", b"origin", b"host")]
        if scope["type"] == "websocket":
            return self._origin.is_foreign(*said)
        return self._origin.refuses(scope["method"], *said)

    def _gives_session(self, scope: Scope) -> bool:
        """Return whether the request gets its session here: it has none from further out, or one that is over."""
        return self._has_sessions and (KEY not in scope or scope[KEY].is_over)

    def _session(
        self, scope: Scope, given: Mapping[bytes, bytes], is_given: bool
    ) -> AsyncWebSession:
        """Return the session of a request. `given`: the last header of each name."""
        cookie, token = self._test_cookie if _is_test(scope) else self._cookie, None
        if is_given and (cookies := given.get(b"cookie")) is not None:
            if len(given) < len(scope["headers"]):  # HTTP/2 may send several
                cookies = _all(scope, b"cookie", b"; ")
            token = cookie.read(cookies.decode("latin-1"))
        return AsyncWebSession(
            self._room.operations.sessions, self._room.state, cookie, token, scope
        )

    def _with_session(self, scope: Scope, session: AsyncWebSession) -> Scope:
        seen = {**scope, KEY: session}
        if isinstance(scope.get(STARLETTES), _OURS):
            seen[STARLETTES] = ScopeSession(session, self._at_once, self._ahead, scope["path"])
        return seen

    def _route(self, scope: Scope, method: str) -> Route | None:
        if self._gate.routes is None:
            return None
        path, root = scope["path"], self._roots.of(scope.get("root_path", ""))
        inner, header = below(root, path), partial(_first, scope)
        # Litestar and Quart take what is behind the root path, wherever that stands in the path.
        whole = path.split(root, 1)[-1] if root and inner == path else path
        return self._gate.route(method, inner, whole, header, self._client, scope)

    def _client(self, scope: Scope) -> str:
        known: Visit | None = scope.get(VISIT)
        return known.client if known else self._gate.client_of(self._asked(scope, scope["method"]))

    def _enter(self, scope: Scope, given: Mapping[bytes, bytes], method: str) -> tuple[Visit, bool]:
        """Return the visit of this scope, and whether an outer middleware began it."""
        known = self._gate.own(scope.get(VISIT))
        if known is not None:
            return known, True
        asked = self._asked(scope, method)
        visit = self._gate.visit(asked, scope.get(KEY), partial(is_meant_in_scope, given))
        scope[VISIT], scope[LIMITER] = visit, self
        return visit, False

    def _asked(self, scope: Scope, method: str) -> Asked:
        headers = decoded(scope["headers"]) if self._gate.reads_headers else []
        return Asked(method, scope["path"], _peer(scope), headers)

    async def _admits(self, route: Route, visit: Visit, scope: Scope, send: Send) -> bool:
        """Return whether the request may go on. If not, it has been answered."""
        await self._room.state.run(self._gate.asking(route, visit))
        if visit.refused is None:
            return True
        answer = self.refusal(scope)
        if scope["type"] == "websocket":
            # The client is told no more than that.
            may_answer = can_answer(scope) and not visit.refused.banned
            await refuse(send, answer, may_answer, POLICY_VIOLATION)
        else:
            await _send_answer(send, answer, await self.cors_of(scope))
        return False

    async def charge(self, visit: Visit, charge: Charge, name: str, key: object) -> None:
        """Charge a request that has come to its endpoint. See Gate.charging."""
        await self._room.state.run(self._gate.charging(visit, charge, name, key))

    def refusal(self, scope: Scope) -> Answer:
        """Return the answer to a refused request."""
        return self._gate.refusal(scope[VISIT], decoded(scope["headers"]))

    async def cors_of(self, scope: Scope) -> list[Header]:
        """Return the headers of the app's CORS layer, further in, for the page that sent this request."""
        return await self.cors_within(self.app, self._learned, scope)

    async def cors_within(self, app: App, learned: Learned, scope: Scope) -> list[Header]:
        """Return the headers of the CORS layer in this app, for the page that sent this request.

        The layer is asked as a browser asks: by a preflight, which does nothing. `learned`: what the app has said
        before.
        """
        origin, method, path = _first(scope, "origin"), scope["method"], scope["path"]
        if origin is None or method == "OPTIONS":
            return []
        now, key, client = time.monotonic(), (origin, method, path), scope[VISIT].client
        known = learned.get(key, client, now)
        if known is None:
            said = kept(await self._preflight(app, scope, method, origin))
            known = learned.add(key, client, now, said)
        return with_exposed(known)

    async def _preflight(self, app: App, scope: Scope, method: str, origin: str) -> list[Header]:
        """Return the headers of the app's answer to a preflight that the client did not send and does
        not pay for.
        """
        found: list[Header] = []
        asked = iter([{"type": "http.request", "body": b"", "more_body": False}])
        has_begun = asyncio.Event()

        async def receive() -> Message:
            """Act as a client that goes when it has the headers: an app may wait for that, and stream for ever."""
            for message in asked:
                return message
            await has_begun.wait()
            return {"type": "http.disconnect"}

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                found.extend(decoded(message.get("headers", ())))
                has_begun.set()

        nobody = self._session(scope, {}, False)
        host = [pair for pair in scope["headers"] if pair[0] == b"host"]
        headers = [*host, *encoded(asking_for(method, origin))]
        # Without the query: no CORS layer reads it, and an app's own code might.
        asking = {
            **scope,
            # By this version an app hears from `receive`, and not from `send`, that its client has gone.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "OPTIONS",
            "headers": headers,
            "query_string": b"",
            KEY: nobody,
            LIMITED: True,
        }
        asking[VISIT] = scope[VISIT].preflight()
        try:
            await app(asking, receive, keep)
        except Exception as error:  # the client is refused anyway
            why = shown(repr_of(error), 300)
            log.warning("a preflight of %.200r was not answered: %s", scope["path"], why)
        return found


class _Response:
    """A response on its way out. The session is written before its first message."""

    _has_begun = False
    _is_replaced = False
    _headers: Sequence[Header] = ()  # as the app said them
    _left: float | None = None  # bytes of the body that are still to be sent; None: not counted yet

    def __init__(
        self,
        middleware: StillroomMiddleware,
        route: Route | None,
        session: AsyncWebSession,
        visit: Visit,
        around: Scope,
        scope: Scope,
        budget: Budget,
        send: Send,
        is_inner: bool,
        has_origin: bool,
    ) -> None:
        """`around`: the scope as it came; `scope`: the app's."""
        self._middleware = middleware
        self._route = route
        self._session = session
        self._visit = visit
        self._around = around
        self._scope = scope
        self._budget = budget
        self._really_send = send
        self._is_inner = is_inner  # then the outer one says how the client stands
        self._has_origin = has_origin

    async def of(self, receive: Receive) -> None:
        try:
            await self._middleware.app(self._scope, receive, self._send)
        except Exception as error:
            # Raised through a framework that has answered with 500 already: that became a 503, or a 401.
            is_told = self._is_replaced and error is self._session.failure
            answer = None
            if is_told or not self._has_begun:
                keeps, method = self._middleware._has_sessions, self._scope["method"]
                answer = answer_to(error, self._session, method, keeps_sessions=keeps)
            if answer is None:
                self._leave()
                raise
            if not is_told:
                await self._answer(answer, await self._cors())

    async def _cors(self) -> list[Header]:
        """Return the headers of the app's CORS layer, which an error has not passed."""
        # By the path as it came: the app may have mounted another one below it.
        came = {"root_path": "", **self._around}
        return await self._middleware.cors_of({**self._scope, **came})

    def _leave(self) -> None:
        """Leave the request to whoever answers in the app's place, who may look at its session."""
        _show(self._around, self._scope)
        if self._scope.get(KEY) is self._session:
            self._session.drop()
            self._session.is_over = True
            self._around[KEY] = self._session
            self._around.setdefault(STARLETTES, self._scope[STARLETTES])

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._has_begun:
            await self._begin(message)
        elif not self._is_replaced:
            if self._visit.is_holding and not self._is_inner and self._is_last(message):
                # Before the client may send its next request, and before background tasks.
                gate = self._middleware._gate
                await to_its_end(self._middleware._room.state.run(self._visit.over(gate.body)))
            await self._really_send(message)

    def _is_last(self, message: Message) -> bool:
        """Return whether the client has the whole response with this message."""
        if message["type"] != "http.response.body":
            return bool(message["type"] == "http.response.pathsend")  # a file, whole
        left = length_of(self._headers) if self._left is None else self._left
        self._left = left - len(message.get("body", b""))
        return self._left <= 0 or not message.get("more_body", False)

    async def _begin(self, message: Message) -> None:
        raw, status = list(message.get("headers", ())), message["status"]
        self._headers = headers = decoded(raw)
        gate, visit, session = self._middleware._gate, self._visit, self._session
        gate.tell(self._route, visit, status, session.unknown_token)
        if PREFLIGHT in self._scope:
            gate.learn_preflight(self._scope[PREFLIGHT], visit.client, headers)
        end = gate.ended(visit, session, headers)
        if end is None:
            act = gate.ending(visit, session, status, headers)
            end = await self._middleware._room.state.run(act)
        if end.instead is not None:
            await self._answer(end.instead, kept(headers) or await self._cors())
            return
        self._has_begun = True
        _show(self._around, self._scope)
        self._budget.left = math.inf  # a stream may be hours long
        told, replaced = visit.telling(
            headers, is_inner=self._is_inner, is_of_page=self._has_origin
        )
        if without := end.without | replaced:
            raw = [pair for pair in raw if pair[0].decode("latin-1").lower() not in without]
        more = encoded([*end.headers, *told])
        await self._really_send({**message, "headers": [*raw, *more]})

    async def _answer(self, answer: Answer, cors: list[Header]) -> None:
        self._has_begun = self._is_replaced = True
        _show(self._around, self._scope)
        # A page of another origin reads them by `cors`.
        told, _ = self._visit.telling(answer.headers, is_inner=self._is_inner)
        await _send_answer(self._really_send, answer, [*told, *cors])


def _show(around: Scope, scope: Scope) -> None:
    """Show middlewares further out what the app has written into its own scope."""
    for name in scope.keys() & FOUND:
        around[name] = scope[name]


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "http":
        await _send_answer(send, foreign(scope["method"]), [])
    else:
        await refuse(send, foreign(), can_answer(scope), POLICY_VIOLATION)


async def _send_answer(send: Send, answer: Answer, more: list[Header]) -> None:
    headers = encoded([*answer.headers, *more])
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def _is_test(scope: Scope) -> bool:
    """Return whether this is Starlette's own test client on plain http, which keeps cookies as a browser does."""
    client = tuple(scope.get("client") or ())  # a list in older releases
    return client == TEST_CLIENT and scope.get("scheme") in ("http", "ws")


def _peer(scope: Scope) -> str | None:
    client = scope.get("client")
    return client[0] if client else None


def _first(scope: Scope, name: str) -> str | None:
    """Return a header of the request by its lower-case name."""
    wanted = name.encode()
    if not any(given == wanted for given, _ in scope["headers"]):
        return None
    return _all(scope, wanted, b", ").decode("latin-1")


def _all(scope: Scope, name: bytes, between: bytes) -> bytes:
    """Return all headers of this name as one."""
    return between.join([value for given, value in scope["headers"] if given == name])
