"""A command whose reply was late or lost counts once, and nobody is locked out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import redis
from stillroom import (
    NoDispatch,
    SessionStoreUnavailable,
    SessionUnreadable,
    Settings,
    Stillroom,
    TooManySessions,
)
from stillroom.embedded import EmbeddedServer
from stillroom.scripts import session_shut
from stillroom.sessions.asking import DEFERRED_BITE
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.monitor import scripts_run
from tests.support.proxy import Proxy
from tests.support.sessions import end_grace, record_of
from tests.support.stepper import Stepper

# Each test gives up once or more; all other calls have to be answered in this time, on a busy machine too.
BRISK = {"connect_timeout": 0.6, "command_timeout": 0.6, "call_timeout": 0.9}
PEPPER = str(PATIENT["session_peppers"])


@pytest.fixture
def brisk(proxy: Proxy) -> Iterator[Stillroom]:
    """Open a room behind the proxy that gives up soon, with loaded scripts and an open connection."""
    settings = Settings(redis_url=proxy.url, session_peppers=PEPPER, **BRISK)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        until(lambda: is_warm(room), "loaded scripts and an open connection")
        yield room


def is_warm(room: Stillroom) -> bool:
    try:
        session = room.sessions.create("eve", max_per_user=9, on_cap="reject")
        room.sessions.destroy(room.sessions.rotate(session))
    except SessionStoreUnavailable:
        return False
    return True


def test_a_login_whose_reply_was_late_takes_no_place_of_a_cap(
    brisk: Stillroom, proxy: Proxy
) -> None:
    """A login with a late reply is ended before the next login is counted, so that it takes no place of a cap."""
    only = {"max_per_user": 1, "on_cap": "reject"}
    proxy.hold_replies()
    with pytest.raises(SessionStoreUnavailable):
        brisk.sessions.create("ann", **only)
    proxy.let_go()
    made = brisk.sessions.create("ann", **only)
    assert [one.handle for one in brisk.sessions.list_for_user("ann")] == [made.handle]
    with pytest.raises(TooManySessions):
        brisk.sessions.create("ann", **only)


def test_a_login_that_arrives_after_it_was_given_up_begins_nothing(
    brisk: Stillroom, proxy: Proxy, client: Any, make_room: Any
) -> None:
    """A login that arrives after the command that undoes it begins nothing."""
    other = make_room()
    proxy.hold_requests()
    with pytest.raises(SessionStoreUnavailable):
        brisk.sessions.create("ann")
    assert proxy.held.wait(5)
    other._sessions_body._deferred.update(brisk._sessions_body._deferred)
    assert other.sessions.deliver() == 0
    created = scripts_run(client)
    proxy.let_go()
    until(lambda: scripts_run(client) > created, "the arrival")
    assert other.sessions.count("ann") == 0


def test_the_session_before_a_lost_login_ends_too(brisk: Stillroom, proxy: Proxy) -> None:
    """The session that a lost login was to replace opens nothing afterwards."""
    for on_cap in ("evict_oldest", "reject"):
        for _ in range(3):
            guest = brisk.sessions.create(None)
            proxy.hold_replies()
            with pytest.raises(SessionStoreUnavailable):
                brisk.sessions.create("ann", replaces=guest, max_per_user=3, on_cap=on_cap)
            proxy.let_go()
            assert brisk.sessions.get(guest) is None
            assert brisk.sessions.count("ann") == 0


@pytest.mark.parametrize("grace", [0, 60])
def test_a_rotation_whose_reply_was_late_logs_nobody_out(
    brisk: Stillroom, proxy: Proxy, grace: int
) -> None:
    """A rotation with a late reply leaves the old token good and reports no replay."""
    events: list[Any] = []
    brisk.sessions.on_event.append(events.append)
    session = brisk.sessions.create("ann", {"a": 1}, tags=["t"])
    proxy.hold_replies()
    with pytest.raises(SessionStoreUnavailable):
        brisk.sessions.rotate(session, grace=grace)
    proxy.let_go()
    found = brisk.sessions.get(session)
    assert found is not None
    assert found.data == {"a": 1}
    assert brisk.sessions.rotate(session).data == {"a": 1}
    assert brisk.sessions.destroy_by_tag("t") == 1
    assert events == []


@pytest.mark.parametrize("user", [None, "ann", "zoe"])
def test_a_rotation_that_is_undone_brings_nobody_back(
    brisk: Stillroom, proxy: Proxy, make_room: Any, client: Any, user: str | None
) -> None:
    """Who was logged out, or in, elsewhere before a lost rotation is undone has no session of before."""
    room, session = make_room(), brisk.sessions.create("ann")
    brisk.sessions.rotate(brisk.sessions.create("eve"))
    proxy.hold_replies()
    with pytest.raises(SessionStoreUnavailable):
        brisk.sessions.rotate(session, grace=0)
    brisk.state_wire.breaker.recovered.clear()  # its next call undoes it, and nothing else
    until(lambda: room.sessions.get(session) is None, "the rotation")
    end_grace(client, room, session.handle)
    if user is None:
        assert room.sessions.destroy(session) is False
    else:
        room.sessions.create(user, replaces=session)
    proxy.let_go()
    assert brisk.sessions.deliver() == 0
    assert room.sessions.get(session) is None
    assert room.sessions.count("ann") == (user == "ann")


def test_a_session_that_could_not_follow_another_is_no_device(
    brisk: Stillroom, proxy: Proxy, make_room: Any
) -> None:
    """Where the end of the session before is not heard of, the session that was to follow it does not stay."""
    other = make_room()
    session = brisk.sessions.create("ann", {"a": 1})
    succeeds = Stepper(brisk, brisk._sessions_body.succeed(session.token, "ann", {"a": 1}))
    while other.sessions.count("ann") < 2:
        succeeds.step()
    proxy.hold_replies()
    with pytest.raises(SessionStoreUnavailable):
        succeeds.value()
    proxy.let_go()
    assert brisk.sessions.get(session) is None  # its end was carried out, and heard of by nobody
    assert other.sessions.list_for_user("ann") == []


@pytest.mark.parametrize("counts", [False, True], ids=["alone", "with counts"])
@pytest.mark.parametrize("act", ["destroy", "defer", "log_out", "end"])
def test_an_end_whose_connection_breaks_says_that_it_ended(
    brisk: Stillroom, proxy: Proxy, make_room: Any, act: str, counts: bool
) -> None:
    """An end that was carried out before the connection broke is told as one, not as a session that was gone.

    Counts that ride along change nothing of that.
    """
    body, other = brisk._sessions_body, make_room()
    session = brisk.sessions.create("ann", {"a": 1})
    acts = {
        "destroy": lambda: brisk.sessions.destroy(session),
        "defer": lambda: brisk.sessions.destroy(session, defer=True),
        "log_out": lambda: brisk.state.run(body.log_out(session.token)),
        "end": lambda: brisk.sessions.end("ann", session.handle),
    }
    assert not brisk.sessions.end("ann", session.handle[:-1] + "-")  # its script is there
    if counts:
        brisk.state_stats.due = 0.0
    proxy.cuts_next = True
    assert acts[act]() is True
    assert not proxy.cuts_next
    assert other.sessions.get(session) is None


@pytest.mark.parametrize("act", ["get", "touch", "list", "count", "health"])
def test_what_rides_along_is_written_once(
    brisk: Stillroom, proxy: Proxy, client: Any, act: str
) -> None:
    """When a connection breaks after the server acted, the question is asked again without its riders."""
    session = brisk.sessions.create("ann")
    acts = {
        "get": lambda: brisk.sessions.get(session),
        "touch": lambda: brisk.sessions.touch(session),
        "list": lambda: brisk.sessions.list_for_user("ann"),
        "count": lambda: brisk.sessions.count("ann"),
        "health": lambda: brisk.health.check().servers[0].connection.is_up,
    }
    acts[act]()
    for _ in range(10):
        brisk._abuse_body.hold("session_unknown", ip="203.0.113.9")
    brisk.state_stats.due = 0.0
    counted = brisk.state_stats.counts["sessions_created"]
    proxy.cuts_next = True
    assert acts[act]()
    assert client.xlen(brisk.keys.abuse) == 10
    totals = client.hget(brisk.keys.counts, "sessions_created")
    assert int(totals) == counted


# Deferred ends


@pytest.fixture
def own_room(own_server: EmbeddedServer) -> Iterator[Stillroom]:
    patience = {"connect_timeout": 1, "command_timeout": 1, "call_timeout": 3}
    settings = Settings(redis_url=own_server.url, session_peppers=PEPPER, **patience)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield room


def away(room: Stillroom, server: EmbeddedServer, act: Any) -> None:
    """Act while Redis is away; when it is back, no thread has told it anything yet."""
    server.kill()
    kept, room.state_wire.breaker.recovered[:] = list(room.state_wire.breaker.recovered), []
    act()
    server.restart()
    until(lambda: not room.state_wire.breaker.is_open, "recovery")
    room.state_wire.breaker.recovered[:] = kept


def test_all_deferred_ends_are_told_before_a_session_is_read(
    own_room: Stillroom, own_server: EmbeddedServer
) -> None:
    """All deferred ends are told before a session is read by token, list or count."""
    sessions = [own_room.sessions.create(f"u{n}") for n in range(250)]
    fresh = own_room.sessions.rotate(sessions[-1], grace=3_600)

    def log_out() -> None:
        for session in sessions:
            assert own_room.sessions.destroy(session, defer=True) is True

    away(own_room, own_server, log_out)
    assert own_room.sessions.get(fresh) is None
    assert own_room.sessions.count("u249") == 0
    assert own_room.sessions.deliver() == 0


def test_a_deferred_end_keeps_its_place_where_scripts_were_lost(
    own_room: Stillroom, own_server: EmbeddedServer
) -> None:
    """A deferred end is told before a read after a restart, though only the read's script is loaded."""
    session = own_room.sessions.create("ann")
    fresh = own_room.sessions.rotate(session, grace=3_600)
    own_room.sessions.get(fresh)
    away(own_room, own_server, lambda: own_room.sessions.destroy(session, defer=True))
    settings = Settings(redis_url=own_server.url, session_peppers=PEPPER)
    with Stillroom(settings, dispatch=NoDispatch()) as other:
        assert other.sessions.get("00." + "x" * 43) is None
        assert own_room.sessions.get(fresh) is None


def test_an_end_that_is_refused_for_itself_holds_nobody_up(
    own_room: Stillroom, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A deferred end that Redis refuses is given up, and the others are told."""
    bad, good, stays = (own_room.sessions.create(name) for name in ("ann", "bob", "eve"))

    def log_out() -> None:
        assert own_room.sessions.destroy(bad, defer=True) is True
        assert own_room.sessions.destroy(good, defer=True) is True

    away(own_room, own_server, log_out)
    with redis.Redis.from_url(own_server.url) as client:
        revoked = own_room.keys.revocations(int(bad.handle[:2], 16))
        client.set(revoked, "x")  # the end of `bad` is refused, each time
        assert own_room.sessions.get(stays) is not None
        assert "Redis refuses to end a session" in caplog.text
        assert own_room.sessions.deliver() == 0
        assert not client.exists(record_of(own_room, good.handle))


def test_an_end_waits_for_a_right_that_is_missing(
    own_room: Stillroom, own_server: EmbeddedServer
) -> None:
    """A deferred end is told once its right is given back, and no session is read before."""
    session, stays = (own_room.sessions.create(name) for name in ("ann", "bob"))
    away(own_room, own_server, lambda: own_room.sessions.destroy(session, defer=True))
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-evalsha")
        with pytest.raises(SessionStoreUnavailable, match="noperm"):
            own_room.sessions.get(stays)
        client.execute_command("ACL", "SETUSER", "default", "+evalsha")
        assert own_room.sessions.get(stays) is not None
        assert not client.exists(record_of(own_room, session.handle))


@pytest.mark.parametrize("right", ["zadd", "set", "pttl", "pexpire", "hset"])
def test_a_login_without_a_right_begins_no_session_that_nobody_can_end(
    own_room: Stillroom, own_server: EmbeddedServer, right: str
) -> None:
    """A right that lacks in the middle of a login fails it, also a process's first, and leaves no session."""
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", f"-{right}")
        for _ in range(2):
            with pytest.raises(SessionStoreUnavailable, match=f"noperm.*'{right}'"):
                own_room.sessions.create("ann")
        client.execute_command("ACL", "SETUSER", "default", f"+{right}")
        assert client.keys("*:s:*") == []
        own_room.sessions.create("ann")
        assert own_room.sessions.destroy_for_user("ann") == 1


@pytest.mark.parametrize("right", ["zadd", "zrem", "pttl", "pexpire", "hset"])
def test_a_rotation_without_a_right_leaves_the_session_its_name(
    own_room: Stillroom, own_server: EmbeddedServer, right: str
) -> None:
    """A right that lacks in the middle of a rotation fails it, and the old name goes on, past any grace."""
    session = own_room.sessions.create("ann", data={"cart": 1})
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", f"-{right}")
        with pytest.raises(SessionStoreUnavailable, match=f"noperm.*'{right}'"):
            own_room.sessions.rotate(session)
        client.execute_command("ACL", "SETUSER", "default", f"+{right}")
        assert not client.hexists(record_of(own_room, session.handle), "_to")
    assert own_room.sessions.get(session).data == {"cart": 1}
    assert own_room.sessions.destroy_for_user("ann") == 1


@pytest.mark.parametrize("right", ["zadd", "pttl", "pexpire", "hset"])
def test_a_login_without_a_right_leaves_the_session_before_it(
    own_room: Stillroom, own_server: EmbeddedServer, right: str
) -> None:
    """A login that lacks a right keeps the one that it replaces."""
    before = own_room.sessions.create(None, data={"cart": 1})
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", f"-{right}")
        for _ in range(3):  # the new one lies in another shard, nearly always
            with pytest.raises(SessionStoreUnavailable, match=f"noperm.*'{right}'"):
                own_room.sessions.create("ann", replaces=before)
        client.execute_command("ACL", "SETUSER", "default", f"+{right}")
        assert client.pttl(record_of(own_room, before.handle)) > 600_000
    assert own_room.sessions.get(before).data == {"cart": 1}


def test_ends_that_wait_for_their_shard_keep_no_others_waiting(
    own_room: Stillroom, own_server: EmbeddedServer
) -> None:
    """However many ends wait for a shard that is being moved, those of other shards are told."""
    sessions = [own_room.sessions.create(f"u{n}") for n in range(400)]
    inside = [one for one in sessions if one.handle[:2] < "08"]
    others = [one for one in sessions if one not in inside]
    assert len(inside) > DEFERRED_BITE

    def log_out() -> None:
        for session in [*inside, *others[1:]]:
            assert own_room.sessions.destroy(session, defer=True) is True

    away(own_room, own_server, log_out)
    shut = [session_shut([own_room.keys.revocations(shard)], b"!left") for shard in range(8)]
    with redis.Redis.from_url(own_server.url) as client:
        client.script_load(session_shut.text.source)
        for command in shut:
            client.execute_command(*command)
        assert own_room.sessions.get(others[0]) is not None
        kept = [one for one in others if client.exists(record_of(own_room, one.handle))]
        assert kept == others[:1]
        assert own_room.sessions.deliver() == len(inside)
        client.delete(*[own_room.keys.revocations(shard) for shard in range(8)])
    assert own_room.sessions.deliver() == 0
    assert own_room.sessions.count() == 1


@dataclass
class Cart:
    """What the data of a session are read as."""

    items: int


@pytest.mark.parametrize("grace", [0, 60])
def test_a_rotation_to_data_that_do_not_fit_logs_nobody_out(
    brisk: Stillroom, make_room: Any, grace: int
) -> None:
    """A rotation that raises, as the data are not of the type asked for, leaves the old token good."""
    events: list[Any] = []
    room = make_room()
    room.sessions.on_event.append(events.append)
    session = brisk.sessions.create("ann", {"items": "many"})
    with pytest.raises(SessionUnreadable):
        brisk.sessions.rotate(session, Cart, grace=grace)
    found = room.sessions.get(session)
    assert found is not None
    assert found.data == {"items": "many"}
    assert events == []
