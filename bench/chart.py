"""Charts as SVG files, for README and docs: bars, and lines over a logarithmic axis. Pure.

They are read on light and on dark pages, so colours are chosen by the reader's preference; every figure is printed,
so nobody has to measure a bar.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 760
ROW, BAR, GAP = 22, 14, 10  # pixels
LABELS, FIGURES = 250, 70  # pixels to the left of the bars, and to the right
HIGH, LEFT, BOTTOM = 220, 62, 44  # of a chart of lines

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
.title { font-weight: 600 } .small { font-size: 11px; fill: #57606a }
.other { fill: #b6bec8 } .ours { fill: #2f7d5b } .near { fill: #7a3e9d }
.grid { stroke: #d0d7de; stroke-width: 1 } .line { fill: none; stroke-width: 2 }
.l0 { stroke: #2f7d5b; fill: #2f7d5b } .l1 { stroke: #c2571a; fill: #c2571a } .l2 { stroke: #3367b0; fill: #3367b0 }
.line.l0, .line.l1, .line.l2 { fill: none } text.l0, text.l1, text.l2 { stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #8d96a0 } .grid { stroke: #3d444d }
  .other { fill: #565f6a } .ours { fill: #4cb486 } .near { fill: #b98ad6 }
  .l0 { stroke: #4cb486; fill: #4cb486 } .l1 { stroke: #e8894f; fill: #e8894f }
  .l2 { stroke: #7aa7e8; fill: #7aa7e8 }
}
"""


class Bar(NamedTuple):
    """One bar: its label, its length, and whose it is: `ours`, `near` or nobody's in particular."""

    label: str
    value: float
    whose: str = ""
    group: str = ""  # a heading above it, where it differs from the last one's


class Line(NamedTuple):
    """Points (x, y) under a name."""

    name: str
    points: Sequence[tuple[float, float]]


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Draw horizontal bars from zero, each with its figure."""
    longest = max((row.value for row in rows), default=0.0) or 1.0
    shapes, y, group = [_text(0, 16, title, "title")], 30.0, ""
    for row in rows:
        if row.group != group:
            group = row.group
            shapes.append(_text(0, y + 17, group, "small"))
            y += ROW
        shapes += _bar(row, y, (WIDTH - LABELS - FIGURES) * row.value / longest)
        y += ROW
    return _svg(title, y + GAP, shapes)


def _bar(row: Bar, y: float, length: float) -> Iterator[str]:
    yield _text(LABELS - 8, y + 15, row.label, end=True)
    yield (
        f'<rect class="{row.whose or "other"}" x="{LABELS}" y="{y + 4:.0f}" '
        f'width="{max(length, 1):.1f}" height="{BAR}" rx="2"/>'
    )
    yield _text(LABELS + length + 6, y + 15, number(row.value))


def lines(title: str, x_title: str, series: Sequence[Line]) -> str:
    """Draw lines over a logarithmic x axis (zero stands left of it), y from zero."""
    xs = sorted({x for one in series for x, _ in one.points})
    top = _round_up(max((y for one in series for _, y in one.points), default=1.0) or 1.0)
    places = _places(xs)
    shapes = [_text(0, 16, title, "title"), *_grid(top)]
    shapes += [
        _text(places[x], HIGH + 18, number(x), "small", middle=True) for x in _spaced(xs, places)
    ]
    shapes.append(_text((LEFT + WIDTH) / 2, HIGH + 36, x_title, "small", middle=True))
    for n, one in enumerate(series):
        points = [(places[x], _height(y, top)) for x, y in one.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        shapes.append(f'<path class="line l{n}" d="{path}"/>')
        shapes += [f'<circle class="l{n}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        shapes.append(_text(LEFT + 8 + 230 * n, 36, one.name, f"l{n}"))
    return _svg(title, HIGH + BOTTOM, shapes)


def _grid(top: float) -> Iterator[str]:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _height(top * share, top)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH}"/>'
        yield _text(LEFT - 8, y + 4, number(top * share), "small", end=True)


def _places(xs: Sequence[float]) -> dict[float, float]:
    """Return where each x stands: by its logarithm."""
    logs = {x: math.log10(x) if x > 0 else math.log10(min(v for v in xs if v > 0)) - 1 for x in xs}
    least, most = min(logs.values()), max(logs.values())
    wide = WIDTH - LEFT - 40
    return {x: LEFT + 16 + wide * (at - least) / ((most - least) or 1.0) for x, at in logs.items()}


def _spaced(xs: Sequence[float], places: dict[float, float]) -> Iterator[float]:
    """Yield the xs whose labels do not run into one another."""
    last = -math.inf
    for x in xs:
        if places[x] - last > 44:
            last = places[x]
            yield x


def _height(y: float, top: float) -> float:
    return HIGH - (HIGH - 52) * y / top


def _round_up(value: float) -> float:
    """Round up to the next of 1, 2, 2.5, 4, 5 or 8 times a power of ten.

    >>> [_round_up(n) for n in (0.9, 1.3, 42.0, 0.03)]
    [1.0, 2.0, 50.0, 0.04]
    """
    power: float = 10.0 ** math.floor(math.log10(value))
    step = next(step for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value * 0.999)
    return float(f"{step * power:.6g}")


def number(value: float) -> str:
    """Return a number as a text that is short enough for a label.

    >>> [number(n) for n in (0, 0.42, 3.14, 42.0, 1234, 200_000, 3_000_000)]
    ['0', '0.42', '3.1', '42', '1,234', '200k', '3M']
    """
    if value >= 1_000_000:
        return f"{value / 1_000_000:g}M"
    if value >= 10_000:
        return f"{value / 1_000:.3g}k"
    if value >= 10 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _text(
    x: float, y: float, text: str, class_: str = "", *, end: bool = False, middle: bool = False
) -> str:
    anchor = ' text-anchor="end"' if end else ' text-anchor="middle"' if middle else ""
    named = f' class="{class_}"' if class_ else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}{anchor}>{escape(text)}</text>'


def _svg(title: str, height: float, shapes: Iterable[str]) -> str:
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img" aria-label="{escape(title)}">'
    )
    return "\n".join([opening, f"<style>{STYLE}</style>", *shapes, "</svg>\n"])
