"""Contains the sessions' part of a health report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.keys import Keys
from stillroom.wire import Command

COUNTED = ("created", "destroyed", "expired", "replayed")


class SessionProbe:
    """The part `sessions`: three numbers of each shard."""

    part = "sessions"

    def __init__(self, keys: Keys, shards: int) -> None:
        self._due = [keys.due_sessions(shard) for shard in range(shards)]
        self._revoked = [keys.revocations(shard) for shard in range(shards)]

    def commands(self, now_ms: int) -> Sequence[Command]:
        now_us = b"%d" % (now_ms * 1000)
        return [
            *((b"ZCARD", key) for key in self._due),
            *((b"ZCOUNT", key, b"-inf", now_us) for key in self._due),
            *((b"ZCARD", key) for key in self._revoked),
        ]

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        shards = len(self._due)
        thirds = [replies[start : start + shards] for start in range(0, 3 * shards, shards)]
        names = ("active", "expired_pending", "revoked_pending")
        return {
            name: None if None in third else sum(third)
            for name, third in zip(names, thirds, strict=True)
        }

    def count(self, counts: Mapping[str, int] | None) -> Mapping[str, Any]:
        if counts is None:
            return {}
        return {name: counts.get(f"sessions_{name}", 0) for name in COUNTED}
