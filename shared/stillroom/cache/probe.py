"""Report on the cache for a check of health."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from stillroom.cache.figures import figures_in
from stillroom.durations import LAST_MOMENT
from stillroom.keys import Keys
from stillroom.stats import Stats
from stillroom.wire import Command

# Seconds from being stale to being fresh again, and the count for each refresh that took no longer.
LAG_BUCKETS = {bound: f"refresh_lag_{bound}" for bound in (1, 5, 15, 60, 300, 3_600)}
LAG_LONGER = "refresh_lag_longer"
LAG_SUM = "refresh_lag_ms"
COUNTED = {
    "hits": "hits",
    "stale": "stale",
    "misses": "misses",
    "loads": "loads",
    "load_errors": "load_errors",
    "refreshes": "refreshes_done",
    "refresh_errors": "refresh_errors",
    "fallbacks": "fallbacks",
    "decode_errors": "decode_errors",
    "not_stored": "not_stored",
    "near_hits": "near_hits",
    "near_proofs": "near_proofs",
    "near_evictions": "near_evictions",
}
NAMED = 20  # loaders that an advice may name; those with the most
LOADERS_MOST = 100  # in a report, those that are used most


def lag_bucket(seconds: float) -> str:
    """Return the count that a refresh with this lag belongs to."""
    return next((name for bound, name in LAG_BUCKETS.items() if seconds <= bound), LAG_LONGER)


class CacheProbe:
    """The part `cache`: counts, and the loaders' last errors."""

    part = "cache"

    def __init__(self, keys: Keys, stats: Stats) -> None:
        """`stats`: of the process that asks."""
        self._keys = keys
        self._gauges = stats.gauges

    def commands(self, now_ms: int) -> Sequence[Command]:
        return [(b"HGETALL", self._keys.errors)]

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        (errors,) = replies
        return {"errors": None if errors is None else tuple(_errors(errors))}

    def count(self, counts: Mapping[str, int] | None) -> Mapping[str, Any]:
        if counts is None:
            return {}
        fields: dict[str, Any] = {f: counts.get(name, 0) for f, name in COUNTED.items()}
        fields |= {name: gauge() for name, gauge in self._gauges.items()}
        answered = fields["hits"] + fields["stale"]
        lookups = answered + fields["misses"]
        loaders = figures_in(counts)
        fields["loaders"] = tuple(loaders[:LOADERS_MOST])
        fields["not_kept"] = _not_kept(loaders)
        return {**fields, "hit_ratio": answered / lookups if lookups else None, **_lag(counts)}


class TodoProbe:
    """For the part `tasks`: what invalidations promised and workers have not done."""

    part = "tasks"

    def __init__(self, shards: Sequence[Keys]) -> None:
        self._shards = shards

    def commands(self, now_ms: int) -> Sequence[Command]:
        return [(b"ZCARD", keys.todo) for keys in self._shards]

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        return {"todo": None if None in replies else sum(replies)}

    def count(self, counts: Mapping[str, int] | None) -> Mapping[str, Any]:
        return {}


def _not_kept(loaders: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found = [(one["name"], one["not_kept"]) for one in loaders if one["not_kept"]]
    return dict(sorted(found, key=lambda pair: (-pair[1], pair[0]))[:NAMED])


def _errors(pairs: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Return the loaders' last errors, without entries of another writer."""
    for name, text in zip(pairs[::2], pairs[1::2], strict=True):
        try:
            told = from_json(text)
            kind, place, at = str(told["kind"]), str(told["place"]), float(told["at"])
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
        if 0 <= at <= LAST_MOMENT:
            yield {"name": name.decode(errors="replace"), "kind": kind, "place": place, "at": at}


def _lag(counts: Mapping[str, int]) -> Mapping[str, float | None]:
    """Return the mean lag and the bound of the 95 % bucket, or None where nothing was refreshed."""
    buckets = {bound: counts.get(name, 0) for bound, name in LAG_BUCKETS.items()}
    refreshes = sum(buckets.values()) + counts.get(LAG_LONGER, 0)
    if not refreshes:
        return {}
    reached, bounds = 0, iter(buckets.items())
    bound = 0
    while reached < 0.95 * refreshes:
        bound, number = next(bounds, (86_400, refreshes))
        reached += number
    return {
        "refresh_lag_s": counts.get(LAG_SUM, 0) / refreshes / 1000,
        "refresh_lag_p95_s": bound,
    }
