"""Tells a model of the accidents that it did not make: when data was lost, and how the clock stepped."""

from __future__ import annotations

from typing import NamedTuple

from tests.explorer.world import World

MARKER = b"explorer:marker"


class Step(NamedTuple):
    """Holds when the server's clock was set to another time, and by how much."""

    tick: int
    seconds: float


class Watch:
    """Looks before each act of a model: at most one accident lies between two of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._began = world.monotonic
        self._offset = world.clock_offset
        self._mark()
        self.lost = 0  # the tick of the last accident after which the server knew less than before
        self.steps: list[Step] = []

    def look(self) -> None:
        """Look for an accident. A model calls this before each act, and at the end."""
        world = self._world
        if (offset := world.clock_offset) != self._offset:
            self.steps.append(Step(world.tick(), offset - self._offset))
            self._offset = offset
        left, found = self._marker, self._mark()
        if found != left:
            self.lost = world.tick()

    def stepped(self, since: int) -> tuple[bool, bool]:
        """Return whether the clock stepped forward, and whether it stepped back, since that tick."""
        steps = [step.seconds for step in self.steps if step.tick >= since]
        return any(one > 0 for one in steps), any(one < 0 for one in steps)

    @property
    def passed(self) -> float:
        """Return the seconds since the run began, by the server's clock where that ran ahead."""
        ahead = sum(step.seconds for step in self.steps if step.seconds > 0)
        return self._world.monotonic - self._began + ahead

    def _mark(self) -> bytes | None:
        """Leave a new marker, and return the one that was there."""
        self._marker = b"%d" % self._world.tick()
        found: bytes | None = self._world.ask("SET", MARKER, self._marker, "GET")
        return found


def endless(world: World, pattern: str) -> list[bytes]:
    """Return the keys that have no end."""
    keys: list[bytes] = world.ask("KEYS", pattern)
    ends = world.ask_all([("PTTL", key) for key in keys])
    return [key for key, end in zip(keys, ends, strict=True) if end == -1]
