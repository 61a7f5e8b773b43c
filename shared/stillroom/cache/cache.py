"""The cache's two faces: blocking and awaiting. The operations of both are body.py's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar, overload

from stillroom.cache.body import CacheBody
from stillroom.cache.cached import AsyncCachedFunction, AsyncRegister, CachedFunction, asked_of
from stillroom.cache.declared import is_coroutine_function
from stillroom.cache.gathering import gather, gather_async
from stillroom.cache.images import Images
from stillroom.cache.keeping import TtlOf
from stillroom.cache.loaders import Loaders, TagSpec
from stillroom.cache.sharded import ShardedBody
from stillroom.durations import Duration
from stillroom.errors import InvalidArgument
from stillroom.face import Part, Service, awaiting, blocking, drop_our_frames
from stillroom.misuse import explained, name_of

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
P = ParamSpec("P")

Call: TypeAlias = Callable[[], T]  # a cached function, or a partial of one
Awaited: TypeAlias = Callable[[], Awaitable[T]]

IMAGES = Part("_images")


class _Face(Service):
    """The part of both faces that runs no operation."""

    _body: CacheBody | ShardedBody

    def __init__(self, body: CacheBody | ShardedBody, images: Images, driver: Any) -> None:
        super().__init__(body, driver)
        self._images = Service(images, driver)

    @property
    def deferred(self) -> int:
        """Return the number of deferred invalidations that wait in this process. See `invalidate`."""
        return self._body.deferred

    @property
    def loaders(self) -> Loaders:
        """Return the registered loaders, by name."""
        return self._body.loaders


class Cache(_Face):
    """The cache for threads and greenlets: `room.cache`."""

    get = blocking(CacheBody.get)
    get_entry = blocking(CacheBody.get_entry)
    get_or_set = blocking(CacheBody.get_or_set)
    get_many = blocking(CacheBody.get_many)
    get_or_set_many = blocking(CacheBody.get_or_set_many)
    set = blocking(CacheBody.set)
    set_many = blocking(CacheBody.set_many)
    add = blocking(CacheBody.add)
    incr = blocking(CacheBody.incr)
    touch = blocking(CacheBody.touch)
    invalidate = blocking(CacheBody.invalidate)
    invalidate_many = blocking(CacheBody.invalidate_many)
    invalidate_by_tag = blocking(CacheBody.invalidate_by_tag)
    invalidate_by_pattern = blocking(CacheBody.invalidate_by_pattern)
    clear = blocking(CacheBody.clear)
    get_image_info = IMAGES.blocking(Images.get_image_info)
    invalidate_image = IMAGES.blocking(Images.invalidate_image)

    @overload
    def gather(self, a: Call[A], b: Call[B], /) -> tuple[A, B]: ...
    @overload
    def gather(self, a: Call[A], b: Call[B], c: Call[C], /) -> tuple[A, B, C]: ...
    @overload
    def gather(self, a: Call[A], b: Call[B], c: Call[C], d: Call[D], /) -> tuple[A, B, C, D]: ...
    @overload
    def gather(self, *calls: Call[T]) -> tuple[T, ...]: ...
    def gather(self, *calls: Callable[[], Any]) -> tuple[Any, ...]:
        """Return the values of several calls of cached functions, in their order, looked up in one round trip.

        `rates, one, two = room.cache.gather(rates, partial(product, 7), partial(product, 8))`: each is a function
        made by `cached`, or a functools.partial of one, which holds its arguments. Each is answered as that call
        by itself would be. What is not there is loaded one after the other, so an error of a loader leaves the
        rest unloaded. Raises InvalidArgument for anything else, and what the calls raise. Redis away: each is
        loaded, as by a call.
        """
        try:
            return tuple(gather(self._body, self._driver, asked_of(self._body, calls)))
        except Exception as error:
            drop_our_frames(error)
            raise

    @explained
    def cached(
        self,
        key: str,
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
        name: str | None = None,
        lease: Duration | None = None,
        ignore: Sequence[str] = (),
        at_once: int | None = None,
        version: str | int | None = None,
        memo: bool = False,
        near: bool | Duration | None = None,
        warm_every: Duration | None = None,
        warm_with: Any = None,
    ) -> Callable[[Callable[P, T]], CachedFunction[P, T]]:
        """Register a function as a loader, and answer its calls from the cache.

        `@room.cache.cached("product:{id}")`: the key is a template of the function's parameters. Each parameter is
        in the template or in `ignore`. Times are seconds or timedeltas; their defaults are settings.

        - `ttl`: how long a value is fresh. It may be a function of the value that returns a time, or None for the
          default.
        - `swr`: how long after that a value is served stale while a worker loads it again.
        - `tags`: texts, templates that are filled as f-strings are, or functions of the value that return texts.
        - `type`: the type of the values. Default: the function's return annotation.
        - `keep`: a function of the value. A value for which it returns false is not kept, or only for
          `negative_ttl`. Without `keep`, `negative_ttl` is how long None is kept. Where a refresh gives a value
          that is not kept, the stale one is served on, and the next refresh waits as after a failed one.
        - `ignore`: parameters that are not in the key. Calls that differ only in these share a value.
        - `name`: what messages to workers call the loader. Default: the function's name. Keep it stable.
        - `lease`: the longest load. The value of a longer one is returned and not stored.
        - `at_once`: how many loads run at the same time in all processes (for each shard of the cache). As many
          more wait for up to a second; all others raise LoadShed, which is a 503. A load that another load of this
          loader waits for needs no place of its own.
        - `version`: while two releases of an app run, values of different versions are kept apart. Change it where
          values change and their type does not: values of different types are kept apart anyway.
        - `memo`: within `room.request()` each key is looked up once.
        - `near`: this process keeps values. True: within `room.request()` one look at the clock proves all of them,
          and no read shows what was invalidated before the request began, or by this process. A time, up to a
          minute: reads outside of a request are served, too, with nothing that was invalidated longer ago. A value
          that cannot be changed (a scalar, a tuple, a frozen model) is the same object each time.
        - `warm_every`: how often a worker loads the values, asked for or not; 10 seconds or more.
        - `warm_with`: the arguments to load: dicts, tuples or single values, or a function that returns these.

        Raises InvalidArgument, InvalidKey.
        """
        _check_key(key)

        def register(function: Callable[P, T]) -> CachedFunction[P, T]:
            if is_coroutine_function(function):
                raise InvalidArgument(
                    f"{name_of(function)} is a coroutine function: use AsyncStillroom"
                )
            loader = self._body.loader(
                *(function, key),
                ttl=ttl,
                swr=swr,
                tags=tags,
                type=type,
                keep=keep,
                negative_ttl=negative_ttl,
                name=name,
                lease=lease,
                ignore=ignore,
                at_once=at_once,
                version=version,
                memo=memo,
                near=near,
                warm_every=warm_every,
                warm_with=warm_with,
            )
            return CachedFunction(loader, self._body, self._driver)

        return register


class AsyncCache(_Face):
    """The cache for asyncio: `room.cache`. The same names, awaited."""

    get = awaiting(CacheBody.get)
    get_entry = awaiting(CacheBody.get_entry)
    get_or_set = awaiting(CacheBody.get_or_set)
    get_many = awaiting(CacheBody.get_many)
    get_or_set_many = awaiting(CacheBody.get_or_set_many)
    set = awaiting(CacheBody.set)
    set_many = awaiting(CacheBody.set_many)
    add = awaiting(CacheBody.add)
    incr = awaiting(CacheBody.incr)
    touch = awaiting(CacheBody.touch)
    invalidate = awaiting(CacheBody.invalidate)
    invalidate_many = awaiting(CacheBody.invalidate_many)
    invalidate_by_tag = awaiting(CacheBody.invalidate_by_tag)
    invalidate_by_pattern = awaiting(CacheBody.invalidate_by_pattern)
    clear = awaiting(CacheBody.clear)
    get_image_info = IMAGES.awaiting(Images.get_image_info)
    invalidate_image = IMAGES.awaiting(Images.invalidate_image)

    @overload
    async def gather(self, a: Awaited[A], b: Awaited[B], /) -> tuple[A, B]: ...
    @overload
    async def gather(self, a: Awaited[A], b: Awaited[B], c: Awaited[C], /) -> tuple[A, B, C]: ...
    @overload
    async def gather(
        self, a: Awaited[A], b: Awaited[B], c: Awaited[C], d: Awaited[D], /
    ) -> tuple[A, B, C, D]: ...
    @overload
    async def gather(self, *calls: Awaited[T]) -> tuple[T, ...]: ...
    async def gather(self, *calls: Callable[[], Any]) -> tuple[Any, ...]:
        """Return the values of several calls of cached functions, looked up in one round trip. See Cache.gather.

        What is not there is loaded side by side: ten calls of one loader at a time, or as many as its `at_once`
        says. Once all have ended the first error is raised.
        """
        try:
            calls_of_ours = asked_of(self._body, calls)
            return tuple(await gather_async(self._body, self._driver, calls_of_ours))
        except Exception as error:
            drop_our_frames(error)
            raise

    @explained
    def cached(
        self,
        key: str,
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
        name: str | None = None,
        lease: Duration | None = None,
        ignore: Sequence[str] = (),
        at_once: int | None = None,
        version: str | int | None = None,
        memo: bool = False,
        near: bool | Duration | None = None,
        warm_every: Duration | None = None,
        warm_with: Any = None,
    ) -> AsyncRegister:
        """Register a coroutine function, or a plain one, as a loader, and answer its calls from the cache.

        See Cache.cached. A plain function runs in a thread, so it may block.
        """
        _check_key(key)

        def register(function: Any) -> Any:
            loader = self._body.loader(
                *(function, key),
                ttl=ttl,
                swr=swr,
                tags=tags,
                type=type,
                keep=keep,
                negative_ttl=negative_ttl,
                name=name,
                lease=lease,
                ignore=ignore,
                at_once=at_once,
                version=version,
                memo=memo,
                near=near,
                warm_every=warm_every,
                warm_with=warm_with,
            )
            return AsyncCachedFunction(loader, self._body, self._driver)

        return register


def _check_key(key: object) -> None:
    if callable(key):
        name = name_of(key)
        raise InvalidArgument(f'write @….cache.cached("{name}:{{…}}") above {name}, with its key')
