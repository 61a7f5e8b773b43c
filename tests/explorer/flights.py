"""Limits of what is in flight against a model with two rules.

The first: never more are in flight than there are places, from the reservation to its end. While a process can't
ask Redis it has its share of them, so two processes may have twice as many. The second: in the end all places are
free, whatever became of those who had them. No call raises anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from stillroom import Limit, Settings
from tests.explorer.explorer import Broken
from tests.explorer.limits import IP, LATE_S, LimitsModel
from tests.explorer.world import Actor, World

PLACES = Limit("places", 2, 30, in_flight=True)


@dataclass
class Flight:
    """A place that a call was given."""

    call: Actor
    held: Any
    began_s: float
    is_over: bool = False  # it is being given back


class FlightsModel(LimitsModel):
    """One process that has all of the places, or two that share them."""

    WEIGHTS: ClassVar[dict[str, float]] = {
        "take off": 7,
        "land": 6,
        "deliver": 1,
        "away": 1.5,
        "lose": 0.5,
        "die": 0.3,
    }

    def __init__(self, world: World, settings: Settings, weights: Mapping[str, float]) -> None:
        super().__init__(world, settings, weights)
        self.flights: list[Flight] = []

    def act(self) -> None:
        self._look()
        acts: dict[str, Callable[[int], None]] = {
            "take off": self._take_off,
            "land": self._land,
            "deliver": self._deliver,
            "away": self._open_or_close,
            "lose": self._lose_scripts,
            "die": self._begin_anew,
        }
        acts[self._next()](self.world.random.randrange(self.processes))

    def _take_off(self, process: int) -> None:
        began_s = self.world.monotonic

        def check(call: Actor) -> None:
            self._expect(call)
            if call.value:
                self.flights.append(Flight(call, call.value, began_s))
                self._check_places()

        reserve = partial(self.rooms[process].limits.reserve, IP, [PLACES])
        self.world.call("take off", process, reserve, check)

    def _land(self, process: int) -> None:
        own = [one for one in self.flights if one.call.process == process and not one.is_over]
        # A place that the server has lost, given back while it is away, makes room here for one too many.
        if known := [one for one in own if one.call.began > self.since]:
            flight = self.world.random.choice(known)
            flight.is_over = True
            called = f"land {flight.held.id[:8]}"
            self.world.call(called, process, self._landing(process, flight), self._expect)

    def _landing(self, process: int, flight: Flight) -> Callable[[], None]:
        """Return what the end of a `with room.limits.hold(…)` does."""
        room = self.rooms[process]
        return lambda: room.limits._driver.run(room._limits_body.let_go(flight.held))

    def _check_places(self) -> None:
        """Check that there are places for all whose lease has not ended."""
        since = self.world.monotonic - PLACES.window
        flying = [
            one
            for one in self.flights
            if not one.is_over and one.began_s > since and one.call.began > self.since
        ]
        is_shared = self.processes > 1 and any(one.held.decision.degraded for one in flying)
        if len(flying) > PLACES.quota * (2 if is_shared else 1) and not self._is_lost:
            raise Broken(f"{len(flying)} in flight: {[one.call.began for one in flying]}")

    def end(self) -> None:
        world = self.world
        for flight in self.flights:
            if not flight.is_over:
                process = flight.call.process
                self._expect(world.run("land at last", process, self._landing(process, flight)))
        super().end()
        self._look()
        is_known = not (self._is_lost or self.watch.lost or self.watch.steps)
        if is_known and self.watch.passed < LATE_S:
            peek = partial(self._room().limits.peek, IP, [PLACES])
            left = world.run("last peek of places", 9, peek).value.remaining
            if left != PLACES.quota:
                raise Broken(f"{left} of {PLACES.quota} places are free, and nobody is in flight")
