"""The cache's operations: what it says to Redis, and when. cache.py gives them their two faces.

The invariant everything here serves: **a read that began after an invalidation returned never yields
a value loaded before it.** An entry carries the clock as it was before its load began; marks.py decides.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, Unpack, overload

from stillroom.agreed import Agreed
from stillroom.cache.entry import Corrupt, Entry, Freshness, body, parse
from stillroom.cache.invalidation import LEASE_LIMIT, LIFE_LIMIT, InvalidationBody
from stillroom.cache.judge import Judge
from stillroom.cache.loaders import (
    Asked,
    BadArguments,
    KeepOptions,
    Loader,
    LoaderOptions,
    Loaders,
    Recipe,
    SetOptions,
    TimeOptions,
    recipe_of,
    several,
)
from stillroom.cache.marks import read_clock
from stillroom.cache.memo import recall, remember
from stillroom.cache.probe import LAG_SUM, lag_bucket
from stillroom.codec import MISS, Codec, Undecodable
from stillroom.dispatch import Dispatch, RefreshOrder
from stillroom.errors import RedisRefused, RedisUnavailable, UnknownLoader
from stillroom.keys import Keys, sanitized
from stillroom.operation import IN_TIME, Call, Freeing, Once, Operation, Pause, Timed
from stillroom.scripts import (
    back_off,
    claim_refresh,
    commit,
    lease_load,
    lease_refresh,
    put,
    release,
    trim_marks,
    verify_epoch,
)
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.unsettled import is_unsettled
from stillroom.wire import Clock, Command

T = TypeVar("T")
D = TypeVar("D")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.05  # between two looks at a load one waits for
ASK_AGAIN_S = 1.0  # a process that could not get a refresh lease does not try for this long
ASKED_LIMIT = 10_000
FAILURES_KEPT_MS = 600_000  # how long after a backoff its count of failures is remembered
WON = STORED = 1  # what a script answers that did what it is for
LATE = -1  # what each answers that arrived after its caller gave up
TRIES = 2  # to put a value
TRIM_BITE = 5_000  # marks dropped by one script call


@dataclass(frozen=True, slots=True)
class CachedValue(Generic[T]):
    """A value with what the cache knows of it. `fresh_until` is the server's clock, seconds since 1970."""

    value: T
    freshness: Freshness
    fresh_until: float
    tags: tuple[str, ...]
    loader: str | None


class Stale(NamedTuple):
    """An entry that should be loaded again, and what made it: `<loader> <arguments as JSON>`."""

    name: bytes
    entry: Entry
    source: bytes


class Packed(NamedTuple):
    """A value ready to be stored: what entry.body makes of it, and its tags."""

    rest: bytes
    tags: list[bytes]


class Ready(NamedTuple):
    """A value ready to be put under its key; times in ms."""

    name: bytes
    packed: Packed
    ttl: int
    swr: int


class CacheBody(InvalidationBody):
    """The operations. A driver runs them."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        keys: Keys,
        dispatch: Dispatch,
        stats: Stats,
        agreed: Agreed,
    ) -> None:
        super().__init__(settings, keys, dispatch, stats, agreed)
        self.loaders = Loaders()
        self.now_ms = clock.now_ms
        self._clock = clock
        self._codec = Codec(settings)
        self._judges = self._judge_of(settings.marks_limit)
        # key → which stale entry was asked for, and until when (time.monotonic()) that is enough
        self._asked: dict[bytes, tuple[int, float]] = {}

    # Reading

    @overload
    def get(self, key: str, type: type[T], default: None = None) -> Operation[T | None]: ...
    @overload
    def get(self, key: str, type: type[T], default: D) -> Operation[T | D]: ...
    @overload
    def get(self, key: str, type: Any = ..., default: Any = None) -> Operation[Any]: ...
    def get(self, key: str, type: Any = Any, default: Any = None) -> Operation[Any]:
        """The value under `key`, or `default` on a miss. A stale one is served, and refreshed if a loader made it.

        Source: the entry and the clock in one MGET. A value that does not fit `type` is a miss.
        Redis away: `default`, within the call's deadline; counted and logged, never raised.
        """
        name = sanitized(key)
        try:
            entry, freshness = yield from self._look(name)
        except RedisUnavailable as error:
            self._fall_back("get", error)
            return default
        value = self._counted(entry, freshness, type)
        if value is MISS or entry is None:
            return default
        if freshness is Freshness.STALE and entry.source:
            yield from self._ask_for_refreshes([Stale(name, entry, entry.source)])
        return value

    @overload
    def get_entry(self, key: str, type: type[T]) -> Operation[CachedValue[T] | None]: ...
    @overload
    def get_entry(self, key: str, type: Any = ...) -> Operation[CachedValue[Any] | None]: ...
    def get_entry(self, key: str, type: Any = Any) -> Operation[CachedValue[Any] | None]:
        """The value with its freshness, tags and loader, or None on a miss. Asks for no refresh.

        Redis away: None.
        """
        name = sanitized(key)
        try:
            entry, freshness = yield from self._look(name)
        except RedisUnavailable as error:
            self._fall_back("get_entry", error)
            return None
        if entry is None or (value := self._decode(entry, type)) is MISS:
            return None
        return CachedValue(
            value,
            freshness,
            entry.fresh_until / 1000,
            tuple(tag.decode(errors="replace") for tag in entry.tags),
            entry.source.partition(b" ")[0].decode(errors="replace") or None,
        )

    @overload
    def get_or_set(
        self, key: str, load: Callable[[], Coroutine[Any, Any, T]], **options: Unpack[KeepOptions]
    ) -> Operation[T]: ...
    @overload
    def get_or_set(
        self, key: str, load: Callable[[], T], **options: Unpack[KeepOptions]
    ) -> Operation[T]: ...
    def get_or_set(
        self, key: str, load: Callable[[], Any], **options: Unpack[KeepOptions]
    ) -> Operation[Any]:
        """The value under `key`, or what `load()` returns, which is then stored.

        One caller loads while all others, in every process, wait for it. A stale value is served at once; one
        caller per stale period loads the next (a function that is not registered can't be run by a worker: use
        `cached` for that). The options are those of KeepOptions. An error of `load` reaches its caller.
        Redis away: loads and returns.
        """
        name = sanitized(key)
        return (yield from self.obtain(name, self._recipe(load, options)))

    def obtain(self, name: bytes, recipe: Recipe) -> Operation[Any]:
        """The value under a sanitized key, loaded by its recipe if it has to be."""
        try:
            is_remembered = recipe.loader is not None and recipe.loader.is_remembered
            look = self._look_once if is_remembered else self._look
            entry, freshness = yield from look(name)
        except RedisUnavailable as error:
            self._fall_back("get_or_set", error)
            return (yield from self._load_for_myself(recipe))
        value = self._counted(entry, freshness, recipe.type)
        if value is MISS or entry is None:
            return (yield from self._load(name, recipe))
        if freshness is Freshness.FRESH:
            return value
        if recipe.loader is None:
            return (yield from self._refresh_here(name, entry, value, recipe))
        if source := self._source(recipe):
            yield from self._ask_for_refreshes([Stale(name, entry, source)])
        return value

    def loader(self, function: Callable[..., Any], key: str, options: LoaderOptions) -> Loader:
        """Register a function of the app."""
        ttl, swr = self._times(options)
        lease = self._ms("lease", options.get("lease"), self.settings.lease)
        if lease > self.settings.lease_limit * 1000:
            limit = f"lease_limit allows {self.settings.lease_limit:g} s"
            raise ValueError(f"lease={lease / 1000:g} s; {limit}")
        loader = Loader(function, key, options, ttl, swr, lease)
        self._codec.adapter(loader.type)
        self.loaders.register(loader)
        return loader

    def call(
        self, loader: Loader, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Operation[Any]:
        """What calling a registered loader is answered with."""
        values = loader.values(args, kwargs)
        return self.obtain(sanitized(loader.key(values)), loader.recipe(values))

    # Writing

    def set(self, key: str, value: Any, **options: Unpack[SetOptions]) -> Operation[bool]:
        """Store a value; True when it is stored. The options are those of SetOptions.

        A load of the same key that is under way loses to it. Raises ValueTooLarge, Unencodable, InvalidKey.
        Redis away, full or read-only: False; a write that arrives after this returned is refused by the script.
        """
        name = sanitized(key)
        ttl, swr = self._times(options)
        kind, tags = options.get("type", Any), several(options.get("tags", ()))
        packed = self._pack(name, value, kind, tags, b"")
        (stored,) = yield from self._put_all("set", [Ready(name, packed, ttl, swr)])
        return stored

    def _put_all(self, what: str, values: Sequence[Ready]) -> Operation[list[bool]]:
        """Store these values; which of them were stored. Each fails for itself."""
        stored = [False] * len(values)
        try:
            yield from self._before_writing()
        except RedisUnavailable as error:
            self._fall_back(what, error)
            return stored
        verified_on, left = self._judges.run, list(range(len(values)))
        for _ in range(TRIES):
            epoch = self._new_epoch()
            puts = Timed(self._put(*values[place], epoch) for place in left)
            replies = dict(zip(left, (yield from self._each(what, puts)), strict=True))
            for place, reply in replies.items():
                stored[place] = reply == STORED
            left = yield from self._left_to_put(what, replies, verified_on)
            if not left:
                break
        return stored

    def _left_to_put(
        self, what: str, replies: Mapping[int, Any], verified_on: bytes | None
    ) -> Operation[list[int]]:
        """Which of these to put once more, though they were answered."""
        if verified_on is not None and self._judges.is_unverified:
            # This very call met another run of the server. What it stored there is as dead as the epoch it is in.
            try:
                yield from self._judges.verify()
            except RedisUnavailable as error:
                self._fall_back(what, error)
                return []
            return list(replies)
        late = [place for place, reply in replies.items() if reply == LATE]
        if late:  # and yet its answer is here in time: the server's clock is not where we thought
            self._clock.doubt_clock()
        return late

    def _each(self, what: str, batch: list[Any]) -> Operation[list[Any]]:
        """The replies to a batch, in which each command fails for itself: None is a failure."""
        if not batch:
            return []
        try:
            replies: list[Any] = yield from self._changing(batch)
        except RedisUnavailable as error:
            self._fall_back(what, error)
            replies = getattr(error, "replies", None) or [None] * len(batch)
        return [None if isinstance(reply, Exception) else reply for reply in replies]

    # Background work

    def refresh(self, order: RefreshOrder) -> Operation[dict[str, Any]]:
        """Load a stale value again, in a worker. Returns a report: `outcome` and `key`.

        Safe twice, late, and out of order: the lease names the order that may do it.
        Raises UnknownLoader, BadArguments, RedisUnavailable, and what the loader raises.
        """
        name = order.key.encode()
        claim = self._lease_keys(name)
        try:
            recipe = recipe_of(order, self.loaders)
        except (UnknownLoader, BadArguments):
            # Another worker may know it: the lease runs out, and the next stale read asks again.
            self.stats.counts["refresh_errors"] += 1
            raise
        known = self._judges.synced
        yield from self.agree()
        (claimed,) = yield Once(
            [claim_refresh(claim, order.token, recipe.lease, self._new_epoch())]
        )
        if claimed is None:
            return self._report(order, "superseded")
        held, clock, raw = claimed
        entry, freshness = yield from self._judge(raw, name, clock, known)
        if (
            entry is None or freshness is not Freshness.STALE
        ):  # fresh again, or gone: its next reader loads it
            yield from self._release([(name, held)])
            return self._report(order, "not needed")
        _, lost = yield from self._load_under(name, held, clock, recipe, self._back_off)
        if not lost:
            self._count_refresh(entry)
        return self._report(order, lost or "refreshed")

    def _count_refresh(self, entry: Entry) -> None:
        """And how late it was; of one that was invalidated softly, before its time, nobody knows."""
        self.stats.counts["refreshes_done"] += 1
        lag_ms = self.now_ms() - entry.fresh_until
        if lag_ms > 0:
            self.stats.counts[lag_bucket(lag_ms / 1000)] += 1
            self.stats.counts[LAG_SUM] += lag_ms

    def load(self, order: Asked) -> Operation[dict[str, Any]]:
        """Load a value because an app ordered it, whatever is there. Returns a report: `outcome` and `key`.

        An older load that is under way loses its lease to this one: its value would be too old.
        Raises UnknownLoader, BadArguments, RedisUnavailable, and what the loader raises.
        """
        recipe = recipe_of(order, self.loaders)
        key = self.loaders[order.loader].key(recipe.values)
        name = sanitized(key)
        lease = load_lease(recipe.lease)
        yield from self._before_writing()
        takes = Timed([self._lease_load(name, lease, recipe.lease, over=True)])
        (reply,) = yield takes
        if reply[0] == LATE:
            self._clock.doubt_clock()
            (reply,) = yield takes
        if reply[0] != WON:
            return {"outcome": "too late", "loader": order.loader, "key": key}
        _, lost = yield from self._load_under(name, lease, reply[1], recipe, self._release_one)
        return {"outcome": lost or "loaded", "loader": order.loader, "key": key}

    def trim_marks(self) -> Operation[dict[str, int]]:
        """Drop marks that are older than any entry can be. Returns {"dropped", "left"}."""
        longest = self._longest(LIFE_LIMIT) + self._longest(LEASE_LIMIT)
        keys = [self._keys.clock, self._keys.marks, self._keys.globs]
        dropped = 0
        while True:
            ((bite, left),) = yield [trim_marks(keys, int(longest * 1_000_000), TRIM_BITE)]
            dropped += bite
            if bite < TRIM_BITE:
                return {"dropped": dropped, "left": left}
            yield Pause(0)  # others first; and each bite has its own deadline

    def undelivered(self, leases: Sequence[tuple[bytes, bytes]]) -> Operation[None]:
        """Refreshes could not be sent: free their leases, and let the next stale read ask again."""
        self.stats.counts["refreshes_undelivered"] += len(leases)
        for name, _ in leases:
            self._asked.pop(name, None)
        yield from self._release(leases)

    def flush_stats(self) -> Operation[None]:
        """Write the counts of this process down now. Redis away: they are lost."""
        if counts := self.stats.flush(self.now_ms(), self._keys):
            try:
                yield Once(counts)
            except RedisUnavailable as error:
                self._fall_back("flush_stats", error)

    # Looking

    def _judge_of(self, limit: int) -> Judge:
        """A judge that knows nothing yet, and will remember so many marks."""

        def verifying(epoch: bytes, seq: int) -> Operation[Command]:
            yield from self.agree()
            given = (self._new_epoch(), self._keep_ms, epoch, seq)
            return verify_epoch(self._marking_keys(), *given)

        return Judge(self._keys, self._clock, limit, verifying)

    def _before_writing(self) -> Operation[None]:
        """Let Redis know what this process knows, and this process whether it may write, and into which epoch."""
        if self._outbox.waiting:
            yield from self.deliver()
        yield from self.agree()
        if self._judges.is_unverified:
            yield from self._judges.verify()

    def _look_once(self, name: bytes) -> Operation[tuple[Entry | None, Freshness]]:
        """The same as _look, once in a request: see memo.py."""
        if (known := recall(self, name)) is not None:
            return known.entry, known.freshness
        changes = self.changes
        entry, freshness = yield from self._look(name)
        if entry is not None:
            remember(self, name, entry, freshness, changes)
        return entry, freshness

    def _look(self, name: bytes) -> Operation[tuple[Entry | None, Freshness]]:
        """The living entry and its freshness, or (None, DEAD). One round trip while the clock stands."""
        known = self._judges.synced
        raw, clock = yield from self._read((self._keys.entry(name),), known)
        entry, freshness = self._judge_at_once(raw, name, clock)
        if freshness is not None:
            return entry, freshness
        return (yield from self._judge(raw, name, clock, known))

    def _read(self, keys: Sequence[bytes], known: int) -> Operation[Any]:
        """What is under these keys, and last the clock: one MGET, and whatever rides along with it."""
        if self._outbox.waiting:  # no read is trusted before Redis knows what this process knows
            yield from self.deliver()
        now = time.monotonic()
        batch: list[Command] = [(b"MGET", *keys, self._keys.clock)]
        if riding := known and self._judges.is_moving(now):
            batch.append(self._judges.marks_since(known))
        if now > self.stats.due:
            self._clock.ask_time()
            if counted := self.stats.flush(self.now_ms(), self._keys):
                batch = Once([*batch, *counted])
        try:
            replies = yield batch
        except RedisRefused as refused:
            # A server that is full refuses to count, not to read.
            if not refused.replies or isinstance(refused.replies[0], Exception):
                raise
            replies = refused.replies
        found = replies[0]
        if riding and not isinstance(replies[1], Exception):
            self._judges.learn(known, replies[1], (), found[-1])
        return found

    def _judge_at_once(
        self, raw: bytes | None, name: bytes, clock: bytes | None
    ) -> tuple[Entry | None, Freshness | None]:
        """(the living entry, its freshness), (None, DEAD), or (entry, None) where more has to be asked."""
        entry = self._parsed(raw, name) if raw is not None else None
        if entry is None:
            return None, Freshness.DEAD
        freshness = self._judges.at_once(entry, clock)
        return (None if freshness is Freshness.DEAD else entry), freshness

    def _judge(
        self, raw: bytes | None, name: bytes, clock: bytes | None, known: int
    ) -> Operation[tuple[Entry | None, Freshness]]:
        """The same, having asked. `known` is how far this process knew before it read them."""
        entry, freshness = self._judge_at_once(raw, name, clock)
        if entry is not None and freshness is None:
            (freshness,) = yield from self._judges.settle([entry], clock, known)
        if entry is None or freshness is None or freshness is Freshness.DEAD:
            return None, Freshness.DEAD
        return entry, freshness

    def _parsed(self, raw: bytes, name: bytes) -> Entry | None:
        try:
            return parse(raw, name)
        except Corrupt as error:
            self._count_unreadable("entry", name, error)
            return None

    def _decode(self, entry: Entry, type: Any) -> Any:
        try:
            return self._codec.decode(entry.codec, entry.payload, type)
        except Undecodable as error:
            self._count_unreadable("value", entry.key, error)
            return MISS

    def _count_unreadable(self, what: str, name: bytes, error: ValueError) -> None:
        self.stats.counts["decode_errors"] += 1
        self.stats.say(f"unreadable {what}, a miss", what, f"{name[:100]!r}: {error}")

    def _counted(self, entry: Entry | None, freshness: Freshness, type: Any) -> Any:
        """The value of what a reader found, or MISS; and one more of its kind."""
        value = MISS if entry is None else self._decode(entry, type)
        if value is MISS:
            self.stats.counts["misses"] += 1
        else:
            self.stats.counts["hits" if freshness is Freshness.FRESH else "stale"] += 1
        return value

    # Loading

    def _load(self, name: bytes, recipe: Recipe) -> Operation[Any]:
        """Load, or be served by the one who does."""
        lease = load_lease(recipe.lease)
        try:
            clock, value = yield from self._await_turn(name, lease, recipe)
        except RedisUnavailable as error:
            self._fall_back("get_or_set", error)
            return (yield from self._load_for_myself(recipe))
        if value is not MISS:
            return value
        if clock is None:
            self.stats.say("waited in vain for another's load", "wait", f"{name[:100]!r}")
            return (yield from self._load_for_myself(recipe))
        value, _ = yield from self._load_under(name, lease, clock, recipe, self._release_one)
        return value

    def _await_turn(
        self, name: bytes, lease: bytes, recipe: Recipe
    ) -> Operation[tuple[bytes | None, Any]]:
        """→ (the clock before our load, MISS), or (None, another's value), or (None, MISS): waited in vain.

        Whoever waits reads again and decides again: a value whose load began before an invalidation is as dead
        for those who were waiting for it as for everybody else.
        """
        patience = time.monotonic() + self.settings.wait
        pause = FIRST_PAUSE_S
        clock, value = yield from self._try_lease(name, lease, recipe)
        while clock is None and value is MISS and time.monotonic() < patience:
            yield Pause(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 1.5, LONGEST_PAUSE_S)
            value, is_held = yield from self._look_again(name, recipe)
            if value is MISS and not is_held:
                clock, value = yield from self._try_lease(name, lease, recipe)
        return clock, value

    def _look_again(self, name: bytes, recipe: Recipe) -> Operation[tuple[Any, bool]]:
        """→ (the value or MISS, whether somebody is loading it)."""
        known = self._judges.synced
        keys = (self._keys.entry(name), self._keys.clock, self._keys.lease(name))
        ((raw, clock, holder),) = yield [(b"MGET", *keys)]
        entry, _ = yield from self._judge(raw, name, clock, known)
        value = MISS if entry is None else self._decode(entry, recipe.type)
        return value, holder is not None and holder.startswith(b"load.")

    def _try_lease(
        self, name: bytes, lease: bytes, recipe: Recipe
    ) -> Operation[tuple[bytes | None, Any]]:
        """→ (the clock before our load, MISS) when won, (None, MISS) when not, (None, value) when it is there."""
        known = self._judges.synced
        try:
            yield from self._before_writing()
            (reply,) = yield Timed([self._lease_load(name, lease, recipe.lease)])
            if reply[0] == LATE:
                self._clock.doubt_clock()
            if reply[0] != WON:
                return None, MISS
            _, clock, raw, foreign = reply
            if foreign:
                self._count_unreadable("key", name, ValueError("not a string"))
            entry, _ = yield from self._judge(raw, name, clock, known)
        except GeneratorExit:
            raise
        except (
            BaseException
        ):  # timed out or cancelled in the middle: the lease may be ours all the same
            yield from self._release([(name, lease)])
            raise
        if entry is None or (value := self._decode(entry, recipe.type)) is MISS:
            return clock, MISS
        yield from self._release(
            [(name, lease)]
        )  # another load was done between our look and our lease
        return None, value

    def _load_for_myself(self, recipe: Recipe) -> Operation[Any]:
        """Load without storing: there is no lease to say that the value may still be stored."""
        value = yield recipe.call
        self.stats.counts["loads"] += 1
        return value

    def _load_under(
        self,
        name: bytes,
        held: bytes,
        clock: bytes,
        recipe: Recipe,
        on_failure: Callable[[bytes, bytes], Operation[None]],
    ) -> Operation[tuple[Any, str]]:
        """Load under a lease and store. → (value, why it was not stored or nothing)."""
        try:
            value = yield recipe.call
        except GeneratorExit:
            raise
        except BaseException:
            self.stats.counts["load_errors"] += 1
            yield from on_failure(name, held)
            raise
        self.stats.counts["loads"] += 1
        return value, (yield from self._store(name, held, clock, recipe, value))

    def _store(
        self, name: bytes, held: bytes, clock: bytes, recipe: Recipe, value: Any
    ) -> Operation[str]:
        """Commit, if the lease is still ours. The caller has its value either way. → why not, or nothing."""
        packed = self._pack_or_none(name, value, recipe)
        if packed is None:
            yield from self._release([(name, held)])
            return "can't be stored"
        try:
            commits = Freeing([self._commit(name, held, clock, packed, recipe)])
            (stored,) = yield from self._changing(commits)
        except RedisUnavailable as error:
            self._fall_back("store", error)
            return error.reason
        if stored != STORED:
            self.stats.counts["leases_lost"] += 1
            slow = "invalidated meanwhile, or the load took longer than its lease"
            self.stats.say(
                "a load was not stored", "lease", f"{name[:100]!r}: {slow}", logging.INFO
            )
        return "" if stored == STORED else "lease lost"

    def _pack_or_none(self, name: bytes, value: Any, recipe: Recipe) -> Packed | None:
        """A loaded value ready to be stored, or None if it can't be: its caller has it all the same."""
        if (
            is_unsettled()
        ):  # it may show rows that will be rolled back, and a rollback invalidates nothing
            return None
        try:
            tags = recipe.tags(value)
            return self._pack(name, value, recipe.type, tags, self._source(recipe))
        except (
            Exception
        ) as error:  # too large, no JSON, a tag that is none, a tag function that failed
            self.stats.counts["not_stored"] += 1
            self.stats.say(
                "a loaded value can't be stored", repr(type(error)), f"{name[:100]!r}: {error}"
            )
            return None

    def _source(self, recipe: Recipe) -> bytes:
        """What a worker needs to load this again; nothing where the arguments have no JSON, such as a session."""
        if recipe.loader is None:
            return b""
        try:
            return recipe.loader.source(recipe.values)
        except ValueError as error:
            why = f"its arguments have no JSON: {error}"
            self.stats.say(f"no worker can run {recipe.loader.name}", recipe.loader.name, why)
            return b""

    # Refreshing

    def _ask_for_refreshes(self, stale: Sequence[Stale]) -> Operation[None]:
        """Have a worker load them again: one task for all, once per stale period, for however many readers."""
        if not self.dispatch.ready:
            return
        wanted = [one for one in stale if self._may_ask(one.name, one.entry)]
        held = yield from self._lease_refreshes(wanted)
        leased = [(one, lease) for one, lease in zip(wanted, held, strict=True) if lease]
        orders = [(self._order(one, lease), one.name, lease) for one, lease in leased]
        good = [(order, name, lease) for order, name, lease in orders if order is not None]
        self.stats.counts["refreshes_asked"] += len(good)
        if self.dispatch.inline:
            for order, _, _ in good:
                yield from self._refresh_inline(order)
        elif good:
            leases = [(name, lease) for _, name, lease in good]
            self.dispatch.send([order for order, _, _ in good], partial(self._undelivered, leases))

    def _refresh_inline(self, order: RefreshOrder) -> Operation[None]:
        try:
            yield from self.refresh(order)
        except Exception as error:
            self.stats.say("a refresh failed", order.loader, f"{order.key[:100]!r}: {error!r}")

    def _refresh_here(
        self, name: bytes, entry: Entry, value: Any, recipe: Recipe
    ) -> Operation[Any]:
        """No worker can run this load: the reader with the lease does it; all others are served stale."""
        stale = Stale(name, entry, b"")
        if not self._may_ask(name, entry):
            return value
        (held,) = yield from self._lease_refreshes([stale])
        if held is None:
            return value
        clock = self._judges.clock
        if not clock:  # this process begins anew: the next reader's turn
            yield from self._release([(name, held)])
            return value
        try:
            fresh, _ = yield from self._load_under(name, held, clock, recipe, self._back_off)
        except Exception as error:
            self.stats.say("a refresh failed", "here", f"{name[:100]!r}: {error!r}")
            return value
        return fresh

    def _lease_refreshes(self, stale: Sequence[Stale]) -> Operation[list[bytes | None]]:
        """The refresh leases of these entries, where they could be had. One round trip."""
        if not stale:
            return []
        lease_ms = int(self.settings.refresh_lease * 1000)
        batch = Timed()
        for one in stale:
            keys = [self._keys.lease(one.name), self._keys.entry(one.name)]
            seen = b"1\t%b\t%d\t%d\t" % (one.entry.epoch, one.entry.stamp, one.entry.fresh_until)
            given = (new_token(), lease_ms, seen, IN_TIME, FAILURES_KEPT_MS)
            batch.append(lease_refresh(keys, *given))
        try:
            replies = yield batch
        except RedisUnavailable as error:
            self._fall_back("refresh", error)
            return [None] * len(stale)
        if LATE in replies:
            self._clock.doubt_clock()
        return [held if isinstance(held, bytes) else None for held in replies]

    def _may_ask(self, name: bytes, entry: Entry) -> bool:
        """Whether to try for the refresh lease: once a second per process and stale entry."""
        now = time.monotonic()
        fresh_until, asked_until = self._asked.get(name, (0, 0.0))
        if fresh_until == entry.fresh_until and now < asked_until:
            return False
        if len(self._asked) >= ASKED_LIMIT:
            self._asked.clear()
        self._asked[name] = entry.fresh_until, now + ASK_AGAIN_S
        return True

    def _order(self, stale: Stale, lease: bytes) -> RefreshOrder | None:
        loader, _, args = stale.source.partition(b" ")
        token = lease.split(b".")[1]
        try:
            return RefreshOrder(
                loader=loader.decode(),
                args=json.loads(args),
                key=stale.name.decode(),
                token=token.decode(),
            )
        except ValueError as error:
            self._count_unreadable("source", stale.name, error)
            return None

    def _report(self, order: RefreshOrder, outcome: str) -> dict[str, Any]:
        return {"outcome": outcome, "loader": order.loader, "key": order.key}

    def _undelivered(self, leases: Sequence[tuple[bytes, bytes]]) -> None:
        if self.run_aside is not None:
            self.run_aside(self.undelivered(leases))

    # Leases

    def _release(self, leases: Iterable[tuple[bytes, bytes]]) -> Operation[None]:
        """Free those of these leases (key, value) that are still ours."""
        batch = Freeing([release([self._keys.lease(name)], held) for name, held in leases])
        try:
            if batch:
                yield batch
        except RedisUnavailable as error:
            self._fall_back("release", error)  # they run out by themselves

    def _release_one(self, name: bytes, held: bytes) -> Operation[None]:
        yield from self._release([(name, held)])

    def _back_off(self, name: bytes, held: bytes) -> Operation[None]:
        self.stats.counts["refresh_errors"] += 1
        yield from self._back_off_all([(name, held)])

    def _back_off_all(self, leases: Sequence[tuple[bytes, bytes]]) -> Operation[None]:
        """Nobody is to try these refreshes again for a while."""
        first, longest = int(self.settings.backoff * 1000), int(self.settings.backoff_limit * 1000)
        batch = Freeing()
        for name, held in leases:
            given = (held, first, longest, random.randint(500, 1000), FAILURES_KEPT_MS)
            batch.append(back_off([self._keys.lease(name)], *given))
        try:
            if batch:
                yield batch
        except RedisUnavailable as error:
            self._fall_back("back_off", error)

    # Small things

    def _put(self, name: bytes, packed: Packed, ttl: int, swr: int, epoch: str) -> Command:
        keys = self._writing_keys(name, packed)
        return put(keys, epoch, IN_TIME, name, packed.rest, ttl, ttl + swr)

    def _commit(
        self, name: bytes, held: bytes, clock: bytes, packed: Packed, recipe: Recipe
    ) -> Command:
        epoch, seq = read_clock(clock)
        life = recipe.ttl + recipe.swr
        marks = [b"t:" + tag for tag in packed.tags]
        keys = self._writing_keys(name, packed)
        return commit(keys, held, epoch, seq, name, packed.rest, recipe.ttl, life, *marks)

    def _writing_keys(self, name: bytes, packed: Packed) -> list[bytes]:
        written = [self._keys.entry(name), self._keys.lease(name)]
        decided_by = [self._keys.clock, self._keys.marks]
        return [*written, *decided_by, *map(self._keys.index, packed.tags)]

    def _lease_load(self, name: bytes, lease: bytes, ms: int, *, over: bool = False) -> Command:
        """`over`: take it from an older load."""
        given = (lease, ms, self._new_epoch(), IN_TIME, int(over))
        return lease_load(self._lease_keys(name), *given)

    def _lease_keys(self, name: bytes) -> list[bytes]:
        return [self._keys.lease(name), self._keys.entry(name), self._keys.clock, self._keys.marks]

    def _recipe(self, load: Callable[[], Any], options: KeepOptions) -> Recipe:
        given = several(options.get("tags", ()))
        self._codec.adapter(
            options.get("type", Any)
        )  # a type that is none is told before anything is loaded

        def tags(value: Any) -> list[str]:
            return [t for tag in given for t in (several(tag(value)) if callable(tag) else [tag])]

        ttl, swr = self._times(options)
        lease = int(self.settings.lease * 1000)
        return Recipe(Call(load), options.get("type", Any), ttl, swr, lease, tags)

    def _times(self, options: TimeOptions) -> tuple[int, int]:
        """(ttl, swr) in ms. Raises ValueError."""
        ttl = self._ms("ttl", options.get("ttl"), self.settings.ttl)
        swr = self._ms("swr", options.get("swr"), self.settings.swr)
        if ttl + swr > self.settings.life_limit * 1000:
            limit = f"life_limit allows {self.settings.life_limit:g} s"
            raise ValueError(f"ttl + swr is {(ttl + swr) / 1000:g} s; {limit}")
        return ttl, swr

    def _pack(
        self, name: bytes, value: Any, type: Any, tags: Sequence[str], source: bytes
    ) -> Packed:
        codec, payload = self._codec.encode(value, type)
        names = [sanitized(tag) for tag in tags]
        return Packed(body(codec, source, name, names, payload), names)

    def _ms(self, what: str, seconds: float | None, default: float) -> int:
        if seconds is None:
            seconds = default
        if not 0 <= seconds < float("inf") or (what != "swr" and seconds < 0.001):
            raise ValueError(
                f"{what}={seconds!r}: a number of seconds, {'0 or more' if what == 'swr' else 'from 0.001'}"
            )
        return int(seconds * 1000)

    def _fall_back(self, operation: str, error: RedisUnavailable) -> None:
        self.stats.counts["fallbacks"] += 1
        self.stats.say(f"cache.{operation} went without Redis", error.reason, error)


def new_token() -> bytes:
    return secrets.token_hex(8).encode()


def load_lease(ms: int) -> bytes:
    """What stands under a key's lease while it is loaded: see lua/lib/lease.lua."""
    return b"load.%b.%d" % (new_token(), ms)
