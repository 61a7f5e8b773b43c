"""Looking at one value: the entry and the clock in one read, judged by the marks, or this process's copy.

The invariant everything here serves: **a read that began after an invalidation returned never yields
a value loaded before it.** An entry carries the clock as it was before its load began; marks.py decides.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from stillroom.cache.away import Away
from stillroom.cache.entry import Corrupt, Entry, Freshness, parse
from stillroom.cache.figures import LOOKUPS
from stillroom.cache.invalidation import Invalidator
from stillroom.cache.judge import Judge
from stillroom.cache.loaders import Loader, Recipe
from stillroom.cache.means import Means, Place
from stillroom.cache.memo import Memo, Remembered
from stillroom.cache.near import Near, Proof, near_prefix
from stillroom.codec import MISS, PLAIN_JSON, UNREADABLE, Codec, Parse, Undecodable
from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.keys import quoted
from stillroom.operation import UNUSUAL, Ahead, Once, Operation
from stillroom.scripts import verify_epoch
from stillroom.unsettled import is_unsettled
from stillroom.wire import Command, pack, pack_command, time_left

APART_S = 600.0  # how long both places of a key are looked at once another release's value was seen
SEEN = 2_000  # entries that are remembered as they were read, in all shards
SEEN_BYTES = 2_000  # larger ones are not
_OUTCOMES = ("hit", "stale", "miss")  # the outcome of a lookup in its event: see LOOKUPS
_FRESH = Freshness.FRESH


class Wish(NamedTuple):
    """Describe a read that lets this process keep a copy of the entry."""

    type: Any
    near: float  # seconds
    release: bytes = b""
    prefix: bytes | None = None  # of the loader's keys; None: that of the key
    call: tuple[Any, ...] | None = None  # see near.Store


class Looked(NamedTuple):
    """Hold what a look has brought, and how far the marks went before it."""

    known: int
    raw: bytes | None
    clock: bytes | None


# A living entry as it was read, so that the same bytes are not taken apart and judged anew: all of it, its payload
# (JSON as it stands), until when it is fresh, the release of its reader, and the turn of the marks by which it was
# alive.
Seen: TypeAlias = tuple[bytes, bytes, int, bytes, object]
UNSEEN: Seen = (b"", b"", 0, b"", object())


class _Look(NamedTuple):
    """Hold what a plain look is made of. `go_on` is the operation, from what was looked at or the error."""

    batch: list[Command]
    lookup: Lookup
    name: bytes
    type: Any
    read: Parse  # of JSON as it stands
    release: bytes
    loader: Loader | None
    known: int
    go_on: Callable[..., Operation[Any]]


class PlainLook(Ahead, _Look):
    """A look at a value that is nearly always a hit."""

    __slots__ = ()

    def usual(self, replies: Sequence[Any]) -> Any:
        """Return the value of an entry that this process judges alone, and whose refresh is not to be asked for.

        A refresh that was asked for less than a second ago is not.
        """
        lookup, loader, place = self.lookup, self.loader, 0
        raw, clock = replies[0]
        as_seen, payload, fresh_until, release, turn = lookup._seen.get(self.name, UNSEEN)
        try:
            if raw == as_seen and release == self.release and lookup._judges.turn_at(clock) is turn:
                if lookup.now_ms() >= fresh_until:
                    if not lookup._is_asked_for(self.name, fresh_until):
                        return UNUSUAL
                    place = 1
                value = self.read(payload)
            else:
                value, place = lookup._value_of(
                    self.name, self.type, self.read, self.release, raw, clock
                )
        except UNREADABLE:  # the operation tells of it
            return UNUSUAL
        if value is UNUSUAL:
            return value
        counts = lookup.stats.counts
        counts[LOOKUPS[place]] += 1
        if loader is not None:
            counts[loader.counted_as[place]] += 1
        return value

    def rest(
        self, replies: Sequence[Any] | None, away: RedisUnavailable | None = None
    ) -> Operation[Any]:
        """See Ahead."""
        looked = None if replies is None else Looked(self.known, *replies[0])
        return self.go_on(looked=looked, away=away)


_plain_look = tuple.__new__


class Lookup:
    """Look at one value, by what this process knows of Redis' clock and marks. A driver runs the operations."""

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
            *(self.dispatch, self.stats, place.run_aside, self._learn_own),
        )
        self._outbox = self._invalidator.outbox
        self._codec = Codec(settings)
        self._judges = self._judge_of(settings.marks_limit)
        self.near = Near(
            *(means.copies, self.keys, self.clock, self._judges),
            *(self._memo, self.stats, self._decode),
            *(self._codec.parser, settings.lease_limit),
        )
        self._proving = pack([(b"MGET", self.keys.near, self.keys.clock)])
        self._apart_until = 0.0  # two releases of the app were seen to be at work; time.monotonic()
        # key → which stale entry was asked for, and until when (time.monotonic()) that is enough
        self._asked: dict[bytes, tuple[int, float]] = {}
        self._seen: dict[bytes, Seen] = {}
        self._seen_limit = SEEN // settings.shards

    def _goes_ahead(self) -> bool:
        """Return whether nothing else is to be asked or told together with a plain look."""
        now, stats, judges = time.monotonic(), self.stats, self._judges
        return not (
            now > stats.due
            or now < self._apart_until
            or stats.watch is not None
            or self._outbox.numbers
            or (judges.counts and not judges.goes_alone())
        )

    def _ahead(
        self,
        name: bytes,
        type: Any,
        read: Parse,
        release: bytes,
        loader: Loader | None,
        go_on: Callable[..., Operation[Any]],
    ) -> PlainLook:
        """Return a look that asks for the entry and the clock alone, to be run in the place of `go_on()`."""
        keys = self.keys
        batch: list[Command] = [pack_command((b"MGET", keys.entry(name), keys.clock))]
        known = self._judges.marks.synced
        # Past NamedTuple's own constructor, which is Python: this is made for every hit.
        about = (batch, self, name, type, read, release, loader, known, go_on)
        return _plain_look(PlainLook, about)

    def _value_of(
        self,
        name: bytes,
        type: Any,
        read: Parse,
        release: bytes,
        raw: bytes | None,
        clock: bytes | None,
    ) -> tuple[Any, int]:
        """Return the value that a plain look has brought and the place of its count, or UNUSUAL. See PlainLook.

        Raises what decoding raises.
        """
        if raw is None:
            return UNUSUAL, 0
        entry, place = parse(raw, name), 0
        codec, payload = entry.codec, entry.payload
        if release and codec[2:] not in (release, b""):
            return UNUSUAL, 0
        # Before the entry is judged: a mark that comes meanwhile makes another.
        turn = self._judges.marks.turn
        freshness = self._judges.at_once(entry, clock)
        if freshness is not _FRESH:
            if freshness is not Freshness.STALE or not self._is_asked_for(name, entry.fresh_until):
                return UNUSUAL, 0
            place = 1
        if codec[:2] not in PLAIN_JSON:
            return self._codec.decode(codec, payload, type), place
        value = read(payload)
        # Not one that is stale by a mark: only the time says later whether it is.
        if len(raw) <= SEEN_BYTES and (not place or self.now_ms() >= entry.fresh_until):
            if len(self._seen) >= self._seen_limit:
                self._seen.clear()
            self._seen[name] = raw, payload, entry.fresh_until, release, turn
        return value, place

    def _look(
        self, name: bytes, release: bytes = b"", looked: Looked | None = None
    ) -> Operation[tuple[Entry | None, Freshness]]:
        """Return the living entry and its freshness, or (None, DEAD), in one round trip while the clock stands.

        With a `release` another release's value does not count, and the key's other place is read. `looked`: what
        was read ahead of this.
        """
        if looked is not None:
            known, raw, clock = looked
        elif self._apart_until and time.monotonic() < self._apart_until:
            return (yield from self._look_at_both(name, release))
        else:
            known = self._judges.marks.synced
            mget = (b"MGET", self.keys.entry(name), self.keys.clock)
            raw, clock = yield from self._read(mget, known)
        entry, freshness = self._judge_at_once(raw, name, clock)
        if freshness is None:
            entry, freshness = yield from self._judge(raw, name, clock, known)
        if entry is None:
            if raw is None or not self._is_anothers(raw, name, release):
                return None, Freshness.DEAD
        elif not release or entry.codec[2:] in (release, b""):
            return entry, freshness
        return (yield from self._look_at_both(name, release))

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

    def _is_anothers(self, raw: bytes, name: bytes, release: bytes) -> bool:
        """Return whether a dead entry is another release's, so that the key's other place may have a living one."""
        with contextlib.suppress(Corrupt):
            return parse(raw, name).release not in (release, b"")
        return False

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

    # In a request, and this process's copies

    def _look_for(
        self,
        name: bytes,
        recipe: Recipe,
        call: tuple[Any, ...] | None,
        looked: Looked | None = None,
    ) -> Operation[tuple[Entry | None, Freshness]]:
        """Return what `_look` returns, in the way that the recipe's loader wants."""
        if recipe.near is not None:
            return self._look_near(name, _wish(recipe, call))
        if recipe.is_plain:
            return self._look(name, recipe.release, looked)
        return self._look_once(name, recipe.release)

    def _look_once(self, name: bytes, release: bytes) -> Operation[tuple[Entry | None, Freshness]]:
        """Return what `_look` returns, asked for once in a request: see memo.py."""
        if (known := self._memo.recall(name, release)) is not None:
            return known.entry, known.freshness
        asked = self.near.asking()
        entry, freshness = yield from self._look(name, release)
        return self._shown(name, release, entry, freshness, asked)

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
            return self._shown(name, release, entry, freshness, asked)
        seq = yield from self._learn_if_there(asked, registry, clock, known)
        if entry is not None and seq and freshness is Freshness.FRESH:
            near.keep(entry, wish.type, asked, seq, registry, wish.call)
        return self._shown(name, release, entry, freshness, asked)

    def _learn_if_there(
        self, asked: Proof, registry: bytes | None, clock: bytes | None, known: int
    ) -> Operation[int]:
        try:
            return (yield from self.near.learn(asked, registry, clock, known))
        except RedisUnavailable as error:  # the value that was read is right all the same
            self._fall_back("learn", error)
            return 0

    def _kept_near(self, name: bytes, near: float | None, type: Any, release: bytes) -> Any:
        """Return this process's copy, where the app lets it be served while Redis is away, or MISS."""
        if near is None or not self.settings.near_away:
            return MISS
        kept = self.near.away(name, release, self.settings.near_away)
        return MISS if kept is None else self._decode(kept, type)

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

    def _shown(
        self,
        name: bytes,
        release: bytes,
        entry: Entry | None,
        freshness: Freshness,
        asked: Proof,
    ) -> tuple[Entry | None, Freshness]:
        """Remember what was looked at. Return it, or what another task of this request has read in the meantime."""
        if (known := self._memo.recall(name, release)) is not None:
            return known.entry, known.freshness
        self._remember(name, entry, freshness, asked)
        return entry, freshness

    def _remember(
        self, name: bytes, entry: Entry | None, freshness: Freshness, asked: Proof
    ) -> None:
        if entry is not None:
            self._memo.remember(name, Remembered(entry, freshness, asked.changes, asked.asked))

    def _shown_loaded(self, name: bytes, recipe: Recipe, value: Any, asked: Proof) -> Any:
        """Let this request read again the value that it loaded or waited for. Return it, or what another task of it
        has read in the meantime.
        """
        if time_left() is None or is_unsettled():
            return value
        known = self._memo.recall(name, recipe.release)
        shown = MISS if known is None else self._decode(known.entry, recipe.type)
        if shown is not MISS:
            return shown
        if recipe.near is not None:
            self._remember_loaded(name, recipe, value, asked)
        return value

    def _remember_loaded(self, name: bytes, recipe: Recipe, value: Any, asked: Proof) -> None:
        try:
            encoded = self._codec.encoded(value, recipe.type)
        except Exception:  # a value without bytes is loaded each time
            return
        codec = b"%b:%b" % (encoded.codec, recipe.release) if recipe.release else encoded.codec
        entry = Entry(b"", 0, 0, codec, b"", name, [], encoded.payload)
        self._remember(name, entry, Freshness.FRESH, asked)

    def _show_again(self, name: bytes, shown: Remembered | None) -> None:
        """Let this request read again what it was shown, though the value has been refreshed, perhaps by itself."""
        if shown is not None:
            self._memo.remember(name, shown)

    # Reading

    def _read(self, asked: Command, known: int, *, is_near: bool = False) -> Operation[Any]:
        """Send an MGET whose last key is the clock, with all riders. Return what was found.

        With `is_near` the names of changed keys are read too where the clock has moved.
        """
        # No read is trusted before Redis has this process's invalidations.
        if self._outbox.numbers:
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
        elif named is not None and known and self._judges.is_behind(found[-1]):
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

    def _learn_own(self, before: bytes, after: bytes, members: Sequence[bytes]) -> None:
        """Know what this process has invalidated itself: then none of its reads takes a second look for that."""
        self._judges.learn_own(before, after, members)
        self.near.learn_own(before, after)

    def _is_asked_for(self, name: bytes, fresh_until: int) -> bool:
        """Return whether this process has asked for a stale entry's refresh, less than a second ago."""
        asked, until = self._asked.get(name, (0, 0.0))
        return asked == fresh_until and time.monotonic() < until

    # Judging

    def _judge_of(self, limit: int) -> Judge:
        """Return a judge without any marks that will remember up to this many."""

        def verifying(seq: int) -> Operation[Command]:
            yield from self.terms.agree_anew()
            keys = self.keys.clock, self.keys.marks, self.keys.globs, self.keys.todo
            return verify_epoch(keys, self.terms.new_epoch(), self.terms.keep_ms, seq)

        return Judge(self.keys, self.clock, limit, verifying)

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

    # Counting

    def _count_unreadable(self, what: str, name: bytes, error: Exception) -> None:
        self.stats.counts["decode_errors"] += 1
        self.stats.say(f"unreadable {what}, a miss", what, f"{quoted(name)}: {error}")

    def _count(self, value: Any, freshness: Freshness, loader: Loader | None = None) -> None:
        """Count a lookup of this kind, and one of its loader. This runs on every hit."""
        stats = self.stats
        place = 2 if value is MISS else int(freshness is not _FRESH)
        stats.counts[LOOKUPS[place]] += 1
        if loader is not None:
            stats.counts[loader.counted_as[place]] += 1
        if stats.watch is not None:
            stats.watch.note(_OUTCOMES[place], loader.name if loader else "")

    def _fall_back(self, operation: str, error: RedisUnavailable) -> None:
        self.stats.counts["fallbacks"] += 1
        self.stats.say(f"cache.{operation} went without Redis", error.reason, error)


def _wish(recipe: Recipe, call: tuple[Any, ...] | None) -> Wish:
    prefix = recipe.loader.near_prefix if recipe.loader is not None else None
    return Wish(recipe.type, recipe.near or 0.0, recipe.release, prefix, call)
