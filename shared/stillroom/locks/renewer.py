"""One thread that renews what the threads of a process hold. A short hold never meets it."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from stillroom.wire import reset_after_fork

LINGER_S = 10.0  # without anything to renew the thread ends after this


class Renewal:
    """Something that is renewed until `renew` returns False, or is None."""

    def __init__(self, every: float, renew: Callable[[], bool]) -> None:
        self.every = every
        self.renew: Callable[[], bool] | None = renew


class Renewer:
    """Calls what it was given again and again."""

    def __init__(self) -> None:
        self._numbers = itertools.count()  # so that two with the same time are never compared
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Have nothing to renew and no thread: a forked child holds none of its parent's locks."""
        self._due: list[tuple[float, int, Renewal]] = []
        self._dropped = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, every: float, renew: Callable[[], bool]) -> Renewal:
        """Call `renew` each `every` seconds, in the renewer's thread. Raises RuntimeError if no thread is free."""
        renewal = Renewal(every, renew)
        with self._changed:
            if self._thread is None:
                self._start()
            self._push(renewal)
            if self._due[0][2] is renewal:  # sooner than what the thread sleeps for
                self._changed.notify()
        return renewal

    def _start(self) -> None:
        """Start the thread, and keep it only once it runs: else no later lock would be renewed."""
        thread = threading.Thread(target=self._work, name="stillroom locks", daemon=True)
        thread.start()
        self._thread = thread

    def drop(self, renewal: Renewal) -> None:
        """Stop renewing a lock. It leaves memory when half of what waits was dropped."""
        with self._changed:
            renewal.renew = None
            self._dropped += 1
            if 2 * self._dropped > len(self._due):
                self._due = [item for item in self._due if item[2].renew is not None]
                heapq.heapify(self._due)
                self._dropped = 0

    def _push(self, renewal: Renewal) -> None:
        item = (time.monotonic() + renewal.every, next(self._numbers), renewal)
        heapq.heappush(self._due, item)

    def _work(self) -> None:
        while (renewal := self._next()) is not None:
            renew = renewal.renew
            if renew is not None and renew():
                with self._changed:
                    self._push(renewal)

    def _next(self) -> Renewal | None:
        """Return the next lock that is due, or None when none was for a while."""
        with self._changed:
            idle_until = time.monotonic() + LINGER_S
            while True:
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    return heapq.heappop(self._due)[2]
                if not self._due and now >= idle_until:
                    self._thread = None
                    return None
                self._changed.wait((self._due[0][0] if self._due else idle_until) - now)
