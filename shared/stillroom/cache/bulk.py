"""The cache's operations on many keys: as many round trips as for one, and the failure of one key is no other's."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

from stillroom.cache.bites import KEYS_AT_ONCE, Bites, in_bites
from stillroom.cache.core import Core, Ready, Stale
from stillroom.cache.declared import value_type_of
from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.failures import is_of_the_caller
from stillroom.cache.invalidation import warn_of_globs
from stillroom.cache.keeping import TtlOf
from stillroom.cache.leases import load_lease, loading
from stillroom.cache.loaders import Recipe, TagSpec
from stillroom.cache.loads import LATE, WON, Attempt
from stillroom.cache.outbox import KEY
from stillroom.codec import MISS
from stillroom.durations import Duration
from stillroom.errors import InvalidArgument, RedisUnavailable, in_code
from stillroom.keys import sanitized
from stillroom.operation import Call, Freeing, Operation, Pause, Timed
from stillroom.shown import repr_of
from stillroom.wire import leases_of_loads

T = TypeVar("T")
Found: TypeAlias = tuple[Entry, Freshness]
DEAD, STALE = Freshness.DEAD, Freshness.STALE


class Turn(NamedTuple):
    """A key whose load is ours: under which lease, and with which clock it began."""

    lease: bytes
    clock: bytes


class Bulk(Core):
    """The operations on many keys."""

    @overload
    def get_many(self, keys: Iterable[str], type: type[T]) -> Operation[dict[str, T]]: ...
    @overload
    def get_many(self, keys: Iterable[str], type: Any = ...) -> Operation[dict[str, Any]]: ...
    def get_many(self, keys: Iterable[str], type: Any = Any) -> Operation[dict[str, Any]]:
        """Return the values of the keys that have one, by key. Stale values are served; one task refreshes them.

        Cost: one MGET for each 500 keys. A value that does not fit `type` is absent. Redis away: {}.
        """
        names = names_of(keys)
        self._codec.reader(type)
        try:
            found = yield from self._look_many(
                list(names.values()),
                lambda entry, grade: grade is not DEAD and self._decode(entry, type) is not MISS,
            )
        except RedisUnavailable as error:
            self._fall_back("get_many", error)
            return {}
        values, stale = self._sorted_out(names, found, type)
        yield from self._ask_for_refreshes([one for one in stale.values() if one.source])
        return values

    def set_many(
        self,
        values: Mapping[str, Any],
        *,
        ttl: Duration | None = None,
        swr: Duration | None = None,
        tags: Sequence[str] = (),
        type: Any = Any,
    ) -> Operation[dict[str, bool]]:
        """Store values by key, and return which of them were stored, by key. The options are those of `set`.

        Cost: scripts, 100 in a batch. A value or key that can't be stored raises before anything is sent.
        Redis away: False for all.
        """
        return (yield from self.store_many(self.pack_many(values, ttl, swr, tags, type)))

    def pack_many(
        self,
        values: Mapping[str, Any],
        ttl: Duration | None = None,
        swr: Duration | None = None,
        tags: Sequence[str] = (),
        type: Any = Any,
    ) -> dict[str, Ready]:
        """Return ready values by key. Raises ValueTooLarge, Unencodable, InvalidKey, InvalidArgument."""
        life, given = self._keeper.life(ttl, swr), self._given_tags(tags)
        if not isinstance(values, Mapping):
            raise InvalidArgument(
                f"values: a mapping of keys to values, not {in_code(values):.100}"
            )
        names = {key: sanitized(key) for key in values}
        self.loaders.refuse_unfilled(*names)
        return {
            key: Ready(names[key], self._pack(names[key], value, type, given, b"", life))
            for key, value in values.items()
        }

    def store_many(self, values: Mapping[str, Ready]) -> Operation[dict[str, bool]]:
        """Store what pack_many gave. Return which of them were stored, by key."""
        stored = yield from self._put_all("set_many", list(values.values()))
        return dict(zip(values, stored, strict=True))

    def invalidate_many(self, keys: Iterable[str]) -> Operation[dict[str, bool]]:
        """Forget these keys and their loads. Return which of them held a value, by key. See `invalidate`.

        Many keys go in bites, and all of them are tried. Redis away: RedisUnavailable; nothing is promised then.
        """
        held = yield from self.forget_many(keys)
        warn_of_globs(held, held.values())
        return held

    def forget_many(self, keys: Iterable[str]) -> Operation[dict[str, bool]]:
        """Do what `invalidate_many` does, and warn of no glob."""
        names = names_of(keys)
        self.loaders.refuse_unfilled(*names)
        told = [KEY + name for name in names.values()]
        counts = yield from self._invalidator.tell(told, False)
        return {key: bool(count) for key, count in zip(names, counts, strict=True)}

    @overload
    def get_or_set_many(
        self,
        keys: Iterable[str],
        load_many: Callable[[list[str]], Coroutine[Any, Any, Mapping[str, T]]],
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
    ) -> Operation[dict[str, T]]: ...
    @overload
    def get_or_set_many(
        self,
        keys: Iterable[str],
        load_many: Callable[[list[str]], Mapping[str, T]],
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
    ) -> Operation[dict[str, T]]: ...
    def get_or_set_many(
        self,
        keys: Iterable[str],
        load_many: Callable[[list[str]], Any],
        *,
        ttl: Duration | TtlOf | None = None,
        swr: Duration | None = None,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        keep: Callable[[Any], object] | None = None,
        negative_ttl: Duration | None = None,
    ) -> Operation[dict[str, Any]]:
        """Return the values of all keys. `load_many` is called once, with the keys that this caller has to load.

        It returns a mapping; a key that is not in it has no value, and is absent. For keys that another caller is
        loading, this call waits. What can't be stored is returned all the same. Stale values are served, except
        those whose refresh is this caller's: it loads them with the missing ones. An error of `load_many` reaches
        its caller if anything was missing. The options are those of `get_or_set`; `type` is that of each value.
        Redis away: loads all and returns them.
        """
        names = names_of(keys)
        self.loaders.refuse_unfilled(*names)
        if not callable(load_many):
            raise InvalidArgument(
                f"load_many={in_code(load_many):.100}: a function of a list of keys"
            )
        kind = value_type_of(load_many) if type is None else type
        keeping = self._keeper.keeping(ttl, swr, keep, negative_ttl)
        recipe = self.recipe(Call(load_many), tags, kind, keeping)
        try:
            found = yield from self._look_many(list(names.values()), _owned_by(recipe))
        except RedisUnavailable as error:
            self._fall_back("get_or_set_many", error)
            return (yield from self._load_all_away(names, load_many, recipe, error))
        values, stale = self._sorted_out(names, found, recipe.type)
        missing = {key: name for key, name in names.items() if key not in values}
        refreshed = yield from self._turns_to_refresh(stale)
        loaded = yield from self._load_missing(missing, refreshed, names, load_many, recipe)
        values |= loaded
        return {key: value for key in names if (value := values.get(key, MISS)) is not MISS}

    # Steps

    def _look_many(
        self, names: Sequence[bytes], fits: Callable[[Entry, Freshness], bool]
    ) -> Operation[list[Found | None]]:
        """Return the entry and its freshness for each of these names, or None where there is none.

        Where another release's value is in the first place, the key's other place is read too.
        """
        prefix = self.keys.entry_prefix
        found = yield from self._look_in([prefix + name for name in names], names)
        unfit = [n for n, one in enumerate(found) if one and one[0].release and not fits(*one)]
        if unfit:
            others = [names[n] for n in unfit]
            beside = yield from self._look_in([self.keys.other(name) for name in others], others)
            for n, one in zip(unfit, beside, strict=True):
                found[n] = None
                if one is not None and fits(*one):
                    found[n] = one[0]._replace(is_beside=True), one[1]
        return found

    def _look_in(
        self, places: Sequence[bytes], names: Sequence[bytes]
    ) -> Operation[list[Found | None]]:
        """Return the entries in these places, which belong to these names.

        Many go in bites. Raises RedisUnavailable if none of these could be read.
        """
        found: list[Found | None] = []
        failure: RedisUnavailable | None = None
        has_read = not names
        bites = Bites(range(len(names)), KEYS_AT_ONCE)
        while bites.left:
            yield from bites.turn()
            some = bites.next()
            try:
                found += yield from self._look_in_bite(
                    [places[n] for n in some], [names[n] for n in some]
                )
                has_read = True
            except RedisUnavailable as error:
                if bites.again(error):
                    continue
                failure = error
                found += [None] * len(some)
            bites.done()
        if failure is not None and not has_read:
            raise failure
        return found

    def _look_in_bite(
        self, places: Sequence[bytes], names: Sequence[bytes]
    ) -> Operation[list[Found | None]]:
        known = self._judges.marks.synced
        *raws, clock = yield from self._read((b"MGET", *places, self.keys.clock), known)
        parse = self._parsed
        parsed = [raw and parse(raw, name) for raw, name in zip(raws, names, strict=True)]
        entries = [entry for entry in parsed if entry]
        grades = (yield from self._judges.settle(entries, clock, known)) if entries else []
        living = zip(entries, grades, strict=True)
        if len(entries) < len(parsed):
            return [next(living) if entry else None for entry in parsed]
        return list(living)

    def _sorted_out(
        self, names: Mapping[str, bytes], found: Sequence[Found | None], type: Any
    ) -> tuple[dict[str, Any], dict[str, Stale]]:
        """Return (values by key, the stale ones among them by key), and count all lookups."""
        values: dict[str, Any] = {}
        stale: dict[str, Stale] = {}
        decode = self._decode
        for key, one in zip(names, found, strict=True):
            if one is None or one[1] is DEAD or (value := decode(one[0], type)) is MISS:
                continue
            values[key] = value
            if one[1] is STALE:
                stale[key] = Stale(names[key], one[0], one[0].source)
        counts = self.stats.counts
        counts["misses"] += len(names) - len(values)
        counts["stale"] += len(stale)
        counts["hits"] += len(values) - len(stale)
        return values, stale

    def _turns_to_refresh(self, stale: Mapping[str, Stale]) -> Operation[dict[str, Turn]]:
        """Return the stale keys that this caller may refresh, because no worker can and nobody else does."""
        mine = {key: one for key, one in stale.items() if self._may_ask(one.name, one.entry)}
        leases = yield from self.lease_refreshes(list(mine.values()))
        clock = self._judges.marks.clock
        turns = {key: Turn(lease, clock) for key, lease in zip(mine, leases, strict=True) if lease}
        if clock:
            return turns
        yield from self._leases.release(
            (stale[key].name, turn.lease) for key, turn in turns.items()
        )
        return {}  # this process begins anew: the next reader's turn

    def _load_missing(
        self,
        missing: Mapping[str, bytes],
        refreshed: Mapping[str, Turn],
        names: Mapping[str, bytes],
        load_many: Callable[[list[str]], Any],
        recipe: Recipe,
    ) -> Operation[dict[str, Any]]:
        """Load the missing keys whose leases are ours in one call, then wait for the others' loads."""
        values: dict[str, Any] = {}
        pending, turns_of_stale = dict(missing), dict(refreshed)
        patience = time.monotonic() + self.settings.wait
        waited_for: dict[bytes, None] = {}
        while pending or turns_of_stale:
            try:
                turns, there = yield from self._take_turns(pending, recipe, waited_for)
            except GeneratorExit:
                raise
            except BaseException as error:
                yield from self._give_up(turns_of_stale, names)
                if not isinstance(error, RedisUnavailable):
                    raise
                self._fall_back("get_or_set_many", error)
                rest = {key: names[key] for key in (*pending, *turns_of_stale)}
                return values | (yield from self._load_all_away(rest, load_many, recipe, error))
            values |= there
            values |= yield from self._load_ours(turns, turns_of_stale, names, load_many, recipe)
            turns_of_stale = {}
            pending = {k: n for k, n in pending.items() if k not in turns and k not in there}
            is_own = not waited_for.keys().isdisjoint(leases_of_loads())
            if pending and (is_own or time.monotonic() > patience):
                return values | (yield from self._load_all(list(pending), load_many, recipe))
            if pending:
                found = yield from self._await_others(pending, recipe, patience, waited_for)
                values |= found
                pending = {key: name for key, name in pending.items() if key not in found}
        return values

    def _load_ours(
        self,
        turns: Mapping[str, Turn],
        turns_of_stale: Mapping[str, Turn],
        names: Mapping[str, bytes],
        load_many: Callable[[list[str]], Any],
        recipe: Recipe,
    ) -> Operation[dict[str, Any]]:
        """Load both kinds in one call. Where nothing was missing, an error leaves the stale values to be served."""
        ours = {**turns_of_stale, **turns}
        if not ours:
            return {}
        try:
            return (yield from self._load_turns(ours, names, load_many, recipe))
        except Exception as error:
            if turns or is_of_the_caller(error):
                raise
            self.stats.say("a refresh failed", "here", repr_of(error))
            return {}

    def _take_turns(
        self, missing: Mapping[str, bytes], recipe: Recipe, waited_for: dict[bytes, None]
    ) -> Operation[tuple[dict[str, Turn], dict[str, Any]]]:
        """Return (the keys whose load is ours, the values that others have stored since we looked).

        The leases of other callers' loads are put into `waited_for`.
        """
        if not missing:
            return {}, {}
        known = self._judges.marks.synced
        leases = {key: load_lease(recipe.lease) for key in missing}
        try:
            yield from self._before_writing()
            takes = Timed(
                self._lease_load(name, leases[key], recipe.lease) for key, name in missing.items()
            )
            replies = yield from in_bites(takes)
            if any(reply[0] == LATE for reply in replies):
                self.clock.doubt_clock()
            waited_for.update((reply[1], None) for reply in replies if len(reply) == 2)
            won = {
                key: reply for key, reply in zip(missing, replies, strict=True) if reply[0] == WON
            }
            values = yield from self._already_there(won, missing, recipe, known)
            yield from self._leases.release((missing[key], leases[key]) for key in values)
        except GeneratorExit:
            raise
        except BaseException:  # timed out or cancelled in the middle: some may be ours all the same
            yield from self._leases.release((missing[key], lease) for key, lease in leases.items())
            raise
        return {key: Turn(leases[key], won[key][1]) for key in won if key not in values}, values

    def _already_there(
        self, won: Mapping[str, Any], missing: Mapping[str, bytes], recipe: Recipe, known: int
    ) -> Operation[dict[str, Any]]:
        """Return the values that others stored between our look and our leases."""
        values: dict[str, Any] = {}
        for key, (_, clock, first, _, other) in won.items():
            own = self._own(first, other, missing[key], recipe.release)
            entry, _ = yield from self._judge_own(own, clock, known)
            if entry is not None and (value := self._decode(entry, recipe.type)) is not MISS:
                values[key] = value
        return values

    def _load_turns(
        self,
        turns: Mapping[str, Turn],
        names: Mapping[str, bytes],
        load_many: Callable[[list[str]], Any],
        recipe: Recipe,
    ) -> Operation[dict[str, Any]]:
        """Call the loader for these keys and store each value under its own lease."""
        leases = {key: (names[key], turn.lease) for key, turn in turns.items()}
        held = [turn.lease for turn in turns.values()]
        try:
            loaded = yield from self._call(recipe, Call(load_many, [list(turns)], leases=held))
            wanted = _values_of(loaded, turns)
        except GeneratorExit:
            raise
        except BaseException as error:
            yield from self._failed_turns(leases.values(), error)
            raise
        try:
            return (yield from self._store_turns(wanted, turns, leases, recipe))
        except BaseException:  # interrupted on its way
            self._leases.owe(leases.values())
            raise

    def _store_turns(
        self,
        wanted: Mapping[str, Any],
        turns: Mapping[str, Turn],
        leases: Mapping[str, tuple[bytes, bytes]],
        recipe: Recipe,
    ) -> Operation[dict[str, Any]]:
        """Store loaded values, and free the leases of keys without one. Return what readers get, by key."""
        ready = {
            key: self._pack_loaded(leases[key][0], value, recipe) for key, value in wanted.items()
        }
        packed = {key: made.packed for key, made in ready.items() if made.packed is not None}
        batch = Freeing(
            self._commit(*leases[key], turns[key].clock, one) for key, one in packed.items()
        )
        yield from self._give_back(lease for key, lease in leases.items() if key not in packed)
        stored = yield from self._each("store", batch, [leases[key][0] for key in packed])
        self._leases.owe(
            leases[key] for key, reply in zip(packed, stored, strict=True) if reply is None
        )
        self.stats.counts["leases_lost"] += sum(reply in (0, -1) for reply in stored)
        return {key: made.back for key, made in ready.items()}

    def _failed_turns(
        self, leases: Iterable[tuple[bytes, bytes]], error: BaseException
    ) -> Operation[None]:
        """Tell the waiters that our load failed, and back the refreshes off as single ones do."""
        some = list(leases)
        missing = [(name, held) for name, held in some if loading(held)]
        yield from self._leases.load_failed(missing, error)
        refreshed = [(name, held) for name, held in some if not loading(held)]
        self.stats.counts["refresh_errors"] += len(refreshed)
        yield from self._leases.back_off(refreshed)

    def _give_up(self, turns: Mapping[str, Turn], names: Mapping[str, bytes]) -> Operation[None]:
        yield from self._leases.release((names[key], turn.lease) for key, turn in turns.items())

    def _await_others(
        self,
        waiting: Mapping[str, bytes],
        recipe: Recipe,
        patience: float,
        waited_for: dict[bytes, None],
    ) -> Operation[dict[str, Any]]:
        """Return the values that others loaded, once no caller loads the rest any more or patience is over.

        Raises the error of a failed load that this caller waited for.
        """
        values: dict[str, Any] = {}
        held = dict(waiting)
        while held and time.monotonic() < patience:
            yield Pause(0.01)
            try:
                looks = yield from self._look_again_many(held, recipe, waited_for)
            except RedisUnavailable as error:
                self._fall_back("get_or_set_many", error)
                return values
            for look in looks.values():
                if look.failure is not None:
                    raise look.failure
            values |= {key: look.value for key, look in looks.items() if look.value is not MISS}
            held = {key: held[key] for key, look in looks.items() if look.holder}
            waited_for.update((look.holder, None) for look in looks.values() if look.holder)
        return values

    def _look_again_many(
        self, held: Mapping[str, bytes], recipe: Recipe, waited_for: dict[bytes, None]
    ) -> Operation[dict[str, Attempt]]:
        """Return by key what became of the loads that this caller waits for."""
        if self._leases.owed:
            yield from self._leases.free_owed()
        found = yield from self._look_many(list(held.values()), _owned_by(recipe))
        holders: list[bytes | None] = []
        failures: list[bytes | None] = []
        bites = Bites([*held.values()], KEYS_AT_ONCE)
        while bites.left:
            bite = bites.next()
            told = [*map(self.keys.lease, bite)], [*map(self.keys.failure, bite)]
            some = yield [(b"MGET", *keys) for keys in told]
            holders, failures = holders + some[0], failures + some[1]
            bites.done()
        looks: dict[str, Attempt] = {}
        for key, one, holder, failure in zip(held, found, holders, failures, strict=True):
            entry = one[0] if one is not None and one[1] is not DEAD else None
            value = MISS if entry is None else self._decode(entry, recipe.type)
            if value is not MISS:
                looks[key] = Attempt(value=value)
            else:
                failed = self._leases.failures.of(failure, waited_for.keys(), recipe.name)
                looks[key] = Attempt(failure=failed, holder=loading(holder))
        return looks

    def _load_all_away(
        self,
        names: Mapping[str, bytes],
        load_many: Callable[[list[str]], Any],
        recipe: Recipe,
        error: RedisUnavailable,
    ) -> Operation[dict[str, Any]]:
        """Return the values of all these keys while Redis is away: see away.py."""
        keys = {name: key for key, name in names.items()}

        def load(wanted: list[bytes], leases: Sequence[bytes]) -> Operation[Mapping[bytes, Any]]:
            some = [keys[name] for name in wanted]
            loaded = yield from self._loaded(some, load_many, recipe, leases)
            return {names[key]: value for key, value in loaded.items()}

        values = yield from self._obtain_away(list(keys), load, recipe, error)
        return {key: values[name] for key, name in names.items() if name in values}

    def _load_all(
        self, keys: list[str], load_many: Callable[[list[str]], Any], recipe: Recipe
    ) -> Operation[dict[str, Any]]:
        """Load without storing."""
        loaded = yield from self._loaded(keys, load_many, recipe)
        return {key: self._as_read(value, recipe) for key, value in loaded.items()}

    def _loaded(
        self,
        keys: list[str],
        load_many: Callable[[list[str]], Any],
        recipe: Recipe,
        leases: Sequence[bytes] = (),
    ) -> Operation[dict[str, Any]]:
        loaded = yield from self._call(recipe, Call(load_many, [keys], leases=leases))
        return _values_of(loaded, keys)


def _owned_by(recipe: Recipe) -> Callable[[Entry, Freshness], bool]:
    return lambda entry, _: recipe.owns(entry)


def names_of(keys: Iterable[str]) -> dict[str, bytes]:
    """Return the sanitized keys by key. Raises InvalidArgument for one text: it is not as many keys as it has
    letters.
    """
    if isinstance(keys, str | bytes) or not isinstance(keys, Iterable):
        raise InvalidArgument(
            f"keys={in_code(keys):.100}: give a list of keys; for one key write [key]"
        )
    return {key: sanitized(key) for key in keys}


def _values_of(loaded: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values that `load_many` has for these keys. A lazy mapping may fail as the load itself does."""
    if not isinstance(loaded, Mapping):
        raise InvalidArgument(
            f"load_many gives a mapping of keys to values, not {type(loaded).__name__}"
        )
    return {key: loaded[key] for key in keys if key in loaded}
