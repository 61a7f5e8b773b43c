"""A command that is sent twice acts once, and a copy that a proxy delivers late changes nothing newer."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

import redis
from stillroom import AsyncStillroom, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.cache.orders import Load
from stillroom.dispatch import RefreshOrder
from stillroom.leash import until
from stillroom.operation import Operation
from stillroom.scripts import add, clear, lease_load, limit_change, mark, put, replace, take_place
from tests.support.clocked import misjudge
from tests.support.faces import FACES, locked, open_room
from tests.support.interruption import Interruption
from tests.support.lag import Stopwatch
from tests.support.monitor import scripts_run
from tests.support.proxy import Proxy

COMMAND_S = 0.5  # what a batch may take: longer than usual, for a busy machine


@pytest.fixture(params=FACES)
def app(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[Any]:
    """Open a process behind the proxy, with an idle connection and loaded scripts."""
    with open_room(request.param, _behind(proxy), NoDispatch()) as room:
        room.cache.get_or_set("warm", lambda: 1, tags=["warm"])
        room.cache.set("warm", 1)
        room.cache.add("warm", 1)
        room.cache.touch("warm")
        room.cache.invalidate_by_tag("warm")
        room.cache.clear()
        room.cache.set("warm", 1)
        assert room.cache.get("warm") == 1
        yield room


@pytest.fixture
def other(make_room: Any) -> Stillroom:
    """Open another process with a better network."""
    room: Stillroom = make_room()
    room.cache.get("warm")
    return room


def test_a_set_whose_connection_died_says_so_when_it_can_no_longer_act(
    app: Any, proxy: Proxy, other: Stillroom
) -> None:
    """A set whose connection died returns once its copy can no longer act, so that later invalidations hold."""
    proxy.keep(put.text.sha)
    began = time.monotonic()
    assert app.cache.set("k", "v1", tags=["t"], ttl=600) is False
    assert time.monotonic() - began >= COMMAND_S * 0.9
    other.cache.invalidate_by_tag("t")
    proxy.deliver_late()
    assert other.cache.get("k") is None


WRITES: dict[str, Callable[[Any], Any]] = {
    "set": lambda cache: cache.set("k", "v1", tags=["t"], ttl=600),
    "set_many": lambda cache: cache.set_many({"k": "v1"}, tags=["t"], ttl=600),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_cancelled_write_ends_when_it_can_no_longer_act(
    proxy: Proxy, other: Stillroom, client: redis.Redis, write: str
) -> None:
    """A write whose task is cancelled ends once it can no longer act, so that later invalidations hold."""

    async def cancel_on_the_way() -> None:
        async with AsyncStillroom(_behind(proxy), dispatch=NoDispatch()) as app:
            await app.cache.set("warm", 1)
            proxy.hold_requests()
            writing = asyncio.create_task(WRITES[write](app.cache))
            assert await asyncio.to_thread(proxy.held.wait, 5)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing

    asyncio.run(cancel_on_the_way())
    _arrives_too_late(proxy, other, client)


@pytest.mark.parametrize("write", WRITES)
def test_an_interrupted_write_ends_when_it_can_no_longer_act(
    proxy: Proxy, other: Stillroom, client: redis.Redis, write: str
) -> None:
    """A write that a signal handler interrupts, twice, ends once it can no longer act."""

    def interrupt(*_: object) -> None:
        raise Interruption

    def signal_once_it_is_held() -> None:
        if proxy.held.wait(5):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert until(lambda: _is_waiting(main), 5)
            os.kill(os.getpid(), signal.SIGUSR1)

    main, signaller = threading.get_ident(), threading.Thread(target=signal_once_it_is_held)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Stillroom(_behind(proxy), dispatch=NoDispatch()) as app:
            app.cache.set("warm", 1)
            proxy.hold_requests()
            signaller.start()
            with pytest.raises(Interruption):
                WRITES[write](app.cache)
    finally:
        # On a busy machine the second signal may come when the write has ended, and would end the process.
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signaller.join()
        signal.signal(signal.SIGUSR1, before)
    _arrives_too_late(proxy, other, client)


def _is_waiting(thread: int) -> bool:
    """Return whether a thread waits until its write can no longer act."""
    return sys._current_frames()[thread].f_code.co_name == "_wait_out"


def _behind(proxy: Proxy) -> Settings:
    patience = {"connect_timeout": 5.0, "command_timeout": COMMAND_S, "call_timeout": 5.0}
    return Settings(redis_url=proxy.url, **patience)


def _arrives_too_late(proxy: Proxy, other: Stillroom, client: redis.Redis) -> None:
    """Let the held write arrive after an invalidation that began when the write's caller went on."""
    other.cache.invalidate_by_tag("t")
    before = scripts_run(client)
    proxy.let_go()
    assert until(lambda: scripts_run(client) > before, 5)
    assert other.cache.get("k") is None


@pytest.mark.parametrize("many", [False, True])
def test_an_older_set_does_not_overwrite_a_newer_one(app: Any, proxy: Proxy, many: bool) -> None:
    """A late copy of an older set does not overwrite a newer one of the same thread."""

    def store(value: str) -> None:
        app.cache.set_many({"k": value}) if many else app.cache.set("k", value)

    proxy.keep(put.text.sha)
    store("v1")
    store("v2")
    proxy.deliver_late()
    assert app.cache.get("k") == "v2"


def test_a_lease_that_was_asked_for_is_not_taken_once_more(
    app: Any, proxy: Proxy, other: Stillroom
) -> None:
    """A copy of a lease request does not take back a lease that an invalidation removed."""
    database = {"k": "v1"}

    def load() -> str:
        value = database["k"]
        database["k"] = "v2"
        other.cache.invalidate("k")
        if proxy.has_kept:
            proxy.deliver_late()
        return value

    proxy.keep(lease_load.text.sha)
    app.cache.get_or_set("k", load, ttl=600)
    assert other.cache.get("k") in (None, "v2")
    assert app.cache.get_or_set("k", lambda: database["k"], ttl=600) == "v2"


def test_a_place_for_a_load_is_not_taken_once_more(
    app: Any, proxy: Proxy, client: redis.Redis
) -> None:
    """A late copy takes no place: nobody would give it back, and other loads would be shed until it ends."""

    @app.cache.cached("k:{n}", at_once=1, name="load")  # type: ignore[untyped-decorator]
    def load(n: int) -> int:
        return n

    assert load(1) == 1
    proxy.keep(take_place.text.sha)
    assert load(2) == 2
    proxy.deliver_late()
    assert client.keys("*:n:*") == client.keys("*:q:*") == []


@pytest.mark.parametrize("how", ["tag", "soft tag", "pattern", "key"])
def test_an_invalidation_that_arrives_twice_forgets_no_other(
    app: Any, proxy: Proxy, other: Stillroom, how: str
) -> None:
    """A late copy of an invalidation keeps other invalidations; newer entries may at most be missing."""
    acts: dict[str, Callable[[], Any]] = {
        "tag": lambda: app.cache.invalidate_by_tag("a"),
        "soft tag": lambda: app.cache.invalidate_by_tag("a", soft=True),
        "pattern": lambda: app.cache.invalidate_by_pattern("a*"),
        "key": lambda: app.cache.invalidate("a"),
    }
    other.cache.set("k", "old", tags=["t"])
    proxy.keep(b"UNLINK" if how == "key" else mark.text.sha)
    acts[how]()
    other.cache.invalidate_by_tag("t")
    proxy.deliver_late()
    assert other.cache.get("k") is app.cache.get("k") is None


def test_a_clear_that_arrives_twice_is_one(app: Any, proxy: Proxy, other: Stillroom) -> None:
    """A clear that arrives twice acts once: newer entries live and newer invalidations hold."""
    proxy.keep(clear.text.sha)
    app.cache.clear()
    other.cache.set("living", 1)
    other.cache.set("dead", 1, tags=["t"])
    other.cache.invalidate_by_tag("t")
    proxy.deliver_late()
    assert app.cache.get_many(["living", "dead"]) == {"living": 1}
    assert other.cache.get_many(["living", "dead"]) == {"living": 1}


def test_a_late_clear_revives_nothing(app: Any, proxy: Proxy, other: Stillroom) -> None:
    """A late copy of a clear begins a third epoch and revives nothing."""
    other.cache.set("first", 1)
    proxy.keep(clear.text.sha)
    app.cache.clear()
    other.cache.set("second", 1)
    other.cache.clear()
    proxy.deliver_late()
    for room in (app, other):
        assert room.cache.get_many(["first", "second"]) == {}


def test_what_is_added_once_is_not_added_again(app: Any, proxy: Proxy, other: Stillroom) -> None:
    """A copy of a failed incr, touch or add does nothing later."""
    app.cache.set("n", 5, ttl=600)
    proxy.keep(replace.text.sha)
    with pytest.raises(Exception, match="unavailable"):
        app.cache.incr("n")
    proxy.deliver_late()
    assert app.cache.get("n") == 5
    proxy.keep(add.text.sha)
    assert app.cache.add("lock", 1) is False
    proxy.deliver_late()
    assert other.cache.get("lock") is None


LOST_ANSWERS: dict[str, Callable[[Stillroom], Any]] = {
    "resume": lambda room: room.upkeep.resume("refresh"),
    "drop": lambda room: room.state.run(room.dead_letters.drop("1-1")),
    "keep": lambda room: room.state.run(room.dead_letters.add("message", "{}", "why")),
    "restore": lambda room: room.limits.restore("login"),
    "pause": lambda room: room.upkeep.pause("refresh", 600),
    "agree": lambda room: room.state.run(room.agreed.change("life_limit")),
}


@pytest.mark.parametrize("act", LOST_ANSWERS)
def test_an_act_whose_answer_is_lost_is_not_said_to_have_found_nothing(
    app: Any, proxy: Proxy, act: str
) -> None:
    """An act that tells whether there was something, adds something, or would undo the act after it where it came
    twice, raises where its reply is lost.
    """
    LOST_ANSWERS[act](app)  # loads its script
    proxy.cuts_next = True
    with pytest.raises(RedisUnavailable) as lost:
        LOST_ANSWERS[act](app)
    assert lost.value.may_be_done


def test_a_change_of_a_limit_is_sent_once(app: Any, proxy: Proxy) -> None:
    """A change whose reply is lost raises: a first copy of two could bring it back behind the next change."""
    app.limits.change("login", 5, 60, 600)
    proxy.keep(limit_change.text.sha)
    with pytest.raises(RedisUnavailable) as lost:
        app.limits.change("login", 1_000, 60, 600)
    assert lost.value.may_be_done


SESSION_ACTS: dict[str, Callable[[Any, str], Operation[Any]]] = {
    "update": lambda body, token: body.update(token, {"n": 1}),
    "mutate": lambda body, token: body.mutate(token, lambda data: {"n": 1}),
    "rotate": lambda body, token: body.rotate(token),
    "destroy": lambda body, token: body.destroy(token),
    "destroy_for_user": lambda body, token: body.destroy_for_user("ann"),
    "destroy_by_tag": lambda body, token: body.destroy_by_tag("a", "b"),
    "destroy_all": lambda body, token: body.destroy_all(),
}


def cut_off(operation: Operation[Any], fates: Mapping[int, str]) -> Operation[Any]:
    """Run an operation whose exchanges with Redis end so: closed, the reply is lost; refused, nothing was sent."""
    exchanges, answer, fate = 0, None, ""
    while True:
        try:
            step = operation.throw(RedisUnavailable(fate)) if fate else operation.send(answer)
        except StopIteration as stop:
            return stop.value
        fate = ""
        if isinstance(step, list):
            fate, exchanges = fates.get(exchanges, ""), exchanges + 1
        answer = None if fate == "refused" else (yield step)


@pytest.mark.parametrize("first", [{}, {0: "closed"}, {1: "closed"}])
@pytest.mark.parametrize("act", SESSION_ACTS)
def test_an_error_says_that_something_may_be_done_if_an_earlier_exchange_has_done_it(
    make_room: Any, act: str, first: dict[int, str]
) -> None:
    """Wherever an act on sessions is cut off, an error that says nothing was done leaves the session as it was."""
    room = make_room(session_shards=2)
    for last in range(6):
        session = room.sessions.create("ann", {"n": 0}, tags=["a"])
        operation = SESSION_ACTS[act](room._sessions_body, session.token)
        is_told = True
        try:
            room.state.run(cut_off(operation, {last: "refused"} | first))
        except RedisUnavailable as error:
            is_told = error.may_be_done
        found = room.sessions.get(session.token)
        is_untouched = found is not None and (found.data, found.version) == ({"n": 0}, 1)
        assert is_told or is_untouched, (last, found)


def test_a_lock_whose_release_is_answered_by_nobody_was_not_lost(app: Any, proxy: Proxy) -> None:
    """The holder of a lock is not told that it was lost where only the reply to its release was."""
    with locked(app, "k"):
        proxy.cuts_next = True
    with locked(app, "k", wait=0):
        pass


def test_a_commit_that_is_sent_again_has_stored_its_value(app: Any, proxy: Proxy) -> None:
    """A load whose commit is answered by nobody, and is sent again, counts as stored: nobody loads it once more."""
    cut: list[int] = []

    @app.cache.cached("k:{n}", name="load")  # type: ignore[untyped-decorator]
    def load(n: int) -> int:
        proxy.cuts_next = n in cut
        return n

    assert load(1) == 1
    cut.append(2)
    assert app.upkeep.load(Load(loader="load", args={"n": 2}))["outcome"] == "loaded"
    assert app.cache.get("k:2") == 2
    assert app.stats.counts["leases_lost"] == 0


@pytest.mark.parametrize("work", ["load", "refresh"])
def test_a_worker_whose_lease_is_answered_by_nobody_gives_it_back(
    app: Any, proxy: Proxy, other: Stillroom, client: redis.Redis, work: str
) -> None:
    """A lease that a worker got, and did not hear of, is free again: no reader waits for it."""

    @app.cache.cached("k:{n}", name="load", ttl=0.001, swr=60, lease=30)  # type: ignore[untyped-decorator]
    def load(n: int) -> int:
        return n

    lease, token = other.keys.lease(b"k:1"), "0" * 16
    order = Load(loader="load", args={"n": 1})
    refresh = RefreshOrder(loader="load", args={"n": 1}, key="k:1", token=token)
    app.upkeep.load(order)
    assert app.upkeep.refresh(refresh)["outcome"] == "superseded"
    client.set(lease, f"refresh.{token}.30000.0", px=30_000)
    proxy.cuts_next = True
    with pytest.raises(RedisUnavailable):
        app.upkeep.load(order) if work == "load" else app.upkeep.refresh(refresh)
    assert client.get(lease) is None


def test_two_threads_do_not_wait_for_each_others_late_copies(app: Any, proxy: Proxy) -> None:
    """A cut connection delays its own caller only, and other threads go on."""
    if not isinstance(app, Stillroom):
        pytest.skip("a blocking call")
    proxy.keep(put.text.sha)
    waiting = threading.Thread(target=lambda: app.cache.set("k", 1))
    waiting.start()
    assert until(lambda: proxy.has_kept, 5)
    with Stopwatch() as watch:
        assert app.cache.set("other", 1)
    assert watch.seconds < COMMAND_S / 2
    waiting.join()


@pytest.mark.parametrize("seconds", [-3_600.0, -1.0, 1.0, 3_600.0])
def test_a_clock_that_is_not_where_it_was_thought_to_be_refuses_nothing_for_long(
    app: Any, seconds: float
) -> None:
    """A write refused by a wrong estimate of the clock is made again by a right one."""
    misjudge(app.wire.server, seconds)
    assert app.cache.set("k", 1)
    misjudge(app.wire.server, seconds)
    assert app.cache.set_many({"a": 1, "b": 2}) == {"a": True, "b": True}
    misjudge(app.wire.server, seconds)
    assert app.cache.add("c", 1)
    misjudge(app.wire.server, seconds)
    assert app.cache.touch("c")
    misjudge(app.wire.server, seconds)
    assert app.cache.incr("c") == 2
    misjudge(app.wire.server, seconds)
    assert app.cache.get_or_set("d", lambda: 1) == app.cache.get("d") == 1
