"""Each memory of a process has a bound, and each bulk call does what its single sibling does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image
from pydantic import create_model

from stillroom import AsyncStillroom, Freshness, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.cache.bites import KEYS_AT_ONCE, SCRIPTS_AT_ONCE
from stillroom.cache.body import CacheBody
from stillroom.cache.images import Images
from stillroom.cache.outbox import Outbox
from stillroom.cache.reclaim import Reclaim
from stillroom.embedded import EmbeddedServer
from stillroom.sameness import TYPES_LIMIT
from stillroom.scripts import forget
from tests.support.clocked import ClockedServer
from tests.support.crowd import PATIENT
from tests.support.entries import age
from tests.support.lag import least
from tests.support.proxy import Proxy
from tests.support.stepper import Stepper
from tests.support.threads import at_once
from tests.support.trips import Trips

NEVER = 1 << 62  # seconds

# Memories that grow


@pytest.mark.parametrize("kind", ["tags", "soft tags", "patterns", "clears"])
def test_marks_have_a_bound_without_a_beat(kind: str) -> None:
    """Marks have a bound without beat: each invalidation drops as many old marks as it adds."""
    with ClockedServer(options={"maxmemory": "0"}) as server:
        settings = Settings(**{"redis_url": server.url, "life_limit": 60.0, "ttl": 60.0} | PATIENT)
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            sizes = []
            for turn in range(4):
                server.set_clock(turn * 1_000)
                for n in range(0, 2_000, 200):
                    names = [f"{turn}:{n + k}" for k in range(200)]
                    if kind == "patterns":
                        for name in names[:20]:
                            room.cache.invalidate_by_pattern(name)
                    elif kind == "clears":
                        room.cache.clear()
                    else:
                        room.cache.invalidate_by_tag(*names, soft=kind == "soft tags")
                count = room.wire.execute([(b"ZCARD", room.keys.marks)], 5.0)[0]
                sizes.append(count)
            assert sizes[-1] <= sizes[0] + 10


@pytest.mark.any_server
def test_types_that_are_made_for_each_request_are_let_go(room: Any) -> None:
    """Types made for each request are let go: a class in a function, a Literal of a visitor's text, a
    made model.
    """
    for n in range(TYPES_LIMIT + 100):
        kinds: list[Any] = [Literal[f"{n}"], create_model(f"M{n}", id=(int, 1))]
        for kind in kinds:
            value = f"{n}" if kind is kinds[0] else kind(id=n)
            if n % 50 == 0:
                room.cache.set("k", value, type=kind)
            room.cache.get("k", kind)
    codec = (room.inner if hasattr(room, "inner") else room)._cache_body._codec
    assert len(codec._adapters) <= TYPES_LIMIT
    assert len(codec._readers) <= TYPES_LIMIT


@pytest.mark.any_server
def test_types_of_sessions_that_are_made_for_each_request_are_let_go(room: Any) -> None:
    """Models made for each request are let go where a session is begun with one and compared with what is read."""
    alive: Any = weakref.WeakSet()
    for n in range(600):
        kind = create_model(f"M{n}", id=(int, 1))
        alive.add(kind)
        room.sessions.create(None, kind(id=n))
    gc.collect()
    assert len(alive) <= 500


def test_pending_without_work_asks_nothing(room: Any) -> None:
    """`pending` without members sends no command."""
    assert room.cache.pending() == {}


# Threads


def test_threads_that_deliver_side_by_side_raise_nothing() -> None:
    """Two threads that deliver the same name side by side raise nothing."""
    box = Outbox(100)
    box.put([b"k:a", b"k:b"])
    names = box.first(10)
    barrier = threading.Barrier(2)

    class Numbers(dict[bytes, int]):
        def get(self, *args: Any) -> Any:
            found = dict.get(self, *args)
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(0.5)
            return found

    box.numbers = Numbers(box.numbers)
    at_once(2, lambda _: box.delivered(names))
    assert box.waiting == 0


def test_counts_that_grow_while_they_are_written_down_raise_nothing(make_room: Any) -> None:
    """A thread may add a name to the counts while another thread writes them down."""
    stats = make_room().stats
    counts = stats.counts

    class Growing(dict[str, int]):
        def items(self) -> Any:
            for number, pair in enumerate(list(dict.items(self))):
                counts[f"new:{number}"] = 1  # another thread's
                yield pair

    stats.counts["hits"] = stats.counts["misses"] = 1
    assert stats.flush(0)
    grown = Growing(stats.counts, hits=1, misses=2)
    stats.counts = grown
    counts = grown
    assert stats.flush(0)


def test_one_failing_reaction_to_recovery_keeps_none_from_its_turn(
    own_server: EmbeddedServer,
) -> None:
    """When Redis is back the outbox, the sessions and the limits are told in turn, though one of them raises."""
    settings = Settings(redis_url=own_server.url, breaker_failures=1)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        told = threading.Event()

        def fails() -> None:
            raise KeyError("k")

        room.wire.breaker.recovered[:0] = [fails]
        room.wire.breaker.recovered.append(told.set)
        own_server.kill()
        assert room.cache.get("k") is None
        own_server.restart()
        assert told.wait(10)
        assert room.cache.set("k", 1)


# Time of one call


def test_pauses_of_a_contended_change_are_a_part_of_its_time(own_server: EmbeddedServer) -> None:
    """Forty concurrent incr over a network of 30 ms each end within a call's deadline, done or not."""
    with Proxy(own_server.port) as proxy:
        settings = Settings(
            redis_url=proxy.url, pool_size=64, breaker_failures=10_000, breaker_calls=10_000
        )
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            room.cache.set("n", 0, ttl=600)
            proxy.sip = 0.0

            def count(_: int) -> float:
                began = time.monotonic()
                with contextlib.suppress(RedisUnavailable):
                    room.cache.incr("n")
                return time.monotonic() - began

            def crowd() -> float:
                """Return the share used of what half of the calls, and each, may take. It was two seconds."""
                with ThreadPoolExecutor(40) as threads:
                    times = sorted(threads.map(count, range(40)))
                return max(times[len(times) // 2] / 0.4, times[-1] / 0.8)

            proxy.sip = 0.03
            assert least(crowd, 1) < 1


def test_orders_that_do_not_fit_cost_the_event_loop_nothing(own_server: EmbeddedServer) -> None:
    """Orders that do not fit are given back by the dispatcher's thread: the event loop sends no batch for them."""
    with EmbeddedServer() as broker:
        settings = Settings(redis_url=own_server.url, broker_url=broker.url, ttl=0.01, swr=600)

        async def overflow() -> list[str]:
            async with AsyncStillroom(settings) as app:
                app.dispatch.waiting_limit = 1  # type: ignore[attr-defined]
                callers: list[str] = []
                body = app.operations.cache
                assert isinstance(body, CacheBody)
                run_aside = body._run_aside

                def noted(operation: Any) -> Any:
                    callers.append(threading.current_thread().name)
                    return run_aside(operation)

                body._run_aside = noted

                @app.cache.cached("k:{n}")
                async def load(n: int) -> int:
                    return n

                for n in range(10):
                    await load(n)
                await asyncio.sleep(0.05)
                broker.freeze()
                for n in range(10):
                    await load(n)
                broker.thaw()
                for _ in range(100):
                    if callers:
                        break
                    await asyncio.sleep(0.05)
                return callers

        callers = asyncio.run(overflow())
    assert callers
    assert "MainThread" not in callers


# Single and many


def test_a_failing_refresh_backs_off_in_a_batch_too(make_room: Any, client: Any) -> None:
    """In a batch a failing refresh backs off too: eight reads in two processes call each loader once."""
    calls = {"one": 0, "many": 0}

    def one() -> int:
        calls["one"] += 1
        raise OSError

    def many(keys: list[str]) -> dict[str, int]:
        calls["many"] += 1
        raise OSError

    times = {"ttl": 60, "swr": 600, "backoff": 60}
    app = make_room(**times)
    app.cache.set("one", 1)
    app.cache.set("many", 1)
    for key in (b"one", b"many"):
        age(client, app.keys.entry(key), 61)
    for _ in range(4):
        for process in (make_room(**times), make_room(**times)):
            process.cache.get("x")
            assert process.cache.get_or_set("one", one) == 1
            assert process.cache.get_or_set_many(["many"], many) == {"many": 1}
    assert calls == {"one": 1, "many": 1}


@pytest.mark.parametrize("why", ["keep", "an error", "none given"])
def test_a_refresh_that_brings_nothing_to_keep_backs_off(
    make_room: Any, client: Any, dispatch: Any, why: str
) -> None:
    """A refresh whose value is not kept backs off as a failed one: a stale value is not loaded with each read."""
    calls = {"ordered": 0, "one": 0, "many": 0}
    nothing: Any = object() if why == "an error" else None
    options: dict[str, Any] = {} if why == "an error" else {"keep": lambda found: found is not None}

    def load() -> Any:
        calls["ordered"] += 1
        return 1 if calls["ordered"] == 1 else nothing

    def one() -> Any:
        calls["one"] += 1
        return nothing

    def many(keys: list[str]) -> dict[str, Any]:
        calls["many"] += 1
        return {} if why == "none given" else dict.fromkeys(keys, nothing)

    app = make_room(ttl=60, swr=600, backoff=60)
    app.cache.set_many({"one": 1, "many": 1})
    cached = app.cache.cached("ordered", **options)(load)
    cached()
    for key in (b"ordered", b"one", b"many"):
        age(client, app.keys.entry(key), 61)
    for _ in range(4):
        assert cached() == 1
        dispatch.run_all(app)
        app.cache.get_or_set("one", one, **options)
        app.cache.get_or_set_many(["many"], many, **options)
        for shard in app.operations.cache.shards:
            shard.forget_asked()
    assert calls == {"ordered": 2, "one": 1, "many": 1}


@pytest.mark.parametrize("change", ["touch", "get", "get_many"])
def test_a_refresh_that_is_under_way_is_stopped_by_no_read_and_no_touch(
    make_room: Any, dispatch: Any, change: str
) -> None:
    """A read or touch does not stop a refresh under way. An incr, set or invalidation does, because it is newer."""
    room = make_room()
    value = {"v": "old"}

    def page() -> str:
        loaded = value["v"]
        {
            "touch": lambda: room.cache.touch("k", ttl=600),
            "get": lambda: room.cache.get("k"),
            "get_many": lambda: room.cache.get_many(["k"]),
        }[change]()
        return loaded

    load = room.cache.cached("k", ttl=600, tags=["t"])(page)
    worker = make_room()
    worker.cache.cached("k", ttl=600, tags=["t"])(page)
    load()
    value["v"] = "new"
    room.cache.invalidate_by_tag("t", soft=True)
    load()
    assert dispatch.run_all(worker) == ["refreshed"]
    entry = room.cache.get_entry("k")
    assert (entry.value, entry.freshness) == ("new", Freshness.FRESH)


def test_more_than_fits_into_one_batch_goes_in_several(
    room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch of a large bulk call has a deadline of its own, so that all of it is done in time."""
    cache, trips = room.cache, Trips(room, monkeypatch)
    few = {f"k{n}": n for n in range(2 * SCRIPTS_AT_ONCE + 1)}
    many = {f"m{n}": n for n in range(2 * KEYS_AT_ONCE + 1)}
    cache.set_many({"first": 1})
    cache.invalidate_many(["first"])
    assert cache.get_or_set_many(many, lambda keys: {key: many[key] for key in keys}) == many
    for act, given, expected in (
        (cache.set_many, few, dict.fromkeys(few, True)),
        (cache.get_many, many, many),
        (cache.invalidate_many, many, dict.fromkeys(many, True)),
    ):
        trips.taken()
        assert act(given) == expected
        assert trips.taken() >= 3


@pytest.mark.any_server
def test_a_batch_of_many_forgets_the_copies_of_its_own_keys(
    room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch of a large bulk call drops the copies of the keys that it changes, and of these alone.

    With all of the call's keys each time, 40,000 values took three times as long, and an event loop stood still.
    """
    (shard,) = getattr(room, "inner", room).operations.cache.shards
    dropped: list[bytes] = []
    drop = shard._memo.drop_copies
    monkeypatch.setattr(
        shard._memo, "drop_copies", lambda names: [dropped.extend(names), drop(names)]
    )
    few = {f"k{n}": n for n in range(2 * SCRIPTS_AT_ONCE + 1)}
    for act in (
        lambda: room.cache.set_many(few),
        lambda: room.cache.invalidate_many(few),
        lambda: room.cache.get_or_set_many(few, lambda keys: dict.fromkeys(keys, 1)),
    ):
        dropped.clear()
        act()
        assert dropped == [key.encode() for key in few]


# Nothing alive is deleted, nothing dead stays


@pytest.mark.any_server
@pytest.mark.parametrize("tags", [3, 130])
@pytest.mark.parametrize("again", ["set", "get_or_set", "incr"])
def test_a_sweep_deletes_nothing_that_came_while_it_looked(
    make_room: Any, tags: int, again: str
) -> None:
    """A sweep deletes no value that was written between any two of its commands, however long its header."""
    tagged = [f"tag-{n:04}" for n in range(tags)]
    app, worker = make_room(), make_room()
    app.stats.due = worker.stats.due = NEVER
    for stop in range(300):
        app.cache.clear()
        app.cache.set("k", 1, tags=tagged, ttl=600)
        app.cache.invalidate_by_pattern("nothing*")
        sweep = Stepper(worker, Reclaim(worker._cache_body, worker._pauses).clear_up(budget=60))
        for _ in range(stop):
            if not sweep.done:
                _on(sweep)
        app.cache.invalidate_by_tag("another")
        if again == "incr":
            assert app.cache.incr("k") == 2
        elif again == "set":
            assert app.cache.set("k", 2, tags=tagged, ttl=600)
        else:
            app.cache.invalidate("k")
            assert app.cache.get_or_set("k", lambda: 2, tags=tagged, ttl=600) == 2
        was_done = sweep.done
        while not sweep.done:
            _on(sweep)
        assert app.cache.get("k") == 2, f"after {stop} steps"
        if was_done:
            return
    raise AssertionError("the sweep never ended")


def _on(stepper: Stepper) -> None:
    if stepper.is_waiting:
        stepper._resume(None)
    else:
        stepper.step()


def test_a_touch_between_a_sweeps_look_and_its_deletion_keeps_nothing_alive(make_room: Any) -> None:
    """An entry touched between a sweep's look and its deletion is looked at again before its pattern is dropped."""
    limits = {"lease": 0.2, "refresh_lease": 0.2, "lease_limit": 0.2}
    app, worker = make_room(**limits), make_room(**limits)
    app.stats.due = worker.stats.due = NEVER
    app.cache.set("k", "old", ttl=60)
    assert app.cache.get("k") == "old"
    touch = Stepper(app, app._cache_body.touch("k", ttl=600))
    while not (isinstance(touch.at, list) and touch.at[0][0] == b"EVALSHA"):
        touch.step()
    worker.cache.invalidate_by_pattern("k*")
    time.sleep(0.3)  # the process that touches was stopped for longer than any lease
    sweep = Stepper(worker, Reclaim(worker._cache_body, worker._pauses).clear_up(budget=60))
    while not _is_deleting(sweep):
        _on(sweep)
    touch.value()
    while not sweep.done:
        _on(sweep)
    assert make_room(**limits).cache.get("k") is None


def _is_deleting(sweep: Stepper) -> bool:
    assert not sweep.done
    return isinstance(sweep.at, list) and any(forget.text.sha in command for command in sweep.at)


def test_an_answer_is_kept_under_the_version_that_was_read(make_room: Any, tmp_path: Path) -> None:
    """An image answer is stored under the version that was read, also when a deploy replaces the file
    in between.
    """

    def picture(name: str, width: int) -> None:
        Image.new("RGB", (width, 10)).save(tmp_path / name, "BMP")

    picture("v1.bmp", 10)
    os.utime(tmp_path / "v1.bmp", (1_700_000_000, 1_700_000_000))
    for stop in range(1, 12):
        app = make_room(image_root=tmp_path)
        app.stats.due = NEVER
        app.cache.clear()
        picture("v2.bmp", 77)
        shutil.copy2(tmp_path / "v1.bmp", tmp_path / "logo.bmp")
        call = Stepper(app, Images(app._cache_body).get_image_info("logo.bmp"))
        for _ in range(stop):
            if not call.done:
                call.step()
        os.replace(tmp_path / "v2.bmp", tmp_path / "logo.bmp")
        assert call.value().width in (10, 77)
        shutil.copy2(tmp_path / "v1.bmp", tmp_path / "logo.bmp")
        info = app.cache.get_image_info("logo.bmp")
        assert (info.width, info.size) == (10, (tmp_path / "logo.bmp").stat().st_size), stop
