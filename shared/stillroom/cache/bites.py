"""Send large batches in bites. Each bite has its own deadline, and other calls get their turn in between.

One batch of 20,000 values takes longer than one batch may, so all of them would be given up. A bite that there was
no time for goes again, with less in it. What fits into one bite has the time of one call, and is tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from stillroom.errors import RedisUnavailable
from stillroom.operation import Operation, Pause

S = TypeVar("S")
T = TypeVar("T")

SCRIPTS_AT_ONCE = 100  # 6 ms of the server, or 25 on a bad day
KEYS_AT_ONCE = 500  # to read, or to delete
LEAST = 10  # so many, when there was no time for more
TRIES = 4  # of one bite. Where Redis is away the breaker ends them earlier
BYTES_AT_ONCE = 512 * 1024  # to send


class Bites(Generic[T]):
    """Take items in order, a bite of them at a time.

    bites = Bites(names, KEYS_AT_ONCE)
    while bites.left:
        yield from bites.turn()
        try:
            … bites.next() …
        except RedisUnavailable as error:
            if bites.again(error):
                continue
            …
        bites.done()
    """

    def __init__(self, things: Sequence[T], most: int) -> None:
        self._things = things
        self._most = self._size = most
        self._start = self._tried = 0
        self._bite: Sequence[T] = ()
        self._are_several = len(things) > most

    @property
    def left(self) -> bool:
        """Return whether there is another bite."""
        return self._start < len(self._things)

    def turn(self) -> Operation[None]:
        """Let others go first, where this is not the only bite. What follows is another call, with its own time."""
        if self._are_several:
            yield Pause(0)

    def next(self) -> Sequence[T]:
        """Return the next bite."""
        self._bite = self._things[self._start : self._start + self._size]
        if isinstance(self._bite[0], tuple):  # commands
            self._bite = small_enough(self._bite, bytes_of)
        if self._start + len(self._bite) < len(self._things):  # few, and large
            self._are_several = True
        return self._bite

    def beside(self, others: Sequence[S]) -> Sequence[S]:
        """Return the part of `others` that is parallel to the bite: `others` has one for each thing."""
        return others[self._start : self._start + len(self._bite)]

    def done(self) -> None:
        """Go on behind this bite, with more at a time."""
        self._start += len(self._bite)
        self._size, self._tried = min(self._most, self._size * 2), 0

    def again(self, error: RedisUnavailable) -> bool:
        """Return whether to try the failed bite again, with less in it.

        Use it only for things that may be done twice without harm.
        """
        self._tried += 1
        self._size = max(min(LEAST, self._most), len(self._bite) // 3)
        return self._are_several and error.reason == "timeout" and self._tried < TRIES


def in_bites(batch: list[Any]) -> Operation[list[Any]]:
    """Return the replies to commands that stand for themselves. The first bite that fails raises."""
    replies: list[Any] = []
    bites = Bites(batch, SCRIPTS_AT_ONCE)
    while bites.left:
        yield from bites.turn()
        replies += yield type(batch)(bites.next())
        bites.done()
    return replies


def small_enough(things: Sequence[T], size_of: Callable[[T], int]) -> Sequence[T]:
    """Return the first of these commands, or arguments, that fit one batch in bytes: one at least."""
    size = 0
    for number, thing in enumerate(things):
        size += size_of(thing)
        if number and size > BYTES_AT_ONCE:
            return things[:number]
    return things


def bytes_of(command: Any) -> int:
    """Return how many bytes a command sends, nearly."""
    return sum(map(len, command))
