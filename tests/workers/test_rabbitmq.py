"""RabbitMQ as the broker: its queues are on most nodes of its cluster, and what lives in Redis stays there."""

from __future__ import annotations

import json
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from amqp import Message
from celery import Celery
from celery.events import EventReceiver

from stillroom import Settings, Stillroom
from stillroom.cli.doctor import examined
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import PATIENCE_S, CeleryProcess, until
from tests.support.crowd import PATIENT
from tests.support.entries import age
from tests.support.rabbit import RabbitServer, is_installed
from tests.workers.test_events import BEGUN

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
    until(lambda: loads(db) == 1, "the worker has loaded")

    room.cache.set("k", 1, tags=["t"])
    send(rabbit, "stillroom.invalidate_tags", {"tags": ["t"]})
    until(lambda: room.cache.get("k") is None, "the invalidation is done")
    until(lambda: db.hlen("stillroom:ticks") > 0, "ticks are done")
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
    until(lambda: db.exists("db:waiting"), "the worker is at it")
    first.process.kill()
    first.process.wait(PATIENCE_S)
    db.delete("db:gate")
    until(lambda: waiting(rabbit, QUEUES[0]) == 1, "the order is back")
    second = start_worker()
    # The dead worker had claimed the refresh: it is not done twice, and a stale read asks again after its lease.
    second.await_line("'outcome': 'superseded'")
    for queue in QUEUES:
        until(lambda queue=queue: waiting(rabbit, queue) == 0, "none is left")


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
    until(lambda: room.cache.get("k") is None, "the invalidation is done")

    letters = room.state.run(room.dead_letters.list())
    expected = ["no such task", "is compressed", "content type", "not a date", "bytes"]
    for letter, text in zip(letters, expected, strict=True):
        assert text in letter.reason
    named = {"task": "shop.no_task", "queue": QUEUES[1], "args": [], "kwargs": {"id": 7}}
    assert json.loads(letters[0].body) == named
    assert worker.process.poll() is None


def nested(depth: int) -> bytes:
    """Return a header whose value is lists in lists, as they are written on the wire."""
    value = b"V"
    for _ in range(depth):
        value = b"A" + struct.pack(">I", len(value)) + value
    return b"\x01x" + value


# The headers and the id of messages that RabbitMQ hands on, and amqp can't read, or nobody can write as JSON.
UNREADABLE = [
    (b"\x01xT" + struct.pack(">Q", 2**40), b"behind the year 9999"),
    (b"\x01xT" + struct.pack(">Q", 2**63), b"behind the end of the machine's clock"),
    (b"", b"\xff"),
    (b"\x01\xffV", b"a name that is no text"),
    (nested(880), b"nearly too deep for Python"),
    (nested(5_000), b"too deep"),
]


class Odd(Message):
    """A message with these bytes for its properties."""

    def __init__(self, headers: bytes, correlation_id: bytes) -> None:
        super().__init__("[[], {}, {}]")
        self._raw = b"\xa4\x00\x10application/json" + struct.pack(">I", len(headers)) + headers
        self._raw += bytes([len(correlation_id)]) + correlation_id

    def _serialize_properties(self) -> bytes:
        return self._raw


def letters_of(room: Stillroom, number: int) -> list[Any]:
    """Return the dead letters, or none as long as there are fewer."""
    letters = list(room.state.run(room.dead_letters.list()))
    return letters if len(letters) >= number else []


def test_a_message_that_no_client_can_read_ends_no_worker(
    start_worker: Callable[..., CeleryProcess], room: Stillroom, rabbit: RabbitServer
) -> None:
    """It becomes a dead letter that says why, also as a command to all workers. Stock ends, one worker after the
    other.
    """
    worker = start_worker()
    room.cache.set("k", 1, tags=["t"])
    with closing(rabbit.connection()) as connection:
        channel = connection.channel()
        for exchange, key in (("stillroom.pidbox", b"\xff"), ("", QUEUES[1])):
            for one in UNREADABLE:
                channel.basic_publish(Odd(*one), exchange, key)
        letters: list[Any] = until(lambda: letters_of(room, 2 * len(UNREADABLE)), "the letters")
    send(rabbit, "stillroom.invalidate_tags", {"tags": ["t"]})
    until(lambda: room.cache.get("k") is None, "the invalidation is done", 30)

    queues = [json.loads(letter.body)["queue"] for letter in letters]
    assert (queues.count("?"), queues.count(QUEUES[1])) == (len(UNREADABLE), len(UNREADABLE))
    assert all("its properties can't be read: " in letter.reason for letter in letters)
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
    until(lambda: db.exists("db:waiting"), "the worker is at it")
    read_stale(room, db, 10)
    until(lambda: waiting(rabbit, QUEUES[0]) >= 1, "another order waits")
    with rabbit.short_of_memory():
        db.delete("db:gate")
        db.rpush("db:opened", 1)
        until(lambda: loads(db) == 2, "both are done")
        read_stale(room, db, 11)
        until(lambda: not room.dispatch.ready, "the app has noticed")
    until(lambda: room.dispatch.ready, "it tries again")
    read_stale(room, db, 12)
    until(lambda: loads(db) == 3, "the worker has loaded")


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_a_worker_ends_at_sigterm_while_rabbitmq_hangs(
    start_worker: Callable[..., CeleryProcess],
    room: Stillroom,
    rabbit: RabbitServer,
    db: Any,
    pool: str,
) -> None:
    """It lets its running load end, acknowledges the order, and ends with 0 within the 30 s of a container."""
    worker = start_worker("-P", pool)
    db.set("db:gate", 1)
    read_stale(room, db, 13)
    until(lambda: db.exists("db:waiting"), "the worker is at it")
    with rabbit.hanging():
        worker.process.send_signal(signal.SIGTERM)
        worker.await_line("Warm shutdown")
        db.delete("db:gate")
        db.rpush("db:opened", 1)
        assert worker.process.wait(30) == 0
    assert loads(db) == 1
    start_worker()
    read_stale(room, db, 14)
    until(lambda: loads(db) >= 2, "the next worker works")
    assert loads(db) == 2, "the order did not come again"


def test_a_worker_and_rabbitmq_notice_soon_that_the_other_is_gone(
    start_worker: Callable[..., CeleryProcess], rabbit: RabbitServer
) -> None:
    """Both connections of a worker have a heartbeat of 20 s, not the minute that RabbitMQ would take."""
    start_worker()
    until(lambda: [beat for beat in rabbit.heartbeats() if beat] == [20, 20], "both are there")


REFUSED = {
    "a wrong password": "the broker refuses the login in STILLROOM_BROKER_URL (ACCESS_REFUSED",
    "no such host": "the broker refuses the virtual host in STILLROOM_BROKER_URL (NOT_ALLOWED",
    "a host of others": "the broker refuses the virtual host in STILLROOM_BROKER_URL (NOT_ALLOWED",
    "no right to declare": "the user in STILLROOM_BROKER_URL lacks a right that workers need",
    "no right to read": "the user in STILLROOM_BROKER_URL lacks a right that workers need",
    "a queue of another kind": "the broker has it with other properties: delete it",
}


@pytest.mark.parametrize(("what", "sentence"), REFUSED.items(), ids=list(REFUSED))
def test_what_rabbitmq_refuses_ends_the_worker_with_a_sentence(
    start: Callable[..., CeleryProcess], rabbit: RabbitServer, what: str, sentence: str
) -> None:
    """A refusal that will be repeated ends the worker with exit code 1 and one line that says which and where."""
    urls = {
        "a wrong password": lambda: rabbit.url_of("hasty", password="wrong"),
        "no such host": lambda: rabbit.url.removesuffix("//") + "/nowhere",
        "a host of others": lambda: rabbit.url_of("guest2", vhost="theirs"),
        "no right to declare": lambda: rabbit.url_of("weak", "", ".*", ".*"),
        "no right to read": lambda: rabbit.url_of("blind", ".*", ".*", ""),
        "a queue of another kind": lambda: rabbit.url,
    }
    connection = rabbit.connection()
    connection.channel().queue_declare("classic.refresh", durable=True, auto_delete=False)
    connection.close()
    namespace = "classic" if what == "a queue of another kind" else "stillroom"
    broker = {"STILLROOM_BROKER_URL": urls[what](), "STILLROOM_NAMESPACE": namespace}
    worker = start("worker", STILLROOM_LOADERS="", **broker)
    assert worker.process.wait(PATIENCE_S) == 1
    (told,) = [line for line in worker.log.splitlines() if "CRITICAL" in line]
    assert f"the worker can't go on: {sentence}" in told
    assert "Traceback" not in worker.log
    assert "Trying to reconnect" not in worker.log


def test_an_order_that_rabbitmq_takes_back_ends_no_worker(
    start_worker: Callable[..., CeleryProcess],
    room: Stillroom,
    rabbit: RabbitServer,
    db: Any,
) -> None:
    """RabbitMQ takes the channel from a worker that has had a message for too long; the worker connects anew."""
    with rabbit.impatient():
        worker = start_worker()
        db.set("db:gate", 1)
        read_stale(room, db, 15)
        until(lambda: db.exists("db:waiting"), "the worker is at it")
        worker.await_line("PRECONDITION_FAILED - delivery acknowledgement")
        db.delete("db:gate")
        db.rpush("db:opened", 1)
        read_stale(room, db, 16)
        until(lambda: loads(db) >= 2, "it works on")
    assert worker.process.poll() is None
    assert "Unrecoverable error" not in worker.log


@pytest.mark.parametrize("rights", [(), (".*", "", ".*")], ids=["no login", "no right to write"])
def test_a_tick_that_rabbitmq_refuses_is_one_line(
    start: Callable[..., CeleryProcess], rabbit: RabbitServer, rights: tuple[str, ...]
) -> None:
    """Beat whose ticks RabbitMQ refuses says so in a line for each, and sends them once it may."""
    user = "mute" if rights else "stranger"
    url = rabbit.url_of(user, *rights, vhost="ticks")
    beat = start("beat", app="tests.support.quick_beat", STILLROOM_BROKER_URL=url)
    beat.await_line("NOT_ALLOWED" if not rights else "could not be sent (AccessRefused", 60)
    rabbit.url_of(user, ".*", ".*", ".*", vhost="ticks")
    said = len(beat.log)
    until(lambda: "Sending due task" in beat.log[said:], "it goes on")
    assert beat.process.poll() is None
    assert "Traceback" not in beat.log


def test_who_watches_rabbitmq_is_told_of_plain_events_alone(
    rabbit: RabbitServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Strange events are dropped before a listener keeps them, and the connection is not lost for them."""
    heard: list[dict[str, Any]] = []
    json_type = {"content_type": "application/json", "content_encoding": "utf-8"}
    strange = [[1], {**BEGUN, "clock": "x"}, {**BEGUN, "uuid": None}, None, "x" * 2_000_000]
    bodies = [(json.dumps(body).encode(), json_type) for body in strange]
    bodies += [(b"{", json_type), (b"", {}), (b"{}", {"content_type": "application/x-python"})]
    bodies += [(b"{}", json_type | {"application_headers": {"compression": "application/x-gzip"}})]
    bodies += [(json.dumps(BEGUN).encode(), json_type)]
    with Celery(
        broker=rabbit.url, set_as_current=False, amqp="stillroom_workers.connections:AMQP"
    ) as app:
        app.conf.update(event_exchange="watched.celeryev", control_exchange="watched")
        with app.connection_for_read() as connection:
            receiver = EventReceiver(connection, handlers={"*": heard.append}, app=app)
            with receiver.consumer_context() as (listening, _, _):
                stranger = rabbit.connection()
                for body, properties in bodies:
                    message = Message(body, **properties)
                    stranger.channel().basic_publish(message, "watched.celeryev", "task.multi")
                while not heard:
                    listening.drain_events(timeout=10)
                stranger.close()
    assert [event["uuid"] for event in heard] == [BEGUN["uuid"]]
    assert caplog.text.count("An event of") == len(bodies) - 1


def test_the_doctor_says_what_it_has_tried_at_rabbitmq(
    own_server: EmbeddedServer, rabbit: RabbitServer
) -> None:
    """A user who may log in, and write nothing, is not said to be able to order work."""
    places = {"redis_url": own_server.url, "broker_url": rabbit.url_of("silent", ".*", "", ".*")}
    with Stillroom(Settings(**PATIENT | places)) as room:
        (line,) = [line for line in examined(room) if line.about == "broker"]
    assert (line.status, line.sentence) == (
        "pass",
        "it takes this login; rights and queues there are not tried",
    )
