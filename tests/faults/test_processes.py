"""Forks, threads that cannot start, event loops and closed rooms leave each process in order."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest

import redis
from stillroom import AsyncStillroom, InlineDispatch, Limit, NoDispatch, Settings, Stillroom
from stillroom.dispatch import CeleryDispatch, RefreshOrder
from stillroom.embedded import EmbeddedServer
from stillroom.keys import Keys
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.threads import at_once

ORDER = RefreshOrder(loader="x", args={}, key="k", token="0" * 16)
QUEUE = "stillroom.refresh"


def in_child(act: Callable[[], bool]) -> bool:
    """Return whether a condition is true in a forked child, which does not hang: half a minute is enough."""
    pid = os.fork()
    if pid == 0:
        threading.Timer(30, lambda: os._exit(2)).start()
        os._exit(0 if act() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_counts_only_what_it_did(own_server: EmbeddedServer) -> None:
    """A forked child counts only its own acts."""
    with Stillroom(Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch()) as room:
        room.stats.due = float("inf")
        room.cache.set("k", 1)
        for _ in range(5):
            room.cache.get("k")
        assert in_child(lambda: room.cache.get("k") == 1 and room.stats.counts["hits"] == 1)
        assert room.stats.counts["hits"] == 5


def test_a_child_gives_back_no_place_of_its_parent(own_server: EmbeddedServer) -> None:
    """A child that is forked while its parent holds a place, and leaves the block, gives back nothing."""
    one = Limit("one", 1, 60, in_flight=True)
    with Stillroom(Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch()) as room:

        def leave() -> bool:
            holding.__exit__(None, None, None)
            return not room.limits.reserve("192.0.2.1", [one])

        holding = room.limits.hold("192.0.2.1", [one])
        with holding as held:
            assert held
            assert in_child(leave)
        assert room.limits.reserve("192.0.2.1", [one])


AT_THE_END = textwrap.dedent("""
    import sys
    from stillroom import Freshness, Settings, Stillroom
    room = Stillroom(Settings(redis_url=sys.argv[1], session_peppers="x" * 40))

    @room.cache.cached("one", ttl=0.001, swr=60)
    def one() -> int:
        return 1

    class Ends:
        def __del__(self):
            assert sys.is_finalizing()
            print(one(), room.sessions.create("ann").user_id, bool(room.health.check()), flush=True)

    one(), room.sessions.create("ann"), room.health.check()
    while room.cache.get_entry("one").freshness is Freshness.FRESH:
        pass
    kept = Ends()
    room.dispatch.close()
""")


def test_what_is_collected_at_the_very_end_waits_for_no_thread(own_server: EmbeddedServer) -> None:
    """A call from the `__del__` of what lives until the end starts no thread there: Python would wait for ever."""
    command = [sys.executable, "-c", AT_THE_END, own_server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1 ann True\n", done.stderr


def test_a_fork_while_marks_are_learned_does_not_lock_the_child(own_server: EmbeddedServer) -> None:
    """A fork while another thread learns marks does not lock the child."""
    with Stillroom(Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch()) as room:
        room.cache.set("k", 1)
        with room._cache_body._judges._lock:
            assert in_child(lambda: room.cache.get("k") == 1)


def test_a_fork_while_orders_are_queued_does_not_lock_the_child(own_server: EmbeddedServer) -> None:
    """A fork while orders are queued gives the child its own queue and connection, and repeats no order."""
    dispatch = CeleryDispatch(Settings(**PATIENT, redis_url=own_server.url), Keys("stillroom"))

    def queued() -> int:
        with redis.Redis.from_url(own_server.url) as client:
            return int(client.llen(QUEUE))

    def child() -> bool:
        dispatch.send([ORDER], lambda: None)
        until(queued, "the child's order")  # closing would wait for it for half a second
        dispatch.close()
        return True

    with dispatch._lock:
        assert in_child(child)
    assert queued() == 1


def test_closed_rooms_leave_nothing_behind(own_server: EmbeddedServer) -> None:
    """Ten closed rooms that each sent an order leave no thread, connection or open file."""
    with redis.Redis.from_url(own_server.url) as client:
        client.ping()

        def use_one() -> None:
            room = Stillroom(Settings(**PATIENT, redis_url=own_server.url))
            room.cache.set("k", 1)
            room.dispatch.send([ORDER], lambda: None)
            room.close()

        use_one()
        before = threading.active_count(), psutil.Process().num_fds()
        for _ in range(10):
            use_one()
        # A close waits half a second at most; whoever is slower hangs up by itself.
        until(lambda: threading.active_count() <= before[0], "the threads to end")
        until(lambda: gc.collect() >= 0 and psutil.Process().num_fds() <= before[1], "the files")
        assert client.llen(QUEUE) == 11


def test_twenty_first_orders_start_one_thread(own_server: EmbeddedServer) -> None:
    """Twenty requests that first find something stale start one thread."""
    dispatch = CeleryDispatch(Settings(**PATIENT, redis_url=own_server.url), Keys("stillroom"))
    before = set(threading.enumerate())
    at_once(20, lambda _: dispatch.send([ORDER], lambda: None))
    assert [t.name for t in set(threading.enumerate()) - before] == ["stillroom dispatch"]
    dispatch.close()


def test_a_queue_nobody_takes_from_is_not_filled_further(
    own_server: EmbeddedServer, caplog: Any
) -> None:
    """Without workers a queue is filled up to a bound, and further orders are given back."""
    dispatch = CeleryDispatch(Settings(**PATIENT, redis_url=own_server.url), Keys("stillroom"))
    dispatch.queue_limit = 3
    given_back = threading.Event()
    with redis.Redis.from_url(own_server.url) as client:
        for n in range(3):
            dispatch.send([ORDER], given_back.set)
            until(lambda n=n: client.llen(QUEUE) == n + 1, "the task")
        assert not given_back.is_set()
        dispatch.send([ORDER], given_back.set)
        assert given_back.wait(10)
        dispatch.close()
        assert client.llen(QUEUE) == 3
    assert "3 tasks wait and no worker takes them" in caplog.text


def test_a_breaker_whose_thread_cannot_start_stays_closed(
    own_server: EmbeddedServer, monkeypatch: Any
) -> None:
    """A breaker whose thread cannot start stays closed, because nobody would close it again."""
    with Stillroom(Settings(redis_url=own_server.url), dispatch=NoDispatch()) as room:
        room.cache.set("k", 1)
        own_server.kill()
        with monkeypatch.context() as patched:

            def refuse(_: Any) -> None:
                raise RuntimeError("can't start new thread")

            patched.setattr(threading.Thread, "start", refuse)
            for _ in range(10):
                assert room.cache.get("k") is None
        assert not room.wire.breaker.is_open
        own_server.restart()
        assert room.cache.set("k", 2)


def test_a_closed_room_can_be_used_again(own_server: EmbeddedServer) -> None:
    """A closed room can be used again, also after an outage, and recovers from the next one."""
    room = Stillroom(Settings(redis_url=own_server.url), dispatch=InlineDispatch())
    room.cache.set("k", 1)
    for _ in range(2):
        own_server.kill()
        while not room.wire.breaker.is_open:
            room.cache.get("k")
        room.close()
        own_server.restart()
        recovered = threading.Event()
        room.wire.breaker.recovered.append(recovered.set)
        assert room.cache.set("k", 2) or recovered.wait(5)
        until(lambda: room.cache.set("k", 2) and room.cache.get("k") == 2, "the value")
    room.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_one_async_room_serves_several_event_loops(own_server: EmbeddedServer) -> None:
    """One async room serves two event loops at once and one after the other, each with its own connections."""
    room = AsyncStillroom(Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch())
    wrong: list[Any] = []

    async def work(n: int) -> None:
        await room.cache.set(f"k:{n}", n)
        values = [await room.cache.get(f"k:{n}") for _ in range(300)]
        wrong.extend(value for value in values if value != n)
        await room.close()

    at_once(4, lambda n: asyncio.run(work(n)))
    asyncio.run(work(9))
    assert wrong == []
    assert room.wire.connections == 0


def test_a_unix_socket_serves_cache_and_broker(tmp_path: Any) -> None:
    """A Unix socket serves cache and broker by one setting, though kombu spells it differently."""
    path = f"{tmp_path}/redis.sock"
    options = {"unixsocket": path, "requirepass": "p#/ss"}
    with EmbeddedServer(options=options):
        place = {"redis_url": f"unix://{path}?db=1", "redis_password": "p#/ss"}
        settings = Settings(**PATIENT | place)
        dispatch = CeleryDispatch(settings, Keys("stillroom"))
        with Stillroom(settings, dispatch=dispatch) as room:
            assert room.cache.set("k", 1)
            dispatch.send([ORDER], lambda: None)
            with redis.Redis(unix_socket_path=path, db=1, password="p#/ss") as client:
                until(lambda: client.llen(QUEUE) == 1, "the order")


def test_a_user_who_may_not_load_scripts_is_told_so() -> None:
    """A user without the right to load scripts gets the error noperm, which an operator can mend, not noscript."""
    from stillroom import RedisUnavailable

    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        rules = ["+@all", "-script|load"]
        client.acl_setuser("app", enabled=True, nopass=True, keys=["*"], commands=rules)
        url = server.url.replace("redis://", "redis://app:x@")
        with Stillroom(Settings(redis_url=url), dispatch=NoDispatch()) as room:
            with pytest.raises(RedisUnavailable, match="noperm"):
                room.cache.invalidate_by_tag("t")


def test_a_child_that_goes_on_with_an_event_loop_has_connections_of_its_own(
    own_server: EmbeddedServer,
) -> None:
    """A forked child that goes on with its parent's event loop uses none of the parent's connections."""
    loop = asyncio.new_event_loop()
    room = AsyncStillroom(Settings(redis_url=own_server.url), dispatch=NoDispatch())
    try:
        loop.run_until_complete(room.cache.set("k", 1))
        assert room.wire.connections == 1
        assert in_child(lambda: room.wire.connections == 0)
        assert loop.run_until_complete(room.cache.get("k")) == 1
    finally:
        loop.run_until_complete(room.close())
        loop.close()


@pytest.mark.parametrize("begins_anew", ["in a child", "after close"])
def test_who_begins_anew_reports_no_old_outage(
    own_server: EmbeddedServer, begins_anew: str
) -> None:
    """A process that was forked during an outage, and a room that was closed in one, report none afterwards."""
    settings = Settings(redis_url=own_server.url, breaker_failures=3)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.cache.set("k", 1)
        own_server.freeze()
        for _ in range(10):
            room.cache.get("k")
        assert room.wire.breaker.is_open

        def tells_of_none() -> bool:
            return room.wire.breaker.down_since is None

        if begins_anew == "in a child":
            assert in_child(tells_of_none)
        own_server.thaw()
        room.close()
        assert tells_of_none()


FORKING = textwrap.dedent("""
    import os, sys, threading, time
    from stillroom import Settings
    from stillroom.dispatch import CeleryDispatch, RefreshOrder
    from stillroom.keys import Keys

    class Slow:
        def find_spec(self, name, *_):
            if name == "celery":
                is_importing.set()
                has_forked.wait(0.5)

    is_importing, has_forked = threading.Event(), threading.Event()
    sys.meta_path.insert(0, Slow())
    dispatch = CeleryDispatch(Settings(), Keys("stillroom"))
    order = RefreshOrder(loader="x", args={}, key="k", token="0" * 16)
    dispatch.send([order], print)
    is_importing.wait()
    if child := os.fork():
        has_forked.set()
        dispatch.close()
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    threading.Timer(45, os._exit, [2]).start()  # it hangs
    dispatch.send([order], print)
    dispatch.close()
    os._exit(0)
""")


def test_a_fork_while_celery_is_imported_does_not_lock_the_child(
    own_server: EmbeddedServer,
) -> None:
    """A process that publishes its first order, and forks meanwhile, has children that end."""
    environment = {**os.environ, "REDIS_URL": own_server.url}
    subprocess.run([sys.executable, "-c", FORKING], env=environment, check=True, timeout=60)


PATCHED_LATE = textwrap.dedent("""
    import sys, time
    from stillroom import Settings, Stillroom
    from stillroom.dispatch import RefreshOrder
    from stillroom.own_celery import OwnCelery

    room = Stillroom(Settings(connect_timeout=10.0, command_timeout=10.0, call_timeout=30.0))
    from gevent import monkey; monkey.patch_all()
    import gevent

    order = RefreshOrder(loader="x", args={}, key="k", token="0" * 16)
    match sys.argv[1]:
        case "order":
            room.dispatch.send([order], print)
            while room.dispatch._producer is None:
                time.sleep(0.01)
            time.sleep(0.1)
        case "lock":
            with room.lock("x", lease=1.5) as held:
                first = held._until
                while held._until == first:  # until it is renewed
                    time.sleep(0.01)
                assert held.is_held
    room.close()
""")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("what", ["order", "lock"])
def test_rooms_that_are_older_than_gevents_patches_hold_no_worker(
    own_server: EmbeddedServer, what: str
) -> None:
    """A room that was made before gevent's patches, as with `gunicorn -k gevent --preload`, works in greenlets."""
    environment = {**os.environ, "REDIS_URL": own_server.url}
    words = [sys.executable, "-W", "ignore", "-c", PATCHED_LATE, what]
    subprocess.run(words, env=environment, check=True, timeout=60)
