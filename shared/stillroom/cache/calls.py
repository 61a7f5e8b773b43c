"""Calls of registered loaders: one by itself, and many that are looked up in as many round trips as one takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeAlias

from stillroom.cache.bites import Bites
from stillroom.cache.bulk import Bulk
from stillroom.cache.core import Stale
from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.loaders import Loader, Recipe
from stillroom.cache.near import KEYED
from stillroom.codec import MISS
from stillroom.errors import RedisUnavailable
from stillroom.keys import sanitized
from stillroom.operation import Failed, Operation, together

Look: TypeAlias = tuple[Entry | None, Freshness]

LOOKS_AT_ONCE = 100  # in one batch, where each of them reads the clock


class Wanted(NamedTuple):
    """A call of a loader: the key and the recipe of its value, and what a copy of it is found by."""

    name: bytes
    recipe: Recipe
    call: tuple[Any, ...] | None  # see near.Store


class Unread(NamedTuple):
    """Stands in the place of a value that no look has brought: this call is to be made by itself.

    `away`: why nothing could be looked up.
    """

    away: RedisUnavailable | None = None


class Calls(Bulk):
    """The operations that answer calls of registered loaders."""

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
        wanted = wanted_of(loader, args, kwargs)
        return self.obtain(wanted.name, wanted.recipe, wanted.call, away)

    def call_many(
        self, loader: Loader, calls: Sequence[Sequence[Any]], kwargs: Mapping[str, Any]
    ) -> Operation[list[Any]]:
        """Return what the cache has for each of these calls, and Unread in the place of what it has not.

        Cost: one MGET for each 500 calls; where this process keeps copies or remembers, one for each call that it
        has nothing of, 100 in a batch. Stale values are served; one task refreshes them. Each key that is served
        is counted as one lookup.
        """
        wanted = [wanted_of(loader, args, kwargs) for args in calls]
        try:
            looks = yield from self._look_for_all(loader, {one.name: one for one in wanted})
        except RedisUnavailable as error:
            return [Unread(error)] * len(wanted)
        values = [self._served(one, looks[one.name]) for one in wanted]
        served = {
            one.name: (one, looks[one.name])
            for one, value in zip(wanted, values, strict=True)
            if type(value) is not Unread
        }
        yield from self._note_served(served.values())
        return values

    def _look_for_all(
        self, loader: Loader, wanted: Mapping[bytes, Wanted]
    ) -> Operation[dict[bytes, Any]]:
        """Return by name what `_look_for` returns, or Unread. Raises RedisUnavailable if nothing could be read."""
        names = list(wanted)
        if loader.near is None and not loader.is_remembered:
            found = yield from self._look_many(names, wanted[names[0]].recipe.owns)
            looks: list[Any] = [one or (None, Freshness.DEAD) for one in found]
            return dict(zip(names, looks, strict=True))
        unproven = self._unproven(names, loader.near)
        others = [name for name in names if name not in unproven]
        looks_at_others = yield from self._look_for_each(wanted, others, with_proof=bool(unproven))
        return looks_at_others | (yield from self._look_for_each(wanted, unproven))

    def _unproven(self, names: Sequence[bytes], near: float | None) -> AbstractSet[bytes]:
        """Return those of these names that have a copy, if one look at the clock would prove all of them."""
        if (
            near is None
            or (not near and not self.near.is_in_request())
            or self.near.is_proven(near)
        ):
            return frozenset()
        copies = {name: self.near.store.of_name(self.near, name) for name in names}
        return {name for name, copy in copies.items() if copy and self.near.may_be_alive(copy)}

    def _look_for_each(
        self, wanted: Mapping[bytes, Wanted], names: Collection[bytes], *, with_proof: bool = False
    ) -> Operation[dict[bytes, Any]]:
        """Return by name what `_look_for` returns, or Unread. `with_proof`: copies are proved in the same trip."""
        looks: dict[bytes, Any] = {}
        proving = [self.prove()] if with_proof else []
        bites = Bites(list(names), LOOKS_AT_ONCE)
        while bites.left:
            yield from bites.turn()
            bite = bites.next()
            outcomes = yield from together(
                *(self._look_for(*wanted[name]) for name in bite), *proving
            )
            looks |= zip(bite, map(_good, outcomes), strict=False)
            proving = []
            bites.done()
        for alone in proving:
            yield from alone
        return looks

    def _served(self, one: Wanted, look: Look | Unread) -> Any:
        """Return the value to be served, or Unread."""
        if isinstance(look, Unread):
            return look
        entry, freshness = look
        if entry is None or freshness is Freshness.DEAD:
            return Unread()
        if freshness is Freshness.STALE and not self._source(one.recipe):
            return Unread()  # whoever is served it refreshes it, and loads
        decode = self._decode if one.recipe.near is None else self.near.value
        value = decode(entry, one.recipe.type)
        return Unread() if value is MISS else value

    def _note_served(self, served: Collection[tuple[Wanted, Look]]) -> Operation[None]:
        """Count these lookups, and order what is stale from a worker."""
        stale = []
        for (name, recipe, _), (entry, freshness) in served:
            self._count(None, freshness, recipe.loader)
            if entry is not None and freshness is Freshness.STALE:
                stale.append((Stale(name, entry, self._source(recipe)), recipe))
        if not stale:
            return
        shown = [
            (one.name, self._memo.recall(one.name, recipe.release))
            for one, recipe in stale
            if recipe.near is not None
        ]
        yield from self._ask_for_refreshes([one for one, _ in stale])
        for name, known in shown:
            self._show_again(name, known)


def wanted_of(loader: Loader, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Wanted:
    """Return what a call of a loader wants. Raises TypeError, InvalidArgument and Unkeyable, as the call itself."""
    values = loader.values(args, kwargs)
    is_simple = loader.near is not None and not kwargs and KEYED.issuperset(map(type, args))
    call = (loader, *args) if is_simple else None
    return Wanted(sanitized(loader.key(values)), loader.recipe(values), call)


def _good(outcome: Any) -> Any:
    """Return what a look has found, or Unread where Redis is away. Raises any other error."""
    if not isinstance(outcome, Failed):
        return outcome
    if isinstance(outcome.error, RedisUnavailable):
        return Unread(outcome.error)
    raise outcome.error
