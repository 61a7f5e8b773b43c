"""Lengths of time as apps write them: a number of seconds, or a timedelta."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TypeAlias

Duration: TypeAlias = float | timedelta


def seconds_of(given: Duration, name: str, least: float = 0.0, most: float = math.inf) -> float:
    """Return the seconds. Raises ValueError, which says what was given and what is allowed."""
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not least <= seconds <= most or math.isinf(seconds):
        upper = "" if math.isinf(most) else f" to {most:g}"
        raise ValueError(
            f"{name}={given!r}: a number of seconds from {least:g}{upper}, or a timedelta"
        )
    return float(seconds)
