"""Real workers report signs of life, ticks, and one snapshot a minute however many beats there are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import signals
from celery.worker import state

from stillroom import Settings, Stillroom
from stillroom.broker import publish
from stillroom.embedded import EmbeddedServer
from stillroom.health.body import SCHEDULED
from stillroom.keys import Keys
from stillroom_workers.app import make_app
from stillroom_workers.schedule import SCHEDULE
from stillroom_workers.working import Working
from tests.support.celery_process import CeleryProcess, until
from tests.support.entries import age

StartCelery = Callable[..., CeleryProcess]


@pytest.fixture
def room(own_server: EmbeddedServer, db: Any) -> Iterator[Stillroom]:
    settings = Settings(
        redis_url=own_server.url, call_timeout=5, command_timeout=5, health_timeout=10
    )
    with Stillroom(settings) as room:
        yield room


def test_two_beats_and_two_workers_keep_one_snapshot_a_minute(
    start: StartCelery, start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """Two beats and two workers with a tick five times a second keep one snapshot for each minute."""
    began = int(time.time()) // 60
    for name in ("one", "two"):
        start_worker("-n", f"{name}@%h")
        start("beat", "-S", "celery.beat:Scheduler", "--pidfile=", app="tests.support.quick_beat")
    until(lambda: db.xlen(room.keys.health) > 0, "a snapshot")
    until(lambda: room.health.check().tasks.workers == 2, "two workers seen")
    scheduled = {tick.task for tick in SCHEDULE}
    until(lambda: set(room.health.check().tasks.ticks) == scheduled, "every tick's time")
    assert room.health.check().tasks.beat_s < 30
    minutes = int(time.time()) // 60 - began + 1
    assert db.xlen(room.keys.health) <= minutes
    (queue, *_) = [q for q in room.health.check().tasks.queues if q.name.endswith("maintenance")]
    assert queue.depth is not None


def test_a_tick_that_waits_says_for_how_long(own_server: EmbeddedServer, db: Any) -> None:
    """Ticks from beat and tasks from an app's dispatch have their time in the headers."""
    settings = Settings(redis_url=own_server.url)
    keys = Keys(settings.namespace)
    queue = keys.queue("maintenance")
    with make_app(settings) as app:
        app.send_task("stillroom.trim_marks")
        app.finalize()
        app.tasks["stillroom.trim_marks"].apply_async(headers={"mine": 1})
    with Stillroom(settings) as room:
        room.dispatch.wake("stillroom.reclaim")
        until(lambda: db.llen(queue) == 3, "three messages")
        headers = [json.loads(message)["headers"] for message in db.lrange(queue, 0, -1)]
        for header in headers:
            assert abs(header["stillroom_sent_ms"] / 1000 - time.time()) < 30
        assert headers[1]["mine"] == 1
        (waiting,) = [q for q in room.health.check().tasks.queues if q.name == queue]
    assert waiting.depth == 3
    assert waiting.oldest_s is not None


def test_what_a_worker_counts_reaches_the_report(
    start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """A refresh in a worker is counted with its lag before that worker ends."""
    start_worker(STILLROOM_LOADERS="tests.support.shop_app")

    @room.cache.cached("product:{id}", ttl=60, swr=600, name="product")
    def product(id: int) -> Any:
        return {"id": id, "version": -1}

    product(1)
    age(db, b"stillroom:{0}:e:product:1", 60 + 100)
    product(1)
    until(lambda: db.hget(room.keys.counts, "refreshes_done"), "its count")
    counts = {name: int(n) for name, n in db.hgetall(room.keys.counts).items()}
    assert counts[b"refreshes_done"] == counts[b"refresh_lag_300"] == 1
    assert 100_000 <= counts[b"refresh_lag_ms"] < 200_000


def test_what_a_process_of_the_pool_counts_outlives_it(
    start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """Each refresh is counted, however soon the process of the pool that carried it out ends."""
    options = ("-P", "prefork", "-c", "1", "--max-tasks-per-child", "2")
    start_worker(*options, STILLROOM_LOADERS="tests.support.shop_app")

    @room.cache.cached("product:{id}", ttl=60, swr=600, name="product")
    def product(id: int) -> Any:
        return {"id": id, "version": -1}

    for n in range(2):
        product(n)
        age(db, b"stillroom:{0}:e:product:%d" % n, 61)
        product(n)
        until(lambda n=n: product(n)["version"] >= 0, "the refresh")
    until(lambda: db.hget(room.keys.counts, "refreshes_done") == b"2", "their counts")


def test_a_worker_tells_what_failed_in_its_processes(
    start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """A worker with `-P prefork` counts the tasks that failed in the processes of its pool."""
    start_worker("-P", "prefork", "-c", "1")
    order = {"no_such_field": 1}
    publish(room.settings, "stillroom.invalidate_keys", "stillroom.maintenance", [], order)
    until(lambda: [one.failed for one in room.health.check().tasks.crew] == [1], "its figure")


def test_a_rate_is_of_the_last_minute() -> None:
    """A worker tells how many tasks a minute it has done in the last one, and none before it knows two counts."""
    working = Working(make_app(Settings()))
    told = [working._per_minute(now, done) for now, done in [(0, 0), (30, 30), (60, 90), (120, 90)]]
    assert told == [None, 60.0, 90.0, 0.0]


def test_a_task_that_runs_is_busy_and_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running task is told among the busy ones, and among the done ones when it has ended."""
    monkeypatch.setattr(state, "active_requests", {"one", "two"})
    monkeypatch.setattr(state, "all_total_count", [7])
    about = Working(make_app(Settings())).about()
    assert (about.busy, about.done) == (2, 5)


def test_a_tick_is_of_the_app_whose_task_has_ended(own_server: EmbeddedServer, db: Any) -> None:
    """The end of a scheduled task is written down for its own app, and not for another one of the process."""
    place = own_server.url
    with (
        make_app(Settings(redis_url=place)) as ours,
        make_app(Settings(redis_url=place, namespace="other")) as other,
    ):
        task = other.tasks["stillroom.reclaim"]
        signals.task_success.send(sender=task, result=None)
        for app in (ours, other):
            app.room.close()
    assert db.exists("other:ticks")
    assert not db.exists("stillroom:ticks")


def test_health_looks_at_each_scheduled_task() -> None:
    """Health knows each scheduled task, and so misses the one that always fails."""
    assert set(SCHEDULED) == {tick.task for tick in SCHEDULE}


def test_the_schedule_has_the_snapshot() -> None:
    """The schedule has the snapshot every minute."""
    assert [tick.every for tick in SCHEDULE if tick.task == "stillroom.snapshot_health"] == [60]
