"""While Redis is away a session is never reported as ended, and a deferred end is not forgotten."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

import redis
from stillroom import (
    Limit,
    NoDispatch,
    SessionStoreUnavailable,
    Settings,
    Stillroom,
)
from stillroom.embedded import EmbeddedServer
from stillroom.sessions import asking
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room
from tests.support.full_disk import REFUSALS, refuse_writes, take_writes
from tests.support.processes import Program
from tests.support.proxy import Proxy

PEPPER = "a-pepper-for-tests-long-enough-to-be-one"


def impatient(url: str) -> Settings:
    patience = {"connect_timeout": 1, "command_timeout": 1, "call_timeout": 1.5}
    return Settings(redis_url=url, session_peppers=PEPPER, **patience)


@pytest.fixture(params=["sync", "async"])
def own_room(request: pytest.FixtureRequest, own_server: EmbeddedServer) -> Iterator[Any]:
    settings = impatient(own_server.url)
    with open_room(request.param, settings, NoDispatch()) as room:
        yield room


def other(server: EmbeddedServer) -> Stillroom:
    settings = Settings(**PATIENT | {"redis_url": server.url, "session_peppers": PEPPER})
    return Stillroom(settings, dispatch=NoDispatch())


def test_nobody_is_logged_out_because_redis_is_away(
    own_room: Any, own_server: EmbeddedServer
) -> None:
    """When Redis is away every session call raises quickly, and the session is there when Redis is back."""
    session = own_room.sessions.create("u1", {"a": 1})
    own_server.kill()
    sessions = own_room.sessions
    for _ in range(3):
        for act in (
            lambda: sessions.create("u1"),
            lambda: sessions.get(session),
            lambda: sessions.update(session, {"a": 2}),
            lambda: sessions.mutate(session, lambda data: data),
            lambda: sessions.touch(session),
            lambda: sessions.rotate(session),
            lambda: sessions.destroy(session),
            lambda: sessions.list_for_user("u1"),
            lambda: sessions.destroy_for_user("u1"),
            lambda: sessions.destroy_by_tag("t"),
            lambda: sessions.end("u1", session.handle),
            sessions.count,
            sessions.sweep,
        ):
            with pytest.raises(SessionStoreUnavailable) as caught:
                act()
            assert session.token not in repr(caught.value)
    assert sessions.get("no token") is None
    own_server.restart()
    until(lambda: not own_room.wire.breaker.is_open, "recovery")
    assert sessions.get(session).data == {"a": 1}


def test_a_deferred_end_is_delivered_on_recovery(own_room: Any, own_server: EmbeddedServer) -> None:
    """A deferred end holds here at once and in Redis as soon as it is back, without another call."""
    session, stays = own_room.sessions.create("u1"), own_room.sessions.create("u1")
    own_server.kill()
    with pytest.raises(SessionStoreUnavailable):
        own_room.sessions.destroy(session)
    assert own_room.sessions.destroy(session, defer=True) is True
    assert own_room.sessions.destroy(session.token, defer=True) is True
    assert own_room.sessions.get(session) is None
    assert own_room.sessions.touch(session) is False
    with pytest.raises(SessionStoreUnavailable):
        own_room.sessions.get(stays)
    until(lambda: _fails(own_room, stays) and own_room.wire.breaker.is_open, "an open breaker")
    own_server.restart()
    with other(own_server) as elsewhere:
        until(lambda: _get(elsewhere, session) is None, "the delivery")
        assert elsewhere.sessions.get(stays.token) is not None


def _fails(room: Any, session: Any) -> bool:
    try:
        room.sessions.get(session)
    except SessionStoreUnavailable:
        return True
    return False


def _get(room: Stillroom, session: Any) -> Any:
    try:
        return room.sessions.get(session.token)
    except SessionStoreUnavailable:
        return "unknown"


def test_a_deferred_end_goes_in_front_of_the_next_read(
    own_room: Any, own_server: EmbeddedServer
) -> None:
    """A deferred end is told before this process's next read, though the breaker noticed nothing."""
    session, stays = own_room.sessions.create("u1"), own_room.sessions.create("u1")
    own_server.freeze()
    try:
        assert own_room.sessions.destroy(session, defer=True) is True
    finally:
        own_server.thaw()
    assert not own_room.wire.breaker.is_open
    assert own_room.sessions.get(stays) is not None
    with other(own_server) as elsewhere:
        assert elsewhere.sessions.get(session.token) is None
    assert own_room.sessions.deliver() == 0


def test_a_deferred_end_is_told_though_there_was_no_outage(
    own_room: Any, own_server: EmbeddedServer
) -> None:
    """A logout in a request whose time for Redis is used up is told to all, though this process asks no more."""
    session = own_room.sessions.create("u1")
    with own_room.request() as budget:
        budget.left = 0.0
        assert own_room.sessions.destroy(session, defer=True) is True
    with other(own_server) as elsewhere:
        until(lambda: _get(elsewhere, session) is None, "the delivery")


@pytest.mark.parametrize("slept", [0, 60])
@pytest.mark.parametrize("face", FACES)
def test_a_deferred_end_reaches_who_was_rotated_meanwhile(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, face: str, slept: int
) -> None:
    """A deferred end reaches a session that another process rotated meanwhile without grace, also where this
    machine slept meanwhile, and time.monotonic() with it.
    """
    read = time.monotonic_ns
    with (
        Proxy(own_server.port) as proxy,
        other(own_server) as elsewhere,
        open_room(face, impatient(proxy.url), NoDispatch()) as room,
    ):
        session, stays = room.sessions.create("u1"), room.sessions.create("u1")
        stolen = room.sessions.create("u1")
        safe = elsewhere.sessions.rotate(stolen, grace=0)
        proxy.cut()
        assert room.sessions.destroy(session, defer=True) is True
        assert room.sessions.destroy(stolen, defer=True) is True
        rotated = elsewhere.sessions.rotate(elsewhere.sessions.rotate(session, grace=0), grace=0)
        monkeypatch.setattr(time, "monotonic_ns", lambda: read() - slept * 1_000_000_000)
        proxy.heal()
        until(lambda: not room.wire.breaker.is_open, "recovery")
        assert room.sessions.get(stays) is not None
        assert room.sessions.deliver() == 0
        assert elsewhere.sessions.get(rotated) is None
        assert elsewhere.sessions.get(safe) is not None  # what it was called before opened nothing


def test_a_server_that_only_copies_is_no_logout(own_room: Any, own_server: EmbeddedServer) -> None:
    """After a failover writes to a replica raise and no session seems ended, until the address is the primary's."""
    session, leaves = own_room.sessions.create("u1", {"a": 1}), own_room.sessions.create("u1")
    sessions = own_room.sessions
    with redis.Redis.from_url(own_server.url) as client:
        client.replicaof("127.0.0.1", 1)
        for act in (
            lambda: sessions.create("u1"),
            lambda: sessions.update(session, {"a": 2}),
            lambda: sessions.rotate(session),
            lambda: sessions.destroy(session),
            lambda: sessions.destroy_for_user("u1"),
            sessions.sweep,
        ):
            with pytest.raises(SessionStoreUnavailable, match="readonly"):
                act()
        assert sessions.destroy(leaves, defer=True) is True
        assert sessions.get(leaves) is None
        client.replicaof("NO", "ONE")
    until(lambda: not own_room.wire.breaker.is_open, "recovery")
    assert sessions.get(session).data == {"a": 1}
    with other(own_server) as elsewhere:
        assert elsewhere.sessions.get(leaves.token) is None


def test_the_outbox_has_a_bound(
    own_room: Any, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full outbox of ends raises for further ones."""
    monkeypatch.setattr(asking, "DEFERRED_LIMIT", 2)
    sessions = [own_room.sessions.create("u1") for _ in range(3)]
    own_server.kill()
    assert [own_room.sessions.destroy(one, defer=True) for one in sessions[:2]] == [True, True]
    with pytest.raises(SessionStoreUnavailable):
        own_room.sessions.destroy(sessions[2], defer=True)
    assert own_room.sessions.deliver() == 2
    own_server.restart()


def test_what_could_not_be_told_at_the_end_is_said(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A room that closes while Redis is away logs how many ends are lost; after an outage it tells them."""
    for back in (False, True):
        room = other(own_server)
        session = room.sessions.create("u1")
        own_server.kill()
        assert room.sessions.destroy(session, defer=True)
        if back:
            own_server.restart()
            room.wire.breaker.stop()
        room.close()
        if not back:
            assert "1 logouts that were made while Redis was away are lost" in caplog.text
            caplog.clear()
            own_server.restart()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR and "logouts" in r.message]
    with other(own_server) as elsewhere:
        assert elsewhere.sessions.get(session.token) is None


ENDS = {
    "a program": "work()",
    "a child of multiprocessing": """
import multiprocessing
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
""",
}


@pytest.mark.parametrize("how", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_process_that_ends_tells_what_waits(
    own_server: EmbeddedServer, face: str, how: str
) -> None:
    """A process that ends without `close` tells Redis of its deferred logouts and of the hits it owes."""
    limit = Limit("ends", 5, 60)
    source = f"""
import asyncio
from stillroom import AsyncStillroom, Limit, NoDispatch, Settings, Stillroom

kind = {{"sync": Stillroom, "async": AsyncStillroom}}[{face!r}]
room = kind(Settings(redis_url={own_server.url!r}, session_peppers={PEPPER!r}), dispatch=NoDispatch())
acts = [
    lambda: room.sessions.destroy({{token!r}}, defer=True),
    lambda: room.limits.check("203.0.113.7", [Limit("ends", 5, 60)]),
]

async def awaited(act):
    return await act()

def work():
    with room.request() as budget:
        budget.left = 0.0
        for act in acts:
            assert act() if {face!r} == "sync" else asyncio.run(awaited(act))

{how}
print("ended", flush=True)
"""
    with other(own_server) as room:
        session = room.sessions.create("u1")
        with Program(source.replace("{token!r}", repr(session.token))) as program:
            program.read_until("ended")
            assert program.exit_code() == 0
        assert room.sessions.get(session) is None
        assert room.limits.peek("203.0.113.7", [limit]).remaining == 4


def test_a_process_that_exits_takes_its_promise_with_it(own_server: EmbeddedServer) -> None:
    """A process that leaves by `os._exit` loses its deferred ends, as documented, and the user can
    end them again.
    """
    with other(own_server) as room:
        session = room.sessions.create("u1")
        own_server.freeze()
        program = Program(
            f"""
            import os
            from stillroom import NoDispatch, Settings, Stillroom
            settings = Settings(redis_url={own_server.url!r}, session_peppers={PEPPER!r})
            room = Stillroom(settings, dispatch=NoDispatch())
            print("ended", room.sessions.destroy({session.token!r}, defer=True), flush=True)
            os._exit(0)
            """
        )
        with program:
            assert program.read_word("ended ") == "True"
            program.exit_code()
        own_server.thaw()
        until(lambda: _get(room, session) != "unknown", "an answer")
        assert room.sessions.destroy(session) in (True, False)
        assert room.sessions.get(session) is None


def test_a_dead_connection_does_not_count_an_update_twice(
    own_room: Any, own_server: EmbeddedServer
) -> None:
    """An update whose connection died in a restart is made once or not at all."""
    session = own_room.sessions.create("u1")
    assert own_room.sessions.update(session, {"a": 1}) == 2
    own_server.restart()
    with contextlib.suppress(SessionStoreUnavailable):  # an event loop that stood still saw no end
        assert own_room.sessions.update(session, {"a": 2}) == 3
        assert own_room.sessions.get(session).version == 3
    assert own_room.sessions.update(
        session, {"a": 3}, if_version=own_room.sessions.get(session).version
    ) in (3, 4)


def test_counts_ride_along_with_the_operations(own_room: Any, own_server: EmbeddedServer) -> None:
    """Counts are sent with the operations when due, without a round trip of their own."""
    stats = own_room.state_stats
    stats.due = time.monotonic() + 1_000
    session = own_room.sessions.create("u1")
    own_room.sessions.destroy(session)
    stats.due = 0.0
    assert own_room.sessions.get(session) is None
    with redis.Redis.from_url(own_server.url) as client:
        counted = [client.hgetall(key) for key in client.keys("*:stats:*")]
    total = {
        name: sum(int(c.get(name, 0)) for c in counted)
        for name in (b"sessions_created", b"sessions_destroyed")
    }
    assert total == {b"sessions_created": 1, b"sessions_destroyed": 1}


def test_the_last_counts_are_written_down(own_server: EmbeddedServer) -> None:
    """The last counts are written when the room is closed, to the sessions' server where there are two."""
    settings = Settings(
        redis_url=f"{own_server.url}/1", cache_url=f"{own_server.url}/2", session_peppers=PEPPER
    )
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.state_stats.due = time.monotonic() + 1_000
        room.sessions.create("u1")
    with redis.Redis.from_url(f"{own_server.url}/1") as client:
        (key,) = client.keys("*:stats:*")
        assert client.hgetall(key) == {b"sessions_created": b"1"}
        assert client.ttl(key) > 0


@pytest.mark.parametrize("refusal", REFUSALS)
def test_sessions_are_read_from_a_server_that_refuses_all_writes(
    own_room: Any, own_server: EmbeddedServer, refusal: str
) -> None:
    """A server that refuses all writes still opens and lists sessions, also those that are due to be touched.

    A deferred logout keeps no other session from being read, and is told when the server writes again.
    """
    sessions = own_room.sessions
    seen, left = sessions.create("u1", {"a": 1}), sessions.create("u2")
    gone = sessions.create("u1")
    with redis.Redis.from_url(own_server.url) as client:
        for name in client.keys("*:s:*"):
            client.hincrby(name, "_l", -3_600_000_000)
        client.delete(*client.keys(f"*:s:{gone.handle.partition('-')[2]}"))
    REFUSALS[refusal](own_server)
    for _ in range(10):  # more would open the breaker
        with pytest.raises(SessionStoreUnavailable, match=refusal):
            sessions.update(seen, {"a": 2})
    assert sessions.get(seen).data == {"a": 1}
    assert sessions.destroy(left, defer=True)
    assert sessions.get(left) is None
    assert sessions.get(seen).data == {"a": 1}
    assert [device.handle for device in sessions.list_for_user("u1")] == [seen.handle]
    take_writes(own_server)
    with other(own_server) as elsewhere:
        until(lambda: elsewhere.sessions.get(left) is None, "the logout that was deferred")


def test_an_outage_ends_on_a_server_that_can_not_write_its_file(
    own_room: Any, own_server: EmbeddedServer
) -> None:
    """Sessions are read again after an outage, though the server refuses writes, and the probe's PING with them."""
    seen = own_room.sessions.create("u1")
    refuse_writes(own_server)
    own_server.freeze()
    until(lambda: "breaker" in why_away(own_room, seen), "the breaker opens")
    own_server.thaw()
    until(lambda: not why_away(own_room, seen), "the sessions are back", 3)
    with pytest.raises(SessionStoreUnavailable, match="misconf"):
        own_room.sessions.create("u2")
    assert not why_away(own_room, seen)


@pytest.mark.parametrize("face", FACES)
def test_an_outage_ends_for_a_user_who_may_not_ping(own_server: EmbeddedServer, face: str) -> None:
    """A refused PING is an answer: a process whose user lacks that right is not left without Redis for ever."""
    with redis.Redis.from_url(own_server.url) as client:
        client.acl_setuser(
            "app", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-ping"]
        )
    settings = impatient(own_server.url.replace("://", "://app@"))
    with other(own_server) as patient:
        seen = patient.sessions.create("u1")
    with open_room(face, settings, NoDispatch()) as room:
        until(lambda: not why_away(room, seen), "the sessions are there")
        own_server.freeze()
        until(lambda: "breaker" in why_away(room, seen), "the breaker opens")
        own_server.thaw()
        until(lambda: not why_away(room, seen), "the sessions are back", 3)


def why_away(room: Any, session: Any) -> str:
    """Return why a session can't be read; empty if it can be."""
    try:
        assert room.sessions.get(session) is not None
    except SessionStoreUnavailable as error:
        return str(error)
    return ""


def test_a_session_whose_life_may_not_be_prolonged_is_not_read(
    own_room: Any, own_server: EmbeddedServer
) -> None:
    """A user that lacks the right to prolong a session's life is told so, before its visitors are logged out."""
    seen = own_room.sessions.create("u1")
    with redis.Redis.from_url(own_server.url) as client:
        for name in client.keys("*:s:*"):
            client.hincrby(name, "_l", -3_600_000_000)
        client.acl_setuser("default", enabled=True, commands=["-pexpire"])
        with pytest.raises(SessionStoreUnavailable):
            own_room.sessions.get(seen)
