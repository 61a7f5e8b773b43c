"""Shows the counts by name as tables: the loaders, the limits and the rules of abuse. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from stillroom.health.report import (
    CacheStats,
    Figures,
    LimitStats,
    LoadError,
    LoaderStats,
    RuleStats,
)
from stillroom.web.status.html import Html, el, joined
from stillroom.web.status.numbers import UNKNOWN, ago, amount, said, share, span
from stillroom.web.status.tables import Column, table

SHOWN = 30  # rows of a table, those that are counted most
LOADERS = (
    Column("Loader", is_name=True),
    Column("Hits", is_number=True),
    Column("Stale", is_number=True),
    Column("Misses", is_number=True),
    Column("Hit ratio", is_number=True),
    Column("Loads", is_number=True),
    Column("Failed", is_number=True),
    Column("Half within", is_number=True),
    Column("95\u202f% within", is_number=True),
    Column("Refreshed after", is_number=True),
    Column("Not kept", is_number=True),
    Column("Last error"),
)
LIMITS = (
    Column("Limit", is_name=True),
    Column("Checks", is_number=True),
    Column("Denied", is_number=True),
    Column("From memory", is_number=True),
    Column("Without Redis", is_number=True),
    Column("Would deny", is_number=True),
)
RULES = (
    Column("Rule", is_name=True),
    Column("Patterns", is_number=True),
    Column("Bans", is_number=True),
    Column("In shadow", is_number=True),
)
GOOD = {
    "loaders": "Good: no load fails, refreshes come within a minute, and nothing is loaded that can't be kept.",
    "limits": "Good: few are denied, and none is decided without Redis.",
    "rules": "Good: no patterns.",
}


def names(figures: Figures | None, now: float) -> Html:
    """Return three tables. What was not used in this time is not in them."""
    cache = figures.cache if figures else None
    limits = figures.limits if figures else None
    loaders = [list(_loader(one, cache, now)) for one in (cache and cache.loaders) or ()]
    each = [list(_limit(one)) for one in (limits and limits.each) or ()]
    rules = [list(_rule(one)) for one in (limits and limits.rules) or ()]
    minutes = figures.minutes if figures else 0
    is_known = (cache and cache.loaders) is not None
    are_known = (limits and limits.each) is not None
    return joined(
        _section("Loaders", "loaders", minutes, LOADERS, loaders, is_known),
        _section("Limits", "limits-by-name", minutes, LIMITS, each, are_known),
        _section("Rules of abuse", "rules", minutes, RULES, rules, are_known) if rules else "",
    )


def _section(
    title: str,
    name: str,
    minutes: int,
    columns: tuple[Column, ...],
    rows: list[list[str]],
    is_known: bool,
) -> Html:
    heading = el("h2", title, id=name)
    if not is_known:
        return el("section", heading, el("p", "Unknown: what was counted is in Redis."))
    time = f"the last {minutes}\u202fmin"
    if not rows:
        return el("section", heading, el("p", f"None was used in {time}.", class_="nothing"))
    good = GOOD[name.partition("-")[0]]
    more = len(rows) - SHOWN
    where = "`stillroom loaders`" if name == "loaders" else "`/metrics`"
    cut = f" {amount(more)} more are in {where}." if more > 0 else ""
    about = el("p", f"In {time}. {good}{cut}", class_="good")
    return el("section", heading, about, table(columns, rows[:SHOWN], name))


def _loader(one: LoaderStats, cache: CacheStats | None, now: float) -> Iterator[str]:
    yield one.name
    looked_up = bool(one.hits or one.stale or one.misses)
    for count in (one.hits, one.stale, one.misses):
        yield amount(count) if looked_up else UNKNOWN
    yield said(one.hit_ratio, share)
    yield amount(one.loads)
    yield amount(one.load_errors)
    yield said(one.load_p50_ms, lambda ms: span(ms / 1000))
    yield said(one.load_p95_ms, lambda ms: span(ms / 1000))
    yield said(one.refresh_lag_s, span)
    yield amount(one.not_kept)
    yield _error(cache.last_error(one.name) if cache else None, now)


def _error(error: LoadError | None, now: float) -> str:
    if error is None:
        return UNKNOWN
    place = f" at {error.place}" if error.place else ""
    return f"{error.kind}{place}, {ago(max(0.0, now - error.at))}"


def _limit(one: LimitStats) -> Iterator[str]:
    yield one.name
    for count in (one.checks, one.denials, one.cached, one.degraded, one.would_deny):
        yield amount(count)


def _rule(one: RuleStats) -> Iterator[str]:
    yield one.name
    for count in (one.patterns, one.bans, one.shadow):
        yield amount(count)
