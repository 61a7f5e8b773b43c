"""What a service adds to the report. Plain data goes in and comes out: services do not know the report's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stillroom.wire import Command

Counts = Mapping[str, int]  # what all processes counted in one minute, by name


class Probe(Protocol):
    """Registered by the room, on the server its service lives on. Several may add to one part.

    Its commands ride in the one batch of a check, so they are cheap: lengths and counts, never a scan. What could
    not be had is None: in what it is given, and then in what it returns.
    """

    @property
    def part(self) -> str:
        """The part of the report: cache, sessions, limits or tasks."""

    def commands(self, now_ms: int) -> Sequence[Command]:
        """What to ask; `now_ms` is the server's clock."""

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        """Fields of the part. Numbers of a cluster's shards are added up."""

    def count(self, counts: Counts | None) -> Mapping[str, Any]:
        """Fields of the part, from what was counted in the last whole minute."""
