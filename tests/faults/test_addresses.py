"""All addresses of one name share the time of one call."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from stillroom import NoDispatch, RedisUnavailable, Settings
from stillroom.embedded import EmbeddedServer
from tests.support.faces import FACES, open_room
from tests.support.lag import least, seconds_of

CALL = 0.25  # the most one call may take, seconds
NAME = "redis.internal"


class Silent:
    """An address on which no connection comes about and none is refused, as behind a firewall."""

    def __init__(self, host: str, port: int = 0) -> None:
        self._sockets = [socket.socket()]
        self._sockets[0].bind((host, port))
        self._sockets[0].listen(0)
        self.address = self._sockets[0].getsockname()
        for _ in range(4):  # more than its queue holds
            waiting = socket.socket()
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(self.address)
            self._sockets.append(waiting)

    def close(self) -> None:
        for one in self._sockets:
            one.close()


@pytest.fixture
def silent(own_server: EmbeddedServer) -> Iterator[list[str]]:
    """Return nine silent addresses with the server's port."""
    hosts = [f"127.0.0.{n}" for n in range(2, 11)]
    sockets = [Silent(host, own_server.port) for host in hosts]
    yield hosts
    for one in sockets:
        one.close()


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets which addresses the name has, in which order."""
    addresses: list[str] = []
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host not in (NAME, NAME.encode()):
            return look_up(host, port, *args, **options)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (one, int(port or 0)))
            for one in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return addresses.extend


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_addresses_that_do_not_answer_share_one_deadline(
    face: str, own_server: EmbeddedServer, silent: list[str], resolves: Any, count: int
) -> None:
    """Any number of silent addresses share one deadline: reads fall back and invalidations raise in time."""
    resolves(silent[:count])
    settings = Settings(
        redis_url=f"redis://{NAME}:{own_server.port}", breaker_failures=1_000, breaker_calls=1_000
    )
    with open_room(face, settings, NoDispatch()) as room:

        def read() -> None:
            assert room.cache.get("k") is None

        def invalidate() -> None:
            with pytest.raises(RedisUnavailable):
                room.cache.invalidate_by_tag("t")

        for call in (read, read, invalidate):
            assert least(partial(seconds_of, call), CALL) < CALL


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("before", [0, 1])
def test_an_address_that_answers_is_found_in_the_same_call(
    face: str, own_server: EmbeddedServer, silent: list[str], resolves: Any, before: int
) -> None:
    """An address behind a silent one is found in the same call, as with `localhost`, whose first is often dead."""
    resolves([*silent[:before], "127.0.0.1"])
    patience = {"connect_timeout": 2.0, "command_timeout": 2.0, "call_timeout": 4.0}
    settings = Settings(redis_url=f"redis://{NAME}:{own_server.port}", **patience)
    with open_room(face, settings, NoDispatch()) as room:
        room.cache.set("k", 1)
        assert room.cache.get("k") == 1
