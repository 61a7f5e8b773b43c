"""The cache: typed values with a TTL, stale-while-revalidate and tags."""

from stillroom.cache.assembly import CacheParts, cache_on
from stillroom.cache.body import CacheBody
from stillroom.cache.cache import AsyncCache, Cache
from stillroom.cache.cached import AsyncCachedFunction, CachedFunction
from stillroom.cache.core import CachedValue
from stillroom.cache.entry import Freshness
from stillroom.cache.explain import Explanation
from stillroom.cache.housekeeping import Housekeeping
from stillroom.cache.images import ImageInfo, Images
from stillroom.cache.probe import CacheProbe, TodoProbe
from stillroom.cache.reclaim import Progress
from stillroom.cache.sharded import ShardedBody, shard_keys
from stillroom.cache.tasks import AsyncTasks, Tasks, TasksBody

__all__ = [
    "AsyncCache",
    "AsyncCachedFunction",
    "AsyncTasks",
    "Cache",
    "CacheBody",
    "CacheParts",
    "CacheProbe",
    "CachedFunction",
    "CachedValue",
    "Explanation",
    "Freshness",
    "Housekeeping",
    "ImageInfo",
    "Images",
    "Progress",
    "ShardedBody",
    "Tasks",
    "TasksBody",
    "TodoProbe",
    "cache_on",
    "shard_keys",
]
