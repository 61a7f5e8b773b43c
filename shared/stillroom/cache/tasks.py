"""Order work from the workers instead of doing it in the request: `room.tasks`.

An order is written down in Redis (`orders`) before a task is sent, so that it is carried out whatever becomes of
the task. The same orders can be sent by name from any Celery client: cache/orders.py has their fields.
"""

from __future__ import annotations

from typing import Any, TypeVar

from stillroom.cache.cached import AsyncCachedFunction, CachedFunction
from stillroom.cache.invalidation import names_given
from stillroom.cache.ordering import Ordering
from stillroom.cache.orders import InvalidateKeys, InvalidatePattern, InvalidateTags, Load
from stillroom.errors import InvalidArgument, in_code
from stillroom.face import Service, awaiting, blocking
from stillroom.groups import groups
from stillroom.keys import pattern
from stillroom.misuse import YES_OR_NO, refuse_other
from stillroom.operation import Operation

T = TypeVar("T")
KEYS_IN_ONE, TAGS_IN_ONE = 1_000, 100


class TasksBody:
    """The operations. Each raises RedisUnavailable when Redis is away, DispatchFailed if 10,000 orders wait."""

    def __init__(self, orders: Ordering) -> None:
        self._orders = orders

    def invalidate_keys(self, *keys: str) -> Operation[None]:
        """Order that these keys are forgotten. See Cache.invalidate. Cost: a script for each 512 kB."""
        names_given("invalidate_keys", keys)
        self._orders.refuse_unfilled(*keys)
        yield from self._order(InvalidateKeys(keys=some) for some in groups(keys, KEYS_IN_ONE))

    def invalidate_tags(self, *tags: str, soft: bool = False) -> Operation[None]:
        """Order that the entries with one of these tags are invalidated. See Cache.invalidate_by_tag."""
        names_given("invalidate_tags", tags)
        refuse_other("soft", soft, bool, YES_OR_NO)
        self._orders.refuse_unfilled(*tags)
        some = groups(tags, TAGS_IN_ONE)
        yield from self._order(InvalidateTags(tags=bite, soft=soft) for bite in some)

    def invalidate_pattern(self, glob: str) -> Operation[None]:
        """Order that the entries whose key the glob matches are invalidated. See Cache.invalidate_by_pattern."""
        pattern(glob)
        self._orders.refuse_unfilled(glob)
        yield from self._order([InvalidatePattern(pattern=glob)])

    def load(self, function: Any, /, *args: Any, **kwargs: Any) -> Operation[None]:
        """Order that the value of this call of a cached function is loaded, whether there is one or not.

        A value that `keep` refuses is loaded and not stored, and the order is done.
        The arguments travel as JSON. An argument that has none, or that does not fit the function's signature,
        raises ValueError; a call that Python would refuse raises TypeError.
        """
        if not isinstance(function, CachedFunction | AsyncCachedFunction):
            raise InvalidArgument(
                f"a function made by room.cache.cached is loaded, not {in_code(function):.100}"
            )
        loader = function.loader
        yield from self._order(
            [Load(loader=loader.name, args=loader.ordered(function._first + args, kwargs))]
        )

    def _order(self, orders: Any) -> Operation[None]:
        if several := list(orders):
            yield from self._orders.order(*several)


class Tasks(Service):
    """Orders for workers, for threads and greenlets: `room.tasks`.

    Each is written down in Redis before the call returns, and done soon afterwards. Raises DispatchFailed where too
    much work waits already, and RedisUnavailable.
    """

    invalidate_keys = blocking(TasksBody.invalidate_keys)
    invalidate_tags = blocking(TasksBody.invalidate_tags)
    invalidate_pattern = blocking(TasksBody.invalidate_pattern)
    load = blocking(TasksBody.load)


class AsyncTasks(Service):
    """Orders for workers, for asyncio: `room.tasks`. See Tasks."""

    invalidate_keys = awaiting(TasksBody.invalidate_keys)
    invalidate_tags = awaiting(TasksBody.invalidate_tags)
    invalidate_pattern = awaiting(TasksBody.invalidate_pattern)
    load = awaiting(TasksBody.load)
