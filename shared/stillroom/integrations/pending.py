"""Invalidations that wait for a transaction to commit, and their delivery afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from stillroom.cache import AsyncCache, Cache
from stillroom.keys import pattern, sanitized
from stillroom.misuse import YES_OR_NO, refuse_other
from stillroom.room import AsyncStillroom, Stillroom

log = logging.getLogger("stillroom.integrations")


class Act(NamedTuple):
    """One call of the cache's face."""

    method: str
    names: tuple[str, ...]
    options: dict[str, Any]


class Pending:
    """Keys, tags and globs that a transaction makes untrue. Each is kept once, in the order it came in."""

    def __init__(self) -> None:
        self._keys: dict[str, None] = {}
        self._tags: dict[str, None] = {}
        self._soft: dict[str, None] = {}
        self._globs: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._keys or self._tags or self._soft or self._globs)

    def add_keys(self, keys: Iterable[str]) -> None:
        """Add keys. Raises InvalidKey."""
        self._keys |= dict.fromkeys(_checked(keys))

    def add_tags(self, tags: Iterable[str], *, soft: bool = False) -> None:
        """Add tags. Raises InvalidKey, and InvalidArgument for a `soft` that is neither True nor False."""
        refuse_other("soft", soft, bool, YES_OR_NO)
        (self._soft if soft else self._tags).update(dict.fromkeys(_checked(tags)))

    def add_glob(self, glob: str) -> None:
        """Add a glob. Raises InvalidKey."""
        pattern(glob)
        self._globs[glob] = None

    def take_in(self, other: Pending) -> None:
        """Add everything that `other` holds."""
        self._keys |= other._keys
        self._tags |= other._tags
        self._soft |= other._soft
        self._globs |= other._globs

    def acts(self) -> list[Act]:
        """Return the calls that invalidate everything here. A tag that is invalidated hard needs no soft call."""
        soft = [tag for tag in self._soft if tag not in self._tags]
        acts = [
            Act("invalidate", tuple(self._keys), {}),
            Act("invalidate_by_tag", tuple(self._tags), {}),
            Act("invalidate_by_tag", tuple(soft), {"soft": True}),
            *(Act("invalidate_by_pattern", (glob,), {}) for glob in self._globs),
        ]
        return [act for act in acts if act.names]


def deliver(cache: Cache, pending: Pending) -> None:
    """Invalidate everything in `pending`. The rows are committed, so nothing is raised.

    Redis away: the invalidations are deferred in this process (see `Cache.invalidate`). Any other error is logged.
    """
    for act in pending.acts():
        try:
            getattr(cache, act.method)(*act.names, defer=True, **act.options)
        except Exception as error:
            _complain(act, error)


async def deliver_async(cache: AsyncCache, pending: Pending) -> None:
    """Do the same as `deliver` in the running event loop."""
    for act in pending.acts():
        try:
            await getattr(cache, act.method)(*act.names, defer=True, **act.options)
        except Exception as error:
            _complain(act, error)


def blocking_cache(room: Stillroom | AsyncStillroom) -> Cache:
    """Return the room's cache for a thread that has no event loop. An async room lends its wire for threads.

    Raises InvalidArgument for what is no room.
    """
    refuse_other("room", room, (Stillroom, AsyncStillroom), "a Stillroom, or an AsyncStillroom")
    return room.operations.cache_in_threads


def _complain(act: Act, error: Exception) -> None:
    log.error(
        "%s of %d names failed after a commit, and old values stay in the cache until they run out: %s",
        act.method,
        len(act.names),
        error,
    )


def _checked(names: Iterable[str]) -> list[str]:
    checked = list(names)
    for name in checked:
        sanitized(name)
    return checked
