"""Limits how many events of one kind a process may send. Pure."""

from __future__ import annotations

EVENTS_A_SECOND = 50.0
BURST = 500.0


class Allowance:
    """A token bucket for each kind: a flood of one is cut short, and does not drown the others.

    Threads may take at once; an event too many, now and then, is no harm.
    """

    def __init__(self, rate: float = EVENTS_A_SECOND, burst: float = BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._left: dict[str, tuple[float, float]] = {}  # kind → tokens, and when they were counted

    def take(self, kind: str, now: float) -> bool:
        """Take a token and return whether one more event may be sent.

        `now`: seconds, of a clock that never goes back.
        """
        left, then = self._left.get(kind, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        allowed = left >= 1
        self._left[kind] = (left - allowed, now)
        return allowed
