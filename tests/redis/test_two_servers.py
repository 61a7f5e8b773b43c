"""With two servers the cache is on one, where eviction is allowed, and the state is on the other."""

from __future__ import annotations

from typing import Any

import pytest

import redis
from stillroom import AUTH, NoDispatch, Settings
from stillroom.embedded import EmbeddedServer
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room

IP = "203.0.113.9"


@pytest.mark.parametrize("face", FACES)
def test_each_service_is_on_its_server(
    face: str, server: EmbeddedServer, own_server: EmbeddedServer, client: Any
) -> None:
    """Each service keeps its data and its counts on its own server, and closing the room writes all counts."""
    places = {"redis_url": server.url, "cache_url": own_server.url}
    with open_room(face, Settings(**PATIENT | places), NoDispatch()) as room:
        room.cache.set("k", 1, tags=["t"])
        assert room.cache.get("k") == 1
        for _ in range(6):
            room.limits.check(IP, [AUTH])
        old = room.sessions.create("ann")
        room.sessions.rotate(old, grace=0)
        assert room.sessions.get(old) is None  # a replay: told to abuse, which holds it
        assert room.abuse.report("auth_fail", ip=IP)
        room.health.snapshot()
    with redis.Redis.from_url(own_server.url) as cache:
        assert kinds(cache) == {"{0}", "counts", "stats"}
        assert counted(cache) == {"hits"}
    assert kinds(client) == {
        *("{rl", "{s..}", "abuse", "agreed", "counts", "stats", "health", "limits"),
    }
    assert {"limit_checks", "limit_denials", "sessions_replayed", "abuse_events"} <= counted(client)
    told = [fields[b"kind"] for _, fields in client.xrange("stillroom:abuse")]
    assert sorted(told) == [b"auth_fail", b"denied", b"session_replay"]


def kinds(client: Any) -> set[str]:
    """Return the first parts of all keys, behind the namespace."""
    firsts = {key.decode().split(":")[1] for key in client.keys("*")}
    return {"{s..}" if first.startswith("{s") else first for first in firsts}


def counted(client: Any) -> set[str]:
    return {name.decode() for name in client.hkeys("stillroom:counts")}
