"""The refreshes of one message: claimed some at a time, loaded one by one, stored together.

A round trip costs a worker more than a quick load does. But a claim is a lease, which runs while its load waits for
others, and nobody can read a value that is not stored yet. So only what is quick shares its round trips.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from stillroom.cache.bites import BYTES_AT_ONCE, bytes_of
from stillroom.dispatch import RefreshOrder
from stillroom.operation import BATCHES, Failed, Freeing, Operation
from stillroom.together import Side, answers, rest

QUICK_S = 0.05  # loads that take longer than this, together, share nothing
PIECE_S = 0.05  # how long a piece goes on with what is claimed
NEVER = float("-inf")  # as time.monotonic(), which may begin with the machine
MOST = 16  # in one round trip; the first of a message is alone, then four times as many as before

Refresh: TypeAlias = Callable[[RefreshOrder], Operation[dict[str, Any]]]
_Do: TypeAlias = "Callable[[list[_Refresh], Refresh], Operation[None]]"


class Piece(NamedTuple):
    """Some of a message's work, on one shard. `waiting`: what is to be claimed, and not begun."""

    shard: int
    run: Callable[[Refresh], Operation[None]]
    waiting: list[_Refresh]

    def pass_on(self, send: Callable[[RefreshOrder], object]) -> bool:
        """Have what waits sent instead; return whether anything did. Where `send` raises, the rest still waits."""
        there_was = bool(self.waiting)
        while self.waiting:
            send(self.waiting[0].order)
            del self.waiting[0]
        return there_was


class Refreshes:
    """The work of a message. Threads take pieces of it as from a deque, several at the same time.

    So no order waits for another one's load.
    """

    def __init__(
        self, orders: Iterable[RefreshOrder], shard_of: Callable[[RefreshOrder], int] = lambda _: 0
    ) -> None:
        """`shard_of`: where an order's key is, of the cache's shards."""
        ordered = sorted((_Refresh(order, shard_of(order)) for order in orders), key=_shard)
        self._ended: deque[tuple[RefreshOrder, dict[str, Any] | Failed]] = deque()
        self._ordered = deque(ordered)
        self._claimed: deque[_Refresh] = deque()
        self._loaded: deque[_Refresh] = deque()
        self._size, self._claimed_at, self._loaded_at = 1, NEVER, NEVER

    def __len__(self) -> int:
        """Return how many pieces are left to take, or a few more."""
        return len(self._ordered) + len(self._claimed) + bool(self._loaded)

    def popleft(self) -> Piece:
        """Take the next piece. Raises IndexError where there is none."""
        if begun := self._begun():
            do, some = begun
            return Piece(some[0].shard, partial(self._while_quick, do, some), [])
        now = time.monotonic()
        is_quick = now - self._claimed_at < QUICK_S
        self._size, self._claimed_at = min(4 * self._size, MOST) if is_quick else 1, now
        if not (some := _taken(self._ordered, self._size)):
            raise IndexError("nothing is left")
        do = self._claim if len(some) > 1 else self._alone
        return Piece(some[0].shard, partial(self._while_quick, do, some), some)

    def _begun(self, shard: int | None = None) -> tuple[_Do, list[_Refresh]] | None:
        """Take what comes next of those that are claimed, on any shard by default."""
        is_late = time.monotonic() - self._loaded_at > QUICK_S
        if (is_late or not self._claimed) and (some := _taken(self._loaded, MOST, shard)):
            return self._store, some
        some = _taken(self._claimed, 1, shard)
        return (self._load, some) if some else None

    def _while_quick(self, do: _Do, some: list[_Refresh], refresh: Refresh) -> Operation[None]:
        """Do this, and then what else is claimed: to begin a piece costs as much as a quick load."""
        began, shard = time.monotonic(), some[0].shard
        yield from do(some, refresh)
        while time.monotonic() - began < PIECE_S and (begun := self._begun(shard)):
            do, some = begun
            yield from do(some, refresh)

    def _alone(self, some: Sequence[_Refresh], refresh: Refresh) -> Operation[None]:
        [one] = some
        one.side = Side(refresh(one.order))
        yield from self._run(one)

    def ended(self) -> Iterator[tuple[RefreshOrder, dict[str, Any] | Failed]]:
        """Take the orders that are done, each with its report, or Failed. An order is given to one caller."""
        with suppress(IndexError):
            while True:
                yield self._ended.popleft()

    def _claim(self, some: Sequence[_Refresh], refresh: Refresh) -> Operation[None]:
        for one in some:
            one.side = Side(refresh(one.order))
        asking = [one for one in some if type(one.side.step) in BATCHES]
        for one, answer in zip(asking, (yield from self._answers(asking)), strict=True):
            one.answer = answer
        for one in some:
            self._go_on(one)

    def _load(self, some: Sequence[_Refresh], _: Refresh) -> Operation[None]:
        [one] = some
        answer, one.answer = one.answer, None
        if answer is not None:
            one.side.take(answer)
        yield from self._run(one, upto=Freeing)

    def _store(self, some: Sequence[_Refresh], _: Refresh) -> Operation[None]:
        for one, answer in zip(some, (yield from self._answers(some)), strict=True):
            one.side.take(answer)
            yield from rest(one.side)
            self._go_on(one)

    def _run(self, one: _Refresh, upto: type | None = None) -> Operation[None]:
        """Run one to its end, or up to a step of this kind."""
        side = one.side
        while not side.is_done and type(side.step) is not upto:
            try:
                yield from side.alone()
            except GeneratorExit:
                raise
            except BaseException as error:
                yield from self._interrupted([one], error)
                raise
        self._go_on(one)

    def _answers(self, some: Sequence[_Refresh]) -> Operation[list[Any]]:
        """Return the answers to their steps. An interruption is told to each, which gives its lease back."""
        try:
            return (yield from answers([one.side.step for one in some]))
        except GeneratorExit:
            raise
        except BaseException as error:
            yield from self._interrupted(some, error)
            raise

    def _interrupted(self, some: Sequence[_Refresh], error: BaseException) -> Operation[None]:
        for one in some:
            one.side.fail(error)
        for one in some:
            yield from rest(one.side)
            self._go_on(one)

    def _go_on(self, one: _Refresh) -> None:
        """Put one among those that wait for what it needs next."""
        if one.side.is_done:
            self._ended.append((one.order, one.side.outcome))
        elif type(one.side.step) is Freeing and one.answer is None:
            if not self._loaded:
                self._loaded_at = time.monotonic()
            one.size = sum(map(bytes_of, one.side.step))
            self._loaded.append(one)
        else:
            self._claimed.append(one)


class _Refresh:
    """An order on its way. `answer`: what its step was answered with, where it has not been told yet."""

    side: Side
    answer: list[Any] | Failed | None = None
    size = 0  # bytes to store

    def __init__(self, order: RefreshOrder, shard: int) -> None:
        self.order = order
        self.shard = shard


def _shard(one: _Refresh) -> int:
    return one.shard


def _taken(waiting: deque[_Refresh], most: int, shard: int | None = None) -> list[_Refresh]:
    """Take the next ones, so many or fewer, as one batch may be so large. All are of this shard, or the first's."""
    taken: list[_Refresh] = []
    size = 0
    while len(taken) < most and size < BYTES_AT_ONCE:
        try:
            one = waiting.popleft()
        except IndexError:
            break
        if shard is None:
            shard = one.shard
        if one.shard != shard:
            waiting.appendleft(one)
            break
        taken.append(one)
        size += one.size
    return taken
