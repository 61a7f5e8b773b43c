"""A state as it is shown: a shape, a word, and last a colour. And moments, as <time> has them. Pure."""

from __future__ import annotations

from typing import Literal

from stillroom.web.status.html import Html, el, joined
from stillroom.web.status.numbers import ago, dated, iso

State = Literal["pass", "warn", "fail", "unknown"]

WORDS: dict[State, str] = {
    "pass": "well",
    "warn": "warning",
    "fail": "failing",
    "unknown": "unknown",
}
# Four shapes: a person who sees no red and green, or a printout, tells them apart.
SHAPES: dict[State, Html] = {
    "pass": joined(el("circle", cx=10.0, cy=10.0, r=9.0), el("path", d="M5.5 10.5l3 3 6-7")),
    "warn": joined(el("path", d="M10 1.5L19 18H1z"), el("path", d="M10 7.5v5M10 15v.6")),
    "fail": joined(el("path", d="M6 1h8l5 5v8l-5 5H6l-5-5V6z"), el("path", d="M7 7l6 6M13 7l-6 6")),
    "unknown": joined(
        el("circle", cx=10.0, cy=10.0, r=9.0),
        el("path", d="M7.5 8a2.5 2.5 0 1 1 3.6 2.2c-.8.4-1.1.9-1.1 1.8M10 14.4v.6"),
    ),
}


def icon(state: State) -> Html:
    """Return an icon for the eye only: a word stands beside it."""
    return el("svg", SHAPES[state], class_=f"icon {state}", viewBox="0 0 20 20", aria_hidden="true")


def labelled(state: State) -> Html:
    return el("span", icon(state), WORDS[state], class_=f"state {state}")


def moment(time: float, now: float) -> Html:
    """Return a moment as HTML: when it was, in UTC, and how long ago."""
    when = el("time", dated(time, now), datetime=iso(time))
    return joined(when, f" ({ago(max(0.0, now - time))})")
