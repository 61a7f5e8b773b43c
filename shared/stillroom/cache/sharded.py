"""A cache of several shards: each key has one, tags and patterns go to all of them.

A shard is a whole cache: its own clock, marks, indexes, work and outbox, in one slot of a Redis Cluster. So all
that body.py promises of a key holds as it does there. What goes to several shards is done when it is done in each;
an error of one is raised after all have been tried.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

from stillroom.agreed import Agreed
from stillroom.cache.body import CacheBody
from stillroom.cache.bulk import BulkBody
from stillroom.cache.change import ChangeBody
from stillroom.cache.images import ImageBody, normalised, tag_of
from stillroom.cache.invalidation import InvalidationBody, require_agreement
from stillroom.cache.loaders import Asked, Loader, LoaderOptions, recipe_of
from stillroom.cache.ordering import Ordering
from stillroom.cache.orders import Order
from stillroom.cache.reclaim import BUDGET_S, Progress, ReclaimBody, Report, added_up
from stillroom.dead_letters import DeadLetters
from stillroom.dispatch import Dispatch, RefreshOrder
from stillroom.errors import RedisUnavailable
from stillroom.keys import Keys, sanitized
from stillroom.operation import On, Operation
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Clock


def shard_of(name: bytes, shards: int) -> int:
    """The shard of a sanitized key."""
    return crc32(name) % shards


def shard_keys(settings: Settings) -> list[Keys]:
    """The keys of each shard."""
    namespace, in_cluster = settings.namespace, settings.cluster
    return [Keys(namespace, shard, in_cluster=in_cluster) for shard in range(settings.shards)]


def cache_on(
    settings: Settings,
    clocks: Sequence[Clock],
    dispatch: Dispatch,
    stats: Stats,
    agreed: Agreed,
    dead_letters: DeadLetters,
    run_aside: Sequence[Callable[[Operation[Any]], Any]],
) -> ImageBody | ShardedBody:
    """The cache's operations. For each shard: its server's clock, and what runs an operation where none runs."""
    require_agreement(agreed, settings)
    bodies = [
        ImageBody(settings, clock, keys, dispatch, stats, agreed)
        for clock, keys in zip(clocks, shard_keys(settings), strict=True)
    ]
    for body, run in zip(bodies, run_aside, strict=True):
        body.run_aside = run
    whole = bodies[0] if len(bodies) == 1 else ShardedBody(bodies)
    keys = shard_keys(settings)[0]
    whole.orders = Ordering(settings, keys, dispatch, stats, dead_letters, whole)
    return whole


class ShardedBody:
    """The operations of ImageBody, which says what each does."""

    orders: Ordering

    def __init__(self, shards: Sequence[ImageBody]) -> None:
        self.shards = shards
        self.loaders = shards[0].loaders
        for shard in shards:
            shard.loaders = self.loaders
            shard.whole = self

    # One key

    def get(self, key: str, *args: Any, **options: Any) -> Operation[Any]:
        return self._at(key, CacheBody.get, key, *args, **options)

    def get_entry(self, key: str, *args: Any, **options: Any) -> Operation[Any]:
        return self._at(key, CacheBody.get_entry, key, *args, **options)

    def get_or_set(self, key: str, load: Callable[[], Any], **options: Any) -> Operation[Any]:
        return self._at(key, CacheBody.get_or_set, key, load, **options)

    def set(self, key: str, value: Any, **options: Any) -> Operation[bool]:
        return self._at(key, CacheBody.set, key, value, **options)

    def add(self, key: str, value: Any, **options: Any) -> Operation[bool]:
        return self._at(key, ChangeBody.add, key, value, **options)

    def incr(self, key: str, by: float = 1) -> Operation[float | None]:
        return self._at(key, ChangeBody.incr, key, by)

    def touch(self, key: str, **options: Any) -> Operation[bool]:
        return self._at(key, ChangeBody.touch, key, **options)

    def loader(self, function: Callable[..., Any], key: str, options: LoaderOptions) -> Loader:
        return self.shards[0].loader(function, key, options)

    def call(
        self, loader: Loader, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Operation[Any]:
        key = loader.key(loader.values(args, kwargs))
        return self._at(key, CacheBody.call, loader, args, kwargs)

    def refresh(self, order: RefreshOrder) -> Operation[dict[str, Any]]:
        return self._on(order.key.encode(), CacheBody.refresh, order)

    def load(self, order: Asked) -> Operation[dict[str, Any]]:
        key = self.loaders[order.loader].key(recipe_of(order, self.loaders).values)
        return self._at(key, CacheBody.load, order)

    def get_image_info(self, filename: str) -> Operation[Any]:
        """An image's entries are in the shard of its tag."""
        return self._at(tag_of(normalised(filename)), ImageBody.get_image_info, filename)

    def invalidate_image(self, filename: str, *, defer: bool = False) -> Operation[None]:
        name = tag_of(normalised(filename))
        return self._at(name, ImageBody.invalidate_image, filename, defer=defer)

    # Many keys

    def get_many(self, keys: Iterable[str], *args: Any, **options: Any) -> Operation[Any]:
        wanted = list(keys)
        found = yield from self._each(wanted, BulkBody.get_many, *args, **options)
        return _in_order(wanted, found)

    def set_many(self, values: Mapping[str, Any], **options: Any) -> Operation[dict[str, bool]]:
        ready = self.shards[0].pack_many(values, options)  # type: ignore[arg-type]
        parts = self._parts(values)
        stored = yield from self._spread(
            [
                (shard, self.shards[shard].store_many({key: ready[key] for key in part}))
                for shard, part in parts.items()
            ]
        )
        return _in_order(values, stored)

    def invalidate_many(self, keys: Iterable[str]) -> Operation[dict[str, bool]]:
        wanted = list(keys)
        return _in_order(wanted, (yield from self._each(wanted, BulkBody.invalidate_many)))

    def get_or_set_many(
        self, keys: Iterable[str], load_many: Callable[[list[str]], Any], **options: Any
    ) -> Operation[dict[str, Any]]:
        """`load_many` is called once for each shard that lacks some."""
        wanted = list(keys)
        found = yield from self._each(wanted, BulkBody.get_or_set_many, load_many, **options)
        return _in_order(wanted, found)

    # Invalidating

    def invalidate(self, *keys: str, defer: bool = False) -> Operation[int]:
        counts = yield from self._spread(
            [
                (shard, self.shards[shard].invalidate(*part, defer=defer))
                for shard, part in self._parts(keys).items()
            ]
        )
        return sum(counts)

    def invalidate_by_tag(
        self, *tags: str, soft: bool = False, defer: bool = False
    ) -> Operation[None]:
        yield from self._all(InvalidationBody.invalidate_by_tag, *tags, soft=soft, defer=defer)

    def invalidate_by_pattern(self, glob: str, *, defer: bool = False) -> Operation[None]:
        yield from self._all(InvalidationBody.invalidate_by_pattern, glob, defer=defer)

    def clear(self, *, defer: bool = False) -> Operation[None]:
        yield from self._all(InvalidationBody.clear, defer=defer)

    @property
    def deferred(self) -> int:
        return sum(shard.deferred for shard in self.shards)

    def deliver_aside(self) -> None:
        for shard in self.shards:
            shard.deliver_aside()

    def deliver_last(self) -> None:
        for shard in self.shards:
            shard.deliver_last()

    # Background work

    def order(self, *orders: Order) -> Operation[None]:
        """Orders wait on the state's server, and are carried out on all shards."""
        return self.orders.order(*orders)

    def reclaim(
        self, *, budget: float = BUDGET_S, progress: Report | None = None
    ) -> Operation[dict[str, int]]:
        began = time.monotonic()
        ordered = yield from self.orders.carry_out(budget / 2)
        share = (budget - (time.monotonic() - began)) / len(self.shards)
        cleared = yield from self._all(ReclaimBody.clear_up, budget=share, progress=progress)
        return added_up([ordered, *cleared])

    def pending(self, *members: bytes) -> Operation[dict[bytes, Progress | None]]:
        """What is done in every shard is done; how far the rest has got is added up over those that have begun."""
        waiting: dict[bytes, Progress | None] = {}
        for found in (yield from self._all(ReclaimBody.pending, *members)):
            for member, progress in found.items():
                waiting[member] = _added(waiting.get(member), progress)
        return waiting

    def trim_marks(self) -> Operation[dict[str, int]]:
        return added_up((yield from self._all(CacheBody.trim_marks)))

    def trim_indexes(self, *, budget: float = 5.0) -> Operation[dict[str, int]]:
        share = budget / len(self.shards)
        return added_up((yield from self._all(ReclaimBody.trim_indexes, budget=share)))

    def flush_stats(self) -> Operation[None]:
        yield On([(0, self.shards[0].flush_stats())])

    # Where it goes

    def _spread(self, operations: Sequence[tuple[int, Operation[Any]]]) -> Operation[list[Any]]:
        """Run these on their shards, once it is known how many shards there are: see InvalidationBody.agree."""
        with contextlib.suppress(RedisUnavailable):  # each of them says what that means for it
            yield from self.shards[0].agree()
        results: list[Any] = yield On(operations)
        return results

    def _at(
        self, key: str, method: Callable[..., Any], *args: Any, **options: Any
    ) -> Operation[Any]:
        return (yield from self._on(sanitized(key), method, *args, **options))

    def _on(
        self, name: bytes, method: Callable[..., Any], *args: Any, **options: Any
    ) -> Operation[Any]:
        shard = shard_of(name, len(self.shards))
        (result,) = yield from self._spread([(shard, method(self.shards[shard], *args, **options))])
        return result

    def _each(
        self, keys: list[str], method: Callable[..., Any], *args: Any, **options: Any
    ) -> Operation[list[Any]]:
        """The results of the shards that have some of the keys."""
        results = yield from self._spread(
            [
                (shard, method(self.shards[shard], part, *args, **options))
                for shard, part in self._parts(keys).items()
            ]
        )
        return results

    def _all(self, method: Callable[..., Any], *args: Any, **options: Any) -> Operation[list[Any]]:
        results = yield from self._spread(
            [(n, method(shard, *args, **options)) for n, shard in enumerate(self.shards)]
        )
        return results

    def _parts(self, keys: Iterable[str]) -> dict[int, list[str]]:
        """The keys by shard. Raises InvalidKey before anything is sent."""
        parts: dict[int, list[str]] = {}
        for key in keys:
            parts.setdefault(shard_of(sanitized(key), len(self.shards)), []).append(key)
        return parts


def _in_order(keys: Iterable[str], parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    merged = {key: value for part in parts for key, value in part.items()}
    return {key: merged[key] for key in keys if key in merged}


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
