"""Another run of the server answers, with an older state or none: loss is a miss, and nothing old comes back.

Clock, marks and entries are lost together then, and what is left of them fits together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import redis
from stillroom import Stillroom
from stillroom.cache import reclaim
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from tests.conftest import SERVERS, binary_of
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, opening_rooms
from tests.support.proxy import Proxy
from tests.support.sentinels import COPIED_AT_ONCE

Opening = Callable[..., Any]

ACTS: dict[str, Callable[[Any], Any]] = {
    "tag": lambda cache: cache.invalidate_by_tag("t"),
    "pattern": lambda cache: cache.invalidate_by_pattern("k*"),
    "key": lambda cache: cache.invalidate("k"),
    "keys": lambda cache: cache.invalidate_many(["k", "l"]),
    "clear": lambda cache: cache.clear(),
    "set": lambda cache: cache.set("k", "new"),
    "set_many": lambda cache: cache.set_many({"k": "new", "l": 1}),
}


class Places:
    """A server behind an address that stays, and the states it can go through."""

    def __init__(self, binary: str | None, stack: ExitStack) -> None:
        self._binary, self._stack = binary, stack
        self.server = self._started()
        self.proxy = stack.enter_context(Proxy(self.server.port))

    def _started(self) -> EmbeddedServer:
        return self._stack.enter_context(
            EmbeddedServer(binary=self._binary, options=COPIED_AT_ONCE)
        )

    def keep(self, how: str) -> None:
        """Keep the current state as the one that will come back."""
        if how == "snapshot":
            with redis.Redis.from_url(self.server.url) as client:
                client.save()
        elif how in ("replica", "first server", "same primary"):
            self._replica = self._started()
            with (
                redis.Redis.from_url(self._replica.url) as client,
                redis.Redis.from_url(self.server.url) as master,
            ):
                client.execute_command("REPLICAOF", "127.0.0.1", self.server.port)
                assert until(lambda: bool(master.wait(1, 100)), 10.0)
                client.execute_command("REPLICAOF", "NO", "ONE")
                if how == "first server":  # it is to follow the other one, and never reaches it
                    master.execute_command("REPLICAOF", "127.0.0.1", 1)
                if how != "replica":
                    self.proxy.lead_to(self._replica.port)

    def come_back(self, how: str) -> None:
        """Stop the server and start another run of it under its address."""
        if how == "first server":
            with redis.Redis.from_url(self.server.url) as master:
                master.execute_command("REPLICAOF", "NO", "ONE")
            self.proxy.lead_to(self.server.port)
        elif how == "same primary":
            self.proxy.lead_to(self.server.port)
        elif how == "snapshot":
            self.server.kill()
            self.server.restart()
        else:
            self.proxy.lead_to((self._replica if how == "replica" else self._started()).port)


@pytest.fixture(params=SERVERS)
def places(request: pytest.FixtureRequest) -> Iterator[Places]:
    with ExitStack() as stack:
        yield Places(binary_of(request), stack)


@pytest.fixture
def opened(places: Places) -> Iterator[Opening]:
    with opening_rooms(**{"redis_url": places.proxy.url} | PATIENT) as make:
        yield make


@pytest.mark.any_server
@pytest.mark.parametrize("how", ["snapshot", "replica", "first server", "empty"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_nothing_that_was_invalidated_comes_back(
    places: Places, opened: Opening, how: str, act: str, shards: int
) -> None:
    """No invalidated value comes back, in the process that invalidated, one that knew, or a new one,
    with either face.
    """
    actor, reader, other = (opened(face, shards=shards) for face in ("sync", "async", "sync"))
    actor.cache.set_many({"k": "old", "l": "old"}, tags=["t"], ttl=3_600)
    assert reader.cache.get("k") == other.cache.get("k") == "old"
    places.keep(how)
    ACTS[act](actor.cache)
    assert reader.cache.get("k") in (None, "new")
    places.come_back(how)
    for room in (
        other,
        reader,
        actor,
        opened("sync", shards=shards),
        opened("async", shards=shards),
    ):
        assert room.cache.get("k") != "old"
        assert "old" not in room.cache.get_many(["k"]).values()
    assert actor.cache.set("k", "newer", ttl=3_600)
    assert reader.cache.get("k") == other.cache.get("k") == "newer"


@pytest.mark.parametrize("act", ACTS)
def test_who_has_seen_another_primary_tells_the_one_that_does_not_know_of_it(
    places: Places, opened: Opening, act: str
) -> None:
    """A primary that has not heard of another one in between is told by who has read there: its cache is cold."""
    actor, other = opened(), opened("async")
    actor.cache.set_many({"k": "old", "l": "old"}, tags=["t"], ttl=3_600)
    assert other.cache.get("k") == "old"
    places.keep("same primary")
    assert actor.cache.set("m", 1)
    assert actor.cache.get("m") == 1
    ACTS[act](actor.cache)
    places.come_back("same primary")
    assert actor.cache.get("k") != "old"
    assert other.cache.get("k") != "old"


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("act", ["set", "set_many", "add", "get_or_set"])
def test_what_is_stored_at_the_first_call_after_it_is_kept(
    places: Places, opened: Opening, face: str, act: str
) -> None:
    """The call that finds the other run stores its value into the new epoch, so that it is kept."""
    app, other = opened(face), opened()
    app.cache.set("k", "old", ttl=3_600)
    other.cache.get("k")
    places.keep("snapshot")
    app.cache.invalidate("k")
    places.come_back("snapshot")
    acts: dict[str, Callable[[], Any]] = {
        "set": lambda: app.cache.set("n", 1),
        "set_many": lambda: all(app.cache.set_many({"n": 1}).values()),
        "add": lambda: app.cache.add("n", 1),
        "get_or_set": lambda: app.cache.get_or_set("n", lambda: 1),
    }
    assert acts[act]()
    assert other.cache.get("n") == app.cache.get("n") == 1


def test_a_load_that_began_before_is_not_stored_behind_it(places: Places, opened: Opening) -> None:
    """A load that began in the ended epoch is not stored, because it may be older than a lost invalidation."""
    app, other = opened(), opened()

    def load() -> str:
        places.keep("snapshot")
        other.cache.invalidate("k")
        places.come_back("snapshot")
        other.cache.get("k")
        return "old"

    assert app.cache.get_or_set("k", load, ttl=3_600) == "old"
    assert other.cache.get("k") is None


def test_the_memory_of_what_was_there_before_is_freed(places: Places, opened: Opening) -> None:
    """The call that finds the other run leaves a sweep to do, which deletes the entries of the ended epoch."""
    app = opened()
    app.cache.set_many({"k": "old", "l": "old"}, ttl=3_600)
    places.keep("snapshot")
    places.come_back("snapshot")
    assert app.cache.get("k") is None
    assert app.cache.reclaim()["deleted"] == 2


def test_counters_and_locks_of_before_are_gone(places: Places, opened: Opening) -> None:
    """A counter from before is no counter: incr finds nothing, and add stores."""
    app = opened()
    app.cache.set("n", 1)
    places.keep("snapshot")
    assert app.cache.incr("n") == 2
    places.come_back("snapshot")
    assert app.cache.incr("n") is None
    assert app.cache.touch("n") is False
    assert app.cache.add("n", 10)


@pytest.mark.parametrize("how", ["replica", "snapshot"])
def test_a_sweep_that_meets_another_run_drops_no_pattern(
    places: Places, opened: Opening, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A sweep that meets another run does not go on with its cursor, so that entries it missed stay dead."""
    monkeypatch.setattr(reclaim, "SAVE_EVERY_S", 0.0)  # it tells after each bite
    limits = {"lease": 0.2, "refresh_lease": 0.2, "lease_limit": 0.2}
    app, worker = opened(**limits), opened(**limits)
    count = 1_500
    names = [f"p:{n}" for n in range(count)]
    app.cache.set_many(dict.fromkeys(names, "old"), ttl=3_600)
    app.cache.invalidate_by_pattern("p:*")
    half = threading.Event()

    def told(state: Any) -> None:
        if state.seen > 300 and not half.is_set():
            half.set()
            places.keep(how)
            places.come_back(how)

    report = worker.cache.reclaim(budget=30, progress=told)
    assert half.is_set()
    assert report["patterns_dropped"] == 0 or report["seen"] >= count
    assert opened().cache.get_many(names) == {}
    assert app.cache.get_many(names) == {}


def test_an_invalidation_that_was_deferred_is_delivered_to_the_other_run(
    places: Places, opened: Opening
) -> None:
    """A deferred invalidation is delivered to the other run, whose older state is no newer."""
    app, other = opened(connect_timeout=0.3, command_timeout=0.3, call_timeout=0.5), opened()
    app.cache.set("k", "old", tags=["t"], ttl=3_600)
    places.keep("snapshot")
    places.server.kill()
    app.cache.invalidate_by_tag("t", defer=True)
    places.server.restart()
    assert until(lambda: app.cache.deferred == 0 or app.cache.get("x") is not None, 10.0)
    assert other.cache.get("k") is None
    assert isinstance(app, Stillroom)
