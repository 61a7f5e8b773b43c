"""Numbers as a person reads them: three significant digits and a unit. Unknown is a dash. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from typing import NamedTuple

from stillroom.shown import named

UNKNOWN = "–"
THIN = "\u202f"  # between a number and its unit, so that a line never breaks there
EXACT_BELOW = 10_000
HIGHEST = 999.5  # from here on a number rounded to three digits has four
STEPS = (1, 1.2, 1.6, 2, 3, 4, 5, 6, 8)  # of an axis' top: half of each is as round


class Unit(NamedTuple):
    """Tell how a quantity is said: `text` on an axis, and with the suffix in a sentence."""

    text: Callable[[float], str]
    suffix: str = ""
    base: int = 1000  # of its thousands
    least: float = 0.0  # an axis reaches this far at least
    is_whole: bool = False  # there is no half of one

    def said(self, value: float | None) -> str:
        return said(value, lambda known: self.text(known) + self.suffix)

    def top(self, highest: float) -> float:
        """Return a round number for the top of an axis, so that half of it is round too."""
        least = max(highest, self.least)
        return next(top for top in self._tops() if top >= least and self._halves(top))

    def _halves(self, top: float) -> bool:
        return not self.is_whole or top % 2 == 0

    def _tops(self) -> Iterator[float]:
        """Yield the tops 1, 1.2 … 8, 10, 12 … 800, then those of the next unit, from thousandths on."""
        for power in count(-1):
            for tens in (1, 10, 100):
                yield from (step * tens * float(self.base) ** power for step in STEPS)


def said(value: float | None, say: Callable[[float], str]) -> str:
    """Return the value as text. An unknown value is a dash, not 0."""
    return UNKNOWN if value is None else say(value)


def number(value: float) -> str:
    """Return three significant digits, and no more than three decimals.

    >>> number(0.4), number(94.21), number(1204.0), number(0.00001)
    ('0.4', '94.2', '1,204', '0')
    """
    size = math.floor(math.log10(abs(value))) if value else 0
    digits = f"{value:,.{min(3, max(0, 2 - size))}f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def amount(value: float) -> str:
    """Return how many there are: exact while that is short.

    >>> amount(1204), amount(12_431), amount(3.25e6)
    ('1,204', '12.4k', '3.25M')
    """
    if abs(value) < EXACT_BELOW:
        return number(value)
    return _scaled(value / 1000, 1000, ("k", "M", "G", "T"))


def size(value: float) -> str:
    """Return a number of bytes as Redis writes it: a MB is 1,024 KB.

    >>> size(327_155_712), size(2**30)
    ('312\\u202fMB', '1\\u202fGB')
    """
    return _scaled(value, 1024, tuple(f"{THIN}{unit}" for unit in ("B", "KB", "MB", "GB", "TB")))


def share(value: float) -> str:
    """Return a ratio as percent."""
    return f"{number(value * 100)}{THIN}%"


def span(seconds: float) -> str:
    """Return how long a time is, in two units at most.

    >>> span(0.0004), span(0.4), span(75), span(3900), span(200_000)
    ('0.4\\u202fms', '0.4\\u202fs', '1\\u202fmin 15\\u202fs', '1\\u202fh 5\\u202fmin', '2\\u202fd 7\\u202fh')
    """
    if seconds < 59.5:
        small = 0 < seconds < 0.1
        return f"{number(seconds * 1000)}{THIN}ms" if small else f"{number(seconds)}{THIN}s"
    if seconds < 3600:
        return _two(round(seconds), 60, "min", "s")
    if seconds < 86_400:
        return _two(round(seconds / 60), 60, "h", "min")
    return _two(round(seconds / 3600), 24, "d", "h")


def ago(seconds: float) -> str:
    """Return how long ago something was, in one unit."""
    if seconds < 1:
        return "just now"
    for length, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length:.0f}{THIN}{name} ago"
    return f"{seconds:.0f}{THIN}s ago"


def iso(time: float) -> str:
    """Return the time as <time datetime> wants it."""
    return _utc(time).isoformat(timespec="seconds").replace("+00:00", "Z")


def clock(time: float) -> str:
    """Return the time of day in UTC."""
    return f"{_utc(time):%H:%M}"


def clock_with_seconds(time: float) -> str:
    return f"{_utc(time):%H:%M:%S}"


def date(time: float) -> str:
    """Return the date, short: 24 Nov."""
    return f"{_utc(time).day} {_utc(time):%b}"


def dated(time: float, now: float) -> str:
    """Return the time of day, with the date if that was another day."""
    return clock(time) if date(time) == date(now) else f"{date(time)} {clock(time)}"


def plural(many: int, one: str, more: str | None = None) -> str:
    """Return how many there are of a thing, by its name, in as few digits as `amount`.

    >>> plural(1, "failure"), plural(2, "failure")
    ('1 failure', '2 failures')
    """
    return f"{amount(many)} {named(many, one, more)}"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    if abs(value) < HIGHEST:
        return number(value) + units[0]
    if len(units) > 1:
        return _scaled(value / base, base, units[1:])
    return f"{value:.3g}{units[0]}"


def _two(whole: int, parts: int, large: str, small: str) -> str:
    many, rest = divmod(whole, parts)
    return f"{many}{THIN}{large}" + (f" {rest}{THIN}{small}" if rest else "")


def _utc(time: float) -> datetime:
    return datetime.fromtimestamp(time, UTC)
