"""Counts of what happened, added up over all processes; and log lines that do not flood."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from stillroom.counted import OTHERS
from stillroom.keys import Keys
from stillroom.oldest import oldest
from stillroom.shown import shown_lines
from stillroom.wire import Command, reset_after_fork

FLUSH_EVERY_S = 5.0
KEPT_SECONDS = 2 * 3600
TOTALS_KEPT_SECONDS = 30 * 86_400
QUIET_SECONDS = 30.0  # between two lines that say the same
MISTAKE_TOLD_SECONDS = 60.0
NAMES_LIMIT = 100  # things of a kind that are counted by name, and …
NAME_LIMIT = 100  # … characters of a name
ERRORS_KEPT_SECONDS = 8 * 86_400

log = logging.getLogger("stillroom")


class Stats:
    """Counts in memory; every few seconds they ride along with a read, so they cost no round trip.

    They are kept for people and graphs: a batch that fails on its way takes its few counts with it. While the
    breaker is open they stay here, for what happened meanwhile is what one wants to know afterwards.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._said: dict[tuple[str, str], float] = {}
        self._mistake: tuple[float, str] | None = None
        self.last_said: tuple[str, str] | None = None  # reason and sentence, logged or not
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.gauges: dict[str, Callable[[], int]] = {}  # current values of this process, by name
        self.errors: dict[str, str] = {}  # by loader its last error, as JSON; see cache/figures.py
        self._names: dict[str, dict[str, str]] = {}  # kind → name → what it is counted as
        self._fields: dict[tuple[str, str, str], str] = {}
        self.watch: Any = None  # the watcher of each operation, if any: see events.py
        self.breaker: Any = None  # of the server they are written to; the room knows it
        self.at_exit: Any = None  # tells what waits when this process ends; the room knows it, too
        self.due = 0.0  # time.monotonic(): flush at the next read after it
        # What makes further commands that are sent with a flush.
        self.riders: list[Callable[[], list[Command]]] = []
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget all counts: the parent will write down what it counted."""
        self.counts = defaultdict(int)
        self.errors = {}

    def counted_as(self, kind: str, what: str, name: str) -> str:
        """Return what something is counted as by its name, `loader:hits:product`: see counted.py."""
        field = self._fields.get((kind, what, name))
        if field is None:
            field = f"{kind}:{what}:{self.named(kind, name)}"
            if len(self._fields) < 100 * NAMES_LIMIT:
                self._fields[kind, what, name] = field
        return field

    def named(self, kind: str, name: str) -> str:
        """Return the name to count under. After the first hundred names of a kind it is `others`."""
        known = self._names.setdefault(kind, {})
        if name not in known:
            if len(known) >= NAMES_LIMIT:
                return OTHERS
            known[name] = name[:NAME_LIMIT]
        return known[name]

    def flush(self, now_ms: int, keys: Keys | None = None) -> list[Command]:
        """Return the commands that add the counts since the last flush to this minute, and to all there ever were.

        `keys`: another shard's.
        """
        self.due = time.monotonic() + FLUSH_EVERY_S
        if self.breaker is not None and self.breaker.is_open:
            return []
        ridden = [command for rider in self.riders for command in rider()]
        if self.errors:
            ridden += self._telling_errors(keys or self._keys)
        if not self.counts:
            return ridden
        counts, self.counts = self.counts, defaultdict(int)
        names = keys or self._keys
        minute = _adding(names.stats(now_ms // 60_000), counts, KEPT_SECONDS)
        return [*ridden, *minute, *_adding(names.counts, counts, TOTALS_KEPT_SECONDS)]

    def _telling_errors(self, keys: Keys) -> list[Command]:
        errors, self.errors = self.errors, {}
        told = [word for pair in oldest(errors.items(), NAMES_LIMIT + 1) for word in pair]
        return [(b"HSET", keys.errors, *told), (b"EXPIRE", keys.errors, str(ERRORS_KEPT_SECONDS))]

    def mistaken(self, reason: str) -> None:
        """Remember that the configuration has just kept a call from Redis: the wire's word for why."""
        self._mistake = time.monotonic(), reason

    @property
    def mistake(self) -> str | None:
        """Return why the configuration has kept a call of this process from Redis in the last minute, or None."""
        if self._mistake is None or time.monotonic() > self._mistake[0] + MISTAKE_TOLD_SECONDS:
            return None
        return self._mistake[1]

    def remind(self) -> None:
        """Note that something waits for that server: it is told in a second, or when this process ends."""
        if self.at_exit is not None:
            self.at_exit.arm()
        if self.breaker is not None:
            self.breaker.remind()

    def say(self, what: str, reason: str, detail: object, level: int = logging.WARNING) -> None:
        """Log once per 30 s for the same thing and reason."""
        self.last_said = reason, str(detail)
        now = time.monotonic()
        if self._said.get((what, reason), 0.0) > now:
            return
        if len(self._said) > 1_000:
            self._said.clear()
        self._said[what, reason] = now + QUIET_SECONDS
        log.log(level, "%s: %s", what, shown_lines(str(detail)))


def _adding(key: bytes, counts: Mapping[str, int], kept: int) -> list[Command]:
    # A thread that took hold of the counts before they were exchanged may still add to them.
    copied = list(counts.items())
    added: list[Command] = [(b"HINCRBY", key, name, str(n)) for name, n in copied]
    return [*added, (b"EXPIRE", key, str(kept))]
