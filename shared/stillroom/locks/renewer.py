"""One thread that renews what the threads of a process hold. A short hold never meets it."""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from stillroom.daemon import Daemon
from stillroom.wire import reset_after_fork

log = logging.getLogger("stillroom")

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
        self._lock = threading.RLock()
        # What is put here ends the thread's sleep: something is due before its next look.
        self._sooner: queue.SimpleQueue[None]
        self._thread: threading.Thread | None = None

    def add(self, every: float, renew: Callable[[], bool]) -> Renewal:
        """Call `renew` each `every` seconds, in the renewer's thread. Raises RuntimeError if no thread is free."""
        renewal = Renewal(every, renew)
        with self._lock:
            if self._thread is None:
                self._start()
            self._push(renewal)
            if self._due[0][2] is renewal:
                self._sooner.put(None)
        return renewal

    def _start(self) -> None:
        """Start the thread, and keep it only once it runs: else no later lock would be renewed.

        It waits at a queue of its own, and not for a condition: in a room that is older than gevent's patches the
        greenlets of a process hold one lock together, and one that waited would take it from the others. Nor for an
        event, whose lock would lock out a signal handler that takes a lock of ours in the middle of `set`.
        """
        self._sooner = queue.SimpleQueue()
        thread = Daemon(self._work, "stillroom locks")
        thread.start()
        self._thread = thread

    def drop(self, renewal: Renewal) -> None:
        """Stop renewing a lock. It leaves memory when half of what waits was dropped."""
        with self._lock:
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
            if renew is not None and _goes_on(renew):
                with self._lock:
                    self._push(renewal)

    def _next(self) -> Renewal | None:
        """Return the next lock that is due, or None when none was for a while."""
        idle_until = time.monotonic() + LINGER_S
        while True:
            with self._lock:
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    return heapq.heappop(self._due)[2]
                if not self._due and now >= idle_until:
                    self._thread = None
                    return None
                until = self._due[0][0] if self._due else idle_until
            with suppress(queue.Empty):
                self._sooner.get(timeout=until - now)


def _goes_on(renew: Callable[[], bool]) -> bool:
    """Renew; return whether to go on. An error with one lock is no reason to renew no other."""
    try:
        return renew()
    except Exception:
        log.exception("a lock could not be renewed; it is tried again")
        return True
