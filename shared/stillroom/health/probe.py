"""Defines how a service adds to the report.

Plain data goes in and comes out: services do not know the report's models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stillroom.wire import Command

Counts = Mapping[str, int]  # the counts of all processes in one minute, by name


class Probe(Protocol):
    """A probe is registered by the room on its service's server. Several probes may add to one part.

    Its commands ride in the one batch of a check, so they are cheap: lengths and counts, never a scan. A missing
    reply is None, and so is the field that is made from it.
    """

    @property
    def part(self) -> str:
        """Return the part of the report: cache, sessions, limits or tasks."""

    def commands(self, now_ms: int) -> Sequence[Command]:
        """Return the commands to send. `now_ms` is the server's clock."""

    def read(self, replies: Sequence[Any], now_ms: int) -> Mapping[str, Any]:
        """Return fields of the part. Numbers of a cluster's shards are added up."""

    def count(self, counts: Counts | None) -> Mapping[str, Any]:
        """Return fields of the part, from the counts of the last whole minute."""
