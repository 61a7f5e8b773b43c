"""What limits do to one request, from its first check to the end of its response. For either face.

Whoever charges a request, the table in front of the app or the endpoint itself, does it here: so a limit is charged
once, what was reserved is settled by the answer, and the response tells of all that was decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeVar

from stillroom.limits import Decision, LimitsBody, Reservation
from stillroom.limits.decision import headers_of
from stillroom.limits.limit import Limit
from stillroom.limits.routes import Counted
from stillroom.operation import Failed, Operation, together
from stillroom.web.limited import Answered, Charge

if TYPE_CHECKING:
    from stillroom.web.gate import Asked
    from stillroom.web.request_session import RequestSession

T = TypeVar("T")
FAILED = 400  # the least status that is a failure


class Visit:
    """One request, as its limits see it."""

    __slots__ = (
        "_charged",
        "_held",
        "asked",
        "client",
        "decisions",
        "done",
        "exempt",
        "keys",
        "session",
    )

    def __init__(self, asked: Asked, client: str, session: RequestSession | None) -> None:
        self.asked = asked
        self.client = client
        self.session = session
        self.decisions: list[Decision] = []
        self.keys: list[object] = []  # the routes and endpoints it was charged for
        self.done: set[object] = set()  # the declarations it was charged by
        self.exempt = False  # no endpoint charges it
        self._charged: dict[tuple[str | None, ...], int] = {}  # limit and subject → cost
        self._held: list[tuple[Reservation, tuple[Counted, ...]]] = []

    @property
    def refused(self) -> Decision | None:
        """The denial, if there was one."""
        last = self.decisions[-1] if self.decisions else None
        return None if last is None or last else last

    def charging(self, body: LimitsBody, charge: Charge, route: str) -> Operation[Decision | None]:
        """Charge the request, unless that was done further out. None: there was nothing left to charge."""
        if self.decisions:
            charge = self._uncharged(charge)
        limits, subject, cost, counted = charge
        if not limits:
            return None
        if all(one == "all" for one in counted):
            decision = yield from body.check(subject, limits, cost, route=route)
        else:
            held = yield from body.reserve(subject, limits, cost, route=route)
            decision = held.decision
            if held:
                self._held.append((held, counted))
        self.decisions.append(decision)
        for limit in limits:
            self._charged[_whom(limit, subject)] = cost
        return decision

    def headers(self) -> Mapping[str, str]:
        """What the response tells of all that was decided."""
        return headers_of(self.decisions)

    def ending(
        self, body: LimitsBody, act: Operation[T], status: int, headers: Iterable[tuple[str, str]]
    ) -> Operation[T]:
        """Run the act that ends the request; what by the answer does not count is given back in its batch."""
        held, self._held = self._held, []
        if not held:
            return (yield from act)
        answered = Answered(status, {name.lower(): value for name, value in headers})
        parts = [_part(one, [not _counts(c, answered) for c in counted]) for one, counted in held]
        back = [body.refund(part) for part in parts if part.keys]
        outcomes: list[Any] = yield from together(act, *back)
        if isinstance(outcomes[0], Failed):
            raise outcomes[0].error
        result: T = outcomes[0]
        return result

    def _uncharged(self, charge: Charge) -> Charge:
        known = [self._charged.get(_whom(one, charge.subject), -1) for one in charge.limits]
        left = [n for n, cost in enumerate(known) if cost < charge.cost]
        limits = tuple([charge.limits[n] for n in left])
        return charge._replace(limits=limits, counted=tuple([charge.counted[n] for n in left]))


def merged(charges: Iterable[Charge]) -> list[Charge]:
    """As few checks as these can be: what costs the same and counts the same subjects is one."""
    found: list[Charge] = []
    for charge in charges:
        before = found[-1] if found else None
        if before is None or not _fits(before, charge):
            found.append(charge)
            continue
        found[-1] = before._replace(
            limits=(*before.limits, *charge.limits),
            subject={**before.subject, **charge.subject},
            counted=(*before.counted, *charge.counted),
        )
    return found


def _fits(one: Charge, other: Charge) -> bool:
    subject = one.subject
    names = {limit.name for limit in one.limits}
    return (
        one.cost == other.cost
        and all(subject.get(kind, name) == name for kind, name in other.subject.items())
        and not any(limit.name in names for limit in other.limits)
    )


def _part(held: Reservation, wanted: Sequence[bool]) -> Reservation:
    """The reservation of some of its limits."""
    decision = held.decision
    limits = tuple(compress(decision.limits, wanted))
    keys = tuple(compress(held.keys, wanted))
    return replace(held, decision=decision._replace(limits=limits), keys=keys)


def _whom(limit: Limit, subject: Mapping[str, str | None]) -> tuple[str | None, ...]:
    return (limit.name, limit.by, *[subject.get(kind) for kind in limit.kinds])


def _counts(count: Counted, answered: Answered) -> bool:
    if callable(count):
        return bool(count(answered))
    return count == "all" or answered.status >= FAILED
