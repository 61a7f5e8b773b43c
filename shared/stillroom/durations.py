"""Durations as an app gives them, seconds or a timedelta, and how far moments go. Pure."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, TypeAlias

from stillroom.errors import InvalidArgument, in_code

Duration: TypeAlias = float | timedelta
LONGEST_S = 1e15  # that a duration can be: Python makes no float of a number of thousands of digits
_SPELLED = re.compile(
    r"\s*(\d{1,9}(?:\.\d{1,3})?)\s*(s|secs?|seconds?|m|mins?|minutes?|h|hours?|d|days?|)\s*", re.I
)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
LAST_MOMENT = 253_402_300_799  # seconds since 1970: the end of the year 9999, where calendars end


def seconds_of(name: str, given: Any, *, least: float = 0.001, most: float = float("inf")) -> float:
    """Return a duration in seconds. `name` is the argument's; `least` and `most` are what it may be.

    Raises InvalidArgument for text, a bool, NaN, and what is out of range.
    """
    if isinstance(given, bool) or not isinstance(given, float | int | timedelta):
        hint = f"; did you mean {meant}?" if (meant := meant_seconds(given)) else ""
        raise InvalidArgument(
            f"{name}={in_code(given):.100}: a number of seconds, or a timedelta{hint}"
        )
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if not least <= seconds <= min(most, LONGEST_S):
        upper = "" if most == float("inf") else f" to {_plain(most)}"
        raise InvalidArgument(
            f"{name}={in_code(given):.100}: a number of seconds from {_plain(least)}{upper}, or a timedelta"
        )
    return float(seconds)


def meant_seconds(given: object) -> str:
    """Return the whole seconds of a timedelta, or those that a text such as 5m or "5 minutes" means; empty if none.

    >>> meant_seconds("5m"), meant_seconds("1.5 hours"), meant_seconds("300"), meant_seconds("5 months")
    ('300', '5400', '300', '')
    """
    if isinstance(given, timedelta) and not given.microseconds:
        return f"{given.total_seconds():.0f}"
    match = _SPELLED.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        return ""
    number, unit = match.groups()
    return f"{float(number) * _UNITS[unit[:1].lower()]:.15g}"


def _plain(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 1_000 else f"{seconds:g}"
