"""When the server refuses a connection every service says so, and none takes the refusal for an answer."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

import redis
from stillroom import (
    AUTH,
    NoDispatch,
    RedisUnavailable,
    SessionStoreUnavailable,
    Settings,
    Stillroom,
)
from stillroom.embedded import EmbeddedServer
from stillroom.errors import FINAL
from tests.support.faces import FACES, open_room

PASSWORD = "canary-5e1f"
PEPPER = "a-pepper-for-tests-long-enough-to-be-one"


class Door(EmbeddedServer):
    """A server with a password, and a user for each refused act."""

    def __init__(self, **given: Any) -> None:
        super().__init__(options={"requirepass": PASSWORD}, **given)

    def url_of(self, user: str = "", password: str = PASSWORD, database: int = 0) -> str:
        return f"redis://{user}:{password}@127.0.0.1:{self.port}/{database}"


def wrong_password(door: Door, admin: Any) -> str:
    return door.url_of(password="canary-wrong")


def no_password(door: Door, admin: Any) -> str:
    return f"redis://127.0.0.1:{door.port}"


def user_is_off(door: Door, admin: Any) -> str:
    admin.acl_setuser("gone", enabled=False, passwords=[f"+{PASSWORD}"], commands=["+@all"])
    return door.url_of("gone")


def no_such_database(door: Door, admin: Any) -> str:
    return door.url_of(database=99)


def may_not_select(door: Door, admin: Any) -> str:
    return door.url_of(user_without(admin, "select"), database=3)


def may_not_time(door: Door, admin: Any) -> str:
    return door.url_of(user_without(admin, "time"))


def a_replica(door: Door, admin: Any) -> str:
    admin.replicaof("127.0.0.1", 1)
    return door.url_of()


def too_many_clients(door: Door, admin: Any) -> str:
    admin.config_set("maxclients", 1)
    return door.url_of()


def user_without(admin: Any, command: str) -> str:
    admin.acl_setuser(
        "app",
        enabled=True,
        passwords=[f"+{PASSWORD}"],
        keys=["*"],
        channels=["*"],
        commands=["+@all", f"-{command}"],
    )
    return "app"


# What stands in the way → the reasons that errors may give. A server that is full closes the connection, and what
# it said before may be lost with it.
REFUSALS: dict[Callable[[Door, Any], str], set[str]] = {
    wrong_password: {"auth"},
    no_password: {"auth"},
    user_is_off: {"auth"},
    no_such_database: {"select"},
    may_not_select: {"select"},
    may_not_time: {"time"},
    a_replica: {"readonly"},
    too_many_clients: {"refused", "closed"},
}
Refused = tuple[str, set[str]]


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    with Door() as door:
        yield door


@pytest.fixture(scope="module")
def token(door: Door) -> str:
    settings = Settings(redis_url=door.url_of(), session_peppers=PEPPER)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        return room.sessions.create("u1").token


@pytest.fixture(params=REFUSALS, ids=lambda refuse: refuse.__name__)
def refused(request: pytest.FixtureRequest, door: Door) -> Iterator[Refused]:
    """Return the URL, and the reasons why it leads nowhere."""
    with redis.Redis(port=door.port, password=PASSWORD) as admin:
        try:
            yield request.param(door, admin), REFUSALS[request.param]
        finally:
            admin.config_set("maxclients", 1_000)
            admin.replicaof("NO", "ONE")
            admin.acl_deluser("app", "gone")


@pytest.fixture(params=["sync", "async"])
def room(request: pytest.FixtureRequest, refused: Refused) -> Iterator[Any]:
    """Open a room whose breaker stays closed, so that each call meets the refusal itself."""
    patient = dict.fromkeys(("connect_timeout", "command_timeout", "call_timeout"), 5.0)
    settings = Settings(
        redis_url=refused[0],
        session_peppers=PEPPER,
        health_timeout=5,
        breaker_failures=100_000,
        breaker_calls=100_000,
        **patient,
    )
    with open_room(request.param, settings, NoDispatch()) as room:
        yield room


def test_the_cache_falls_back(room: Any, refused: Refused) -> None:
    """When connections are refused reads return their default, loads are served, and writes return False."""
    cache = room.cache
    assert cache.get("k", default="d") == "d"
    assert cache.get_entry("k") is None
    assert cache.get_many(["a", "b"]) == {}
    assert cache.get_or_set("k", lambda: 5) == 5
    assert cache.get_or_set_many(["a", "b"], lambda keys: dict.fromkeys(keys, 1)) == {
        "a": 1,
        "b": 1,
    }
    assert cache.set("k", 1) is False
    assert cache.set_many({"a": 1, "b": 2}) == {"a": False, "b": False}
    assert cache.set_many({"a": 1, "b": 2, "c": 3}) == dict.fromkeys("abc", False)


def test_what_must_not_be_lost_raises(room: Any, refused: Refused) -> None:
    """When connections are refused an invalidation, a change and a lock raise with the reason and
    without the password.
    """
    cache = room.cache
    acts: list[Callable[[], Any]] = [
        lambda: cache.invalidate("k"),
        lambda: cache.invalidate_many(["a", "b"]),
        lambda: cache.invalidate_by_tag("t"),
        lambda: cache.invalidate_by_pattern("k*"),
        cache.clear,
        lambda: cache.incr("k"),
        lambda: room.abuse.ban("192.0.2.1", seconds=60),
    ]
    for act in acts:
        with unavailable(refused[1]):
            act()


def test_sessions_never_say_that_somebody_is_logged_out(
    room: Any, refused: Refused, token: str
) -> None:
    """When connections are refused every session call raises, so that nobody is logged out."""
    sessions = room.sessions
    acts: list[Callable[[], Any]] = [
        lambda: sessions.create("u1"),
        lambda: sessions.get(token),
        lambda: sessions.touch(token),
        lambda: sessions.destroy(token),
        lambda: sessions.rotate(token),
        lambda: sessions.list_for_user("u1"),
        lambda: sessions.destroy_for_user("u1"),
    ]
    for act in acts:
        with unavailable(refused[1], SessionStoreUnavailable):
            act()


@pytest.mark.parametrize("face", FACES)
def test_a_user_who_needs_no_password_is_the_one_who_acts(door: Door, face: str) -> None:
    """A user that stands alone in the URL is logged in, as in the broker's connections."""
    with redis.Redis(port=door.port, password=PASSWORD) as admin:
        rights: Any = {"keys": ["*"], "channels": ["*"], "commands": ["+@all"]}
        admin.acl_setuser("app", enabled=True, nopass=True, **rights)
        try:
            settings = Settings(redis_url=f"redis://app@127.0.0.1:{door.port}")
            with open_room(face, settings, NoDispatch()) as room:
                room.connect()
                assert room.cache.set("k", 1)
                assert "app" in {client["user"] for client in admin.client_list()}
        finally:
            admin.acl_deluser("app")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "No password is given: set REDIS_PASSWORD, or the file"),
        ({"redis_password": "canary"}, r"\. Correct REDIS_PASSWORD, or the file"),
        ({"login": ":canary@"}, r"\. Correct user and password in REDIS_URL"),
    ],
)
def test_a_login_is_to_be_set_or_corrected(door: Door, given: dict[str, str], said: str) -> None:
    """Whoever has given no password is told to set one, and whoever has a wrong one to correct it."""
    url = f"redis://{given.get('login', '')}127.0.0.1:{door.port}"
    settings = Settings(redis_url=url, redis_password=given.get("redis_password"))
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        with pytest.raises(RedisUnavailable, match=said) as caught:
            room.connect()
    assert "canary" not in str(caught.value)


def test_limits_are_counted_here(room: Any, refused: Refused) -> None:
    """When connections are refused the process limits from the first check on, and each decision says why."""
    decisions = [room.limits.check("192.0.2.1", [AUTH]) for _ in range(6)]
    assert [bool(one) for one in decisions] == [True] * 5 + [False]
    assert {one.degraded for one in decisions} <= refused[1]
    held = room.limits.reserve("192.0.2.2", [AUTH])
    assert held.decision
    assert held.decision.degraded in refused[1]


def test_health_says_what_is_refused(room: Any, refused: Refused) -> None:
    """When connections are refused the health report has the reason and advice, and raises nothing."""
    report = room.health.check()
    (server,) = report.servers
    assert not server.connection.is_up
    assert server.connection.error in refused[1]
    (away,) = [advice for advice in report.advice if advice.code == "away"]
    assert not away.todo.startswith("Look at")
    assert "canary" not in report.model_dump_json()


def test_who_waits_for_redis_at_the_start_is_told_at_once(
    room: Any, refused: Refused, caplog: pytest.LogCaptureFixture
) -> None:
    """`connect` raises at the first attempt where another cannot help, and names the setting and no password."""
    if not refused[1] <= FINAL:
        pytest.skip("another attempt may mend it")
    with caplog.at_level(logging.WARNING), unavailable(refused[1]) as caught:
        room.connect()
    assert "REDIS_URL" in str(caught[0]) or "REDIS_PASSWORD" in str(caught[0])
    assert "canary" not in caplog.text


@contextmanager
def answers_with(said: bytes) -> Iterator[str]:
    """Yield the URL of a program that says this on each connection, and closes it."""

    def answer() -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as other:
                    other.recv(4096)
                    other.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("said", [b"$-1\r\n", b"*0\r\n", b":5\r\n"])
def test_what_is_no_redis_is_told_as_that(face: str, said: bytes) -> None:
    """A program that speaks the protocol and answers something else is away, and reads fall back."""
    with (
        answers_with(said * 3) as url,
        open_room(face, Settings(redis_url=url), NoDispatch()) as room,
    ):
        assert room.cache.get_or_set("k", lambda: 2) == 2
        with unavailable({"protocol"}):
            room.connect()


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("times", [1, 3])  # it closes before it has answered all, or afterwards
def test_an_error_is_short_and_plain_whatever_a_server_says(face: str, times: int) -> None:
    """An error reply of any length and with control characters is one line in a log, and no more than a page."""
    said = b"-ERR \x1b[31mred " + b"x" * 20_000 + b"\r\n"
    patient = {
        "connect_timeout": 5,
        "command_timeout": 5,
        "call_timeout": 10,
        "connect_attempts": 1,
    }
    with (
        answers_with(said * times) as url,
        open_room(face, Settings(redis_url=url, **patient), NoDispatch()) as room,
        unavailable({"closed", "time"}) as caught,
    ):
        room.connect()
    assert len(str(caught[0])) < 2_000
    assert str(caught[0]).isprintable()


@contextmanager
def unavailable(
    reasons: set[str], kind: type[RedisUnavailable] = RedisUnavailable
) -> Iterator[list[Any]]:
    caught: list[Any] = []
    with pytest.raises(kind) as info:
        yield caught
    caught.append(info.value)
    assert info.value.reason in reasons
    assert "canary" not in str(info.value)
