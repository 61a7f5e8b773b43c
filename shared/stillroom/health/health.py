"""Health's two faces: `Health` for threads, `AsyncHealth` for asyncio."""

from __future__ import annotations

from stillroom.face import Service, awaiting, blocking
from stillroom.health.body import HealthBody
from stillroom.health.probe import Probe
from stillroom.health.report import Role
from stillroom.misuse import explained


class _Face(Service):
    """The part of both faces that runs no operation."""

    _body: HealthBody

    @explained
    def register(self, role: Role, probe: Probe, shard: int = 0) -> None:
        """Let a service add to the report. `role` and `shard` say where its data are. Raises InvalidArgument."""
        self._body.register(role, probe, shard)


class Health(_Face):
    """Health for threads and greenlets: `room.health`."""

    check = blocking(HealthBody.check)
    examine = blocking(HealthBody.examine)
    history = blocking(HealthBody.history)
    past = blocking(HealthBody.past)
    figures = blocking(HealthBody.figures)


class AsyncHealth(_Face):
    """Health for asyncio: `room.health`. The same names, awaited."""

    check = awaiting(HealthBody.check)
    examine = awaiting(HealthBody.examine)
    history = awaiting(HealthBody.history)
    past = awaiting(HealthBody.past)
    figures = awaiting(HealthBody.figures)
