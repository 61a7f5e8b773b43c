"""Time that an event loop spends waiting, as opposed to being late: only the first says anything about the
server."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

PULSE_S = 0.001  # between two looks at the clock, while somebody waits
# So far the loop's lateness moves a deadline; past that it is overloaded, not late.
OWN_LIMIT_S = 2.0


class Lateness:
    """Add up how late one event loop has been while somebody waits in it.

    A timer is due each millisecond. By as much as it comes too late the loop was busy with its tasks, or its thread
    waited for a CPU.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._due = 0.0  # time.monotonic(), while anybody waits
        self._waits = 0

    def total(self) -> float:
        """Return the seconds so far."""
        return self._sum + (max(0.0, time.monotonic() - self._due) if self._waits else 0.0)

    def begin(self) -> None:
        self._waits += 1
        if self._waits == 1:
            self._wind()

    def end(self) -> None:
        self._sum = self.total() if self._waits == 1 else self._sum
        self._waits -= 1
        if not self._waits:
            self._timer.cancel()

    def _tick(self) -> None:
        self._sum = self.total()
        self._wind()

    def _wind(self) -> None:
        self._due = time.monotonic() + PULSE_S
        self._timer = asyncio.get_running_loop().call_later(PULSE_S, self._tick)


class LateBy:
    """Measure how late the loop was while a block waited: `seconds`, once it is over."""

    seconds = 0.0

    def __init__(self, lateness: Lateness) -> None:
        self._lateness = lateness

    def __enter__(self) -> Self:
        self._lateness.begin()
        self._before = self._lateness.total()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = min(self._lateness.total() - self._before, OWN_LIMIT_S)
        self._lateness.end()


class IdleTimeout:
    """`asyncio.timeout_at(deadline)` for a wait in a loop that may be busy. `deadline`: time.monotonic().

    A thousand tasks that start at once keep their loop from reading what has arrived, and hold up the last of them.
    By as much as the loop is late the deadline moves. After the block `deadline` is where it has moved to.
    """

    def __init__(self, lateness: Lateness, deadline: float) -> None:
        self.deadline = deadline
        self._lateness = lateness
        self._asked = deadline
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._lateness.begin()
        self._late_before = self._lateness.total()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._asked - time.monotonic(), self._look)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        self._move()
        self._lateness.end()
        await self._timeout.__aexit__(kind, error, trace)

    def moved(self) -> float:
        """Return where the deadline has moved to by now."""
        self._move()
        return self.deadline

    def _move(self) -> None:
        late = self._lateness.total() - self._late_before
        self.deadline = self._asked + min(late, OWN_LIMIT_S)

    def _look(self) -> None:
        self._move()
        left = self.deadline - time.monotonic()
        if left > PULSE_S:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._timeout.reschedule(self._loop.time())
