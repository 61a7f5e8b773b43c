"""Invalidation runs behind the request: tasks sent by name to a real worker, and workers that are killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from celery import Celery
from celery.exceptions import Reject

from stillroom import RedisUnavailable, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom_workers.app import make_app
from stillroom_workers.tasks.invalidation import SENT_AGAIN_AFTER_S
from tests.support.celery_process import PATIENCE_S, CeleryProcess, until
from tests.support.crowd import PATIENT

QUEUE = "stillroom.maintenance"
StartWorker = Callable[..., CeleryProcess]


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    loaders = {"STILLROOM_LOADERS": "tests.support.shop_app", "STILLROOM_WORKER_THREADS": "2"}
    return environment | loaders


@pytest.fixture
def room(own_server: EmbeddedServer, db: Any) -> Iterator[Stillroom]:
    """Open the app's process."""
    with Stillroom(Settings(**PATIENT, redis_url=own_server.url)) as room:
        room.cache.invalidate_by_tag("begin")
        room.cache.reclaim()
        yield room


@pytest.fixture
def stranger(own_server: EmbeddedServer) -> Iterator[Celery]:
    """A Celery client that knows only names and fields, and keeps results."""
    app = Celery(broker=own_server.url, backend=own_server.url, set_as_current=False)
    yield app
    app.close()


def entries(db: Any, room: Stillroom) -> int:
    return len(db.keys(room.keys.entry_prefix + b"*"))


def test_each_task_is_called_by_name_and_returns_counts(
    start_worker: StartWorker,
    room: Stillroom,
    stranger: Celery,
    own_server: EmbeddedServer,
    db: Any,
) -> None:
    """Each task is called by name and returns counts; a message with wrong fields is refused and does nothing."""
    start_worker(STILLROOM_RESULT_BACKEND=own_server.url)
    room.cache.set_many({f"k:{n}": n for n in range(50)}, tags=["t"])
    room.cache.set_many({f"p:{n}": n for n in range(50)}, tags=["u"])

    def asked(task: str, **fields: Any) -> dict[str, Any]:
        """Return the whole result, as Celery keeps it."""
        task_id = stranger.send_task(f"stillroom.{task}", kwargs=fields, queue=QUEUE).id
        return dict(until(lambda: ended(db.get(f"celery-task-meta-{task_id}")), "the result", 30))

    def ask(task: str, **fields: Any) -> Any:
        return asked(task, **fields)["result"]

    assert ask("invalidate_keys", keys=["k:1", "nobody"]) == {"deleted": 1}
    for task, fields in [
        ("invalidate_tags", {"tags": ["t"], "more": 1}),
        ("invalidate_tags", {"tags": []}),
        ("reclaim", {"budget": 1}),
    ]:
        refused = asked(task, **fields)
        assert refused["status"] == "FAILURE"
        assert refused["result"]["exc_type"] == "OrderRefused"
        assert "refused: " in refused["result"]["exc_message"][0]
    assert entries(db, room) == 99
    assert ask("invalidate_tags", tags=["t"])["deleted"] == 49
    assert ask("invalidate_pattern", pattern="p:1*")["deleted"] == 11
    assert ask("trim_indexes")["indexes"] >= 1
    assert ask("reclaim")["deleted"] == 0
    assert entries(db, room) == 39
    assert room.cache.get("p:1") is None


def ended(kept: bytes | None) -> Any:
    """Return the result of a task that is over, or None."""
    result = json.loads(kept or b"{}")
    return result if result.get("status") in ("SUCCESS", "FAILURE") else None


@pytest.mark.timeout(240)
def test_progress_is_a_state_of_the_task(
    start_worker: StartWorker,
    room: Stillroom,
    stranger: Celery,
    own_server: EmbeddedServer,
    db: Any,
) -> None:
    """With a result backend a task's state is its progress: entries seen, deleted and in all."""
    start_worker(STILLROOM_RESULT_BACKEND=own_server.url)
    for start in range(0, 60_000, 5_000):
        room.cache.set_many({f"k:{n}": n for n in range(start, start + 5_000)}, tags=["t"])
    states: list[Any] = []
    result = stranger.send_task("stillroom.invalidate_tags", kwargs={"tags": ["t"]}, queue=QUEUE)

    def finished() -> bool:
        raw = db.get(f"celery-task-meta-{result.id}")
        state = json.loads(raw) if raw else {"status": "PENDING"}
        if state["status"] == "PROGRESS":
            states.append(state["result"])
        return bool(state["status"] == "SUCCESS")

    until(finished, "the task's end", 100)
    assert states
    assert states[-1]["total"] == 60_000
    assert 0 < states[0]["seen"] <= 60_000
    until(lambda: entries(db, room) == 0, "what a slow machine leaves to the next run", pause=0.5)


def test_what_an_app_does_and_orders_is_done_by_the_worker_it_wakes(
    start_worker: StartWorker, room: Stillroom, db: Any
) -> None:
    """A woken worker reclaims an invalidation's memory and carries out orders and loads, after soft ones too."""
    start_worker()
    db.set("db:version", 1)

    @room.cache.cached("product:{id}", ttl=60, swr=600, name="product", tags=["products"])
    def product(id: int) -> Any:
        return {"id": id, "version": -1}

    room.cache.set_many({f"k:{n}": n for n in range(500)}, tags=["t"])
    room.cache.invalidate_by_tag("t")
    until(lambda: entries(db, room) == 0, "the memory to be freed")
    assert product(1)["version"] == -1
    room.tasks.load(product, 1)
    until(lambda: product(1)["version"] == 1, "the ordered load")
    db.set("db:version", 2)
    room.cache.invalidate_by_tag("products", soft=True)
    until(lambda: room.cache.get_entry("product:1").value["version"] == 2, "the soft refresh")
    room.tasks.invalidate_keys("product:1")
    until(lambda: entries(db, room) == 0, "the ordered invalidation")
    until(lambda: not db.exists(room.keys.todo), "nothing to be left")


def test_an_order_outlives_an_outage_of_the_only_redis_of_the_app(
    start_worker: StartWorker, stranger: Celery, own_server: EmbeddedServer
) -> None:
    """An order by name whose worker finds cache and state away is carried out when they are back."""
    with EmbeddedServer() as away, Stillroom(Settings(redis_url=away.url)) as room:
        hurried = {f"STILLROOM_{name}_TIMEOUT": "1" for name in ("CONNECT", "COMMAND", "CALL")}
        places = {"REDIS_URL": away.url, "STILLROOM_BROKER_URL": own_server.url}
        worker = start_worker(**places | hurried)
        room.cache.set_many({"k": 1, "t": 1, "p:1": 1, "alive": 1})
        room.cache.set("t", 1, tags=["t"])
        os.kill(away.pid, signal.SIGSTOP)
        for task, fields in [
            ("keys", {"keys": ["k"]}),
            ("tags", {"tags": ["t"]}),
            ("pattern", {"pattern": "p:*"}),
        ]:
            stranger.send_task(f"stillroom.invalidate_{task}", kwargs=fields, queue=QUEUE)
        for task in ("keys", "tags", "pattern"):
            worker.await_line(f"invalidate_{task} waits until the cache's Redis is back")
        until(lambda: worker.log.count("'left': 1") >= 3, "the orders to be sent again")
        os.kill(away.pid, signal.SIGCONT)
        names = ("k", "t", "p:1", "alive")
        until(lambda: list(room.cache.get_many(names)) == ["alive"], "the invalidations")


@pytest.mark.long
def test_killed_workers_lose_nothing_and_delete_nothing_alive(
    start_worker: StartWorker, room: Stillroom, db: Any, is_full: bool
) -> None:
    """Twenty times (in short six) kill -9 in the middle of a reclaim loses no work and deletes nothing alive."""
    alive = [f"k:{n}" for n in range(0, 10_000, 10)]
    rounds = 20 if is_full else 6
    for round_ in range(rounds):
        for start in range(0, 10_000, 5_000):
            room.cache.set_many({f"k:{n}": n for n in range(start, start + 5_000)}, tags=["t"])
        worker = start_worker()
        room.cache.invalidate_by_tag("t")
        room.cache.set_many(dict.fromkeys(alive, round_), tags=["t"])
        if round_ % 2:
            room.cache.invalidate_by_pattern("k:*9")
        until(lambda: entries(db, room) < 7_500, "the reclaim to begin")
        worker.kill()
        assert room.cache.get_many(alive) == dict.fromkeys(alive, round_)
        for member, _ in db.zrange(room.keys.todo, 0, -1, withscores=True):
            db.zadd(
                room.keys.todo, {member: 0}
            )  # the minute has passed after which it is due again
    room.cache.reclaim(budget=60)
    assert room.cache.get_many(alive) == dict.fromkeys(alive, rounds - 1)
    assert entries(db, room) == len(alive)


def test_an_order_that_nobody_takes_goes_back_into_its_queue() -> None:
    """An order by name whose cache, state and broker are away is given back after a second, not acknowledged."""
    app = make_app(Settings(redis_url="redis://127.0.0.1:1"))
    began = time.monotonic()
    with pytest.raises(Reject) as told:
        app.tasks["stillroom.invalidate_keys"](keys=["k"])
    assert told.value.requeue
    assert time.monotonic() - began >= SENT_AGAIN_AFTER_S, "it would be taken again at once"
    app.room.close()


SLOW = [pytest.param(trouble, marks=pytest.mark.long) for trouble in ("away", "frozen")]


@pytest.mark.parametrize("trouble", ["refuses", "unusable", *SLOW])
def test_work_does_not_depend_on_where_results_are_kept(
    start_worker: StartWorker,
    room: Stillroom,
    stranger: Celery,
    own_server: EmbeddedServer,
    db: Any,
    trouble: str,
) -> None:
    """An invalidation is carried out soon, whatever the result backend does."""
    db.acl_setuser("nobody", enabled=True, passwords=["+nothing"], commands=["+ping"])
    with EmbeddedServer() as results:
        place = {
            "refuses": own_server.url.replace("://", "://nobody:nothing@"),
            "unusable": results.url.replace("redis://", "rediss://"),
        }.get(trouble, results.url)
        worker = start_worker(STILLROOM_RESULT_BACKEND=place)
        {"away": results.kill, "frozen": results.freeze}.get(trouble, lambda: None)()
        room.cache.set_many({f"k:{n}": n for n in range(20)})
        for n in range(20):
            fields = {"keys": [f"k:{n}"]}
            stranger.send_task("stillroom.invalidate_keys", kwargs=fields, queue=QUEUE)
        until(lambda: not entries(db, room), "the invalidations", 20)
        until(lambda: succeeded(worker) == 20, "the ends of the tasks", 20)
        assert "could not be kept" in worker.log
        if trouble == "frozen":
            results.thaw()


def succeeded(worker: CeleryProcess) -> int:
    """Return how many invalidations by key the log tells of."""
    lines = worker.log.splitlines()
    return sum("Task stillroom.invalidate_keys" in line and "succeeded" in line for line in lines)


def test_an_order_by_name_outlives_a_killed_process_of_the_pool(
    start_worker: StartWorker, stranger: Celery, own_server: EmbeddedServer, db: Any
) -> None:
    """With `-P prefork`, what a process was doing when it was killed is done by the next one."""
    with EmbeddedServer() as cache:
        places = {"STILLROOM_CACHE_URL": cache.url, "STILLROOM_WORKER_THREADS": "1"}
        patience = {"STILLROOM_CALL_TIMEOUT": "30", "STILLROOM_COMMAND_TIMEOUT": "30"}
        worker = start_worker("-P", "prefork", **places | patience)
        settings = Settings(**PATIENT, redis_url=own_server.url, cache_url=cache.url)
        with Stillroom(settings) as room, make_app(settings) as app:
            room.cache.set("k", "old", tags=["t"])
            cache.freeze()
            try:
                fields = {"tags": ["t"]}
                stranger.send_task("stillroom.invalidate_tags", kwargs=fields, queue=QUEUE)
                asks = app.control.inspect(timeout=1)
                until(lambda: any((asks.active() or {}).values()), "the task to begin")
                (process,) = psutil.Process(worker.process.pid).children()
                process.kill()
                process.wait(PATIENCE_S)
            finally:
                cache.thaw()
            until(lambda: room.cache.get("k") is None, "the invalidation")


def test_an_order_that_is_refused_for_good_is_not_sent_again(
    own_server: EmbeddedServer, db: Any
) -> None:
    """An order that the state's Redis will never take fails: sent again once a second, it would never end."""
    away = "redis://127.0.0.1:1"
    with make_app(Settings(redis_url=own_server.url, cache_url=away)) as app:
        db.set(app.room.keys.orders, "foreign")
        with pytest.raises(RedisUnavailable, match="wrongtype"):
            app.tasks["stillroom.invalidate_keys"](keys=["k"])
        app.room.close()
    assert db.llen(QUEUE) == 0


def test_a_reclaim_that_fails_gives_its_place_back() -> None:
    """A reclaim that finds Redis away leaves its place to the next one."""
    with make_app(Settings(redis_url="redis://127.0.0.1:1", worker_threads=1)) as app:
        for _ in range(2):
            with pytest.raises(RedisUnavailable):
                app.tasks["stillroom.reclaim"]()
        app.room.close()


def test_long_reclaims_leave_threads_to_other_work(own_server: EmbeddedServer, db: Any) -> None:
    """Half of a worker's threads carry out slow orders. One more reclaim ends at once and is not sent again."""
    loading, gate = threading.Semaphore(0), threading.Event()
    with make_app(Settings(redis_url=own_server.url, worker_threads=4)) as app:
        reclaim = app.tasks["stillroom.reclaim"]

        @app.room.cache.cached("slow:{n}", ttl=60)
        def slow(n: int) -> int:
            loading.release()
            return gate.wait(PATIENCE_S)

        for n in range(2):
            app.room.upkeep.order_load("slow", {"n": n})
        with ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(reclaim) for _ in range(2)]
            try:
                assert all(loading.acquire(timeout=PATIENCE_S) for _ in runs)
                assert reclaim() == {"outcome": "others are at it"}
                assert db.llen(QUEUE) == 0
            finally:
                gate.set()
        assert sum(run.result()["done"] for run in runs) == 2
        assert "done" in reclaim()
        app.room.close()


def test_what_is_ordered_beside_a_long_reclaim_is_done_after_it(
    own_server: EmbeddedServer, db: Any
) -> None:
    """A reclaim that found no place is made up for: the run that had it looks for orders first."""
    loading, gate = threading.Semaphore(0), threading.Event()
    with make_app(Settings(redis_url=own_server.url, worker_threads=2)) as app:
        reclaim = app.tasks["stillroom.reclaim"]

        @app.room.cache.cached("slow:{n}", ttl=60, swr=60, tags=["slow"])
        def slow(n: int) -> bool:
            loading.release()
            return gate.is_set() or gate.wait(PATIENCE_S)

        gate.set()
        slow(1)
        gate.clear()
        app.room.cache.invalidate_by_tag("slow", soft=True)
        assert loading.acquire(timeout=1)
        with ThreadPoolExecutor(1) as threads:
            run = threads.submit(reclaim)
            try:
                assert loading.acquire(timeout=PATIENCE_S)
                app.room.upkeep.order_load("slow", {"n": 2})
                assert reclaim() == {"outcome": "others are at it"}
            finally:
                gate.set()
            assert run.result()["due"] == 0
        assert db.llen(QUEUE) == 1
        assert reclaim()["done"] == 1
        assert db.llen(QUEUE) == 1
        app.room.close()


def test_a_reclaim_that_finds_a_place_a_moment_too_late_is_done(own_server: EmbeddedServer) -> None:
    """Where the run that had the place ends just before it can be asked for another one, the work is done here."""
    with make_app(Settings(redis_url=own_server.url, worker_threads=1)) as app:

        class EndsBefore(threading.Event):
            def set(self) -> None:
                app.places_to_reclaim.release()
                super().set()

        app.asked_to_reclaim = EndsBefore()
        assert app.places_to_reclaim.acquire(blocking=False)
        app.room.cache.set("k", 1, tags=["t"])
        app.room.cache.invalidate_by_tag("t")
        assert app.tasks["stillroom.reclaim"]()["deleted"] == 1
        app.room.close()
