"""The page, from its parts: the verdict, what to do, a tile for each part, charts, abuse. Pure.

In the order an operator asks: is it fine, and if not, what do I do? What is it about? What has changed? A state is
always a word and a shape besides its colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from stillroom.health.past import Pattern
from stillroom.health.report import Advice, Figures, Report, Snapshot
from stillroom.web.status.charts import sparkline
from stillroom.web.status.choices import View
from stillroom.web.status.crew import crew
from stillroom.web.status.document import document
from stillroom.web.status.html import Html, el, joined
from stillroom.web.status.names import names
from stillroom.web.status.numbers import ago, amount, clock_with_seconds, iso, plural
from stillroom.web.status.patterns import abuse
from stillroom.web.status.period import charts, period_said
from stillroom.web.status.series import Period, Row, low_and_high, period_of, thinned, with_gaps
from stillroom.web.status.state import SHAPES, icon, labelled, moment
from stillroom.web.status.tiles import Tile, tiles

SPARK_STRETCHES = 48
RELOAD_S = 30  # the periods that the page offers
VIEW = View()
TAB_COLOURS = {"pass": "#1a7f37", "warn": "#b36b00", "fail": "#c62828"}


def render(
    report: Report,
    history: Sequence[Snapshot] | None,
    patterns: Sequence[Pattern] | None,
    *,
    flower_url: str | None = None,
    now: float,
    view: View = VIEW,
    since: float | None = None,
    figures: Figures | None = None,
) -> str:
    """Return the whole page.

    `history`: the snapshots of the view's time, oldest first; `patterns`: the newest first; None: Redis did not
    tell them. `since`: when the first snapshot of all was made. `figures`: what was counted by name. `view`: which
    time it shows, and whether the browser asks again. It does not unless the reader asks for it: a page that
    reloads under a reader's hands can't be read with a screen reader or a magnifier (WCAG 2.2.1).
    """
    period = period_of(report, history or (), now, view.choice, since)
    body = el(
        "body",
        el("a", "Skip to the findings", href="#findings", class_="skip"),
        _defs(),
        _header(report, now, view),
        el(
            "main",
            _findings(report, now),
            _now(report, period, has_charts=bool(history)),
            charts(report, history, period, view),
            crew(report.tasks),
            names(figures, now),
            abuse(patterns, now),
        ),
        _footer(report, history, flower_url, now),
    )
    title = f"{_verdict(report)} – Stillroom"
    return document(title, body, icon=_tab_icon(report), reload_s=view.reload_s)


# The top


def _tab_icon(report: Report) -> str:
    """Return the icon that shows the state among twenty tabs."""
    paint = f"fill:none;stroke:{TAB_COLOURS[report.status]};stroke-width:2.2"
    shape = SHAPES[report.status]
    icon = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20" style="{paint}">{shape}</svg>'
    )
    return f"data:image/svg+xml,{quote(icon)}"


def _defs() -> Html:
    """Define the hatching of gaps, once for all charts."""
    stripe = el("path", d="M0 6L6 0M-1 1L1-1M5 7L7 5", class_="stripe")
    hatch = el("pattern", stripe, id="hatch", width=6.0, height=6.0, patternUnits="userSpaceOnUse")
    return el("svg", el("defs", hatch), class_="defs", aria_hidden="true")


def _header(report: Report, now: float, view: View) -> Html:
    age = max(0.0, now - report.time)
    when = el("time", f"{clock_with_seconds(report.time)} UTC", datetime=iso(report.time))
    return el(
        "header",
        el("p", el("strong", "Stillroom"), " status", class_="brand"),
        el("p", "Checked at ", when, f", {ago(age)}. ", _reloading(view), class_="checked"),
        el("h1", icon(report.status), _verdict(report), class_=f"verdict {report.status}"),
    )


def _reloading(view: View) -> Html:
    if view.reload_s:
        stop = el("a", "stop", href=view.address(reload_s=None))
        return joined(f"Reloads every {view.reload_s} s: ", stop)
    return el("a", f"Reload every {RELOAD_S} s", href=view.address(reload_s=RELOAD_S))


def _verdict(report: Report) -> str:
    failing = [found for found in report.advice if found.severity == "fail"]
    looks = len(report.advice) - len(failing)
    if not report.advice:
        return "All is well"
    if not failing:
        return plural(looks, "thing to look at", "things to look at")
    first = plural(len(failing), "failure to mend", "failures to mend")
    return f"{first}, {amount(looks)} more to look at" if looks else first


# Advice


def _findings(report: Report, now: float) -> Html:
    found = [_finding(advice, now) for advice in report.advice]
    told = el("ol", *found, class_="findings") if found else el("p", "There is nothing to do.")
    title = el("h2", "What to do", id="to-do", class_=None if found else "hidden")
    return el("section", title, told, id="findings", tabindex="-1", aria_labelledby="to-do")


def _finding(advice: Advice, now: float) -> Html:
    since = joined(" · since ", moment(advice.since, now)) if advice.since is not None else ""
    return el(
        "li",
        labelled(advice.severity),
        el("p", *_prose(advice.what), class_="what"),
        el("p", *_prose(advice.todo), class_="todo"),
        el(
            "p",
            "Good: ",
            *_prose(advice.good),
            " · ",
            el("code", advice.component),
            since,
            class_="good",
        ),
        class_=advice.severity,
    )


def _prose(text: str) -> list[str]:
    """Mark the text between backticks as a command or a name."""
    return [el("code", part) if n % 2 else part for n, part in enumerate(text.split("`"))]


# Now


def _now(report: Report, period: Period, *, has_charts: bool) -> Html:
    shown = [
        _tile(tile if has_charts else tile._replace(chart=None), period) for tile in tiles(report)
    ]
    return el("section", el("h2", "Now"), el("ul", *shown, class_="tiles"))


def _tile(tile: Tile, period: Period) -> Html:
    known = with_gaps(period.rows([tile.get]), period.choice.gap_s)
    rows = thinned(known, period.window, SPARK_STRETCHES)
    name = el("a", tile.name, href=f"#{tile.chart}") if tile.chart else tile.name
    return el(
        "li",
        el("div", el("h3", name), labelled(tile.state), class_="top"),
        el("p", el("strong", tile.number), " ", tile.of, class_="big"),
        sparkline(rows, period.window, _trend(tile, rows, period_said(period))),
        el("ul", *(el("li", fact) for fact in tile.shown_facts), class_="facts"),
        class_=f"tile {tile.state}",
    )


def _trend(tile: Tile, rows: Sequence[Row], length: str) -> str:
    """Put the sparkline into words. The number itself stands beside it."""
    ends = low_and_high(rows, 0)
    if ends is None:
        return f"{tile.name} in {length}: unknown"
    return f"{tile.name} in {length}: between {tile.say(ends[0])} and {tile.say(ends[1])} {tile.of}"


# The bottom


def _footer(
    report: Report, history: Sequence[Snapshot] | None, flower_url: str | None, now: float
) -> Html:
    return el(
        "footer",
        el("p", *_flower(flower_url)),
        el("p", "Newest snapshot: ", _newest(history, now)),
        el("p", f"Release {report.release}") if report.release else "",
    )


def _flower(url: str | None) -> list[str]:
    """Link Flower, if the setting is a web address: a javascript: link would run in another's browser."""
    if url is None:
        return ["Tasks one by one: Flower (set STILLROOM_FLOWER_URL to have its link here)"]
    if not url.startswith(("http://", "https://")):
        return ["Tasks one by one: Flower (STILLROOM_FLOWER_URL names no web address)"]
    return ["Tasks one by one: ", el("a", "Flower", href=url, rel="noreferrer")]


def _newest(history: Sequence[Snapshot] | None, now: float) -> Html | str:
    if history is None:
        return "unknown"
    return moment(history[-1].time, now) if history else "none yet"
