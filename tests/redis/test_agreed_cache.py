"""Settings of the cache that processes must have alike: a difference is found before it breaks a promise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import redis
from stillroom import Settings, Stillroom, agreed
from stillroom.embedded import EmbeddedServer
from stillroom.errors import RedisUnavailable, SettingsDiffer
from tests.conftest import SERVERS, binary_of
from tests.support.clocked import ClockedServer
from tests.support.crowd import PATIENT
from tests.support.entries import Recording
from tests.support.faces import FACES, opening_rooms

LIMITS = {"lease": 0.2, "refresh_lease": 0.2, "lease_limit": 0.2}


@pytest.fixture
def open_one(server: EmbeddedServer) -> Iterator[Any]:
    """Open a process with either face."""
    with opening_rooms(**{"redis_url": server.url} | PATIENT) as make:
        yield make


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(("first", "second"), [(1, 4), (4, 1), (4, 5)])
def test_two_numbers_of_shards_are_not_one_cache(
    open_one: Any, face: str, first: int, second: int
) -> None:
    """A process with another number of shards is told so.

    It reads and writes nothing; its invalidations raise, and so does who asks it why a key was a miss.
    """
    one, two = open_one(face, shards=first), open_one(face, shards=second)
    assert one.cache.set("k", "v", tags=["t"])
    assert two.cache.get("k") is None
    assert two.cache.set("k", "other") is False
    assert two.cache.set_many({"k": 1}) == {"k": False}
    assert two.cache.add("n", 1) is False
    assert two.cache.get_or_set("k", lambda: "loaded") == "loaded"
    acts = [
        lambda: two.cache.invalidate("k"),
        lambda: two.cache.invalidate_many(["k"]),
        lambda: two.cache.invalidate_by_tag("t"),
        lambda: two.cache.invalidate_by_pattern("*"),
        two.cache.clear,
        lambda: two.cache.invalidate("k", defer=True),
        lambda: two.upkeep.explain("k"),
    ]
    for act in acts:
        with pytest.raises(SettingsDiffer, match="STILLROOM_SHARDS") as raised:
            act()
        assert isinstance(raised.value, RedisUnavailable)
    assert one.cache.get("k") == "v"


def test_going_to_another_number_and_back_revives_nothing(
    open_one: Any, server: EmbeddedServer
) -> None:
    """A key that a release with four shards invalidated stays invalidated after a rollback to the old number."""
    before = open_one(shards=1)
    before.cache.set("k", "v1", ttl=3_600)
    _agree_anew(server)
    release = open_one(shards=4)
    release.cache.set("k", "v2", ttl=3_600)
    release.cache.invalidate("k")
    assert release.cache.get("k") is None
    _agree_anew(server)
    rolled_back = open_one(shards=1)
    assert rolled_back.cache.get("k") is None
    assert rolled_back.cache.set("k", "v3")
    _agree_anew(server)
    assert open_one(shards=4).cache.get("k") is None


def _agree_anew(server: EmbeddedServer) -> None:
    """Drop all agreements, as an operator's DEL or a server that lost its data does."""
    with redis.Redis.from_url(server.url) as client:
        client.delete("stillroom:agreed")


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("order", ["app first", "worker first", "nothing is agreed"])
def test_no_load_outlives_a_pattern_that_was_dropped_behind_it(face: str, order: str) -> None:
    """The app's leases are longer than the worker's own: what it loaded before a pattern is not stored after it.

    A worker that asked first does not know of the longer ones; then the script that stores looks how far patterns
    were dropped.
    """
    with (
        ClockedServer() as server,
        opening_rooms(**{"redis_url": server.url} | PATIENT) as make,
    ):
        app, worker = make(face, lease=30.0, lease_limit=30.0), make(**LIMITS)
        for room in (app, worker) if order == "app first" else (worker, app):
            room.cache.set("x", 1)
        if order == "nothing is agreed":
            _agree_anew(server)

        def load() -> str:
            worker.cache.invalidate_by_pattern("k*")
            server.set_clock(5)
            worker.cache.reclaim(budget=5)
            return "old"

        assert app.cache.get_or_set("k", load, ttl=600) == "old"
        with redis.Redis.from_url(server.url) as client:
            has_dropped = not client.zrange(app.keys.globs, 0, -1)
        assert has_dropped == (order != "app first")
        assert make().cache.get("k") is None
        assert app.cache.get("k") is None


@pytest.mark.parametrize("face", FACES)
def test_a_server_that_was_emptied_lets_nobody_differ_for_long(
    open_one: Any, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, face: str
) -> None:
    """A process that agreed before its server was emptied compares once more.

    So it is told of another number of shards, and does not believe that all readers obey its invalidations.
    """
    monkeypatch.setattr(agreed, "COMPARED_S", 0.0)
    one, two = open_one(face, shards=1), open_one(face, shards=4)
    assert one.cache.set("k", "v")
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    assert two.cache.set_many({f"k:{n}": n for n in range(20)}, tags=["t"])
    with pytest.raises(SettingsDiffer, match="STILLROOM_SHARDS"):
        one.cache.invalidate_by_tag("t")
    assert one.cache.set("k", "v") is False
    assert two.cache.get("k:7") == 7


def test_one_call_of_a_process_compares_for_all(
    open_one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one call compares the settings once more, the others go on with what is known."""
    monkeypatch.setattr(agreed, "COMPARED_S", 0.0)
    one = open_one()
    assert one.cache.set("k", "v")
    assert one.agreed.is_due
    next(one.agreed.compare())
    assert not one.agreed.is_due


@pytest.mark.parametrize("binary", SERVERS, indirect=True)
def test_the_state_and_the_cache_may_be_lost_apart(binary: str | None) -> None:
    """Agreements live on the state's server.

    When it loses them, the cache on another number of shards is not trusted.
    """
    with EmbeddedServer(binary=binary) as state, EmbeddedServer(binary=binary) as cache:
        places = {"redis_url": state.url, "cache_url": cache.url} | PATIENT
        with Stillroom(Settings(**places, shards=4), dispatch=Recording()) as one:
            one.cache.set_many({f"k:{n}": "old" for n in range(20)}, ttl=3_600)
        with redis.Redis.from_url(state.url) as client:
            client.flushall()
        with Stillroom(Settings(**places, shards=3), dispatch=Recording()) as two:
            assert two.cache.get_many([f"k:{n}" for n in range(20)]) == {}
            two.cache.invalidate_by_pattern("k:*")
        with redis.Redis.from_url(state.url) as client:
            client.flushall()
        with Stillroom(Settings(**places, shards=4), dispatch=Recording()) as again:
            assert again.cache.get_many([f"k:{n}" for n in range(20)]) == {}


@pytest.fixture
def binary(request: pytest.FixtureRequest) -> str | None:
    return binary_of(request)
