"""Tell workers what to leave alone for a while: refreshes, while somebody repairs a database.

A pause is a key that runs out by itself, on the state's server: nobody can forget to end it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from pydantic_core import from_json

from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument, RedisUnavailable, did_you_mean, in_code
from stillroom.keys import Keys
from stillroom.misuse import refuse_other
from stillroom.operation import STATE, On, Once, Operation

REFRESH = "refresh"
WHATS = (REFRESH,)
LONGEST_S = 86_400
LOOK_EVERY_S = 1.0
PUT_OFF_MS = 15_000  # work that a pause meets is looked at again after this


@dataclass(frozen=True, slots=True)
class Paused:
    """One pause that is in force."""

    what: str
    left_s: float
    by: str


class Pauses:
    """The operations. The state's driver runs them."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._due = 0.0  # time.monotonic(): look again
        self._is_paused = False

    def pause(self, what: str, seconds: Duration, by: str = "") -> Operation[None]:
        """Let workers leave something alone for a time, up to a day. They see it within a second.

        `refresh`: stale values are served until their swr ends; then readers load them. Whatever else workers would
        load waits too: warm-ups, soft invalidations, orders to load.
        Another pause takes the place of this one. Raises InvalidArgument. Redis away: RedisUnavailable.
        """
        _check(what)
        refuse_other("by", by, str, "a text that says who pauses it; leave it out for nobody")
        return self._pausing(
            what, seconds_of("seconds", seconds, least=1, most=LONGEST_S), by[:100]
        )

    def _pausing(self, what: str, seconds: float, by: str) -> Operation[None]:
        ms = int(seconds * 1000)
        told = json.dumps({"by": by, "ms": ms})
        # Once: a copy that arrives behind `resume` would begin the pause anew.
        yield Once([(b"SET", self._keys.paused(what), told, b"PX", b"%d" % ms)])

    def resume(self, what: str) -> Operation[bool]:
        """End a pause; True if there was one. Raises InvalidArgument. Redis away: RedisUnavailable."""
        _check(what)
        # Once: the second of two that arrive would find no pause.
        (ended,) = yield Once([(b"DEL", self._keys.paused(what))])
        return bool(ended)

    def pauses(self) -> Operation[list[Paused]]:
        """Return the pauses in force. Redis away: RedisUnavailable."""
        keys = [self._keys.paused(what) for what in WHATS]
        (texts, *left) = yield [(b"MGET", *keys), *((b"PTTL", key) for key in keys)]
        found = zip(WHATS, texts, left, strict=True)
        return [Paused(what, ms / 1000, said_by(text)) for what, text, ms in found if ms > 0]

    def look_again(self) -> None:
        """Ask Redis with the next call: a test's clock was moved."""
        self._due = 0.0

    def refreshes_are_paused(self) -> Operation[bool]:
        """Return whether workers leave refreshes alone. Asks once a second. Redis away: as it was last seen."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + LOOK_EVERY_S
            key = self._keys.paused(REFRESH)
            try:
                text, left_ms = yield [(b"GET", key), (b"PTTL", key)]
                if text is not None and left_ms > (given := _given_ms(text)):
                    # The server's clock was put back, and the pause would last for as much longer.
                    yield [(b"PEXPIRE", key, b"%d" % given)]
            except RedisUnavailable:
                return self._is_paused
            self._is_paused = text is not None
        return self._is_paused


def are_paused(pauses: Pauses) -> Operation[bool]:
    """Return whether refreshes are paused, from an operation of the cache."""
    (answer,) = yield On([(STATE, pauses.refreshes_are_paused())])
    return bool(answer)


def _check(what: str) -> None:
    if what not in WHATS:
        raise InvalidArgument(
            f"what={in_code(what):.100}: {' or '.join(WHATS)} can be paused{did_you_mean(what, WHATS)}"
        )


def _given_ms(text: bytes) -> int:
    """Return how long a pause was to last; the longest there is if it does not say."""
    try:
        return int(from_json(text)["ms"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return LONGEST_S * 1000


def said_by(text: bytes | None) -> str:
    """Return who has made a pause; empty if it does not say."""
    try:
        return str(from_json(text or b"{}")["by"])
    except (ValueError, TypeError, KeyError):
        return ""
