"""Count what happens to each loader, by its name, as `loader:hits:product` in `ns:stats`; and keep its last error.

A function that is not registered as a loader is called by the place where it is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from stillroom.counted import LOADER, TOOK, by_name, percentile, took
from stillroom.stats import Stats

LOOKUPS = ("hits", "stale", "misses")  # how a lookup ends


class LoaderFigures:
    """Counts what happens to the loaders of a room."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def lookups(self, name: str) -> tuple[str, ...]:
        """Return what the lookups of a registered loader are counted as, for each of LOOKUPS."""
        return tuple([self._stats.counted_as(LOADER, what, name) for what in LOOKUPS])

    def loaded(self, name: str, seconds: float) -> None:
        """Count a load that has ended well, and how long it took."""
        self._count(name, "loads")
        self._took(name, seconds)

    def failed(self, name: str, seconds: float, error: BaseException) -> None:
        """Count a load that has failed, and note its error: its kind and its place, never its message."""
        self._count(name, "load_errors")
        self._took(name, seconds)
        told = {"kind": kind_of(error), "place": place_in(error.__traceback__), "at": time.time()}
        self._stats.errors[self._stats.named(LOADER, name)] = json.dumps(told)

    def not_kept(self, name: str) -> None:
        """Count a value that could not be kept."""
        self._count(name, "not_kept")

    def refreshed(self, name: str, lag_ms: int) -> None:
        """Count a refresh, and how long the entry had been stale. 0: it was invalidated softly, before its time."""
        self._count(name, "refreshes")
        if lag_ms > 0:
            self._count(name, "late")
            self._count(name, "lag_ms", lag_ms)

    def refresh_failed(self, name: str) -> None:
        """Count a refresh that has failed. Nobody tries it again for a while."""
        self._count(name, "refresh_errors")

    def _took(self, name: str, seconds: float) -> None:
        self._count(name, took(seconds))
        self._count(name, "load_ms", round(seconds * 1000))

    def _count(self, name: str, what: str, by: int = 1) -> None:
        self._stats.counts[self._stats.counted_as(LOADER, what, name)] += by


def kind_of(error: BaseException) -> str:
    """Return the name of an error's class, with its module unless that is Python's own.

    >>> kind_of(KeyError("secret")), kind_of(json.JSONDecodeError("secret", "", 0))
    ('KeyError', 'json.decoder.JSONDecodeError')
    """
    kind = type(error)
    name = kind.__qualname__
    return (name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}")[:200]


def place_in(trace: TracebackType | None) -> str:
    """Return where an error was raised, `shop.db:41`; empty if nobody knows."""
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "?")
    return f"{module}:{trace.tb_lineno}"[:200]


# Reading


def figures_in(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the fields of LoaderStats for each loader that is among the counts, the most used first."""
    found = [_fields(name, counted) for name, counted in by_name(counts, LOADER).items()]
    return sorted(found, key=lambda one: (-one["hits"] - one["misses"] - one["loads"], one["name"]))


def _fields(name: str, counted: Mapping[str, int]) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": name}
    for what in (*LOOKUPS, "loads", "load_errors", "refreshes", "refresh_errors"):
        fields[what] = counted.get(what, 0)
    fields["not_kept"] = counted.get("not_kept", 0)
    answered = fields["hits"] + fields["stale"]
    lookups = answered + fields["misses"]
    numbers = [counted.get(one, 0) for one in TOOK]
    late = counted.get("late", 0)
    return {
        **fields,
        "hit_ratio": answered / lookups if lookups else None,
        "load_p50_ms": percentile(numbers, 0.50),
        "load_p95_ms": percentile(numbers, 0.95),
        "load_ms": counted.get("load_ms", 0),
        "took": dict(zip(TOOK, numbers, strict=True)) if any(numbers) else None,
        "refresh_lag_s": counted.get("lag_ms", 0) / late / 1000 if late else None,
    }
