"""Running processes find the primary when they talk to a server that is not it any more, or not yet."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import redis
from stillroom import AUTH
from stillroom.embedded import EmbeddedServer
from stillroom.wire.server import LOOK_EVERY_S
from tests.support.celery_process import until
from tests.support.faces import FACES, opening_rooms
from tests.support.full_disk import want_replicas
from tests.support.proxy import Proxy
from tests.support.sentinels import COPIED_AT_ONCE

PATIENT = {"connect_timeout": 2, "command_timeout": 2, "call_timeout": 3}
NOTICES_S = 4.0  # who only reads asks every other second who answers


@pytest.fixture(params=FACES)
def open_here(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    with opening_rooms(session_peppers="p" * 40, **PATIENT) as make:
        yield lambda url, **changes: make(request.param, redis_url=url, **changes)


class Pair:
    """A primary and its replica behind one address that leads to the primary: a name, a Service, a proxy."""

    def __init__(self, stack: ExitStack) -> None:
        self.old, self.new = (
            stack.enter_context(EmbeddedServer(options=COPIED_AT_ONCE)) for _ in range(2)
        )
        self._clients = [
            stack.enter_context(redis.Redis.from_url(one.url)) for one in (self.old, self.new)
        ]
        self.address = stack.enter_context(Proxy(self.old.port))
        self._follows(1, self.old)

    def fail_over(self) -> None:
        """Let the address lead to the new primary; connections to the old one, a replica now, stay open."""
        self._clients[1].replicaof("NO", "ONE")
        self.address.lead_new_ones_to(self.new.port)
        self._follows(0, self.new)

    def cut_off(self) -> None:
        """Let the address lead to the new primary; the old one is still a primary, and wants a replica."""
        self._clients[1].replicaof("NO", "ONE")
        self.address.lead_new_ones_to(self.new.port)
        want_replicas(self.old)

    def _follows(self, who: int, primary: EmbeddedServer) -> None:
        client = self._clients[who]
        client.replicaof("127.0.0.1", primary.port)
        until(lambda: client.info("replication")["master_link_status"] == "up", "the copy")


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack)


def test_the_first_write_after_a_failover_is_done(pair: Pair, open_here: Any) -> None:
    """The first write after a failover is refused by the replica and done by the new primary in the same call."""
    room = open_here(pair.address.url)
    assert room.cache.set("before", 1, tags=["t"])
    session = room.sessions.create("u1")
    held = room.limits.reserve("192.0.2.1", [AUTH])
    pair.fail_over()
    assert room.cache.set("after", 1)
    room.cache.invalidate_by_tag("t")
    assert room.cache.get("before") is None
    assert room.sessions.get(room.sessions.rotate(session)) is not None
    assert room.limits.refund(held)
    assert not room.limits.check("192.0.2.1", [AUTH]).degraded
    assert not room.wire.breaker.is_open


def test_a_primary_that_was_cut_off_is_left_at_the_first_write(pair: Pair, open_here: Any) -> None:
    """A primary that wants a replica refuses the first write, and the new primary does it in the same call."""
    room = open_here(pair.address.url)
    assert room.cache.set("before", 1)
    pair.cut_off()
    assert room.cache.set("after", 1)


def test_a_primary_without_replicas_is_read_on_the_connections_there_are(
    own_server: EmbeddedServer, open_here: Any
) -> None:
    """Where no other primary is found, one is looked for now and then, and no outage begins."""
    room = open_here(own_server.url)
    assert room.cache.set("k", 1)
    want_replicas(own_server)
    began, generation = time.monotonic(), room.wire.server.generation
    for _ in range(20):
        assert not room.cache.set("l", 1)
        assert room.cache.get("k") == 1
    assert room.wire.server.generation - generation <= 1 + (time.monotonic() - began) / LOOK_EVERY_S
    assert not room.wire.breaker.is_open


@pytest.mark.parametrize("first", ["invalidate", "tag", "session", "limit", "lock", "load"])
def test_whatever_is_asked_first_is_done_by_the_new_primary(
    pair: Pair, open_here: Any, first: str
) -> None:
    """An invalidation, a login, a check and a load each find the new primary by themselves."""
    room = open_here(pair.address.url)
    assert room.cache.set("k", 1, tags=["t"])
    room.sessions.create("u1")
    room.limits.check("192.0.2.1", [AUTH])
    pair.fail_over()
    acts: dict[str, Callable[[], Any]] = {
        "invalidate": lambda: room.cache.invalidate("k") == 1,
        "tag": lambda: room.cache.invalidate_by_tag("t") is None,
        "session": lambda: room.sessions.create("u2"),
        "limit": lambda: not room.limits.check("192.0.2.1", [AUTH]).degraded,
        "lock": lambda: room.abuse.ban("8.8.8.8", seconds=60),
        "load": lambda: room.cache.get_or_set("new", lambda: 2) == 2,
    }
    assert acts[first]()
    with redis.Redis.from_url(pair.new.url) as new:
        assert new.info("replication")["role"] == "master"


def test_who_only_reads_notices_within_seconds(pair: Pair, open_here: Any) -> None:
    """A process that only reads asks now and then which server answers, and leaves a replica within seconds."""
    room, writer = open_here(pair.address.url), open_here(pair.address.url)
    assert writer.cache.set("k", "before")
    assert room.cache.get("k") == "before"
    pair.fail_over()
    assert writer.cache.set("k", "after")
    generation = room.wire.server.generation
    began = time.monotonic()
    until(lambda: (room.cache.get("k"), room.wire.server.generation > generation)[1], "notice", 10)
    assert time.monotonic() - began < NOTICES_S
    assert room.cache.get("k") == "after"


def test_a_server_that_loads_its_data_is_away_until_it_has_them(open_here: Any) -> None:
    """A loading server counts as away: reads fall back, writes are not confirmed, and no restart is needed."""
    options = {
        "enable-debug-command": "yes",
        "key-load-delay": "1000",
        "loading-process-events-interval-bytes": "1024",
    }
    with EmbeddedServer(options=options) as server:
        with redis.Redis.from_url(server.url) as client:
            client.mset({f"k{n}": os.urandom(100) for n in range(2_000)})
        room = open_here(server.url)
        assert room.cache.set("k", 1)
        reloading = threading.Thread(target=_reload, args=(server,))
        reloading.start()
        until(lambda: room.cache.set("k", 2) is False, "LOADING")
        assert room.cache.get("k", default="d") == "d"
        assert room.cache.get_or_set("k", lambda: 3) == 3
        assert room.limits.check("192.0.2.1", [AUTH])
        reloading.join()
        until(lambda: room.cache.set("k", 4), "recovery")
        assert room.cache.get("k") == 4


def _reload(server: EmbeddedServer) -> None:
    with redis.Redis.from_url(server.url, socket_timeout=60) as client:
        client.execute_command("DEBUG", "RELOAD")


def test_a_restart_with_an_older_state_is_a_cold_cache(open_here: Any) -> None:
    """After a restart with an older state no entry is served, because an invalidation may be lost."""
    with EmbeddedServer() as server:
        room = open_here(server.url)
        assert room.cache.set("k", "old", tags=["t"])
        with redis.Redis.from_url(server.url) as client:
            client.save()
            room.cache.invalidate_by_tag("t")
            client.set("kept", "no")
        server.kill()
        server.restart()
        until(lambda: room.cache.set("another", 1), "recovery")
        with redis.Redis.from_url(server.url) as client:
            assert client.exists(room.keys.entry(b"k"))
            assert not client.exists("kept")
        assert room.cache.get("k") is None
