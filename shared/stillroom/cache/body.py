"""All operations of the cache. cache.py gives them their two faces, and sharded.py spreads them over shards."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TypeVar

from stillroom.cache.calls import Calls
from stillroom.cache.changes import Changes
from stillroom.cache.explain import Explainer
from stillroom.cache.invalidation import Invalidations
from stillroom.errors import RedisUnavailable
from stillroom.operation import Operation

T = TypeVar("T")


class CacheBody(Invalidations, Changes, Calls, Explainer):
    """A cache, or one of its shards. A driver runs the operations."""

    def deliver_aside(self) -> None:
        """Deliver what waited for Redis: deferred invalidations, and leases that others wait for."""
        super().deliver_aside()
        self._free_aside()

    def deliver_last(self) -> None:
        """Deliver that at the end of the room: no later write of this process would."""
        super().deliver_last()
        self._free_aside()

    def _free_aside(self) -> None:
        if self._leases.owed:
            with contextlib.suppress(RedisUnavailable):  # the next write tries again
                self._run_aside(self._leases.free_owed())

    @property
    def shards(self) -> Sequence[CacheBody]:
        """Return this body itself: see ShardedBody."""
        return [self]

    def on_first(self, operation: Operation[T]) -> Operation[T]:
        """Run an operation that one shard is to do for all of them."""
        return operation

    def everywhere(self, operations: Sequence[Operation[T]]) -> Operation[list[T]]:
        """Run one operation on each of the shards, of which there is one."""
        (operation,) = operations
        return [(yield from operation)]
