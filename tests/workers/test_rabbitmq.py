"""RabbitMQ as the broker: its queues are on most nodes of its cluster, and what lives in Redis stays there."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import CeleryProcess, until
from tests.support.crowd import PATIENT
from tests.support.entries import age
from tests.support.rabbit import RabbitServer, is_installed

pytestmark = [
    pytest.mark.skipif(not is_installed(), reason="rabbitmq-server is not installed"),
    pytest.mark.timeout(300),
]
QUEUES = ("stillroom.refresh", "stillroom.maintenance")


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    with RabbitServer() as server:
        yield server


@pytest.fixture
def environment(environment: dict[str, str], rabbit: RabbitServer) -> dict[str, str]:
    return environment | {
        "STILLROOM_BROKER_URL": rabbit.url,
        "STILLROOM_LOADERS": "tests.support.shop_app",
        "STILLROOM_WORKER_THREADS": "2",
    }


@pytest.fixture
def room(own_server: EmbeddedServer, rabbit: RabbitServer, db: Any) -> Iterator[Stillroom]:
    """The app's process, which publishes by itself."""
    places = {"redis_url": own_server.url, "broker_url": rabbit.url}
    with Stillroom(Settings(**PATIENT | places)) as room:
        yield room


def waiting(rabbit: RabbitServer, queue: str) -> int:
    """How many messages wait there, asked with what makes it: RabbitMQ refuses any other kind of queue."""
    connection = rabbit.connection()
    try:
        kind = {"x-queue-type": "quorum"}
        found = connection.channel().queue_declare(
            queue, durable=True, auto_delete=False, arguments=kind
        )
        return int(found.message_count)
    finally:
        connection.close()


def read_stale(room: Stillroom, db: Any, id: int) -> None:
    """Read a value of this process that is stale: it comes at once, and a worker is asked for the next one."""

    def load(id: int) -> Any:  # the worker's declares a model: another type is another release's
        return {"id": id, "version": -1}

    product = room.cache.cached("product:{id}", name="product", ttl=60, swr=600)(load)
    old = product(id)
    (key,) = db.keys(room.keys.entry_prefix + b"product:%d*" % id)
    age(db, key, 61)
    assert product(id) == old


def send(rabbit: RabbitServer, task: str, fields: dict[str, Any], **options: Any) -> None:
    """Send a task by name, as a Celery app does that knows nothing of Stillroom."""
    with Celery(broker=rabbit.url, set_as_current=False) as stranger:
        stranger.conf.task_create_missing_queue_type = "quorum"
        stranger.send_task(task, kwargs=fields, queue="stillroom.maintenance", **options)


def loads(db: Any) -> int:
    return int(db.get("db:loads") or 0)


def test_an_order_an_invalidation_and_ticks_come_through(
    start: Callable[..., CeleryProcess],
    start_worker: Callable[..., CeleryProcess],
    room: Stillroom,
    rabbit: RabbitServer,
    db: Any,
) -> None:
    """A stale read is refreshed, a task that a stranger sends by name is done, and beat's ticks are."""
    worker = start_worker()
    start("beat", app="tests.support.quick_beat")

    read_stale(room, db, 7)
    until(lambda: loads(db) == 1, "the worker has loaded", 30)

    room.cache.set("k", 1, tags=["t"])
    send(rabbit, "stillroom.invalidate_tags", {"tags": ["t"]})
    until(lambda: room.cache.get("k") is None, "the invalidation is done", 30)
    until(lambda: db.hlen("stillroom:ticks") > 0, "ticks are done", 30)
    assert "Traceback" not in worker.log
    assert room.health.check().tasks.queues is None, "they are not in this Redis"
    assert not [key for key in db.keys("*") if b"kombu" in key or b"unacked" in key]


def test_what_a_killed_worker_held_goes_to_the_next(
    start_worker: Callable[..., CeleryProcess],
    room: Stillroom,
    rabbit: RabbitServer,
    db: Any,
) -> None:
    """RabbitMQ gives it back as soon as the connection is gone; nobody waits for a visibility timeout."""
    db.set("db:gate", 1)
    first = start_worker()
    read_stale(room, db, 8)
    until(lambda: db.exists("db:waiting"), "the worker is at it", 30)
    first.process.kill()
    first.process.wait(10)
    db.delete("db:gate")
    until(lambda: waiting(rabbit, QUEUES[0]) == 1, "the order is back", 30)
    second = start_worker()
    # The dead worker had claimed the refresh: it is not done twice, and a stale read asks again after its lease.
    second.await_line("'outcome': 'superseded'", 30)
    for queue in QUEUES:
        until(lambda queue=queue: waiting(rabbit, queue) == 0, "none is left", 30)


def test_what_is_no_task_is_a_dead_letter(
    start_worker: Callable[..., CeleryProcess],
    room: Stillroom,
    rabbit: RabbitServer,
) -> None:
    """The worker keeps it and lives, as on Redis; RabbitMQ would give it to the next one."""
    worker = start_worker()
    send(rabbit, "shop.no_task", {"id": 7})
    send(rabbit, "stillroom.trim_indexes", {}, compression="gzip")
    send(rabbit, "stillroom.trim_indexes", {}, serializer="pickle")
    send(rabbit, "stillroom.trim_indexes", {}, headers={"eta": "at noon"})
    send(rabbit, "stillroom.invalidate_keys", {"keys": ["a" * 1024 * 1024]})
    room.cache.set("k", 1, tags=["t"])
    send(rabbit, "stillroom.invalidate_tags", {"tags": ["t"]})
    until(lambda: room.cache.get("k") is None, "the invalidation is done", 30)

    letters = room.state.run(room.dead_letters.list())
    expected = ["no such task", "is compressed", "content type", "not a date", "bytes"]
    for letter, text in zip(letters, expected, strict=True):
        assert text in letter.reason
    named = {"task": "shop.no_task", "queue": QUEUES[1], "args": [], "kwargs": {"id": 7}}
    assert json.loads(letters[0].body) == named
    assert worker.process.poll() is None


def test_a_worker_works_while_rabbitmq_confirms_nothing(
    start_worker: Callable[..., CeleryProcess],
    room: Stillroom,
    rabbit: RabbitServer,
    db: Any,
) -> None:
    """It empties the queues, which is what makes room; who publishes is told, and waits for nothing."""
    start_worker(STILLROOM_WORKER_THREADS="1")
    db.set("db:gate", 1)
    read_stale(room, db, 9)
    until(lambda: db.exists("db:waiting"), "the worker is at it", 30)
    read_stale(room, db, 10)
    until(lambda: waiting(rabbit, QUEUES[0]) >= 1, "another order waits", 30)
    with rabbit.short_of_memory():
        db.delete("db:gate")
        db.rpush("db:opened", 1)
        until(lambda: loads(db) == 2, "both are done", 30)
        read_stale(room, db, 11)
        until(lambda: not room.dispatch.ready, "the app has noticed", 10)
    until(lambda: room.dispatch.ready, "it tries again", 10)
    read_stale(room, db, 12)
    until(lambda: loads(db) == 3, "the worker has loaded", 30)


def test_a_worker_ends_at_sigterm_while_rabbitmq_hangs(
    start_worker: Callable[..., CeleryProcess],
    room: Stillroom,
    rabbit: RabbitServer,
    db: Any,
) -> None:
    """It lets its running load end, acknowledges the order, and ends with 0 within the 30 s of a container."""
    worker = start_worker()
    db.set("db:gate", 1)
    read_stale(room, db, 13)
    until(lambda: db.exists("db:waiting"), "the worker is at it", 30)
    with rabbit.hanging():
        worker.process.send_signal(signal.SIGTERM)
        worker.await_line("Warm shutdown")
        db.delete("db:gate")
        db.rpush("db:opened", 1)
        assert worker.process.wait(30) == 0
    assert loads(db) == 1
    start_worker()
    read_stale(room, db, 14)
    until(lambda: loads(db) >= 2, "the next worker works", 30)
    assert loads(db) == 2, "the order did not come again"


def test_a_worker_and_rabbitmq_notice_soon_that_the_other_is_gone(
    start_worker: Callable[..., CeleryProcess], rabbit: RabbitServer
) -> None:
    """Both connections of a worker have a heartbeat of 20 s, not the minute that RabbitMQ would take."""
    start_worker()
    until(lambda: [beat for beat in rabbit.heartbeats() if beat] == [20, 20], "both are there", 30)
