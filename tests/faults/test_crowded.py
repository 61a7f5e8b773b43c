"""A server that has as many clients as it may goes on serving the ones that it has, and takes them back later."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import redis
from stillroom import AsyncStillroom, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.conftest import SERVERS, binary_of
from tests.support.crowd import PATIENT
from tests.support.faces import FACES

CALLERS = 10
PLACES = 3  # for connections of the room


@pytest.fixture(params=SERVERS)
def crowded(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """Start a server with room for three clients besides the test's own."""
    with EmbeddedServer(binary=binary_of(request)) as server, client_of(server) as admin:
        admin.ping()
        admin.config_set("maxclients", PLACES + len(admin.client_list()))
        yield server


def client_of(server: EmbeddedServer) -> Any:
    return redis.Redis.from_url(server.url, protocol=2)


def settings_of(server: EmbeddedServer) -> Settings:
    return Settings(redis_url=server.url, **PATIENT, breaker_failures=1, probe_delay=0.01)


def in_threads(room: Stillroom, rounds: int) -> list[bool]:
    """Return what each call returns, of as many callers at once as the server has no room for."""
    at_once = threading.Barrier(CALLERS)

    def call(number: int) -> list[bool]:
        results = []
        for _ in range(rounds):
            at_once.wait(10)
            results.append(room.cache.set(f"k{number}", 1))
        return results

    with ThreadPoolExecutor(CALLERS) as pool:
        return [result for results in pool.map(call, range(CALLERS)) for result in results]


async def in_tasks(room: AsyncStillroom, rounds: int) -> list[bool]:
    """Return what `in_threads` returns, of tasks."""
    results: list[bool] = []
    for _ in range(rounds):
        calls = [room.cache.set(f"k{number}", 1) for number in range(CALLERS)]
        results += await asyncio.gather(*calls)
    return results


@pytest.mark.parametrize("face", FACES)
def test_callers_share_the_connections_that_a_full_server_has_let_in(
    crowded: EmbeddedServer, face: str
) -> None:
    """Whoever is turned away waits for a connection of this process, and no breaker opens."""
    settings = settings_of(crowded)
    if face == "sync":
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            assert in_threads(room, 5) == [True] * 5 * CALLERS
            assert not room.wire.breaker.is_open
        return

    async def crowd() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            assert await in_tasks(room, 5) == [True] * 5 * CALLERS
            assert not room.wire.breaker.is_open

    asyncio.run(crowd())


@pytest.mark.parametrize("face", FACES)
def test_idle_connections_do_not_keep_the_prober_out(crowded: EmbeddedServer, face: str) -> None:
    """A process that fills the server with its own idle connections closes them when its probe finds no room."""
    settings = settings_of(crowded)
    if face == "sync":
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            room.cache.set("k", 1)
            in_threads(room, 3)
            back = opened(room)
            assert back.wait(10)
            assert room.cache.get("k") == 1
        return

    async def recover() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            await room.cache.set("k", 1)
            await in_tasks(room, 3)
            back = opened(room)
            assert await asyncio.to_thread(back.wait, 10)
            assert await room.cache.get("k") == 1

    asyncio.run(recover())


def opened(room: Any) -> threading.Event:
    """Open the breaker of a room whose connections fill the server. Return what is set when it is closed again."""
    assert room.wire.connections == PLACES
    back = threading.Event()
    room.wire.breaker.recovered.append(back.set)
    room.wire.breaker.failed(RedisUnavailable("timeout"))
    assert room.wire.breaker.is_open
    return back
