"""What rate limits and abuse detection counted, and who is banned now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.keys import Keys
from stillroom.wire import Command

COUNTED = {
    "checks": "limit_checks",
    "denials": "limit_denials",
    "cached": "limit_cached",
    "degraded": "limit_degraded",
    "bans": "bans",
    "events": "abuse_events",
    "dropped": "abuse_dropped",
    "patterns": "abuse_patterns",
}


class LimitsProbe:
    """The part `limits`."""

    part = "limits"

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def commands(self, now_ms: int) -> Sequence[Command]:
        return [(b"ZCOUNT", self._keys.bans, b"%d" % now_ms, b"+inf")]

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        return {"banned": replies[0]}

    def count(self, counts: Mapping[str, int] | None) -> Mapping[str, Any]:
        if counts is None:
            return {}
        return {field: counts.get(name, 0) for field, name in COUNTED.items()}
