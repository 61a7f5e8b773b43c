"""The cache: typed values with a TTL, stale-while-revalidate and tags."""

from stillroom.cache.body import CachedValue
from stillroom.cache.bulk import BulkBody
from stillroom.cache.cache import AsyncCache, AsyncCachedFunction, Cache, CachedFunction
from stillroom.cache.entry import Freshness

__all__ = [
    "AsyncCache",
    "AsyncCachedFunction",
    "BulkBody",
    "Cache",
    "CachedFunction",
    "CachedValue",
    "Freshness",
]
