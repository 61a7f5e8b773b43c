"""The lengths of time that the page can show, and how each is divided. Pure."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, urlencode

MINUTE_S = 60.0
HOUR_S = 3_600.0
DAY_S = 86_400.0
TICKS_MOST = 7  # labels of time below a chart
ROWS_MOST = 24  # of a table
# Round lengths of time, for ticks and for rows.
STEPS_S = (60.0, 300.0, 600.0, 900.0, 1_800.0, HOUR_S, 7_200.0, 10_800.0, 21_600.0, 43_200.0, DAY_S)


class Choice(NamedTuple):
    """One length of time."""

    name: str  # as the page's address has it: ?for=15m
    said: str
    seconds: float
    every: float = MINUTE_S  # between two of its snapshots

    @property
    def hours(self) -> float:
        return self.seconds / HOUR_S

    @property
    def gap_s(self) -> float:
        """Return how far apart two snapshots are that have a gap between them.

        One that is late, or lost, is no gap yet.
        """
        return 2.5 * self.every


DAY = Choice("24h", "24 h", DAY_S)
CHOICES = (
    Choice("15m", "15 min", 15 * MINUTE_S),
    Choice("1h", "1 h", HOUR_S),
    Choice("6h", "6 h", 6 * HOUR_S),
    DAY,
    Choice("7d", "7 d", 7 * DAY_S, every=5 * MINUTE_S),
)


class View(NamedTuple):
    """Hold what a reader has asked the page for."""

    choice: Choice = DAY
    reload_s: int | None = None

    def address(self, **changes: object) -> str:
        """Return the page's address with one of them changed, for a link."""
        other = self._replace(**changes)  # type: ignore[arg-type]
        query = {
            **({"for": other.choice.name} if other.choice != DAY else {}),
            **({"every": other.reload_s} if other.reload_s else {}),
        }
        return f"?{urlencode(query)}"


RELOAD_RANGE_S = range(5, 3_601)


def view_of(query: str) -> View:
    """Return the view that a query such as `?for=1h&every=30` asks for. Values that make no sense are passed over.

    >>> view_of("for=1h&every=30").reload_s, view_of("for=2y").choice.name
    (30, '24h')
    """
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    choices = [choice for choice in CHOICES if choice.name == given.get("for")]
    return View(choices[0] if choices else DAY, _reload_s(given.get("every", "")))


def _reload_s(given: str) -> int | None:
    if not (given.isascii() and given.isdigit() and len(given) < 6):
        return None
    return int(given) if int(given) in RELOAD_RANGE_S else None


def tick_s(length: float) -> float:
    """Return the seconds between two labels of time below a chart of this length."""
    return _step(length, TICKS_MOST)


def row_s(length: float) -> float:
    """Return the seconds that each row of a table stands for."""
    return _step(length, ROWS_MOST)


def _step(length: float, most: int) -> float:
    return next((step for step in STEPS_S if length <= step * most), STEPS_S[-1])
