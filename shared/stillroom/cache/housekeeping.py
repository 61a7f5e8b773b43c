"""Do the work of a cache that runs in workers: carry out orders, free memory, refresh, trim; in every shard."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from stillroom.cache.body import CacheBody
from stillroom.cache.ordering import Ordering
from stillroom.cache.orders import Load, Order
from stillroom.cache.reclaim import Progress, Reclaim, Report, Work
from stillroom.cache.sharded import ShardedBody
from stillroom.cache.warm import Warming
from stillroom.durations import Duration, seconds_of
from stillroom.errors import RedisUnavailable
from stillroom.misuse import YES_OR_NO, refuse_other
from stillroom.operation import On, Operation
from stillroom.pauses import Pauses

BUDGET_S = 20.0  # of one run; the rest is due at once


class Housekeeping:
    """The operations. A driver of the cache runs them."""

    def __init__(self, cache: CacheBody | ShardedBody, orders: Ordering, pauses: Pauses) -> None:
        self._cache = cache
        self._orders = orders
        self._warming = Warming(cache, orders)
        self._parts = [Reclaim(shard, pauses) for shard in cache.shards]

    def reclaim(
        self,
        *,
        budget: Duration = BUDGET_S,
        progress: Report | None = None,
        loads: bool = True,
    ) -> Operation[dict[str, int]]:
        """Carry out what apps ordered, and then what invalidations left to do, for `budget` seconds.

        What is due the longest comes first. Orders get half of the time at the most. While refreshes are paused
        nothing is loaded: orders to load and soft invalidations wait. `progress` is called with a Progress twice a
        second. `loads=False`: free memory and leave the rest to workers, because this process does not know the
        app's loaders. Returns counts: work done, orders that became dead letters, entries seen, deleted
        and refreshed, patterns dropped, how much work is left, and how much of that is due.
        Raises InvalidArgument. Redis away: RedisUnavailable; the work stays written down.
        """
        seconds = seconds_of("budget", budget)
        refuse_other("loads", loads, bool, YES_OR_NO)
        began = time.monotonic()
        ordered: dict[str, int] = {}
        away: RedisUnavailable | None = None
        try:
            if loads:
                ordered = yield from self._orders.carry_out(seconds / 2)
        except RedisUnavailable as error:  # perhaps of one shard: the others have work to do
            away = error
        share = (seconds - (time.monotonic() - began)) / len(self._parts)
        left: list[list[Work]] = [[] for _ in self._parts]
        cleared = yield from self._cache.everywhere(
            [
                part.clear_up(budget=share, progress=progress, loads=loads, orders=orders)
                for part, orders in zip(self._parts, left, strict=True)
            ]
        )
        for shard, works in enumerate(left):
            if works and loads and (yield from self._orders.adopt([one.member for one in works])):
                yield On([(shard, self._parts[shard].cross_off(works))])
        if away is not None:
            raise away
        return _added_up([ordered, *cleared])

    def pending(self, *members: bytes) -> Operation[dict[bytes, Progress | None]]:
        """Return which of these items of `todo` are unfinished, with their Progress; None if no worker has begun.

        What is done in every shard is done; the progress of the rest is added up over the shards that have begun.
        """
        waiting: dict[bytes, Progress | None] = {}
        parts = [part.pending(*members) for part in self._parts]
        for found in (yield from self._cache.everywhere(parts)):
            for member, progress in found.items():
                waiting[member] = _added(waiting.get(member), progress)
        return waiting

    def warm(self) -> Operation[dict[str, int]]:
        """Order what loaders with `warm_every` are due to load. Returns {"loaders": due, "values": ordered}.

        Safe in several workers at once. Redis away: RedisUnavailable.
        """
        return self._warming.warm()

    def order_load(self, loader: str, args: Mapping[str, Any]) -> Operation[None]:
        """Have a worker load a value by the name of its loader, whatever is there. See Tasks.load.

        Redis away: RedisUnavailable. DispatchFailed if 10,000 orders wait.
        """
        return self._orders.order(Load(loader=loader, args=dict(args)))

    def order(self, order: Order) -> Operation[None]:
        """Write an order down, for workers to carry it out. Redis away: RedisUnavailable. See Ordering.order."""
        return self._orders.order(order)

    def trim_marks(self) -> Operation[dict[str, int]]:
        """Drop marks that are older than any entry can be. Returns {"dropped", "left"}."""
        parts = [part.trim_marks() for part in self._parts]
        return _added_up((yield from self._cache.everywhere(parts)))

    def trim_indexes(self, *, budget: Duration = 5.0) -> Operation[dict[str, int]]:
        """Take out of the tag indexes what has run out by itself, for `budget` seconds, and go on there next time.

        Returns {"indexes": looked at, "members": taken out}. Raises InvalidArgument.
        """
        share = seconds_of("budget", budget) / len(self._parts)
        parts = [part.trim_indexes(budget=share) for part in self._parts]
        return _added_up((yield from self._cache.everywhere(parts)))


def _added_up(reports: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up the counts of several reports."""
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report)
    return dict(total)


def _added(one: Progress | None, other: Progress | None) -> Progress | None:
    if one is None or other is None:
        return one or other
    known = [state.total for state in (one, other)]
    return Progress(
        seen=one.seen + other.seen,
        deleted=one.deleted + other.deleted,
        refreshed=one.refreshed + other.refreshed,
        total=None if None in known else sum(total or 0 for total in known),
        done=one.done and other.done,
    )
