"""The patterns of abuse that were found, as a table. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from stillroom.health.past import Pattern
from stillroom.web.status.html import Html, el
from stillroom.web.status.numbers import amount, span
from stillroom.web.status.state import moment

ACTIONS = {
    "log": "logged",
    "already": "banned already",
    "capped": "not banned: too many bans in that minute",
    "lifted": "not banned: its ban had been lifted",
    "exempt": "not banned: it never is",
}


def abuse(patterns: Sequence[Pattern] | None, now: float) -> Html:
    """The newest first; None: they can't be read."""
    return el("section", el("h2", "Abuse", id="abuse"), _told(patterns, now))


def _told(patterns: Sequence[Pattern] | None, now: float) -> Html:
    if patterns is None:
        return el("p", "Unknown: the patterns are in Redis, which does not tell them.")
    if not patterns:
        return el("p", "No pattern was found.", class_="nothing")
    heads = [
        el("th", head, scope="col", class_="number" if head == "Events" else None)
        for head in ("When", "Rule", "Who", "Events", "Done")
    ]
    rows = [_row(pattern, now) for pattern in patterns]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows))
    # What scrolls by itself must be reachable by keyboard.
    return el("div", table, class_="scrolls", role="region", tabindex="0", aria_labelledby="abuse")


def _row(pattern: Pattern, now: float) -> Html:
    return el(
        "tr",
        el("td", moment(pattern.last, now)),
        el("th", pattern.rule, scope="row"),
        el("td", el("code", pattern.subject)),
        el("td", amount(pattern.count), class_="number"),
        el("td", *_done(pattern)),
    )


def _done(pattern: Pattern) -> list[str]:
    """What was done; of a rule that runs in shadow, what would have been."""
    if pattern.action != "ban":
        said = ACTIONS.get(pattern.action, pattern.action)
    else:
        length = f" for {span(pattern.ban_seconds)}" if pattern.ban_seconds else ""
        said = f"{'would have been ' if pattern.shadow else ''}banned{length}"
    return [said, " ", el("span", "shadow", class_="tag")] if pattern.shadow else [said]
