"""Django's cache on the room's: `CACHES = {"default": {"BACKEND": "stillroom.web.django.cache.StillroomCache"}}`.

LOCATION names a part of the room's cache (default: `default`); two of Django's caches with the same LOCATION
share it, as they do with Django's own. It is no URL: REDIS_URL, or the setting STILLROOM, says where Redis is.
KEY_PREFIX, VERSION, KEY_FUNCTION and TIMEOUT are Django's.

    from django.core.cache import cache

    cache.get_or_set("rates", load_rates, 60, tags=["rates"])   # one caller loads, the others wait for it
    cache.set("rates", rates, 60, tags=["rates"])
    cache.invalidate_by_tag("rates")

Tags are those of the room: whatever invalidates one, in Python or after a commit, also invalidates what carries it
here.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache

from stillroom.cache import Cache
from stillroom.cache.template import fitting
from stillroom.durations import Duration, seconds_of
from stillroom.errors import SettingsError
from stillroom.keys import glob_literal
from stillroom.web.django import room
from stillroom.web.django.values import pack, unpack

_MISSING = object()
SHORT = 256  # printable characters, which fit into a key whatever they are


class StillroomCache(BaseCache):
    """Django's cache backend: `CACHES = {"default": {"BACKEND": "stillroom.web.django.cache.StillroomCache"}}`.

    Values are JSON, tuples, sets, bytes, dates and times, Decimal, UUID and responses; others raise. A timeout of
    None is the room's life_limit (7 d).

    Redis away: nothing is found, nothing is stored, and what is deleted is deleted before this process trusts
    another read. Only `clear` and `incr` raise (RedisUnavailable), because they can't be done later.
    """

    def __init__(self, location: str, params: dict[str, Any]) -> None:
        _refuse_foreign(location, params.get("OPTIONS") or {})
        super().__init__(params)
        # A colon ends it: to clear `shop` leaves `shop:pages` alone.
        named = (location or "default").replace("%", "%25").replace(":", "%3A")
        self._prefix = f"django:{named}:"

    @property
    def _cache(self) -> Cache:
        return room().cache

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        found = self._cache.get(self._name(key, version), Any, _MISSING)
        return default if found is _MISSING else unpack(found)

    def get_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        names = {self._name(key, version): key for key in keys}
        found = self._cache.get_many(names)
        return {names[name]: unpack(value) for name, value in found.items()}

    def set(
        self,
        key: Any,
        value: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Sequence[str] = (),
    ) -> None:
        """Store a value. Prefer get_or_set.

        A value that was computed before an invalidation and is set after it lives.
        """
        self.set_many({key: value}, timeout, version, tags=tags)

    def set_many(
        self,
        data: Mapping[Any, Any],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Sequence[str] = (),
    ) -> list[Any]:
        names = {self._name(key, version): key for key in data}
        values = {name: pack(data[key]) for name, key in names.items()}
        ttl = self._ttl(timeout)
        if ttl is None:  # over before it began
            self._cache.invalidate(*names, defer=True)
            return []
        stored = self._cache.set_many(values, ttl=ttl, swr=0, tags=tags)
        return [names[name] for name, is_stored in stored.items() if not is_stored]

    def add(
        self,
        key: Any,
        value: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Sequence[str] = (),
    ) -> bool:
        name, packed, ttl = self._name(key, version), pack(value), self._ttl(timeout)
        if ttl is None:
            return self._cache.get(name, Any, _MISSING) is _MISSING
        return self._cache.add(name, packed, ttl=ttl, swr=0, tags=tags)

    def get_or_set(
        self,
        key: Any,
        default: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Sequence[str] = (),
        swr: Duration = 0,
    ) -> Any:
        """Return the value, or `default` (called if it can be), which one caller of all processes makes while
        others wait.

        An invalidation while it is made wins: what is old is given to its caller and not kept. `swr`: seconds after
        the timeout in which a stale value is served while one caller makes the next.
        """
        ttl = self._ttl(timeout)

        def load() -> Any:
            return pack(default() if callable(default) else default)

        if ttl is None:
            found = self.get(key, _MISSING, version)
            return unpack(load()) if found is _MISSING else found
        longest = room().settings.life_limit - ttl
        swr = seconds_of("swr", swr, least=0)
        return unpack(
            self._cache.get_or_set(
                self._name(key, version), load, ttl=ttl, swr=min(swr, longest), tags=tags
            )
        )

    # Django's own would make several calls of each of these, and other requests' would come in between.

    async def aget_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        return await sync_to_async(self.get_many)(keys, version)

    async def aset(
        self,
        key: Any,
        value: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Sequence[str] = (),
    ) -> None:
        await sync_to_async(self.set)(key, value, timeout, version, tags=tags)

    async def aset_many(
        self,
        data: Mapping[Any, Any],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Sequence[str] = (),
    ) -> list[Any]:
        return await sync_to_async(self.set_many)(data, timeout, version, tags=tags)

    async def aadd(
        self,
        key: Any,
        value: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Sequence[str] = (),
    ) -> bool:
        return await sync_to_async(self.add)(key, value, timeout, version, tags=tags)

    async def aget_or_set(
        self,
        key: Any,
        default: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Sequence[str] = (),
        swr: Duration = 0,
    ) -> Any:
        """See get_or_set. `default` may be a coroutine function, too."""

        def make() -> Any:
            value = default() if callable(default) else default
            return async_to_sync(_result)(value) if isawaitable(value) else value

        return await sync_to_async(self.get_or_set)(key, make, timeout, version, tags=tags, swr=swr)

    async def aincr(self, key: Any, delta: int = 1, version: int | None = None) -> Any:
        return await sync_to_async(self.incr)(key, delta, version)

    async def adelete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        await sync_to_async(self.delete_many)(keys, version)

    def invalidate_by_tag(self, *tags: str, soft: bool = False) -> None:
        """Invalidate what carries one of these tags, here and in the rest of the room. See Cache.invalidate_by_tag.

        Redis away: it is done before this process trusts another read.
        """
        self._cache.invalidate_by_tag(*tags, soft=soft, defer=True)

    def touch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        name, ttl = self._name(key, version), self._ttl(timeout)
        if ttl is None:
            return self._cache.invalidate(name, defer=True) > 0
        return self._cache.touch(name, ttl=ttl, swr=0)

    def incr(self, key: Any, delta: int = 1, version: int | None = None) -> Any:
        """Add `delta` to a number. Its timeout stays as it was."""
        found = self._cache.incr(self._name(key, version), delta)
        if found is None:
            raise ValueError(f"Key '{key}' not found")
        return found

    def delete(self, key: Any, version: int | None = None) -> bool:
        return self._cache.invalidate(self._name(key, version), defer=True) > 0

    def delete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        self._cache.invalidate(*[self._name(key, version) for key in keys], defer=True)

    def has_key(self, key: Any, version: int | None = None) -> bool:
        return self._cache.get(self._name(key, version), Any, _MISSING) is not _MISSING

    def clear(self) -> None:
        """Clear all of this LOCATION, whoever wrote it; the rest of the room's cache is left alone."""
        self._cache.invalidate_by_pattern(glob_literal(self._prefix.encode()).decode() + "*")

    def _name(self, key: Any, version: int | None) -> str:
        name = self._prefix + str(self.make_and_validate_key(key, version=version))
        # What a visitor searches for may be in it: as in the keys of loaders, it may be long, or no UTF-8.
        return name if len(name) <= SHORT and name.isprintable() else fitting(name)[0]

    def _ttl(self, timeout: Any) -> float | None:
        """Return the ttl in seconds, or None where nothing is to be kept."""
        longest = room().settings.life_limit
        seconds = self.default_timeout if timeout is DEFAULT_TIMEOUT else timeout
        if seconds is None:
            return longest
        seconds = seconds_of("timeout", seconds, least=-math.inf)
        return min(seconds, longest) if seconds > 0 else None


async def _result(made: Awaitable[Any]) -> Any:
    return await made


def _refuse_foreign(location: Any, options: Mapping[str, Any]) -> None:
    """Refuse what other backends are given: a URL would be a part of each key here. Raises SettingsError."""
    if not isinstance(location, str) or "://" in location:
        raise SettingsError(
            "CACHES: the LOCATION of a StillroomCache is a name, not the URL of Redis. Leave it out, and give the "
            "URL as REDIS_URL in the environment or as redis_url in the setting STILLROOM"
        )
    for name in options:
        if name not in ("MAX_ENTRIES", "CULL_FREQUENCY"):  # Django's own, which count nothing here
            raise SettingsError(
                f"CACHES: a StillroomCache has no option {name!r} in OPTIONS; the settings of the room hold for it"
            )
