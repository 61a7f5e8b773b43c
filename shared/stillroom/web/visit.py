"""What limits do to one request, from its first check to the end of its response. For either face.

Whoever charges a request, the table in front of the app or the endpoint itself, does it here: so a limit is charged
once, what was reserved is settled by the answer, and the response tells of all that was decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

    __slots__ = ("_charged", "_held", "asked", "client", "decisions", "keys", "session")

    def __init__(self, asked: Asked, client: str, session: RequestSession | None) -> None:
        self.asked = asked
        self.client = client
        self.session = session
        self.keys: list[object] = []  # the routes and endpoints it was charged for
        self.decisions: list[Decision] = []
        self._charged: dict[tuple[str | None, ...], int] = {}  # limit and subject → cost
        self._held: list[tuple[Reservation, Counted]] = []

    @property
    def refused(self) -> Decision | None:
        """The denial, if there was one."""
        last = self.decisions[-1] if self.decisions else None
        return None if last is None or last else last

    def charging(self, body: LimitsBody, charge: Charge, route: str) -> Operation[Decision | None]:
        """Charge the request, unless that was done further out. None: there was nothing left to charge."""
        limits = self._uncharged(charge) if self.decisions else charge.limits
        if not limits:
            return None
        if charge.counted == "all":
            decision = yield from body.check(charge.subject, limits, charge.cost, route=route)
        else:
            held = yield from body.reserve(charge.subject, limits, charge.cost, route=route)
            decision = held.decision
            if held:
                self._held.append((held, charge.counted))
        self.decisions.append(decision)
        for limit in limits:
            self._charged[_whom(limit, charge.subject)] = charge.cost
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
        back = [body.refund(one) for one, count in held if not _counts(count, answered)]
        outcomes: list[Any] = yield from together(act, *back)
        if isinstance(outcomes[0], Failed):
            raise outcomes[0].error
        result: T = outcomes[0]
        return result

    def _uncharged(self, charge: Charge) -> tuple[Limit, ...]:
        charged, subject = self._charged, charge.subject
        return tuple(
            [one for one in charge.limits if charged.get(_whom(one, subject), -1) < charge.cost]
        )


def _whom(limit: Limit, subject: Mapping[str, str | None]) -> tuple[str | None, ...]:
    return (limit.name, limit.by, *[subject.get(kind) for kind in limit.kinds])


def _counts(count: Counted, answered: Answered) -> bool:
    return bool(count(answered)) if callable(count) else answered.status >= FAILED
