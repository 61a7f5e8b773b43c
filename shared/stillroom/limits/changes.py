"""Limits that operators have changed while the apps run: what Redis holds of them, what becomes of a limit. Pure.

`ns:limits:changes` is a hash: a limit's name → quota, window, until when and who, as JSON. Each process reads it
once a second, behind a check, so it costs no round trip. A log knows neither quota nor window: nothing else
changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.errors import InvalidLimit
from stillroom.limits.limit import QUOTA_LIMIT, WINDOW_LIMIT, Limit
from stillroom.whole import number_in

READ_EVERY_S = 1.0
LONGEST_S = 30 * 86_400  # that a change may last
MOST = 200  # names
REHEARSED = "stillroom-doctor"  # the limit that `stillroom doctor` uses once: no app has it
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_RATE = re.compile(r"([0-9_,]{1,12})/([0-9]{0,9})([smhd]?)", re.ASCII)
_TIME = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Change:
    """Hold the quota and window of a limit until a moment. Times are the server's clock, seconds since 1970."""

    name: str
    quota: int
    window: int  # seconds
    until: float
    since: float = 0.0
    by: str = ""

    def onto(self, limit: Limit) -> Limit:
        """Return the limit as it is for now."""
        return replace(limit, quota=self.quota, window=self.window)


class _Record(BaseModel):
    """The fields of a change in the hash."""

    model_config = ConfigDict(extra="ignore")

    quota: int
    window: int
    until: float
    since: float = 0.0
    by: str = ""


class Changes:
    """Hold the changes that this process knows of."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all changes."""
        self.found: Mapping[str, Change] = {}
        self.due = 0.0  # time.monotonic(): read them with the next check
        self._applied: dict[tuple[Limit, ...], tuple[Limit, ...]] = {}
        self._ends: Mapping[Change, float] = {}  # by this machine's steady clock …
        self._first_end = 0.0  # … the first of them

    def applied(self, limits: tuple[Limit, ...], steady_s: float) -> tuple[Limit, ...]:
        """Return the limits as they are for now. A change that is over is dropped, also while Redis is away."""
        if steady_s >= self._first_end:
            self._take(self.found.values(), steady_s)
        # Looked up before `found`: other changes, learned meanwhile by another thread, have a dict of their own.
        applied = self._applied
        known = applied.get(limits)
        if known is None:
            if len(applied) >= MOST:
                applied.clear()
            found = self.found
            known = tuple(
                [found[one.name].onto(one) if one.name in found else one for one in limits]
            )
            applied[limits] = known
        return known

    def learn(self, reply: Any, now_s: float, steady_s: float) -> bool:
        """Take in what the hash holds, and say whether that is something new.

        `now_s`: the server's clock; `steady_s`: this machine's. A change lasts no longer because the server's clock
        has stepped back since it was made, or since this process has seen it first.
        """
        read = [one for one in read_changes(reply) if one.until > now_s]
        self._ends = {
            one: self._ends.get(one, steady_s + min(one.until - now_s, one.until - one.since))
            for one in read
        }
        return self._take(read, steady_s)

    def end_sooner(self, seconds: float) -> None:
        """Let all changes end so much sooner, and have them read with the next check: a test's clock was moved."""
        self._ends = {one: end - seconds for one, end in self._ends.items()}
        self._first_end -= seconds
        self.due = 0.0

    def _take(self, changes: Iterable[Change], steady_s: float) -> bool:
        """Let those of these changes hold that are not over, and say whether that is something new."""
        ends = self._ends
        found = {one.name: one for one in changes if ends.get(one, 0.0) > steady_s}
        self._first_end = min([ends[one] for one in found.values()], default=0.0)
        if found == self.found:
            return False
        self.found, self._applied = found, {}
        return True


def read_changes(reply: Any) -> list[Change]:
    """Return the changes that the hash holds. A field that is no change is passed over."""
    if not isinstance(reply, list):
        return []
    changes = []
    for name, text in zip(reply[::2], reply[1::2], strict=False):
        try:
            record = _Record.model_validate_json(text)
            changes.append(checked(name.decode(errors="replace"), **record.model_dump()))
        except (ValidationError, InvalidLimit):
            continue
    return changes


def checked(
    name: str, quota: int, window: int, until: float, since: float = 0.0, by: str = ""
) -> Change:
    """Return the change. Raises InvalidLimit for numbers that no limit has."""
    limit = Limit(name, quota, window)
    return Change(limit.name, quota, window, until, since, by)


def read_rate(text: str) -> tuple[int, int]:
    """Return quota and window, as people write them. Raises InvalidLimit.

    >>> read_rate("2000/1h"), read_rate("5/300"), read_rate("1_000/m")
    ((2000, 3600), (5, 300), (1000, 60))
    """
    match = _RATE.fullmatch(text.strip())
    if match is None or not (match[2] or match[3]):
        raise InvalidLimit(text, "a rate is written as 2000/1h: quota/window, in s, m, h or d")
    quota = int(re.sub("[_,]", "", match[1]) or "0")
    window = int(match[2] or "1") * _UNITS[match[3] or "s"]
    if quota > QUOTA_LIMIT or not 1 <= window <= WINDOW_LIMIT:
        raise InvalidLimit(
            text, f"at most {QUOTA_LIMIT:,} hits, in a window of 1 s to {WINDOW_LIMIT // 86_400} d"
        )
    return quota, window


def read_time(text: str, most: int = LONGEST_S) -> int:
    """Return seconds, as people write them: 90s, 30m, 2h, 7d. Raises InvalidLimit, also for more than `most`."""
    match = _TIME.fullmatch(text.strip())
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 1 <= seconds <= most:
        told = f"a time is written as 90s, 30m, 2h or 7d, and is {write_time(most)} at most here"
        raise InvalidLimit(text, told)
    return seconds


def write_rate(quota: int, window: int) -> str:
    """Return a rate as read_rate reads it.

    >>> write_rate(2000, 3600), write_rate(5, 90)
    ('2,000/1h', '5/90s')
    """
    return f"{quota:,}/{write_time(window)}"


def write_time(seconds: int) -> str:
    """Return a time as read_time reads it.

    >>> write_time(3600), write_time(90)
    ('1h', '90s')
    """
    fitting = [(unit, seconds // size) for unit, size in _UNITS.items() if seconds % size == 0]
    unit, count = fitting[-1]
    return f"{count}{unit}"


def known_names(windows: Sequence[bytes]) -> list[str]:
    """Return the names of limits that apps have, of what `ns:limits:windows` holds."""
    names = {name.decode(errors="replace") for name in windows}
    return sorted(names - {REHEARSED})


def known_windows(reply: Sequence[bytes]) -> dict[str, int]:
    """Return the longest window of each limit in seconds, by its name.

    `reply`: what `ns:limits:windows` holds, in µs and with the time at which it was written.

    >>> known_windows([b"auth", b"300000000 1795794217482792"])
    {'auth': 300}
    """
    pairs = zip(reply[::2], reply[1::2], strict=True)
    found = {name: number_in(said.partition(b" ")[0]) for name, said in pairs}
    return {
        name.decode(errors="replace"): window // 1_000_000
        for name, window in found.items()
        if window is not None
    }
