"""Tell which releases of Redis and Valkey still get repairs, and from which patch on they are safe. Pure: data.

Stillroom runs scripts, so a flaw in a server's Lua is a flaw of every app on it. Whoever may run a script could run
code in a server older than `least`. Distributions put the same repairs under an old number: see `health_accept`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from stillroom.health.report import Severity

DAY_S = 86_400.0
SOON_S = 60 * DAY_S  # so long before the end it is said

OLDEST_REDIS = (6, 2)  # the oldest that Stillroom itself can work with


class Line(NamedTuple):
    """One line of releases, such as 7.2."""

    # The patch level with all repairs that are known; None: no patch has them.
    least: int | None = None
    ends: float | None = None  # no repairs from then on, seconds since 1970
    end_date: str = ""  # … as a person reads it


# Repairs of May 2026 (CVE-2026-23479, -23631, -25243); of Valkey also of July (-56684, -63639). Ends: redis.io.
REDIS: Mapping[tuple[int, int], Line] = {
    (6, 2): Line(22, 1_806_537_600.0, "1 April 2027"),
    (7, 0): Line(None, 1_722_211_200.0, "29 July 2024"),
    (7, 2): Line(14, 1_890_777_600.0, "1 December 2029"),
    (7, 4): Line(9, 1_890_777_600.0, "1 December 2029"),
    (8, 0): Line(None, 1_796_083_200.0, "1 December 2026"),
    (8, 2): Line(6),
    (8, 4): Line(3),
    (8, 6): Line(3),
}
VALKEY: Mapping[tuple[int, int], Line] = {
    (7, 2): Line(13),
    (8, 0): Line(10),
    (8, 1): Line(8),
    (9, 0): Line(5),
    (9, 1): Line(1),
}


def why_old(product: str, version: str, now: float) -> tuple[Severity, str] | None:
    """Say how bad it is to run a server of this version, and why. None: nothing is known against it.

    >>> why_old("redis", "7.4.9", 1.79e9), why_old("valkey", "9.1.2", 1.79e9)
    (None, None)
    >>> why_old("redis", "7.4.2", 1.79e9)
    ('warn', 'redis 7.4.2 lacks repairs of its scripts and memory; 7.4.9 has them.')
    """
    numbers = [int(part) for part in version.split(".") if part.isdigit()]
    if len(numbers) < 2:
        return None
    name, (major, minor, *rest) = f"{product} {version}", numbers
    if product == "redis" and (major, minor) < OLDEST_REDIS:
        return "fail", f"{name} is older than 6.2, the least that Stillroom works with."
    line = (VALKEY if product == "valkey" else REDIS).get((major, minor))
    sentence = line and _against(line, name, f"{major}.{minor}", (rest or [0])[0], now)
    return ("warn", sentence) if sentence else None


def _against(line: Line, name: str, minor: str, patch: int, now: float) -> str | None:
    if line.ends is not None and now >= line.ends:
        return f"{name} has got no repairs since {line.end_date}."
    if line.least is not None and patch < line.least:
        return f"{name} lacks repairs of its scripts and memory; {minor}.{line.least} has them."
    if line.ends is not None and now >= line.ends - SOON_S:
        return f"{name} gets no repairs from {line.end_date} on."
    return None
