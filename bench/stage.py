"""Gives every part the effort to spend, and a server with a room and a client on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
from bench.processes import apart_from
from stillroom import NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer

T = TypeVar("T")

NEVER = 1 << 62  # seconds
PATIENT: dict[str, Any] = {  # a busy machine is no reason to give up
    "session_peppers": "p" * 32,
    "command_timeout": 5,
    "call_timeout": 30,
    "request_timeout": 30,
    "health_timeout": 5,
}


@dataclass(frozen=True)
class Effort:
    """Sets how much is measured. `smoke` is for the tests: its figures mean nothing."""

    level: str  # smoke, quick, usual, full
    rounds: int
    hits: int  # in a turn

    def pick(self, *, smoke: T, quick: T, usual: T, full: T) -> T:
        return {"smoke": smoke, "quick": quick, "usual": usual, "full": full}[self.level]


EFFORTS = {
    "smoke": Effort("smoke", 2, 2),
    "quick": Effort("quick", 15, 30),
    "usual": Effort("usual", 60, 60),
    "full": Effort("full", 120, 100),
}


@dataclass(frozen=True)
class Stage:
    """A server, a plain client and a room on it."""

    server: EmbeddedServer
    client: Any  # redis.Redis
    settings: Settings
    room: Stillroom

    @property
    def url(self) -> str:
        return self.server.url


@contextmanager
def stage(*, apart: bool = True, **changes: Any) -> Iterator[Stage]:
    """Run an embedded server with a room on it, `apart` on a CPU of its own where there are two.

    `changes`: of the room's settings.
    """
    clear_environment()
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        if apart:
            apart_from(server.pid)
        settings = Settings(**{"redis_url": server.url} | PATIENT | changes)
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            room.stats.due = NEVER  # the commands that ride along every 5 s are not measured
            yield Stage(server, client, settings, room)


def clear_environment() -> None:
    """Drop the settings of whoever runs the bench from the environment."""
    for name in list(os.environ):
        if name.startswith(("STILLROOM_", "REDIS_")):
            del os.environ[name]


def server_cpu_us(client: Any) -> float:
    """Return the CPU µs that the server has taken so far."""
    cpu = client.info("cpu")
    return 1e6 * float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])
