"""The patterns of abuse that were found, as a table. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillroom.health.past import Pattern
from stillroom.web.status.html import Html, el, joined
from stillroom.web.status.numbers import amount, span
from stillroom.web.status.state import moment
from stillroom.web.status.tables import Column, table

ACTIONS = {
    "log": "logged",
    "already": "banned already",
    "capped": "not banned: too many bans in that minute",
    "lifted": "not banned: its ban had been lifted",
    "exempt": "not banned: it never is",
}
COLUMNS = (
    Column("When"),
    Column("Rule", is_name=True),
    Column("Who"),
    Column("Events", is_number=True),
    Column("Done"),
)


def abuse(patterns: Sequence[Pattern] | None, now: float) -> Html:
    """Show the newest patterns first; None: they can't be read."""
    return el("section", el("h2", "Abuse", id="abuse"), _told(patterns, now))


def _told(patterns: Sequence[Pattern] | None, now: float) -> Html:
    if patterns is None:
        return el("p", "Unknown: the patterns are in Redis, which does not tell them.")
    if not patterns:
        return el("p", "No pattern was found.", class_="nothing")
    return table(COLUMNS, [list(_row(pattern, now)) for pattern in patterns], "abuse")


def _row(pattern: Pattern, now: float) -> Iterator[str]:
    yield moment(pattern.last, now)
    yield pattern.rule
    yield el("code", pattern.subject)
    yield amount(pattern.count)
    yield joined(*_done(pattern))


def _done(pattern: Pattern) -> list[str]:
    """Say what was done, or for a rule in shadow what would have been done."""
    if pattern.action != "ban":
        said = ACTIONS.get(pattern.action, pattern.action)
    else:
        length = f" for {span(pattern.ban_seconds)}" if pattern.ban_seconds else ""
        said = f"{'would have been ' if pattern.shadow else ''}banned{length}"
    return [said, " ", el("span", "shadow", class_="tag")] if pattern.shadow else [said]
