"""Snapshots as rows of numbers: where nothing is known, and few enough of them to draw. Pure.

A picture is some 500 pixels wide and a day has 1,440 minutes. What is left out must not be what matters: of each
stretch of the period the rows with the lowest and the highest value stay, so a spike of one minute is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from stillroom.health.report import Measures, Report, Snapshot
from stillroom.web.status.choices import DAY, MINUTE_S, Choice, row_s

STRETCHES = 100  # of a period; each keeps two rows of a single series
YOUNG_LEAST_S = MINUTE_S  # the shortest period: of a system that has one snapshot
SANE = 1e15  # nothing measured here is larger: whatever wrote it, it is not known

Getter = Callable[[Measures], float | None]


class Row(NamedTuple):
    """Hold what is known of one moment, a value for each series."""

    time: float
    values: tuple[float | None, ...]


class Span(NamedTuple):
    """A part of a period."""

    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start

    def place(self, time: float) -> float:
        """Return how far into the span a time is, 0 to 1."""
        return (time - self.start) / self.length


class Period(NamedTuple):
    """Hold the measurements of a time, oldest first; its gaps; and the spans in which a server was away."""

    window: Span
    measures: Sequence[Measures]
    gaps: Sequence[Span]
    failures: Sequence[Span]
    choice: Choice = DAY

    @property
    def is_young(self) -> bool:
        """Return whether there was nothing to measure in the first part of the time that was asked for."""
        return self.window.length < self.choice.seconds

    @property
    def step_s(self) -> float:
        """Return the seconds that a row of its table stands for."""
        return row_s(self.window.length)

    def rows(self, getters: Sequence[Getter]) -> list[Row]:
        """Return a row for each measurement."""
        return [Row(one.time, tuple([_sane(get(one)) for get in getters])) for one in self.measures]


def period_of(
    report: Report,
    history: Iterable[Snapshot],
    now: float,
    choice: Choice = DAY,
    since: float | None = None,
) -> Period:
    """Return the time up to now; the report is the newest measurement.

    `since`: when the first snapshot of all was made. A system that is younger than the time asked for has a shorter
    period: there is nothing missing before its beginning.
    """
    start = now - choice.seconds
    if since is not None:
        start = min(max(start, since), now - YOUNG_LEAST_S)
    window = Span(start, now)
    inside = [one for one in history if window.start <= one.time <= min(now, report.time)]
    snapshots = sorted(inside, key=lambda one: one.time)
    gaps = _gaps([*snapshots, report], window, choice.gap_s)
    failures = _failures(snapshots, now, choice.every)
    return Period(window, [*snapshots, report], gaps, failures, choice)


def _gaps(measures: Sequence[Measures], window: Span, gap_s: float) -> list[Span]:
    steps = pairwise([window.start, *(one.time for one in measures), window.end])
    return [Span(*step) for step in steps if step[1] - step[0] > gap_s]


def _failures(snapshots: Sequence[Snapshot], now: float, every: float) -> list[Span]:
    """Return the failed times; each lasts until the next snapshot."""
    found: list[Span] = []
    for has_failed, run in groupby(snapshots, lambda one: one.error is not None):
        if has_failed:
            times = [one.time for one in run]
            found.append(Span(times[0], min(times[-1] + every, now)))
    return found


def with_gaps(rows: Sequence[Row], gap_s: float = DAY.gap_s) -> Iterator[Row]:
    """Yield the rows, with a row of nothing wherever there is a gap: a line drawn across it would be invented."""
    for before, row in pairwise([None, *rows]):
        if before is not None and row is not None and row.time - before.time > gap_s:
            yield Row(before.time, (None,) * len(row.values))
        if row is not None:
            yield row


def thinned(rows: Iterable[Row], window: Span, stretches: int = STRETCHES) -> list[Row]:
    """Keep of each stretch the rows with the lowest and highest value of a series.

    Each change of what is known begins another stretch.
    """
    length = window.length / stretches

    def stretch(row: Row) -> tuple[object, ...]:
        return int((row.time - window.start) / length), *[value is None for value in row.values]

    return [row for _, run in groupby(rows, stretch) for row in _extremes(list(run))]


def low_and_high(rows: Iterable[Row], n: int) -> tuple[float, float] | None:
    """Return the least and the greatest value of a series; None if nothing is known."""
    known = [value for row in rows if (value := row.values[n]) is not None]
    return (min(known), max(known)) if known else None


def whole(values: Iterable[float | None]) -> float | None:
    """Return the sum of the values; None if any of them is unknown."""
    given = list(values)
    known = [value for value in given if value is not None]
    return sum(known) if len(known) == len(given) else None


def by_step(rows: Sequence[Row], step_s: float) -> list[tuple[float, list[Row]]]:
    """Return (the step's start, its rows), the newest first. A step is an hour, or another round length of time."""
    steps = [(step, list(run)) for step, run in groupby(rows, lambda row: row.time // step_s)]
    return [(step * step_s, run) for step, run in reversed(steps)]


def _sane(value: float | None) -> float | None:
    """Return the number, or None if it is not sane. NaN compares as false with everything."""
    return value if value is not None and 0 <= value <= SANE else None


def _extremes(run: list[Row]) -> list[Row]:
    """Return the extremes of rows that know the same series."""
    kept: set[int] = set()
    for column in zip(*(row.values for row in run), strict=True):
        known = [value for value in column if value is not None]
        if known:
            kept |= {known.index(min(known)), known.index(max(known))}
    return [run[n] for n in sorted(kept)] or run[:1]
