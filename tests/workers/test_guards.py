"""The guards, each after the stock worker's failure: real workers, a real server, restarts, junk.

Nothing here sleeps for luck: `until` asks for a key, a log line or an exit until a deadline.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.worker import state
from kombu import Connection as StockConnection

import redis
from stillroom.embedded import EmbeddedServer, free_port
from stillroom_workers import channels, connections, guards
from tests.support import nursery
from tests.support.celery_process import PATIENCE_S, until
from tests.support.processes import halted

pytestmark = pytest.mark.long

APP = f"""
import json, os, time
from pathlib import Path
import redis
from celery import Celery
from {channels.__name__} import log_undeliverable

def keep(raw, queue, reason):
    log_undeliverable(raw, queue, reason)
    about = dict(queue=queue, reason=reason, bytes=len(raw))
    note.lpush("kept", json.dumps(about).encode() + b"\\n" + raw)
    if os.environ.get("DIES"):
        os._exit(1)

guarded, url, here = os.environ["GUARDED"] == "yes", os.environ["BROKER"], Path(__file__).parent
app = Celery("probe", broker=url, amqp="{connections.__name__}:AMQP" if guarded else None)
if guarded:
    app.conf.worker_consumer = "{guards.__name__}:Consumer"
app.conf.update(
    broker_transport_options=json.loads(os.environ["OPTIONS"]) | dict(undeliverable=keep),
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    accept_content=["json"],
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    beat_schedule={{"tick": {{"task": "mark", "schedule": 0.2, "args": ["beat"]}}}},
    beat_schedule_filename=str(here / "beat.db"),
)
note = redis.Redis.from_url(os.environ["DIRECT"])

@app.task(name="mark")
def mark(key):
    note.incr(f"ran:{{key}}")

@app.task(name="hold")
def hold(key, gate):
    note.incr(f"began:{{key}}")
    while not Path(gate).exists():
        time.sleep(0.02)

if os.environ.get("BREAK_POOL"):
    from celery.concurrency.thread import TaskPool
    def on_apply(self, *_, **__):
        raise ValueError("the pool is broken")
    TaskPool.on_apply = on_apply
"""

OPTIONS = {
    "visibility_timeout": 3_600,  # tests move it by hand: a busy machine takes seconds for what they do meanwhile
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    "socket_timeout": 5,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 5,
}
KEPT = "kept"
LATER = (datetime.now(UTC) + timedelta(minutes=50)).isoformat()
PRIVATE = "x" * 5_000  # stands for what people put into arguments


class Broker(EmbeddedServer):
    """A server that keeps its data and its port when it is restarted, and a client on it."""

    def __init__(self) -> None:
        super().__init__(appendonly=True)
        self.start()
        self.redis = redis.Redis(port=self.port)

    def push(self, *elements: str | bytes) -> None:
        """Push messages as a producer would, oldest first."""
        self.redis.lpush("celery", *elements)

    def let_visibility_time_out(self) -> None:
        """Make all messages that workers hold as old as those of a worker that is gone."""
        for tag in self.redis.zrange("unacked_index", 0, -1):
            self.redis.zincrby("unacked_index", -3_600, tag)

    def listeners(self) -> int:
        """Return how many clients listen to what is published."""
        clients: Any = self.redis.client_list()
        return sum(int(client["psub"]) + int(client["sub"]) > 0 for client in clients)

    def kept(self) -> list[tuple[dict[str, Any], bytes]]:
        """Return the dead letters, newest first: (about, raw)."""
        elements: Any = self.redis.lrange(KEPT, 0, -1)
        pairs = [element.partition(b"\n") for element in elements]
        return [(json.loads(about), raw) for about, _, raw in pairs]


class Process:
    """A `celery` process in its own session, with its log and its end."""

    def __init__(
        self, folder: Path, broker: Broker, *arguments: str, guarded: bool, **env: str
    ) -> None:
        (folder / "probe.py").write_text(APP)
        self.log_file = folder / f"{uuid.uuid4().hex}.log"
        direct = f"redis://127.0.0.1:{broker.port}/0"
        settings = {
            "BROKER": direct,
            "DIRECT": direct,
            "OPTIONS": json.dumps(OPTIONS),
            "GUARDED": "yes" if guarded else "no",
            "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        }
        with self.log_file.open("wb") as log:
            self._process = nursery.start(
                ["-m", "celery", "-A", "probe", *arguments],
                {**os.environ, **settings, **env},
                folder=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def paused_s(self) -> float:
        """Return for how long it has waited, by its own words, before it connected again."""
        pauses = re.findall(r"Trying again in ([\d.]+) second", self.log)
        return sum(map(float, pauses))

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def halted(self) -> AbstractContextManager[None]:
        """Halt the process while the block runs."""
        return halted(self._process.pid)

    def terminate(self) -> None:
        """Send SIGTERM as an orchestrator would."""
        self._process.terminate()

    def stop(self, within: float = PATIENCE_S) -> int:
        """Send SIGTERM; return the exit code."""
        self.terminate()
        return self._process.wait(within)

    def kill(self) -> None:
        """Kill what is left of its own process group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


StartWorker = Callable[..., Process]


@pytest.fixture
def broker() -> Iterator[Broker]:
    broker = Broker()
    try:
        yield broker
    finally:
        broker.redis.close()
        broker.stop()


@pytest.fixture
def worker(tmp_path: Path, broker: Broker) -> Iterator[StartWorker]:
    """Start a worker and wait until it is ready; each ends with the test."""
    with ExitStack() as started:

        def start(*, guarded: bool, pool: str = "threads", **env: str) -> Process:
            process = Process(
                tmp_path,
                broker,
                *("worker", "-P", pool, "-c", "2" if pool == "prefork" else "4", "-l", "INFO"),
                *("--without-gossip", "--without-mingle", "-n", f"{uuid.uuid4().hex}@test"),
                guarded=guarded,
                **env,
            )
            started.callback(process.kill)
            until(lambda: " ready." in process.log, "the worker is ready", 60)
            return process

        yield start


# What a producer sends ────────────────────────────────────────────────────────────────────────────


def envelope(body: Any = None, *, without: str = "", **changes: Any) -> str:
    """Return a protocol 2 message; `headers__id=5` changes a part, `without="headers.id"` drops one."""
    raw = body if isinstance(body, bytes) else json.dumps(body or [[PRIVATE], {}, {}]).encode()
    parts: dict[str, Any] = {
        "body": base64.b64encode(raw).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "mark", "id": str(uuid.uuid4()), "argsrepr": PRIVATE},
        "properties": {
            "correlation_id": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "delivery_tag": str(uuid.uuid4()),
            "body_encoding": "base64",
            "priority": 0,
        },
    }
    for path, value in changes.items():
        *way, last = path.split("__")
        _follow(parts, way)[last.replace("content_", "content-")] = value
    if without:
        *way, last = without.split(".")
        del _follow(parts, way)[last]
    return json.dumps(parts)


def _follow(parts: dict[str, Any], way: list[str]) -> dict[str, Any]:
    for step in way:
        parts = parts[step]
    return parts


def mark(key: str, **changes: Any) -> str:
    return envelope([[key], {}, {}], **changes)


# Elements no worker can run. The comment of a group is what a stock worker with threads does.
BAD: dict[str, str | bytes] = {
    # exits, the element is gone
    "bytes": b"\xff\xfe\x00\x01",
    "text": "hello",
    "a list": "[1,2]",
    "null": "null",
    "a number": "5",
    "nested deep": "[" * 100_000,
    "a typed value of another type": '{"__type__":"uuid","__value__":5}',
    "headers are a list": envelope(headers=[1]),
    "properties are a list": envelope(properties=[1]),
    "delivery tag is null": envelope(properties__delivery_tag=None),
    "delivery info is a list": envelope(properties__delivery_info=[1]),
    "body encoding nobody knows": envelope(properties__body_encoding="rot13"),
    "body is not base64": envelope(body="a"),
    # exits, the element is back in the queue for the next worker
    "body {a: 1}": envelope(b'{"a":1}'),
    "body null": envelope(b"null"),
    "body [1]": envelope(b"[1]"),
    "body [[], {}]": envelope(b"[[],{}]"),
    "body 5": envelope(b"5"),
    "body empty": envelope(b""),
    "no body": envelope(without="body"),
    "task is a list": envelope(headers__task=[1]),
    "id is a list": envelope(headers__id=[1]),
    "timelimit 5": envelope(headers__timelimit=5),
    "timelimit [1]": envelope(headers__timelimit=[1]),
    "stamped headers 5": envelope(headers__stamped_headers=5),
    "stamped headers [[1]]": envelope(headers__stamped_headers=[[1]]),
    "content encoding 5": envelope(content_encoding=5),
    # reconnects, the element is gone
    "no properties": envelope(without="properties"),
    "no delivery tag": envelope(without="properties.delivery_tag"),
    "no delivery info": envelope(without="properties.delivery_info"),
    # reconnects, the element is back: for ever
    "no id": envelope(without="headers.id"),
    # never acknowledges it, never says so, and has one slot less
    "body [1, 2, 3]": envelope(b"[1,2,3]"),
    "body of three letters": envelope(b'"abc"'),
    "embed 5": envelope(b'[["x"],{},5]'),
    "errbacks 5": envelope(b'[[],{},{"errbacks":5}]'),
    "errbacks [{}]": envelope(b'[[],{},{"errbacks":[{}]}]'),
    "shadow is a dict": envelope(headers__shadow={"a": 1}),
    # deletes it, printing what it holds
    "unknown task": envelope(headers__task="mark.typo"),
    "no headers": envelope(without="headers"),
    "no task": envelope(without="headers.task"),
    "no task, secret id": envelope(without="headers.task", headers__id=PRIVATE),
    "eta is no date": envelope(headers__eta=PRIVATE),
    "body is not JSON": envelope(b"\xff{" + PRIVATE.encode()),
    "content type not accepted": envelope(content_type="application/x-python-serialize"),
    "compressed with nothing": envelope(headers__compression="gzip"),
}


# 1. Redis restarts ────────────────────────────────────────────────────────────────────────────────


def hold(broker: Broker, gate: Path) -> None:
    """Push a running task that acks late and one that waits for its time: two unacked messages."""
    broker.push(
        envelope([["slow", str(gate)], {}, {}], headers__task="hold"),
        mark("later", headers__eta=LATER),
    )
    until(lambda: broker.redis.exists("began:slow"), "the slow task runs")
    until(lambda: broker.redis.hlen("unacked") == 2, "both messages are unacked")


def await_done_once(broker: Broker) -> None:
    """Wait until the slow task of `hold` is acknowledged; check that it is not delivered again."""
    until(
        lambda: broker.redis.hlen("unacked") == 1, "it is acknowledged, unlike the one with an ETA"
    )
    broker.let_visibility_time_out()
    broker.push(mark("at last"))
    until(lambda: broker.redis.exists("ran:at last"), "it takes new work")
    assert broker.redis.get("began:slow") == b"1"


def test_stock_worker_exits_when_redis_restarts(
    broker: Broker, worker: StartWorker, tmp_path: Path
) -> None:
    """A stock worker with an unacked message takes no other task once Redis restarts, and exits."""
    stock, gate = worker(guarded=False), tmp_path / "gate"
    hold(broker, gate)
    broker.kill()
    until(lambda: "Unrecoverable error: AttributeError" in stock.log, "it gives up")
    broker.restart()
    broker.push(mark("after"))
    gate.touch()
    until(lambda: stock.exit_code is not None, "it exits")
    assert stock.exit_code == 1
    assert not broker.redis.exists("ran:after")


def test_guarded_worker_outlives_a_restart(
    broker: Broker, worker: StartWorker, tmp_path: Path
) -> None:
    """A guarded worker goes on within seconds, begins no task again that has run, and advises no setting."""
    guarded, gate = worker(guarded=True), tmp_path / "gate"
    hold(broker, gate)
    broker.kill()
    until(lambda: "Connection to broker lost" in guarded.log, "it has lost its connection")
    broker.restart()
    broker.push(mark("after"))
    until(lambda: broker.redis.exists("ran:after"), "it takes new work")
    assert guarded.paused_s <= 6
    gate.touch()  # the first run ends, and acks on the channel whose connection is gone
    await_done_once(broker)
    assert guarded.stop() == 0
    assert "worker_cancel_long_running_tasks_on_connection_loss" not in guarded.log


@pytest.mark.parametrize("pool", ["threads", "prefork", "gevent"])
def test_what_ends_while_redis_is_away_is_acknowledged_when_it_is_back(
    broker: Broker, worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    """A task that ends during an outage is not run again after it."""
    guarded, gate = worker(guarded=True, pool=pool), tmp_path / "gate"
    hold(broker, gate)
    broker.kill()
    until(lambda: "Connection to broker lost" in guarded.log, "it has lost its connection")
    gate.touch()
    # Celery acknowledges at once with greenlets, else when it has connected again.
    ended = "Couldn't ack" if pool == "gevent" else "succeeded in"
    until(lambda: ended in guarded.log, "the task has ended")
    broker.restart()
    await_done_once(broker)


def _reads(broker: Broker, key: str, count: int) -> bool:
    return broker.redis.get(key) == b"%d" % count


def test_guarded_worker_outlives_a_killed_connection(
    broker: Broker, worker: StartWorker, tmp_path: Path
) -> None:
    """A guarded worker also goes on when it loses its connections while Redis stays up."""
    guarded, gate = worker(guarded=True), tmp_path / "gate"
    hold(broker, gate)
    gate.touch()
    for turn in range(1, 4):
        broker.redis.client_kill_filter(_type="normal", skipme=True)
        broker.push(mark("after"))
        until(partial(_reads, broker, "ran:after", turn), "it takes new work")
    assert guarded.exit_code is None


def test_a_task_that_runs_is_not_begun_again_where_redis_stayed_up(
    broker: Broker, worker: StartWorker, tmp_path: Path
) -> None:
    """A worker that loses a connection gives back the message that waits, and not that of a running task."""
    guarded, gate = worker(guarded=True), tmp_path / "gate"
    hold(broker, gate)
    broker.redis.client_kill_filter(_type="pubsub")  # by the other one kombu can give back
    until(lambda: "Restoring 1 unacknowledged message" in guarded.log, "the waiting one goes back")
    broker.push(mark("after"))
    until(lambda: broker.redis.exists("ran:after"), "it takes new work")
    assert broker.redis.get("began:slow") == b"1"
    broker.let_visibility_time_out()
    until(lambda: broker.redis.get("began:slow") == b"2", "it is delivered again in time")


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_other_pools_outlive_a_restart_too(broker: Broker, worker: StartWorker, pool: str) -> None:
    """Workers of other pools outlive a restart too, because the guard is in the channel."""
    guarded = worker(guarded=True, pool=pool)
    broker.push(mark("later", headers__eta=LATER))
    until(lambda: broker.redis.hlen("unacked") == 1, "the message is unacked")
    broker.restart()
    broker.push(mark("after"))
    until(lambda: broker.redis.exists("ran:after"), "it takes new work")
    assert guarded.paused_s <= 6
    assert guarded.stop() == 0


# 2. Bad elements ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "comes_back"),
    [("bytes", False), ("a list", False), ("body null", True), ("body [[], {}]", True)],
)
def test_stock_worker_exits_on_a_bad_element(
    broker: Broker, worker: StartWorker, name: str, comes_back: bool
) -> None:
    """A stock worker exits on a bad element, and leaves one with a bad body to the next worker."""
    stock = worker(guarded=False)
    broker.push(BAD[name])
    until(lambda: stock.exit_code is not None, "it exits")
    assert stock.exit_code == 1
    assert broker.redis.llen("celery") == comes_back


def test_stock_worker_reads_a_message_without_id_for_ever(
    broker: Broker, worker: StartWorker
) -> None:
    """A stock worker takes a missing id for a lost connection, reconnects and reads it again."""
    stock = worker(guarded=False)
    broker.push(BAD["no id"], mark("good"))
    until(lambda: stock.log.count("Connection to broker lost") > 3, "it goes round in circles")
    assert not broker.redis.exists("ran:good")


def test_stock_worker_goes_deaf_on_a_body_of_three(broker: Broker, worker: StartWorker) -> None:
    """Four bodies that merely look like three parts make a stock worker with four threads deaf."""
    stock = worker(guarded=False)
    broker.push(*[envelope(b"[1,2,3]") for _ in range(4)])
    until(lambda: broker.redis.hlen("unacked") == 4, "they are unacked")
    until(lambda: stock.log.count("received") == 4, "they are with the pool")
    broker.push(mark("good"))
    with pytest.raises(AssertionError, match="a good one runs"):
        until(lambda: broker.redis.exists("ran:good"), "a good one runs", 1.5)
    assert stock.exit_code is None
    assert "ERROR" not in stock.log


def test_one_published_element_ends_every_stock_worker(broker: Broker, worker: StartWorker) -> None:
    """One PUBLISH on the control channel ends all stock workers at once."""
    stock = [worker(guarded=False) for _ in range(2)]
    until(lambda: broker.listeners() == 2, "both listen")
    broker.redis.publish("/0.celery.pidbox", "[1]")
    until(lambda: all(one.exit_code == 1 for one in stock), "they exit")


@pytest.mark.parametrize("pool", ["threads", "solo", "prefork"])
def test_bad_elements_are_kept(broker: Broker, worker: StartWorker, pool: str) -> None:
    """Each bad element is kept, logged once without its data, acknowledged; the next one runs."""
    guarded = worker(guarded=True, pool=pool)
    until(lambda: broker.listeners() == 1, "it listens")
    broker.redis.publish("/0.celery.pidbox", "[1]")
    until(lambda: len(broker.kept()) == 1, "what was published is kept")
    for element in BAD.values():
        broker.push(element)
    broker.push(mark("good"))
    until(lambda: broker.redis.exists("ran:good"), "the next good one runs")
    until(lambda: not broker.redis.exists("unacked"), "all are acknowledged")

    kept = [raw for _, raw in reversed(broker.kept())][1:]
    assert len(kept) == len(BAD)
    for name, was, is_now in zip(BAD, BAD.values(), kept, strict=True):
        assert is_now == _same(was, is_now), name
    assert broker.redis.llen("celery") == 0
    assert guarded.log.count("ERROR") == guarded.log.count("can't run") == len(BAD) + 1
    assert "CRITICAL" not in guarded.log
    assert "x" * (channels.REASON_LENGTH + 1) not in guarded.log
    assert guarded.stop() == 0


def _same(was: str | bytes, is_now: bytes) -> bytes:
    """Return whether the bytes are the same or, where kombu decoded them, hold the same message."""
    raw = was.encode() if isinstance(was, str) else was
    with suppress(ValueError, RecursionError, TypeError, KeyError):
        if _unrouted(json.loads(raw)) == _unrouted(json.loads(is_now)):
            return is_now
    return raw


def _unrouted(message: Any) -> Any:
    """Return the message without kombu's tag of its consumer and its route, the queue it lay in."""
    return message | {"properties": message["properties"] | {"delivery_info": None}}


def test_what_was_kept_runs_when_it_is_put_back(broker: Broker, worker: StartWorker) -> None:
    """A dead letter of a worker without the task runs once it is pushed to a worker that has it."""
    worker(guarded=True)
    early = mark("early", headers__task="mark.later")
    broker.push(early)
    until(lambda: broker.redis.exists(KEPT), "it is kept")
    ((about, raw),) = broker.kept()
    assert about["queue"] == "celery"
    assert about["bytes"] == len(raw)
    assert "no such task here; did you mean mark?" in about["reason"]
    broker.push(raw.replace(b"mark.later", b"mark"))  # as if the task had been deployed
    until(lambda: broker.redis.exists("ran:early"), "it runs")


def test_a_message_is_acknowledged_when_it_is_kept(broker: Broker, worker: StartWorker) -> None:
    """A worker that dies while it keeps a dead letter leaves the message to the next one: twice, and never lost."""
    guarded = worker(guarded=True, DIES="yes")
    broker.push(mark("early", headers__task="mark.later"))
    until(lambda: guarded.exit_code is not None, "it dies")
    assert len(broker.kept()) == 1
    assert broker.redis.hlen("unacked") == 1


@pytest.mark.parametrize("requeue", [True, False, None], ids=["requeue", "reject", "ack"])
def test_what_becomes_of_a_message_gives_its_place_to_another_one(
    broker: Broker, requeue: bool | None
) -> None:
    """A message gives its place to another one also where Redis can't be told what has become of it."""
    with connections.Connection(f"redis://127.0.0.1:{broker.port}/0") as connection:
        channel = connection.channel()
        broker.push(mark("one"))
        tag = channel.basic_get("celery").delivery_tag
        channel.qos.prefetch_count = 1
        assert not channel.qos.can_consume()
        broker.kill()
        with pytest.raises(redis.ConnectionError):
            channel.basic_ack(tag) if requeue is None else channel.basic_reject(tag, requeue)
        assert channel.qos.can_consume()


def test_broken_pool_costs_no_message(broker: Broker, worker: StartWorker) -> None:
    """When the worker itself is at fault, a good message goes back to the queue."""
    guarded = worker(guarded=True, BREAK_POOL="yes")
    broker.push(mark("good"))
    until(lambda: guarded.exit_code is not None, "it exits, as stock does")
    assert broker.redis.llen("celery") == 1
    assert not broker.redis.exists(KEPT)


# 3. A half-open connection ────────────────────────────────────────────────────────────────────────


class Proxy:
    """A proxy to the broker that can be cut; then it swallows all that its connections send."""

    def __init__(self, port: int) -> None:
        self._broker = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._holes: list[threading.Event] = []
        self._sockets: list[socket.socket] = [self._listener]
        self._awaited: list[tuple[bytes, str]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                inside, _ = self._listener.accept()
                outside = socket.create_connection(self._broker)
                hole = threading.Event()
                self._sockets += [inside, outside]
                self._holes.append(hole)
                for pair in ((inside, outside), (outside, inside)):
                    threading.Thread(target=self._pump, args=(*pair, hole), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, hole: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if self._awaited and self._awaited[0][0] in data:
                    if self._awaited.pop(0)[1] == "close":
                        source.shutdown(socket.SHUT_RDWR)
                        break
                    hole.set()
                if not hole.is_set():
                    sink.sendall(data)
            if not hole.is_set():
                sink.shutdown(socket.SHUT_RDWR)

    def lose(self, command: bytes, how: str, times: int = 1) -> None:
        """Lose the next commands of this name: how="close" closes their connections, "swallow" sends no more on."""
        self._awaited += [(command, how)] * times

    @property
    def is_done(self) -> bool:
        """Return whether all that was to be lost is lost."""
        return not self._awaited

    def cut(self) -> None:
        for hole in self._holes:
            hole.set()

    def close(self) -> None:
        for one in self._sockets:
            one.close()


@pytest.fixture
def proxy(broker: Broker) -> Iterator[Proxy]:
    proxy = Proxy(broker.port)
    try:
        yield proxy
    finally:
        proxy.close()


def test_options_find_a_half_open_connection(
    broker: Broker, proxy: Proxy, worker: StartWorker
) -> None:
    """A half-open connection is found by both timeouts together, not by the health check alone."""
    both = {"socket_timeout": 1, "socket_connect_timeout": 2, "health_check_interval": 1}
    check = {"health_check_interval": 1}
    for database, options in enumerate([both, check]):
        worker(
            guarded=True,
            BROKER=f"redis://127.0.0.1:{proxy.port}/{database}",
            OPTIONS=json.dumps(options),
        )
    proxy.cut()
    other = redis.Redis(port=broker.port, db=1)
    for number in range(8):
        broker.push(mark(f"with both {number}"))
        other.lpush("celery", mark(f"with one {number}"))
    until(lambda: broker.redis.exists("ran:with both 7"), "it is found and work goes on")
    assert not broker.redis.keys("ran:with one *")


def behind(proxy: Proxy, worker: StartWorker, pool: str = "threads", **options: int) -> Process:
    """Start a guarded worker whose broker is behind the proxy."""
    url = f"redis://127.0.0.1:{proxy.port}/0"
    return worker(guarded=True, pool=pool, BROKER=url, OPTIONS=json.dumps(OPTIONS | options))


@pytest.mark.parametrize("how", ["close", "swallow"])
def test_a_message_that_redis_does_not_note_is_not_lost(
    broker: Broker, proxy: Proxy, worker: StartWorker, how: str
) -> None:
    """A message that was taken is run, whether the connection is closed or no answer comes to who notes it."""
    guarded = behind(proxy, worker, socket_timeout=1)
    proxy.lose(b"ZADD", how)
    broker.push(mark("unnoted"))
    until(lambda: proxy.is_done, "the note is lost")
    until(lambda: broker.redis.exists("ran:unnoted"), "it is run")
    assert guarded.exit_code is None


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_acks_that_fail_hold_no_places(
    broker: Broker, proxy: Proxy, worker: StartWorker, pool: str
) -> None:
    """A worker whose acks have failed, as many as it may have messages, takes others, and acks all with them."""
    guarded = behind(proxy, worker, pool, visibility_timeout=3_600)
    proxy.lose(b"ZREM", "close", times=4)
    for number in range(4):
        broker.push(mark(f"unacked {number}"))
        until(partial(broker.redis.exists, f"ran:unacked {number}"), "it is run")
    until(lambda: proxy.is_done, "the acks are lost")
    broker.push(*(mark(f"after {number}") for number in range(4)))
    until(lambda: len(broker.redis.keys("ran:after *")) == 4, "others are run")
    until(lambda: not broker.redis.exists("unacked"), "all are acknowledged, the first ones late")
    assert "Connection to broker lost" not in guarded.log, "which would have made new places"
    assert guarded.stop() == 0


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_last_ack_that_fails_is_tried_once_more(
    broker: Broker, proxy: Proxy, worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    """A worker that ends, and whose ack of its last task was lost, acknowledges it: the task does not run again."""
    guarded, gate = behind(proxy, worker, pool), tmp_path / "gate"
    broker.push(envelope([["slow", str(gate)], {}, {}], headers__task="hold"))
    until(lambda: broker.redis.exists("began:slow"), "the slow task runs")
    proxy.lose(b"ZREM", "close")
    guarded.terminate()
    until(lambda: "Warm shutdown" in guarded.log, "it is ending")
    gate.touch()
    until(lambda: guarded.exit_code is not None, "it has ended")
    assert proxy.is_done
    assert not broker.redis.exists("unacked")


def test_a_worker_ends_at_sigterm_while_its_broker_hangs(
    broker: Broker, proxy: Proxy, worker: StartWorker
) -> None:
    """A worker whose heartbeat gets no answer sees SIGTERM, and ends with 0 while the broker still hangs."""
    guarded = behind(proxy, worker, socket_timeout=1, health_check_interval=1)
    proxy.lose(b"worker.heartbeat", "swallow")
    until(lambda: proxy.is_done, "a heartbeat is lost")
    broker.freeze()
    try:
        assert guarded.stop() == 0
    finally:
        broker.thaw()


def test_a_worker_that_ends_waits_for_no_answer_for_long(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker says at its end, part by part, waits for a second each beside a broker that hangs, so that
    all of it fits into the grace that a container has."""
    app = wired(broker.url)
    app.conf.broker_transport_options = {"socket_timeout": 10}
    monkeypatch.setattr(state, "should_stop", 0)
    with app.connection_for_write() as connection:
        client = connection.default_channel.client
        client.connection_pool.disconnect()
        broker.freeze()
        began = time.monotonic()
        try:
            with pytest.raises(connection.connection_errors):
                client.ping()
        finally:
            broker.thaw()
        assert time.monotonic() - began < 8


# Wiring ───────────────────────────────────────────────────────────────────────────────────────────


def wired(url: str) -> Celery:
    return Celery("wiring", broker=url, amqp=f"{connections.__name__}:AMQP", set_as_current=False)


@pytest.mark.parametrize("url", ["redis://:pw@h:1/2", "rediss://:pw@h:1/2?ssl_cert_reqs=required"])
def test_every_connection_of_the_app_is_guarded(url: str) -> None:
    """Every connection of the app, for reading, writing, cloned or failed over, is guarded with its URL and TLS."""
    app = wired(url)
    read, write = app.connection_for_read(), app.connection_for_write()
    failed_over = app.connection_for_read(url=f"{url};{url.replace('h:1', 'h:3')}")
    failed_over.maybe_switch_next()
    for connection in (read, write, app.connection(), read.clone(), failed_over):
        assert type(connection.transport) is channels.Transport
        assert connection.transport.Channel is channels.Channel
        assert connection.transport.driver_type == "redis"
        assert connection.as_uri().startswith(url.partition("://")[0] + "://")
        assert bool(connection.ssl) == url.startswith("rediss")


def test_a_broker_that_was_long_away_is_found_again_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However often a worker has tried, it tries again within four seconds."""
    paused: list[float] = []

    def told(error: Exception, pause: float) -> None:
        paused.append(pause)
        if len(paused) == 50:
            raise LookupError

    monkeypatch.setattr("kombu.utils.functional.sleep", lambda _: None)
    with pytest.raises(LookupError):
        wired(f"redis://127.0.0.1:{free_port()}").connection_for_read().ensure_connection(told)
    assert paused == [2.0, *[4.0] * 49]
    paused.clear()
    with pytest.raises(LookupError):
        wired(f"redis://127.0.0.1:{free_port()}").connection_for_read().ensure_connection(
            told, None, 1, 1, 2
        )
    assert paused == [1.0, *[2.0] * 49]


def test_a_channel_makes_one_client(broker: Broker) -> None:
    """Acks and events share a client, for making one takes longer than they do; other pools have another one."""
    with connections.Connection(f"redis://127.0.0.1:{broker.port}/0") as connection:
        channel = connection.channel()
        with channel.conn_or_acquire() as one, channel.conn_or_acquire() as other:
            assert one is other
            assert one is not channel.client, "which waits in BRPOP"
        channel._disconnect_pools()  # as in a forked child
        with channel.conn_or_acquire() as new:
            assert new is not one
            assert new.connection_pool is channel.pool
            assert new.ping()


@pytest.mark.parametrize(
    ("work", "right", "told"),
    [
        ("maybe_restore_messages", "zrange", "can't be given back"),
        ("maybe_refresh_binding_expiry", "evalsha", "can't be kept alive"),
    ],
)
def test_what_redis_refuses_again_and_again_is_told_once(
    broker: Broker, caplog: pytest.LogCaptureFixture, work: str, right: str, told: str
) -> None:
    """A right that a worker loses while it runs is one line, and one more when it is lost again."""
    broker.redis.execute_command("ACL", "SETUSER", "weak", "on", ">weak", "~*", "&*", "+@all")
    with connections.Connection(f"redis://weak:weak@127.0.0.1:{broker.port}/0") as connection:
        channel, cycle = connection.default_channel, connection.transport.cycle
        channel._active_queues.append("celery")
        channel._expires["celery"] = 60_000
        channel.unacked_restore_throttle = 1
        for sign in "--+-":
            broker.redis.execute_command("ACL", "SETUSER", "weak", sign + right)
            channel._bindings_swept_at = 0  # it is due
            getattr(cycle, work)()
        channel._active_queues.clear()
    assert caplog.text.count(told) == 2
    assert f"'{right}'" in caplog.text
    assert "Traceback" not in caplog.text


def test_broker_transport_would_drop_tls() -> None:
    """Naming the transport in the configuration instead would turn `rediss://` into plain text."""
    stock = StockConnection("rediss://h:1/0", transport="kombu.transport.redis:Transport")
    assert not stock.ssl
    assert stock.as_uri().startswith("kombu.transport.redis:Transport://")
    assert connections.Connection("rediss://h:1/0").ssl


def test_other_brokers_are_left_alone() -> None:
    """Another scheme of broker gets kombu's own transport."""
    with wired("memory://").connection_for_read() as connection:
        assert type(connection.transport).__module__ == "kombu.transport.memory"


def test_beat_and_producers_share_the_wiring(
    broker: Broker, worker: StartWorker, tmp_path: Path
) -> None:
    """Beat and a producer with the same wiring send what the guarded worker runs."""
    worker(guarded=True)
    beat = Process(tmp_path, broker, "beat", "-l", "INFO", guarded=True)
    try:
        with wired(f"redis://127.0.0.1:{broker.port}/0") as producer:
            producer.send_task("mark", ["sent"], ignore_result=True)
        until(lambda: broker.redis.exists("ran:sent"), "what the producer sent is run")
        until(lambda: broker.redis.exists("ran:beat"), "what beat sent is run")
        assert beat.stop() == 0
    finally:
        beat.kill()


# 4. Another server, and keys of another type ──────────────────────────────────────────────────────


def test_stock_worker_exits_when_its_server_becomes_a_replica(
    broker: Broker, worker: StartWorker
) -> None:
    """A stock worker takes a failover's error about the server for its own and exits."""
    stock = worker(guarded=False)
    broker.redis.replicaof("127.0.0.1", "1")
    # The first where it was waiting in BRPOP, the other one where it was about to.
    said = ("UNBLOCKED", "ReadOnlyError")
    until(lambda: any(text in stock.log for text in said), "the server's error")
    until(lambda: stock.exit_code is not None, "it exits")
    broker.redis.replicaof("NO", "ONE")


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_guarded_worker_outlives_a_failover(
    broker: Broker, worker: StartWorker, pool: str, seconds: float
) -> None:
    """A guarded worker takes a failover's error for a lost connection, asks each second, and works
    with a new primary.
    """
    guarded = worker(guarded=True, pool=pool)
    for _ in range(2):
        broker.redis.replicaof("127.0.0.1", "1")
        time.sleep(seconds)  # how long a failover takes
        broker.redis.replicaof("NO", "ONE")
    broker.push(mark("after"))
    until(lambda: broker.redis.exists("ran:after"), "it takes new work")
    assert guarded.exit_code is None
    assert "Frequent restarts" not in guarded.log
    assert guarded.stop() == 0


def test_guarded_worker_outlives_a_disk_that_is_full(broker: Broker, worker: StartWorker) -> None:
    """A guarded worker waits for a server that takes no writes, also when it says so to BRPOP."""
    guarded = worker(guarded=True)
    broker.redis.config_set("min-replicas-to-write", 1)  # refused as it is with a full disk
    until(lambda: "NOREPLICAS" in guarded.log or "NotTheServer" in guarded.log, "the refusal")
    broker.redis.config_set("min-replicas-to-write", 0)
    broker.push(mark("after"))
    until(lambda: broker.redis.exists("ran:after"), "it takes new work")
    assert guarded.exit_code is None


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
def test_guarded_worker_outlives_a_server_that_is_full_and_loses_no_message(
    broker: Broker, worker: StartWorker, pool: str
) -> None:
    """A full server gives out messages and refuses to note who has them: they are run when there is room again."""
    guarded = worker(guarded=True, pool=pool)
    names = [f"m{number}" for number in range(6)]
    with guarded.halted():  # it has asked for one, which the server takes from the queue
        broker.push(*map(mark, names))
        broker.redis.config_set("maxmemory", 1)
    until(lambda: "used memory" in guarded.log, "the refusal")
    broker.redis.config_set("maxmemory", 0)
    until(lambda: all(broker.redis.exists(f"ran:{name}") for name in names), "all are run")
    assert guarded.exit_code is None
    assert guarded.stop() == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "key",
    [
        "celery",
        "celery\x06\x163",
        "unacked",
        "unacked_index",
        "unacked_mutex",
        "_kombu.binding.celery",
        "_kombu.binding_deadlines",
        "_kombu.binding.celery.pidbox",
    ],
)
def test_a_key_of_a_wrong_type_ends_no_guarded_worker(
    broker: Broker, worker: StartWorker, key: str, when: str
) -> None:
    """A key of a wrong type in a queue's place is deleted, and the guarded worker goes on."""
    if when == "before":
        broker.redis.xadd(key, {"a": 1})
    guarded = worker(guarded=True)
    if when == "after":
        broker.redis.delete(key)
        broker.redis.xadd(key, {"a": 1})
    deadline = time.monotonic() + PATIENCE_S
    while not broker.redis.exists("ran:after"):
        assert time.monotonic() < deadline, guarded.log[-3_000:]
        with suppress(redis.ResponseError):  # it is not yet healed
            broker.push(mark("after"))
        time.sleep(0.2)
    assert guarded.exit_code is None
    assert "Unrecoverable" not in guarded.log
