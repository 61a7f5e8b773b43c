"""Saying that values are no longer true: to Redis, or, where it is away and that may wait, to an outbox."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from stillroom.at_exit import AtExit
from stillroom.cache.away import Away
from stillroom.cache.bites import KEYS_AT_ONCE, Bites
from stillroom.cache.loaders import Loaders
from stillroom.cache.memo import Memo
from stillroom.cache.outbox import EVERYTHING, KEY, Outbox
from stillroom.cache.terms import Terms
from stillroom.dispatch import RECLAIM_TASK, Dispatch
from stillroom.errors import FINAL, InvalidKey, RedisUnavailable
from stillroom.keys import Keys, pattern, sanitized
from stillroom.misuse import YES_OR_NO, refuse_other
from stillroom.operation import Operation
from stillroom.replicas import kept
from stillroom.scripts import clear, drop, mark
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Command

log = logging.getLogger("stillroom")

INVALIDATION = "an invalidation"
GLOBS_TOLD = 100  # in the place of keys
# What hardly any key has and many a regular expression: ^ in front, $ at the end, \d, \w, \s, .+, a|b.
_REGEX = re.compile(r"^\^|\$$|\\[dws]|\.\+|\|")


class Invalidator:
    """Tells Redis, or keeps in mind what it has to be told.

    `run_aside` runs an operation where none is running: in a prober's thread, at exit. `learn` takes in what this
    process has told Redis itself: the clock before and after it, and the marks that it left.
    """

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        terms: Terms,
        memo: Memo,
        away: Away,
        dispatch: Dispatch,
        stats: Stats,
        run_aside: Callable[[Operation[Any]], Any],
        learn: Callable[[bytes, bytes, Sequence[bytes]], None],
    ) -> None:
        self._settings = settings
        self.outbox = Outbox(settings.outbox_limit)
        self._keys = keys
        self._terms = terms
        self._memo = memo
        self._away = away
        self._dispatch = dispatch
        self._stats = stats
        self._run_aside = run_aside
        self._learn = learn
        self._at_exit = AtExit(self.deliver_last)

    def tell(self, names: list[bytes], defer: bool) -> Operation[list[int]]:
        """Tell Redis of these names (see outbox.py); if that is impossible and may wait, keep them.

        Returns for each of the keys among them how many entries it had.

        Many names go in bites, and all of them are tried; then the first error is raised.
        """
        self._away.forget(names)
        counts: list[int] = []
        failure: RedisUnavailable | None = None
        bites = Bites(names, KEYS_AT_ONCE)
        while bites.left:
            yield from bites.turn()
            bite = bites.next()
            try:
                yield from self._terms.agree()
                told = list(self._commands(bite))
                keys = _keys_among(bite)
                replies = yield from self._memo.changing(told, keys, INVALIDATION)
                counts += self._take_in(bite, replies)
            except RedisUnavailable as error:
                if bites.again(error):
                    continue
                if defer and error.reason not in FINAL:
                    self._defer(bite, error)
                else:
                    failure = failure or error
            bites.done()
        if failure is not None:
            raise failure
        return counts

    def deliver(self) -> Operation[None]:
        """Tell Redis what was deferred. Redis away: RedisUnavailable; what is left waits on."""
        count = 0
        yield from self._terms.agree()
        while names := self.outbox.first(KEYS_AT_ONCE):
            told = list(self._commands(names))
            yield from kept(told, self._settings.replicas_of_cache, self._stats, INVALIDATION)
            self.outbox.delivered(names)
            count += len(names)
        if count:
            log.warning("%d deferred invalidations are delivered", count)
            self.wake()

    def deliver_aside(self) -> None:
        """Deliver where no operation is running: Redis is back, so nothing that was kept meanwhile is needed."""
        self._away.clear()
        if self.outbox.waiting:
            try:
                self._run_aside(self.deliver())
            except RedisUnavailable:  # the next read tries again
                self._stats.remind()

    def deliver_last(self) -> None:
        """Deliver at the end of the room or the process, and complain of what is lost."""
        self._at_exit.disarm()
        self.deliver_aside()
        if left := self.outbox.waiting:
            log.error("%d deferred invalidations are lost: Redis was away to the end", left)

    def wake(self) -> None:
        """Wake a worker, to free the memory. What there is to do is written down; without this, beat starts it."""
        if not self._dispatch.inline:
            self._dispatch.wake(RECLAIM_TASK)

    def _commands(self, names: Iterable[bytes]) -> Iterable[Command]:
        """Return the commands that invalidate these names, in this order."""
        keys, keep_ms = self._keys, self._terms.keep_ms
        marking = keys.clock, keys.marks, keys.globs, keys.todo
        for kind, some in _by_kind(names):
            if kind == KEY:
                yield self._dropping([name[2:] for name in some])
            elif kind == EVERYTHING:
                yield clear(marking, self._terms.new_epoch(), keep_ms)
            else:
                yield mark(marking, self._terms.new_epoch(), keep_ms, *some)

    def _take_in(self, names: Iterable[bytes], replies: Sequence[Any]) -> list[int]:
        """Know what Redis was told with these commands. Return for each key how many entries it had."""
        counts: list[int] = []
        for (kind, some), reply in zip(_by_kind(names), replies, strict=True):
            if kind == KEY:
                counted, before, after = reply
                counts += counted
                self._learn(before, after, ())
            elif kind != EVERYTHING:
                before, after = reply
                self._learn(before, after, some)
        return counts

    def _dropping(self, names: Sequence[bytes]) -> Command:
        """Return the command that deletes these keys."""
        keys = self._keys
        places = [(keys.lease(name), keys.entry(name), keys.other(name)) for name in names]
        return self.naming(names, [key for three in places for key in three])

    def naming(self, names: Sequence[bytes], keys: Sequence[bytes] = ()) -> Command:
        """Return the command that tells whoever keeps copies of these keys, and forgets what is under `keys`."""
        near = self._keys.clock, self._keys.marks, self._keys.near, self._keys.named
        return drop([*near, *keys], self._terms.new_epoch(), *names)

    def _defer(self, names: Sequence[bytes], error: RedisUnavailable) -> None:
        self._at_exit.arm()
        self.outbox.put(names)
        self._stats.remind()
        self._memo.changed()  # again: until it was put there, a read could be answered without it
        self._stats.counts["deferred"] += len(names)
        self._stats.say("invalidations are deferred", error.reason, error)


class Invalidations:
    """The operations that invalidate. A driver runs them."""

    _invalidator: Invalidator
    loaders: Loaders

    def invalidate(self, *keys: str, defer: bool = False) -> Operation[int]:
        """Forget these keys, and any load of them that is in progress. Return how many held a value.

        Cost: one script for up to 500 keys. Redis away: RedisUnavailable; nothing is promised then.

        With `defer=True` the invalidation is kept in this process instead (0 is returned) and delivered before the
        process trusts another read: as soon as Redis answers, with the next call, or when the room is closed or the
        process ends. Until then other processes may serve the old value. If Redis is still away when this process
        ends, it is lost and an error is logged: they serve the old value until its `ttl + swr` ends. The process
        keeps `outbox_limit` names; one more turns all of them into a `clear()`.
        """
        counts = yield from self.forget(*keys, defer=defer)
        warn_of_globs(keys, counts)
        return sum(counts)

    def forget(self, *keys: str, defer: bool = False) -> Operation[list[int]]:
        """Do what `invalidate` does, and warn of no glob.

        Return how many entries each key had, of those that Redis was told of.
        """
        _check_flags(defer=defer)
        names = names_given("invalidate", keys)
        self.loaders.refuse_unfilled(*keys)
        return (yield from self._invalidator.tell([KEY + name for name in names], defer))

    def invalidate_by_tag(
        self, *tags: str, soft: bool = False, defer: bool = False
    ) -> Operation[None]:
        """Invalidate all entries that carry one of these tags, even those whose load is in progress. O(tags).

        True for every reader when it returns. `soft=True`: the entries are served stale and refreshed instead.
        Redis away: RedisUnavailable; nothing is promised then. `defer`: see `invalidate`.
        """
        _check_flags(soft=soft, defer=defer)
        names = names_given("invalidate_by_tag", tags)
        self.loaders.refuse_unfilled(*tags)
        if not names:
            return
        kind = b"s:" if soft else b"t:"
        yield from self._invalidator.tell([kind + name for name in names], defer)
        self._invalidator.wake()

    def invalidate_by_pattern(self, glob: str, *, defer: bool = False) -> Operation[None]:
        """Invalidate every entry whose key the glob matches, even if its load is in progress. O(1).

        Globs mean exactly what Redis' MATCH means: `*`, `?`, `[a-z]`, `[^a]`, `\\x`. True for every reader when it
        returns. Until a worker has swept, each read of an older entry tries each pattern: a tag is cheaper.
        Redis away: RedisUnavailable; nothing is promised then. `defer`: see `invalidate`.
        """
        _check_flags(defer=defer)
        written = pattern(glob)
        self.loaders.refuse_unfilled(glob)
        _warn_of_regex(glob)
        yield from self._invalidator.tell([b"p:" + written], defer)
        self._invalidator.wake()

    def clear(self, *, defer: bool = False) -> Operation[None]:
        """Invalidate every entry of the namespace: a new epoch begins. O(number of marks).

        True for every reader when it returns. Redis away: RedisUnavailable; nothing is promised then.
        `defer`: see `invalidate`.
        """
        _check_flags(defer=defer)
        yield from self._invalidator.tell([EVERYTHING], defer)
        self._invalidator.wake()

    @property
    def deferred(self) -> int:
        """Return how many deferred invalidations wait in this process."""
        return self._invalidator.outbox.waiting

    @property
    def deferrals(self) -> int:
        """Return how many names were ever deferred in this process."""
        return self._invalidator.outbox.count

    def deliver_aside(self) -> None:
        """Deliver what was deferred where no operation is running: in the prober's thread, when Redis is back."""
        self._invalidator.deliver_aside()

    def deliver_last(self) -> None:
        """Deliver it at the end of the room. What can't be delivered now never will be."""
        self._invalidator.deliver_last()


@functools.lru_cache(maxsize=100)  # once for each, of all shards
def _warn_of_regex(glob: str) -> None:
    """Warn of a regular expression in the place of a glob: as such it matches next to nothing, in silence."""
    if found := _REGEX.search(glob):
        log.warning(
            "the pattern %r is a glob, in which %s stands for itself; * is any text, ? a character, [a-z] a range",
            *(glob, found[0]),
        )


def _by_kind(names: Iterable[bytes]) -> Iterable[tuple[bytes, list[bytes]]]:
    """Return these names in their order, those of a kind that follow one another together."""
    for kind, group in itertools.groupby(names, lambda name: name[:2]):
        yield kind, list(group)


def _keys_among(names: Sequence[bytes]) -> list[bytes] | None:
    """Return the keys that these names are, or None where one of them is no key."""
    keys = [name[2:] for name in names if name[:2] == KEY]
    return keys if len(keys) == len(names) else None


def warn_of_globs(keys: Iterable[str], counts: Collection[int]) -> None:
    """Warn of a glob in the place of a key: it names that one key, which holds nothing.

    `counts`: how many values there were under the keys, as far as that is known.
    """
    if counts and not any(counts):
        for key in keys:
            # Not each time: a visitor's search may be in the key.
            if "*" in key and _warn_of_glob.cache_info().currsize < GLOBS_TOLD:
                _warn_of_glob(key)


@functools.lru_cache(maxsize=GLOBS_TOLD)  # once for each
def _warn_of_glob(key: str) -> None:
    log.warning(
        "%r was invalidated as one key, which holds no value; invalidate_by_pattern(%r) is for all that it matches",
        *(key, key),
    )


def _check_flags(**flags: object) -> None:
    """Raise InvalidArgument for what is neither True nor False: the text "no" would be taken for yes."""
    for name, given in flags.items():
        refuse_other(name, given, bool, YES_OR_NO)


def names_given(operation: str, given: Sequence[Any]) -> list[bytes]:
    """Return the sanitized names. Raises InvalidKey, which says how to give the names of a list."""
    for one in given:
        if isinstance(one, list | tuple | AbstractSet):
            raise InvalidKey(
                one, f"each name by itself; for those of a list write {operation}(*names)"
            )
    return [sanitized(one) for one in given]
