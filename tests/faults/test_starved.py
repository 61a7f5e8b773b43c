"""No thread, no file descriptor, no turn in the event loop: our own want is not Redis' outage, and nothing
hangs."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from stillroom import (
    AUTH,
    DEFAULT,
    AsyncStillroom,
    NoDispatch,
    RedisUnavailable,
    Settings,
    Stillroom,
    background,
)
from stillroom.cache.orders import Load
from stillroom.dispatch import RECLAIM_TASK, CeleryDispatch, RefreshOrder
from stillroom.embedded import EmbeddedServer
from stillroom.health.system import SystemWatch
from stillroom.keys import Keys
from stillroom.operation import Operation
from stillroom.web.wsgi_health import HealthWSGI
from stillroom.wire import aio_link, idle
from stillroom.wire.idle import OWN_LIMIT_S, IdleTimeout, Lateness
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room
from tests.support.lag import least

FEW = {"pool_size": 8}  # connections, so that a burst waits in line


# The event loop


TASKS, WORK = 200, 0.004  # seconds of each task


def paces(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield deadlines and the seconds of a task, each time more of both, which a busier machine needs.

    The tasks keep their loop busy for longer than a call may wait for Redis, at each pace, and for less than a loop
    may be late.
    """
    for times in (1, 3, 9):
        deadlines = {"connect_timeout": 0.1, "command_timeout": 0.6, "call_timeout": 0.7}
        deadlines["pool_timeout"] = 0.02
        for module in (idle, aio_link):
            monkeypatch.setattr(module, "OWN_LIMIT_S", times * OWN_LIMIT_S)
        yield FEW | {name: times * seconds for name, seconds in deadlines.items()}, times * WORK


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_burst_of_tasks_waits_in_line(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    """Hundreds of reads at once over eight connections all get the value, and the breaker stays closed."""

    async def read(room: AsyncStillroom, work: float) -> int | None:
        time.sleep(work)
        return await room.cache.get("k", int)

    async def burst(slow: dict[str, Any], work: float) -> bool:
        settings = Settings(redis_url=server.url, **slow)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            assert await until_stored(room)
            if warm:
                await asyncio.gather(*(room.cache.get("k", int) for _ in range(FEW["pool_size"])))
            found = await asyncio.gather(*(read(room, work) for _ in range(TASKS)))
            return found.count(7) == TASKS and not room.wire.breaker.is_open

    assert any(asyncio.run(burst(slow, work)) for slow, work in paces(monkeypatch))


async def stored(room: AsyncStillroom, number: int) -> bool:
    return await room.cache.set(f"k{number}", number)


async def invalidated(room: AsyncStillroom, number: int) -> bool:
    try:
        await room.cache.invalidate_by_tag(f"t{number % 5}")
    except RedisUnavailable:
        return False
    return True


async def counted(room: AsyncStillroom, number: int) -> bool:
    decision = await room.limits.check(f"2001:db8:0:{number:x}::1", [AUTH, DEFAULT])
    return decision.degraded == ""


@pytest.mark.parametrize("act", [stored, invalidated, counted])
def test_a_burst_finds_scripts_that_the_server_has_lost(
    server: EmbeddedServer,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[AsyncStillroom, int], Awaitable[bool]],
) -> None:
    """Hundreds of acts at once on a server that has just lost its scripts are all done by Redis."""

    async def worked(room: AsyncStillroom, number: int, work: float) -> bool:
        time.sleep(work)
        return await act(room, number)

    async def burst(slow: dict[str, Any], work: float) -> bool:
        client.flushall()
        settings = Settings(redis_url=server.url, **slow)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            assert await until_stored(room)
            client.script_flush()
            done = await asyncio.gather(*(worked(room, number, work) for number in range(TASKS)))
            return sum(done) == TASKS and not room.wire.breaker.is_open

    assert any(asyncio.run(burst(slow, work)) for slow, work in paces(monkeypatch))


async def until_stored(room: AsyncStillroom) -> bool:
    for _ in range(50):
        if await room.cache.set("k", 7):
            return True
    return False


def test_a_line_before_a_frozen_server_ends_in_time(own_server: EmbeddedServer) -> None:
    """A queue of reads before a frozen server ends in time: only the loop's own work moves a deadline."""

    async def stand_in_line() -> float:
        settings = Settings(redis_url=own_server.url, breaker_failures=10_000, **FEW)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            assert await until_stored(room)
            own_server.freeze()
            try:
                began = time.monotonic()
                found = await asyncio.gather(*(room.cache.get("k", int) for _ in range(200)))
                took = time.monotonic() - began
            finally:
                own_server.thaw()
            assert found == [None] * 200
            return took

    assert least(lambda: asyncio.run(stand_in_line()), 2.0) < 2.0


def test_a_loop_that_was_held_up_reads_what_has_arrived(server: EmbeddedServer) -> None:
    """A task that blocks the loop for half a second costs others their time, not their value, nor Redis its
    name."""

    async def hold_up() -> None:
        async with AsyncStillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:
            assert await until_stored(room)
            failures = len(room.wire.breaker._failures)
            reads = [asyncio.create_task(room.cache.get("k", int)) for _ in range(20)]
            await asyncio.sleep(0)  # they have asked
            time.sleep(0.5)
            assert await asyncio.gather(*reads) == [7] * 20
            assert len(room.wire.breaker._failures) == failures

    asyncio.run(hold_up())


def test_a_call_does_not_pay_for_what_its_loop_does_between_its_steps(
    server: EmbeddedServer,
) -> None:
    """A call whose loop stands still before its first batch, or between two of them, still has time for each."""

    def stopped() -> Operation[Any]:
        for _ in range(2):
            time.sleep(0.4)  # as a collection of garbage takes in a large process
            (pong,) = yield [(b"PING",)]
        return pong

    async def call() -> Any:
        async with AsyncStillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:
            assert await until_stored(room)
            return await room.state.run(stopped())

    assert asyncio.run(call()) == b"PONG"


def test_a_hit_that_its_loop_was_late_for_may_still_ask(server: EmbeddedServer) -> None:
    """Where the clock has moved, a loop that stands still behind its question has time to ask for the marks."""
    settings = Settings(redis_url=server.url)

    async def stand_still(other: Stillroom) -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            other.cache.set("k", 7)
            assert [await room.cache.get("k", int) for _ in range(2)] == [7, 7]
            other.cache.invalidate_by_tag("another")
            room._cache_body._judges._riding = 0  # marks are asked for behind the read
            read = asyncio.create_task(room.cache.get("k", int))
            await asyncio.sleep(0)  # it has asked
            time.sleep(2 * settings.call_timeout)
            assert await read == 7

    with Stillroom(settings, dispatch=NoDispatch()) as other:
        asyncio.run(stand_still(other))


def test_a_loop_that_stood_still_serves_nothing_whose_marks_are_gone(
    server: EmbeddedServer,
) -> None:
    """What a loop has read before it stood still for longer than a lease is judged by no later marks.

    A pattern that names it may have been dropped meanwhile.
    """
    short = {"lease": 0.1, "refresh_lease": 0.1, "lease_limit": 0.1}
    settings = Settings(redis_url=server.url, **short)

    async def stand_still(other: Stillroom) -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            other.cache.set("k", 7)
            other.cache.invalidate_by_tag("another")
            for _ in range(50):
                if await room.cache.get("k", int) == 7:
                    break
            else:
                pytest.fail("the entry was not read")
            other.cache.invalidate_by_pattern("k*")
            room._cache_body._judges._riding = 0  # marks are asked for behind the read
            read = asyncio.create_task(room.cache.get("k", int))
            await asyncio.sleep(0)  # it has asked
            until(lambda: other.cache.reclaim()["patterns_dropped"] == 1, "the pattern is dropped")
            time.sleep(settings.call_timeout + settings.lease_limit)
            assert await read is None

    patient = Settings(**PATIENT | short | {"redis_url": server.url})
    with Stillroom(patient, dispatch=NoDispatch()) as other:
        asyncio.run(stand_still(other))


def test_only_the_loops_own_time_moves_a_deadline() -> None:
    """A wait in an idle loop ends on time, and one in a working loop gets that time on top."""

    async def wait(work: float) -> tuple[float, float]:
        began = time.monotonic()
        try:
            async with IdleTimeout(Lateness(), began + 0.2) as waiting:
                await asyncio.sleep(0)
                time.sleep(work)
                await asyncio.Event().wait()
        except TimeoutError:
            pass
        return time.monotonic() - began, waiting.deadline - began

    def on_time() -> float:
        took, _ = asyncio.run(wait(0.0))
        assert took > 0.19
        return took

    assert least(on_time, 0.4) < 0.4
    took, deadline = asyncio.run(wait(0.6))
    assert took > 0.75
    assert deadline > 0.75


# Threads


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let no thread start, as with a limit of processes that is reached."""
    start, on = threading.Thread.start, threading.Event()

    def refuse(thread: threading.Thread) -> None:
        if on.is_set():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    yield on
    on.clear()


def test_an_async_loader_goes_on_after_a_moment_without_threads(
    server: EmbeddedServer, no_threads: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An async loader that could not start its thread fails once, and the next load works."""
    monkeypatch.setattr(background, "_background", None)
    settings = Settings(redis_url=server.url)
    source = AsyncStillroom(settings, dispatch=NoDispatch())

    @source.cache.cached("a:{id}", name="a", ttl=60)
    async def a(id: int) -> int:
        return id

    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.cache.loaders.adopt(source.cache.loaders)
        no_threads.set()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            room.cache.load(Load(loader="a", args={"id": 1}))
        no_threads.clear()
        done: list[Any] = []
        load = threading.Thread(
            target=lambda: done.append(room.cache.load(Load(loader="a", args={"id": 2}))),
            daemon=True,
        )
        load.start()
        load.join(10)
        assert done


def test_nothing_that_promises_not_to_raise_does(
    server: EmbeddedServer, no_threads: threading.Event
) -> None:
    """Without threads orders are given back, wakes are left to beat, health answers, and the room closes."""
    settings = Settings(redis_url=server.url)
    dispatch = CeleryDispatch(settings, Keys(settings.namespace))
    order = RefreshOrder(loader="x", args={}, key="k", token="0" * 16)
    given_back: list[int] = []
    no_threads.set()
    dispatch.send([order], lambda: given_back.append(1))
    assert given_back == [1]
    assert not dispatch.ready  # nobody takes a lease for nothing
    dispatch._down_until = 0.0
    dispatch.wake(RECLAIM_TASK)
    dispatch.close()
    with Stillroom(settings) as room:

        @room.cache.cached("p:{id}", ttl=0.001, swr=60)
        def p(id: int) -> int:
            return id

        assert p(1) == 1
        until(lambda: room.cache.get_entry("p:1").freshness.value == "stale", "it to be stale")
        assert p(1) == 1  # stale, and nobody to refresh it
        room.cache.invalidate_by_tag("t")
        room.tasks.invalidate_tags("t")
        statuses: list[str] = []
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/health", "REMOTE_ADDR": "127.0.0.1"}
        body = HealthWSGI(room)(environ, lambda status, headers: statuses.append(status))
        assert b"".join(body)
        assert statuses[0].startswith(("200", "503"))
    no_threads.clear()
    dispatch.wake(RECLAIM_TASK)
    dispatch.close()


def test_an_event_loop_is_not_held_up_by_orders_that_no_thread_takes(
    server: EmbeddedServer, no_threads: threading.Event
) -> None:
    """Orders that find no thread wait for one in an event loop, because giving them back is a round trip."""
    settings = Settings(redis_url=server.url)
    dispatch = CeleryDispatch(settings, Keys(settings.namespace))
    order = RefreshOrder(loader="x", args={}, key="k", token="0" * 16)
    given_back: list[str] = []

    async def send() -> None:
        dispatch.send([order], lambda: given_back.append(threading.current_thread().name))

    no_threads.set()
    asyncio.run(send())
    assert given_back == []
    no_threads.clear()
    dispatch._down_until = 0.0
    dispatch.wake(RECLAIM_TASK)
    until(lambda: given_back == ["stillroom dispatch"], "the thread to give it back")
    dispatch.close()


def test_a_lock_without_a_thread_is_not_taken_and_the_next_one_is_renewed(
    server: EmbeddedServer, no_threads: threading.Event
) -> None:
    """A lock that no thread could renew is given back at once; the one after it is renewed beyond its lease."""
    with Stillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:
        no_threads.set()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            room.lock("import", lease=60).acquire()
        no_threads.clear()
        with room.lock("import", lease=0.5, wait=0) as held:
            lease = held._until
            until(lambda: held._until > lease, "a renewal")
            assert held.is_held


def test_a_closing_room_delivers_without_a_thread(
    own_server: EmbeddedServer, no_threads: threading.Event
) -> None:
    """An AsyncStillroom that closes without a free thread delivers what was deferred, as a Stillroom does."""
    settings = Settings(redis_url=own_server.url)

    async def defer_and_close() -> None:
        room = AsyncStillroom(settings, dispatch=NoDispatch())
        await room.cache.set("k", "old")
        own_server.freeze()
        await room.cache.invalidate("k", defer=True)
        own_server.thaw()
        no_threads.set()
        await room.close()
        no_threads.clear()

    asyncio.run(defer_and_close())
    with Stillroom(settings, dispatch=NoDispatch()) as other:
        assert other.cache.get("k") is None


# File descriptors


@contextmanager
def without_files() -> Iterator[None]:
    """Open as many files as may be open."""
    gc.collect()  # what earlier tests have left gives back no descriptor meanwhile
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))
    held = []
    try:
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            yield
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_health_answers_without_a_file_descriptor(server: EmbeddedServer) -> None:
    """Health reports without a file descriptor; only the machine is unknown."""
    pytest.importorskip("psutil")
    with Stillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:
        room.health.check()
        with without_files():
            report = room.health.check()
            assert SystemWatch().look() is None or report.system is not None
        assert report.status in ("pass", "warn", "fail")
        assert room.health.check().system is not None


@pytest.mark.parametrize("face", FACES)
def test_without_a_file_descriptor_redis_is_not_said_to_be_away(
    server: EmbeddedServer, face: str
) -> None:
    """A process without a descriptor for a connection blames no server, and goes on as soon as it has one."""
    with open_room(face, Settings(redis_url=server.url), NoDispatch()) as room:
        with without_files():
            for _ in range(10):
                assert room.cache.get("k") is None
            with pytest.raises(RedisUnavailable, match=r"pool.*Too many open files"):
                room.cache.invalidate("k")
            assert not room.wire.breaker.is_open
        until(lambda: room.cache.set("k", 1), "a descriptor for a connection")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_first_call_in_a_busy_loop_finds_the_server_by_its_name(
    own_server: EmbeddedServer, host: str
) -> None:
    """A loop that is busy while the server's name is looked up has not waited for the server, and reads from it."""
    url = own_server.url.replace("127.0.0.1", host)
    with Stillroom(Settings(redis_url=own_server.url), dispatch=NoDispatch()) as other:
        other.cache.set("k", 1)

    async def first_call() -> Any:
        async with AsyncStillroom(Settings(redis_url=url), dispatch=NoDispatch()) as room:
            first = asyncio.create_task(room.cache.get("k"))
            for _ in range(3):  # a lookup, a connection and a handshake end in rounds of the loop
                await asyncio.sleep(0)
                time.sleep(0.3)
            return await first

    assert asyncio.run(first_call()) == 1
