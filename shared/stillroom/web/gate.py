"""What is asked before the app is called, may the request go on and what is its session, in one round trip.

And what is told after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

from stillroom.limits import Decision, Route, Routes
from stillroom.operation import Failed, Operation, together
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.web import origin
from stillroom.web.ending import Header
from stillroom.web.request_session import RequestSession
from stillroom.web.session_cookie import SessionCookie

A = TypeVar("A")
R = TypeVar("R", Stillroom, AsyncStillroom)

NOT_FOUND = 404
CLIENTS = 8_192  # addresses that are remembered


class Asked(NamedTuple):
    """A request, as far as limits need it."""

    method: str
    path: str  # with the part an app is mounted under
    peer: str | None  # None: a socket file
    headers: list[Header]  # empty where nobody reads them


# What a request is counted by besides its address: kind → text, such as {"user": "ann"}.
SubjectOf = Callable[[Asked], Mapping[str, str | None]]


class Gate:
    """The limits of a route table, for requests of either face.

    A session is read along with the check where the route's last request looked at its own: then both are one round
    trip. Elsewhere it is read when it is looked at, and costs nothing if it is not.
    """

    def __init__(
        self, room: Stillroom | AsyncStillroom, routes: Routes | None, subject: SubjectOf | None
    ) -> None:
        self._body = room._limits_body
        self._hold = room._abuse_body.hold
        self._client = room.limits.client
        # Without trusted proxies an address is all there is to know, and most requests come from a known one.
        self._known = lru_cache(CLIENTS)(room.limits.client)
        self._trusts_any = bool(room.settings.trusted_proxies)
        self.reads_headers = self._trusts_any or subject is not None
        self._routes = routes
        self._subject = subject
        # Routes whose last request looked at its session, and the cookie it is known by.
        self._look: dict[Route, SessionCookie] = {}

    def route(self, method: str, path: str) -> Route | None:
        """The route whose limits a request has; None if it has none."""
        found = self._routes.find(method, path) if self._routes else None
        return found if found and found.limits else None

    def asking(self, route: Route, asked: Asked, session: RequestSession) -> Operation[Decision]:
        """Whether the request may go on; and have its session ready, if it will be looked at."""
        others = self._subject(asked) if self._subject else {}
        subject = {**others, "ip": self._client_of(asked)}
        checks = self._body.check(subject, route.limits, route.cost, route=route.template)
        if session.is_read or route not in self._look:
            return (yield from checks)
        return (yield from _with_session(checks, session))

    def tell(self, route: Route | None, asked: Asked, session: RequestSession, status: int) -> None:
        """What abuse begins with. Waits for nothing: it rides along with the next counts of this process."""
        if route is not None and status == NOT_FOUND and session.is_meant:
            self._hold("not_found", ip=self._client_of(asked), route=asked.path)
        if session.is_unknown:
            template = route.template if route else None
            ip, token = self._client_of(asked), session.token
            self._hold("session_unknown", ip=ip, route=template, token=token)

    def _client_of(self, asked: Asked) -> str:
        if self._trusts_any:
            return self._client(asked.peer, asked.headers)
        return self._known(asked.peer)

    def learn(self, route: Route | None, session: RequestSession) -> None:
        """What to expect of the next request on this route."""
        if route is None:
            return
        cookie = session.cookie if session.is_looked_at else session.taken_by
        if cookie is not None:
            self._look[route] = cookie
        else:
            self._look.pop(route, None)

    def cookie_of(self, route: Route | None) -> SessionCookie | None:
        """The cookie that a framework's own session is read by, where the route's last request looked at it."""
        return self._look.get(route) if route else None


def _with_session(checks: Operation[Decision], session: RequestSession) -> Operation[Decision]:
    """Both in one batch. A client that is denied from memory costs Redis nothing: its session is not asked for."""
    from_memory: list[Decision] = []

    def checking() -> Operation[Decision]:
        decision = yield from checks
        from_memory.append(decision)
        return decision

    def riding() -> Operation[None]:  # begun when the check waits for Redis, or is done
        if not from_memory:
            yield from session.prefetching()

    decision, _ = yield from together(checking(), riding())
    if isinstance(decision, Failed):
        raise decision.error
    return decision  # type: ignore[no-any-return]


class Middleware(Generic[A, R]):
    """What the middlewares of both faces are made of."""

    def __init__(
        self,
        app: A,
        room: R,
        *,
        routes: Routes | None = None,
        subject: SubjectOf | None = None,
        sessions: bool = True,
        cookie: SessionCookie | None = None,
        same_origin: bool | Iterable[str] = False,
    ) -> None:
        self.app = app
        self._room: R = room
        self._gate = Gate(room, routes, subject)
        self._has_sessions = sessions
        self._cookie = cookie or SessionCookie()
        self._origin = origin.same_origin(same_origin)
        self._prepare()

    def _prepare(self) -> None:
        """What one face needs besides."""
