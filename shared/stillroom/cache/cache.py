"""The cache's two faces: blocking and awaiting. The logic of both is body.py."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, Unpack, overload

from stillroom.cache.body import CacheBody
from stillroom.cache.bulk import BulkBody
from stillroom.cache.change import ChangeBody
from stillroom.cache.images import ImageBody
from stillroom.cache.loaders import Loader, LoaderOptions, Loaders
from stillroom.cache.reclaim import ReclaimBody
from stillroom.cache.sharded import ShardedBody
from stillroom.face import Face, awaiting, blocking
from stillroom.operation import AsyncDriver, Driver

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")


class _Cached(Generic[P, T_co]):
    """A loader that answers from the cache."""

    def __init__(self, loader: Loader, body: ImageBody | ShardedBody, driver: Any) -> None:
        self.loader = loader
        self._body = body
        self._driver = driver
        functools.update_wrapper(self, loader.function)  # type: ignore[arg-type]  # an instance is fine

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The key of this call, as `get` and `invalidate` of the cache take it."""
        return self.loader.key(self.loader.values(args, kwargs))


class CachedFunction(_Cached[P, T_co]):
    """Called like the function it stands for."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """The cached value, loaded if it has to be. See Cache.get_or_set."""
        value: T_co = self._driver.run(self._body.call(self.loader, args, kwargs))
        return value

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> int:
        """Forget the value of this call. See Cache.invalidate."""
        count: int = self._driver.run(self._body.invalidate(self.key(*args, **kwargs)))
        return count


class AsyncCachedFunction(_Cached[P, T_co]):
    """The same, awaited. A plain function runs in a thread, so that it may block."""

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """The cached value, loaded if it has to be. See Cache.get_or_set."""
        value: T_co = await self._driver.run(self._body.call(self.loader, args, kwargs))
        return value

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> int:
        """Forget the value of this call. See Cache.invalidate."""
        count: int = await self._driver.run(self._body.invalidate(self.key(*args, **kwargs)))
        return count


class AsyncRegister(Protocol):
    """What `AsyncCache.cached(…)` returns: takes a coroutine function, or a plain one."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, T]], /
    ) -> AsyncCachedFunction[P, T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> AsyncCachedFunction[P, T]: ...


class Cache(Face):
    """The cache for threads and greenlets: `room.cache`."""

    def __init__(self, body: ImageBody | ShardedBody, driver: Driver) -> None:
        self._body = body
        self._driver = driver

    get = blocking(CacheBody.get)
    get_entry = blocking(CacheBody.get_entry)
    get_or_set = blocking(CacheBody.get_or_set)
    get_many = blocking(BulkBody.get_many)
    get_or_set_many = blocking(BulkBody.get_or_set_many)
    set = blocking(CacheBody.set)
    set_many = blocking(BulkBody.set_many)
    add = blocking(ChangeBody.add)
    incr = blocking(ChangeBody.incr)
    touch = blocking(ChangeBody.touch)
    invalidate = blocking(CacheBody.invalidate)
    invalidate_many = blocking(BulkBody.invalidate_many)
    invalidate_by_tag = blocking(CacheBody.invalidate_by_tag)
    invalidate_by_pattern = blocking(CacheBody.invalidate_by_pattern)
    clear = blocking(CacheBody.clear)
    get_image_info = blocking(ImageBody.get_image_info)
    invalidate_image = blocking(ImageBody.invalidate_image)
    refresh = blocking(CacheBody.refresh)
    load = blocking(CacheBody.load)
    reclaim = blocking(ReclaimBody.reclaim)
    pending = blocking(ReclaimBody.pending)
    trim_marks = blocking(CacheBody.trim_marks)
    trim_indexes = blocking(ReclaimBody.trim_indexes)
    flush_stats = blocking(CacheBody.flush_stats)

    @property
    def deferred(self) -> int:
        """How many deferred invalidations wait in this process. See `invalidate`."""
        return self._body.deferred

    @property
    def loaders(self) -> Loaders:
        """The registered loaders, by name."""
        return self._body.loaders

    def cached(
        self, key: str, **options: Unpack[LoaderOptions]
    ) -> Callable[[Callable[P, T]], CachedFunction[P, T]]:
        """Register a function as a loader, and answer its calls from the cache.

        `key` is a template of its parameters, `product:{id}`. The options are those of LoaderOptions.
        """

        def register(function: Callable[P, T]) -> CachedFunction[P, T]:
            if inspect.iscoroutinefunction(function):
                raise TypeError(f"{function.__name__} is a coroutine function: use AsyncStillroom")
            return CachedFunction(
                self._body.loader(function, key, options), self._body, self._driver
            )

        return register


class AsyncCache(Face):
    """The cache for asyncio: `room.cache`. The same names, awaited."""

    def __init__(self, body: ImageBody | ShardedBody, driver: AsyncDriver) -> None:
        self._body = body
        self._driver = driver

    get = awaiting(CacheBody.get)
    get_entry = awaiting(CacheBody.get_entry)
    get_or_set = awaiting(CacheBody.get_or_set)
    get_many = awaiting(BulkBody.get_many)
    get_or_set_many = awaiting(BulkBody.get_or_set_many)
    set = awaiting(CacheBody.set)
    set_many = awaiting(BulkBody.set_many)
    add = awaiting(ChangeBody.add)
    incr = awaiting(ChangeBody.incr)
    touch = awaiting(ChangeBody.touch)
    invalidate = awaiting(CacheBody.invalidate)
    invalidate_many = awaiting(BulkBody.invalidate_many)
    invalidate_by_tag = awaiting(CacheBody.invalidate_by_tag)
    invalidate_by_pattern = awaiting(CacheBody.invalidate_by_pattern)
    clear = awaiting(CacheBody.clear)
    get_image_info = awaiting(ImageBody.get_image_info)
    invalidate_image = awaiting(ImageBody.invalidate_image)
    refresh = awaiting(CacheBody.refresh)
    load = awaiting(CacheBody.load)
    reclaim = awaiting(ReclaimBody.reclaim)
    pending = awaiting(ReclaimBody.pending)
    trim_marks = awaiting(CacheBody.trim_marks)
    trim_indexes = awaiting(ReclaimBody.trim_indexes)
    flush_stats = awaiting(CacheBody.flush_stats)

    @property
    def deferred(self) -> int:
        """How many deferred invalidations wait in this process. See `invalidate`."""
        return self._body.deferred

    @property
    def loaders(self) -> Loaders:
        """The registered loaders, by name."""
        return self._body.loaders

    def cached(self, key: str, **options: Unpack[LoaderOptions]) -> AsyncRegister:
        """Register a coroutine function, or a plain one, as a loader, and answer its calls from the cache.

        `key` is a template of its parameters, `product:{id}`. The options are those of LoaderOptions.
        """

        def register(function: Any) -> Any:
            loader = self._body.loader(function, key, options)
            return AsyncCachedFunction(loader, self._body, self._driver)

        return register
