"""Durations as an app gives them, seconds or a timedelta, and how far moments go. Pure."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeAlias

from stillroom.errors import InvalidArgument

Duration: TypeAlias = float | timedelta
LONGEST_S = 1e15  # that a duration can be: Python makes no float of a number of thousands of digits
LAST_MOMENT = 253_402_300_799  # seconds since 1970: the end of the year 9999, where calendars end


def seconds_of(name: str, given: Any, *, least: float = 0.001, most: float = float("inf")) -> float:
    """Return a duration in seconds. `name` is the argument's; `least` and `most` are what it may be.

    Raises InvalidArgument for text, a bool, NaN, and what is out of range.
    """
    if isinstance(given, bool) or not isinstance(given, float | int | timedelta):
        raise InvalidArgument(f"{name}={given!r}: a number of seconds, or a timedelta")
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if not least <= seconds <= min(most, LONGEST_S):
        upper = "" if most == float("inf") else f" to {_plain(most)}"
        raise InvalidArgument(
            f"{name}={given!r}: a number of seconds from {_plain(least)}{upper}, or a timedelta"
        )
    return float(seconds)


def _plain(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 1_000 else f"{seconds:g}"
