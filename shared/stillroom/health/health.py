"""Health's two faces: `Health` for threads, `AsyncHealth` for asyncio."""

from __future__ import annotations

from stillroom.health.body import HealthBody
from stillroom.health.probe import Probe
from stillroom.health.report import Role
from stillroom.operation import AsyncDriver, Driver, awaiting, blocking


class Health:
    """Health for threads and greenlets: `room.health`."""

    def __init__(self, body: HealthBody, driver: Driver) -> None:
        self._body = body
        self._driver = driver

    check = blocking(HealthBody.check)
    examine = blocking(HealthBody.examine)
    snapshot = blocking(HealthBody.snapshot)
    history = blocking(HealthBody.history)
    past = blocking(HealthBody.past)
    seen = blocking(HealthBody.seen)
    ticked = blocking(HealthBody.ticked)
    tell_webhook = blocking(HealthBody.tell_webhook)

    def register(self, role: Role, probe: Probe, shard: int = 0) -> None:
        """See HealthBody.register."""
        self._body.register(role, probe, shard)


class AsyncHealth:
    """Health for asyncio: `room.health`. The same names, awaited."""

    def __init__(self, body: HealthBody, driver: AsyncDriver) -> None:
        self._body = body
        self._driver = driver

    check = awaiting(HealthBody.check)
    examine = awaiting(HealthBody.examine)
    snapshot = awaiting(HealthBody.snapshot)
    history = awaiting(HealthBody.history)
    past = awaiting(HealthBody.past)
    seen = awaiting(HealthBody.seen)
    ticked = awaiting(HealthBody.ticked)
    tell_webhook = awaiting(HealthBody.tell_webhook)

    def register(self, role: Role, probe: Probe, shard: int = 0) -> None:
        """See HealthBody.register."""
        self._body.register(role, probe, shard)
