"""An app's process publishes its refresh orders in few messages."""

from __future__ import annotations

import base64
import json
import os
import queue
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from stillroom import Settings
from stillroom.dispatch import (
    FIELDS_LIMIT,
    RECLAIM_TASK,
    WAKES_LIMIT,
    CeleryDispatch,
    RefreshOrder,
    _Errand,
    _size,
)
from stillroom.embedded import EmbeddedServer
from stillroom.keys import Keys
from tests.support.celery_process import PATIENCE_S, until

QUEUE, MAINTENANCE = "stillroom.refresh", "stillroom.maintenance"
TCP = Path("/proc/net/tcp")


class Held(CeleryDispatch):
    """A dispatch whose thread waits before it connects, so that a test can queue orders behind the first."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.began, self.go_on = threading.Event(), threading.Event()

    def _connect(self) -> None:
        self.began.set()
        assert self.go_on.wait(PATIENCE_S)
        super()._connect()


@pytest.fixture
def held(own_server: EmbeddedServer, db: Any) -> Iterator[Held]:
    dispatch = Held(Settings(redis_url=own_server.url), Keys("stillroom"))
    yield dispatch
    dispatch.close()


def order(n: int, loader: str = "product") -> RefreshOrder:
    return RefreshOrder(loader=loader, args={"id": n}, key=f"product:{n}", token="0" * 16)


def messages(db: Any) -> list[dict[str, Any]]:
    """Return the arguments in each message, the oldest first."""
    raw = [json.loads(one) for one in reversed(db.lrange(QUEUE, 0, -1))]
    return [json.loads(base64.b64decode(one["body"]))[1] for one in raw]


def keys(db: Any) -> list[list[str]]:
    """Return the keys of the orders in each message."""
    return [[one["key"] for one in m.get("orders", [m])] for m in messages(db)]


def test_orders_that_wait_go_into_one_message(held: Held, db: Any) -> None:
    """Waiting orders go into one message of up to twenty-five in their order, and the first waits for none."""
    held.send([order(0)], _never)
    assert held.began.wait(PATIENCE_S)
    for n in range(1, 31):
        held.send([order(n)], _never)
    held.go_on.set()
    until(lambda: db.llen(QUEUE) == 3, "the messages")
    assert list(map(len, keys(db))) == [1, 25, 5]
    assert [key for some in keys(db) for key in some] == [f"product:{n}" for n in range(31)]


def test_a_message_of_several_loaders_names_all_of_them(held: Held, db: Any) -> None:
    """A message of several loaders names them all in Flower."""
    held.send([order(0)], _never)
    assert held.began.wait(PATIENCE_S)
    held.send([order(1), order(2, "rates")], _never)
    held.send([order(3)], _never)
    held.go_on.set()
    until(lambda: db.llen(QUEUE) == 2, "the messages")
    headers = json.loads(db.lindex(QUEUE, 0))["headers"]
    assert json.loads(headers["kwargsrepr"]) == {"loader": "product, rates", "orders": 3}


def test_many_orders_of_one_caller_are_split(held: Held, db: Any) -> None:
    """A hundred orders of one caller are split into messages, so that several workers share them."""
    held.go_on.set()
    held.send([order(n) for n in range(60)], _never)
    until(lambda: db.llen(QUEUE) == 3, "the messages")
    assert list(map(len, keys(db))) == [25, 25, 10]


def test_a_wake_between_orders_goes_out_too(held: Held, db: Any) -> None:
    """A wake between orders ends the message before it, and nothing is lost."""
    held.send([order(0)], _never)
    assert held.began.wait(PATIENCE_S)
    held.send([order(1)], _never)
    held.wake(RECLAIM_TASK)
    held.send([order(2)], _never)
    held.go_on.set()
    until(lambda: (db.llen(QUEUE), db.llen(MAINTENANCE)) == (3, 1), "the messages")


def test_no_message_is_larger_than_a_worker_takes(held: Held, db: Any) -> None:
    """Orders with many arguments share a message as far as a worker takes it, and one that is too large is given
    back.
    """
    held.go_on.set()
    given_back: list[str] = []
    large = [order(n).model_copy(update={"args": {"id": "x" * 300_000}}) for n in range(4)]
    held.send(large, _never)
    too_large = order(5).model_copy(update={"args": {"id": "x" * FIELDS_LIMIT}})
    held.send([too_large], lambda: given_back.append(too_large.key))
    until(lambda: db.llen(QUEUE) == 2, "the messages")
    assert [len(some) for some in keys(db)] == [2, 2]
    assert 2 * _size(large[0]) < FIELDS_LIMIT < 3 * _size(large[0])
    until(lambda: given_back == ["product:5"], "it to be given back")


def test_an_order_that_has_no_json_holds_up_no_other(held: Held, db: Any) -> None:
    """An order whose arguments are nested too deep, as in an entry that somebody wrote, is given back alone."""
    held.go_on.set()
    given_back: list[str] = []
    deep: Any = json.loads("[" * 500 + "]" * 500)
    nested = order(5).model_copy(update={"args": {"id": deep}})
    held.send([nested], lambda: given_back.append(nested.key))
    held.send([order(1)], _never)
    until(lambda: given_back == ["product:5"], "it to be given back")
    until(lambda: keys(db) == [["product:1"]], "the other one")
    assert held.ready


def test_wakes_fill_no_queue_that_nobody_takes_from(held: Held, db: Any) -> None:
    """Where a hundred tasks wait for a worker no other is sent to wake it."""
    held.go_on.set()
    db.lpush(MAINTENANCE, *(["x"] * (WAKES_LIMIT - 1)))
    for task in ("first", "second", "third"):
        held.wake(task)
    held.close()
    assert db.llen(MAINTENANCE) == WAKES_LIMIT


class Due(float):
    """A time at which a wake is due. Whenever it is compared, another thread puts a wake off."""

    dispatch: CeleryDispatch

    def __lt__(self, other: float) -> bool:
        thread = threading.Thread(target=self.dispatch.wake, args=("third",))
        thread.start()
        thread.join()
        return float.__lt__(self, other)


class Idle(CeleryDispatch):
    """A dispatch whose thread is never started: the test does its work."""

    def _start(self) -> None:
        self._errands = queue.SimpleQueue()


def test_a_wake_of_another_thread_ends_nothing() -> None:
    """A wake that is put off while the thread looks for the next one does not end that thread."""
    dispatch = Due.dispatch = Idle(Settings(), Keys("stillroom"))
    dispatch.wake("third")
    dispatch._owed |= {"first": Due(time.monotonic() - 1), "second": Due(time.monotonic())}
    assert dispatch._next(queue.SimpleQueue(), deque()) == _Errand(wakes="first")
    assert {*dispatch._owed} == {"second", "third"}


# An end waits half a second for the broker. A busy machine may take that long, but not each time.
TRIES = 5


def test_what_waits_is_delivered_at_the_end(own_server: EmbeddedServer, db: Any) -> None:
    """Closing delivers all waiting orders without waiting for more."""

    def delivered() -> list[str]:
        db.flushall()
        held = Held(Settings(redis_url=own_server.url), Keys("stillroom"))
        held.send([order(0)], _never)
        assert held.began.wait(PATIENCE_S)
        for n in range(1, 4):
            held.send([order(n)], _never)
        held.go_on.set()
        held.close()
        return [key for some in keys(db) for key in some]

    assert [f"product:{n}" for n in range(4)] in (delivered() for _ in range(TRIES))


def test_each_caller_is_told_when_a_joined_message_fails(own_server: EmbeddedServer) -> None:
    """When the broker is away each caller whose orders were in the message frees its leases, also behind one who
    can't.
    """
    with EmbeddedServer() as gone:
        url = gone.url
    settings = Settings(redis_url=own_server.url, broker_url=url)
    held, told = Held(settings, Keys("stillroom")), list[int]()
    try:
        held.send([order(0)], lambda: told.append(0))
        assert held.began.wait(PATIENCE_S)
        held.send([order(9)], _broken)
        for n in range(1, 5):
            held.send([order(n)], lambda n=n: told.append(n))
        held.go_on.set()
        until(lambda: sorted(told) == [0, 1, 2, 3, 4], "all to be told")
    finally:
        held.close()


_never: Callable[[], object] = pytest.fail


def _broken() -> NoReturn:
    raise LookupError("the lease can't be freed")


ENDING = textwrap.dedent("""
    import multiprocessing, os, sys, time
    from celery import signals
    from stillroom import Settings
    from stillroom.dispatch import CeleryDispatch, RefreshOrder
    from stillroom.keys import Keys

    class Slow:
        def find_spec(self, name, *_):
            if name == "stillroom.own_celery":
                time.sleep(0.7)

    def send():
        order = RefreshOrder(loader="product", args={"id": 1}, key="product:1", token="0" * 16)
        dispatch.send([order], undelivered=print)

    sys.meta_path.insert(0, Slow())
    dispatch = CeleryDispatch(Settings(), Keys("stillroom"))
    match sys.argv[1]:
        case "process":
            send()
        case "child of multiprocessing":
            child = multiprocessing.get_context("fork").Process(target=send)
            child.start()
            child.join()
        case "child of Celery" if os.fork():
            os.wait()
        case "child of Celery":
            send()
            signals.worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=0)
            os._exit(0)
""")


@pytest.mark.skipif(
    not TCP.exists(), reason="Linux alone says when a connection's next timer is due"
)
def test_an_idle_connection_to_the_broker_shows_signs_of_life(
    own_server: EmbeddedServer, db: Any
) -> None:
    """An idle connection to the broker shows signs of life within half a minute, so no firewall forgets it."""
    dispatch = CeleryDispatch(Settings(redis_url=own_server.url), Keys("stillroom"))
    try:
        before = set(timers(own_server.port))
        dispatch.send([order(0)], _never)
        until(lambda: db.llen(QUEUE) == 1, "the message")
        made = set(timers(own_server.port)) - before
        assert made

        def idle_for() -> list[float | None]:
            return [due for port, due in timers(own_server.port).items() if port in made]

        until(lambda: all(due is not None and due <= 30 for due in idle_for()), str(idle_for()))
    finally:
        dispatch.close()


def timers(port: int) -> dict[int, float | None]:
    """Return the local ports of the connections to that port, and when each shows a sign of life: in seconds."""
    found: dict[int, float | None] = {}
    for line in TCP.read_text().splitlines()[1:]:
        _, near, far, _, _, timer, *_ = line.split()
        if int(far.split(":")[1], 16) == port:
            kind, due = timer.split(":")
            is_sign_of_life = kind == "02"
            ticks = os.sysconf("SC_CLK_TCK")
            found[int(near.split(":")[1], 16)] = int(due, 16) / ticks if is_sign_of_life else None
    return found


@pytest.mark.parametrize("who", ["process", "child of multiprocessing", "child of Celery"])
def test_a_process_that_ends_delivers_its_first_order(
    own_server: EmbeddedServer, db: Any, who: str
) -> None:
    """A process that ends delivers its orders, also where it leaves by `os._exit`, or has Celery yet to import."""
    environment = {**os.environ, "REDIS_URL": own_server.url}

    def delivered() -> list[list[str]]:
        db.flushall()
        subprocess.run(
            [sys.executable, "-c", ENDING, who], env=environment, check=True, timeout=100
        )
        return keys(db)

    assert [["product:1"]] in (delivered() for _ in range(TRIES))
