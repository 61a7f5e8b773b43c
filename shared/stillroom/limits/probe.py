"""Reports the counts of rate limits and abuse detection, and the number of bans in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.counted import LIMIT, RULE, by_name
from stillroom.keys import WOULD_DENY, Keys
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
NAMED_MOST = 100  # limits in a report, and rules


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
        fields: dict[str, Any] = {f: counts.get(name, 0) for f, name in COUNTED.items()}
        fields["each"] = _named(_with_shadows(by_name(counts, LIMIT), counts))
        fields["rules"] = _named(by_name(counts, RULE))
        return fields


def _with_shadows(
    limits: dict[str, dict[str, int]], counts: Mapping[str, int]
) -> Mapping[str, Mapping[str, int]]:
    for field, number in counts.items():
        if field.startswith(WOULD_DENY):
            limits.setdefault(field.removeprefix(WOULD_DENY), {})["would_deny"] = number
    return limits


def _named(found: Mapping[str, Mapping[str, int]]) -> tuple[Mapping[str, Any], ...]:
    """Return the names that are counted most, in order."""
    names = sorted(found, key=lambda name: (-max(found[name].values()), name))
    return tuple([{"name": name, **found[name]} for name in names[:NAMED_MOST]])
