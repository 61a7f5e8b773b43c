"""The gate asks Redis before the app is called: may the request go on, and what is its session?

Both questions take one round trip. After the app the gate writes the session and gives back what does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

from stillroom.errors import InvalidLimit
from stillroom.limits import Decision, Limit, LimitsBody, Route, Routes
from stillroom.limits.routes import Counted, told
from stillroom.misuse import name_of
from stillroom.operation import Operation
from stillroom.place import place_of
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.together import beside, beside_elsewhere
from stillroom.web import origin
from stillroom.web.carriers import CHARGES
from stillroom.web.cors import Learned, Unanswered, is_preflight
from stillroom.web.ending import Ending, ended, ending
from stillroom.web.headers import Header
from stillroom.web.known_routes import Misfits, Roots
from stillroom.web.limited import Charge, counted_by
from stillroom.web.placing import (
    checked_app,
    checked_cookie,
    checked_flag,
    checked_function,
    checked_room,
    checked_routes,
    checked_table,
)
from stillroom.web.problem import Answer
from stillroom.web.refusal import Refusal, Render, checked_render, refused
from stillroom.web.request_session import RequestSession
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.visit import Visit
from stillroom.wire import time_left

A = TypeVar("A")
R = TypeVar("R", Stillroom, AsyncStillroom)
S = TypeVar("S", bound=MutableMapping[str, Any])

NOT_FOUND = 404
PREFLIGHT = "stillroom.preflight"  # the route of a preflight
CLIENTS = 8_192  # addresses that are remembered
USER = "user"  # whom a limit may count without anybody saying how: the session's


class Asked(NamedTuple):
    """A request, as far as limits need it."""

    method: str
    path: str  # with the part an app is mounted under
    peer: str | None  # None: a socket file
    headers: list[Header]  # empty where nobody reads them


# Returns the subjects of a request besides its address: kind → text, as in {"user": "ann"}.
SubjectOf = Callable[[Asked], Mapping[str, str | None]]
ExemptWhen = Callable[[Asked], bool]


class _Plan(NamedTuple):
    """Hold what is the same for all requests of a route."""

    limits: tuple[Limit, ...]
    counted: tuple[Counted, ...]
    by_ip: bool  # and by no other subject
    by_user: bool


class Gate:
    """The limits of a route table, and of endpoints, for requests of either face.

    A session is read along with the check where the last request on this route, or to this endpoint, looked at its
    own: then both are one round trip. Elsewhere it is read when it is looked at, and costs nothing if it is not.
    """

    def __init__(
        self,
        room: Stillroom | AsyncStillroom,
        routes: Routes | None = None,
        subject: SubjectOf | None = None,
        exempt_when: ExemptWhen | None = None,
        render: Render | None = None,
        *,
        has_sessions: bool = True,
    ) -> None:
        self.body: LimitsBody = room.operations.limits
        self._hold = room.operations.abuse.hold
        url, namespace = room.settings.redis_url, room.settings.namespace
        self._home = place_of(url) or url, namespace
        self._client = room.limits.client
        # Without trusted proxies an address is all there is to know, and most requests come from a known one.
        self._known = lru_cache(CLIENTS)(room.limits.client)
        self._trusts_any = bool(room.settings.trusted_proxies)
        checked_function("subject", subject, "whom else it counts, as in {'tenant': …}")
        checked_function("exempt_when", exempt_when, "whether no limit counts it")
        self.reads_headers = self._trusts_any or subject is not None or exempt_when is not None
        self.routes = checked_routes(routes)
        self._subject = subject
        self._exempt_when = exempt_when
        self._render = checked_render(render)
        # Routes and endpoints whose last request looked at its session, and the cookie it is known by.
        self._look: dict[object, SessionCookie] = {}
        # Routes and endpoints whose last request read what this process keeps, and what proves it: in the same
        # batch, or in another one at the same time, which takes an event loop.
        self._near: set[object] = set()
        self._proofs, self._is_near_here = room.operations.proofs, room.operations.is_near_here
        self._has_loop = isinstance(room, AsyncStillroom)
        self._plans: dict[Route, _Plan] = {}
        self._unanswered = Unanswered()
        _check_kinds(self.routes, subject, has_sessions)

    def route(
        self,
        method: str,
        path: str,
        whole: str,
        header: Callable[[str], str | None],
        client: Callable[[S], str],
        scope: S,
    ) -> Route | None:
        """Return the route whose limits a request has; None if it has none. See Routes.find.

        `scope`: the scope or environ. A preflight is noted there, so that its answer is learned from.
        """
        assert self.routes is not None
        found = self.routes.find(method, path, whole)
        if not found.limits:
            return None
        # A preflight is nobody's request: it costs nothing, unless the app answers OPTIONS itself.
        if method != "OPTIONS" or method in found.methods or not is_preflight(method, header):
            return found
        scope[PREFLIGHT] = found.template
        is_charged = self._unanswered.charges(client(scope), found.template, time.monotonic())
        return found if is_charged else None

    def learn_preflight(self, name: str, client: str, headers: Sequence[Header]) -> None:
        """Learn from the app's answer to a preflight. `name`: what is noted in its scope."""
        self._unanswered.learn(client, name, time.monotonic(), headers)

    def visit(
        self, asked: Asked, session: RequestSession | None, is_meant: Callable[[], bool]
    ) -> Visit:
        """Return a request that comes in."""
        return Visit(asked, self.client_of(asked), session, is_meant, self._home)

    def own(self, known: Visit | None) -> Visit | None:
        """Return the visit that a middleware further out has begun, if its limits are counted where these are.

        Another room's is not this one's: what is reserved in a room is given back there.
        """
        return known if known is not None and known.home == self._home else None

    def asking(self, route: Route, visit: Visit) -> Operation[Decision | None]:
        """Return whether the request may go on. None: it is exempt.

        Its session is prefetched in the same batch, if the app is likely to look at it.
        """
        when = self._exempt_when
        if when is not None and told("exempt_when", when, visit.asked):
            return nothing()
        plan = self._plans.get(route) or self._plan(route)
        if not plan.by_ip or self._subject:
            return self._asking_by_name(route, plan, visit)
        charge = Charge(plan.limits, visit.client, route.cost, plan.counted)
        return self.charging(visit, charge, route.template, route)

    def _asking_by_name(
        self, route: Route, plan: _Plan, visit: Visit
    ) -> Operation[Decision | None]:
        """Ask where more than the address is counted: the user, or subjects of the app."""
        others = _subjects(self._subject, visit.asked) if self._subject else {}
        if USER not in others and plan.by_user:
            others[USER] = yield from _user_of(visit)
        charge = Charge(plan.limits, {**others, "ip": visit.client}, route.cost, plan.counted)
        return (yield from self.charging(visit, charge, route.template, route))

    def charging(
        self, visit: Visit, charge: Charge, name: str, key: object
    ) -> Operation[Decision | None]:
        """Charge a request. `key`: the route or endpoint it came to, to know it again; `name`: for people."""
        visit.keys += (key,)
        checks = visit.charging(self.body, charge, name)
        riders: list[Operation[Any]] = []
        session = visit.session
        if session is not None and not session.is_read:
            session.rides = True
            if key in self._look:
                riders.append(session.prefetching())
        is_near = key in self._near
        if is_near and self._is_near_here:
            riders += [proof for _, proof in self._proofs()]
        # A client that is denied from memory costs Redis nothing: its session is not asked for.
        asking = beside(checks, *riders) if riders else checks
        is_at_once = is_near and self._has_loop and not self._is_near_here
        return beside_elsewhere(asking, self._proofs) if is_at_once else asking

    def _plan(self, route: Route) -> _Plan:
        limits = tuple(route.limits)
        kinds = {kind for limit in limits for kind in limit.kinds}
        counted = counted_by(route.count, limits)
        plan = self._plans[route] = _Plan(limits, counted, kinds <= {"ip"}, USER in kinds)
        return plan

    def refusal(self, visit: Visit, headers: Sequence[Header]) -> Answer:
        """Return the answer to a refused request. `headers`: the request's."""
        assert visit.refused is not None
        method, path, *_ = visit.asked
        refusal = Refusal(visit.refused, method, path, headers)
        return refused(refusal, visit.decisions, self._render)

    def ended(
        self, visit: Visit, session: RequestSession, headers: Sequence[Header]
    ) -> Ending | None:
        """End a request after which there is nothing to say to Redis. None: there is, see `ending`."""
        return None if visit.is_holding else ended(session, headers)

    def ending(
        self, visit: Visit, session: RequestSession, status: int, headers: Sequence[Header]
    ) -> Operation[Ending]:
        """End the request: write its session, give back what does not count, and return what the response needs."""
        act = ending(session, status, headers, visit.asked.method)
        return visit.ending(self.body, act, status, headers)

    def closing(self, visit: Visit, status: int) -> Operation[None]:
        """End a websocket whose handshake was answered with this status: also one that was closed in place of an
        answer, or charged later.

        Hits that do not count are given back, and so is what was in flight.
        """
        yield from visit.ending(self.body, nothing(), status, [])
        yield from visit.over(self.body)

    def tell(self, route: Route | None, visit: Visit, status: int, unknown: str | None) -> None:
        """Report the events that abuse begins with. They ride with this process' next counts, so nothing waits.

        `unknown`: the token that came and opened nothing.
        """
        if status == NOT_FOUND and (route is not None or self.routes is None):
            is_told = visit.is_missing or visit.exempt
            if not is_told and visit.is_meant():
                visit.is_missing = True  # a middleware further out tells nobody again
                self._hold("not_found", ip=visit.client, route=visit.asked.path)
        if unknown is not None:
            template = route.template if route else None
            self._hold("session_unknown", ip=visit.client, route=template, token=unknown)

    def client_of(self, asked: Asked) -> str:
        if self._trusts_any:
            return self._client(asked.peer, asked.headers)
        return self._known(asked.peer)

    def learn(self, visit: Visit) -> None:
        """Learn what to expect of the next request on this route, or to this endpoint."""
        request = time_left()
        if request is not None:
            (self._near.update if request.reads_near else self._near.difference_update)(visit.keys)
        session = visit.session
        if session is None:
            return
        cookie = session.cookie if session.is_looked_at else session.taken_by
        for key in visit.keys:
            if cookie is not None:
                self._look[key] = cookie
            else:
                self._look.pop(key, None)

    def cookie_of(self, key: object) -> SessionCookie | None:
        """Return the cookie that a framework's own session is read by, where the last request here looked at it."""
        return self._look.get(key)


def nothing() -> Operation[None]:
    """Return an operation that says nothing to Redis."""
    yield from ()


def _subjects(of: SubjectOf, asked: Asked) -> dict[str, str | None]:
    given = told("subject", of, asked)
    try:
        return dict(given)
    except (TypeError, ValueError):
        why = f"subject= returned a {type(given).__name__}; it returns a mapping, as in {{'tenant': …}}"
        raise InvalidLimit(name_of(of), why) from None


def _user_of(visit: Visit) -> Operation[str | None]:
    """Return the user who is logged in. This is a round trip of its own, before the check."""
    session = visit.session
    if session is None:
        return None
    yield from session.reading()
    return session.user_id


def _check_kinds(routes: Routes | None, subject: object, has_sessions: bool) -> None:
    """Raise for a route that counts by what no request has: it would raise at each request. Raises InvalidLimit."""
    if routes is None or subject is not None:
        return
    known = {"ip", USER} if has_sessions else {"ip"}
    for route in (*routes.routes, routes.default):
        for limit in route.limits:
            if missing := [kind for kind in limit.kinds if kind not in known]:
                raise InvalidLimit(
                    limit.name,
                    f"{route.template} counts by {missing[0]}: give subject=, a function of the request "
                    f"that returns {{{missing[0]!r}: …}}, or put the limit on the endpoint",
                )


class Middleware(Generic[A, R]):
    """Hold the parts that the middlewares of both faces share."""

    _kind: type[R]

    def __init__(
        self,
        app: A,
        room: R,
        *,
        routes: Routes | None = None,
        subject: SubjectOf | None = None,
        exempt_when: ExemptWhen | None = None,
        render: Render | None = None,
        sessions: bool = True,
        cookie: SessionCookie | None = None,
        same_origin: bool | Iterable[str] = False,
    ) -> None:
        self._room: R = checked_room(room, self._kind, type(self).__name__)
        self.app = app
        checked_flag("sessions", sessions)
        self._gate = Gate(room, routes, subject, exempt_when, render, has_sessions=sessions)
        checked_table(routes, subject=subject, exempt_when=exempt_when)
        tells = self._gate.routes is not None or getattr(self, CHARGES, False)
        self._misfits = Misfits(self._gate.routes) if tells else None
        self._roots = Roots(app)
        self._learned = Learned()
        self._origin = origin.same_origin(same_origin)
        self._has_sessions = sessions
        self._cookie = checked_cookie(cookie) or SessionCookie()
        checked_app(app, self._kind, type(self).__name__)
        self._prepare()

    @property
    def room(self) -> R:
        return self._room

    def _prepare(self) -> None:
        """Set up what one face needs besides."""
