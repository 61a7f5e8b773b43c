"""Invalidations that Redis could not be told of, in order, the newest per name. Pure.

Names: `k:<key>`, `t:<tag>`, `s:<tag>`, `p:<glob>`, and `*` for everything, which makes all earlier ones needless.
"""

from __future__ import annotations

from collections.abc import Iterable

EVERYTHING = b"*"
KEY = b"k:"


class Outbox:
    """Keep deferred invalidations, up to `limit` names. Past it they become one: everything.

    That is more, and never less, than was asked.

    Threads may put at any time: what is put while a delivery is under way is not taken for delivered.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.numbers: dict[
            bytes, int
        ] = {}  # name → which put was its last. Each read looks whether there is one.
        self.count = 0  # of all puts

    @property
    def waiting(self) -> int:
        """Return how many names wait: Redis has yet to be told of them."""
        return len(self.numbers)

    def put(self, names: Iterable[bytes]) -> None:
        for name in names:
            self.count += 1
            if name == EVERYTHING or len(self.numbers) >= self._limit:
                self.numbers = {EVERYTHING: self.count}
            else:
                self.numbers.pop(name, None)  # to the end of the line
                self.numbers[name] = self.count

    def first(self, count: int) -> dict[bytes, int]:
        """Return up to `count` names that wait the longest."""
        return dict(list(self.numbers.items())[:count])

    def delivered(self, names: dict[bytes, int]) -> None:
        """Cross off those that were not put again since."""
        for name, number in names.items():
            if self.numbers.get(name) == number:
                self.numbers.pop(name, None)  # another thread may have delivered it, too
