"""A cache of several shards: each key has one, tags and patterns go to all of them.

A shard is a whole cache: its own clock, marks, indexes, work and outbox, in one slot of a Redis Cluster. So all
that core.py promises of a key holds as it does there. What goes to several shards is done when it is done in each;
an error of one is raised after all have been tried.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar
from zlib import crc32

from stillroom.agreed import Agreed
from stillroom.cache.body import CacheBody
from stillroom.cache.bulk import names_of
from stillroom.cache.calls import Asked
from stillroom.cache.invalidation import names_given, warn_of_globs
from stillroom.cache.loaders import Loader, LoaderCall, Loaders, Recipe, recipe_of
from stillroom.cache.means import Means, Place
from stillroom.cache.refreshes import Piece
from stillroom.cache.terms import Terms
from stillroom.cache.traced import body_of, store_of
from stillroom.dispatch import Dispatch, RefreshOrder
from stillroom.errors import RedisUnavailable
from stillroom.keys import Keys, sanitized
from stillroom.operation import On, Operation
from stillroom.settings import Settings
from stillroom.stats import Stats

P = ParamSpec("P")
T = TypeVar("T")


def shard_of(name: bytes, shards: int) -> int:
    """Return the shard of a sanitized key."""
    return crc32(name) % shards


def shard_keys(settings: Settings) -> list[Keys]:
    """Return the keys of each shard."""
    how = {"in_cluster": settings.cluster, "state_in_cluster": settings.state_cluster}
    return [Keys(settings.namespace, shard, **how) for shard in range(settings.shards)]


# The rules: which shards run an operation of a cache, and what becomes of their results.


def _of_key(_: ShardedBody, key: str, *_args: Any, **_options: Any) -> bytes:
    return sanitized(key)


def _of_name(_: ShardedBody, name: bytes, _recipe: Recipe) -> bytes:
    return name


def _of_call(
    cache: ShardedBody, loader: Loader, args: Sequence[Any], kwargs: Mapping[str, Any], *_away: Any
) -> bytes:
    return cache.shards[0].wanted(loader, args, kwargs).name


def _of_refresh(_: ShardedBody, order: RefreshOrder) -> bytes:
    return order.key.encode()


def _of_order(cache: ShardedBody, order: LoaderCall) -> bytes:
    values = recipe_of(order, cache.loaders).values
    return cache.loaders[order.loader].place(values)


def one_key(
    operation: Callable[Concatenate[CacheBody, P], Operation[T]],
    name_of: Callable[..., bytes] = _of_key,
) -> Callable[Concatenate[Any, P], Operation[T]]:
    """Let the shard of the key run the operation. `name_of`: the sanitized key, by the arguments."""

    @functools.wraps(operation)  # events name an operation by where it is written
    def spread(self: ShardedBody, /, *args: P.args, **options: P.kwargs) -> Operation[T]:
        shard = shard_of(name_of(self, *args, **options), len(self.shards))
        (result,) = yield from self.on([(shard, operation(self.shards[shard], *args, **options))])
        return result

    return spread


def each_key(
    operation: Callable[Concatenate[CacheBody, Iterable[str], P], Operation[dict[str, T]]],
    *,
    twice: bool = False,
) -> Callable[Concatenate[Any, Iterable[str], P], Operation[dict[str, T]]]:
    """Let the shards that have some of the keys run it; what they give is put together in the order of the keys.

    `twice`: see ShardedBody.twice.
    """

    @functools.wraps(operation)  # events name an operation by where it is written
    def spread(
        self: ShardedBody, /, keys: Iterable[str], *args: P.args, **options: P.kwargs
    ) -> Operation[dict[str, T]]:
        names = names_of(keys)

        def in_shards() -> list[tuple[int, Operation[dict[str, T]]]]:
            return [
                (shard, operation(self.shards[shard], some, *args, **options))
                for shard, some in self.by_shard(names).items()
            ]

        parts = self.twice(in_shards) if twice else self.on(in_shards())
        return _in_order(names, (yield from parts))

    return spread  # type: ignore[return-value]  # `keys` may be named


def all_shards(
    operation: Callable[Concatenate[CacheBody, P], Operation[None]],
) -> Callable[Concatenate[Any, P], Operation[None]]:
    """Let every shard run the operation."""

    @functools.wraps(operation)  # events name an operation by where it is written
    def spread(self: ShardedBody, /, *args: P.args, **options: P.kwargs) -> Operation[None]:
        def everywhere() -> list[tuple[int, Operation[None]]]:
            return [(n, operation(shard, *args, **options)) for n, shard in enumerate(self.shards)]

        yield from self.twice(everywhere)

    return spread


class ShardedBody:
    """The operations of CacheBody, which says what each does."""

    def __init__(
        self,
        settings: Settings,
        agreed: Agreed,
        dispatch: Dispatch,
        stats: Stats,
        places: Sequence[Place],
    ) -> None:
        self.settings = settings
        self.stats = stats
        self.loaders = Loaders()
        self.terms = Terms(settings, agreed, self.clear)
        copies = store_of(settings, stats)
        means = Means(settings, self.terms, dispatch, stats, self.loaders, copies)
        self.copies = means.copies
        self.shards = [body_of(settings)(means, place) for place in places]

    get = one_key(CacheBody.get)
    get_entry = one_key(CacheBody.get_entry)
    get_or_set = one_key(CacheBody.get_or_set)
    set = one_key(CacheBody.set)
    add = one_key(CacheBody.add)
    explain = one_key(CacheBody.explain)
    incr = one_key(CacheBody.incr)
    touch = one_key(CacheBody.touch)
    obtain = one_key(CacheBody.obtain, _of_name)
    call = one_key(CacheBody.call, _of_call)
    load = one_key(CacheBody.load, _of_order)
    refresh = one_key(CacheBody.refresh, _of_refresh)

    get_many = each_key(CacheBody.get_many)
    get_or_set_many = each_key(CacheBody.get_or_set_many)
    forget_many = each_key(CacheBody.forget_many, twice=True)

    invalidate_by_tag = all_shards(CacheBody.invalidate_by_tag)
    invalidate_by_pattern = all_shards(CacheBody.invalidate_by_pattern)
    clear = all_shards(CacheBody.clear)

    def refresh_piece(self, piece: Piece) -> Operation[None]:
        """Do a piece of work on its shard."""
        yield from self.on([(piece.shard, self.shards[piece.shard].refresh_piece(piece))])

    def set_many(self, values: Mapping[str, Any], **options: Any) -> Operation[dict[str, bool]]:
        """Pack all values before anything is sent, and store each in its shard."""
        ready = self.shards[0].pack_many(values, **options)
        operations = [
            (shard, self.shards[shard].store_many({key: ready[key] for key in some}))
            for shard, some in self.by_shard(names_of(values)).items()
        ]
        return _in_order(values, (yield from self.on(operations)))

    def call_many(self, calls: Sequence[Asked]) -> Operation[list[Any]]:
        """Look each call up in the shard of its key."""
        parts: dict[int, list[int]] = {}
        for place, call in enumerate(calls):
            shard = shard_of(_of_call(self, *call), len(self.shards))
            parts.setdefault(shard, []).append(place)
        operations = [
            (shard, self.shards[shard].call_many([calls[place] for place in part]))
            for shard, part in parts.items()
        ]
        values: list[Any] = [None] * len(calls)
        for part, some in zip(parts.values(), (yield from self.on(operations)), strict=True):
            for place, value in zip(part, some, strict=True):
                values[place] = value
        return values

    def invalidate(self, *keys: str, defer: bool = False) -> Operation[int]:
        """Forget each key in its shard, and add up how many held a value."""
        names = dict(zip(keys, names_given("invalidate", keys), strict=True))

        def in_shards() -> list[tuple[int, Operation[list[int]]]]:
            return [
                (shard, self.shards[shard].forget(*some, defer=defer))
                for shard, some in self.by_shard(names).items()
            ]

        counts = [count for some in (yield from self.twice(in_shards)) for count in some]
        warn_of_globs(keys, counts)
        return sum(counts)

    def invalidate_many(self, keys: Iterable[str]) -> Operation[dict[str, bool]]:
        """Forget each key in its shard. Return which of them held a value."""
        held = yield from self.forget_many(keys)
        warn_of_globs(held, held.values())
        return held

    def proofs(self) -> list[tuple[int, Operation[None]]]:
        """Return the operations that prove the copies of this process, by the number of their shard.

        Each shard has a clock of its own.
        """
        if not len(self.copies):
            return []
        return [(number, shard.prove()) for number, shard in enumerate(self.shards)]

    def flush_stats(self) -> Operation[None]:
        """Write the counts down, which the shards share."""
        yield from self.on_first(self.shards[0].flush_stats())

    def loader(self, function: Callable[..., Any], key: str, **options: Any) -> Loader:
        """Register a function of the app, for all shards."""
        return self.shards[0].loader(function, key, **options)

    def recipe(self, *args: Any) -> Recipe:
        """Return what makes a value, in whichever shard."""
        return self.shards[0].recipe(*args)

    @property
    def deferred(self) -> int:
        """Return how many deferred invalidations wait in this process."""
        return sum(shard.deferred for shard in self.shards)

    def deliver_aside(self) -> None:
        """Deliver them where no operation is running."""
        for shard in self.shards:
            shard.deliver_aside()

    def deliver_last(self) -> None:
        """Deliver them at the end of the room."""
        for shard in self.shards:
            shard.deliver_last()

    # Where it goes

    def on(self, operations: Sequence[tuple[int, Operation[T]]]) -> Operation[list[T]]:
        """Run these on their shards, once it is known how many shards there are: see Terms.agree."""
        with contextlib.suppress(RedisUnavailable):  # each operation documents what that means
            yield from self.terms.agree()
        results: list[T] = yield On(operations)
        return results

    def twice(
        self, operations: Callable[[], Sequence[tuple[int, Operation[T]]]]
    ) -> Operation[list[T]]:
        """Run an invalidation on its shards, and once more where they are several. Return the first results.

        One shard has its mark before another. A load in the first that begins in between may read a value of the
        other, which is not invalidated yet, and what it makes of that is newer than the mark that would name it.
        When the second run begins all shards have their marks: it ends such values, and no later load makes any.
        A shard for which it was deferred is told once, when it is back.
        """
        before = [shard.deferrals for shard in self.shards]
        results = yield from self.on(operations())
        if len(results) > 1:
            told = [one for one in operations() if self.shards[one[0]].deferrals == before[one[0]]]
            yield from self.on(told)
        return results

    def on_first(self, operation: Operation[T]) -> Operation[T]:
        """Run an operation of one shard that does it for all of them."""
        (result,) = yield On([(0, operation)])
        return result  # type: ignore[no-any-return]

    def everywhere(self, operations: Sequence[Operation[T]]) -> Operation[list[T]]:
        """Run one operation on each of the shards."""
        return (yield from self.on(list(enumerate(operations))))

    def by_shard(self, names: Mapping[str, bytes]) -> dict[int, list[str]]:
        """Return the keys of these names by shard."""
        parts: dict[int, list[str]] = {}
        for key, name in names.items():
            parts.setdefault(shard_of(name, len(self.shards)), []).append(key)
        return parts


def _in_order(keys: Iterable[str], parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    merged = {key: value for part in parts for key, value in part.items()}
    return {key: merged[key] for key in keys if key in merged}
