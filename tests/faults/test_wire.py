"""The wire keeps deadlines, opens its breaker, recovers, and never mixes up replies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import redis
from stillroom import AsyncStillroom, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from stillroom.wire import side_by_side, sync
from tests.support.clocked import misjudge
from tests.support.crowd import PATIENT
from tests.support.faces import BlockingRoom
from tests.support.lag import Stopwatch, least, seconds_of
from tests.support.processes import run_to_end
from tests.support.proxy import Proxy
from tests.support.threads import at_once

CALL = 0.25  # the most one call may take, seconds
RECOVERY = 1.5  # the most a room needs to find a server that is back, seconds
NO_BREAKER: dict[str, Any] = {"breaker_failures": 1_000, "breaker_calls": 1_000}


def timed(call: Any) -> tuple[float, Any]:
    with Stopwatch() as watch:
        result = call()
    return watch.seconds, result


def put(room: Any, key: str, value: object) -> None:
    """Store a value, however long a busy machine needs for the first connection."""
    assert until(lambda: room.cache.set(key, value, ttl=3_600), 10)


def await_recovery(room: Any) -> float:
    """Return the seconds until the room's breaker is closed again."""
    return seconds_of(lambda: until(lambda: not room.wire.breaker.is_open, 10))


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return a function that makes rooms with this face for a URL."""
    closing: list[Any] = []
    with asyncio.Runner() as runner:

        def make(url: str, **changes: Any) -> Any:
            settings = Settings(redis_url=url, **changes)
            if request.param == "sync":
                room: Any = Stillroom(settings, dispatch=NoDispatch())
            else:
                inner = AsyncStillroom(settings, dispatch=NoDispatch())
                room = BlockingRoom(inner, runner.get_loop())
            closing.append(room)
            return room

        yield make
        for room in closing:
            room.close()


def refused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://127.0.0.1:{probe.getsockname()[1]}"


def test_refused_falls_back_at_once(make: Any) -> None:
    """Without a server every kind of call does what it promises, inside its deadline."""
    room = make(refused_url(), **NO_BREAKER)
    for call, expected in [
        (lambda: room.cache.get("k", default="d"), "d"),
        (lambda: room.cache.get_entry("k"), None),
        (lambda: room.cache.set("k", 1), False),
        (lambda: room.cache.get_or_set("k", lambda: "loaded"), "loaded"),
    ]:
        assert call() == expected
        assert least(partial(seconds_of, call), CALL) < CALL
    for invalidate in (room.cache.invalidate, room.cache.invalidate_by_tag):
        with pytest.raises(RedisUnavailable, match=r"unavailable \((refused|breaker)\)"):
            invalidate("k")


def test_the_breaker_opens_and_calls_cost_microseconds(make: Any) -> None:
    """After five failures in a row the breaker opens and calls cost microseconds."""
    room = make(refused_url())
    for _ in range(5):
        room.cache.get("k")
    assert room.wire.breaker.is_open
    assert room.wire.breaker.down_since is not None
    hundred = partial(seconds_of, lambda: [room.cache.get("k") for _ in range(100)])
    assert least(hundred, CALL) < CALL


def test_a_frozen_server_costs_one_deadline(make: Any, own_server: EmbeddedServer) -> None:
    """With a frozen server each call ends in time and loads are served; after SIGCONT all is well within 1.5 s."""
    room = make(own_server.url)
    put(room, "k", "stored")
    before = room.wire.connections

    def outage() -> float:
        """Return the share that was used of what a call, and the recovery, may take."""
        own_server.freeze()
        longest = 0.0
        while not room.wire.breaker.is_open:
            seconds, value = timed(lambda: room.cache.get_or_set("k", lambda: "loaded"))
            assert value == "loaded"
            longest = max(longest, seconds)
        own_server.thaw()
        recovery = await_recovery(room)
        assert until(lambda: room.cache.get("k") == "stored", 10)
        assert room.wire.connections <= before
        return max(longest / CALL, recovery / RECOVERY)

    assert least(outage, 1) < 1


def test_a_killed_server_is_found_again(make: Any, own_server: EmbeddedServer) -> None:
    """After kill -9 and a restart the room recovers within 1.5 s with as many connections as before."""
    room = make(own_server.url)
    put(room, "k", "stored")
    before = room.wire.connections

    def outage() -> float:
        """Return the share that was used of what a call, and the recovery, may take."""
        own_server.kill()
        longest = 0.0
        while not room.wire.breaker.is_open:
            longest = max(longest, seconds_of(lambda: room.cache.get("k")))
        own_server.restart()
        recovery = await_recovery(room)
        put(room, "k", "again")
        assert until(lambda: room.cache.get("k") == "again", 10)
        assert room.wire.connections == before
        return max(longest / CALL, recovery / RECOVERY)

    for _ in range(3):
        assert least(outage, 1) < 1


def test_a_probe_that_fails_by_an_error_of_its_own_is_not_the_last(
    make: Any, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A probe that raises what nobody foresaw is followed by another, so that the breaker closes in the end."""
    room = make(own_server.url)
    room.cache.set("k", "stored", ttl=60)
    breaker = room.wire.breaker
    probe, failed = breaker._probe, threading.Event()

    def failing() -> object:
        if not failed.is_set():
            failed.set()
            raise MemoryError
        return probe()

    breaker._probe = failing
    own_server.kill()
    while not breaker.is_open:
        room.cache.get("k")
    assert failed.wait(10)
    own_server.restart()
    assert until(lambda: not breaker.is_open, 10)
    assert "could not be probed; it is probed again" in caplog.text


def test_a_restart_between_two_calls_is_not_seen(make: Any, own_server: EmbeddedServer) -> None:
    """Idle connections are dead: the call notices before anything was answered, and uses a new one.

    What the server brings back from its file is not trusted: it is another run, which may have lost something.
    """
    room = make(own_server.url)
    room.cache.set("k", 1, ttl=60)
    room.cache.get("k")
    own_server.restart()
    assert room.cache.get("k") is None
    assert room.cache.set("k", 2)
    assert room.cache.get("k") == 2
    own_server.restart()
    room.cache.invalidate_by_tag("t")
    assert room.wire.breaker.streak == 0


def test_connections_that_a_firewall_forgot_are_one_outage(
    make: Any, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Where what is sent on twenty idle connections gets lost, and new ones work, there is one outage."""
    with Proxy(own_server.port) as proxy:
        room = make(proxy.url, command_timeout=0.3, call_timeout=0.3)
        room.cache.set("k", "stored", ttl=60)
        fill_pool(room, 20)
        proxy.forget()
        assert until(lambda: room.cache.get("k") == "stored", 10)
        assert [room.cache.get("k") for _ in range(30)] == ["stored"] * 30
        assert caplog.text.count("is away") == 1


def fill_pool(room: Any, count: int) -> None:
    """Have the room make that many connections, which are idle then: so many calls wait at the same time."""
    wait = [("BLPOP", "nothing", "0.1")]
    if isinstance(room, BlockingRoom):
        waits = (room.inner.wire.execute(wait, 2.0) for _ in range(count))
        room._loop.run_until_complete(side_by_side(waits))
        return
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda _: room.wire.execute(wait, 2.0), range(count)))


def test_what_a_server_said_before_it_reset_a_connection_is_told(make: Any) -> None:
    """A server that is protected or full says so and reads nothing: what it said is told, not the reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        room = make(f"redis://127.0.0.1:{listener.getsockname()[1]}", **PATIENT)
        threads.submit(turn_away, listener)
        with pytest.raises(RedisUnavailable, match="DENIED Redis is running in protected mode"):
            room.cache.invalidate("k")
        listener.shutdown(socket.SHUT_RDWR)


def turn_away(listener: socket.socket) -> None:
    """Refuse whoever has sent something. What is left unread makes the system reset the connection."""
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            with client:
                client.recv(1)
                client.sendall(b"-DENIED Redis is running in protected mode\r\n")


def test_a_dripping_link_is_cut_off(make: Any, own_server: EmbeddedServer) -> None:
    """A reply of one byte every 30 ms is cut off, because the deadline is the call's."""
    with Proxy(own_server.port) as proxy:
        room = make(proxy.url, **NO_BREAKER)
        put(room, "k", "x" * 50)

        def cut_off() -> float:
            proxy.drip = None
            assert until(lambda: room.cache.get("k") == "x" * 50, 10)
            proxy.drip = 0.03
            seconds, value = timed(lambda: room.cache.get("k"))
            assert value is None
            return seconds

        assert least(cut_off, CALL) < CALL
        proxy.drip = None
        assert until(lambda: room.cache.get("k") == "x" * 50, 10)


def test_a_server_that_sips_is_given_up(own_server: EmbeddedServer) -> None:
    """A server that takes a large batch piece by piece is given up, because the deadline is the call's."""
    batch = [("SET", "large", b"x" * 20_000_000)]
    with (
        Proxy(own_server.port) as proxy,
        Stillroom(Settings(redis_url=proxy.url, **NO_BREAKER)) as room,
    ):
        put(room, "k", 1)
        proxy.sip = 0.02

        def given_up() -> float:
            with Stopwatch() as watch, pytest.raises(RedisUnavailable) as caught:
                room.wire.execute(batch, CALL)
            assert caught.value.reason == "timeout"
            return watch.seconds

        assert least(given_up, CALL) < CALL
        proxy.sip = None
        assert until(lambda: room.cache.get("k") == 1, 10)


def test_a_late_write_is_refused(make: Any, own_server: EmbeddedServer) -> None:
    """A set that timed out and arrives after an invalidation is refused."""
    with Proxy(own_server.port) as proxy:
        slow, quick = make(proxy.url, **NO_BREAKER), make(own_server.url, **PATIENT)
        for n in range(20):
            key = f"k:{n}"
            put(slow, "warm", n)  # on a connection that the next one takes
            proxy.hold_requests()
            assert slow.cache.set(key, "old") is False
            assert proxy.held.wait(10)
            quick.cache.invalidate(key)
            proxy.let_go()
            with redis.Redis.from_url(proxy.url) as after:  # behind the held bytes
                after.ping()
            assert quick.cache.get(key) is None


def test_a_late_lease_makes_nobody_wait(make: Any, own_server: EmbeddedServer) -> None:
    """A lease request that timed out leaves no lease when it arrives after all."""
    with Proxy(own_server.port) as proxy, redis.Redis.from_url(own_server.url) as client:
        slow = make(proxy.url)
        slow.cache.set("warm", 1)
        keys = []
        for n in range(10):
            proxy.hold_requests()
            assert slow.cache.get_or_set(f"k:{n}", lambda: 1) == 1
            slow.wire.breaker.streak = 0
            keys.append(slow.keys.lease(b"k:%d" % n))
        proxy.let_go()
        assert client.exists(*keys) == 0


def test_a_request_shares_one_budget(make: Any, own_server: EmbeddedServer) -> None:
    """Fifty calls to a frozen server inside one request take 250 ms together."""
    room = make(own_server.url, **NO_BREAKER)
    put(room, "k", 1)
    own_server.freeze()

    def page() -> float:
        with Stopwatch() as watch, room.request():
            for _ in range(50):
                room.cache.get("k")
        assert watch.elapsed > 0.2
        return watch.seconds

    try:
        assert least(page, 0.35) < 0.35
    finally:
        own_server.thaw()


def test_what_follows_a_slow_look_has_what_is_left_of_the_call(
    make: Any, own_server: EmbeddedServer
) -> None:
    """The look of a miss waits for a busy server, its lease for one that takes no writes, in the time of one call.

    Giving back the lease, which may have been taken all the same, has a time of its own.
    """
    room = make(own_server.url, connect_timeout=1.2, command_timeout=1.2, call_timeout=1.3)
    assert room.cache.set("warm", 1)
    assert room.cache.get("warm") == 1  # with the counts that are due
    with redis.Redis.from_url(own_server.url) as client:
        client.client_pause(10_000, all=False)
        own_server.freeze()
        thawing = threading.Timer(1, own_server.thaw)
        thawing.start()
        began = time.monotonic()
        waited = room.cache.get_or_set("k", lambda: time.monotonic() - began)
        thawing.join()
        client.client_unpause()
    assert waited < 1.3 + 1.2 + 0.4  # else the lease had 1.2 s, too


def test_the_pool_is_bounded(own_server: EmbeddedServer) -> None:
    """With more threads than connections a thread without one falls back, and the breaker stays closed."""
    # The two that have a connection keep it until the last one has asked for one.
    slow = {"connect_timeout": 1.0, "command_timeout": 1.0, "call_timeout": 1.5}
    settings = Settings(redis_url=own_server.url, pool_size=2, **slow)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        put(room, "k", 1)
        own_server.freeze()

        def read(_: int) -> str:
            with pytest.raises(RedisUnavailable) as raised:
                room.cache.invalidate("k")
            return raised.value.reason

        reasons = at_once(6, read)
        own_server.thaw()
        assert sorted(reasons) == ["pool"] * 4 + ["timeout"] * 2
        assert room.wire.connections == 0
        assert room.cache.get("k") in (1, None)


def test_a_cancelled_task_leaves_no_pool_waiter_behind(own_server: EmbeddedServer) -> None:
    """A hundred tasks take turns on one connection, and a cancelled one leaves no waiter."""

    async def scenario() -> None:
        settings = Settings(**PATIENT | {"redis_url": own_server.url, "pool_size": 1})
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            await room.cache.set("k", 1)
            waiting = [asyncio.create_task(room.cache.get("k")) for _ in range(100)]
            await asyncio.sleep(0)
            for task in waiting[1::3]:
                task.cancel()
            done = await asyncio.gather(*waiting, return_exceptions=True)
            assert [d for d in done if not isinstance(d, asyncio.CancelledError)] == [1] * 67
            assert room.wire.connections <= 1

    asyncio.run(scenario())


def test_tasks_that_call_again_at_once_come_behind_those_that_wait(
    own_server: EmbeddedServer,
) -> None:
    """Tasks that call one after the other without a break, as many as connections, keep no other from its turn."""

    async def scenario() -> None:
        settings = Settings(**PATIENT | {"redis_url": own_server.url, "pool_size": 2})
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            await room.cache.set("k", 1)
            done: list[int] = []

            async def often() -> None:
                while not done:
                    await room.cache.get("k")

            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                for _ in range(2):
                    group.create_task(often())
                while room.wire.connections < 2:
                    await asyncio.sleep(0)
                done.append(await room.sessions.count("ann"))

    asyncio.run(scenario())


def test_connect_tries_five_times_and_says_so(make: Any, caplog: Any) -> None:
    """connect tries five times, logs each, and raises a clear error."""
    room = make(refused_url(), connect_delay=0.001)
    with caplog.at_level("WARNING"), pytest.raises(RedisUnavailable, match="refused"):
        room.connect()
    attempts = [record.message for record in caplog.records if "attempt" in record.message]
    assert [a.split(", ")[1].split(":")[0] for a in attempts] == [
        f"attempt {n} of 5" for n in range(1, 6)
    ]


def test_threads_that_call_again_at_once_let_others_have_their_turn(
    own_server: EmbeddedServer,
) -> None:
    """Threads that call one after the other without a break, as many as connections, keep no other waiting."""
    settings = Settings(**PATIENT | {"redis_url": own_server.url, "pool_size": 2})
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.cache.set("k", 1)
        end, done = time.monotonic() + 20, threading.Event()

        def often() -> None:
            while not done.is_set() and time.monotonic() < end:
                room.cache.get("k")

        threads = [threading.Thread(target=often) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert until(lambda: room.wire.connections == 2, 10)
        for _ in range(20):
            room.sessions.count("ann")
        in_time = time.monotonic() < end
        done.set()
        for thread in threads:
            thread.join()
        assert in_time


def one_at_a_time(server: EmbeddedServer) -> Any:
    """Open a room with one connection, for which a thread may wait longer than for an answer."""
    times = {"pool_size": 1, "pool_timeout": 20.0, "command_timeout": 1.0, "call_timeout": 30.0}
    return Stillroom(Settings(**PATIENT | times, redis_url=server.url), dispatch=NoDispatch())


def asking(room: Any, seconds: float) -> threading.Thread:
    """Begin a call that Redis answers after so many seconds."""

    def ask() -> None:
        with contextlib.suppress(RedisUnavailable):
            room.wire.execute([(b"BLPOP", b"nothing", b"%f" % seconds)], 30)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_a_connection_that_is_closed_leaves_its_place_to_who_waits(
    own_server: EmbeddedServer,
) -> None:
    """Who waits in line opens one of their own where the last that they waited for has died."""
    with one_at_a_time(own_server) as room:
        late = asking(room, 5)
        assert until(lambda: room.wire.connections == 1, 10)
        began = time.monotonic()
        assert room.wire.execute([(b"PING",)], 30) == [b"PONG"]
        assert time.monotonic() - began < 10
        late.join()


def test_what_is_handed_to_who_gives_up_just_then_is_not_lost(own_server: EmbeddedServer) -> None:
    """A connection that is on its way to a thread whose time ends meanwhile comes back."""
    with one_at_a_time(own_server) as room:
        room.wire.execute([(b"PING",)], 30)
        wire, gone = room.wire, threading.Event()

        class Line(deque[Any]):
            def popleft(self) -> Any:
                first = super().popleft()
                gone.wait(0.5)  # the lock that is held keeps the other from leaving before
                return first

        def wait() -> None:
            with pytest.raises(RedisUnavailable, match="in use"):
                wire._await_idle(time.monotonic() + 0.2)
            gone.set()

        link = wire._idle.get_nowait()
        wire._waiting = Line()
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert until(lambda: len(wire._waiting), 10)
        wire._give_back(link)
        waiting.join()
        assert wire._idle.qsize() == 1


def test_who_has_waited_in_line_has_all_the_time_for_an_answer(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread has waited for a connection is no part of what Redis may take to answer."""
    monkeypatch.setattr(sync, "_FLOODS", ())  # as in a process without a handler of SIGALRM
    with one_at_a_time(own_server) as room:
        room.wire.execute([(b"PING",)], 30)
        first = asking(room, 0.7)
        assert until(lambda: not room.wire._idle.qsize(), 10)
        assert room.wire.execute([(b"BLPOP", b"nothing", b"0.6")], 30) == [None]
        first.join()


def test_a_connect_that_is_given_up_keeps_no_loop_from_its_end(caplog: Any) -> None:
    """An awaited connect that is cancelled tries no further, and its event loop ends without waiting for it."""

    async def give_up() -> None:
        async with AsyncStillroom(refused_url(), dispatch=NoDispatch(), connect_delay=5) as room:
            connecting = asyncio.create_task(room.connect())
            while "attempt 1" not in caplog.text:
                await asyncio.sleep(0.01)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting

    began = time.monotonic()
    with caplog.at_level("WARNING"):
        asyncio.run(give_up())
    assert "attempt 2" not in caplog.text
    assert time.monotonic() - began < 5


def test_connect_waits_for_a_server_that_comes_up(make: Any, own_server: EmbeddedServer) -> None:
    """connect waits for a server that comes up after the first attempts."""
    own_server.kill()
    room = make(own_server.url, **PATIENT, connect_delay=0.05, connect_attempts=100)
    starting = threading.Thread(target=own_server.restart)
    starting.start()
    room.connect()
    starting.join()
    assert room.cache.set("k", 1)


def test_a_wrong_password_is_told_at_once(make: Any, caplog: Any) -> None:
    """A wrong password raises at the first attempt, without the password, and is not told in the log as well."""
    with EmbeddedServer(options={"requirepass": "right"}) as server:
        room = make(server.url, **PATIENT, redis_password="wrong-canary", connect_delay=60)
        with pytest.raises(RedisUnavailable, match="auth") as caught:
            room.connect()  # a second attempt would come after a minute
        assert "canary" not in str(caught.value)
        assert "attempt" not in caplog.text
        missing = make(server.url, **PATIENT, connect_delay=60)
        with pytest.raises(RedisUnavailable, match=r"\(auth\)"):
            missing.connect()
        right = make(server.url, **PATIENT, redis_password="right")
        right.connect()
        assert right.cache.set("k", 1)


def test_an_acl_user_and_a_database_in_the_url(make: Any) -> None:
    """A URL with an ACL user and a database means what it means in redis-py."""
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        client.acl_setuser(
            "app", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all"]
        )
        room = make(server.url.replace("redis://", "redis://app:secret@") + "/3", **PATIENT)
        assert room.cache.set("k", 1)
        with redis.Redis.from_url(server.url, db=3) as third:
            assert third.exists(room.keys.entry(b"k"))


def test_a_refusing_server_degrades_reads_and_fails_invalidations(make: Any) -> None:
    """Out of memory reads go on, set returns False and invalidations work; read-only they raise the
    server's word.
    """
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        room = make(server.url, **PATIENT)
        room.cache.set("k", 1)
        client.config_set("maxmemory", 1)
        assert room.cache.get("k") == 1
        assert room.cache.set("k", 2) is False
        assert room.cache.get_or_set("new", lambda: 3) == 3
        room.cache.invalidate_by_tag("t")
        assert room.cache.invalidate("k") == 1  # deleting needs no memory
        client.config_set("maxmemory", 0)
        client.replicaof("127.0.0.1", 1)
        assert room.cache.set("k", 2) is False
        with pytest.raises(RedisUnavailable, match="readonly"):
            room.cache.invalidate_by_tag("t")
        assert not room.wire.breaker.is_open
        client.replicaof("NO", "ONE")
        assert room.cache.set("k", 2)


def test_the_servers_clock_may_step(make: Any, own_server: EmbeddedServer) -> None:
    """A clock that stepped is read again, and writes and loads are not refused for it."""
    room = make(own_server.url, **PATIENT)
    room.cache.set("warm", 1)
    for step in (-3_600, 3_600):
        server = room.wire.server
        misjudge(server, step)
        assert room.cache.set("k", step)
        misjudge(server, step)
        assert room.cache.get_or_set(f"l:{step}", lambda: 1) == 1
        room.cache.invalidate(f"l:{step}")


# Interrupted calls


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_signal_in_the_middle_never_mixes_up_replies(
    own_server: EmbeddedServer, is_full: bool
) -> None:
    """40,000 reads (in short 2,000) interrupted by signals at random instants return no wrong value and lose no
    connection.
    """
    reads = 40_000 if is_full else 2_000
    program = Path(__file__).with_name("interrupted.py")
    done = run_to_end([sys.executable, program, own_server.url, str(reads)], timeout=300)
    assert done.returncode == 0, done.stderr
    wrong, right, connections = map(int, done.stdout.split())
    assert wrong == 0
    assert right > reads // 10
    assert connections <= 3


def test_a_cancellation_in_the_middle_never_mixes_up_replies(
    own_server: EmbeddedServer, is_full: bool
) -> None:
    """20,000 reads (in short 5,000) cancelled at random instants among others return no wrong value."""
    rounds = 2_000 if is_full else 500

    async def scenario() -> tuple[int, int, int]:
        async with AsyncStillroom(
            Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch()
        ) as room:
            for n in range(10):
                await room.cache.set(f"k:{n}", n, ttl=3600)
            wrong = cancelled = right = 0
            for round_ in range(rounds):
                tasks = [asyncio.create_task(room.cache.get(f"k:{n}")) for n in range(10)]
                for _ in range(round_ % 7):
                    await asyncio.sleep(0)
                for task in tasks[:: 1 + round_ % 3]:
                    cancelled += task.cancel()
                for n, value in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
                    if not isinstance(value, asyncio.CancelledError):
                        right += value == n
                        wrong += value != n
            assert room.wire.connections <= 10
            return wrong, cancelled, right

    wrong, cancelled, right = asyncio.run(scenario())
    assert wrong == 0
    assert min(cancelled, right) > 2.5 * rounds  # of ten in each


def test_an_unread_reply_is_never_the_next_ones(own_server: EmbeddedServer) -> None:
    """A call interrupted between send and receive closes its connection, so that no other reads its reply."""
    with Stillroom(Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch()) as room:
        room.cache.set("a", "A")
        room.cache.set("b", "B")
        link = room.wire._idle.get_nowait()

        class Broken:
            def feed(self, *_: Any) -> None:
                raise KeyboardInterrupt

        link._reader = Broken()
        room.wire._idle.put(link)
        with pytest.raises(KeyboardInterrupt):
            room.cache.get("a")
        assert room.wire.connections == 0
        assert room.cache.get("b") == "B"


def test_a_reply_too_many_is_never_the_next_ones(make: Any, own_server: EmbeddedServer) -> None:
    """A server that answers a call twice costs that call its connection, and no other gets the second answer."""
    with Proxy(own_server.port) as proxy:
        room = make(proxy.url, **PATIENT)
        room.cache.set("a", "A")
        room.cache.set("b", "B")
        assert room.cache.get("a") == "A"
        proxy.says = b"*2\r\n", b"*2\r\n$-1\r\n$-1\r\n*2\r\n"
        assert room.cache.get("a") is None
        proxy.says = b"", b""
        assert room.cache.get("b") == "B"


# Processes, threads, greenlets


def test_a_forked_child_has_connections_of_its_own(own_server: EmbeddedServer) -> None:
    """A forked child talks on connections of its own, also when a call was under way."""
    with Stillroom(Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch()) as room:
        for n in range(5):
            room.cache.set(f"k:{n}", n)
        children = []
        for n in range(4):
            pid = os.fork()
            if pid == 0:
                ok = all(room.cache.get(f"k:{n}") == n for _ in range(500))
                os._exit(0 if ok else 1)
            children.append(pid)
        assert all(room.cache.get("k:4") == 4 for _ in range(500))
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4


def test_many_threads_share_the_wire(own_server: EmbeddedServer) -> None:
    """Sixteen threads read their own values on no more connections than threads."""
    with Stillroom(Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch()) as room:
        wrong: list[Any] = []

        def work(n: int) -> None:
            room.cache.set(f"k:{n}", n)
            wrong.extend(v for _ in range(300) if (v := room.cache.get(f"k:{n}")) != n)

        at_once(16, work)
        assert wrong == []
        assert room.wire.connections <= 16


def test_fifty_outages_leave_no_file_descriptors(own_server: EmbeddedServer) -> None:
    """After fifty faults the process has as many open files as before."""
    with Stillroom(
        Settings(redis_url=own_server.url, breaker_failures=1_000, breaker_calls=10_000),
        dispatch=NoDispatch(),
    ) as room:
        room.cache.set("k", 1)
        before = psutil.Process().num_fds()
        with redis.Redis.from_url(own_server.url) as client:
            for _ in range(50):
                client.client_kill_filter(_type="normal", skipme=True)
                room.cache.get("k")
                own_server.freeze()
                room.cache.get("k")
                own_server.thaw()
        assert room.cache.get("k") == 1
        assert psutil.Process().num_fds() <= before + 1


GEVENT = """
from gevent import monkey; monkey.patch_all()
import sys, time, gevent
from stillroom import NoDispatch, Settings, Stillroom
patient = {"connect_timeout": 5, "command_timeout": 5, "call_timeout": 5}
room = Stillroom(Settings(redis_url=sys.argv[1], **patient), dispatch=NoDispatch())
def work(n):
    room.cache.set(f"k:{n}", n)
    return all(room.cache.get(f"k:{n}") == n for _ in range(100))
jobs = [gevent.spawn(work, n) for n in range(50)]
ticks = gevent.spawn(lambda: [time.sleep(0.001) for _ in range(10)])
gevent.joinall([*jobs, ticks], raise_error=True)
assert all(job.value for job in jobs), "wrong value"
slow = [gevent.spawn(room.cache.get_or_set, "one", lambda: time.sleep(0.05) or "v") for _ in range(20)]
gevent.joinall(slow, raise_error=True)
assert {job.value for job in slow} == {"v"}
assert room.stats.counts["loads"] <= 1, room.stats.counts
print("connections", room.wire.connections)
"""


def test_greenlets_share_the_wire(own_server: EmbeddedServer) -> None:
    """Under gevent each greenlet has a connection while its batch lasts, and none blocks the hub."""
    done = run_to_end([sys.executable, "-c", GEVENT, own_server.url], timeout=60)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout.split()[1]) <= 64


def test_a_python_without_poll_has_connections(
    make: Any, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A room works where `select` has no `poll`, as eventlet leaves it, and sees that a connection has ended."""
    left = SimpleNamespace(select=select.select, POLLIN=select.POLLIN)
    monkeypatch.setattr("stillroom.readable.select", left)
    room = make(own_server.url, **PATIENT)
    room.cache.set("k", 1)
    assert room.cache.get("k") == 1
    with redis.Redis.from_url(own_server.url) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    assert room.cache.get("k") == 1
