"""Calls of registered loaders: one by itself, and many that are looked up in as many round trips as one takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from stillroom.cache.bites import Bites
from stillroom.cache.bulk import Bulk
from stillroom.cache.core import Stale
from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.loaders import Loader, Recipe
from stillroom.cache.near import KEYED
from stillroom.codec import MISS
from stillroom.errors import RedisUnavailable
from stillroom.operation import Failed, Operation, together

Look: TypeAlias = tuple[Entry | None, Freshness]

LOOKS_AT_ONCE = 100  # in one batch, where each of them reads the clock


class Asked(NamedTuple):
    """A call of a loader, not yet made."""

    loader: Loader
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Wanted(NamedTuple):
    """What a call of a loader wants: the key and the recipe of its value, and what a copy of it is found by."""

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

    def call_many(self, calls: Sequence[Asked]) -> Operation[list[Any]]:
        """Return what the cache has for each of these calls, and Unread in the place of what it has not.

        Cost: one MGET for each 500 calls. Stale values are served; one task refreshes them. Each key that is served
        is counted as one lookup.
        """
        wanted = [wanted_of(*call) for call in calls]
        looks = yield from self._look_for_all({one.name: one for one in wanted})
        values = [self._served(one, looks[one.name]) for one in wanted]
        served = {
            one.name: (one, look)
            for one, value in zip(wanted, values, strict=True)
            if type(value) is not Unread and not isinstance(look := looks[one.name], Unread)
        }
        yield from self._note_served(served.values())
        return values

    def _look_for_all(
        self, wanted: Mapping[bytes, Wanted]
    ) -> Operation[dict[bytes, Look | Unread]]:
        """Return by name what `_look_for` returns, or Unread where nothing could be read."""
        plain = {name: one for name, one in wanted.items() if _is_plain(one.recipe)}
        if len(plain) == len(wanted):
            return (yield from self._look_plain(plain))
        looks: dict[bytes, Look | Unread] = {}
        bites = Bites([name for name in wanted if name not in plain], LOOKS_AT_ONCE)
        while bites.left:
            yield from bites.turn()
            some = bites.next()
            first = [] if looks or not plain else [self._look_plain(plain)]
            found = yield from together(*(self._look_for(*wanted[name]) for name in some), *first)
            looks.update(zip(some, map(_good, found), strict=False))
            if first:
                looks.update(_good(found[-1]))
            bites.done()
        return looks

    def _look_plain(self, wanted: Mapping[bytes, Wanted]) -> Operation[dict[bytes, Look | Unread]]:
        """Look those up that no request remembers and no process keeps, in one MGET."""
        try:
            found = yield from self._look_many(
                list(wanted), lambda entry: wanted[entry.key].recipe.owns(entry)
            )
        except RedisUnavailable as error:
            return dict.fromkeys(wanted, Unread(error))
        return {
            name: one or (None, Freshness.DEAD) for name, one in zip(wanted, found, strict=True)
        }

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
    return Wanted(loader.place(values), loader.recipe(values), call)


def _is_plain(recipe: Recipe) -> bool:
    is_remembered = recipe.loader is not None and recipe.loader.is_remembered
    return recipe.near is None and not is_remembered


def _good(outcome: Any) -> Any:
    """Return what a look has found, or Unread where Redis is away. Raises any other error."""
    if not isinstance(outcome, Failed):
        return outcome
    if isinstance(outcome.error, RedisUnavailable):
        return Unread(outcome.error)
    raise outcome.error
