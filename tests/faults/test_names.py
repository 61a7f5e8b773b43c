"""A name server that hangs or has no answer costs a call no more than its deadline."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import redis
from stillroom import AsyncStillroom, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import until
from tests.support.faces import FACES, open_room
from tests.support.lag import least, seconds_of

CALL_S = 0.25
HOST = "cache.test"
_real = socket.getaddrinfo


class NameServer:
    """A name server that knows one name, and can hang, be away, or forget it."""

    def __init__(self) -> None:
        self.address: str | None = "127.0.0.1"
        self.is_away = False
        self.failure: Exception | None = None
        self.asked = 0
        self._answers = threading.Event()
        self._answers.set()

    def hang(self) -> None:
        self._answers.clear()

    def answer(self) -> None:
        self._answers.set()

    def look_up(self, host: Any, *rest: Any, **options: Any) -> Any:
        if host != HOST:
            return _real(host, *rest, **options)
        self.asked += 1
        self._answers.wait()
        if self.failure is not None:
            raise self.failure
        if self.is_away:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if self.address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return _real(self.address, *rest, **options)


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    made = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", made.look_up)
    monkeypatch.setattr("stillroom.wire.names.NAMES._worked", {})
    yield made
    made.answer()


@pytest.fixture(params=FACES)
def room(
    request: pytest.FixtureRequest, name_server: NameServer, own_server: EmbeddedServer
) -> Iterator[Any]:
    url = f"redis://{HOST}:{own_server.port}"
    settings = Settings(
        redis_url=url, connect_attempts=1, breaker_failures=1_000, breaker_calls=1_000
    )
    with open_room(request.param, settings, NoDispatch()) as room:
        yield room


def drop_connections(server: EmbeddedServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.client_kill_filter(skipme=True, _type="normal")


def check_default(room: Any) -> None:
    assert room.cache.get("k", default="d") == "d"


def test_a_name_server_that_hangs_costs_one_deadline(room: Any, name_server: NameServer) -> None:
    """When the name server hangs on an unknown name the call falls back in time and works once it answered."""
    name_server.hang()

    def read() -> float:
        return seconds_of(lambda: check_default(room))

    for _ in range(3):
        assert least(read, CALL_S) < CALL_S
    assert name_server.asked == 1  # one question at a time, whoever waits for it
    name_server.answer()
    until(lambda: room.cache.set("k", 1), "recovery")


def test_the_last_good_address_is_used_meanwhile(
    room: Any, name_server: NameServer, own_server: EmbeddedServer
) -> None:
    """When a connection is lost while the name server hangs, the last good address is used."""
    assert room.cache.set("k", 1)
    name_server.hang()
    drop_connections(own_server)
    until(lambda: room.cache.get("k") == 1, "an answer", 1)
    name_server.is_away = True
    name_server.answer()
    drop_connections(own_server)
    until(lambda: room.cache.get("k") == 1, "an answer", 1)


def test_a_name_that_leads_elsewhere_now_is_followed(
    room: Any, name_server: NameServer, own_server: EmbeddedServer
) -> None:
    """Each new connection resolves the name again, so that a changed address is followed."""
    assert room.cache.set("k", 1)
    name_server.address = "127.0.0.3"  # nobody listens there
    drop_connections(own_server)
    until(lambda: room.cache.get("k") is None, "the new address")
    name_server.address = "127.0.0.1"
    until(lambda: room.cache.get("k") == 1, "recovery")


def test_a_name_that_is_unknown_is_told_as_that(room: Any, name_server: NameServer) -> None:
    """An unknown name raises an error that names its setting."""
    name_server.address = None
    with pytest.raises(RedisUnavailable, match=r"\(name\).*REDIS_URL.*no address"):
        room.connect()


def test_a_url_that_nobody_has_set_is_told(
    name_server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where REDIS_URL is not set, the error says so, and which address is used in its place."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setattr("tests.faults.test_names.HOST", "redis")
    name_server.address = None
    with (
        Stillroom(dispatch=NoDispatch()) as room,
        pytest.raises(RedisUnavailable, match="REDIS_URL is not set, so it is redis://redis:6379"),
    ):
        room.cache.invalidate("k")


@pytest.mark.parametrize("failure", [MemoryError(), ValueError("embedded null character")])
def test_a_lookup_that_fails_in_whatever_way_is_not_the_last(
    room: Any, name_server: NameServer, failure: Exception
) -> None:
    """A lookup that ends with an unexpected error keeps no later call waiting: the name is looked up again."""
    name_server.failure = failure
    assert room.cache.get("k", default="d") == "d"
    name_server.failure = None
    until(lambda: room.cache.set("k", 1), "recovery")


def test_an_event_loop_that_ends_does_not_wait_for_the_name_server(
    name_server: NameServer, own_server: EmbeddedServer
) -> None:
    """asyncio.run ends without waiting for the name server, because lookups use threads of their own."""
    settings = Settings(redis_url=f"redis://{HOST}:{own_server.port}")
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    name_server.hang()
    began = time.monotonic()
    assert asyncio.run(room.cache.get("k", default="d")) == "d"
    assert time.monotonic() - began < 1
