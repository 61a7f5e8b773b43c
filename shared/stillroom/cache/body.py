"""All operations of the cache. cache.py gives them their two faces, and sharded.py spreads them over shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from stillroom.cache.calls import Calls
from stillroom.cache.changes import Changes
from stillroom.cache.explain import Explainer
from stillroom.cache.invalidation import Invalidations
from stillroom.operation import Operation

T = TypeVar("T")


class CacheBody(Invalidations, Changes, Calls, Explainer):
    """A cache, or one of its shards. A driver runs the operations."""

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
