"""A cache is put together: one body or several shards, and the guests that work with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stillroom.agreed import Agreed
from stillroom.cache.body import CacheBody
from stillroom.cache.housekeeping import Housekeeping
from stillroom.cache.images import Images
from stillroom.cache.loaders import Loaders
from stillroom.cache.means import Means, Place
from stillroom.cache.ordering import Ordering
from stillroom.cache.sharded import ShardedBody, shard_keys
from stillroom.cache.terms import Terms
from stillroom.cache.traced import body_of, store_of
from stillroom.dead_letters import DeadLetters
from stillroom.dispatch import Dispatch
from stillroom.operation import Operation
from stillroom.pauses import Pauses
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Clock


class CacheParts(NamedTuple):
    """The operations of one cache. A driver of it runs them."""

    cache: CacheBody | ShardedBody
    images: Images
    orders: Ordering
    housekeeping: Housekeeping


def cache_on(
    settings: Settings,
    clocks: Sequence[Clock],
    dispatch: Dispatch,
    stats: Stats,
    agreed: Agreed,
    dead_letters: DeadLetters,
    pauses: Pauses,
    run_aside: Sequence[Callable[[Operation[Any]], Any]],
) -> CacheParts:
    """Put a cache together. For each shard: its server's clock, and what runs an operation where none runs."""
    every_keys = shard_keys(settings)
    places = [Place(*one) for one in zip(every_keys, clocks, run_aside, strict=True)]
    cache: CacheBody | ShardedBody
    if len(places) == 1:
        terms = Terms(settings, agreed)
        means = Means(settings, terms, dispatch, stats, Loaders(), store_of(settings, stats))
        cache = body_of(settings)(means, places[0])
    else:
        cache = ShardedBody(settings, agreed, dispatch, stats, places)
    orders = Ordering(settings, every_keys[0], dispatch, stats, dead_letters, pauses, cache)
    return CacheParts(cache, Images(cache), orders, Housekeeping(cache, orders, pauses))
