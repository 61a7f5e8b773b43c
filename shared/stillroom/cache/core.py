"""The core of the cache: the operations on one value.

lookup.py has the steps of a read and loads.py those of a load; body.py puts the other operations beside these,
and cache.py gives all of them their two faces.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, overload

from stillroom.cache.arguments import Secrets, Texts
from stillroom.cache.bites import SCRIPTS_AT_ONCE, Bites, in_bites
from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.failures import OfOneCall, is_of_the_caller
from stillroom.cache.keeping import TtlOf, near_of
from stillroom.cache.leases import FAILURES_KEPT_MS, load_lease, new_token, refresh_lease
from stillroom.cache.loaders import (
    BadArguments,
    Loader,
    LoaderCall,
    Recipe,
    TagSpec,
    recipe_of,
)
from stillroom.cache.loads import LATE, STORED, WON, Loads, Packed
from stillroom.cache.lookup import Looked, Wish
from stillroom.cache.means import Means, Place
from stillroom.cache.orders import LOADED
from stillroom.cache.outbox import KEY
from stillroom.cache.probe import LAG_SUM, lag_bucket
from stillroom.cache.refreshes import Piece
from stillroom.codec import MISS
from stillroom.dispatch import RefreshOrder
from stillroom.durations import Duration
from stillroom.errors import LoadShed, RedisUnavailable, UnknownLoader, is_in_doubt
from stillroom.fingerprint import fingerprint
from stillroom.keys import quoted, sanitized, written
from stillroom.misuse import refuse_unfit
from stillroom.operation import Call, Freeing, Once, Operation, Pause, Timed
from stillroom.scripts import claim_refresh, lease_refresh
from stillroom.shown import repr_of
from stillroom.wire import IN_TIME

T = TypeVar("T")
D = TypeVar("D")

ASK_AGAIN_S = 1.0  # a process that could not get a refresh lease does not try for this long
ASKED_LIMIT = 10_000
TRIES = 2  # to put a value
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


class Ready(NamedTuple):
    """A value ready to be put under its sanitized key."""

    name: bytes
    packed: Packed


class Core(Loads):
    """The operations on one value. A driver runs them."""

    def __init__(self, means: Means, place: Place) -> None:
        super().__init__(means, place)
        self._texts = Texts(Secrets(self.settings))

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
        Redis away: `default`, within the call's deadline; counted and logged, never raised. With `near` it may be
        the copy that this process keeps: see the setting near_away.
        """
        name = sanitized(key)
        read = self._codec.reader(type)  # refuses a value that is no type, on a miss too
        kept_for = None if near is None else near_of(near)
        going_on = partial(self._get, name, type, default, kept_for)
        if kept_for is not None or not self._goes_ahead():
            return going_on()
        return self._ahead(name, type, read, b"", None, going_on)  # type: ignore[return-value]

    def _get(
        self,
        name: bytes,
        type: Any,
        default: Any,
        kept_for: float | None,
        looked: Looked | None = None,
        away: RedisUnavailable | None = None,
    ) -> Operation[Any]:
        try:
            if away is not None:
                raise away
            if kept_for is None:
                entry, freshness = yield from self._look(name, b"", looked)
            else:
                entry, freshness = yield from self._look_near(name, Wish(type, kept_for))
            value = MISS if entry is None else self._decode(entry, type)
            if value is MISS and entry is not None and entry.release:
                entry, freshness, value = yield from self._look_beside(name, type)
        except RedisUnavailable as error:
            self._fall_back("get", error)
            kept = self._kept_near(name, kept_for, type, b"")
            return default if kept is MISS else kept
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
        self.loaders.refuse_unfilled(key)
        keeping = self._keeper.keeping(ttl, swr, keep, negative_ttl)
        recipe = self.recipe(Call(load), tags, type, keeping)._replace(near=near_of(near))
        going_on = partial(self._get_or_set, name, recipe)
        if not recipe.is_plain or not self._goes_ahead():
            return going_on()
        read = self._codec.reader(recipe.type)
        return self._ahead(  # type: ignore[return-value]
            name, recipe.type, read, recipe.release, None, going_on
        )

    def _get_or_set(
        self,
        name: bytes,
        recipe: Recipe,
        looked: Looked | None = None,
        away: RedisUnavailable | None = None,
    ) -> Operation[Any]:
        return (yield from self.obtain(name, recipe, None, away, looked))

    def obtain(
        self,
        name: bytes,
        recipe: Recipe,
        call: tuple[Any, ...] | None = None,
        away: RedisUnavailable | None = None,
        looked: Looked | None = None,
    ) -> Operation[Any]:
        """Return the value under a sanitized key, loaded by its recipe if it has to be. `call`: see near.Store.

        `looked`: what was looked at ahead of this; `away`: why that has failed. Then there is no other look.
        """
        try:
            if away is not None:
                raise away
            entry, freshness = yield from self._look_for(name, recipe, call, looked)
        except RedisUnavailable as error:
            self._fall_back("get_or_set", error)
            kept = self._kept_near(name, recipe.near, recipe.type, recipe.release)
            return (yield from self._load_away(name, recipe, error)) if kept is MISS else kept
        decode = self._decode if recipe.near is None else self.near.value
        value = MISS if entry is None else decode(entry, recipe.type)
        self._count(value, freshness, recipe.loader)
        if value is MISS or entry is None:
            asked = self.near.asking()
            value = yield from self._load(name, recipe)
            return value if recipe.is_plain else self._shown_loaded(name, recipe, value, asked)
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
        self.loaders.refuse_unfilled(key)
        life = self._keeper.life(ttl, swr)
        packed = self._pack(name, value, type, self._given_tags(tags), b"", life)
        (stored,) = yield from self._put_all("set", [Ready(name, packed)])
        return stored

    def _put_all(self, what: str, values: Sequence[Ready]) -> Operation[list[bool]]:
        """Store these values and return which were stored. Each key fails for itself."""
        stored = [False] * len(values)
        self.away.forget(KEY + value.name for value in values)
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
            names = [values[place].name for place in left]
            replies = dict(zip(left, (yield from self._each(what, puts, names)), strict=True))
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

    def _each(self, what: str, batch: list[Any], names: Sequence[bytes]) -> Operation[list[Any]]:
        """Return the replies to a batch in which each command fails for itself: None is a failure.

        `names`: the key that each of them changes. It goes in bites. One that there was no time for goes again in
        smaller ones: what is still on its way is refused by then, and what is stored twice is the same.
        """
        replies: list[Any] = []
        bites = Bites(batch, SCRIPTS_AT_ONCE)
        while bites.left:
            yield from bites.turn()
            bite = type(batch)(bites.next())
            try:
                # A loaded value can be loaded again.
                kept_as = "" if isinstance(batch, Freeing) else STORED_VALUE
                replies += yield from self._memo.changing(bite, bites.beside(names), kept_as)
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
            yield from self._memo.changing([self._invalidator.naming([name])], [name])
        return {"outcome": lost or LOADED, "loader": order.loader, "key": key}

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
                "a refresh failed", order.loader, f"{quoted(order.key.encode())}: {repr_of(error)}"
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
            if not isinstance(error, OfOneCall):
                self.stats.say("a refresh failed", "here", f"{quoted(name)}: {repr_of(error)}")
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
        if self._is_asked_for(name, entry.fresh_until):
            return False
        if len(self._asked) >= ASKED_LIMIT:
            self._asked.clear()
        self._asked[name] = entry.fresh_until, time.monotonic() + ASK_AGAIN_S
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
