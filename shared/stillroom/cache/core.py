"""The core of the cache: reading, loading, refreshing and writing a value are one conversation with Redis.

body.py puts the other operations beside it, and cache.py gives all of them their two faces.

The invariant everything here serves: **a read that began after an invalidation returned never yields
a value loaded before it.** An entry carries the clock as it was before its load began; marks.py decides.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, overload

from stillroom.cache.arguments import Secrets, Texts
from stillroom.cache.away import Away, Form, Load, Taken
from stillroom.cache.away import Packed as PackedAway
from stillroom.cache.bites import SCRIPTS_AT_ONCE, Bites, in_bites
from stillroom.cache.entry import Corrupt, Entry, Freshness, body, parse
from stillroom.cache.failures import is_of_the_caller
from stillroom.cache.figures import LOOKUPS, LoaderFigures
from stillroom.cache.invalidation import Invalidator
from stillroom.cache.judge import Judge
from stillroom.cache.keeping import Keeper, Keeping, Life, TtlOf, near_of
from stillroom.cache.leases import (
    FAILURES_KEPT_MS,
    Leases,
    load_lease,
    loading,
    new_token,
    refresh_lease,
)
from stillroom.cache.loaders import (
    BadArguments,
    Loader,
    LoaderCall,
    Loaders,
    Recipe,
    TagSpec,
    recipe_of,
    result_of,
    several,
)
from stillroom.cache.marks import read_clock
from stillroom.cache.memo import Memo, Remembered
from stillroom.cache.near import Near, Proof, Store, near_prefix
from stillroom.cache.orders import NotDone
from stillroom.cache.probe import LAG_SUM, lag_bucket
from stillroom.cache.refreshes import Piece
from stillroom.cache.terms import Terms
from stillroom.codec import MISS, Codec, Encoded, Undecodable, Unencodable
from stillroom.dispatch import Dispatch, RefreshOrder
from stillroom.durations import Duration
from stillroom.errors import (
    InvalidArgument,
    LoadShed,
    RedisRefused,
    RedisUnavailable,
    UnknownLoader,
    ValueTooLarge,
    is_in_doubt,
)
from stillroom.fingerprint import fingerprint
from stillroom.keys import Keys, refuse_crowd, sanitized, written
from stillroom.misuse import refuse_awaited, refuse_unfit
from stillroom.operation import Call, Freeing, Once, Operation, Pause, Timed
from stillroom.scripts import (
    claim_refresh,
    commit,
    lease_load,
    lease_refresh,
    put,
    take_place,
    verify_epoch,
)
from stillroom.settings import Settings
from stillroom.shown import message_of, repr_of
from stillroom.stats import Stats
from stillroom.unsettled import is_unsettled
from stillroom.wire import IN_TIME, Clock, Command, leases_of_loads, pack, time_left

T = TypeVar("T")
D = TypeVar("D")

# How a failed load is told: its lease, the error, and commands that go along.
OnFailure: TypeAlias = Callable[
    [Sequence[tuple[bytes, bytes]], BaseException, Sequence[Command]], Operation[None]
]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.05  # between two looks at a load one waits for
ASK_AGAIN_S = 1.0  # a process that could not get a refresh lease does not try for this long
ASKED_LIMIT = 10_000
WON = STORED = 1  # a script's reply when it has acted
LATE = -1  # a script's reply when it arrived after its caller gave up
TAKEN, QUEUED = 1, 0  # the replies of lua/take_place.lua; -2: the queue is full
QUEUE_S = 1.0  # how long a load waits for a place …
QUEUE_MS = 2_000  # … and when a waiter that is gone is forgotten
RETRY_AFTER_S = 1.0
APART_S = 600.0  # how long both places of a key are looked at once another release's value was seen
TRIES = 2  # to put a value
KEY_SHOWN = 100  # bytes of a key in an error
_OUTCOMES = ("hit", "stale", "miss")  # the outcome of a lookup in its event: see LOOKUPS
_FRESH = Freshness.FRESH
STORED_VALUE = "a value that was stored"


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
    """A value ready to be stored: what entry.body makes of it, its tags, and for how long."""

    rest: bytes
    tags: list[bytes]
    life: Life
    release: bytes


class Attempt(NamedTuple):
    """Tell a caller that has found no value how to go on: it loads, takes the result of another load, or waits."""

    clock: bytes | None = None  # the load is ours, and this is the clock before it
    value: Any = MISS  # another load has brought it
    failure: Exception | None = None  # the load that was waited for has failed
    holder: bytes = b""  # the lease of the load that is under way

    @property
    def is_open(self) -> bool:
        return self.clock is None and self.value is MISS and self.failure is None


class Wish(NamedTuple):
    """Describe a read that lets this process keep a copy of the entry."""

    type: Any
    near: float  # seconds
    release: bytes = b""
    prefix: bytes | None = None  # of the loader's keys; None: that of the key
    call: tuple[Any, ...] | None = None  # see near.Store


class Ready(NamedTuple):
    """A value ready to be put under its sanitized key."""

    name: bytes
    packed: Packed


@dataclass(frozen=True, slots=True)
class Means:
    """Hold the parts that a cache is made of. Its shards share them."""

    settings: Settings
    terms: Terms
    dispatch: Dispatch
    stats: Stats
    loaders: Loaders
    copies: Store
    wanted: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # see Calls.wanted


class Place(NamedTuple):
    """Hold the keys, the clock and the driver of a cache or of one of its shards.

    `run_aside` runs an operation where none is running.
    """

    keys: Keys
    clock: Clock
    run_aside: Callable[[Operation[Any]], Any]


class Core:
    """The operations on one value, and the steps that all operations are made of. A driver runs them."""

    def __init__(self, means: Means, place: Place) -> None:
        settings = self.settings = means.settings
        self.terms = means.terms
        self.dispatch = means.dispatch
        self.stats = means.stats
        self.loaders = means.loaders
        self.keys = place.keys
        self.clock = place.clock
        self.now_ms = place.clock.now_ms
        self._run_aside = place.run_aside
        self._memo = Memo(settings, self.stats)
        self.copies = means.copies
        limit = settings.away_limit // settings.shards
        self.away = Away(settings.away_ttl, limit, settings.wait)
        self._invalidator = Invalidator(
            *(settings, self.keys, self.terms, self._memo, self.away),
            *(self.dispatch, self.stats, place.run_aside),
        )
        self._outbox = self._invalidator.outbox
        self._codec = Codec(settings)
        self._keeper = Keeper(settings)
        self._texts = Texts(Secrets(settings))
        self._judges = self._judge_of(settings.marks_limit)
        self.near = Near(
            *(means.copies, self.keys, self.clock, self._judges),
            *(self._memo, self.stats, self._decode, settings.lease_limit),
        )
        self._proving = pack([(b"MGET", self.keys.near, self.keys.clock)])
        # key → which stale entry was asked for, and until when (time.monotonic()) that is enough
        self._asked: dict[bytes, tuple[int, float]] = {}
        self._leases = Leases(settings, self.keys, self.stats, self._fall_back)
        self._apart_until = 0.0  # two releases of the app were seen to be at work; time.monotonic()
        self._figures = LoaderFigures(means.stats)

    # Reading

    @overload
    def get(
        self,
        key: str,
        type: type[T],
        default: None = None,
        *,
        near: bool | Duration | None = None,
    ) -> Operation[T | None]: ...
    @overload
    def get(
        self, key: str, type: type[T], default: D, *, near: bool | Duration | None = None
    ) -> Operation[T | D]: ...
    @overload
    def get(
        self,
        key: str,
        type: Any = ...,
        default: Any = None,
        *,
        near: bool | Duration | None = None,
    ) -> Operation[Any]: ...
    def get(
        self,
        key: str,
        type: Any = Any,
        default: Any = None,
        *,
        near: bool | Duration | None = None,
    ) -> Operation[Any]:
        """Return the value under `key`, or `default` on a miss. A stale value is served and refreshed.

        `near`: this process may keep it, see `cached`.

        Cost: the entry and the clock in one MGET. A value that does not fit `type` is a miss.
        Redis away: `default`, within the call's deadline; counted and logged, never raised.
        """
        name = sanitized(key)
        self._codec.reader(type)  # refuses a value that is no type, on a miss too
        kept_for = None if near is None else near_of(near)
        try:
            if kept_for is None:
                entry, freshness = yield from self._look(name)
            else:
                entry, freshness = yield from self._look_near(name, Wish(type, kept_for))
            value = MISS if entry is None else self._decode(entry, type)
            if value is MISS and entry is not None and entry.release:
                entry, freshness, value = yield from self._look_beside(name, type)
        except RedisUnavailable as error:
            self._fall_back("get", error)
            return default
        self._count(value, freshness)
        if value is MISS or entry is None:
            return default
        if freshness is Freshness.STALE and entry.source:
            shown = None if kept_for is None else self._memo.recall(name, b"")
            yield from self._ask_for_refreshes([Stale(name, entry, entry.source)])
            self._show_again(name, shown)
        return value

    @overload
    def get_entry(self, key: str, type: type[T]) -> Operation[CachedValue[T] | None]: ...
    @overload
    def get_entry(self, key: str, type: Any = ...) -> Operation[CachedValue[Any] | None]: ...
    def get_entry(self, key: str, type: Any = Any) -> Operation[CachedValue[Any] | None]:
        """Return the value with its freshness, tags and loader, or None on a miss. It asks for no refresh.

        Redis away: None.
        """
        name = sanitized(key)
        self._codec.reader(type)
        try:
            entry, freshness = yield from self._look(name)
            value = MISS if entry is None else self._decode(entry, type)
            if value is MISS and entry is not None and entry.release:
                entry, freshness, value = yield from self._look_beside(name, type)
        except RedisUnavailable as error:
            self._fall_back("get_entry", error)
            return None
        if value is MISS or entry is None:
            return None
        return CachedValue(
            value,
            freshness,
            entry.fresh_until / 1000,
            tuple(map(written, entry.tags)),
            entry.loader or None,
        )

    @overload
    def get_or_set(
        self,
        key: str,
        load: Callable[[], Coroutine[Any, Any, T]],
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
        near: bool | Duration | None = None,
    ) -> Operation[T]: ...
    @overload
    def get_or_set(
        self,
        key: str,
        load: Callable[[], T],
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
        near: bool | Duration | None = None,
    ) -> Operation[T]: ...
    def get_or_set(
        self,
        key: str,
        load: Callable[[], Any],
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
        near: bool | Duration | None = None,
    ) -> Operation[Any]:
        """Return the value under `key`, or what `load()` returns, which is then stored.

        One caller loads while all others, in every process, wait for that load. A stale value is served at once,
        except to one caller, which loads the next. (A worker can run registered functions only: see `cached`.) An
        error of `load` reaches its caller. Redis away: loads and returns.

        `ttl`: how long the value is fresh; `swr`: how long after that it is served stale; seconds or a timedelta,
        by default the settings'. `tags`: texts, or functions of the value that give texts, 1,000 at most. `type`:
        what the value is, by default what `load` says it returns. `near`: this process may keep it, see `cached`.
        """
        name = sanitized(key)
        keeping = self._keeper.keeping(ttl, swr, keep, negative_ttl)
        recipe = self.recipe(Call(load), tags, type, keeping)
        return (yield from self.obtain(name, recipe._replace(near=near_of(near))))

    def obtain(
        self,
        name: bytes,
        recipe: Recipe,
        call: tuple[Any, ...] | None = None,
        away: RedisUnavailable | None = None,
    ) -> Operation[Any]:
        """Return the value under a sanitized key, loaded by its recipe if it has to be. `call`: see near.Store.

        `away`: why a look along with other keys has failed. Then there is no other look.
        """
        try:
            if away is not None:
                raise away
            entry, freshness = yield from self._look_for(name, recipe, call)
        except RedisUnavailable as error:
            self._fall_back("get_or_set", error)
            kept = self._kept_near(name, recipe)
            return (yield from self._load_away(name, recipe, error)) if kept is MISS else kept
        decode = self._decode if recipe.near is None else self.near.value
        value = MISS if entry is None else decode(entry, recipe.type)
        self._count(value, freshness, recipe.loader)
        if value is MISS or entry is None:
            asked = self.near.asking()
            value = yield from self._load(name, recipe)
            if recipe.near is not None:
                self._remember_loaded(name, recipe, value, asked)
            return value
        if freshness is Freshness.FRESH or not self._may_ask(name, entry):
            return value
        shown = self._memo.recall(name, recipe.release) if recipe.near is not None else None
        if source := self._source(recipe):
            yield from self._order_refreshes([Stale(name, entry, source)])
        else:
            fresh = yield from self._refresh_here(name, entry, value, recipe)
            value = fresh if shown is None else value
        self._show_again(name, shown)
        return value

    def loader(
        self,
        function: Callable[..., Any],
        key: str,
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
        lease: Duration | None = None,
        **options: Any,
    ) -> Loader:
        """Register a function of the app. The options are those of Cache.cached."""
        keeping = self._keeper.keeping(ttl, swr, keep, negative_ttl)
        for what, given in ("keep", keep), ("ttl", ttl):
            if callable(given):
                refuse_unfit(what, given, None)
        lease_ms = self._keeper.lease(lease)
        loader = Loader(function, key, keeping, lease_ms, self._texts, **options)
        adapter = self._codec.checked(loader.type)
        loader.release_of = partial(fingerprint, loader.type, adapter, loader.version)
        loader.counted_as = self._figures.lookups(loader.name)
        self.loaders.register(loader)
        return loader

    # Writing

    def set(
        self,
        key: str,
        value: Any,
        *,
        ttl: Duration | None = None,
        swr: Duration | None = None,
        tags: Sequence[str] = (),
        type: Any = Any,
    ) -> Operation[bool]:
        """Store a value, and return True when it is stored. It wins over a load of the same key that is under way.

        `ttl`: how long it is fresh; `swr`: how long after that it is served stale; seconds or a timedelta, by
        default the settings'. `tags`: 1,000 at most. `type`: what it is encoded as, by default whatever it is.
        A reader who names no type gets what JSON has: a list for a tuple, text for a date.
        Raises ValueTooLarge, Unencodable, InvalidKey, InvalidArgument.
        Redis away, full or read-only: False; a write that arrives after this returned is refused by the script.
        """
        name = sanitized(key)
        life = self._keeper.life(ttl, swr)
        packed = self._pack(name, value, type, several("tags", tags), b"", life)
        (stored,) = yield from self._put_all("set", [Ready(name, packed)])
        return stored

    def _put_all(self, what: str, values: Sequence[Ready]) -> Operation[list[bool]]:
        """Store these values and return which were stored. Each key fails for itself."""
        stored = [False] * len(values)
        self.away.forget(b"k:" + value.name for value in values)
        if len(values) > SCRIPTS_AT_ONCE:
            yield Pause(0)  # to make so many ready took longer than one call may
        try:
            yield from self._before_writing()
        except RedisUnavailable as error:
            self._fall_back(what, error)
            return stored
        verified_on, left = self._judges.run, list(range(len(values)))
        for _ in range(TRIES):
            epoch = self.terms.new_epoch()
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
        """Return which of these writes to send once more, though they were answered."""
        if verified_on is not None and self._judges.is_unverified:
            # This very call met another run of the server, and its writes are as dead as the epoch they are in.
            try:
                yield from self._judges.verify()
            except RedisUnavailable as error:
                self._fall_back(what, error)
                return []
            return list(replies)
        late = [place for place, reply in replies.items() if reply == LATE]
        if late:  # its answer came in time all the same: the server's clock is not where we thought
            self.clock.doubt_clock()
        return late

    def _each(self, what: str, batch: list[Any]) -> Operation[list[Any]]:
        """Return the replies to a batch in which each command fails for itself: None is a failure.

        It goes in bites. One that there was no time for goes again in smaller ones: what is still on its way is
        refused by then, and what is stored twice is the same.
        """
        replies: list[Any] = []
        bites = Bites(batch, SCRIPTS_AT_ONCE)
        while bites.left:
            yield from bites.turn()
            bite = type(batch)(bites.next())
            try:
                # A loaded value can be loaded again.
                kept_as = "" if isinstance(batch, Freeing) else STORED_VALUE
                replies += yield from self._memo.changing(bite, kept_as)
            except RedisUnavailable as error:
                if bites.again(error) and isinstance(batch, Timed):
                    continue
                self._fall_back(what, error)
                # Of more commands where scripts were loaded.
                told = getattr(error, "replies", None) or ()
                replies += told if len(told) == len(bite) else [None] * len(bite)
            bites.done()
        return [None if isinstance(reply, Exception) else reply for reply in replies]

    # Background work

    def refresh(self, order: RefreshOrder) -> Operation[dict[str, Any]]:
        """Load a stale value again, in a worker. Returns a report: `outcome` and `key`.

        Safe twice, late, and out of order: the lease names the order that may do it.
        Raises UnknownLoader, BadArguments, RedisUnavailable, and what the loader raises.
        """
        name = order.key.encode()
        try:
            recipe = recipe_of(order, self.loaders)
        except (UnknownLoader, BadArguments):
            # Another worker may know it: the lease runs out, and the next stale read asks again.
            self.stats.counts["refresh_errors"] += 1
            self._figures.refresh_failed(order.loader)
            raise
        yield from self.terms.agree()
        claimed = yield from self._claim(order, recipe)
        if claimed is None:
            return self._report(order, "superseded")
        held, clock, entry, freshness, is_anothers = claimed
        if is_anothers:
            # The caller is served its own value until that ends. Another refresh at once would change nothing.
            yield from self._leases.back_off([(name, held)])
            return self._report(order, "another release's")
        if entry is None or freshness is not Freshness.STALE:
            # Fresh again, or gone: then its next reader loads it.
            yield from self._leases.release([(name, held)])
            return self._report(order, "not needed")
        try:
            lost = yield from self._load_ordered(
                name, held, clock, recipe, self._leases.refresh_failed
            )
        except Exception as error:
            if not isinstance(error, LoadShed):
                self._figures.refresh_failed(recipe.name)
            raise
        if not lost:
            self._count_refresh(entry, recipe)
        return self._report(order, lost or "refreshed")

    def refresh_piece(self, piece: Piece) -> Operation[None]:
        """Do one piece of a message's refreshes: see Refreshes, which is told how its orders have ended.

        Raises nothing but what interrupts it.
        """
        yield from piece.run(self.refresh)

    def _claim(self, order: RefreshOrder, recipe: Recipe) -> Operation[tuple[Any, ...] | None]:
        """Claim a refresh. Return its lease, the clock, the entry and how fresh it is, and whether there is only
        another release's; None if the lease is another's.
        """
        name, known, held = order.key.encode(), self._judges.marks.synced, b""
        given = order.token, recipe.lease, self.terms.new_epoch()
        try:
            (claimed,) = yield Once([claim_refresh(self._lease_keys(name), *given)])
            if claimed is None:
                return None
            held, clock, first, other = claimed
            own = self._own(first, other, name, recipe.release)
            entry, freshness = yield from self._judge_own(own, clock, known)
        except GeneratorExit:
            raise
        except BaseException as error:  # if its reply is lost, the lease may be ours all the same
            if held or is_in_doubt(error):
                yield from self._leases.release([(name, held or refresh_lease(order.token))])
            raise
        return held, clock, entry, freshness, own is None and first is not None

    def _count_refresh(self, entry: Entry, recipe: Recipe) -> None:
        """Count a refresh, and how long the entry had been stale. After a soft invalidation there is no lag."""
        self.stats.counts["refreshes_done"] += 1
        lag_ms = self.now_ms() - entry.fresh_until
        self._figures.refreshed(recipe.name, lag_ms)
        if lag_ms > 0:
            self.stats.counts[lag_bucket(lag_ms / 1000)] += 1
            self.stats.counts[LAG_SUM] += lag_ms

    def load(self, order: LoaderCall) -> Operation[dict[str, Any]]:
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
        try:
            (reply,) = yield takes
            if reply[0] == LATE:
                self.clock.doubt_clock()
                (reply,) = yield takes
        except GeneratorExit:
            raise
        except BaseException:  # see _try_lease
            yield from self._leases.release([(name, lease)])
            raise
        if reply[0] != WON:
            return {"outcome": "too late", "loader": order.loader, "key": key}
        lost = yield from self._load_ordered(
            name, lease, reply[1], recipe, self._leases.load_failed
        )
        if not lost:
            yield from self._memo.changing([self._invalidator.naming([name])])
        return {"outcome": lost or "loaded", "loader": order.loader, "key": key}

    def undelivered(self, leases: Sequence[tuple[bytes, bytes]]) -> Operation[None]:
        """Note that refreshes could not be sent: free their leases, and let the next stale read ask again."""
        self.stats.counts["refreshes_undelivered"] += len(leases)
        for name, _ in leases:
            self._asked.pop(name, None)
        yield from self._leases.release(leases)

    def forget_asked(self) -> None:
        """Ask again for refreshes that were asked for, and keep nothing: a test has moved the clock."""
        self._asked.clear()
        self.away.clear()
        self.near.store.forget(self.near)
        self._memo.changed()

    def flush_stats(self) -> Operation[None]:
        """Write the counts of this process down now. Redis away: they are lost."""
        if counts := self.stats.flush(self.now_ms(), self.keys):
            try:
                yield Once(counts)
            except RedisUnavailable as error:
                self._fall_back("flush_stats", error)

    # Looking

    def _judge_of(self, limit: int) -> Judge:
        """Return a judge without any marks that will remember up to this many."""

        def verifying(epoch: bytes, seq: int) -> Operation[Command]:
            yield from self.terms.agree_anew()
            keys = self.keys.clock, self.keys.marks, self.keys.globs, self.keys.todo
            given = (self.terms.new_epoch(), self.terms.keep_ms, epoch, seq)
            return verify_epoch(keys, *given)

        return Judge(self.keys, self.clock, limit, verifying)

    def _before_writing(self) -> Operation[None]:
        """Exchange with Redis what a write needs: what this process knows, and whether and into which
        epoch it may write.
        """
        if self._outbox.waiting:
            yield from self._invalidator.deliver()
        if self._leases.owed:
            yield from self._leases.free_owed()
        yield from self.terms.agree()
        if self._judges.is_unverified:
            yield from self._judges.verify()

    def _look_once(self, name: bytes, release: bytes) -> Operation[tuple[Entry | None, Freshness]]:
        """Return what `_look` returns, asked for once in a request: see memo.py."""
        if (known := self._memo.recall(name, release)) is not None:
            return known.entry, known.freshness
        asked = self.near.asking()
        entry, freshness = yield from self._look(name, release)
        self._remember(name, entry, freshness, asked)
        return entry, freshness

    def _remember(
        self, name: bytes, entry: Entry | None, freshness: Freshness, asked: Proof
    ) -> None:
        if entry is not None:
            self._memo.remember(name, Remembered(entry, freshness, asked.changes, asked.asked))

    def _show_again(self, name: bytes, shown: Remembered | None) -> None:
        """Let this request read again what it was shown, though the value has been refreshed, perhaps by itself."""
        if shown is not None:
            self._memo.remember(name, shown)

    def _remember_loaded(self, name: bytes, recipe: Recipe, value: Any, asked: Proof) -> None:
        """Let this request read again the value that it loaded or was served."""
        if time_left() is None or is_unsettled():
            return
        try:
            encoded = self._codec.encoded(value, recipe.type)
        except Exception:  # a value without bytes is loaded each time
            return
        codec = b"%b:%b" % (encoded.codec, recipe.release) if recipe.release else encoded.codec
        entry = Entry(b"", 0, 0, codec, b"", name, [], encoded.payload)
        self._remember(name, entry, Freshness.FRESH, asked)

    def _look_near(self, name: bytes, wish: Wish) -> Operation[tuple[Entry | None, Freshness]]:
        """Return what `_look` returns, from this process's copy if that is proven: see near.py."""
        near, release = self.near, wish.release
        if not wish.near and not near.is_in_request():
            return (yield from self._look(name, release))
        if (known := self._memo.recall(name, release)) is not None:
            return known.entry, known.freshness
        copy = near.store.of_name(near, name)
        if copy is not None and copy.entry.release in (release, b""):
            kept = near.usable(copy, wish.near, release)
            if kept is None and near.may_be_alive(copy):
                yield from self.prove()
                kept = near.usable(copy, wish.near, release)
            if kept is not None:
                if wish.call is not None and copy.type is wish.type:
                    near.store.name(copy, wish.call)
                return kept, Freshness.FRESH
        return (yield from self._look_to_keep(name, wish))

    def _look_to_keep(self, name: bytes, wish: Wish) -> Operation[tuple[Entry | None, Freshness]]:
        """Look, and keep a copy of the entry."""
        near, release = self.near, wish.release
        try:
            yield from near.joining(wish.prefix if wish.prefix is not None else near_prefix(name))
        except RedisRefused as error:  # by a replica, say: an unregistered copy must not be kept
            self.stats.say("no copies are kept", error.reason, error)
            return (yield from self._look_once(name, release))
        asked, known = near.asking(), self._judges.marks.synced
        places = self.keys.entry(name), self.keys.near
        raw, registry, clock = yield from self._read(
            (b"MGET", *places, self.keys.clock), known, is_near=True
        )
        entry, freshness = yield from self._judge(raw, name, clock, known)
        is_anothers = entry is None and raw is not None and self._is_anothers(raw, name, release)
        if is_anothers or (entry and release and entry.release not in (release, b"")):
            entry, freshness = yield from self._look_at_both(name, release)
            self._remember(name, entry, freshness, asked)
            return entry, freshness
        seq = yield from self._learn_if_there(asked, registry, clock, known)
        if entry is not None and seq and freshness is Freshness.FRESH:
            near.keep(entry, wish.type, asked, seq, registry, wish.call)
        self._remember(name, entry, freshness, asked)
        return entry, freshness

    def prove(self) -> Operation[None]:
        """Have all that this process keeps proved by one look at the clock. Redis away: nothing is proved."""
        if not len(self.near.store):
            return
        asked, known = self.near.asking(), self._judges.marks.synced
        try:
            registry, clock = yield from self._read(self._proving, known, is_near=True)
            yield from self.near.learn(asked, registry, clock, known)
        except RedisUnavailable as error:
            self._fall_back("prove", error)

    def proofs(self) -> list[tuple[int, Operation[None]]]:
        """Return the operation that proves all copies of this process, with the number of its shard."""
        return [(0, self.prove())] if len(self.copies) else []

    def _learn_if_there(
        self, asked: Proof, registry: bytes | None, clock: bytes | None, known: int
    ) -> Operation[int]:
        try:
            return (yield from self.near.learn(asked, registry, clock, known))
        except RedisUnavailable as error:  # the value that was read is right all the same
            self._fall_back("learn", error)
            return 0

    def _look(self, name: bytes, release: bytes = b"") -> Operation[tuple[Entry | None, Freshness]]:
        """Return the living entry and its freshness, or (None, DEAD), in one round trip while the clock stands.

        With a `release` another release's value does not count, and the key's other place is read.
        """
        known = self._judges.marks.synced
        if self._apart_until and time.monotonic() < self._apart_until:
            return (yield from self._look_at_both(name, release))
        raw, clock = yield from self._read((b"MGET", self.keys.entry(name), self.keys.clock), known)
        entry, freshness = self._judge_at_once(raw, name, clock)
        if freshness is None:
            entry, freshness = yield from self._judge(raw, name, clock, known)
        if entry is None:
            if raw is None or not self._is_anothers(raw, name, release):
                return None, Freshness.DEAD
        elif not release or entry.codec[2:] in (release, b""):
            return entry, freshness
        return (yield from self._look_at_both(name, release))

    def _is_anothers(self, raw: bytes, name: bytes, release: bytes) -> bool:
        """Return whether a dead entry is another release's, so that the key's other place may have a living one."""
        with contextlib.suppress(Corrupt):
            return parse(raw, name).release not in (release, b"")
        return False

    def _look_at_both(
        self, name: bytes, release: bytes
    ) -> Operation[tuple[Entry | None, Freshness]]:
        """Look at both places of a key in one round trip, while two releases of the app are at work."""
        known = self._judges.marks.synced
        keys = self.keys.entry(name), self.keys.other(name)
        first, other, clock = yield from self._read((b"MGET", *keys, self.keys.clock), known)
        own = self._own(first, other, name, release)
        is_beside = own is not None and own.is_beside
        if is_beside or (own is None and first is not None):
            self._apart_until = time.monotonic() + APART_S
        entry, freshness = yield from self._judge_own(own, clock, known)
        if entry is None and own is not None and not is_beside and not release:
            return (yield from self._judge(other, name, clock, known, True))
        return entry, freshness

    def _own(
        self, first: bytes | None, other: bytes | None, name: bytes, release: bytes
    ) -> Entry | None:
        """Return this release's entry in a key's two places."""
        entry = self._parsed(first, name) if first is not None else None
        if entry is not None and (not release or entry.release in (release, b"")):
            return entry
        beside = self._parsed(other, name) if other is not None else None
        if beside is not None and (not release or beside.release == release):
            return beside._replace(is_beside=True)
        return None

    def _look_beside(
        self, name: bytes, type: Any
    ) -> Operation[tuple[Entry | None, Freshness, Any]]:
        """Return entry, freshness and value for a reader whom the other release's entry does not fit."""
        self._apart_until = time.monotonic() + APART_S
        known = self._judges.marks.synced
        raw, clock = yield from self._read((b"MGET", self.keys.other(name), self.keys.clock), known)
        entry, freshness = yield from self._judge(raw, name, clock, known, True)
        value = MISS if entry is None else self._decode(entry, type)
        return entry, freshness, value

    def _look_for(
        self, name: bytes, recipe: Recipe, call: tuple[Any, ...] | None
    ) -> Operation[tuple[Entry | None, Freshness]]:
        """Return what `_look` returns, in the way that the recipe's loader wants."""
        if recipe.near is not None:
            return self._look_near(name, _wish(recipe, call))
        return (self._look if recipe.is_plain else self._look_once)(name, recipe.release)

    def _kept_near(self, name: bytes, recipe: Recipe) -> Any:
        """Return this process's copy, where the app lets it be served while Redis is away, or MISS."""
        if recipe.near is None or not self.settings.near_away:
            return MISS
        kept = self.near.away(name, recipe.release, self.settings.near_away)
        return MISS if kept is None else self._decode(kept, recipe.type)

    def _read(self, asked: Command, known: int, *, is_near: bool = False) -> Operation[Any]:
        """Send an MGET whose last key is the clock, with all riders. → what was found.

        With `is_near` the names of changed keys are read too where the clock has moved.
        """
        # No read is trusted before Redis has this process's invalidations.
        if self._outbox.waiting:
            yield from self._invalidator.deliver()
        now = time.monotonic()
        batch: list[Command] = [asked]
        named = self.near.synced if is_near else None
        if riding := self._judges.rides() and known:
            batch += self._news_since(known, named)
        if now > self.stats.due:
            self.clock.ask_time()
            if counted := self.stats.flush(self.now_ms(), self.keys):
                batch = Once([*batch, *counted])
        try:
            replies = yield batch
        except RedisRefused as refused:
            # A server that is full refuses to count, not to read.
            if not refused.replies or isinstance(refused.replies[0], Exception):
                raise
            replies = refused.replies
        found = replies[0]
        if riding:
            self._learn_news(known, named, found[-1], replies[1:4])
        elif named is not None and known and found[-1] != self._judges.marks.clock:
            self._learn_news(known, named, found[-1], (yield self._news_since(known, named)))
        return found

    def _news_since(self, known: int, named: int | None) -> list[Command]:
        """Return the commands that bring the marks since `known`, and the names of changed keys since `named`."""
        marks = self._judges.marks_since(known)
        return [marks] if named is None else [marks, *self.near.names_since(named)]

    def _learn_news(
        self, known: int, named: int | None, clock: bytes | None, replies: Sequence[Any]
    ) -> None:
        """Take in what `_news_since` was answered with, as far as it was: the rest is asked for again."""
        if clock == self._judges.marks.clock and (named is None or named >= known):
            return
        marks, names = replies[0], replies[1:]
        if isinstance(marks, Exception):
            return
        self._judges.learn(known, marks, (), clock)
        if named is not None and not any(isinstance(reply, Exception) for reply in names):
            self.near.learn_names(named, clock, *names)

    def _judge_at_once(
        self, raw: bytes | None, name: bytes, clock: bytes | None
    ) -> tuple[Entry | None, Freshness | None]:
        """Return (the living entry, its freshness), (None, DEAD), or (entry, None) where marks have to
        be asked for.
        """
        entry = self._parsed(raw, name) if raw is not None else None
        if entry is None:
            return None, Freshness.DEAD
        freshness = self._judges.at_once(entry, clock)
        return (None if freshness is Freshness.DEAD else entry), freshness

    def _judge(
        self,
        raw: bytes | None,
        name: bytes,
        clock: bytes | None,
        known: int,
        is_beside: bool = False,
    ) -> Operation[tuple[Entry | None, Freshness]]:
        """Judge after asking for marks. `known` is how far this process knew before it read the entries."""
        entry = self._parsed(raw, name) if raw is not None else None
        if entry is not None and is_beside:
            entry = entry._replace(is_beside=True)
        return self._judge_own(entry, clock, known)

    def _judge_own(
        self, entry: Entry | None, clock: bytes | None, known: int
    ) -> Operation[tuple[Entry | None, Freshness]]:
        freshness = Freshness.DEAD if entry is None else self._judges.at_once(entry, clock)
        if entry is not None and freshness is None:
            (freshness,) = yield from self._judges.settle([entry], clock, known)
        if freshness is None or freshness is Freshness.DEAD:
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

    def _count_unreadable(self, what: str, name: bytes, error: Exception) -> None:
        self.stats.counts["decode_errors"] += 1
        self.stats.say(f"unreadable {what}, a miss", what, f"{name[:100]!r}: {error}")

    def _count(self, value: Any, freshness: Freshness, loader: Loader | None = None) -> None:
        """Count a lookup of this kind, and one of its loader. This runs on every hit."""
        stats = self.stats
        place = 2 if value is MISS else int(freshness is not _FRESH)
        stats.counts[LOOKUPS[place]] += 1
        if loader is not None:
            stats.counts[loader.counted_as[place]] += 1
        if stats.watch is not None:
            stats.watch.note(_OUTCOMES[place], loader.name if loader else "")

    # Loading

    def _load(self, name: bytes, recipe: Recipe) -> Operation[Any]:
        """Load, or wait for the caller who does. Raises the error of a load that this caller waited for."""
        lease = load_lease(recipe.lease)
        try:
            attempt = yield from self._await_turn(name, lease, recipe)
        except RedisUnavailable as error:
            self._fall_back("get_or_set", error)
            return (yield from self._load_away(name, recipe, error))
        if attempt.failure is not None:
            raise attempt.failure
        if attempt.value is not MISS:
            return attempt.value
        if attempt.clock is None:
            if attempt.holder in leases_of_loads():
                self.stats.say(
                    "a load asks for its own key; loading without storing",
                    *("own", f"{name[:100]!r}"),
                )
                return (yield from self._load_for_myself(recipe))
            if recipe.at_once:
                raise LoadShed(recipe.name, recipe.at_once, RETRY_AFTER_S)
            self.stats.say(
                "gave up waiting for another caller's load; loading without storing",
                *("wait", f"{name[:100]!r}"),
            )
            return (yield from self._load_for_myself(recipe))
        value, _ = yield from self._load_under(
            name, lease, attempt.clock, recipe, self._leases.load_failed
        )
        return value

    def _await_turn(self, name: bytes, lease: bytes, recipe: Recipe) -> Operation[Attempt]:
        """Wait until the load is ours, or another's is done: its value, or its failure, is everybody's who waited.

        Whoever waits reads again and decides again: a value whose load began before an invalidation is as dead
        for those who were waiting for it as for everybody else.
        """
        patience = time.monotonic() + self.settings.wait
        pause = FIRST_PAUSE_S
        waited_for: dict[bytes, None] = {}
        attempt = yield from self._try_lease(name, lease, recipe)
        while attempt.is_open and time.monotonic() < patience:
            if attempt.holder in leases_of_loads():
                return attempt  # it would wait for itself
            waited_for[attempt.holder] = None
            yield Pause(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 1.5, LONGEST_PAUSE_S)
            attempt = yield from self._look_again(name, recipe, waited_for.keys())
            if attempt.is_open and not attempt.holder:
                attempt = yield from self._try_lease(name, lease, recipe)
        return attempt

    def _look_again(
        self, name: bytes, recipe: Recipe, waited_for: AbstractSet[bytes]
    ) -> Operation[Attempt]:
        """Return what became of the load that this caller waits for."""
        if self._leases.owed:
            yield from self._leases.free_owed()
        known = self._judges.marks.synced
        written = self.keys.entry(name), self.keys.other(name), self.keys.clock
        told = self.keys.lease(name), self.keys.failure(name)
        ((first, other, clock, holder, failure),) = yield [(b"MGET", *written, *told)]
        own = self._own(first, other, name, recipe.release)
        entry, _ = yield from self._judge_own(own, clock, known)
        value = MISS if entry is None else self._decode(entry, recipe.type)
        if value is not MISS:
            return Attempt(value=value)
        failed = self._leases.failures.of(failure, waited_for, recipe.name) if failure else None
        return Attempt(failure=failed, holder=loading(holder))

    def _try_lease(self, name: bytes, lease: bytes, recipe: Recipe) -> Operation[Attempt]:
        """Try to take the lease. There may be a value by now, stored by another load since we looked."""
        known = self._judges.marks.synced
        try:
            yield from self._before_writing()
            (reply,) = yield Timed([self._lease_load(name, lease, recipe.lease)])
            if reply[0] == LATE:
                self.clock.doubt_clock()
            if reply[0] != WON:
                return Attempt(holder=reply[1] if len(reply) > 1 else b"")
            _, clock, first, foreign, other = reply
            if foreign:
                self._count_unreadable("key", name, ValueError("not a string"))
            own = self._own(first, other, name, recipe.release)
            entry, _ = yield from self._judge_own(own, clock, known)
        except GeneratorExit:
            raise
        except BaseException:
            # Timed out or cancelled in the middle: the lease may be ours all the same.
            yield from self._leases.release([(name, lease)])
            raise
        if entry is None or (value := self._decode(entry, recipe.type)) is MISS:
            return Attempt(clock=clock)
        yield from self._leases.release([(name, lease)])
        return Attempt(value=value)

    def _load_away(self, name: bytes, recipe: Recipe, error: RedisUnavailable) -> Operation[Any]:
        """Return the value while Redis is away: see away.py."""

        def load(_: list[bytes], leases: Sequence[bytes]) -> Operation[Mapping[bytes, Any]]:
            return {name: (yield from self._call(recipe, recipe.loading(*leases)))}

        values = yield from self._obtain_away([name], load, recipe, error)
        if name not in values:  # a load of many keys, which was waited for, has found none
            return (yield from self._load_for_myself(recipe))
        return values[name]

    def _obtain_away(
        self, names: Sequence[bytes], load: Load, recipe: Recipe, error: RedisUnavailable
    ) -> Operation[dict[bytes, Any]]:
        def take(name: bytes, value: Any) -> Taken:
            return self._taken_away(name, value, recipe)

        def unpack(name: bytes, raw: bytes) -> Any:
            entry = self._parsed(raw, name)
            if entry is None or entry.release not in (recipe.release, b""):
                return MISS
            return self._decode(entry, recipe.type)

        breaker = self.stats.breaker
        is_open = error.reason == "breaker" or (breaker is not None and breaker.is_open)
        return (yield from self.away.obtain(names, load, Form(take, unpack), is_open=is_open))

    def _taken_away(self, name: bytes, value: Any, recipe: Recipe) -> Taken:
        """Keep a value that was loaded while Redis is away. A value not to be kept still serves the waiters."""
        packed, back = self._pack_loaded(name, value, recipe)
        if packed is None:
            try:
                encoded = self._codec.encoded(value, recipe.type)
                packed = self._packed(name, encoded, (), b"", Life(0, 0), recipe.release)
            except Exception:  # it was told why
                return Taken(None, back)
        kept = PackedAway(b"1\t0\t0\t0\t" + packed.rest, packed.tags, packed.life.ttl / 1000)
        return Taken(kept, back)

    def _load_for_myself(self, recipe: Recipe) -> Operation[Any]:
        """Load without storing, because no lease says that the value may still be stored."""
        value = yield from self._call(recipe, recipe.loading())
        return self._as_read(value, recipe)

    def _call(self, recipe: Recipe, call: Call) -> Operation[Any]:
        """Call the loader, and count its outcome and time."""
        began, watch = time.monotonic(), self.stats.watch
        try:
            if watch is None:
                value = yield call
            else:
                with watch.event("load", recipe.name, recipe.name):
                    value = yield call
        except GeneratorExit:
            raise
        except BaseException as error:
            self.stats.counts["load_errors"] += 1
            self._figures.failed(recipe.name, time.monotonic() - began, error)
            raise
        self.stats.counts["loads"] += 1
        self._figures.loaded(recipe.name, time.monotonic() - began)
        return value

    def _load_under(
        self,
        name: bytes,
        held: bytes,
        clock: bytes,
        recipe: Recipe,
        on_failure: OnFailure,
    ) -> Operation[tuple[Any, str]]:
        """Load under a lease and store.

        Return (the value as a reader gets it, why it was not stored or nothing).
        """
        leaving = self._leaving(held, recipe)
        try:
            if recipe.at_once:
                yield from self._take_place(name, held, recipe)
            value = yield from self._call(recipe, recipe.loading(held))
            packed, back = self._pack_loaded(name, value, recipe)
        except GeneratorExit:
            raise
        except BaseException as error:
            if isinstance(error, LoadShed):
                self.stats.counts["loads_shed"] += 1
            yield from on_failure([(name, held)], error, leaving)
            raise
        return back, (yield from self._store(name, held, clock, packed, leaving))

    def _load_ordered(
        self, name: bytes, held: bytes, clock: bytes, recipe: Recipe, on_failure: OnFailure
    ) -> Operation[str]:
        """Load under a lease and store, in a worker. Return why the value was not stored, or nothing.

        Raises what the loader raises. Where its own Redis is away that is a failed load: this cache's is not away.
        """
        try:
            _, lost = yield from self._load_under(name, held, clock, recipe, on_failure)
        except RedisUnavailable as error:
            raise NotDone(f"{recipe.name} raised {type(error).__name__}: {error}") from error
        return lost

    def _take_place(self, name: bytes, held: bytes, recipe: Recipe) -> Operation[None]:
        """Wait for one of this loader's places. Raises LoadShed where too many callers wait.

        A load of the same loader that waits for this one has a place already. This one would wait for it in vain.
        """
        keys = [*self.keys.places(recipe.name), self.keys.lease(name)]
        outer = leases_of_loads()
        patience = time.monotonic() + QUEUE_S
        taken = QUEUED
        try:
            while taken in (QUEUED, LATE) and time.monotonic() < patience:
                given = held, recipe.at_once, recipe.lease, QUEUE_MS, IN_TIME
                (taken,) = yield Timed([take_place(keys, *given, *outer)])
                if taken == LATE:
                    self.clock.doubt_clock()
                elif taken == QUEUED:
                    yield Pause(LONGEST_PAUSE_S * random.uniform(0.5, 1.5))
        except RedisUnavailable as error:
            self._fall_back("take_place", error)
            return
        if taken != TAKEN:
            raise LoadShed(recipe.name, recipe.at_once, RETRY_AFTER_S)

    def _leaving(self, held: bytes, recipe: Recipe) -> list[Command]:
        """Return the commands that give back a load's place, or its place in the queue."""
        if not recipe.at_once:
            return []
        return [(b"ZREM", key, held) for key in self.keys.places(recipe.name)]

    def _store(
        self,
        name: bytes,
        held: bytes,
        clock: bytes,
        packed: Packed | None,
        leaving: Sequence[Command],
    ) -> Operation[str]:
        """Commit, if the lease is still ours. The caller has its value either way. Return why not, or nothing."""
        if packed is None:
            yield from self._leases.release([(name, held)], leaving)
            return "not kept"
        try:
            commits = Freeing([self._commit(name, held, clock, packed), *leaving])
            stored, *_ = yield commits
            self._memo.forget(name)  # a request that has seen the new value never sees the old one
            self.near.forget(name)
        except RedisUnavailable as error:
            self._fall_back("store", error)
            self._leases.owe([(name, held)], leaving)
            return error.reason
        except BaseException:  # interrupted on its way
            self._leases.owe([(name, held)], leaving)
            raise
        if stored != STORED:
            self.stats.counts["leases_lost"] += 1
            slow = "invalidated meanwhile, or the load took longer than its lease"
            self.stats.say(
                "a load was not stored", "lease", f"{name[:100]!r}: {slow}", logging.INFO
            )
        return "" if stored == STORED else "lease lost"

    def _pack_loaded(self, name: bytes, value: Any, recipe: Recipe) -> tuple[Packed | None, Any]:
        """Return (a loaded value ready to be stored or None, the value as a reader gets it).

        A value that cannot be kept is returned to its caller all the same.
        """
        back = value
        try:
            life = recipe.keeping.life_of(value)
            encoded = self._codec.encoded(value, recipe.type)
            back = encoded.back
            # A load in a transaction may show rows that will be rolled back, and a rollback invalidates nothing.
            if life is None or is_unsettled():
                return None, back
            tags, source = recipe.tags(value), self._source(recipe)
            return self._packed(name, encoded, tags, source, life, recipe.release), back
        except Exception as error:  # too large, no JSON, a tag that is none, a function that failed
            if is_of_the_caller(error):
                raise
            self._count_not_kept(recipe.name)
            self.stats.say(
                "a loaded value can't be kept",
                recipe.name,
                f"{name[:100]!r}: {recipe.name}: {message_of(error)}",
            )
            return None, back

    def _as_read(self, value: Any, recipe: Recipe) -> Any:
        """Return a loaded value as a reader would get it from the cache."""
        try:
            return self._codec.encoded(value, recipe.type).back
        except Exception:
            return value

    def _count_not_kept(self, loader: str) -> None:
        self.stats.counts["not_stored"] += 1
        self._figures.not_kept(loader)

    def _source(self, recipe: Recipe) -> bytes:
        """Return what a worker needs to load this again, or nothing where the arguments have no JSON form."""
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
        """Order refreshes from a worker, once in each stale period, however many readers ask."""
        return self._order_refreshes([one for one in stale if self._may_ask(one.name, one.entry)])

    def _order_refreshes(self, stale: Sequence[Stale]) -> Operation[None]:
        """Order those of which no other process holds the lease, in one task. See _may_ask."""
        if not stale or not self.dispatch.ready:
            return
        held = yield from self.lease_refreshes(stale)
        leased = [(one, lease) for one, lease in zip(stale, held, strict=True) if lease]
        orders = [(self.order_of(one, lease), one.name, lease) for one, lease in leased]
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
            if is_of_the_caller(error):
                raise
            self.stats.say(
                "a refresh failed", order.loader, f"{order.key[:100]!r}: {repr_of(error)}"
            )

    def _refresh_here(
        self, name: bytes, entry: Entry, value: Any, recipe: Recipe
    ) -> Operation[Any]:
        """Refresh in the reader with the lease, because no worker can. Other readers are served the stale value."""
        (held,) = yield from self.lease_refreshes([Stale(name, entry, b"")])
        if held is None:
            return value
        clock = self._judges.marks.clock
        if not clock:  # this process begins anew: the next reader's turn
            yield from self._leases.release([(name, held)])
            return value
        try:
            fresh, _ = yield from self._load_under(
                name, held, clock, recipe, self._leases.refresh_failed
            )
        except Exception as error:
            if is_of_the_caller(error):
                raise
            self.stats.say("a refresh failed", "here", f"{name[:100]!r}: {repr_of(error)}")
            return value
        return fresh

    def lease_refreshes(self, stale: Sequence[Stale]) -> Operation[list[bytes | None]]:
        """Return the refresh leases of these entries, where they could be had. One round trip."""
        if not stale:
            return []
        lease_ms = int(self.settings.refresh_lease * 1000)
        batch = Timed()
        tokens = [new_token() for _ in stale]
        for one, token in zip(stale, tokens, strict=True):
            place = self.keys.other if one.entry.is_beside else self.keys.entry
            keys = [self.keys.lease(one.name), place(one.name)]
            seen = b"1\t%b\t%d\t%d\t" % (one.entry.epoch, one.entry.stamp, one.entry.fresh_until)
            given = (token, lease_ms, seen, IN_TIME, FAILURES_KEPT_MS)
            batch.append(lease_refresh(keys, *given))
        try:
            replies = yield from in_bites(batch)
        except BaseException as error:  # some may be ours all the same
            begins = [b"refresh.%b." % token for token in tokens]
            self._leases.owe(zip((one.name for one in stale), begins, strict=True))
            if not isinstance(error, RedisUnavailable):
                raise
            self._fall_back("refresh", error)
            return [None] * len(stale)
        if LATE in replies:
            self.clock.doubt_clock()
        return [held if isinstance(held, bytes) else None for held in replies]

    def _may_ask(self, name: bytes, entry: Entry) -> bool:
        """Return whether to try for the refresh lease now: once a second for each process and stale entry."""
        now = time.monotonic()
        fresh_until, asked_until = self._asked.get(name, (0, 0.0))
        if fresh_until == entry.fresh_until and now < asked_until:
            return False
        if len(self._asked) >= ASKED_LIMIT:
            self._asked.clear()
        self._asked[name] = entry.fresh_until, now + ASK_AGAIN_S
        return True

    def order_of(self, stale: Stale, lease: bytes) -> RefreshOrder | None:
        loader, _, args = stale.source.partition(b" ")
        token = lease.split(b".")[1]
        try:
            return RefreshOrder(
                loader=loader.decode(),
                args=json.loads(args),
                key=stale.name.decode(),
                token=token.decode(),
            )
        except (ValueError, RecursionError) as error:
            self._count_unreadable("source", stale.name, error)
            return None

    def _report(self, order: RefreshOrder, outcome: str) -> dict[str, Any]:
        return {"outcome": outcome, "loader": order.loader, "key": written(order.key.encode())}

    def _undelivered(self, leases: Sequence[tuple[bytes, bytes]]) -> None:
        self._run_aside(self.undelivered(leases))

    # Small things

    def _put(self, name: bytes, packed: Packed, epoch: str) -> Command:
        keys, life = self._writing_keys(name, packed), packed.life
        return put(keys, epoch, IN_TIME, name, packed.rest, life.ttl, life.whole)

    def _commit(self, name: bytes, held: bytes, clock: bytes, packed: Packed) -> Command:
        epoch, seq = read_clock(clock)
        marks = [b"t:" + tag for tag in packed.tags]
        keys, life = self._writing_keys(name, packed, ()), packed.life
        times = life.ttl, life.whole
        return commit(keys, held, epoch, seq, name, packed.rest, *times, packed.release, *marks)

    def _writing_keys(
        self, name: bytes, packed: Packed, near: Sequence[bytes] | None = None
    ) -> list[bytes]:
        """Return the KEYS of a write.

        `near` is by default the keys by which processes with copies learn of a change.
        """
        near = (self.keys.near, self.keys.named) if near is None else near
        written = [self.keys.entry(name), self.keys.lease(name)]
        others = [self.keys.clock, self.keys.marks, self.keys.other(name)]
        return [*written, *others, *near, *map(self.keys.index, packed.tags)]

    def _lease_load(self, name: bytes, lease: bytes, ms: int, *, over: bool = False) -> Command:
        """Lease a load; with `over` the lease is taken from an older load."""
        given = (lease, ms, self.terms.new_epoch(), IN_TIME, int(over))
        return lease_load(self._lease_keys(name), *given)

    def _lease_keys(self, name: bytes) -> list[bytes]:
        places = self.keys.entry(name), self.keys.other(name)
        return [self.keys.lease(name), places[0], self.keys.clock, self.keys.marks, places[1]]

    def recipe(
        self,
        call: Call,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keeping: Keeping | None = None,
    ) -> Recipe:
        """Return the recipe of a value that comes from calling a function which is not registered as a loader.

        `keeping`: by default the settings'.
        """
        if not callable(call.function):
            raise InvalidArgument(
                f"load={call.function!r:.100}: a function; what it returns is kept"
            )
        given, kind = several("tags", tags), result_of(call.function) if type is None else type
        refuse_crowd(given)
        if any(map(callable, given)):
            refuse_awaited("tags", *given)
        self._codec.checked(kind)  # a type that is none is told before anything is loaded

        def tags_of(value: Any) -> list[str]:
            return [
                t
                for tag in given
                for t in (several("tags", tag(value)) if callable(tag) else [tag])
            ]

        release = self._codec.fingerprint(kind)
        keeping = keeping or self._keeper.keeping()
        return Recipe(call, kind, keeping, self._keeper.lease(None), tags_of, release)

    def _pack(
        self,
        name: bytes,
        value: Any,
        type: Any,
        tags: Sequence[str],
        source: bytes,
        life: Life,
    ) -> Packed:
        try:
            encoded = self._codec.encoded(value, type)
        except (Unencodable, ValueTooLarge) as error:
            key = written(name[:KEY_SHOWN])
            error.args = (f"{key!r}: {error}",)  # of many values at once it was this one
            raise
        return self._packed(name, encoded, tags, source, self._keeper.jittered(life))

    def _packed(
        self,
        name: bytes,
        encoded: Encoded,
        tags: Sequence[str],
        source: bytes,
        life: Life,
        release: bytes = b"",
    ) -> Packed:
        names = list(dict.fromkeys(map(sanitized, tags)))
        refuse_crowd(names)
        codec = b"%b:%b" % (encoded.codec, release) if release else encoded.codec
        rest = body(codec, source, name, names, encoded.payload)
        return Packed(rest, names, life, release)

    def _fall_back(self, operation: str, error: RedisUnavailable) -> None:
        self.stats.counts["fallbacks"] += 1
        self.stats.say(f"cache.{operation} went without Redis", error.reason, error)


def _wish(recipe: Recipe, call: tuple[Any, ...] | None) -> Wish:
    prefix = recipe.loader.near_prefix if recipe.loader is not None else None
    return Wish(recipe.type, recipe.near or 0.0, recipe.release, prefix, call)
