"""The cache: typed values with a TTL, stale-while-revalidate and tags."""

from stillroom.cache.body import CacheBody, CachedValue
from stillroom.cache.cache import AsyncCache, Cache
from stillroom.cache.cached import AsyncCachedFunction, CachedFunction
from stillroom.cache.entry import Freshness
from stillroom.cache.images import ImageBody, ImageInfo
from stillroom.cache.probe import CacheProbe, TodoProbe
from stillroom.cache.reclaim import Progress, ReclaimBody
from stillroom.cache.sharded import ShardedBody, cache_on, shard_keys
from stillroom.cache.tasks import AsyncTasks, Tasks, TasksBody

__all__ = [
    "AsyncCache",
    "AsyncCachedFunction",
    "AsyncTasks",
    "Cache",
    "CacheBody",
    "CacheProbe",
    "CachedFunction",
    "CachedValue",
    "Freshness",
    "ImageBody",
    "ImageInfo",
    "Progress",
    "ReclaimBody",
    "ShardedBody",
    "Tasks",
    "TasksBody",
    "TodoProbe",
    "cache_on",
    "shard_keys",
]
