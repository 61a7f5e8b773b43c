"""The section with the charts: a day, the same axis of time in all of them, and their numbers by the hour. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillroom.health.report import Report, Snapshot
from stillroom.web.status.charts import Plot, chart
from stillroom.web.status.figures import Figure, figures
from stillroom.web.status.html import Html, el
from stillroom.web.status.numbers import UNKNOWN, Unit, dated, said, span
from stillroom.web.status.series import Day, Row, by_hour, low_and_high, thinned, with_gaps

# A limit that is far away would press the line flat: it is drawn where what it limits comes near.
LIMIT_NEAR = 4.0


def charts(report: Report, history: Sequence[Snapshot] | None, day: Day) -> Html:
    """Without Redis there is nothing to draw."""
    drawn = [_chart(figure, day) for figure in figures(report)] if history is not None else []
    return el(
        "section",
        el("h2", "The last 24 hours"),
        el("p", *_about(history), class_="about"),
        el("div", *drawn, class_="charts"),
    )


def _about(history: Sequence[Snapshot] | None) -> Iterator[str]:
    if history is None:
        yield "The snapshots are in Redis, which does not answer."
    elif not history:
        yield "No snapshot yet: beat has one made each minute."
    else:
        yield "A snapshot each minute; times are UTC. "
        yield el("span", "no snapshot", class_="key gap")
        yield " "
        yield el("span", "a server was away", class_="key failed")


def _chart(figure: Figure, day: Day) -> Html:
    rows = day.rows(figure.getters)
    highest = _highest(figure, rows)
    limit = _drawn_limit(figure, highest)
    plot = Plot(
        day,
        thinned(with_gaps(rows), day.window),
        len(figure.series),
        figure.unit.top(max(highest, limit or 0.0)),
        figure.unit,
        limit,
        figure.is_stacked,
    )
    return el(
        "figure",
        el("figcaption", el("h3", figure.title), _current(figure, rows), _key(figure, rows)),
        chart(plot, _sentence(figure, rows, day)),
        _hours(figure, rows),
        id=figure.id,
    )


def _highest(figure: Figure, rows: Sequence[Row]) -> float:
    """What the axis must hold."""
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


def _key(figure: Figure, rows: Sequence[Row]) -> Html:
    """What each series is, and is now; of a single one, between what it was."""
    if len(figure.series) == 1:
        return el("p", _between(rows, 0, figure.unit), " in 24 h", class_="between")
    named = [
        el("li", name, " ", el("b", said(value, figure.unit.text)), class_=f"s{n + 1}")
        for n, (name, value) in enumerate(zip(figure.names, rows[-1].values, strict=True))
    ]
    return el("ul", *named, class_="series")


# The same in words, and in a table


def _sentence(figure: Figure, rows: Sequence[Row], day: Day) -> str:
    """Memory: now 312 MB of 1 GB, in 24 h between 290 MB and 420 MB."""
    if all(low_and_high(rows, n) is None for n in range(len(figure.series))):
        return f"{figure.title}: unknown."
    several = len(figure.series) > 1
    told = [
        (f"{name} " if several else "") + _told(figure, rows, n)
        for n, name in enumerate(figure.names)
    ]
    dark = sum(gap.length for gap in day.gaps)
    away = sum(failure.length for failure in day.failures)
    return (
        f"{figure.title}: {'; '.join(told)}."
        + (f" No snapshot for {span(dark)}." if dark else "")
        + (f" A server was away for {span(away)}." if away else "")
    )


def _told(figure: Figure, rows: Sequence[Row], n: int) -> str:
    unit, ends = figure.unit, low_and_high(rows, n)
    if ends is None:
        return "unknown"
    current = rows[-1].values[n]
    now = "unknown" if current is None else unit.said(current)
    of = f" of {unit.said(figure.limit)}" if figure.limit is not None else ""
    return f"now {now}{of}, in 24 h between {unit.said(ends[0])} and {unit.said(ends[1])}"


def _hours(figure: Figure, rows: Sequence[Row]) -> Html:
    """For who does not see the chart, and for who wants to know exactly."""
    heads = [el("th", head, scope="col") for head in ("Hour (UTC)", *figure.names)]
    hours = [
        el(
            "tr",
            el("th", dated(hour, rows[-1].time), scope="row"),
            *(el("td", _between(run, n, figure.unit)) for n in range(len(figure.names))),
        )
        for hour, run in by_hour(rows)
    ]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *hours))
    summary = el("summary", "By the hour", el("span", f": {figure.title}", class_="hidden"))
    return el("details", summary, table)


def _between(rows: Sequence[Row], n: int, unit: Unit) -> str:
    """From the lowest to the highest."""
    ends = low_and_high(rows, n)
    if ends is None:
        return UNKNOWN
    low, high = map(unit.text, ends)
    return low if low == high else f"{low}–{high}"
