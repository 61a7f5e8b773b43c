"""Saying that values are no longer true: to Redis, or, where it is away and that may wait, to an outbox."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stillroom.agreed import Agreed, Rule
from stillroom.cache.outbox import EVERYTHING, Outbox
from stillroom.dispatch import RECLAIM_TASK, Dispatch
from stillroom.errors import FINAL, RedisUnavailable
from stillroom.keys import Keys, pattern, sanitized
from stillroom.operation import STATE, On, Operation
from stillroom.scripts import clear, mark
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Command

log = logging.getLogger("stillroom")

DELIVERED_AT_ONCE = 500  # deferred invalidations in one batch
MARKED_AT_ONCE = 500  # by one script: others wait while it runs
SHARDS, LEASE_LIMIT, LIFE_LIMIT = "shards", "lease_limit", "life_limit"
SAME = (SHARDS,)  # another value is another cache


class InvalidationBody:
    """The operations. A driver runs them."""

    def __init__(
        self, settings: Settings, keys: Keys, dispatch: Dispatch, stats: Stats, agreed: Agreed
    ) -> None:
        self.settings = settings
        self.dispatch = dispatch
        self.stats = stats
        # Runs an operation where none is running: a dispatcher's thread, a prober's, at exit.
        self.run_aside: Callable[[Operation[Any]], Any] | None = None
        self.whole: Any = self  # the cache, of which this may be one shard
        self._keys = keys
        self._agreed = agreed
        self._outbox = Outbox(settings.outbox_limit)
        self.changes = 0  # how often this process has changed something: see cache/memo.py

    def invalidate(self, *keys: str, defer: bool = False) -> Operation[int]:
        """Forget these keys, and any load of them that is under way. Returns how many held a value.

        Source: UNLINK of entries, DEL of leases. Redis away: RedisUnavailable; nothing is promised then.

        With `defer=True` it is kept in this process instead (0 is returned) and delivered before it trusts another
        read: as soon as Redis answers, with the next call, or when the room is closed or the process ends.
        Until then other processes may serve the old value; if Redis is still away when this one ends, an error is
        logged and they will until it dies. The last `outbox_limit` names are kept; one more is a `clear()`.
        """
        names = [sanitized(key) for key in keys]
        if not names:
            return 0
        replies = yield from self._invalidating([b"k:" + name for name in names], defer)
        return int(replies[-1]) if replies else 0

    def invalidate_by_tag(
        self, *tags: str, soft: bool = False, defer: bool = False
    ) -> Operation[None]:
        """Kill every entry that carries one of these tags, also those whose load is under way. O(number of tags).

        True for every reader when it returns. `soft=True`: they are served stale and refreshed instead.
        Redis away: RedisUnavailable; nothing is promised then. `defer`: see `invalidate`.
        """
        if not tags:
            return
        kind = b"s:" if soft else b"t:"
        yield from self._invalidating([kind + sanitized(tag) for tag in tags], defer)
        self._wake()

    def invalidate_by_pattern(self, glob: str, *, defer: bool = False) -> Operation[None]:
        """Kill every entry whose key the glob matches, also those whose load is under way. O(1).

        Globs mean exactly what Redis' MATCH means: `*`, `?`, `[a-z]`, `[^a]`, `\\x`. True for every reader when it
        returns. Until a worker has swept, each read of an older entry tries each pattern: a tag is cheaper.
        Redis away: RedisUnavailable; nothing is promised then. `defer`: see `invalidate`.
        """
        yield from self._invalidating([b"p:" + pattern(glob)], defer)
        self._wake()

    def clear(self, *, defer: bool = False) -> Operation[None]:
        """Kill every entry of the namespace: a new epoch begins. O(number of marks).

        True for every reader when it returns. Redis away: RedisUnavailable; nothing is promised then.
        `defer`: see `invalidate`.
        """
        yield from self._invalidating([EVERYTHING], defer)
        self._wake()

    # Delivering what was deferred

    def deliver(self) -> Operation[int]:
        """Tell Redis what was deferred. → how many names. Redis away: RedisUnavailable; what is left waits on."""
        count = 0
        yield from self.agree()
        while names := self._outbox.first(DELIVERED_AT_ONCE):
            yield list(self._invalidations(names))
            self._outbox.delivered(names)
            count += len(names)
        if count:
            log.warning("%d deferred invalidations are delivered", count)
            self._wake()
        return count

    def deliver_aside(self) -> None:
        """The same where no operation is running: in the prober's thread, when Redis is back."""
        if self._outbox.waiting and self.run_aside is not None:
            with contextlib.suppress(RedisUnavailable):  # the next read tries again
                self.run_aside(self.deliver())

    def deliver_last(self) -> None:
        """The same at the end of the room or the process: what can't be delivered now never will be."""
        atexit.unregister(self.deliver_last)
        self.deliver_aside()
        if left := self._outbox.waiting:
            log.error("%d deferred invalidations are lost: Redis was away to the end", left)

    @property
    def deferred(self) -> int:
        """How many deferred invalidations wait in this process."""
        return self._outbox.waiting

    # Steps

    def _invalidating(self, names: list[bytes], defer: bool) -> Operation[list[Any]]:
        """Tell Redis; or, if that is impossible and may be done later, the outbox. → the replies, if any."""
        try:
            yield from self.agree()
            return (yield from self._changing(list(self._invalidations(names))))
        except RedisUnavailable as error:
            if not defer or error.reason in FINAL:
                raise
            self._defer(names, error)
            return []

    def _changing(self, batch: Sequence[Command]) -> Operation[list[Any]]:
        """Send a batch that changes something; the replies. See cache/memo.py."""
        try:
            replies: list[Any] = yield batch
            return replies
        finally:
            self.changes += 1

    def _invalidations(self, names: Iterable[bytes]) -> Iterable[Command]:
        """The commands that invalidate these (the outbox' names), in this order."""
        for kind, group in itertools.groupby(names, lambda name: name[:2]):
            some = list(group)
            if kind == b"k:":
                keys = [name[2:] for name in some]
                # The lease first: without it no load can store its value behind the UNLINK.
                yield (b"DEL", *map(self._keys.lease, keys))
                yield (b"UNLINK", *map(self._keys.entry, keys))
            elif kind == EVERYTHING:
                yield clear(self._marking_keys(), self._new_epoch(), self._keep_ms)
            else:
                for start in range(0, len(some), MARKED_AT_ONCE):
                    bite = some[start : start + MARKED_AT_ONCE]
                    yield mark(self._marking_keys(), self._new_epoch(), self._keep_ms, *bite)

    def _defer(self, names: list[bytes], error: RedisUnavailable) -> None:
        if not self._outbox.waiting:
            atexit.unregister(self.deliver_last)
            atexit.register(self.deliver_last)
        self._outbox.put(names)
        self.stats.counts["deferred"] += len(names)
        self.stats.say("invalidations are deferred", error.reason, error)

    def _wake(self) -> None:
        """What an invalidation killed is written down; a worker had better begin soon."""
        if not self.dispatch.inline:
            self.dispatch.wake(RECLAIM_TASK)

    def agree(self) -> Operation[None]:
        """Find out whether the other processes have the same settings, where that is not known yet.

        Raises SettingsDiffer. While the state's Redis is away nobody knows, and this goes on.
        """
        if self._agreed.is_due:
            with contextlib.suppress(RedisUnavailable):
                yield On([(STATE, self._agreed.compare())])
                yield from self._begin_shards()
        self._agreed.check(*SAME)

    def _begin_shards(self) -> Operation[None]:
        """Nothing was agreed before: nobody knows whether another number of shards was in use meanwhile."""
        agreement = self._agreed.of(SHARDS)
        if self.settings.shards > 1 and agreement is not None and agreement.is_new:
            yield from self.whole.clear()

    def _longest(self, limit: str) -> float:
        """A limit in seconds: this process's own, or that of the process that has the largest."""
        agreement = self._agreed.of(limit)
        own: float = getattr(self.settings, limit)
        return max(own, float(agreement.agreed)) if agreement else own

    @property
    def _keep_ms(self) -> int:
        """The longest life of an entry and of the load before it."""
        return int((self._longest(LIFE_LIMIT) + self._longest(LEASE_LIMIT)) * 1000)

    def _new_epoch(self) -> str:
        """How an epoch's name starts, should one have to begin, and the number of shards it is for."""
        return f"{secrets.token_hex(4)}#{self.settings.shards}"

    def _marking_keys(self) -> list[bytes]:
        return [self._keys.clock, self._keys.marks, self._keys.globs, self._keys.todo]


def require_agreement(agreed: Agreed, settings: Settings) -> None:
    """Name the settings of the cache that all processes must have alike."""
    agreed.require(SHARDS, settings.shards)
    agreed.require(LEASE_LIMIT, f"{settings.lease_limit:g}", Rule.LARGEST)
    agreed.require(LIFE_LIMIT, f"{settings.life_limit:g}", Rule.LARGEST)
