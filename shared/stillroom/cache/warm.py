"""Warm-ups: values that are loaded again at set times, asked for or not. Workers do it; loaders say when and which.

    @room.cache.cached("product:{id}", ttl=3600, warm_every=600, warm_with=hottest_products)

What is to be loaded is written down as orders (`todo`), so that it is done whatever becomes of the worker that
wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from stillroom.cache.ordering import Ordering
from stillroom.cache.orders import Load
from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument, RedisUnavailable
from stillroom.operation import Call, Operation
from stillroom.scripts import warm_claim

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
    return Warm(seconds, [{}] if given is None else given)


def arguments_of(one: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return one of `warm_with`: a dict of arguments by name, a tuple of them, or the only one."""
    if isinstance(one, Mapping):
        return (), one
    return (one, {}) if isinstance(one, tuple) else ((one,), {})


class Warming:
    """The operation. `cache` is the whole cache, of one shard or several; a driver of it runs this."""

    def __init__(self, cache: Any, orders: Ordering) -> None:
        self._cache = cache
        self._orders = orders

    def warm(self) -> Operation[dict[str, int]]:
        """Order what is due to be loaded. Returns {"loaders": that were due, "values": ordered}.

        Safe in several workers at once: each period of a loader is claimed by one of them. An error of a
        `warm_with` function is logged, and its loader is due again in the next period.
        Redis away: RedisUnavailable.
        """
        loaders = [self._cache.loaders[name] for name in self._cache.loaders.names()]
        report = {"loaders": 0, "values": 0}
        for loader in loaders:
            if loader.warm is not None and (yield from self._claim(loader)):
                report["loaders"] += 1
                report["values"] += yield from self._order(loader)
        return report

    def _claim(self, loader: Any) -> Operation[bool]:
        first = self._cache.shards[0]
        key = first.keys.warm(loader.name.encode())

        def claiming() -> Operation[bool]:
            (claimed,) = yield [warm_claim([key], int(loader.warm.every * 1_000))]
            return bool(claimed)

        return (yield from self._cache.on_first(claiming()))  # type: ignore[no-any-return]

    def _order(self, loader: Any) -> Operation[int]:
        count = 0
        try:
            given: Any = loader.warm.given
            found: Iterable[Any] = (yield Call(loader.within(given))) if callable(given) else given
            orders = [_order_of(loader, one) for one in found]
            for start in range(0, len(orders), AT_ONCE):
                some = orders[start : start + AT_ONCE]
                yield from self._orders.order(*some)
                count += len(some)
        except RedisUnavailable:
            raise
        except Exception as error:
            self._cache.stats.say("a warm-up failed", loader.name, f"{loader.name}: {error!r}")
        return count


def _order_of(loader: Any, one: Any) -> Load:
    return Load(loader=loader.name, args=loader.ordered(*arguments_of(one)))


def check(ordered: Callable[..., Any], given: Any) -> None:
    """Refuse arguments that do not fit, where they are written down. Raises TypeError, ValueError."""
    if not callable(given):
        for one in given:
            ordered(*arguments_of(one))
