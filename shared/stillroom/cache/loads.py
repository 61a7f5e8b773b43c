"""Loading one value and storing it: one caller of all processes loads under a lease, and the others wait for it."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeAlias

from stillroom.cache.away import Form, Load, Taken
from stillroom.cache.away import Packed as PackedAway
from stillroom.cache.declared import result_of
from stillroom.cache.entry import body
from stillroom.cache.failures import OfOneCall, is_of_the_caller
from stillroom.cache.figures import LoaderFigures
from stillroom.cache.keeping import Keeper, Keeping, Life
from stillroom.cache.leases import Leases, load_lease, loading
from stillroom.cache.loaders import Recipe, TagSpec, several
from stillroom.cache.lookup import Lookup
from stillroom.cache.marks import read_clock
from stillroom.cache.means import Means, Place
from stillroom.cache.orders import NOT_WANTED, NotDone
from stillroom.codec import MISS, Encoded, Unencodable
from stillroom.errors import InvalidArgument, LoadShed, RedisUnavailable, ValueTooLarge, in_code
from stillroom.keys import quoted, refuse_crowd, sanitized
from stillroom.misuse import refuse_awaited
from stillroom.operation import Call, Freeing, Operation, Pause, Timed
from stillroom.scripts import commit, lease_load, put, take_place
from stillroom.shown import message_of
from stillroom.unsettled import is_unsettled
from stillroom.wire import IN_TIME, Command, leases_of_loads

# How a failed load is told: its lease, the error, and commands that go along.
OnFailure: TypeAlias = Callable[
    [Sequence[tuple[bytes, bytes]], BaseException, Sequence[Command]], Operation[None]
]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.05  # between two looks at a load one waits for
WON = STORED = 1  # a script's reply when it has acted
LATE = -1  # a script's reply when it arrived after its caller gave up
TAKEN, QUEUED = 1, 0  # the replies of lua/take_place.lua; -2: the queue is full
QUEUE_S = 1.0  # how long a load waits for a place …
QUEUE_MS = 2_000  # … and when a waiter that is gone is forgotten
RETRY_AFTER_S = 1.0
# Why a loaded value is not stored, besides NOT_WANTED: it can't be, or the load ran in a transaction.
NOT_KEPT, UNSETTLED = "not kept", "in a transaction"


class Packed(NamedTuple):
    """A value ready to be stored: what entry.body makes of it, its tags, and for how long."""

    rest: bytes
    tags: list[bytes]
    life: Life
    release: bytes


class Made(NamedTuple):
    """A loaded value: ready to be stored, or None with the reason in `why_not`; and as a reader gets it."""

    packed: Packed | None
    back: Any
    why_not: str = ""


class Attempt(NamedTuple):
    """Tell a caller that has found no value how to go on: it loads, takes the result of another load, or waits."""

    clock: bytes | None = None  # the load is ours, and this is the clock before it
    value: Any = MISS  # another load has brought it
    failure: Exception | None = None  # the load that was waited for has failed
    holder: bytes = b""  # the lease of the load that is under way

    @property
    def is_open(self) -> bool:
        return self.clock is None and self.value is MISS and self.failure is None


class Loads(Lookup):
    """The steps of a load: whose turn it is, the call, and what becomes of its value."""

    def __init__(self, means: Means, place: Place) -> None:
        super().__init__(means, place)
        self._keeper = Keeper(self.settings)
        self._leases = Leases(self.settings, self.keys, self.stats, self._fall_back)
        self._figures = LoaderFigures(means.stats)

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
                f"load={in_code(call.function):.100}: a function; what it returns is kept"
            )
        given = self._given_tags(tags)
        kind = result_of(call.function) if type is None else type
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

    def _given_tags(self, tags: Any) -> Sequence[Any]:
        """Return the tags that an entry is given. Raises InvalidKey for a template: see refuse_unfilled."""
        given = several("tags", tags)
        if given:
            self.loaders.refuse_unfilled(*given)
        return given

    # Whose turn it is

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
                    *("own", quoted(name)),
                )
                return (yield from self._load_for_myself(recipe))
            if recipe.at_once:
                raise LoadShed(recipe.name, recipe.at_once, RETRY_AFTER_S)
            self.stats.say(
                "gave up waiting for another caller's load; loading without storing",
                *("wait", quoted(name)),
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
            if entry is None or (value := self._decode(entry, recipe.type)) is MISS:
                return Attempt(clock=clock)
        except GeneratorExit:
            raise
        except BaseException:
            # Timed out, cancelled or interrupted in the middle: the lease may be ours all the same.
            yield from self._leases.release([(name, lease)])
            raise
        yield from self._leases.release([(name, lease)])
        return Attempt(value=value)

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

    # The load

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
        leaving: list[Command] = []
        try:
            leaving = self._leaving(held, recipe)
            if recipe.at_once:
                yield from self._take_place(name, held, recipe)
            value = yield from self._call(recipe, recipe.loading(held))
            made = self._pack_loaded(name, value, recipe)
        except GeneratorExit:
            raise
        except BaseException as error:
            if isinstance(error, LoadShed):
                self.stats.counts["loads_shed"] += 1
            yield from on_failure([(name, held)], error, leaving)
            raise
        lost = yield from self._store(name, held, clock, made, leaving)
        # A request that has seen the new value never sees the old one. One that is not stored may be the older one:
        # of another task's, and whoever remembers what it reads has that.
        if not lost or recipe.is_plain:
            self._memo.forget(name)
        return made.back, lost

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
            if not isinstance(error, OfOneCall):  # the next load may well succeed
                self.stats.counts["load_errors"] += 1
                self._figures.failed(recipe.name, time.monotonic() - began, error)
            raise
        self.stats.counts["loads"] += 1
        self._figures.loaded(recipe.name, time.monotonic() - began)
        return value

    def _as_read(self, value: Any, recipe: Recipe) -> Any:
        """Return a loaded value as a reader would get it from the cache."""
        try:
            return self._codec.encoded(value, recipe.type).back
        except Exception:
            return value

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
        made: Made,
        leaving: Sequence[Command],
    ) -> Operation[str]:
        """Commit, if the lease is still ours. The caller has its value either way. Return why not, or nothing."""
        if made.packed is None:
            yield from self._give_back([(name, held)], leaving)
            return made.why_not
        try:
            commits = Freeing([self._commit(name, held, clock, made.packed), *leaving])
            stored, *_ = yield commits
            self.near.forget([name])
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
                "a load was not stored", "lease", f"{quoted(name)}: {slow}", logging.INFO
            )
        return "" if stored == STORED else "lease lost"

    def _give_back(
        self, leases: Iterable[tuple[bytes, bytes]], besides: Sequence[Command] = ()
    ) -> Operation[None]:
        """Give back the leases of loads that brought nothing to store.

        After a refresh the stale value is still there. The next refresh waits as after a failed one, or the stale
        reads would have the value loaded again and again. What a load in a transaction gave, another may store.
        """
        some = list(leases)
        freed = [one for one in some if loading(one[1]) or is_unsettled()]
        if backed_off := [one for one in some if one not in freed]:
            yield from self._leases.back_off(backed_off, besides)
            besides = ()
        if freed or besides:
            yield from self._leases.release(freed, besides)

    # While Redis is away

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
        packed, back, _ = self._pack_loaded(name, value, recipe)
        if packed is None:
            try:
                encoded = self._codec.encoded(value, recipe.type)
                packed = self._packed(name, encoded, (), b"", Life(0, 0), recipe.release)
            except Exception:  # it was told why
                return Taken(None, back)
        kept = PackedAway(b"1\t0\t0\t0\t" + packed.rest, packed.tags, packed.life.ttl / 1000)
        return Taken(kept, back)

    # What is stored

    def _pack_loaded(self, name: bytes, value: Any, recipe: Recipe) -> Made:
        """Return a loaded value ready to be stored. What can't be kept is returned to its caller all the same."""
        back = value
        try:
            life = recipe.keeping.life_of(value)
            encoded = self._codec.encoded(value, recipe.type)
            back = encoded.back
            # A load in a transaction may show rows that will be rolled back, and a rollback invalidates nothing.
            if is_unsettled():
                return Made(None, back, UNSETTLED)
            if life is None:
                return Made(None, back, NOT_WANTED)
            tags, source = recipe.tags(value), self._source(recipe)
            return Made(self._packed(name, encoded, tags, source, life, recipe.release), back)
        except Exception as error:  # too large, no JSON, a tag that is none, a function that failed
            if is_of_the_caller(error):
                raise
            self._count_not_kept(recipe.name)
            self.stats.say(
                "a loaded value can't be kept",
                recipe.name,
                f"{quoted(name)}: {recipe.name}: {message_of(error)}",
            )
            return Made(None, back, NOT_KEPT)

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
            error.args = (f"{quoted(name)}: {error}",)  # of many values at once it was this one
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

    def _source(self, recipe: Recipe) -> bytes:
        """Return what a worker needs to load this again, or nothing where the arguments have no JSON form."""
        if recipe.loader is None:
            return b""
        try:
            return recipe.loader.source(recipe.values)
        except ValueError as error:
            name = recipe.loader.name
            why = message_of(error).removeprefix(f"{name}: ")
            self.stats.say(f"no worker can repeat a call of {name}", name, why)
            return b""

    def _count_not_kept(self, loader: str) -> None:
        self.stats.counts["not_stored"] += 1
        self._figures.not_kept(loader)

    # Commands

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
