"""Cached functions: a loader in the place of the function it was made from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from stillroom.cache.calls import Asked
from stillroom.cache.gathering import gather, gather_async
from stillroom.cache.loaders import Loader
from stillroom.codec import MISS
from stillroom.errors import InvalidArgument, in_code
from stillroom.face import drop_our_frames
from stillroom.within import note_within

A = TypeVar("A")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")
Q = ParamSpec("Q")


class _BoundSignature:
    """The signature of a loader that is bound to an object: without `self`, for which FastAPI would ask the client.

    It is made when it is asked for, because each call of a method binds it. Of other loaders the function tells it.
    """

    def __get__(self, cached: Any, owner: Any = None) -> inspect.Signature:
        if cached is None or not cached._first:
            raise AttributeError("__signature__")
        found = inspect.signature(cached.loader.function)
        return found.replace(parameters=[*found.parameters.values()][len(cached._first) :])


UNCACHED = (
    "has a @….cached(…) that the app does not know, so each request calls it: put it below the route's decorator, "
    "which takes what it finds there"
)


class _Cached(Generic[P, T_co]):
    """A loader that answers from the cache. In a class it binds as a method does."""

    __signature__ = _BoundSignature()

    def __init__(self, loader: Loader, body: Any, driver: Any) -> None:
        function: Any = loader.function
        hidden = vars(type(self)).keys() | vars(_Cached).keys()  # `key`, `many` … stay ours
        own = getattr(function, "__dict__", {})
        vars(self).update({name: one for name, one in own.items() if name not in hidden})
        functools.update_wrapper(self, function, updated=())  # type: ignore[arg-type]  # an instance is fine
        self.__name__ = getattr(self, "__name__", loader.name)
        # Before 0.124 FastAPI looks here for what the annotations of a dependency mean.
        self.__globals__ = getattr(inspect.unwrap(function), "__globals__", {})
        self.loader = loader
        self._body = body
        self._copies = body.copies
        self._driver = driver
        self._first: tuple[Any, ...] = ()  # the object it is bound to
        note_within(function, self, UNCACHED)

    def key(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key of this call, as `get` and `invalidate` of the cache take it. Never awaited."""
        return self.loader.key(self.loader.values(self._first + args, kwargs))

    def _each_of(
        self, firsts: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[Asked]:
        """Return the calls for each of `firsts`. The other arguments are checked without any, too."""
        if isinstance(firsts, str | bytes) or not isinstance(firsts, Iterable):
            raise InvalidArgument(
                f"{self.__name__}.many({in_code(firsts):.100}): give a list of first arguments; for one call write "
                f"{self.__name__}({in_code(firsts):.100})"
            )
        calls = [Asked(self.loader, (*self._first, first, *args), kwargs) for first in firsts]
        if not calls:
            self.loader.values((*self._first, None, *args), kwargs)
        return calls

    def _bound_to(self, instance: Any) -> Any:
        if instance is None or isinstance(self.loader.function, staticmethod):
            return self
        bound = object.__new__(type(self))
        vars(bound).update(vars(self), _first=(instance,))
        return bound

    def __eq__(self, other: object) -> bool:
        """Compare two of one object as its bound methods are: each look at `shop.product` makes another one."""
        if not (self._first and isinstance(other, _Cached) and other._first):
            return self is other
        return self.loader is other.loader and self._first[0] is other._first[0]

    def __hash__(self) -> int:
        return hash((id(self.loader), id(self._first[0]))) if self._first else object.__hash__(self)

    def __reduce__(self) -> Any:
        """Pickle the loader by its name, as a function is."""
        if self._first:
            return getattr, (*self._first, self.__name__)
        return getattr(self, "__qualname__", self.__name__)

    def __repr__(self) -> str:
        return f"<cached {self.loader.name}: {self.loader.template!r}>"


def asked_of(body: Any, calls: Sequence[Any]) -> list[Asked]:
    """Return the calls that cached functions of this cache, and partials of them, stand for."""
    asked = []
    function: Any
    for call in calls:
        if isinstance(call, functools.partial):
            function, args, kwargs = call.func, call.args, call.keywords
        else:
            function, args, kwargs = call, (), {}
        if not isinstance(function, _Cached) or function._body is not body:
            for one in filter(inspect.iscoroutine, calls):
                one.close()  # nobody will await it
            raise _not_ours(call, function)
        # Past NamedTuple's own constructor, which is Python.
        asked.append(_asked(Asked, (function.loader, function._first + args, kwargs)))
    return asked


_asked = tuple.__new__


def _not_ours(call: Any, function: Any) -> InvalidArgument:
    if isinstance(function, _Cached):
        return InvalidArgument(f"gather({function!r}): it belongs to the cache of another room")
    return InvalidArgument(
        f"gather({in_code(call):.100}): give functions made by `cached`, or functools.partial(product, 7) for one "
        "with arguments"
    )


class CachedFunction(_Cached[P, T_co]):
    """A loader that `cached` has made. It is called like the function it stands for."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Return the cached value, loaded if it has to be. See Cache.get_or_set."""
        if self.loader.near is not None and not kwargs:
            kept: T_co = self._copies.of_call(self.loader, self._first + args)
            if kept is not MISS:
                return kept
        try:
            value: T_co = self._driver.run(self._body.call(self.loader, self._first + args, kwargs))
        except Exception as error:
            drop_our_frames(error)
            raise
        return value

    def many(
        self: CachedFunction[Concatenate[A, Q], T],
        firsts: Iterable[A],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> list[T]:
        """Return the values of the calls for each of these first arguments, in their order: `product.many([7, 8])`.

        The other arguments are the same in all of them. All are looked up in one round trip; a value that is not
        there is loaded as by a call, one after the other, so an error of the loader leaves the rest unloaded.
        Where the source can give many at once, `get_or_set_many` of the cache is for that.
        Raises InvalidArgument for one text, and what a call raises. Redis away: each is loaded, as by a call.
        """
        try:
            return gather(self._body, self._driver, self._each_of(firsts, args, kwargs))
        except Exception as error:
            drop_our_frames(error)
            raise

    def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> int:
        """Forget the value of this call. See Cache.invalidate."""
        try:
            count: int = self._driver.run(self._body.invalidate(self.key(*args, **kwargs)))
        except Exception as error:
            drop_our_frames(error)
            raise
        return count

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Self: ...
    @overload
    def __get__(
        self: CachedFunction[Concatenate[Any, Q], T], instance: object, owner: Any = None
    ) -> CachedFunction[Q, T]: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._bound_to(instance)


class AsyncCachedFunction(_Cached[P, T_co]):
    """Called like the function it stands for, and awaited. A plain function runs in a thread, so it may block."""

    def __init__(self, loader: Loader, body: Any, driver: Any) -> None:
        super().__init__(loader, body, driver)
        _mark_coroutine_function(self)

    async def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Return the cached value, loaded if it has to be. See Cache.get_or_set."""
        if self.loader.near is not None and not kwargs:
            kept: T_co = self._copies.of_call(self.loader, self._first + args)
            if kept is not MISS:
                return kept
        try:
            value: T_co = await self._driver.run(
                self._body.call(self.loader, self._first + args, kwargs)
            )
        except Exception as error:
            drop_our_frames(error)
            raise
        return value

    async def many(
        self: AsyncCachedFunction[Concatenate[A, Q], T],
        firsts: Iterable[A],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> list[T]:
        """Return the values of the calls for each of these first arguments, in order. See CachedFunction.many.

        What is not there is loaded ten at a time, or as many as `at_once` of the loader says. Once all have ended
        the first error is raised.
        """
        try:
            calls = self._each_of(firsts, args, kwargs)
            return await gather_async(self._body, self._driver, calls)
        except Exception as error:
            drop_our_frames(error)
            raise

    async def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> int:
        """Forget the value of this call. See Cache.invalidate."""
        try:
            count: int = await self._driver.run(self._body.invalidate(self.key(*args, **kwargs)))
        except Exception as error:
            drop_our_frames(error)
            raise
        return count

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Self: ...
    @overload
    def __get__(
        self: AsyncCachedFunction[Concatenate[Any, Q], T], instance: object, owner: Any = None
    ) -> AsyncCachedFunction[Q, T]: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._bound_to(instance)


def _mark_coroutine_function(cached: Any) -> None:
    """Make inspect.iscoroutinefunction answer as for the wrapped function."""
    if hasattr(inspect, "markcoroutinefunction"):  # from Python 3.12 on
        inspect.markcoroutinefunction(cached)
        return
    # Before that it looks for attributes that every function has.
    cached.__code__ = AsyncCachedFunction.__call__.__code__
    cached.__defaults__ = cached.__kwdefaults__ = None


class AsyncRegister(Protocol):
    """The decorator that `AsyncCache.cached(…)` returns. It takes a coroutine function or a plain one."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, T]], /
    ) -> AsyncCachedFunction[P, T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> AsyncCachedFunction[P, T]: ...
