"""The workers by name: what each says of itself with its sign of life; and whether they are to pause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from stillroom.health.probe import Counts
from stillroom.health.report import WorkerStats
from stillroom.keys import Keys
from stillroom.pauses import REFRESH, said_by
from stillroom.wire import Command

SHOWN = 50  # workers in a report, those that were seen last
NAME_LIMIT = 100  # characters


class CrewProbe:
    """For the part `tasks`."""

    part = "tasks"

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def commands(self, now_ms: int) -> Sequence[Command]:
        most = (b"LIMIT", b"0", b"%d" % SHOWN, b"WITHSCORES")
        return [
            (b"ZRANGE", self._keys.workers, b"+inf", b"-inf", b"BYSCORE", b"REV", *most),
            (b"HGETALL", self._keys.workers_about),
        ]

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        seen, about = replies
        if seen is None or about is None:
            return {"crew": None}
        said = dict(zip(about[::2], about[1::2], strict=True))
        return {"crew": tuple(_crew(seen, said, now_ms))}

    def count(self, counts: Counts | None) -> Mapping[str, Any]:
        return {}


class PauseProbe:
    """For the part `tasks`: whether refreshes are paused."""

    part = "tasks"

    def __init__(self, keys: Keys) -> None:
        self._key = keys.paused(REFRESH)

    def commands(self, now_ms: int) -> Sequence[Command]:
        return [(b"PTTL", self._key), (b"GET", self._key)]

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        left_ms, text = replies
        if left_ms is None or left_ms <= 0:
            return {}
        return {"paused_s": left_ms / 1000, "paused_by": said_by(text)}

    def count(self, counts: Counts | None) -> Mapping[str, Any]:
        return {}


def _crew(seen: Sequence[bytes], said: Mapping[bytes, bytes], now_ms: int) -> Iterator[WorkerStats]:
    for worker, ms in zip(seen[::2], seen[1::2], strict=True):
        if not math.isfinite(float(ms)):  # another writer's: a server's clock shows no such time
            continue
        about = _about(said.get(worker, b"{}"))
        name = worker.decode(errors="replace")[:NAME_LIMIT]
        age_s = max(0.0, (now_ms - float(ms)) / 1000)
        yield about.model_copy(update={"name": name, "seen_s": age_s})


def _about(text: bytes) -> WorkerStats:
    """Return what a worker reports of itself, or nothing known for a report of another form."""
    try:
        return WorkerStats.model_validate_json(text)
    except ValidationError:
        return WorkerStats()
