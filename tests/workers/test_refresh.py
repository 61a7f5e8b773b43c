"""A refresh takes the whole path: a request's stale read, a task, a real worker, the next request."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

import redis
from stillroom import NoDispatch, Settings, Stillroom
from stillroom.broker import publish
from stillroom.dispatch import REFRESH_TASK, CeleryDispatch
from stillroom.embedded import EmbeddedServer
from stillroom.keys import Keys
from stillroom_workers.app import make_app
from stillroom_workers.crew import ALONE_S
from tests.support.celery_process import PATIENCE_S, CeleryProcess, until
from tests.support.entries import age
from tests.support.lag import Stopwatch

QUEUE = "stillroom.refresh"
KEY = b"stillroom:{0}:e:product:7"
LEASE = b"stillroom:{0}:l:product:7"
A_WAIT_S = 0.9  # who waits for a broker that hangs does so for a second
StartWorker = Callable[..., CeleryProcess]


@pytest.fixture
def environment(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return environment | {
        "STILLROOM_LOADERS": "tests.support.shop_app",
        "STILLROOM_HEARTBEAT_FILE": str(tmp_path / "heartbeat"),
        "STILLROOM_WORKER_THREADS": "2",
    }


@pytest.fixture
def app_room(own_server: EmbeddedServer, db: Any) -> Iterator[Stillroom]:
    """Open the app's process, which shares only Redis and the loader's name with the worker."""
    with Stillroom(Settings(redis_url=own_server.url, swr=600)) as room:
        yield room


@pytest.fixture
def product(app_room: Stillroom, db: Any) -> Callable[[int], dict[str, Any]]:
    @app_room.cache.cached("product:{id}", ttl=60, name="product")
    def product(
        id: int,
    ) -> Any:  # the worker's declares a model: of another type it would be another release's
        return {"id": id, "version": -1}

    return product


def make_stale(db: Any) -> None:
    age(db, KEY, 61)


def let_refresh_begin(product: Any, db: Any) -> None:
    """Have version 9 of a product loaded by a worker, which waits within the load until it is let on."""
    db.set("db:version", 9)
    product(7)
    make_stale(db)
    db.set("db:gate", 1)
    product(7)
    until(lambda: db.get("db:waiting"), "the loader to run")


def let_it_end(db: Any) -> None:
    db.delete("db:gate")
    db.rpush("db:opened", 1)


def version(room: Stillroom) -> Any:
    return room.cache.get("product:7")["version"]


def test_a_pause_leaves_stale_values_alone(
    start_worker: StartWorker, own_server: EmbeddedServer, db: Any
) -> None:
    """An order during a pause is dropped. After the pause and its lease a stale read orders again."""
    worker = start_worker("-l", "INFO")
    db.set("db:version", 5)
    brief = Settings(redis_url=own_server.url, swr=600, refresh_lease=1)
    with Stillroom(brief) as room:

        @room.cache.cached("product:{id}", ttl=60, name="product")
        def product(id: int) -> Any:
            return {"id": id, "version": -1}

        room.upkeep.pause("refresh", 600)
        product(7)
        make_stale(db)
        product(7)
        until(lambda: "'outcome': 'paused'" in worker.log, "the order")
        assert version(room) == -1
        room.upkeep.resume("refresh")
        until(lambda: product(7)["version"] == 5, "the refresh")


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
def test_a_worker_refreshes_what_a_request_found_stale(
    start_worker: StartWorker, app_room: Stillroom, product: Any, db: Any, pool: str
) -> None:
    """A stale value is served at once, refreshed by a worker of any pool, and fresh for the next request."""
    start_worker("-P", pool)
    db.set("db:version", 5)
    assert product(7) == {"id": 7, "version": -1}
    make_stale(db)
    assert product(7) == {"id": 7, "version": -1}
    until(lambda: version(app_room) == 5, "the refresh")
    assert db.get("db:loads") == b"1"
    assert not db.exists(LEASE)
    make_stale(db)
    db.set("db:version", 6)
    app_room.cache.get("product:7")
    until(lambda: version(app_room) == 6, "the second refresh")
    app_room.cache.invalidate_by_tag("products")
    assert app_room.cache.get("product:7") is None


def test_any_celery_client_may_ask_by_name(
    start_worker: StartWorker, app_room: Stillroom, db: Any
) -> None:
    """A client that knows only Celery and the message's form orders a refresh by name."""
    worker = start_worker()
    with Celery(broker=app_room.settings.redis_url, set_as_current=False) as stranger:
        good = {"loader": "product", "args": {"id": 7}, "key": "product:7", "token": "0" * 16}
        for message in [
            good | {"loader": "nobody"},
            good | {"args": {"id": "seven"}},
            good | {"extra": "canary"},
            good | {"token": "nonsense"},
            {},
        ]:
            stranger.send_task(REFRESH_TASK, kwargs=message, queue=QUEUE)
        stranger.send_task(REFRESH_TASK, args=["canary"], queue=QUEUE)
        stranger.send_task(REFRESH_TASK, kwargs=good, queue=QUEUE)
    worker.await_line("'outcome': 'superseded'")
    for reason in [
        "no loader named 'nobody'; registered: product, slow, weather",
        "product: id: Input should be a valid integer",
        "extra: Extra inputs are not permitted",
        "token: String should match pattern",
        "loader: Field required",
        "1 positional arguments; this task takes named ones only",
    ]:
        worker.await_line(f"RefreshOrder refused: {reason}")
    assert "canary" not in "".join(line for line in worker.log.splitlines() if "refused" in line)
    assert db.get("db:loads") is None
    assert db.keys("*:l:*") == []


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_an_async_loader_is_awaited(
    start_worker: StartWorker, own_server: EmbeddedServer, db: Any, pool: str
) -> None:
    """Async loaders of an AsyncStillroom's module run in the worker, all in one event loop."""
    worker = start_worker("-P", pool)
    loops = set()
    with Stillroom(Settings(redis_url=own_server.url, swr=600)) as room:

        @room.cache.cached("weather:{city}", name="weather", ttl=60)
        def weather(city: str) -> dict[str, Any]:
            return {}

        for city in ("Jena", "Gera"):
            weather(city)
            age(db, f"stillroom:{{0}}:e:weather:{city}".encode(), 61)
            weather(city)
            value = until(lambda c=city: room.cache.get(f"weather:{c}"), "the refresh")
            assert value["pid"] == worker.process.pid
            loops.add(value["loop"])
    assert len(loops) == 1


@pytest.mark.parametrize(
    "pool",
    [("threads",), ("processes",), ("gevent", "--autoscale", "4,1")],
    ids=["threads", "processes", "greenlets"],
)
def test_slow_loads_of_one_message_run_beside_one_another(
    start_worker: StartWorker, app_room: Stillroom, db: Any, pool: tuple[str, ...]
) -> None:
    """The orders of one message are shared by all that a worker may have, and each is loaded once."""
    start_worker("-P", *pool)

    @app_room.cache.cached("slow:{id}", ttl=60, name="slow")
    def slow(id: int) -> int:
        return id

    keys = [f"slow:{slow(n)}" for n in range(5)]
    for key in keys:
        age(db, app_room.keys.entry(key.encode()), 61)
    assert app_room.cache.get_many(keys) == {key: n for n, key in enumerate(keys)}
    until(lambda: db.get("db:inside"), "the first load")
    time.sleep(2 * ALONE_S)  # now it is a slow one
    db.rpush("db:out", 1)
    until(lambda: int(db.get("db:inside")) > 1, "two loads at the same time")
    db.rpush("db:out", 1, 1, 1, 1)
    until(lambda: app_room.cache.get("slow:4") == 1_004, "the last refresh")
    until(lambda: not db.keys("*:l:*"), "the leases to be freed")
    assert list(app_room.cache.get_many(keys).values()) == [n + 1_000 for n in range(5)]
    assert db.llen("db:out") == 0


def test_a_failing_loader_backs_off_while_the_stale_value_is_served(
    start_worker: StartWorker, app_room: Stillroom, product: Any, db: Any
) -> None:
    """A failing loader is a failed task, and requests get the stale value during its backoff."""
    worker = start_worker(STILLROOM_BACKOFF="0.2")
    product(7)
    make_stale(db)
    db.set("db:broken", 1)
    product(7)
    worker.await_line("LookupError('the database is broken')")
    until(lambda: (db.get(LEASE) or b"").startswith(b"backoff."), "the backoff")
    assert product(7)["version"] == -1
    db.delete("db:broken")
    until(
        lambda: product(7)["version"] == 0 or make_stale_again(db), "the refresh after the backoff"
    )


def make_stale_again(db: Any) -> None:
    age(db, KEY, 1)  # another stale entry, as far as this process' memory of having asked goes


def test_a_lost_task_is_asked_for_again(own_server: EmbeddedServer, db: Any) -> None:
    """After a lost task the lease runs out and the next stale read sends another."""
    settings = Settings(redis_url=own_server.url, swr=600, refresh_lease=0.2)
    with Stillroom(settings) as room:

        @room.cache.cached("product:{id}", ttl=60)
        def product(id: int) -> dict[str, int]:
            return {"version": -1}

        product(7)
        make_stale(db)
        product(7)
        assert until(lambda: db.lpop(QUEUE), "the first task") is not None  # and it is lost
        until(lambda: not db.exists(LEASE), "the lease to run out")
        make_stale_again(db)
        product(7)
        assert until(lambda: db.lpop(QUEUE), "the second task") is not None


def test_a_late_task_is_dropped_or_finds_nothing_to_do(
    start_worker: StartWorker, app_room: Stillroom, product: Any, db: Any
) -> None:
    """A message from before an invalidation is dropped or brings nothing back."""
    product(7)
    make_stale(db)
    product(7)
    until(lambda: db.llen(QUEUE), "the task")
    app_room.cache.invalidate("product:7")
    worker = start_worker()
    worker.await_line("'outcome': 'superseded'")
    assert app_room.cache.get("product:7") is None
    assert db.get("db:loads") is None


class TestBrokerTrouble:
    """The broker is on a server of its own that goes away."""

    @pytest.fixture
    def broker(self) -> Iterator[EmbeddedServer]:
        with EmbeddedServer() as server:
            yield server

    @pytest.fixture
    def room(
        self, own_server: EmbeddedServer, broker: EmbeddedServer, db: Any
    ) -> Iterator[Stillroom]:
        settings = Settings(redis_url=own_server.url, broker_url=broker.url, swr=600)
        with Stillroom(settings) as room:
            yield room

    @pytest.mark.parametrize("trouble", ["kill", "freeze"])
    def test_the_stale_value_is_served_and_nobody_waits(
        self, room: Stillroom, broker: EmbeddedServer, db: Any, trouble: str, caplog: Any
    ) -> None:
        """With the broker down or hung no request waits, the lease is freed, and one line is logged;
        later it works.
        """

        @room.cache.cached("product:{id}", ttl=60)
        def product(id: int) -> dict[str, int]:
            return {"version": -1}

        product(7)
        make_stale(db)
        product(7)
        with redis.Redis.from_url(broker.url) as queue:
            until(lambda: queue.llen(QUEUE) == 1, "the first task")
        db.delete(LEASE)
        deliver = room.dispatch._deliver  # type: ignore[attr-defined]
        delivered_by = set[threading.Thread]()

        def noted(errands: Any) -> None:
            delivered_by.add(threading.current_thread())
            deliver(errands)

        room.dispatch._deliver = noted  # type: ignore[attr-defined]
        getattr(broker, trouble)()
        make_stale_again(db)
        with Stopwatch() as watch:
            assert product(7) == {"version": -1}
        assert watch.seconds < A_WAIT_S
        until(lambda: "the broker takes no tasks" in caplog.text, "the log line")
        until(lambda: not db.exists(LEASE), "the lease to be freed")
        assert threading.current_thread() not in delivered_by
        assert len(delivered_by) == 1
        assert room.dispatch.ready is False
        broker.thaw() if trouble == "freeze" else broker.restart()
        until(lambda: room.dispatch.ready, "another try")
        make_stale_again(db)
        product(7)
        with redis.Redis.from_url(broker.url) as queue:
            until(lambda: queue.llen(QUEUE) >= 1, "a task again")
        assert caplog.text.count("the broker takes no tasks") == 1

    def test_more_orders_than_it_holds_are_given_back(
        self, broker: EmbeddedServer, own_server: EmbeddedServer
    ) -> None:
        """Orders that the dispatcher's bounded queue cannot hold free their leases, from the
        dispatcher's thread.
        """
        dispatch = CeleryDispatch(
            Settings(redis_url=own_server.url, broker_url=broker.url), Keys("stillroom")
        )
        dispatch.waiting_limit = 1
        broker.freeze()
        from stillroom.dispatch import RefreshOrder

        order = RefreshOrder(loader="x", args={}, key="k", token="0" * 16)
        given_back: list[str] = []
        for _ in range(5):
            dispatch.send([order], lambda: given_back.append(threading.current_thread().name))
        assert not given_back  # not in the caller's thread: it may be an event loop's
        broker.thaw()
        until(lambda: len(given_back) >= 3, "those that did not fit")
        assert set(given_back) == {"stillroom dispatch"}
        dispatch.close()


class TestLife:
    """A worker starts and stops."""

    def test_sigterm_lets_the_running_task_finish(
        self, start_worker: StartWorker, app_room: Stillroom, product: Any, db: Any, tmp_path: Path
    ) -> None:
        """SIGTERM lets the running refresh be stored, exits with 0, and removes the heartbeat file."""
        worker = start_worker()
        heartbeat = tmp_path / "heartbeat"
        until(heartbeat.exists, "the heartbeat file")
        let_refresh_begin(product, db)
        worker.process.terminate()
        worker.await_line("Warm shutdown")
        let_it_end(db)
        assert worker.process.wait(PATIENCE_S) == 0
        assert version(app_room) == 9
        assert not heartbeat.exists()

    def test_a_busy_worker_leaves_messages_to_others(
        self, start_worker: StartWorker, own_server: EmbeddedServer, product: Any, db: Any
    ) -> None:
        """A worker whose threads are busy takes no message that a free worker could begin with."""
        start_worker(STILLROOM_WORKER_THREADS="1")
        let_refresh_begin(product, db)
        settings, queue = Settings(redis_url=own_server.url), "stillroom.maintenance"
        for _ in range(3):
            publish(settings, "stillroom.trim_marks", queue, (), {})
        with make_app(settings) as app:
            asks = app.control.inspect(timeout=10, limit=1)
            assert [len(tasks) for tasks in asks.active().values()] == [1]
        assert db.llen(queue) == 3
        let_it_end(db)
        until(lambda: db.llen(queue) == 0, "them to be done")

    def test_sigquit_waits_for_what_a_thread_does(
        self, start_worker: StartWorker, app_room: Stillroom, product: Any, db: Any
    ) -> None:
        """SIGQUIT, or Ctrl-C twice, logs one line for each running task, and ends with 0 when they have ended."""
        worker = start_worker()
        let_refresh_begin(product, db)
        worker.process.send_signal(signal.SIGQUIT)
        worker.await_line("can't be cut off in a thread: it is waited for")
        let_it_end(db)
        assert worker.process.wait(PATIENCE_S) == 0
        assert version(app_room) == 9
        assert "Traceback" not in worker.log

    def test_sigquit_ends_what_a_greenlet_does(
        self, start_worker: StartWorker, app_room: Stillroom, product: Any, db: Any
    ) -> None:
        """With gevent SIGQUIT ends the running tasks, and the worker ends with 0 and no error of its own."""
        worker = start_worker("-P", "gevent")
        let_refresh_begin(product, db)
        worker.process.send_signal(signal.SIGQUIT)
        assert worker.process.wait(PATIENCE_S) == 0
        assert "GreenletExit was raised" in worker.log
        assert "Unrecoverable error" not in worker.log

    def test_a_killed_workers_refresh_is_asked_for_again(
        self, start_worker: StartWorker, app_room: Stillroom, product: Any, db: Any
    ) -> None:
        """After kill -9 in the middle of a load the lease runs out and a second worker loads."""
        first = start_worker()
        product(7)
        make_stale(db)
        db.set("db:gate", 1)
        product(7)
        until(lambda: db.get("db:waiting"), "the loader to run")
        first.kill()
        assert db.get(LEASE).startswith(b"working.")
        db.delete("db:gate")
        db.pexpire(LEASE, 1)  # time moved by hand
        start_worker()
        until(lambda: not db.exists(LEASE), "the lease to run out")
        make_stale_again(db)
        product(7)
        until(lambda: version(app_room) == 0, "the refresh")

    def test_without_redis_a_worker_says_so_and_ends(
        self, environment: dict[str, str], tmp_path: Path, own_server: EmbeddedServer
    ) -> None:
        """Without Redis a worker logs five attempts and exits with 1."""
        with EmbeddedServer() as gone:
            url = gone.url
        changes = {"STILLROOM_CACHE_URL": url, "STILLROOM_CONNECT_DELAY": "0.01"}
        worker = CeleryProcess(tmp_path / "log", environment | changes, "worker", "-l", "INFO")
        try:
            assert worker.process.wait(PATIENCE_S) == 1
        finally:
            worker.kill()
        assert "attempt 5 of 5" in worker.log
        assert "the worker can't start: Redis is unavailable (refused)" in worker.log

    @pytest.mark.parametrize(
        ("loaders", "message"),
        [
            ("tests.support.nowhere", "can't import tests.support.nowhere"),
            (
                "tests.support.shop_app:rom",
                "there is no rom in tests.support.shop_app; did you mean room?",
            ),
            ("./shop/nowhere.py", "did you mean shop.nowhere?"),
            ("tests.support.entries", "nothing in tests.support.entries is a Stillroom"),
            (
                "tests.support.shop_app:product",
                "product in tests.support.shop_app is not a Stillroom",
            ),
        ],
    )
    def test_a_mistake_in_loaders_is_named(
        self, environment: dict[str, str], tmp_path: Path, loaders: str, message: str
    ) -> None:
        """A loaders module that is missing or has no room ends the worker with a sentence."""
        changes = {"STILLROOM_LOADERS": loaders}
        worker = CeleryProcess(tmp_path / "log", environment | changes, "worker", "-l", "INFO")
        try:
            assert worker.process.wait(PATIENCE_S) == 1
        finally:
            worker.kill()
        assert message in worker.log

    def test_beat_keeps_the_marks_short(
        self, start_worker: StartWorker, environment: dict[str, str], tmp_path: Path, db: Any
    ) -> None:
        """A real beat and worker trim the marks and keep the young ones."""
        with Stillroom(Settings(redis_url=environment["REDIS_URL"]), dispatch=NoDispatch()) as room:
            room.cache.invalidate_by_tag("young")
            db.zadd(room.keys.marks, {"t:old": 1, "t:older": 2})
            worker = start_worker()
            beat = CeleryProcess(
                tmp_path / "beat.log",
                environment,
                *("beat", "--pidfile=", "-l", "INFO"),
                app="tests.support.quick_beat",
            )
            try:
                worker.await_line("{'dropped': 2, 'left': 5}")
                assert beat.terminate() == 0
            finally:
                beat.kill()
            assert db.zscore(room.keys.marks, "t:young")
