"""Reads the state of background work without asking a worker: queues, heartbeats, and when each tick was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from stillroom.broker import SENT_HEADER
from stillroom.dispatch import MESSAGE_LIMIT
from stillroom.health.probe import Counts
from stillroom.health.queues import BrokerHere
from stillroom.health.source import counts_in
from stillroom.keys import Keys
from stillroom.settings import Settings
from stillroom.wire import Command

SEEN_WITHIN_MS = 30_000
QUEUES = ("refresh", "maintenance")
# kombu has a list for each step of the priority that a sender may give. The first is for none.
STEPS = ("", "\x06\x163", "\x06\x166", "\x06\x169")
LONGEST_WAIT_S = 31 * 86_400.0  # a message that says more was not stamped by a clock


class TaskProbe:
    """The part `tasks`. Queues are read only where the broker is the Redis that holds the state."""

    part = "tasks"

    def __init__(self, settings: Settings, keys: Keys, ticks_of_beat: Sequence[str]) -> None:
        self._keys = keys
        self._ticks_of_beat = ticks_of_beat  # tasks that only beat asks for
        self._broker_here = BrokerHere(settings)
        self._queues = [keys.queue(kind) for kind in QUEUES]

    def commands(self, now_ms: int) -> Sequence[Command]:
        since, till = b"%d" % (now_ms - SEEN_WITHIN_MS), b"%d" % (now_ms + SEEN_WITHIN_MS)
        always: list[Command] = [
            (b"ZCOUNT", self._keys.workers, since, till),
            (b"HGETALL", self._keys.ticks),
            (b"XLEN", self._keys.dead_letters),
        ]
        if not self._broker_here.answer:
            return always
        # Workers take from the right: what stands there has waited longest.
        of_queues = [
            command
            for queue in self._queues
            for step in STEPS
            for command in ((b"LLEN", queue + step), (b"LINDEX", queue + step, b"-1"))
        ]
        return [*always, (b"HLEN", self._keys.unacked), *of_queues]

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        workers, ticked, letters, *rest = replies
        ticks = counts_in(ticked)
        ages = None if ticks is None else _ages(ticks, now_ms)
        known = {
            "workers": workers,
            "dead_letters": letters,
            "ticks": ages,
            "beat_s": min(
                (age for task, age in (ages or {}).items() if task in self._ticks_of_beat),
                default=None,
            ),
        }
        if not rest or rest[1] is None:
            return known
        unacked, *pairs = rest
        each = 2 * len(STEPS)
        queues = [
            _queue(name, pairs[n * each : (n + 1) * each], now_ms)
            for n, name in enumerate(self._queues)
        ]
        return known | {"unacked": unacked, "queues": queues}

    def count(self, counts: Counts | None) -> Mapping[str, Any]:
        return {}


def _ages(ticks: Mapping[str, int], now_ms: int) -> dict[str, float]:
    """Return the seconds since each tick, without ticks from before the clock stepped back."""
    known = {task: ms for task, ms in ticks.items() if ms <= now_ms + SEEN_WITHIN_MS}
    return {task: max(0.0, (now_ms - ms) / 1000) for task, ms in known.items()}


def _queue(name: str, replies: Sequence[Any], now_ms: int) -> dict[str, Any]:
    """Return how many messages wait in the lists of a queue, and for how long the oldest of the next ones has."""
    depths, messages = replies[::2], replies[1::2]
    ages_s = [_waited(message, now_ms) for message in messages]
    return {
        "name": name,
        "depth": None if depths[0] is None else sum(depth or 0 for depth in depths),
        "oldest_s": max((age_s for age_s in ages_s if age_s is not None), default=None),
    }


def _waited(message: bytes | None, now_ms: int) -> float | None:
    """Return how long ago a message was sent, if its headers hold a plausible time."""
    if message is None or len(message) > MESSAGE_LIMIT:
        return None  # too large for a worker: it takes it, and makes a dead letter of it
    try:
        sent_ms = float(from_json(message)["headers"][SENT_HEADER])
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    age_s = (now_ms - sent_ms) / 1000
    return max(0.0, age_s) if age_s < LONGEST_WAIT_S else None
