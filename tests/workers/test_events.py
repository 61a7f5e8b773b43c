"""A worker's events to Flower and other listeners hold no private data."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signals
from celery.events import EventReceiver

import redis
from stillroom import Settings, Stillroom, otel
from stillroom.embedded import EmbeddedServer
from stillroom_workers.app import make_app
from stillroom_workers.events import flaw_in_events
from tests.support.celery_process import PATIENCE_S, CeleryProcess

SECRET = "user:ada@example.org"
ORDER: dict[str, Any] = {
    "loader": "product",
    "args": {"id": SECRET},
    "key": SECRET,
    "token": "0" * 16,
}


TOLD: list[tuple[str, dict[str, Any], str]] = [
    ("invalidate_keys", {"keys": [SECRET, SECRET]}, "keys: 2"),
    ("invalidate_tags", {"tags": [SECRET], "soft": True}, "tags: 1, soft: True"),
    ("invalidate_pattern", {"pattern": SECRET}, "pattern: …"),
    ("refresh", ORDER | {"args": {"id": 7}}, "loader: product, args: 1, key: …, token: …"),
    ("refresh_many", {"orders": [ORDER]}, "orders: 1"),
]


def test_events_count_arguments_and_never_quote_them(
    worker: CeleryProcess, stranger: Celery
) -> None:
    """Events count a task's arguments and never quote them, because a key may be a person's address."""
    events: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    with stranger.connection_for_read() as connection:
        handlers = {"task-received": events.append, "task-succeeded": ends.append}
        handlers["task-failed"] = ends.append
        receiver = stranger.events.Receiver(connection, handlers=handlers)
        heard = receiver.consume(
            limit=None, timeout=PATIENCE_S
        )  # it asks workers for a sign of life:
        next(heard)  # now it listens
        for task, arguments, _ in TOLD:
            queue = "stillroom.refresh" if "refresh" in task else "stillroom.maintenance"
            stranger.send_task(f"stillroom.{task}", kwargs=arguments, queue=queue)
        while len(ends) < len(TOLD):
            next(heard)
        heard.close()
    names = [event["name"].removeprefix("stillroom.").partition(":")[0] for event in events]
    shown = {name: event["kwargs"] for name, event in zip(names, events, strict=True)}
    assert shown == {task: told for task, _, told in TOLD}
    heard_of = [*events, *ends]
    assert SECRET not in str(heard_of)
    told = [{name: event[name] for name in event if name != "local_received"} for event in heard_of]
    assert flaw_in_events(told) is None


BEGUN: dict[str, Any] = {
    "type": "task-received",
    "uuid": "3f1c",
    "hostname": "celery@w1",
    "name": "stillroom.warm",
    "timestamp": 1_795_000_000.5,
    "utcoffset": 0,
    "pid": 7,
    "clock": 12,
    "retries": 0,
    "args": "",
    "kwargs": "keys: 2",
    "root_id": "3f1c",
    "parent_id": None,
    "eta": None,
}
AT_WORK: dict[str, Any] = {
    "type": "worker-heartbeat",
    "hostname": "celery@w1",
    "timestamp": 1_795_000_000.5,
    "utcoffset": 0,
    "pid": 7,
    "clock": 12,
    "freq": 2.0,
    "active": 0,
    "processed": 3,
    "loadavg": [0.1, 0.2, 0.3],
    "sw_ident": "py-celery",
    "sw_ver": "5.7.0",
    "sw_sys": "Linux",
}
STRANGE = [
    "\x1b[31m",
    {"a": 1},
    ["x"],
    True,
    "\ud800",
    float("nan"),
    float("inf"),
    "x" * 300,
    -1e300,
]


@pytest.mark.parametrize("event", [BEGUN, AT_WORK], ids=["task", "worker"])
def test_an_event_of_another_form_has_a_flaw(event: dict[str, Any]) -> None:
    """An event is kept as Celery's workers send it; what a page or a metric can't show is not."""
    assert flaw_in_events(event) is flaw_in_events([event, event]) is None
    for name in event:
        texts = ("args", "kwargs")
        refused = [one for one in STRANGE if not (name in texts and isinstance(one, str))]
        for value in [*refused, *(["\ud800"] if name in texts else [])]:
            assert flaw_in_events({**event, name: value}) is not None, (name, value)
    for wrong in (None, [None], "x", {}, {**event, "event": "x"}, {**event, "type": "task-x"}):
        assert flaw_in_events(wrong) is not None


def test_who_watches_is_told_of_plain_events_alone(own_server: EmbeddedServer) -> None:
    """Strange events are dropped before a listener keeps them, and the next one is heard at once."""
    heard: list[dict[str, Any]] = []
    with (
        Celery(
            broker=own_server.url, set_as_current=False, amqp="stillroom_workers.connections:AMQP"
        ) as app,
        redis.Redis.from_url(own_server.url) as client,
    ):
        app.conf.update(event_exchange="stillroom.celeryev", control_exchange="stillroom")
        with app.connection_for_read() as connection:
            receiver = EventReceiver(connection, handlers={"*": heard.append}, app=app)
            listens = receiver.consume(limit=None, timeout=PATIENCE_S, wakeup=False)
            next(listens)  # now it listens
            strange = [[1], {**BEGUN, "clock": "x"}, {**BEGUN, "uuid": None}, None]
            for raw in (b"[1]", b"{", *map(_envelope, [*strange, BEGUN])):
                client.publish("/0.stillroom.celeryev/task.multi", raw)
            while not heard:
                next(listens)
            listens.close()
    assert [event["uuid"] for event in heard] == [BEGUN["uuid"]]


def test_who_watches_is_told_how_far_an_invalidation_has_got(
    worker: CeleryProcess, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The progress that our workers tell of reaches Flower, and is not dropped as a stranger's event."""
    heard: list[dict[str, Any]] = []
    with (
        Celery(
            broker=own_server.url, set_as_current=False, amqp="stillroom_workers.connections:AMQP"
        ) as app,
        Stillroom(own_server.url) as room,
    ):
        app.conf.update(event_exchange="stillroom.celeryev", control_exchange="stillroom")
        room.cache.set("product:7", 1, tags=["products"])
        with app.connection_for_read() as connection:
            receiver = EventReceiver(connection, handlers={"task-progress": heard.append}, app=app)
            listens = receiver.consume(limit=None, timeout=PATIENCE_S)
            next(listens)  # now it listens
            room.cache.invalidate_by_tag("products")
            while not heard:
                next(listens)
            listens.close()
    assert (heard[0]["seen"], heard[0]["deleted"]) == (1, 1)
    assert "An event of" not in caplog.text


def _envelope(body: Any) -> bytes:
    text = base64.b64encode(json.dumps(body).encode()).decode()
    info = {"delivery_info": {"exchange": "stillroom.celeryev", "routing_key": "task.multi"}}
    properties = {**info, "body_encoding": "base64", "delivery_tag": "1"}
    headers = {"content-type": "application/json", "content-encoding": "utf-8", "headers": {}}
    return json.dumps({"body": text, "properties": properties, **headers}).encode()


# What Flower asks for its pages.
ASKED = (
    "stats",
    "conf",
    "active_queues",
    "registered",
    "revoked",
    "active",
    "reserved",
    "scheduled",
)


def test_questions_are_answered_without_arguments(worker: CeleryProcess, stranger: Celery) -> None:
    """A worker answers what Flower asks. Of a task that it holds it tells how much that was given, not what."""
    fields, queue = {"keys": [SECRET]}, "stillroom.maintenance"
    stranger.send_task("stillroom.invalidate_keys", kwargs=fields, queue=queue, countdown=600)
    worker.await_line("received")
    asks = stranger.control.inspect(timeout=5, limit=1)
    told = {what: dict(getattr(asks, what)() or {}) for what in ASKED}
    (name,) = told["stats"]
    assert all(name in answers for answers in told.values())
    assert told["stats"][name]["pool"]["max-concurrency"] > 0
    (waits,) = told["scheduled"][name]
    assert waits["request"]["kwargs"] == "keys: 1"
    assert SECRET not in str([told, asks.query_task(waits["request"]["id"])])


@pytest.fixture
def worker(own_server: EmbeddedServer, tmp_path: Path) -> Any:
    process = CeleryProcess(
        tmp_path / "worker.log",
        {"REDIS_URL": own_server.url, "STILLROOM_LOADERS": "tests.support.shop_app"},
        *("worker", "--without-gossip", "--without-mingle", "-l", "INFO"),
    )
    try:
        process.await_line(" ready.")
        yield process
    finally:
        process.kill()


def test_each_run_of_a_message_ends_its_own_span(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one message at the same time have a span each, which ends in the thread that began it."""
    both, began, ended = threading.Barrier(2, timeout=PATIENCE_S), set(), set()

    @contextmanager
    def span(*_: Any) -> Iterator[None]:
        began.add(threading.get_ident())
        yield
        ended.add(threading.get_ident())

    monkeypatch.setattr(otel, "task", span)
    with make_app(Settings(redis_url=own_server.url, otel=True)) as app:
        task = app.tasks["stillroom.reclaim"]

        def run(_: int) -> None:
            signals.task_prerun.send(sender=task, task_id="one", task=task)
            both.wait()
            signals.task_postrun.send(sender=task, task_id="one")

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(run, range(2)))
        app.room.close()
    assert len(began) == 2
    assert ended == began
