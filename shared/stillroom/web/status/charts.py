"""Charts as inline SVG: lines and stacked areas over a period, and sparklines. Pure.

The SVG *is* the plot; its labels stand outside of it, in the margins that style.css leaves. Positions are percent,
so a chart is as wide as its column while text and lines keep their size; what can't be given in percent (a path)
stands in an inner SVG that is stretched. Nothing needs a style attribute, so the page needs no `unsafe-inline`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

from stillroom.web.status.choices import DAY_S, tick_s
from stillroom.web.status.html import Html, el
from stillroom.web.status.numbers import Unit, clock, date
from stillroom.web.status.series import Period, Row, Span

TICK_CLEAR = 0.04  # no label of a time so near to an edge
WIDE, HIGH = 1440.0, 100.0  # the inner SVG's own measures: minutes of a day, and percent


class Plot(NamedTuple):
    """All that a chart draws."""

    period: Period
    rows: Sequence[Row]  # thinned
    series: int  # how many
    top: float
    unit: Unit
    limit: float | None = None
    is_stacked: bool = False


def chart(plot: Plot, says: str) -> Html:
    """Return a chart; `says` tells in a sentence what it shows."""
    return el(
        "svg",
        *_bands("failed", plot.period.failures, plot.period.window),
        *_bands("gap", plot.period.gaps, plot.period.window),
        *_value_ticks(plot),
        *_time_ticks(plot.period.window),
        _stretched(*_shapes(plot)),
        *_limit(plot),
        *_ends(plot),
        class_="chart",
        role="img",
        aria_label=says,
    )


def sparkline(rows: Sequence[Row], window: Span, says: str) -> Html:
    """Return the first series of these rows, from 0 to its highest."""
    highest = max((row.values[0] or 0.0 for row in rows), default=0.0) or 1.0
    points = [(row.time, row.values[0]) for row in rows]
    path = el("path", d=line(points, window, highest), class_="line s1")
    return el("svg", _stretched(path), class_="spark", role="img", aria_label=says)


def line(points: Iterable[tuple[float, float | None]], window: Span, top: float) -> str:
    """Return a path through the points; the pen is lifted where nothing is known. A lone point is a dot."""
    path: list[str] = []
    for is_known, run in groupby(points, lambda point: point[1] is not None):
        if is_known:
            places = [_place(time, value or 0.0, window, top) for time, value in run]
            path.append("M" + "L".join(places) + ("h0" if len(places) == 1 else ""))
    return "".join(path)


def _shapes(plot: Plot) -> Iterator[Html]:
    if plot.is_stacked:
        sums = [Row(row.time, _stacked(row)) for row in plot.rows]
        yield from (_area(plot, sums, n) for n in range(plot.series))
        return
    for n in range(plot.series):
        points = [(row.time, row.values[n]) for row in plot.rows]
        yield el("path", d=line(points, plot.period.window, plot.top), class_=f"line s{n + 1}")


def _area(plot: Plot, sums: Sequence[Row], n: int) -> Html:
    """Return the area from the series below to this one: up the one and back down the other."""
    path = ""
    for is_known, run in groupby(sums, lambda row: row.values[n] is not None):
        if is_known:
            rows = list(run)
            above = [_place(r.time, r.values[n] or 0.0, plot.period.window, plot.top) for r in rows]
            below = [
                _place(r.time, _under(r, n), plot.period.window, plot.top) for r in reversed(rows)
            ]
            path += "M" + "L".join(above + below) + "Z"
    return el("path", d=path, class_=f"area s{n + 1}")


def _stacked(row: Row) -> tuple[float | None, ...]:
    """Stack the series, the last at the bottom. Nothing is drawn if any is unknown."""
    known = [value for value in row.values if value is not None]
    if len(known) < len(row.values):
        return (None,) * len(row.values)
    return tuple(accumulate(reversed(known)))[::-1]


def _under(row: Row, n: int) -> float:
    return (*row.values, 0.0)[n + 1] or 0.0


def _place(time: float, value: float, window: Span, top: float) -> str:
    x, y = window.place(time) * WIDE, HIGH - value / top * HIGH
    return f"{x:.1f} {y:.2f}"


def _stretched(*shapes: Html) -> Html:
    return el(
        "svg",
        *shapes,
        viewBox=f"0 0 {WIDE:.0f} {HIGH:.0f}",
        preserveAspectRatio="none",
        class_="plot",
    )


def _bands(kind: str, spans: Sequence[Span], window: Span) -> Iterator[Html]:
    for span in spans:
        width = span.length / window.length
        yield el(
            "rect",
            x=_percent(window.place(span.start)),
            width=_percent(width),
            height="100%",
            class_=kind,
        )


def _value_ticks(plot: Plot) -> Iterator[Html]:
    """Return three lines across: 0, half, top."""
    for part in (0.0, 0.5, 1.0):
        y = _percent(1 - part)
        yield el("line", x2="100%", y1=y, y2=y, class_="grid" if part else "grid base")
        text = plot.unit.text(plot.top * part)
        yield el("text", text, x="0", dx="-8", y=y, dy="0.35em", class_="tick value")


def _time_ticks(window: Span) -> Iterator[Html]:
    """Return round times in UTC, with midnight as its date."""
    tick = tick_s(window.length)
    first = math.ceil(window.start / tick) * tick
    for time in (first + n * tick for n in range(int(window.length / tick) + 1)):
        place = window.place(time)
        if TICK_CLEAR <= place <= 1 - TICK_CLEAR:
            x = _percent(place)
            yield el("line", x1=x, x2=x, y2="100%", class_="grid")
            text = clock(time) if time % DAY_S else date(time)
            yield el("text", text, x=x, y="100%", dy="18", class_="tick time")


def _limit(plot: Plot) -> Iterator[Html]:
    if plot.limit is not None:
        y = _percent(1 - plot.limit / plot.top)
        yield el("line", x2="100%", y1=y, y2=y, class_="limit")
        yield el("text", "limit", x="100%", y=y, dy="-5", class_="tick limit")


def _ends(plot: Plot) -> Iterator[Html]:
    """Draw a dot at each line's current value."""
    values = plot.rows[-1].values if plot.rows and not plot.is_stacked else ()
    for n, value in enumerate(values):
        if value is not None:
            y = _percent(1 - value / plot.top)
            yield el("circle", cx="100%", cy=y, r=3.0, class_=f"s{n + 1}")


def _percent(part: float) -> str:
    return f"{part * 100:.2f}%"
