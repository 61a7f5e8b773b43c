"""A write that too few replicas have in time is done, also where the server is late with saying so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

import redis
from stillroom import NoDispatch, Settings
from stillroom.embedded import EmbeddedServer
from tests.support.faces import open_room

TRIES = 6  # more than the breaker takes


@pytest.fixture(params=["sync", "async"])
def room(request: pytest.FixtureRequest, own_server: EmbeddedServer) -> Iterator[Any]:
    """Open a room that wants a replica of a server without one, which looks once a second whether WAIT is over."""
    with closing(redis.Redis.from_url(own_server.url)) as client:
        client.config_set("hz", 1)
    settings = Settings(
        redis_url=own_server.url,
        session_peppers="p" * 32,
        replicas=1,
        connect_timeout=2.0,
        command_timeout=0.4,
        call_timeout=2.0,
    )
    with open_room(request.param, settings, NoDispatch()) as opened:
        yield opened


def test_a_write_without_a_replica_is_done(room: Any) -> None:
    """Orders, invalidations and logouts that no replica confirms raise nothing, also where WAIT is late."""
    session = room.sessions.create("ann", {})
    room.tasks.invalidate_tags("tag")
    room.sessions.destroy(session.token)
    assert room.sessions.get(session.token) is None
    room.cache.set("k", 1, ttl=60, tags=["t"])
    room.cache.invalidate_by_tag("t")
    assert room.cache.get("k") is None


def test_a_late_wait_is_no_outage(room: Any, own_server: EmbeddedServer) -> None:
    """Writes that no replica confirms are counted, and do not open the breaker of a server that is well."""
    with room.request() as request:
        request.left = 60.0
        for n in range(TRIES):
            room.tasks.invalidate_tags(f"tag{n}")
        assert request.unconfirmed == TRIES
    (server,) = room.health.check().servers
    assert server.connection.breaker == "closed"
    with closing(redis.Redis.from_url(own_server.url)) as client:
        assert client.zcard(room.keys.orders) == TRIES
