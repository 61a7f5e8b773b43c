"""Keep copies of the cache in this process, and prove all of them with one look at the clock.

The promise, for loaders and reads that ask for it with `near`: **a read in a request never shows what was
invalidated before the request began, nor what this process invalidated at any time**; outside of a request, nothing
that was invalidated more than `near` seconds ago.

A copy was read together with a clock. It is served if three things hold:

* It is *proven*: the clock was asked for again since the request began (or less than `near` seconds ago), and
  nothing but keys was changed here since. The marks up to that clock are known then, and so are the keys whose
  values were changed (lua/lib/near.lua); their copies are gone. Those that this process changes go at once.
* By the marks it is alive, as an entry would be.
* It is fresh. A stale one takes a look at Redis, which asks for its refresh.

Inside a load the proof has to be as new as the load: nothing is stored that was made of what is older than its
clock.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.figures import LOOKUPS
from stillroom.cache.judge import Judge
from stillroom.cache.marks import Verdict, read_clock, seqs_of
from stillroom.cache.memo import KEPT_S, LIMIT, Memo, Remembered, has_room
from stillroom.cache.sharing import is_frozen
from stillroom.cache.template import up_to_escape
from stillroom.codec import MISS, UNREADABLE, Parse, text_size
from stillroom.keys import Keys
from stillroom.oldest import oldest
from stillroom.operation import Operation
from stillroom.scripts import near_join
from stillroom.stats import Stats
from stillroom.wire import Clock, Command, loading_since, reset_after_fork, time_left

COPY_S = 240.0  # a copy is read anew after that; Redis remembers changed keys for 10 minutes
REQUEST_S = KEPT_S  # a request, or a load, that takes longer has it proved again
NAMES_AT_ONCE = 1_000  # changed keys that are asked for; more of them: all copies are dropped
JOINED_S = 3_600.0  # how often the prefixes are entered again
REGISTRY_MS = 8 * 86_400_000  # how long they stay without that
PREFIXES = 100  # more are one: every key
EVERY_KEY = b""  # begins with this
NEVER = float("-inf")  # as time.monotonic()
COPY_BYTES = 600  # memory of a copy besides its text, measured
SHARED_FACTOR = 4  # a decoded value takes so many times its text
CHANGED_LIMIT = 1_000  # keys that a process has changed itself; more of them are every key
CALLS = 4  # ways to call a loader that mean one key: with a default, and without
HITS = LOOKUPS[0]
LOST_NAME, FLOOR = b"K", b"!"  # see lua/lib/near.lua
UNKNOWN: Any = object()  # a value that was not yet asked for
# Whether arguments of these types are equal only if their keys are. A lazy object's __class__ is another one's.
_are_keyed = frozenset([int, str, bytes, type(None)]).issuperset
FRESH = Freshness.FRESH
_remembered = tuple.__new__


def remembered_by(loader: object, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return what a call of a loader is remembered by, or None where equal arguments may have different keys."""
    if not _are_keyed(map(type, args)):
        return None
    return (loader, *args)


def near_prefix(name: bytes) -> bytes:
    """Return the prefix that a key which no loader owns is kept under: up to its last colon, or all of it."""
    head, colon, _ = name.rpartition(b":")
    return up_to_escape(head + colon or name)


def _shortest(prefixes: set[bytes]) -> tuple[bytes, ...]:
    """Return those that begin with none of the others; every key's, where they are too many.

    Keys that no loader owns may each have a prefix of their own.
    """
    found: tuple[bytes, ...] = ()
    for prefix in sorted(prefixes):
        if not prefix.startswith(found):
            found += (prefix,)
    return found if len(found) <= PREFIXES else (EVERY_KEY,)


class Proof(NamedTuple):
    """Remember when the clock was asked for (time.monotonic()), and the last changes here before that: see Memo."""

    asked: float
    changes: object
    sweeps: object


class Copy:
    """An entry that this process keeps, and its value where it can be shared."""

    __slots__ = (
        "calls",
        "entry",
        "is_gone",
        "is_used",
        "judged",
        "near",
        "parse",
        "place",
        "read",
        "size",
        "type",
        "until",
        "value",
    )

    def __init__(self, near: Near, entry: Entry, type: Any, read: int, until: float) -> None:
        self.near = near
        self.place = near.memo, entry.key  # where a request that has read it remembers it
        self.entry = entry
        self.type = type
        self.value: Any = UNKNOWN  # MISS: it can't be shared, each reader decodes its own
        self.parse: Parse  # a payload → a reader's own value; there is one where `value` is MISS
        self.read = read  # the clock that was read with it
        self.judged: object = None  # the turn of the marks by which it was alive
        self.until = until  # time.monotonic()
        self.is_used = self.is_gone = False
        self.calls: list[tuple[Any, ...]] = []
        texts = 2 * len(entry.key) + sum(map(len, entry.tags)) + len(entry.payload)
        self.size = COPY_BYTES + texts


class Called(Protocol):
    """A loader, as far as the copies of its calls are found by it."""

    near: float | None
    name: str
    release: bytes
    counted_as: tuple[str, ...]


class Store:
    """The copies of one cache, in all its shards. Bounded by bytes; a hit takes no lock.

    The oldest goes first, unless it was used since it was last the oldest: so a scan of keys that are read once
    leaves what is read often.
    """

    def __init__(self, limit: int, stats: Stats) -> None:
        self._limit = limit
        self._stats = stats
        stats.gauges["near_bytes"] = lambda: self.bytes
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Keep nothing: a forked child has its own process' changes to make, and nobody else's lock."""
        self._lock = threading.RLock()
        self.bytes = 0
        self._copies: dict[tuple[Near, bytes], Copy] = {}
        # Keys that this process has changed, and when, time.monotonic(); what was asked for before is not kept.
        self._changed: dict[tuple[Near, bytes], float] = {}
        self._all_changed = NEVER  # when there were too many of them
        self._calls: dict[tuple[Any, ...], Copy] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def of_call(self, loader: Called, args: tuple[Any, ...]) -> Any:
        """Return the value that a loader's call is answered with, or MISS where it takes more than a look here."""
        if not _are_keyed(map(type, args)):
            return MISS
        copy = self._calls.get((loader, *args))
        if copy is None:
            return MISS
        entry = copy.near.usable(copy, loader.near, loader.release)
        if entry is None:
            return MISS
        counts = self._stats.counts
        counts[HITS] += 1
        counts[loader.counted_as[0]] += 1
        value = copy.value
        if value is not MISS or entry is not copy.entry:
            return self.value_of(copy, entry)
        try:  # as value_of: this is run on every hit
            return copy.parse(entry.payload)
        except UNREADABLE:
            return self.value_of(copy, entry)

    def of_name(self, near: Near, name: bytes) -> Copy | None:
        """Return the copy of a key."""
        return self._copies.get((near, name))

    def put(
        self,
        copy: Copy,
        call: tuple[Any, ...] | None,
        asked: float,
        is_complete: Callable[[], bool],
    ) -> None:
        """Keep a copy, unless this process has changed its key since it was asked for, or a change was learned that
        it may not show: `is_complete` says so.
        """
        if copy.size * 8 > self._limit:
            return
        place = copy.near, copy.entry.key
        with self._lock:
            if asked <= self._changed.get(place, self._all_changed) or not is_complete():
                return
            self._drop(place)
            self._copies[place] = copy
            self.bytes += copy.size
            self._name(copy, call)
            while self.bytes > self._limit and self._copies:
                self._evict()

    def name(self, copy: Copy, call: tuple[Any, ...] | None) -> None:
        """Let a copy be found by this call too."""
        with self._lock:
            if self._copies.get((copy.near, copy.entry.key)) is copy:
                self._name(copy, call)

    def learn(self, near: Near, names: Sequence[tuple[bytes, int]]) -> None:
        """Drop the copies of keys that have changed since they were read."""
        with self._lock:
            for name, seq in names:
                copy = self._copies.get((near, name))
                if copy is not None and copy.read < seq:
                    self._drop((near, name))

    def drop(self, near: Near, names: Sequence[bytes]) -> None:
        """Drop the copies of keys that this process has changed. No copy is kept that was asked for before."""
        places = [(near, name) for name in names]
        with self._lock:
            now = time.monotonic()  # in here: of two changes of a key the later one counts
            if len(self._changed) + len(places) > CHANGED_LIMIT:
                self._changed, self._all_changed = {}, now
            else:
                self._changed.update(dict.fromkeys(places, now))
            for place in places:
                self._drop(place)

    def forget(self, near: Near) -> None:
        """Drop all copies of a shard."""
        with self._lock:
            for place in [place for place in self._copies if place[0] is near]:
                self._drop(place)

    def value_of(self, copy: Copy, entry: Entry) -> Any:
        """Return the value of an entry that is served in the place of a read: its caller's own, or one that all
        share.
        """
        value = copy.value
        if entry is not copy.entry:
            return copy.near.decode(entry, copy.type)
        if value is UNKNOWN:
            return self._first_value_of(copy)
        if value is not MISS:
            return value
        try:
            return copy.parse(entry.payload)
        except UNREADABLE:  # a validator of the app refuses it now: that is said, and counted
            return copy.near.decode(entry, copy.type)

    def _first_value_of(self, copy: Copy) -> Any:
        value = copy.near.decode(copy.entry, copy.type)
        if value is not MISS and is_frozen(value):
            self._share(copy, value)
        if copy.value is UNKNOWN:
            copy.parse = copy.near.parser(copy.entry.codec, copy.type)
            copy.value = MISS
        return value

    def _share(self, copy: Copy, value: Any) -> None:
        """Keep the value itself, unless it would take half of the room: uncompressed, it may be very large."""
        more = SHARED_FACTOR * text_size(copy.entry.codec, copy.entry.payload)
        if 2 * more > self._limit:
            return
        with self._lock:
            if copy.is_gone or copy.value is not UNKNOWN:
                return
            copy.value = value
            copy.size += more
            self.bytes += more
            while self.bytes > self._limit and self._copies:
                self._evict()

    def _name(self, copy: Copy, call: tuple[Any, ...] | None) -> None:
        if call is not None and call not in copy.calls and len(copy.calls) < CALLS:
            copy.calls.append(call)
            self._calls[call] = copy

    def _evict(self) -> None:
        for place, copy in oldest(self._copies.items(), 1):
            if not copy.is_used:
                self._drop(place)
                self._stats.counts["near_evictions"] += 1
            elif self._copies.pop(place, None) is copy:
                copy.is_used = False
                self._copies[place] = copy

    def _drop(self, place: tuple[Near, bytes]) -> None:
        copy = self._copies.pop(place, None)
        if copy is not None:
            copy.is_gone = True
            self.bytes -= copy.size
            for call in copy.calls:
                if self._calls.get(call) is copy:
                    del self._calls[call]


class Near:
    """Hold what this process knows of the copies of one shard. Threads share it."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        clock: Clock,
        judge: Judge,
        memo: Memo,
        stats: Stats,
        decode: Callable[[Entry, Any], Any],
        parser: Callable[[bytes, Any], Parse],
        longest: float,
    ) -> None:
        self.store = store
        self._keys = keys
        self._now_ms = clock.now_ms
        self._judge = judge
        self.memo = memo
        memo.drop_copies = self.forget
        self._stats = stats
        # A pattern's mark is dropped when no load from before it can be under way, and no such copy may be left.
        self._longest = min(COPY_S, longest)
        self.decode = decode  # an entry, and the type of its value → the value, or MISS
        self.parser = parser  # a codec and a type: see Codec.parser
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Know nothing: no lock of another thread, no proof of another process."""
        self._lock = threading.RLock()
        self._registry: bytes | None = None
        self._registry_asked = NEVER  # when it was asked for, time.monotonic()
        self._prefixes: tuple[bytes, ...] = ()  # that are in it
        # Prefixes that this process has entered, and when it has, time.monotonic().
        self._joined: tuple[bytes, ...] = ()
        self._joined_at = NEVER
        self._epoch = b""
        self._synced = 0  # up to this clock the changed keys are known
        self._proof = Proof(NEVER, None, None)

    # Without Redis

    def usable(self, copy: Copy, near: float | None, release: bytes) -> Entry | None:
        """Return the entry to be served in the place of a read, or None. What a request has read it reads again."""
        now, request, since = time.monotonic(), time_left(), loading_since()
        memo, entry, (asked, _, sweeps) = self.memo, copy.entry, self._proof
        changes = memo.changes  # before `sweeps` and `is_gone` are looked at: see Memo.changed
        if request is not None:
            request.reads_near = True
            seen, place = request.memo, copy.place
            if place in seen and (known := memo.read_in(request, entry.key, release, now)):
                self._stats.counts["near_hits"] += 1
                return known.entry
            if asked < request.began or asked < now - REQUEST_S:
                return None
        else:
            # A task may outlive the load that it was begun in, as it may a request.
            since = max(since, now - REQUEST_S) if since else now - (near or 0.0)
        if asked < since or sweeps is not memo.sweeps:
            return None
        if copy.judged is not self._judge.marks.turn and not self._is_judged_alive(copy):
            return None
        if now >= copy.until or self._now_ms() >= entry.fresh_until:
            return None
        if copy.is_gone:  # to be looked at last: by that proof, or by one that came in the meantime
            return None
        copy.is_used = True
        self._stats.counts["near_hits"] += 1
        if request is not None and (len(seen) < LIMIT or has_room(seen, now)):
            # Past NamedTuple's own constructor, which is Python: this is run on every hit.
            seen.setdefault(place, _remembered(Remembered, (entry, FRESH, changes, asked)))
        return entry

    def is_proven(self, near: float) -> bool:
        """Return whether the last proof is good for a read that is made now. See usable."""
        now, request, since = time.monotonic(), time_left(), loading_since()
        asked, _, sweeps = self._proof
        if request is not None:
            since = max(since, request.began)
        since = max(since, now - REQUEST_S) if since else now - near
        return asked >= since and sweeps is self.memo.sweeps

    def value(self, entry: Entry, type: Any) -> Any:
        """Return the value of an entry that was looked at, shared if a copy of it is kept and it can be."""
        copy = self.store.of_name(self, entry.key)
        if copy is None or copy.entry is not entry or copy.type is not type:
            return self.decode(entry, type)
        return self.store.value_of(copy, entry)

    def away(self, name: bytes, release: bytes, seconds: float) -> Entry | None:
        """Return the entry to be served while Redis is away, if its clock was asked for less than so many seconds
        ago.
        """
        copy = self.store.of_name(self, name)
        asked, _, sweeps = self._proof
        now = time.monotonic()
        if copy is None or now - asked > seconds or sweeps is not self.memo.sweeps:
            return None
        if asked < loading_since() or not self._is_alive(copy, now) or copy.is_gone:
            return None
        return copy.entry if copy.entry.release in (release, b"") else None

    def is_in_request(self) -> bool:
        """Return whether the read belongs to a request or a load, so that it has a beginning."""
        return time_left() is not None or bool(loading_since())

    def may_be_alive(self, copy: Copy) -> bool:
        """Return whether asking for a proof is likely to save a read."""
        return not copy.is_gone and self._is_alive(copy, time.monotonic())

    def asking(self) -> Proof:
        """Return the time and the last changes of this process as they are before a clock is asked for."""
        return Proof(time.monotonic(), self.memo.changes, self.memo.sweeps)

    def _is_alive(self, copy: Copy, now: float) -> bool:
        if copy.judged is not self._judge.marks.turn and not self._is_judged_alive(copy):
            return False
        return now < copy.until and self._now_ms() < copy.entry.fresh_until

    def _is_judged_alive(self, copy: Copy) -> bool:
        marks = self._judge.marks
        turn = marks.turn
        # A machine that slept may have missed a pattern that is over for all others: see drop_globs.lua.
        if copy.read < marks.dropped or marks.verdict(copy.entry) is not Verdict.ALIVE:
            return False
        copy.judged = turn
        return True

    def forget(self, names: Sequence[bytes]) -> None:
        """Drop the copies of keys that this process has changed or loaded anew."""
        self.store.drop(self, names)

    # With Redis

    def joining(self, prefix: bytes) -> Operation[None]:
        """Enter the prefix of keys that are to be kept, before any of them is read for that."""
        now = time.monotonic()
        if now - self._joined_at < JOINED_S and prefix.startswith(self._joined):
            return
        fresh_id, prefixes = secrets.token_hex(8), _shortest({*self._joined, prefix})
        (registry,) = yield [
            near_join([self._keys.near], fresh_id, REGISTRY_MS, PREFIXES, *prefixes)
        ]
        with self._lock:
            self._joined, self._joined_at = prefixes, now
            self._take_registry(registry, now)
            if EVERY_KEY in self._prefixes:
                self._joined = (EVERY_KEY,)

    @property
    def synced(self) -> int:
        """Return the clock's number up to which the changed keys are known. Read it before asking for them."""
        return self._synced

    def names_since(self, synced: int) -> list[Command]:
        """Return the commands that bring the names which have changed since they were last asked for."""
        since, most = b"(%d" % synced, b"%d" % NAMES_AT_ONCE
        newest_first = (b"BYSCORE", b"REV", b"LIMIT", b"0", most, b"WITHSCORES")
        # In this order: a name that comes in between is among the names, and none is taken for lost.
        return [
            (b"ZSCORE", self._keys.marks, LOST_NAME),
            (b"ZRANGE", self._keys.named, b"+inf", since, *newest_first),
        ]

    def learn(
        self, asked: Proof, registry: bytes | None, clock: bytes | None, known: int
    ) -> Operation[int]:
        """Take in a clock and a registry that were read together. Return the clock, or 0 if it proves nothing.

        `asked`: what stood when they were asked for; `known`: how far the marks went then.
        """
        if registry is None or clock is None:
            with self._lock:
                self._take_registry(registry, asked.asked)
            return 0
        marks = yield from self._judge.caught_up(clock, known)
        try:
            epoch, seq = read_clock(clock)
        except ValueError:  # another program has written there
            return 0
        if marks.epoch != epoch or marks.synced < seq:
            return 0
        with self._lock:
            self._take_registry(registry, asked.asked)
            if self._epoch != epoch:
                self._begin(epoch, seq)
            since = self._synced
            if seq <= since:  # as nearly always: no key has changed
                self._prove(asked)
                return seq
        newest, rows = yield self.names_since(since)
        self.learn_names(since, clock, newest, rows)
        with self._lock:
            if self._epoch == epoch and self._synced >= seq:
                self._prove(asked)
        return seq

    def _prove(self, asked: Proof) -> None:
        if asked.asked > self._proof.asked:
            self._proof = asked
            self._stats.counts["near_proofs"] += 1

    def keep(
        self,
        entry: Entry,
        type: Any,
        asked: Proof,
        seq: int,
        registry: bytes,
        call: tuple[Any, ...] | None,
    ) -> None:
        """Keep an entry that was read together with this registry and a clock of this number. `learn` has both."""

        def is_complete() -> bool:
            is_same = self._registry == registry and self._epoch == entry.epoch
            return is_same and seq >= self._synced and entry.key.startswith(self._prefixes)

        copy = Copy(self, entry, type, seq, asked.asked + self._longest)
        self.store.put(copy, call, asked.asked, is_complete)

    def learn_names(
        self, since: int, clock: bytes | None, told: bytes | None, rows: Sequence[bytes]
    ) -> None:
        """Take in what `names_since` was answered with, which was asked for after this clock."""
        try:
            epoch, seq = read_clock(clock or b"")
        except ValueError:
            return
        newest, *scores = seqs_of([told, *rows[1::2]])
        names = list(zip(rows[::2], scores, strict=True))
        reached = max((score for _, score in names), default=0)
        is_lost = newest > since and reached < newest
        is_cut = len(names) >= NAMES_AT_ONCE or any(
            name == FLOOR and score > since for name, score in names
        )
        with self._lock:
            if self._epoch != epoch or self._synced != since:
                return  # another thread was faster
            if seq < since:
                return  # this clock is older than what is known
            if is_lost or is_cut:
                self.store.forget(self)
            self._synced = seq
            self.store.learn(self, [(name[2:], score) for name, score in names])

    def learn_own(self, before: bytes, after: bytes) -> None:
        """Know the keys up to a clock that this process has moved itself, where they were known up to then."""
        if not before:
            return
        (epoch, known), (_, seq) = read_clock(before), read_clock(after)
        with self._lock:
            if self._epoch == epoch and self._synced == known and after.startswith(epoch + b"."):
                self._synced = seq

    def _take_registry(self, registry: bytes | None, asked: float) -> None:
        """Take a registry that is another than was seen: changes may have gone by that nobody was told of.

        One that was asked for before the last one is old news: what was read with it is not kept.
        """
        if asked < self._registry_asked:
            return
        self._registry_asked = asked
        before, self._registry = self._registry, registry
        if before == registry:
            return
        self._prefixes = tuple(registry.split(b"\n")[1:]) if registry else ()
        if before is not None and (registry is None or not registry.startswith(before)):
            self._joined = ()
            self.store.forget(self)

    def _begin(self, epoch: bytes, seq: int) -> None:
        self._epoch, self._synced = epoch, seq
        # A look from before this epoch may arrive behind its proof, and begin the epoch before it again.
        self._proof = Proof(NEVER, None, None)
        self.store.forget(self)
