"""The hits that Redis is being asked for: it may admit them before this process knows. Pure.

A decision without Redis counts those of its logs. Adding up all checks in flight for each decision would cost 3,000
checks that fail together nine million steps. So the sums are kept once a decision has asked for them: from then on
each check that begins or ends is noted, and the next decision adds what was noted. While no decision asks there are
no sums, and a check costs a step of a dict.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

NOTED = 10_000  # begins and ends that no decision has asked for: then the sums are given up

Hits = dict[bytes, int]  # by log


class Asked(Protocol):
    """A check that Redis is asked for: `cost` hits in each of these logs."""

    @property
    def logs(self) -> Sequence[bytes]: ...
    @property
    def cost(self) -> int: ...


class Flying:
    """The checks in flight. Thread-safe."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all checks: those that a forked process inherits never end in it."""
        self._asked: dict[object, Asked] = {}
        self._sums: _Sums | None = None
        self._adding = threading.Lock()

    def begin(self, asked: Asked, mark: object = None) -> object:
        """Count a check from now on. Return the mark that ends it, a new one if none is given.

        No lock is taken, here or in `end`. The check is in the dict before it is noted, so sums that begin
        meanwhile have it from one or the other.
        """
        mark = object() if mark is None else mark
        self._asked[mark] = asked
        if self._sums is not None:
            self._note(mark, asked)
        return mark

    def end(self, mark: object) -> None:
        """Count a check no more. It may be ended twice."""
        if self._asked.pop(mark, None) is not None and self._sums is not None:
            self._note(mark, None)

    def hits(self, logs: Sequence[bytes], but: object = None) -> Hits:
        """Return how many hits are in flight in each of these logs; a log with none may be missing.

        `but`: the mark of the check that is decided about. Its own hits are left out.
        """
        found = self._hits(logs)
        if (own := self._asked.get(but)) is not None:
            for log in found.keys() & {*own.logs}:
                found[log] -= own.cost
        return found

    def _hits(self, logs: Sequence[bytes]) -> Hits:
        if not self._adding.acquire(blocking=False):
            # Another thread adds up just now, or a signal handler has interrupted this one.
            return _added_up(self._asked.copy().values(), logs)
        try:
            sums = self._sums
            if sums is None:
                sums = self._sums = _Sums()
                sums.begin_with(self._asked.copy())
            sums.catch_up()
            return {log: sums.hits[log] for log in logs if log in sums.hits}
        except BaseException:  # of a signal: a sum may be half made
            self._sums = None
            raise
        finally:
            self._adding.release()

    def _note(self, mark: object, asked: Asked | None) -> None:
        if (sums := self._sums) is not None:
            sums.noted.append((mark, asked))
            if len(sums.noted) > NOTED:
                self._sums = None


class _Sums:
    """The hits of each log, and the checks that are in them."""

    def __init__(self) -> None:
        self.hits: Counter[bytes] = Counter()
        self.noted: deque[tuple[object, Asked | None]] = deque()  # None: it has ended
        self._counted: dict[object, Asked] = {}

    def begin_with(self, checks: dict[object, Asked]) -> None:
        for mark, asked in checks.items():
            self._add(mark, asked)

    def catch_up(self) -> None:
        """Add what was noted since the last decision."""
        while self.noted:
            mark, asked = self.noted.popleft()
            if asked is None:
                self._subtract(mark)
            else:
                self._add(mark, asked)

    def _add(self, mark: object, asked: Asked) -> None:
        if mark in self._counted:  # it began while the sums did
            return
        self._counted[mark] = asked
        for log in asked.logs:
            self.hits[log] += asked.cost

    def _subtract(self, mark: object) -> None:
        if (asked := self._counted.pop(mark, None)) is None:  # it ended before the sums began
            return
        for log in asked.logs:
            self.hits[log] -= asked.cost
            if not self.hits[log]:
                del self.hits[log]


def _added_up(checks: Iterable[Asked], logs: Sequence[bytes]) -> Hits:
    found = dict.fromkeys(logs, 0)
    for asked in checks:
        for log in asked.logs:
            if log in found:
                found[log] += asked.cost
    return found
