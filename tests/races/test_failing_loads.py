"""A failed or shed load is told at once to every waiting caller, in all processes, from one load."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from stillroom import (
    AsyncStillroom,
    InlineDispatch,
    LoadFailed,
    LoadShed,
    NoDispatch,
    Settings,
    Stillroom,
    stats,
)
from stillroom.cache import failures as failures_module
from stillroom.cache.failures import Failures, as_json
from stillroom.keys import Keys
from tests.support import nursery
from tests.support.crowd import PATIENT
from tests.support.entries import age
from tests.support.stepper import Stepper
from tests.support.threads import at_once


class Down(ConnectionError):
    """The app's own error, with an argument."""

    def __init__(self, host: str) -> None:
        super().__init__(f"redis://app:secret@{host} is away")
        self.host = host


def outcomes(count: int, call: Callable[[int], Any]) -> list[Any]:
    """Call in that many threads; return each result or error."""

    def outcome(n: int) -> Any:
        try:
            return call(n)
        except Exception as error:
            return error

    return at_once(count, outcome)


class Failing:
    """A loader that fails when told to, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.began, self.finish = threading.Event(), threading.Event()

    def __call__(self) -> int:
        self.calls += 1
        self.began.set()
        assert self.finish.wait(20)
        raise Down("db")


@pytest.mark.parametrize("way", ["get_or_set", "cached", "many"])
def test_one_failure_is_everybodys_who_waited(make_room: Any, way: str) -> None:
    """Of twelve callers in one process one loads, and all get its error with its arguments."""
    room: Stillroom = make_room()
    load = Failing()
    kept = room.cache.cached("k", name="load")(load)
    calls: dict[str, Callable[[int], Any]] = {
        "get_or_set": lambda _: room.cache.get_or_set("k", load),
        "cached": lambda _: kept(),
        "many": lambda _: room.cache.get_or_set_many(["k"], lambda keys: {"k": load()}),
    }

    def call(n: int) -> Any:
        if n == 0:
            return calls[way](n)
        assert load.began.wait(20)
        return calls[way](n)

    def let_fail() -> None:
        while room.stats.counts["misses"] < 12:
            time.sleep(0.005)
        load.finish.set()

    threading.Thread(target=let_fail).start()
    results = outcomes(12, call)
    assert all(type(error) is Down and error.host == "db" for error in results), results
    assert {str(error) for error in results} == {str(Down("db"))}
    assert load.calls == 1
    with pytest.raises(Down):  # and the next caller tries again
        calls[way](0)
    assert load.calls == 2


def test_another_process_is_told_what_failed(make_room: Any, client: Any) -> None:
    """Another process gets the failed load's name and message without a password, and its next caller loads."""
    one, two = make_room(), make_room()
    load = Failing()
    first = Stepper(one, one._cache_body.get_or_set("k", load))
    first.run_to_the_load()
    second = Stepper(two, two._cache_body.get_or_set("k", lambda: 7)).run()
    assert second.is_waiting
    load.finish.set()
    first.run()
    assert isinstance(first.error, Down)
    second.step()
    second.run()
    assert isinstance(second.error, LoadFailed)
    assert str(second.error).endswith("failed with Down: redis://app:***@db is away")
    assert client.pttl(two.keys.failure(b"k")) > 0
    assert two.cache.get_or_set("k", lambda: 7) == 7


def test_an_earlier_failure_is_nobody_elses(make_room: Any) -> None:
    """A caller that comes after a failure waits for another load and gets that load's value."""
    rooms = [make_room() for _ in range(3)]
    with pytest.raises(ZeroDivisionError):
        rooms[0].cache.get_or_set("k", lambda: 1 / 0)
    leader = Stepper(rooms[1], rooms[1]._cache_body.get_or_set("k", lambda: 7))
    leader.run_to_the_load()
    late = Stepper(rooms[2], rooms[2]._cache_body.get_or_set("k", lambda: 8)).run()
    late.step()
    late.run()
    assert late.is_waiting, "the failure that Redis still tells of is of a load before it came"
    assert leader.value() == 7
    late.step()
    assert late.value() == 7


def test_a_cancelled_load_is_no_failure(settings: Settings) -> None:
    """A cancelled load is no failure: a waiting caller loads by itself."""

    async def story() -> Any:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            began = asyncio.Event()

            async def forever() -> int:
                began.set()
                await asyncio.sleep(60)
                return 1

            async def seven() -> int:
                return 7

            leader = asyncio.create_task(room.cache.get_or_set("k", forever))
            await began.wait()
            waiter = asyncio.create_task(room.cache.get_or_set("k", seven))
            await asyncio.sleep(0.02)
            leader.cancel()
            return await waiter

    assert asyncio.run(story()) == 7


def in_a_task(call: Callable[[], Any]) -> BaseException | None:
    """Run this as a task of a project; return the error that the task has seen."""
    seen: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except Exception as error:
            seen.append(error)

    with Celery(set_as_current=False) as app:
        app.task(work, name="work").apply()
    return seen[0] if seen else None


def over_time(*_: Any) -> Any:
    raise SoftTimeLimitExceeded


@pytest.mark.parametrize("way", ["one", "many", "inline", "packing"])
def test_a_task_over_its_time_is_not_served_a_stale_value(
    settings: Settings, client: Any, way: str
) -> None:
    """A task's soft time limit ends the task while it loads, also where a stale value is there."""
    values: list[Callable[[], int]] = [lambda: 1]
    with Stillroom(settings, dispatch=InlineDispatch()) as room:
        cache = room.cache
        kept = cache.cached("k", ttl=60, swr=600, name="load")(lambda: values[-1]())  # noqa: PLW0108
        calls: dict[str, Callable[[], Any]] = {
            "one": lambda: cache.get_or_set("k", values[-1], ttl=60, swr=600),
            "many": lambda: cache.get_or_set_many(
                ["k"], lambda keys: {"k": values[-1]()}, ttl=60, swr=600
            ),
            "inline": kept,
            "packing": lambda: cache.get_or_set("k", lambda: 1, ttl=60, swr=600, tags=[over_time]),
        }
        if way != "packing":
            calls[way]()
            age(client, room.keys.entry(b"k"), 61)
        values.append(over_time)
        assert isinstance(in_a_task(calls[way]), SoftTimeLimitExceeded)
        assert not (client.get(room.keys.lease(b"k")) or b"").startswith(b"load.")


def test_outside_of_a_task_a_time_limit_is_the_loads_failure(room: Any, client: Any) -> None:
    """A limit that a loader has heard of another task leaves a reader outside of a task its stale value."""
    room.cache.get_or_set("k", lambda: 1, ttl=60, swr=600)
    age(client, room.keys.entry(b"k"), 61)
    assert room.cache.get_or_set("k", over_time, ttl=60, swr=600) == 1


def test_a_task_over_its_time_is_no_failure_of_others(make_room: Any) -> None:
    """A task's soft time limit while it loads is nobody else's error: a waiting caller loads by itself."""
    one, two = make_room(), make_room()

    def waited_for() -> None:
        first = Stepper(one, one._cache_body.get_or_set("k", over_time))
        first.run_to_the_load()
        second = Stepper(two, two._cache_body.get_or_set("k", lambda: 7)).run()
        first.run()
        assert isinstance(first.error, SoftTimeLimitExceeded)
        second.step()
        assert second.value() == 7

    assert in_a_task(waited_for) is None


def test_a_task_over_its_time_is_no_failure_of_others_while_redis_is_away(
    make_room: Any,
) -> None:
    """While Redis is away a waiting caller loads by itself, too, after a task's limit ended the load."""
    room = make_room(redis_url="redis://127.0.0.1:1")
    began, goes_on = threading.Event(), threading.Event()

    def load() -> Any:
        began.set()
        assert goes_on.wait(20)
        raise SoftTimeLimitExceeded

    def call(n: int) -> Any:
        if n == 0:
            return in_a_task(lambda: room.cache.get_or_set("k", load))
        assert began.wait(20)
        threading.Timer(0.1, goes_on.set).start()
        return room.cache.get_or_set("k", lambda: 7)

    first, second = outcomes(2, call)
    assert isinstance(first, SoftTimeLimitExceeded)
    assert second == 7


PROCESS = """
import json, sys, time
from stillroom import NoDispatch, Settings, Stillroom
room = Stillroom(Settings(**json.loads(sys.argv[1])), dispatch=NoDispatch())
calls = []
def away():
    calls.append(1)
    time.sleep(0.5)
    raise ConnectionError("the database is away")
began = time.monotonic()
try:
    room.cache.get_or_set("k", away)
except Exception as error:
    print(json.dumps([type(error).__name__, len(calls), time.monotonic() - began]))
"""


def test_processes_share_a_failure(settings: Settings) -> None:
    """Waiting processes share one failure, so that a slow database is not asked by each in turn."""
    given = json.dumps(
        {"redis_url": settings.redis_url, "namespace": settings.namespace, **PATIENT}
    )
    children = [
        nursery.start(["-c", PROCESS, given], os.environ, stdout=subprocess.PIPE) for _ in range(4)
    ]
    results = []
    for child in children:
        assert child.stdout is not None
        with child.stdout as told:
            results.append(json.loads(told.read()))
        child.wait(60)
    # Those that came while the first was loading have waited for it; a process may start much later than others.
    assert {name for name, _, _ in results} <= {"ConnectionError", "LoadFailed"}
    assert all(calls <= 1 for _, calls, _ in results)
    assert all(took < 5 for _, _, took in results)


def test_an_error_that_cannot_be_copied_is_raised_itself() -> None:
    """An error that cannot be copied is raised itself in every waiting caller."""

    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd")

    failures, odd = Failures(), Odd(1, 2)
    failures.keep(b"load.1", odd)
    assert failures.of(b"load.1 " + as_json(odd), {b"load.1"}, "k") is odd
    assert failures.of(b"load.2 " + as_json(odd), {b"load.1"}, "k") is None
    assert failures.of(None, {b""}, "k") is None
    unreadable = failures.of(b"load.3 {", {b"load.3"}, "k")
    assert isinstance(unreadable, LoadFailed)


@contextmanager
def meanwhile(module: Any, act: Callable[[], object]) -> Iterator[None]:
    """Act before each line of a module that runs inside this `with`, as another thread may."""

    def at_each_line(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename == module.__file__:
            act()
            return at_each_line
        return None

    before = sys.gettrace()
    sys.settrace(at_each_line)
    try:
        yield
    finally:
        sys.settrace(before)


def test_what_a_failed_load_held_is_let_go(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a load, and what the load's frames hold, is let go once nobody waits for it any more."""
    monkeypatch.setattr(failures_module, "KEPT_S", 0.0)
    held: Any = weakref.WeakSet()

    def fail() -> None:
        upload = threading.Event()  # anything
        held.add(upload)
        raise ValueError("no database")

    for n in range(3):
        with pytest.raises(ValueError, match="no database"):
            room.cache.get_or_set(f"k:{n}", fail)
    gc.collect()
    assert len(held) <= 1
    room.cache.flush_stats()
    gc.collect()
    assert not held


def test_failures_of_several_threads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is kept while other threads keep theirs, at any moment, also where old ones are let go."""
    failures, error, others = Failures(), ConnectionError(), itertools.count()
    monkeypatch.setattr(failures_module, "KEPT_LIMIT", 10)
    for number in range(10):
        failures.keep(b"old.%d" % number, error)

    def fail() -> None:
        failures._kept[b"other.%d" % next(others)] = time.monotonic() + 60, error

    with meanwhile(failures_module, fail):
        failures.keep(b"load.1", error)
    assert next(others) > 10


def test_errors_of_several_threads_are_told() -> None:
    """Counts and errors are written down while another thread still adds to those that were taken."""
    counted, others = stats.Stats(Keys("stillroom")), itertools.count()
    counted.errors["loader"] = "{}"
    counted.counts["loads"] += 1
    errors, counts = counted.errors, counted.counts

    def fail() -> None:
        number = next(others)
        errors[f"loader.{number}"] = "{}"
        counts[f"loads.{number}"] += 1

    with meanwhile(stats, fail):
        told = [command[0] for command in counted.flush(0)]
    assert told.count(b"HSET") == 1


# A budget of loads


class Busy:
    """A loader that counts how many of its loads run at the same time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self.running = self.most = self.calls = 0

    def __call__(self, n: int) -> int:
        with self._lock:
            self.calls += 1
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self._seconds)
        with self._lock:
            self.running -= 1
        return n


@pytest.mark.parametrize("rooms", [1, 3])
def test_no_more_loads_run_than_the_budget_allows(make_room: Any, client: Any, rooms: int) -> None:
    """Of 60 cold keys no more are loaded at once than the budget of five, in one process or three."""
    load = Busy(0.1)
    processes = [make_room() for _ in range(rooms)]
    kept = [r.cache.cached("k:{n}", name="load", at_once=5)(load) for r in processes]
    results = outcomes(60, lambda n: kept[n % rooms](n))
    assert load.most <= 5
    shed = [one for one in results if isinstance(one, LoadShed)]
    served = [one for one in results if isinstance(one, int)]
    assert len(shed) + len(served) == 60
    assert len(served) == load.calls >= 5
    assert all(one.retry_after == 1.0 and one.at_once == 5 for one in shed)
    assert client.keys("*:n:*") == client.keys("*:q:*") == [], "every place is given back"
    assert client.keys("*:l:*") == []
    assert sum(room.stats.counts["loads_shed"] for room in processes) == len(shed)


def test_a_short_queue_is_waited_out(make_room: Any) -> None:
    """As many callers may wait as may load, and none of them is refused."""
    room = make_room()
    load = Busy(0.05)
    kept = room.cache.cached("k:{n}", at_once=5, name="load")(load)
    assert outcomes(10, kept) == list(range(10))
    assert load.most <= 5


def test_a_load_shares_the_place_of_the_load_that_waits_for_it(make_room: Any, client: Any) -> None:
    """A loader that calls itself needs one place for all of these loads, also where all places are taken so."""
    room = make_room()
    have_begun = threading.Barrier(3)

    @room.cache.cached("path:{leaf}:{depth}", at_once=3)  # type: ignore[untyped-decorator]
    def path(leaf: int, depth: int) -> list[int]:
        if depth == 0:
            return [leaf]
        have_begun.wait(10)
        above: list[int] = path(leaf, depth - 1)
        return [*above, depth]

    assert outcomes(3, lambda leaf: path(leaf, 1)) == [[0, 1], [1, 1], [2, 1]]
    assert client.keys("*:n:*") == client.keys("*:q:*") == []


def calling(room: Any, kept: Any, n: int) -> Stepper:
    return Stepper(room, room._cache_body.call(kept.loader, (n,), {}))


def test_all_who_wait_for_a_load_that_is_shed_are_told(make_room: Any, client: Any) -> None:
    """Every caller that waits for a shed load gets LoadShed with the time to come again, in other processes too."""
    one, two = make_room(), make_room()
    kept = [r.cache.cached("k:{n}", name="load", at_once=1)(Busy(0)) for r in (one, two)]
    calling(one, kept[0], 0).run_to_the_load()
    assert calling(one, kept[0], 1).run().is_waiting
    third = calling(one, kept[0], 2)
    while not client.exists(one.keys.lease(b"k:2")):
        third.step()
    waiter = calling(two, kept[1], 2).run()
    assert waiter.is_waiting
    for _ in range(
        10
    ):  # it is shed at once, and does not ask until its time in the queue would be over
        if not third.done:
            third.step()
    assert isinstance(third.error, LoadShed)
    waiter.step()
    told = waiter.run().error
    assert isinstance(told, LoadShed)
    assert (told.retry_after, told.at_once, told.loader) == (1.0, 1, "load")


def test_a_place_is_free_again_when_its_process_is_gone(make_room: Any, client: Any) -> None:
    """The place of a process that is gone is free when its load's lease ends, also after a clock step back."""
    room = make_room()
    kept = room.cache.cached("k:{n}", at_once=1, name="load", lease=20)(Busy(0))
    places, _ = room.keys.places("load")
    for hours in (-1, 1):
        gone = calling(room, kept, 10 + hours).run_to_the_load()
        ((load, until),) = client.zrange(places, 0, -1, withscores=True)
        assert 0 < client.pttl(places) <= 20_000
        client.zadd(places, {load: until + hours * 3_600_000})
        assert kept(20 + hours) == 20 + hours
        gone.run()
    assert client.exists(places) == 0


def test_a_budget_holds_for_loads_with_other_leases(make_room: Any, client: Any) -> None:
    """A load whose lease is shorter, as another release or setting has it, takes no place of a longer one."""
    rooms = make_room(), make_room()
    long, short = (
        room.cache.cached("k:{n}", at_once=2, name="load", lease=lease)(Busy(0))
        for room, lease in zip(rooms, (30, 2), strict=True)
    )
    loads = [calling(rooms[0], long, 1).run_to_the_load()]
    loads.append(calling(rooms[1], short, 2).run_to_the_load())
    places, _ = rooms[0].keys.places("load")
    assert client.zcard(places) == 2
    assert client.pttl(places) > 20_000
    assert calling(rooms[1], short, 3).run().is_waiting
    for load in loads:
        load.run()


def test_a_refresh_over_the_budget_leaves_the_stale_value(
    make_room: Any, client: Any, dispatch: Any
) -> None:
    """A refresh over the budget leaves the stale value without a backoff, and a later read asks again."""
    room = make_room()
    kept = room.cache.cached("k:{n}", at_once=1, name="load", ttl=60, swr=600)(Busy(0))
    assert kept(1) == 1
    age(client, room.keys.entry(b"k:1"), 61)
    calling(room, kept, 2).run_to_the_load()
    assert calling(room, kept, 3).run().is_waiting
    assert kept(1) == 1
    (outcome,) = dispatch.run_all(room)
    assert isinstance(outcome, LoadShed)
    assert client.get(room.keys.lease(b"k:1")) is None
    assert kept(1) == 1


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "5", 10_000])
def test_a_budget_is_a_number_of_loads(make_room: Any, given: Any) -> None:
    """A budget is 1 to 1,000 loads."""
    with pytest.raises(TypeError, match="at_once="):
        make_room().cache.cached("k", at_once=given)(dict)
