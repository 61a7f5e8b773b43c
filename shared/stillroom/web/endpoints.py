"""Charging a request for the endpoint it came to, in frameworks of threads: Flask and Django."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from stillroom.operation import Driver
from stillroom.web.gate import Gate, nothing
from stillroom.web.limited import Here, Limited, run
from stillroom.web.visit import Visit, merged


class Charger:
    """Charges what endpoints declare, in as few round trips as that can be."""

    def __init__(self, gate: Gate, driver: Driver) -> None:
        self.gate = gate
        self._driver = driver

    def admits(
        self,
        visit: Visit,
        declarations: Iterable[Limited],
        here: Here,
        name: str,
        endpoint: object,
    ) -> bool:
        """Charge the request, and return whether it may go on. No declaration charges it twice."""
        if visit.exempt:
            return True
        due = []
        for one in visit.fresh(declarations):
            charge = one.at_once(visit.client) or run(one.of(here))
            if charge is not None:
                due.append(charge)
        for charge in merged(due) if len(due) > 1 else due:
            self._driver.run(self.gate.charging(visit, charge, name, endpoint))
            if visit.refused is not None:
                return False
        return True

    def end(
        self,
        visit: Visit,
        status: int,
        headers: Iterable[tuple[str, str]],
        unknown: str | None,
    ) -> None:
        """Give back what, by this answer, does not count; tell abuse of it, and learn what the next request will
        look at. `unknown`: see Gate.tell."""
        self.gate.tell(None, visit, status, unknown)
        if visit.is_holding:
            self._driver.run(visit.ending(self.gate.body, nothing(), status, headers))
        self.gate.learn(visit)

    def let_go(self, visit: Visit) -> None:
        """Give back what was in flight: it is over."""
        if visit.is_holding:
            self._driver.run(visit.over(self.gate.body))


def until_sent(
    pieces: Iterable[bytes], length: float, let_go: Callable[[], None]
) -> Iterator[bytes]:
    """Yield the pieces of a body of this length, and give back what is in flight before the last one.

    Who has the last one may send the next request.
    """
    try:
        for piece in pieces:
            length -= len(piece)
            if length <= 0:
                let_go()
            yield piece
    finally:
        let_go()
