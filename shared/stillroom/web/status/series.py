"""A day of snapshots as rows of numbers: where nothing is known, and few enough of them to draw. Pure.

A picture is some 500 pixels wide and a day has 1,440 minutes. What is left out must not be what matters: of each
stretch of the day the rows with the lowest and the highest value stay, so a spike of one minute is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from stillroom.health.report import Measures, Report, Snapshot

DAY_S = 86_400.0
HOUR_S = 3_600.0
MINUTE_S = 60.0
STRETCHES = 100  # of a day; each keeps two rows of a single series
# Snapshots are a minute apart. One that is late, or lost to a beat that was restarted, is no gap yet.
GAP_S = 150.0
SANE = 1e15  # nothing measured here is larger: whatever wrote it, it is not known

Getter = Callable[[Measures], float | None]


class Row(NamedTuple):
    """What is known of one moment, a value for each series."""

    time: float
    values: tuple[float | None, ...]


class Span(NamedTuple):
    """A part of the day."""

    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start

    def place(self, time: float) -> float:
        """How far into it, 0 to 1."""
        return (time - self.start) / self.length


class Day(NamedTuple):
    """A day's measurements, oldest first; where there are none; and where they say that a server was away."""

    window: Span
    measures: Sequence[Measures]
    gaps: Sequence[Span]
    failures: Sequence[Span]

    def rows(self, getters: Sequence[Getter]) -> list[Row]:
        """A row for each measurement."""
        return [Row(one.time, tuple([_sane(get(one)) for get in getters])) for one in self.measures]


def day_of(report: Report, history: Iterable[Snapshot], now: float) -> Day:
    """The 24 hours up to now; the report is the newest measurement."""
    window = Span(now - DAY_S, now)
    inside = [one for one in history if window.start <= one.time <= min(now, report.time)]
    snapshots = sorted(inside, key=lambda one: one.time)
    measures = [*snapshots, report]
    return Day(window, measures, _gaps(measures, window), _failures(snapshots, now))


def _gaps(measures: Sequence[Measures], window: Span) -> list[Span]:
    steps = pairwise([window.start, *(one.time for one in measures), window.end])
    return [Span(*step) for step in steps if step[1] - step[0] > GAP_S]


def _failures(snapshots: Sequence[Snapshot], now: float) -> list[Span]:
    """Each stands for its minute."""
    found: list[Span] = []
    for has_failed, run in groupby(snapshots, lambda one: one.error is not None):
        if has_failed:
            times = [one.time for one in run]
            found.append(Span(times[0], min(times[-1] + MINUTE_S, now)))
    return found


def with_gaps(rows: Sequence[Row]) -> Iterator[Row]:
    """The same, and a row of nothing wherever there is a gap: a line drawn across it would be invented."""
    for before, row in pairwise([None, *rows]):
        if before is not None and row is not None and row.time - before.time > GAP_S:
            yield Row(before.time, (None,) * len(row.values))
        if row is not None:
            yield row


def thinned(rows: Iterable[Row], window: Span, stretches: int = STRETCHES) -> list[Row]:
    """Of each stretch the rows with the lowest and highest value of a series; and each change of what is known."""
    length = window.length / stretches

    def stretch(row: Row) -> tuple[object, ...]:
        return int((row.time - window.start) / length), *[value is None for value in row.values]

    return [row for _, run in groupby(rows, stretch) for row in _extremes(list(run))]


def low_and_high(rows: Iterable[Row], n: int) -> tuple[float, float] | None:
    """The least and the greatest value of a series; None if nothing is known."""
    known = [value for row in rows if (value := row.values[n]) is not None]
    return (min(known), max(known)) if known else None


def whole(values: Iterable[float | None]) -> float | None:
    """Their sum; None if any of them is unknown."""
    given = list(values)
    known = [value for value in given if value is not None]
    return sum(known) if len(known) == len(given) else None


def by_hour(rows: Sequence[Row]) -> list[tuple[float, list[Row]]]:
    """(the hour's start, its rows), the newest first."""
    hours = [(hour, list(run)) for hour, run in groupby(rows, lambda row: row.time // HOUR_S)]
    return [(hour * HOUR_S, run) for hour, run in reversed(hours)]


def _sane(value: float | None) -> float | None:
    """NaN compares as false with everything."""
    return value if value is not None and 0 <= value <= SANE else None


def _extremes(run: list[Row]) -> list[Row]:
    """Of rows that know the same series."""
    kept: set[int] = set()
    for column in zip(*(row.values for row in run), strict=True):
        known = [value for value in column if value is not None]
        if known:
            kept |= {known.index(min(known)), known.index(max(known))}
    return [run[n] for n in sorted(kept)] or run[:1]
