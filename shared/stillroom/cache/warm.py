"""Warm-ups: values that are loaded again at set times, asked for or not. Workers do it; loaders say when and which.

    @room.cache.cached("product:{id}", ttl=3600, warm_every=600, warm_with=hottest_products)

What is to be loaded is written down as orders (`orders`), so that it is done whatever becomes of the worker that
wrote it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial, wraps
from inspect import isgeneratorfunction
from typing import Any, NamedTuple

from stillroom.background import aside
from stillroom.cache.around import OnlyAsync
from stillroom.cache.ordering import Ordering
from stillroom.cache.orders import Load
from stillroom.cache.terms import LEASE_LIMIT
from stillroom.durations import Duration, seconds_of
from stillroom.errors import DispatchFailed, InvalidArgument, RedisUnavailable, in_code
from stillroom.misuse import refuse_unfit
from stillroom.operation import Call, Freeing, Operation
from stillroom.scripts import release, warm_claim
from stillroom.shown import repr_of

WARM_TASK = "stillroom.warm"
LEAST_S, MOST_S = 10.0, 7 * 86_400.0
AT_ONCE = 1_000  # orders written by one script


class Warm(NamedTuple):
    """Tell how often a loader's values are loaded again, and for which arguments."""

    every: float
    given: Any  # an iterable of arguments, or a function that returns one


def warm_of(every: Duration | None, given: Any) -> Warm | None:
    """Read the options `warm_every` and `warm_with`. Raises InvalidArgument."""
    if every is None:
        if given is not None:
            raise InvalidArgument(
                "warm_with needs warm_every: how often, in seconds or as a timedelta"
            )
        return None
    seconds = seconds_of("warm_every", every, least=LEAST_S, most=MOST_S)
    if callable(given):
        refuse_unfit("warm_with", given)
    return Warm(seconds, given if callable(given) else listed([{}] if given is None else given))


def listed(given: Any) -> list[Any]:
    """Return `warm_with` as a list, which can be read in each period. Raises InvalidArgument for one call's."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise InvalidArgument(
            f"warm_with={in_code(given):.100}: a list of dicts, tuples or single arguments, or a function that "
            f"returns one; for one call write [{in_code(given):.100}]"
        )
    return list(given)


def arguments_of(one: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return one of `warm_with`: a dict of arguments by name, a tuple of them, or the only one."""
    if isinstance(one, Mapping):
        return (), one
    return (one, {}) if isinstance(one, tuple) else ((one,), {})


class Warming:
    """The operation that warms values up. `cache` is the whole cache, of any number of shards."""

    def __init__(self, cache: Any, orders: Ordering) -> None:
        self._cache = cache
        self._orders = orders

    def warm(self) -> Operation[dict[str, int]]:
        """Order what is due to be loaded. Returns {"loaders": that were due, "values": ordered}.

        Safe in several workers at once: each period of a loader is claimed by one of them, and until that one has
        written its orders nobody begins another. What a killed worker had claimed is claimed again. An error of a
        `warm_with` function is logged, and its loader is due again in the next period.
        Redis away: RedisUnavailable.
        """
        loaders = [self._cache.loaders[name] for name in self._cache.loaders.names()]
        report = {"loaders": 0, "values": 0}
        for loader in loaders:
            claim = None if loader.warm is None else (yield from self._claim(loader))
            if claim is not None:
                report["loaders"] += 1
                report["values"] += yield from self._order_claimed(loader, claim)
        return report

    def _claim(self, loader: Any) -> Operation[bytes | None]:
        """Claim this period of the loader. Return the claim, or None where another worker has it.

        Its list may take as long to make as a load: then another worker may begin, since this one may have ended.
        """
        takes_ms = int(self._cache.shards[0].terms.longest(LEASE_LIMIT) * 1_000)
        return (yield from self._keep_claim(loader, secrets.token_hex(8), takes_ms))

    def _keep_claim(self, loader: Any, token: str, takes_ms: int) -> Operation[bytes | None]:
        def claiming() -> Operation[bytes | None]:
            given = int(loader.warm.every * 1_000), token, takes_ms
            (claim,) = yield [warm_claim([self._key(loader)], *given)]
            return claim  # type: ignore[no-any-return]

        return (yield from self._cache.on_first(claiming()))  # type: ignore[no-any-return]

    def _order_claimed(self, loader: Any, claim: bytes) -> Operation[int]:
        """Order the values. Where the state's Redis is away the claim is given back, and the period is not lost."""
        count = 0
        try:
            orders = yield from self._orders_of(loader)
            for start in range(0, len(orders), AT_ONCE):
                some = orders[start : start + AT_ONCE]
                yield from self._orders.order(*some)
                count += len(some)
        except RedisUnavailable:
            yield from self._give_back(loader, claim)
            raise
        except DispatchFailed as error:
            self._say(loader, error)
        yield from self._keep_claim(loader, claim.split()[1].decode(), 0)
        return count

    def _orders_of(self, loader: Any) -> Operation[list[Load]]:
        try:
            given: Any = loader.warm.given
            found = (yield from _given_by(loader, given)) if callable(given) else given
        except Exception as error:
            self._say(loader, error)
            return []
        orders = [self._order_of(loader, one) for one in found]
        return [order for order in orders if order is not None]

    def _order_of(self, loader: Any, one: Any) -> Load | None:
        """Return the order, or None for arguments that no worker could load: the others are ordered."""
        try:
            return order_of(loader, one)
        except Exception as error:
            self._say(loader, error)
            return None

    def _give_back(self, loader: Any, claim: bytes) -> Operation[None]:
        def releasing() -> Operation[None]:
            yield Freeing([release([self._key(loader)], claim)])

        with suppress(RedisUnavailable):  # then the next period is warmed
            yield from self._cache.on_first(releasing())

    def _key(self, loader: Any) -> bytes:
        key: bytes = self._cache.shards[0].keys.warm(loader.name.encode())
        return key

    def _say(self, loader: Any, error: Exception) -> None:
        self._cache.stats.say("a warm-up failed", loader.name, f"{loader.name}: {repr_of(error)}")


def _given_by(loader: Any, function: Callable[[], Any]) -> Operation[list[Any]]:
    """Call a `warm_with` function inside the contexts of its loader, and make the list there.

    A blocking one is called in a thread where such a context has to be awaited.
    """
    listing = _listing(function)
    try:
        found = yield Call(loader.within(listing))
    except OnlyAsync:
        found = yield Call(loader.within(partial(aside, listing)))
    return listed(found)


def _listing(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return the function, which returns a list where it was a generator function."""
    if not isgeneratorfunction(function):
        return function
    return wraps(function)(lambda: list(function()))


def order_of(loader: Any, one: Any) -> Load:
    """Return the order to load for one of `warm_with`. Raises InvalidArgument for arguments that do not fit."""
    try:
        return Load(loader=loader.name, args=loader.ordered(*arguments_of(one)))
    except ValueError as error:
        raise InvalidArgument(f"warm_with {in_code(one):.100}: {error}") from None


def check(loader: Any, given: Any) -> None:
    """Refuse arguments that no worker could load, where they are written down. Raises InvalidArgument."""
    if not callable(given):
        for one in given:
            order_of(loader, one)
