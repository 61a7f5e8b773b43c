"""The section with the charts: the same axis of time in all of them, what is good, and their numbers in a table.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillroom.health.report import Report, Snapshot
from stillroom.web.status.charts import Plot, chart
from stillroom.web.status.choices import CHOICES, MINUTE_S, View
from stillroom.web.status.figures import Figure, figures
from stillroom.web.status.html import Html, el
from stillroom.web.status.numbers import UNKNOWN, Unit, dated, said, span
from stillroom.web.status.series import Period, Row, by_step, low_and_high, thinned, with_gaps

# A limit that is far away would press the line flat: it is drawn where what it limits comes near.
LIMIT_NEAR = 4.0


def charts(report: Report, history: Sequence[Snapshot] | None, period: Period, view: View) -> Html:
    """Return the charts. Without Redis there is nothing to draw, nor before the first snapshot."""
    drawn = [_chart(figure, period) for figure in figures(report)] if history else []
    return el(
        "section",
        el("h2", f"The last {period_said(period)}", id="charts"),
        _periods(view),
        el("p", *_about(history, period), class_="about"),
        el("div", *drawn, class_="charts"),
    )


def period_said(period: Period) -> str:
    """Return how long the period is, as a person says it."""
    return span(round(period.window.length)) if period.is_young else period.choice.said


def _periods(view: View) -> Html:
    """Link the other lengths of time."""
    links = [
        el(
            "li",
            el(
                "a",
                choice.said,
                href=f"{view.address(choice=choice)}#charts",
                aria_current="page" if choice == view.choice else None,
            ),
        )
        for choice in CHOICES
    ]
    return el("nav", el("ul", *links, class_="periods"), aria_label="Period")


def _about(history: Sequence[Snapshot] | None, period: Period) -> Iterator[str]:
    if history is None:
        yield "The snapshots are in Redis, which does not answer."
    elif not history:
        yield "No snapshot yet: beat has one made each minute, and charts begin with the first."
    else:
        often = (
            "A snapshot each minute" if period.choice.every == MINUTE_S else "Every fifth snapshot"
        )
        yield f"{often}; times are UTC. "
        if period.is_young:
            yield "Nothing was measured before that. "
        yield el("span", "no snapshot", class_="key gap")
        yield " "
        yield el("span", "a server was away", class_="key failed")


def _chart(figure: Figure, period: Period) -> Html:
    rows = period.rows(figure.getters)
    highest = _highest(figure, rows)
    limit = _drawn_limit(figure, highest)
    plot = Plot(
        period,
        thinned(with_gaps(rows, period.choice.gap_s), period.window),
        len(figure.series),
        figure.unit.top(max(highest, limit or 0.0)),
        figure.unit,
        limit,
        figure.is_stacked,
    )
    return el(
        "figure",
        el(
            "figcaption",
            el("h3", figure.title),
            _current(figure, rows),
            _key(figure, rows, period),
            el("p", "Good: ", figure.good, class_="good"),
        ),
        chart(plot, _sentence(figure, rows, period)),
        _table(figure, rows, period),
        id=figure.id,
    )


def _highest(figure: Figure, rows: Sequence[Row]) -> float:
    """Return the highest value that the axis must hold."""
    together = sum if figure.is_stacked else max
    known = ([value for value in row.values if value is not None] for row in rows)
    return max((together(values) for values in known if values), default=0.0)


def _drawn_limit(figure: Figure, highest: float) -> float | None:
    if figure.limit is None or figure.is_limit_always_drawn:
        return figure.limit
    return figure.limit if figure.limit <= highest * LIMIT_NEAR else None


def _current(figure: Figure, rows: Sequence[Row]) -> Html:
    lead = figure.lead(rows[-1].values)
    is_limited = figure.limit is not None and figure.is_limit_always_drawn
    limit = f" of {figure.unit.said(figure.limit)}" if is_limited else ""
    return el("p", el("strong", figure.unit.said(lead)), limit, class_="current")


def _key(figure: Figure, rows: Sequence[Row], period: Period) -> Html:
    """Name each series with its current value; a single one has its range too."""
    if len(figure.series) == 1:
        between = _between(rows, 0, figure.unit)
        return el("p", between, f" in {period_said(period)}", class_="between")
    named = [
        el("li", name, " ", el("b", said(value, figure.unit.text)), class_=f"s{n + 1}")
        for n, (name, value) in enumerate(zip(figure.names, rows[-1].values, strict=True))
    ]
    return el("ul", *named, class_="series")


# The same in words, and in a table


def _sentence(figure: Figure, rows: Sequence[Row], period: Period) -> str:
    """Write a sentence: Memory: now 312 MB of 1 GB, in 24 h between 290 MB and 420 MB."""
    if all(low_and_high(rows, n) is None for n in range(len(figure.series))):
        return f"{figure.title}: unknown."
    several = len(figure.series) > 1
    told = [
        (f"{name} " if several else "") + _told(figure, rows, n, period_said(period))
        for n, name in enumerate(figure.names)
    ]
    dark = sum(gap.length for gap in period.gaps)
    away = sum(failure.length for failure in period.failures)
    return (
        f"{figure.title}: {'; '.join(told)}."
        + (f" No snapshot for {span(dark)}." if dark else "")
        + (f" A server was away for {span(away)}." if away else "")
    )


def _told(figure: Figure, rows: Sequence[Row], n: int, length: str) -> str:
    unit, ends = figure.unit, low_and_high(rows, n)
    if ends is None:
        return "unknown"
    current = rows[-1].values[n]
    now = "unknown" if current is None else unit.said(current)
    of = f" of {unit.said(figure.limit)}" if figure.limit is not None else ""
    return f"now {now}{of}, in {length} between {unit.said(ends[0])} and {unit.said(ends[1])}"


def _table(figure: Figure, rows: Sequence[Row], period: Period) -> Html:
    """Write the table, for readers who cannot see the chart or want the exact numbers."""
    heads = [el("th", head, scope="col") for head in ("From (UTC)", *figure.names)]
    steps = [
        el(
            "tr",
            el("th", dated(start, rows[-1].time), scope="row"),
            *(el("td", _between(run, n, figure.unit)) for n in range(len(figure.names))),
        )
        for start, run in by_step(rows, period.step_s)
    ]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *steps))
    summary = el("summary", "In numbers", el("span", f": {figure.title}", class_="hidden"))
    return el("details", summary, table)


def _between(rows: Sequence[Row], n: int, unit: Unit) -> str:
    """Write the range from the lowest to the highest."""
    ends = low_and_high(rows, n)
    if ends is None:
        return UNKNOWN
    low, high = map(unit.text, ends)
    return low if low == high else f"{low}–{high}"
