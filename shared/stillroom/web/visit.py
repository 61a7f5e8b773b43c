"""Applies limits to one request, from its first check to the end of its response. For either face.

Whoever charges a request, the table in front of the app or the endpoint itself, does it here: so a limit is charged
once, what was reserved is settled by the answer, and the response tells of all that was decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from stillroom.limits import Decision, LimitsBody, Reservation
from stillroom.limits.decision import headers_of
from stillroom.limits.limit import Limit
from stillroom.limits.request import Subject
from stillroom.limits.routes import Counted, told
from stillroom.operation import Failed, Operation
from stillroom.together import together
from stillroom.web.cors import EXPOSE, EXPOSE_HEADERS, exposing
from stillroom.web.headers import Header, lacking, names_of
from stillroom.web.limited import ALL, Answered, Charge, Limited

if TYPE_CHECKING:
    from stillroom.web.gate import Asked
    from stillroom.web.request_session import RequestSession

T = TypeVar("T")
# In the scope or environ of a request:
KEY = "stillroom.session"  # the session
VISIT = "stillroom.visit"  # the Visit, once a middleware has begun it
LIMITED = "stillroom.limited"  # no table counts this, because no client has asked
RENDERING = "stillroom.rendering"  # a page is rendered for a cache: no endpoint charges it either
FAILED = 400  # the least status that is a failure
_EXPOSED, _NO_NAMES = frozenset([EXPOSE]), frozenset[str]()
_is_in_flight = attrgetter("in_flight")


class Held(NamedTuple):
    """Hold a reservation of a request, and which answers count, for each limit."""

    reservation: Reservation
    counted: tuple[Counted, ...]


class Visit:
    """One request, as its limits see it."""

    # Attributes that most requests never need.
    decisions: tuple[Decision, ...] = ()
    keys: tuple[object, ...] = ()  # the routes and endpoints it was charged for
    exempt = False  # no endpoint charges it
    is_missing = False  # abuse has been told that there is no such page
    _charges: tuple[Charge, ...] = ()
    _done: set[object] | None = None  # the declarations it was charged by
    _held: tuple[Held, ...] = ()  # to be settled by the answer …
    _in_flight: tuple[Reservation, ...] = ()  # … and given back when the response is over

    def __init__(
        self,
        asked: Asked,
        client: str,
        session: RequestSession | None,
        is_meant: Callable[[], bool],
        home: object,
    ) -> None:
        self.asked = asked
        self.client = client
        self.session = session
        # Whether its client meant it, and not a page that its browser shows: see fetched.py.
        self.is_meant = is_meant
        self.home = home  # where its limits are counted: see Gate.own

    @property
    def refused(self) -> Decision | None:
        """Return the denial, if there was one."""
        last = self.decisions[-1] if self.decisions else None
        return None if last else last

    def fresh(self, declarations: Iterable[Limited]) -> list[Limited]:
        """Return the declarations that have not charged this request, and note that they have from now on."""
        if self._done is None:
            self._done = set()
        found = []
        for one in declarations:
            if one not in self._done:
                self._done.add(one)
                found.append(one)
        return found

    def has_charged(self, declaration: Limited) -> bool:
        """Return whether there is nothing left to charge for this declaration."""
        return self.exempt or (self._done is not None and declaration in self._done)

    def charging(self, body: LimitsBody, charge: Charge, route: str) -> Operation[Decision | None]:
        """Charge the request, unless that was done further out. None: there was nothing left to charge."""
        whole = charge.cost
        if self._charges:
            charge = self._uncharged(charge)
        limits, subject, cost, counted = charge
        if not limits:
            return None
        if counted is ALL and True not in map(_is_in_flight, limits):
            decision = yield from body.check(
                subject, limits, cost, route=route, meant=self.is_meant()
            )
        else:
            held = yield from body.reserve(
                subject, limits, cost, route=route, meant=self.is_meant()
            )
            decision = held.decision
            if held and decision.limits:  # an exempt client has reserved nothing
                self._held += (Held(held, _of_each(charge)),)
        self.decisions += (decision,)
        self._charges += (charge if charge.cost == whole else charge._replace(cost=whole),)
        return decision

    def telling(
        self, headers: Sequence[Header], *, is_inner: bool = False, is_of_page: bool = False
    ) -> tuple[list[Header], frozenset[str]]:
        """Return the headers to add to the app's, which tell of all decisions, and the names of those they replace.

        `is_inner`: a middleware further out tells it. `is_of_page`: a page of another origin has asked, and the
        response lets it read them.
        """
        if is_inner or not self.decisions:
            return [], _NO_NAMES
        told = lacking(names_of(headers), headers_of(self.decisions))
        if is_of_page and (exposed := exposing(headers)):
            return [*told, (EXPOSE_HEADERS, exposed)], _EXPOSED
        return told, _NO_NAMES

    def preflight(self) -> Visit:
        """Return the visit of a preflight that is made for this request. It has no session."""
        return Visit(self.asked, self.client, None, self.is_meant, self.home)

    def ending(
        self, body: LimitsBody, act: Operation[T], status: int, headers: Iterable[tuple[str, str]]
    ) -> Operation[T]:
        """Return the act that ends the request; in its batch is given back what, by this answer, does not count."""
        return self._settling(body, act, status, headers) if self._held else act

    def _settling(
        self, body: LimitsBody, act: Operation[T], status: int, headers: Iterable[tuple[str, str]]
    ) -> Operation[T]:
        answered = Answered(status, {name.lower(): value for name, value in headers})
        parts, in_flight = [], self._in_flight
        for reservation, counted in self._held:
            limits = reservation.decision.limits
            pairs = zip(limits, counted, strict=True)
            back = [limit for limit, count in pairs if not _counts(count, answered)]
            if any(limit.in_flight for limit in limits):  # a reservation is settled once
                back += [limit for limit in limits if limit.in_flight]
                in_flight += (reservation.of(back),)
            elif back:
                parts.append(reservation.of(back))
        self._held, self._in_flight = (), in_flight  # not before: an app's function may have raised
        outcomes: list[Any] = yield from together(act, *[body.refund(part) for part in parts])
        if isinstance(outcomes[0], Failed):
            raise outcomes[0].error
        result: T = outcomes[0]
        return result

    @property
    def is_holding(self) -> bool:
        """Return whether there is something to give back when the response is over."""
        return bool(self._held or self._in_flight)

    def over(self, body: LimitsBody) -> Operation[None]:
        """Give back what was in flight. Where no answer ever began, all else stays consumed."""
        held, parts = self._held, self._in_flight
        self._held, self._in_flight = (), ()
        for reservation, _ in held:
            in_flight = [limit for limit in reservation.decision.limits if limit.in_flight]
            parts += (reservation.of(in_flight),)
        for part in parts:
            if part.keys:
                yield from body.give_back(part)

    def _uncharged(self, charge: Charge) -> Charge:
        """Return what is left to charge, less what all limits that are left have charged before."""
        known: dict[tuple[str | None, ...], int] = {}
        for one in self._charges:
            known |= {_whom(limit, one.subject): one.cost for limit in one.limits}
        paid = [known.get(_whom(one, charge.subject), -1) for one in charge.limits]
        is_left = [before < charge.cost for before in paid]
        counted = charge.counted and tuple(compress(charge.counted, is_left))
        cost = charge.cost - max(0, min(compress(paid, is_left), default=0))
        limits = tuple(compress(charge.limits, is_left))
        return charge._replace(limits=limits, cost=cost, counted=counted)


def merged(charges: Iterable[Charge]) -> list[Charge]:
    """Merge charges into fewer checks: a charge joins the one before it with the same cost and subjects."""
    found: list[Charge] = []
    for charge in charges:
        before = found[-1] if found else None
        if before is None or not _fits(before, charge):
            found.append(charge)
            continue
        one, other = _mapping(before.subject), _mapping(charge.subject)
        counted = (*_of_each(before), *_of_each(charge))
        found[-1] = before._replace(
            limits=(*before.limits, *charge.limits),
            subject={**one, **other} if len(one) + len(other) > 2 else before.subject,
            counted=counted if before.counted or charge.counted else ALL,
        )
    return found


def _fits(one: Charge, other: Charge) -> bool:
    subject = _mapping(one.subject)
    names = {limit.name for limit in one.limits}
    return (
        one.cost == other.cost
        and all(subject.get(kind, name) == name for kind, name in _mapping(other.subject).items())
        and not any(limit.name in names for limit in other.limits)
    )


def _of_each(charge: Charge) -> tuple[Counted, ...]:
    return charge.counted or tuple(["all" for _ in charge.limits])


def _mapping(subject: Subject) -> Mapping[str, str | None]:
    return {"ip": subject} if isinstance(subject, str) else subject


def _whom(limit: Limit, subject: Subject) -> tuple[str | None, ...]:
    named = _mapping(subject)
    return (limit.name, limit.by, *[named.get(kind) for kind in limit.kinds])


def _counts(count: Counted, answered: Answered) -> bool:
    if callable(count):
        return bool(told("count", count, answered))
    return count == "all" or answered.status >= FAILED
