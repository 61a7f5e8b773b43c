"""Calls of registered loaders: one by itself, and many that are looked up in as many round trips as one takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from sys import getsizeof
from typing import Any, NamedTuple, TypeAlias

from stillroom.cache.bites import KEYS_AT_ONCE, Bites
from stillroom.cache.bulk import Bulk
from stillroom.cache.core import Stale
from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.figures import LOOKUPS
from stillroom.cache.loaders import Loader, Recipe
from stillroom.cache.lookup import UNSEEN, PlainLook
from stillroom.cache.means import Means, Place
from stillroom.cache.near import remembered_by
from stillroom.codec import MISS, UNREADABLE, Parse
from stillroom.errors import RedisUnavailable
from stillroom.operation import UNUSUAL, Ahead, Failed, Operation, answered
from stillroom.together import together
from stillroom.wire import Command

Look: TypeAlias = tuple[Entry | None, Freshness]

LOOKS_AT_ONCE = 100  # in one batch, where each of them reads the clock
CALLS_KNOWN = 4_096  # some 4 MB
ARGUMENT_BYTES = 512  # a call with a larger argument is not remembered


class Asked(NamedTuple):
    """A call of a loader, not yet made."""

    loader: Loader
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class PlainCall:
    """Keeps the last look of a call, which is used again until the marks have moved."""

    __slots__ = ("about", "ahead")

    def __init__(self, type: Any, read: Parse, release: bytes, loader: Loader) -> None:
        self.about = type, read, release, loader
        self.ahead: PlainLook | None = None


class Wanted(NamedTuple):
    """Holds what a call of a loader wants: the key and the recipe of its value, and what a copy is found by."""

    name: bytes
    recipe: Recipe
    call: tuple[Any, ...] | None  # see near.Store
    plain: PlainCall | None  # how it is looked up, where a plain look may do


class _Looks(NamedTuple):
    """Hold what plain looks at the values of several calls are made of."""

    batch: list[Command]
    calls: Calls
    wanted: Sequence[Wanted]
    known: int  # how far the marks went then


class PlainLooks(Ahead, _Looks):
    """Looks at the values of several calls that are nearly always hits. See PlainLook."""

    __slots__ = ()

    def usual(self, replies: Sequence[Any]) -> Any:
        """Return the values, if each is the usual answer."""
        return self.calls._values_at_once(self.wanted, replies[0])

    def rest(
        self, replies: Sequence[Any] | None, away: RedisUnavailable | None = None
    ) -> Operation[Any]:
        """See Ahead. Where marks have come meanwhile it looks again, or the clock would seem to have gone back."""
        looking = self.calls._call_many(self.wanted)
        if away is None and self.known != self.calls._judges.marks.synced:
            return looking
        return answered(looking, self.batch, replies, away)


class Unread(NamedTuple):
    """Stands in the place of a value that no look has brought: this call is to be made by itself.

    `away`: why nothing could be looked up.
    """

    away: RedisUnavailable | None = None


UNREAD = Unread()
_plain_of = attrgetter("plain")


class Calls(Bulk):
    """The operations that answer calls of registered loaders."""

    def __init__(self, means: Means, place: Place) -> None:
        super().__init__(means, place)
        self._wanted: dict[tuple[Any, ...], Wanted] = means.wanted

    def wanted(self, loader: Loader, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Wanted:
        """Return what a call wants, which is remembered: the key of the next such call is known.

        Raises TypeError, InvalidArgument and Unkeyable, as the call itself.
        """
        call = None if kwargs else remembered_by(loader, args)
        found = None if call is None else self._wanted.get(call)
        if found is None:
            values = loader.values(args, kwargs)
            is_kept = loader.is_steady and all(getsizeof(arg) <= ARGUMENT_BYTES for arg in args)
            recipe, plain = loader.recipe(values), None
            if recipe.is_plain:
                read = self._codec.reader(recipe.type)
                plain = PlainCall(recipe.type, read, recipe.release, loader)
            found = Wanted(loader.place(values), recipe, call if is_kept else None, plain)
            if found.call is not None:
                if len(self._wanted) >= CALLS_KNOWN:
                    self._wanted.clear()
                self._wanted[found.call] = found
        return found

    def call(
        self,
        loader: Loader,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        away: RedisUnavailable | None = None,
    ) -> Operation[Any]:
        """Return what a call of a registered loader returns: the cached value, or the loaded one.

        `away`: see obtain.
        """
        name, recipe, call, plain = self.wanted(loader, args, kwargs)
        if plain is None or away is not None or not self._goes_ahead():
            return self.obtain(name, recipe, call, away)
        ahead = plain.ahead
        if ahead is None or ahead.known != self._judges.marks.synced:
            go_on = partial(self.obtain, name, recipe, call)
            ahead = plain.ahead = self._ahead(name, *plain.about, go_on)
        return ahead  # type: ignore[return-value]

    def call_many(self, calls: Sequence[Asked]) -> Operation[list[Any]]:
        """Return what the cache has for each of these calls, and Unread in the place of what it has not.

        Cost: one MGET for each 500 calls; where this process keeps copies or remembers, one for each call that it
        has nothing of, 100 in a batch. Stale values are served; one task refreshes them. Each key that is served
        is counted as one lookup.
        """
        wanted = [self.wanted(*call) for call in calls]
        is_plain = 0 < len(wanted) <= KEYS_AT_ONCE and None not in map(_plain_of, wanted)
        if not is_plain or not self._goes_ahead():
            return self._call_many(wanted)
        prefix = self.keys.entry_prefix
        places = dict.fromkeys([prefix + one.name for one in wanted])
        batch: list[Command] = [(b"MGET", *places, self.keys.clock)]
        if len(places) < len(wanted):  # one of them is wanted twice, and counted once
            return self._call_many(wanted)
        return PlainLooks(batch, self, wanted, self._judges.marks.synced)  # type: ignore[return-value]

    def _values_at_once(self, wanted: Sequence[Wanted], replies: Sequence[Any]) -> Any:
        """Return the values that plain looks have brought, if each is the usual answer; UNUSUAL else.

        As PlainLook.usual, with one look at the marks and at the time for all of them.
        """
        *raws, clock = replies
        turn, now, seen_of = self._judges.turn_at(clock), self.now_ms(), self._seen.get
        values: list[Any] = []
        counted: list[str] = []
        try:
            for (name, _, _, plain), raw in zip(wanted, raws, strict=True):
                kind, read, release, loader = plain.about  # type: ignore[union-attr]
                as_seen, payload, fresh_until, fitted, seen_at = seen_of(name, UNSEEN)
                if raw == as_seen and seen_at is turn and release == fitted:
                    place = int(now >= fresh_until)
                    if place and not self._is_asked_for(name, fresh_until):
                        return UNUSUAL
                    value = read(payload)
                else:
                    value, place = self._value_of(name, kind, read, release, raw, clock)
                    if value is UNUSUAL:
                        return UNUSUAL
                values.append(value)
                counted += LOOKUPS[place], loader.counted_as[place]
        except UNREADABLE:  # the operation tells of it
            return UNUSUAL
        counts = self.stats.counts
        for count in counted:
            counts[count] += 1
        return values

    def _call_many(self, wanted: Sequence[Wanted]) -> Operation[list[Any]]:
        """Return what `call_many` returns, whatever is found."""
        looks = yield from self._look_for_all({one.name: one for one in wanted})
        values = []
        stale: list[tuple[Stale, Recipe]] = []
        counted = set()
        for one in wanted:
            name, recipe, *_ = one
            look = looks[name]
            value = self._served(recipe, look)
            values.append(value)
            if isinstance(look, Unread) or value is UNREAD or name in counted:
                continue
            counted.add(name)
            entry, freshness = look
            self._count(None, freshness, recipe.loader)
            if freshness is Freshness.STALE and entry is not None:
                stale.append((Stale(name, entry, self._source(recipe)), recipe))
        if stale:
            yield from self._order(stale)
        return values

    def _look_for_all(
        self, wanted: Mapping[bytes, Wanted]
    ) -> Operation[dict[bytes, Look | Unread]]:
        """Return by name what `_look_for` returns, or Unread where nothing could be read."""
        plain = {name: one for name, one in wanted.items() if one.recipe.is_plain}
        if len(plain) == len(wanted):
            return (yield from self._look_plain(plain))
        kept = {name: one for name, one in wanted.items() if name not in plain}
        unproven = self._unproven(kept)
        others = [name for name in kept if name not in unproven]
        riders = [self._look_plain(plain)] if plain else []
        if unproven:
            riders.append(self._prove_beside())
        looks = yield from self._look_for_each(kept, others, riders)
        return looks | (yield from self._look_for_each(kept, list(unproven)))

    def _unproven(self, wanted: Mapping[bytes, Wanted]) -> dict[bytes, None]:
        """Return the names of copies that one look at the clock would prove, all of them at once."""
        kinds = {one.recipe.near for one in wanted.values()}
        lacking = {kind for kind in kinds if self._lacks_proof(kind)}
        if not lacking:
            return {}
        copy_of, near = self.near.store.of_name, self.near
        copies = {
            name: copy_of(near, name) for name, one in wanted.items() if one.recipe.near in lacking
        }
        alive = (name for name, copy in copies.items() if copy and near.may_be_alive(copy))
        return dict.fromkeys(alive)

    def _lacks_proof(self, near: float | None) -> bool:
        if near is None or (not near and not self.near.is_in_request()):
            return False
        return not self.near.is_proven(near)

    def _look_for_each(
        self,
        wanted: Mapping[bytes, Wanted],
        names: Sequence[bytes],
        riders: Sequence[Operation[dict[bytes, Look | Unread]]] = (),
    ) -> Operation[dict[bytes, Look | Unread]]:
        """Return by name what `_look_for` returns, or Unread, and what the riders return, which go along first."""
        looks: dict[bytes, Look | Unread] = {}
        bites = Bites(names, LOOKS_AT_ONCE)
        while bites.left or riders:
            yield from bites.turn()
            some = bites.next() if bites.left else ()
            looks_for = (self._look_for(*wanted[name][:3]) for name in some)
            found = yield from together(*looks_for, *riders)
            looks.update(zip(some, map(_good, found), strict=False))
            for ridden in map(_good, found[len(some) :]):
                looks.update(ridden)
            riders = ()
            bites.done()
        return looks

    def _prove_beside(self) -> Operation[dict[bytes, Look | Unread]]:
        """Have the copies proved in the same trip. That brings no look."""
        yield from self.prove()
        return {}

    def _look_plain(self, wanted: Mapping[bytes, Wanted]) -> Operation[dict[bytes, Look | Unread]]:
        """Look those up that no request remembers and no process keeps, in one MGET."""
        try:
            found = yield from self._look_many(
                list(wanted), lambda entry, _: wanted[entry.key].recipe.owns(entry)
            )
        except RedisUnavailable as error:
            return dict.fromkeys(wanted, Unread(error))
        return {
            name: one or (None, Freshness.DEAD) for name, one in zip(wanted, found, strict=True)
        }

    def _served(self, recipe: Recipe, look: Look | Unread) -> Any:
        """Return the value to be served, or Unread."""
        if isinstance(look, Unread):
            return look
        entry, freshness = look
        if entry is None or freshness is Freshness.DEAD:
            return UNREAD
        if freshness is Freshness.STALE and not self._source(recipe):
            return UNREAD  # whoever is served it refreshes it, and loads
        decode = self._decode if recipe.near is None else self.near.value
        value = decode(entry, recipe.type)
        return UNREAD if value is MISS else value

    def _order(self, stale: Sequence[tuple[Stale, Recipe]]) -> Operation[None]:
        """Order what is stale from a worker."""
        shown = [
            (one.name, self._memo.recall(one.name, recipe.release))
            for one, recipe in stale
            if recipe.near is not None
        ]
        yield from self._ask_for_refreshes([one for one, _ in stale])
        for name, known in shown:
            self._show_again(name, known)


def _good(outcome: Any) -> Any:
    """Return what a look has found, or Unread where Redis is away. Raises any other error."""
    if not isinstance(outcome, Failed):
        return outcome
    if isinstance(outcome.error, RedisUnavailable):
        return Unread(outcome.error)
    raise outcome.error
