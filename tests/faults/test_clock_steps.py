"""The server's clock steps, by up to an hour and either way: all is right again within one period.

A real server, whose clock is moved while it runs and while calls are on their way. No wall clock of a process is
looked at.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import redis
from stillroom import AUTH, Limit, LockTaken, NoDispatch, SessionNotFresh, Settings, Stillroom
from stillroom.dispatch import RefreshOrder
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from stillroom.moving import Moving, Side, move_bans
from tests.conftest import SERVERS, binary_of
from tests.support.clocked import ClockedServer
from tests.support.crowd import PATIENT
from tests.support.entries import Recording
from tests.support.faces import FACES, opening_rooms
from tests.support.limits import forget_denials
from tests.support.proxy import Proxy

HOUR = 3_600
STEPS = [-HOUR, -5, 5, HOUR]


@pytest.fixture(scope="module", params=SERVERS)
def shared_clocked(request: pytest.FixtureRequest) -> Iterator[ClockedServer]:
    binary = "redis-server" if request.param == "redis" else None
    binary_of(request)
    with ClockedServer(binary) as server:
        yield server


@pytest.fixture
def clocked(shared_clocked: ClockedServer) -> ClockedServer:
    """Start a server without data whose clock is right."""
    shared_clocked.set_clock(0)
    with redis.Redis.from_url(shared_clocked.url) as client:
        client.flushall()
        client.script_flush()
    return shared_clocked


@pytest.fixture
def make(clocked: ClockedServer) -> Iterator[Callable[..., Any]]:
    """Return a function that makes rooms on that server."""
    with opening_rooms(**{"redis_url": clocked.url} | PATIENT) as make:
        yield make


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("seconds", STEPS)
def test_no_write_is_refused_or_lost_for_it(
    clocked: ClockedServer, make: Any, face: str, seconds: int
) -> None:
    """Each kind of write meets the clock step at its first call, finds out, and is made again."""
    for name, write in {
        "set": lambda app: app.cache.set("k", 1),
        "set_many": lambda app: all(app.cache.set_many({"k": 1, "l": 1}).values()),
        "add": lambda app: app.cache.add("new", 1),
        "touch": lambda app: app.cache.touch("there"),
        "incr": lambda app: app.cache.incr("there") is not None,
        "get_or_set": lambda app: app.cache.get_or_set("load", lambda: 1) and app.cache.get("load"),
        "get_or_set_many": lambda app: (
            app.cache.get_or_set_many(["m"], lambda keys: dict.fromkeys(keys, 1))
            and app.cache.get("m")
        ),
    }.items():
        clocked.set_clock(0)
        app = make(face, command_timeout=2.0)
        app.cache.clear()
        app.cache.set("there", 1, ttl=2 * HOUR)
        clocked.set_clock(seconds)
        assert write(app), name
        assert app.wire.server.now_ms() == pytest.approx((time.time() + seconds) * 1000, abs=500)


@pytest.mark.parametrize("seconds", STEPS)
def test_what_was_invalidated_stays_so(clocked: ClockedServer, make: Any, seconds: int) -> None:
    """Marks made before and after a clock step still end the entries they name."""
    app, other = make(), make()
    tags = {f"k{n}": [f"t{n}"] for n in range(4)}
    for key, tagged in tags.items():
        app.cache.set(key, "old", tags=tagged, ttl=3 * HOUR)
    app.cache.invalidate_by_tag("t0")
    clocked.set_clock(seconds)
    app.cache.invalidate_by_tag("t1")
    app.cache.invalidate_by_pattern("k2")
    for room in (app, other, make()):
        assert room.cache.get_many(list(tags)).keys() <= {"k3"}
    clocked.set_clock(0)
    other.cache.invalidate_by_tag("t3")
    for room in (app, other, make()):
        assert room.cache.get_many(list(tags)) == {}


@pytest.mark.parametrize("seconds", [-HOUR, -5, -1])
@pytest.mark.parametrize("hits", [0, 20])
def test_a_write_that_was_given_up_before_a_step_back_never_lands(
    clocked: ClockedServer, make: Any, seconds: int, hits: int
) -> None:
    """A write that was given up before the clock stepped back never lands, though it arrives in what
    seems its time.
    """
    with Proxy(clocked.port) as proxy:
        app = make(redis_url=proxy.url, connect_timeout=2.0, command_timeout=0.2, call_timeout=2.0)
        other = make()
        app.cache.set("warm", 1)
        for _ in range(hits):
            app.wire.server.ask_time()
            app.cache.get("warm")
        proxy.hold_requests()
        assert app.cache.set("k", "old", tags=["t"], ttl=600) is False
        clocked.set_clock(seconds)
        other.cache.invalidate_by_tag("t")
        proxy.let_go()
        assert app.cache.set("next", 1)  # behind it on its way
        assert other.cache.get("k") is None


@pytest.mark.parametrize("seconds", [-HOUR, HOUR])
def test_work_and_orders_are_done_at_the_next_look(
    clocked: ClockedServer, make: Any, seconds: int
) -> None:
    """Work that a clock ahead postponed by an hour is due at the next look, and is done once."""
    clocked.set_clock(-seconds if seconds < 0 else 0)
    app, worker = make(), make()
    loads: list[int] = []

    def load(id: int) -> int:
        loads.append(id)
        return id

    registered = app.cache.cached("p:{id}", ttl=600)(load)
    worker.cache.cached("p:{id}", ttl=600)(load)
    app.cache.set("k", "old", tags=["t"], ttl=24 * HOUR)
    app.cache.set("l", "old", tags=["u"], ttl=24 * HOUR)
    app.tasks.invalidate_tags("t")
    app.tasks.load(registered, 7)
    app.cache.invalidate_by_tag("u")
    clocked.set_clock(0 if seconds < 0 else seconds)
    report = worker.cache.reclaim(budget=5)
    assert app.cache.get("k") is None
    assert loads == [7]
    assert report["due"] == 0
    worker.cache.reclaim(budget=5)
    assert loads == [7]


@pytest.mark.parametrize("kind", ["load", "refresh", "backoff"])
def test_a_lease_of_before_a_step_back_lasts_no_longer_than_it_was_given(
    clocked: ClockedServer, make: Any, kind: str
) -> None:
    """A lease from before a step back lasts no longer than given, though the server keeps its key an hour more."""
    clocked.set_clock(HOUR)
    recording = Recording()
    times = {"lease": 1.0, "refresh_lease": 1.0, "wait": 0.2, "backoff": 1.0}
    app = make(dispatch=recording, **times)
    value = {"v": "old"}

    @app.cache.cached("k", ttl=600, tags=["t"])
    def load() -> str:
        if value["v"] == "error":
            raise OSError("the database is away")
        return value["v"]

    with redis.Redis.from_url(clocked.url) as client:
        if kind == "load":
            lease = b"load.0123456789abcdef.1000"
            client.set(app.keys.lease(b"k"), lease, px=1_000)
            clocked.set_clock(0)
            assert until(lambda: load() == "old" and app.cache.get("k") == "old", 5.0)
            return
        load()
        app.cache.invalidate_by_tag("t", soft=True)
        assert load() == "old"
        assert len(recording.orders) == 1
        if kind == "backoff":
            value["v"] = "error"
            recording.run_all(app)
        recording.orders.clear()
        clocked.set_clock(0)
        value["v"] = "new"

        def is_asked_again() -> bool:
            assert load() == "old"
            return bool(recording.orders)

        assert until(is_asked_again, 6.0)
        assert recording.run_all(app) == ["refreshed"]
    assert load() == "new"


def test_a_pause_of_before_a_step_back_lasts_no_longer_than_it_was_given(
    clocked: ClockedServer, make: Any
) -> None:
    """A pause of refreshes from before a step back lasts at most once more as long, and not an hour."""
    clocked.set_clock(HOUR)
    app, worker = make(), make()
    app.upkeep.pause("refresh", 2)
    clocked.set_clock(0)
    assert worker.upkeep.refreshes_are_paused()
    assert until(lambda: not worker.upkeep.refreshes_are_paused(), 10.0)


def test_a_lock_of_before_a_step_back_is_held_for_one_lease_more(
    clocked: ClockedServer, make: Any
) -> None:
    """A lock whose holder died before a step back is free one lease later, and never while its holder lives."""
    clocked.set_clock(HOUR)
    holder, other = make(), make()
    lock = holder.lock("k", lease=0.8, longest=0.1).acquire()
    slots = [holder.semaphore("s", 2, lease=0.8, longest=0.1).acquire() for _ in range(2)]
    clocked.set_clock(0)
    for taking in (other.lock("k", wait=0, lease=HOUR), other.semaphore("s", 2, wait=0)):
        with pytest.raises(LockTaken):
            taking.acquire()
    assert lock.is_held
    assert all(slot.is_held for slot in slots)
    with other.lock("k", wait=10), other.semaphore("s", 2, wait=10):
        assert not lock.is_held
        assert not any(slot.is_held for slot in slots)


@pytest.mark.parametrize("dead", [1, 1_000])
def test_a_waiter_that_died_before_a_step_back_holds_nobody_up(
    clocked: ClockedServer, make: Any, dead: int
) -> None:
    """Places in the queue of a lock, of callers that died before a step back, are free within seconds."""
    clocked.set_clock(HOUR)
    app = make()
    _, queue, waiters, _ = app.keys.slots(b"k")
    with app.lock("k"), redis.Redis.from_url(clocked.url) as client:
        until_us = (time.time() + HOUR + 2) * 1e6
        client.zadd(queue, {f"{n}.1000": n for n in range(dead)})
        client.zadd(waiters, {f"{n}.1000": until_us for n in range(dead)})
        clocked.set_clock(0)

    def take() -> bool:
        try:
            app.lock("k", wait=0.5).acquire().release()
        except LockTaken:
            return False
        return True

    assert until(take, 10.0)


@pytest.mark.parametrize("seconds", STEPS)
def test_a_refresh_order_has_no_wall_clock_in_it(
    clocked: ClockedServer, make: Any, seconds: int
) -> None:
    """A refresh order has no wall clock in it, so that a wrong clock in an app or worker loses nothing."""
    recording = Recording()
    app, worker = make(dispatch=recording), make()
    value = {"v": "old"}

    def load() -> str:
        return value["v"]

    asked = app.cache.cached("k", ttl=24 * HOUR, tags=["t"])(load)
    worker.cache.cached("k", ttl=24 * HOUR, tags=["t"])(load)
    asked()
    app.cache.invalidate_by_tag("t", soft=True)
    asked()
    (order,) = recording.orders
    assert isinstance(order, RefreshOrder)
    value["v"] = "new"
    clocked.set_clock(
        min(seconds, 0)
    )  # forward, its lease has run out, and the next read asks again
    assert worker.cache.refresh(order)["outcome"] == "refreshed"
    assert asked() == "new"


def test_limits_slide_on(clocked: ClockedServer, make: Any) -> None:
    """A hit is never admitted again within its window, when the clock steps an hour either way."""
    app = make()
    for _ in range(AUTH.quota):
        assert app.limits.check("203.0.113.9", [AUTH])
    for seconds in (-HOUR, 0, -5, 0):
        clocked.set_clock(seconds)
        assert not app.limits.check("203.0.113.9", [AUTH])


def test_a_clock_that_is_ahead_for_a_moment_ages_no_hits(clocked: ClockedServer, make: Any) -> None:
    """Hits that were made before the server's clock was ahead for a moment leave their window no earlier."""
    app, hourly = make(), Limit("hourly", 5, HOUR)
    for seconds, hits in ((0, 4), (HOUR // 2, 1)):
        clocked.set_clock(seconds)
        assert [app.limits.check("203.0.113.9", [hourly]).allowed for _ in range(hits)] == [
            True
        ] * hits
    for seconds in (0, HOUR // 2 + 60):
        clocked.set_clock(seconds)
        forget_denials(app)
        assert not app.limits.check("203.0.113.9", [hourly])


@pytest.mark.parametrize("delay", [0.0, 0.06])
def test_a_clock_that_was_learned_from_a_slow_reply_makes_no_deadline_too_late(
    clocked: ClockedServer, make: Any, delay: float
) -> None:
    """A clock learned from a slow handshake makes no deadline too late: half of its time is subtracted."""
    with SlowProxy(clocked.port) as proxy:
        app = make(redis_url=proxy.url, connect_timeout=1.0, command_timeout=0.1, call_timeout=1.0)
        other = make()
        other.cache.set("warm", 1)
        proxy.delay = delay
        app.cache.get("warm")
        stored = None
        for hold in (0.102, 0.118, 0.14):
            proxy.delay = hold
            stored = app.cache.set("k", "old", tags=["t"], ttl=600)
            other.cache.invalidate_by_tag("t")
            assert until(lambda: not proxy.on_its_way, 5.0)
            assert other.cache.get("k") is None, (hold, stored)


def test_a_living_holder_keeps_a_lock_when_the_clock_steps_back(
    clocked: ClockedServer, make: Any
) -> None:
    """A holder that renews its lease keeps it through a step, and others get it when it is free."""
    app, other = make(), make()
    with app.lock("k", lease=1.0) as held:
        clocked.set_clock(-HOUR)
        with pytest.raises(LockTaken), other.lock("k", lease=0.1, wait=2.0):
            pass
        assert held.is_held
    with other.lock("k", lease=0.1, wait=2.0):
        pass


class SlowProxy(Proxy):
    """A proxy that hands each piece of a request on after `delay` seconds, though the client may have left."""

    delay = 0.0
    on_its_way = 0  # pieces that were read and not yet handed on

    def _requests(self, near: socket.socket, far: socket.socket) -> None:
        try:
            while data := near.recv(65536):
                self.on_its_way += 1
                threading.Event().wait(self.delay)
                far.sendall(data)
                self.on_its_way -= 1
        except OSError:
            return


@pytest.mark.parametrize("ahead", [-3_600, 3_600])
def test_a_ban_that_is_moved_lasts_as_long_as_it_had_left(
    make: Callable[..., Any], clocked: ClockedServer, ahead: int
) -> None:
    """A ban that moves to a server with another clock lasts there as long as it had left, up to 30 days."""
    clocked.set_clock(ahead)
    here = make()
    here.abuse.ban("203.0.113.7", 600)
    here.abuse.ban("203.0.113.8", 30 * 86_400)
    with EmbeddedServer() as server:
        settings = Settings(**{"redis_url": server.url} | PATIENT)
        with Stillroom(settings, dispatch=NoDispatch()) as there:
            moved = here.abuse, there.abuse, here.state.run, there.state.run, there.keys
            assert move_bans(*moved) == 2
            for ban, seconds in zip(there.abuse.bans(), (30 * 86_400, 600), strict=True):
                assert seconds - 30 < ban.until - ban.since <= seconds


@pytest.mark.parametrize("ahead", [-HOUR, HOUR])
def test_a_session_that_is_moved_lives_as_long_as_it_had_left(
    make: Callable[..., Any], clocked: ClockedServer, ahead: int
) -> None:
    """A session that moves to a server with another clock has there as long to live as it had, and its age."""
    clocked.set_clock(ahead)
    here = make()
    session = here.sessions.create("ann", {"a": 1}, idle=600, absolute=1_200, device="a phone")
    rotated = here.sessions.rotate(session)
    before = here.sessions.get(rotated)
    with EmbeddedServer() as server:
        settings = Settings(**{"redis_url": server.url} | PATIENT)
        with Stillroom(settings, dispatch=NoDispatch()) as there:
            moving = Moving(*[Side(room.keys, room.state.run) for room in (here, there)])
            moving.begin()
            assert sum(moving.shards())
            for token in (rotated.token, session.token):
                found = there.sessions.get(token, fresh=60)
                assert found.data == {"a": 1}
                for name in ("created", "expires_at", "ends_by", "authenticated_at"):
                    was = getattr(before, name) - before.read_at
                    assert getattr(found, name) - found.read_at == pytest.approx(was, abs=10), name
            (at,) = there.state.run(_scores(there.keys.due_sessions(int(found.handle[:2], 16))))
            assert at == pytest.approx(found.expires_at * 1e6, abs=10e6)


def _scores(key: bytes) -> Any:
    (found,) = yield [(b"ZRANGE", key, b"0", b"-1", b"WITHSCORES")]
    return [float(score) for score in found[1::2]]


@pytest.mark.parametrize("use", ["get", "touch", "update"])
def test_a_session_is_idle_from_its_last_use_on(
    clocked: ClockedServer, make: Any, use: str
) -> None:
    """A session that is in use when the clock is set back an hour ends one idle time after its last use."""
    app, idle = make(), 120
    clocked.set_clock(HOUR)
    session = app.sessions.create("ann", idle=idle)
    clocked.set_clock(0)
    assert getattr(app.sessions, use)(session, *([{"a": 1}] if use == "update" else []))
    clocked.set_clock(idle + 10)
    assert app.sessions.get(session) is None


@pytest.mark.parametrize("use", ["get", "touch", "update", "rotate"])
def test_a_session_lives_no_longer_for_a_step_back(
    clocked: ClockedServer, make: Any, use: str
) -> None:
    """A session in use when the clock is set back an hour ends when its absolute time is over, and says so."""
    app, absolute = make(), 240
    clocked.set_clock(HOUR)
    session = app.sessions.create("ann", {"a": 0}, idle=120, absolute=absolute)
    clocked.set_clock(0)
    used = getattr(app.sessions, use)(session, *([{"a": 1}] if use == "update" else []))
    session = used if use == "rotate" else session
    found = app.sessions.get(session)
    assert absolute - 30 < found.ends_by - found.read_at <= absolute
    for seconds in (110, 220, absolute + 10):
        clocked.set_clock(seconds)
        assert bool(app.sessions.get(session)) is (seconds < absolute)


def test_a_browser_begins_a_session_soon_after_a_step_back(
    clocked: ClockedServer, make: Any
) -> None:
    """A browser that did not get the cookie of its login begins another session a minute later, also when the clock
    was set back meanwhile."""
    app = make()
    clocked.set_clock(HOUR)
    cart = app.sessions.create(None, {"cart": 1})
    app.state.run(app.sessions._body.log_in(cart.token, "ann", {}))
    clocked.set_clock(61)
    assert app.state.run(app.sessions._body.begin(cart.token, {"cart": 2})).data == {"cart": 2}


def test_a_proof_from_before_a_step_back_is_told_as_one(
    make: Callable[..., Any], clocked: ClockedServer
) -> None:
    """The error about a proof that is in the future says that the clock was set back, and no negative age."""
    clocked.set_clock(3_600)
    room = make()
    session = room.sessions.create("ann")
    clocked.set_clock(0)
    with pytest.raises(SessionNotFresh, match="before the server's clock was set back"):
        room.sessions.get(session, fresh=300)
