"""What an app orders from the workers instead of doing it in the request: `room.tasks`.

An order is written down in Redis (`todo`) before a task is sent, so that it is carried out whatever becomes of the
task. The same orders can be sent by name from any Celery client: cache/orders.py has their fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from stillroom.cache.cache import AsyncCachedFunction, CachedFunction
from stillroom.cache.orders import InvalidateKeys, InvalidatePattern, InvalidateTags, Load
from stillroom.cache.reclaim import ReclaimBody
from stillroom.cache.sharded import ShardedBody
from stillroom.cache.warm import WarmBody
from stillroom.keys import pattern, sanitized
from stillroom.operation import AsyncDriver, Driver, Operation, awaiting, blocking

T = TypeVar("T")
KEYS_IN_ONE, TAGS_IN_ONE = 1_000, 100


class TasksBody:
    """The operations. Each raises RedisUnavailable when Redis is away, DispatchFailed if 10,000 orders wait."""

    def __init__(self, cache: ReclaimBody | ShardedBody) -> None:
        self._cache = cache

    def invalidate_keys(self, *keys: str) -> Operation[None]:
        """Have these keys forgotten. See Cache.invalidate. Source: one script."""
        _check(keys)
        yield from self._order(InvalidateKeys(keys=some) for some in _bites(keys, KEYS_IN_ONE))

    def invalidate_tags(self, *tags: str, soft: bool = False) -> Operation[None]:
        """Have the entries with one of these tags killed, or with `soft` refreshed. See Cache.invalidate_by_tag."""
        _check(tags)
        some = _bites(tags, TAGS_IN_ONE)
        yield from self._order(InvalidateTags(tags=bite, soft=soft) for bite in some)

    def invalidate_pattern(self, glob: str) -> Operation[None]:
        """Have the entries killed whose key the glob matches. See Cache.invalidate_by_pattern."""
        pattern(glob)
        yield from self._order([InvalidatePattern(pattern=glob)])

    def load(self, function: Any, *args: Any, **kwargs: Any) -> Operation[None]:
        """Have the value of this call of a cached function loaded, whether one is there or not.

        The arguments travel as JSON: what has none raises ValueError.
        """
        if not isinstance(function, CachedFunction | AsyncCachedFunction):
            raise TypeError(f"a function made by room.cache.cached is loaded, not {function!r}")
        values = function.loader.values(args, kwargs)
        fields = function.loader.json_values(values)
        yield from self._order([Load(loader=function.loader.name, args=fields)])

    def warm(self) -> Operation[dict[str, int]]:
        """Order what loaders with `warm_every` are due to load. Beat asks for it. See WarmBody.warm."""
        return WarmBody(self._cache).warm()

    def _order(self, orders: Any) -> Operation[None]:
        if several := list(orders):
            yield from self._cache.order(*several)


class Tasks:
    """`room.tasks` for threads and greenlets."""

    def __init__(self, body: TasksBody, driver: Driver) -> None:
        self._body = body
        self._driver = driver

    invalidate_keys = blocking(TasksBody.invalidate_keys)
    invalidate_tags = blocking(TasksBody.invalidate_tags)
    invalidate_pattern = blocking(TasksBody.invalidate_pattern)
    load = blocking(TasksBody.load)
    warm = blocking(TasksBody.warm)


class AsyncTasks:
    """`room.tasks` for asyncio."""

    def __init__(self, body: TasksBody, driver: AsyncDriver) -> None:
        self._body = body
        self._driver = driver

    invalidate_keys = awaiting(TasksBody.invalidate_keys)
    invalidate_tags = awaiting(TasksBody.invalidate_tags)
    invalidate_pattern = awaiting(TasksBody.invalidate_pattern)
    load = awaiting(TasksBody.load)
    warm = awaiting(TasksBody.warm)


def _check(names: Sequence[str]) -> None:
    for name in names:
        sanitized(name)


def _bites(names: Sequence[T], size: int) -> list[list[T]]:
    return [list(names[start : start + size]) for start in range(0, len(names), size)]
