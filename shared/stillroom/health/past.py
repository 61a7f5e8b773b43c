"""Reads what /status shows besides a check: snapshots, and the newest patterns of abuse. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from stillroom.health.report import Count, Figures, Length, Moment, Part, Snapshot

COARSE_S = 300.0  # between two snapshots of the stream that keeps a week


class Pattern(Part):
    """A pattern of abuse, as `ns:abuse:log` keeps it. Times: seconds since 1970."""

    rule: str
    subject: str  # an address, a network, or a user's HMAC
    count: Count
    last: Moment
    action: str
    shadow: bool  # only what would have been done
    ban_seconds: Length = 0.0


class Past(NamedTuple):
    """Holds the snapshots, patterns and figures for /status. None: Redis did not tell it."""

    history: Sequence[Snapshot] | None  # oldest first
    patterns: Sequence[Pattern] | None  # newest first
    since: float | None = None  # when the first snapshot of all was made, as far as they reach back
    figures: Figures | None = None  # recent counts by name


NOT_TOLD = Past(None, None)


def patterns_in(entries: Sequence[Any]) -> list[Pattern]:
    """Return the patterns in a reply to XREVRANGE. An entry that can't be read (another writer's) is left out."""
    found = [_pattern(fields) for _, fields in entries]
    return [pattern for pattern in found if pattern is not None]


def _pattern(fields: Sequence[bytes]) -> Pattern | None:
    texts = [field.decode(errors="replace") for field in fields]
    try:
        return Pattern.model_validate(dict(zip(texts[::2], texts[1::2], strict=True)))
    except ValidationError:
        return None


def began(ids: Sequence[bytes]) -> float | None:
    """Return when the first snapshot was made, in seconds since 1970; None without ids.

    `ids`: the first id of the stream of minutes, then of the stream of every fifth minute.

    >>> began([b"600000-0", b"300000-0"]), began([b"600000-0", b"60000-0"]), began([])
    (600.0, 60.0, None)
    """
    if not ids:
        return None
    first, *coarse = [int(one.partition(b"-")[0]) / 1000 for one in ids]
    # A coarse one has the beginning of its five minutes for its time.
    earlier = [time for time in coarse if time < first - COARSE_S]
    return min([first, *earlier])
