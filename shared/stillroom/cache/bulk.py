"""The cache's operations on many keys: one round trip where one key takes one, and each key fails for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, Unpack, overload

from stillroom.cache.body import LATE, WON, Ready, Stale, load_lease
from stillroom.cache.change import ChangeBody
from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.loaders import KeepOptions, Recipe, SetOptions, several
from stillroom.codec import MISS
from stillroom.errors import RedisUnavailable
from stillroom.keys import sanitized
from stillroom.operation import Call, Freeing, Operation, Pause, Timed

T = TypeVar("T")
Found: TypeAlias = tuple[Entry, Freshness]
DEAD, STALE = Freshness.DEAD, Freshness.STALE


class Turn(NamedTuple):
    """A key whose load is ours: under which lease, and with which clock it began."""

    lease: bytes
    clock: bytes


class BulkBody(ChangeBody):
    """ChangeBody, and the same for many keys."""

    @overload
    def get_many(self, keys: Iterable[str], type: type[T]) -> Operation[dict[str, T]]: ...
    @overload
    def get_many(self, keys: Iterable[str], type: Any = ...) -> Operation[dict[str, Any]]: ...
    def get_many(self, keys: Iterable[str], type: Any = Any) -> Operation[dict[str, Any]]:
        """The values of those keys that have one, by key. Stale ones are served, and refreshed by one task.

        Source: one MGET. A value that does not fit `type` is absent. Redis away: {}.
        """
        names = {key: sanitized(key) for key in keys}
        try:
            found = yield from self._look_many(list(names.values()))
        except RedisUnavailable as error:
            self._fall_back("get_many", error)
            return {}
        values, stale = self._sorted_out(names, found, type)
        yield from self._ask_for_refreshes([one for one in stale.values() if one.source])
        return values

    def set_many(
        self, values: Mapping[str, Any], **options: Unpack[SetOptions]
    ) -> Operation[dict[str, bool]]:
        """Store values by key; which of them were stored, by key. See `set`. Source: one batch of scripts.

        A value or key that can't be stored raises before anything is sent. Redis away: False for all.
        """
        return (yield from self.store_many(self.pack_many(values, options)))

    def pack_many(self, values: Mapping[str, Any], options: SetOptions) -> dict[str, Ready]:
        """Ready to be stored, by key. Raises ValueTooLarge, Unencodable, InvalidKey."""
        ttl, swr = self._times(options)
        tags, kind = several(options.get("tags", ())), options.get("type", Any)
        names = {key: sanitized(key) for key in values}
        return {
            key: Ready(names[key], self._pack(names[key], value, kind, tags, b""), ttl, swr)
            for key, value in values.items()
        }

    def store_many(self, values: Mapping[str, Ready]) -> Operation[dict[str, bool]]:
        """Store what pack_many gave; which of them were stored, by key."""
        stored = yield from self._put_all("set_many", list(values.values()))
        return dict(zip(values, stored, strict=True))

    def invalidate_many(self, keys: Iterable[str]) -> Operation[dict[str, bool]]:
        """Forget these keys and their loads; which of them held a value, by key. See `invalidate`.

        Redis away: RedisUnavailable; nothing is promised then.
        """
        names = {key: sanitized(key) for key in keys}
        if not names:
            return {}
        yield from self.agree()
        leases = [self._keys.lease(name) for name in names.values()]
        batch = [(b"DEL", *leases), *((b"UNLINK", self._keys.entry(n)) for n in names.values())]
        _, *counts = yield from self._changing(batch)
        return {key: bool(count) for key, count in zip(names, counts, strict=True)}

    @overload
    def get_or_set_many(
        self,
        keys: Iterable[str],
        load_many: Callable[[list[str]], Coroutine[Any, Any, Mapping[str, T]]],
        **options: Unpack[KeepOptions],
    ) -> Operation[dict[str, T]]: ...
    @overload
    def get_or_set_many(
        self,
        keys: Iterable[str],
        load_many: Callable[[list[str]], Mapping[str, T]],
        **options: Unpack[KeepOptions],
    ) -> Operation[dict[str, T]]: ...
    def get_or_set_many(
        self,
        keys: Iterable[str],
        load_many: Callable[[list[str]], Any],
        **options: Unpack[KeepOptions],
    ) -> Operation[dict[str, Any]]:
        """The values of all keys: `load_many` is called once, with those this caller has to load.

        It gives a mapping; a key that it lacks has no value, and is absent. Keys that another caller is loading are
        waited for. What can't be stored is returned all the same. Stale values are served; this caller loads those
        whose turn it is to be refreshed along with the missing ones. An error of `load_many` reaches its caller if
        anything was missing. Redis away: loads all and returns them.
        """
        names = {key: sanitized(key) for key in keys}
        recipe = self._recipe(lambda: None, options)
        try:
            found = yield from self._look_many(list(names.values()))
        except RedisUnavailable as error:
            self._fall_back("get_or_set_many", error)
            return (yield from self._load_all(list(names), load_many))
        values, stale = self._sorted_out(names, found, recipe.type)
        missing = {key: name for key, name in names.items() if key not in values}
        refreshed = yield from self._turns_to_refresh(stale)
        loaded = yield from self._load_missing(missing, refreshed, names, load_many, recipe)
        return {
            key: value
            for key in names
            if (value := {**values, **loaded}.get(key, MISS)) is not MISS
        }

    # Steps

    def _look_many(self, names: Sequence[bytes]) -> Operation[list[Found | None]]:
        """For each of these names the entry and its freshness, or None where there is none."""
        if not names:
            return []
        known = self._judges.synced
        prefix = self._keys.entry_prefix
        *raws, clock = yield from self._read([prefix + name for name in names], known)
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
        """(values by key, the stale ones among them by key); and all of them counted."""
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
        """The stale keys this caller may refresh: nobody else does, and no worker can."""
        mine = {key: one for key, one in stale.items() if self._may_ask(one.name, one.entry)}
        leases = yield from self._lease_refreshes(list(mine.values()))
        clock = self._judges.clock
        turns = {key: Turn(lease, clock) for key, lease in zip(mine, leases, strict=True) if lease}
        if clock:
            return turns
        yield from self._release((stale[key].name, turn.lease) for key, turn in turns.items())
        return {}  # this process begins anew: the next reader's turn

    def _load_missing(
        self,
        missing: Mapping[str, bytes],
        refreshed: Mapping[str, Turn],
        names: Mapping[str, bytes],
        load_many: Callable[[list[str]], Any],
        recipe: Recipe,
    ) -> Operation[dict[str, Any]]:
        """One load for what is ours, then the others' loads as they come in."""
        values: dict[str, Any] = {}
        pending, turns_of_stale = dict(missing), dict(refreshed)
        patience = time.monotonic() + self.settings.wait
        while pending or turns_of_stale:
            try:
                turns, there = yield from self._take_turns(pending, recipe)
            except RedisUnavailable as error:
                self._fall_back("get_or_set_many", error)
                yield from self._give_up(turns_of_stale, names)
                return values | (yield from self._load_all([*pending, *turns_of_stale], load_many))
            values |= there
            values |= yield from self._load_ours(turns, turns_of_stale, names, load_many, recipe)
            turns_of_stale = {}
            pending = {k: n for k, n in pending.items() if k not in turns and k not in there}
            if pending and time.monotonic() > patience:
                return values | (yield from self._load_all(list(pending), load_many))
            if pending:
                found = yield from self._await_others(pending, recipe, patience)
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
        """One load for both. Where nothing was missing, an error leaves the stale values to be served."""
        ours = {**turns_of_stale, **turns}
        if not ours:
            return {}
        try:
            return (yield from self._load_turns(ours, names, load_many, recipe))
        except Exception as error:
            if turns:
                raise
            self.stats.say("a refresh failed", "here", repr(error))
            return {}

    def _take_turns(
        self, missing: Mapping[str, bytes], recipe: Recipe
    ) -> Operation[tuple[dict[str, Turn], dict[str, Any]]]:
        """(the keys whose load is ours, the values that others have stored since we looked)."""
        if not missing:
            return {}, {}
        known = self._judges.synced
        leases = {key: load_lease(recipe.lease) for key in missing}
        try:
            yield from self._before_writing()
            replies = yield Timed(
                self._lease_load(name, leases[key], recipe.lease) for key, name in missing.items()
            )
            if any(reply[0] == LATE for reply in replies):
                self._clock.doubt_clock()
            won = {
                key: reply for key, reply in zip(missing, replies, strict=True) if reply[0] == WON
            }
            values = yield from self._already_there(won, missing, recipe, known)
        except GeneratorExit:
            raise
        except BaseException:  # timed out or cancelled in the middle: some may be ours all the same
            yield from self._release((missing[key], lease) for key, lease in leases.items())
            raise
        yield from self._release((missing[key], leases[key]) for key in values)
        return {key: Turn(leases[key], won[key][1]) for key in won if key not in values}, values

    def _already_there(
        self, won: Mapping[str, Any], missing: Mapping[str, bytes], recipe: Recipe, known: int
    ) -> Operation[dict[str, Any]]:
        """The values that others have stored between our look and our leases."""
        values: dict[str, Any] = {}
        for key, (_, clock, raw, _) in won.items():
            entry, _ = yield from self._judge(raw, missing[key], clock, known)
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
        """Call the loader for these keys and store what it gives, each under its own lease."""
        leases = {key: (names[key], turn.lease) for key, turn in turns.items()}
        try:
            loaded = _mapping((yield Call(load_many, [list(turns)])))
        except GeneratorExit:
            raise
        except BaseException:
            self.stats.counts["load_errors"] += 1
            yield from self._failed_turns(leases.values())
            raise
        self.stats.counts["loads"] += 1
        wanted = {key: loaded[key] for key in turns if key in loaded}
        packed = {
            key: self._pack_or_none(names[key], value, recipe) for key, value in wanted.items()
        }
        batch = Freeing(
            self._commit(names[key], turns[key].lease, turns[key].clock, one, recipe)
            for key, one in packed.items()
            if one is not None
        )
        yield from self._release(lease for key, lease in leases.items() if packed.get(key) is None)
        stored = yield from self._each("store", batch)
        self.stats.counts["leases_lost"] += sum(reply in (0, -1) for reply in stored)
        return wanted

    def _failed_turns(self, leases: Iterable[tuple[bytes, bytes]]) -> Operation[None]:
        """A load of ours failed: others may load what is missing, and refreshes back off, as single ones do."""
        some = list(leases)
        missing = [(name, held) for name, held in some if held.startswith(b"load.")]
        yield from self._release(missing)
        refreshed = [lease for lease in some if lease not in missing]
        self.stats.counts["refresh_errors"] += len(refreshed)
        yield from self._back_off_all(refreshed)

    def _give_up(self, turns: Mapping[str, Turn], names: Mapping[str, bytes]) -> Operation[None]:
        yield from self._release((names[key], turn.lease) for key, turn in turns.items())

    def _await_others(
        self, waiting: Mapping[str, bytes], recipe: Recipe, patience: float
    ) -> Operation[dict[str, Any]]:
        """The values others have loaded; returns when nobody is loading the rest any more, or patience is over."""
        values: dict[str, Any] = {}
        held = dict(waiting)
        while held and time.monotonic() < patience:
            yield Pause(0.01)
            try:
                looks = yield from self._look_again_many(held, recipe)
            except RedisUnavailable as error:
                self._fall_back("get_or_set_many", error)
                return values
            values |= {key: value for key, (value, _) in looks.items() if value is not MISS}
            held = {
                key: held[key] for key, (value, busy) in looks.items() if value is MISS and busy
            }
        return values

    def _look_again_many(
        self, held: Mapping[str, bytes], recipe: Recipe
    ) -> Operation[dict[str, tuple[Any, bool]]]:
        """By key: (the value or MISS, whether somebody is loading it)."""
        found = yield from self._look_many(list(held.values()))
        (holders,) = yield [(b"MGET", *(self._keys.lease(name) for name in held.values()))]
        looks = {}
        for key, one, holder in zip(held, found, holders, strict=True):
            entry = one[0] if one is not None and one[1] is not DEAD else None
            value = MISS if entry is None else self._decode(entry, recipe.type)
            looks[key] = value, holder is not None and holder.startswith(b"load.")
        return looks

    def _load_all(
        self, keys: list[str], load_many: Callable[[list[str]], Any]
    ) -> Operation[dict[str, Any]]:
        """Load without storing."""
        loaded = _mapping((yield Call(load_many, [keys])) if keys else {})
        self.stats.counts["loads"] += 1
        return {key: loaded[key] for key in keys if key in loaded}


def _mapping(loaded: Any) -> Mapping[str, Any]:
    if not isinstance(loaded, Mapping):
        raise TypeError(f"load_many gives a mapping of keys to values, not {type(loaded).__name__}")
    return loaded
