"""Stillroom works beside another project's Celery on one Redis, in one process and one environment."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from celery import Celery
from kombu import pools
from kombu.exceptions import OperationalError
from pydantic import BaseModel

import redis
from stillroom import Settings, Stillroom
from stillroom.broker import publish
from stillroom.dispatch import CeleryDispatch
from stillroom.embedded import EmbeddedServer
from stillroom.keys import Keys
from stillroom.own_celery import AMBIENT
from stillroom_workers.app import make_app
from stillroom_workers.schedule import SCHEDULE
from tests.support.celery_process import PATIENCE_S, CeleryProcess, until
from tests.support.crowd import PATIENT
from tests.support.entries import age

StartCelery = Callable[..., CeleryProcess]
PROJECT = "tests.support.project"
NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture
def environment(environment: dict[str, str], own_server: EmbeddedServer) -> dict[str, str]:
    return environment | {"PROJECT_BROKER": own_server.url, "STILLROOM_WORKER_THREADS": "2"}


@pytest.fixture
def their_app(own_server: EmbeddedServer, db: Any) -> Iterator[Celery]:
    """Return the project's Celery app, as its web process has it."""
    with Celery("project", broker=own_server.url, set_as_current=False) as app:
        app.conf.update(task_default_queue="project", task_ignore_result=True)
        yield app


@pytest.fixture
def start_theirs(start: StartCelery) -> StartCelery:
    """Return a function that starts a worker of the project and waits until it is ready."""

    def start_theirs(*arguments: str) -> CeleryProcess:
        worker = start("worker", "-P", "threads", "-c", "2", *arguments, app=PROJECT)
        worker.await_line(" ready.", 90)
        return worker

    return start_theirs


# On one Redis


class Listener:
    """A listener that writes down the keys and channels of every command that reaches the server."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._client = redis.Redis.from_url(server.url, socket_timeout=None)
        self._asking = redis.Redis.from_url(server.url).connection_pool.get_connection()
        self._monitor = self._client.monitor()
        self.touched: set[str] = set()

    def __enter__(self) -> Self:
        self._monitor.__enter__()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._asking.disconnect()

    def _listen(self) -> None:
        try:
            for event in self._monitor.listen():
                words = event["command"].split(" ")
                if words[0].upper() not in ("COMMAND", "MONITOR"):
                    self.touched |= set(self._keys(words))
        except (redis.RedisError, ValueError, OSError):
            return  # the test has ended

    def _keys(self, words: list[str]) -> list[str]:
        if words[0].upper() in ("PUBLISH", "PSUBSCRIBE", "PUNSUBSCRIBE"):
            return words[1:2]
        try:
            self._asking.send_command("COMMAND", "GETKEYS", *words)
            keys: list[bytes] = self._asking.read_response()
        except redis.ResponseError:
            return []  # it has none
        return [key.decode(errors="replace") for key in keys]


def test_all_that_is_ours_has_our_name(
    start: StartCelery, start_worker: StartCelery, own_server: EmbeddedServer, db: Any
) -> None:
    """Worker, beat, an app and remote control touch no key and no channel without the namespace in its name."""
    names = {"STILLROOM_NAMESPACE": "ours", "STILLROOM_LOADERS": "tests.support.shop_app"}
    with Listener(own_server) as listener:
        worker = start_worker(**names)
        start("beat", "--pidfile=", app="tests.support.quick_beat", **names)
        worker.await_line("stillroom.snapshot_health")
        with make_app(Settings(redis_url=own_server.url, namespace="ours")) as app:
            pong = until(lambda: app.control.inspect(timeout=5).ping(), "an answer")
            assert [*pong] == [node_name_of(worker)]
        order_a_refresh(own_server, "ours", db)
        until(
            lambda: "ours:unacked_mutex" in listener.touched,
            "what a dead worker held to be looked for",
        )
        assert worker.terminate() == 0
    theirs = {key for key in listener.touched if "ours" not in key and not key.startswith("db:")}
    assert theirs == set()


def node_name_of(worker: CeleryProcess) -> str:
    line = next(line for line in worker.log.splitlines() if line.endswith(" ready."))
    return line.split()[-2]


class Product(BaseModel):
    """A product as the worker's loader returns it; a value of another shape would be another release's."""

    id: int
    version: int


def order_a_refresh(server: EmbeddedServer, namespace: str, db: Any) -> None:
    settings = Settings(redis_url=server.url, namespace=namespace, swr=600, **PATIENT)
    with Stillroom(settings) as room:

        @room.cache.cached("product:{id}", ttl=60, name="product")
        def product(id: int) -> Product:
            return Product(id=id, version=-1)

        product(7)
        age(db, f"{namespace}:{{0}}:e:product:7".encode(), 61)
        product(7)
        until(lambda: product(7).version == 0, "the refresh", 60)


def test_their_eta_task_runs_once(
    start_theirs: StartCelery, start_worker: StartCelery, their_app: Celery, db: Any
) -> None:
    """A task with an ETA that another project's worker holds for long is not given back by ours."""
    start_theirs()
    start_worker(STILLROOM_NAMESPACE="ours")
    their_app.send_task("project.mail", ["hello"], countdown=14, expires=3_600)
    until(lambda: db.zcard("unacked_index") == 1, "their worker to hold it")
    (tag,) = db.zrange("unacked_index", 0, -1)
    db.zincrby("unacked_index", -3_700, tag)  # an hour has passed
    looked = db.object("idletime", "unacked_index")
    assert looked is not None
    until(lambda: db.llen("project:mails"), "the mail")
    with pytest.raises(AssertionError, match="a second mail"):
        until(lambda: db.llen("project:mails") > 1, "a second mail", 3)


def test_remote_control_reaches_its_own_workers_only(
    start_theirs: StartCelery,
    start_worker: StartCelery,
    their_app: Celery,
    own_server: EmbeddedServer,
) -> None:
    """Remote control reaches its own app's workers only: a shutdown of one leaves the other's at work."""
    theirs, ours = start_theirs(), start_worker()
    with make_app(Settings(redis_url=own_server.url)) as our_app:
        (their_name,), (our_name,) = [
            [*app.control.inspect(timeout=5).ping()] for app in (their_app, our_app)
        ]
        assert their_name != our_name
        assert our_name.partition("@")[2].startswith("stillroom-")
        their_app.control.shutdown()
        assert theirs.process.wait(PATIENCE_S) == 0
        assert [*our_app.control.inspect(timeout=5).ping()] == [our_name]
        start_theirs("-n", "second@%h")
        our_app.control.shutdown()
        assert ours.process.wait(PATIENCE_S) == 0
        assert len(their_app.control.inspect(timeout=5).ping()) == 1
    assert "DuplicateNodename" not in ours.log + theirs.log


def test_a_worker_told_to_take_from_a_queue_of_nobody_refuses(
    start_worker: StartCelery, own_server: EmbeddedServer
) -> None:
    """`celery control add_consumer` with a misspelt queue is answered by an error, and the worker works on."""
    start_worker()
    with make_app(Settings(redis_url=own_server.url)) as app:

        def add(queue: str) -> Any:
            ((answer,),) = (one.values() for one in app.control.add_consumer(queue, reply=True))
            return answer

        assert "'stillroom.refersh' is none of the queues" in add("stillroom.refersh")["error"]
        assert "ok" in add("stillroom.refresh")
        assert len(app.control.inspect(timeout=5).ping()) == 1


def test_a_worker_told_to_leave_a_queue_of_nobody_refuses(
    start_worker: StartCelery, own_server: EmbeddedServer
) -> None:
    """`cancel_consumer` without a queue's name is answered by an error. Stock ends all workers if it is a list."""
    worker = start_worker()
    with make_app(Settings(redis_url=own_server.url)) as app:
        for queue in (["stillroom.refresh"], "stillroom.refersh"):
            ((answer,),) = (one.values() for one in app.control.cancel_consumer(queue, reply=True))
            assert "is none of the queues" in answer["error"]
        assert len(app.control.inspect(timeout=5).ping()) == 1
    assert worker.terminate() == 0


def test_a_pool_of_greenlets_keeps_a_place(
    start_worker: StartCelery, own_server: EmbeddedServer
) -> None:
    """A worker told to give up more places than it has goes on with one, and ends at SIGTERM."""
    worker = start_worker("-P", "gevent", "-c", "3")
    with make_app(Settings(redis_url=own_server.url)) as app:
        app.control.pool_shrink(100, reply=True)
        (stats,) = app.control.inspect(timeout=5).stats().values()
        assert stats["pool"]["max-concurrency"] == 1
        app.send_task("stillroom.trim_marks")
        worker.await_line("succeeded in")
    assert worker.terminate() == 0


def test_a_pool_of_processes_keeps_a_place(
    start_worker: StartCelery, own_server: EmbeddedServer
) -> None:
    """A worker told to give up more processes than it has goes on with one, and gives up no fewer than one."""
    worker = start_worker("-P", "prefork", "-c", "2")
    with make_app(Settings(redis_url=own_server.url)) as app:

        def is_refused(command: str, number: int) -> bool:
            told = getattr(app.control, command)(number, reply=True, timeout=30, limit=1)
            return "place" in told[0][node_name_of(worker)].get("error", "")

        # A worker whose processes all begin just then gives up none.
        until(lambda: is_refused("pool_shrink", 100), "the last process to be kept")
        for command, number in (("pool_shrink", 1), ("pool_shrink", -1), ("pool_grow", -5)):
            assert is_refused(command, number)
        # The processes are not counted: one that has just begun may overhear that it is to end.
        app.send_task("stillroom.trim_marks")
        worker.await_line("succeeded in")
    assert worker.terminate() == 0


def test_a_worker_told_to_scale_to_nothing_refuses(
    start_worker: StartCelery, own_server: EmbeddedServer
) -> None:
    """`autoscale` with no process at most is answered by an error, as `--autoscale` is, and the worker goes on."""
    worker = start_worker("-P", "prefork", "--autoscale", "2,1")
    with make_app(Settings(redis_url=own_server.url)) as app:
        for most, least in ((0, 0), (-3, -3), (2, -1)):
            ((answer,),) = (one.values() for one in app.control.autoscale(most, least, reply=True))
            assert "at most 1 process or more" in answer["error"]
        app.send_task("stillroom.trim_marks")
        worker.await_line("succeeded in")
    assert worker.terminate() == 0


@pytest.mark.timeout(60)
def test_a_command_that_the_broker_does_not_take_is_an_error() -> None:
    """A command to workers while the broker is away is tried again once and fails. Stock tries for ever, and then
    Flower, which sends one every five seconds, does not end at SIGTERM."""
    with EmbeddedServer() as server, make_app(Settings(redis_url=server.url)) as app:
        app.control.broadcast("heartbeat")  # the pool has a connection now
        server.stop()
        with pytest.raises(OperationalError):
            app.control.broadcast("heartbeat")
        app.control.enable_events()


def test_an_order_to_a_queues_exchange_is_carried_out_once(
    start_worker: StartCelery, their_app: Celery, db: Any
) -> None:
    """An order is carried out once, because each queue has an exchange and a routing key of its own."""
    worker = start_worker()
    order = {"kwargs": {"tags": ["k"]}, "routing_key": "stillroom.maintenance"}
    their_app.send_task("stillroom.invalidate_tags", exchange="stillroom.maintenance", **order)
    their_app.send_task(
        "stillroom.invalidate_keys", kwargs={"keys": ["k"]}, queue="stillroom.maintenance"
    )
    worker.await_line("invalidate_keys[")
    until(lambda: worker.log.count("succeeded in") >= 2, "both to be done")
    assert worker.log.count("invalidate_tags[") == 2  # received, succeeded


# In one process


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
@pytest.mark.parametrize("imported", ["early", "late"])
def test_a_loader_calls_its_projects_shared_tasks(
    start_worker: StartCelery, own_server: EmbeddedServer, db: Any, pool: str, imported: str
) -> None:
    """A loader's call of its project's shared task goes to the project's queue, and our worker runs none."""
    worker = start_worker(
        *("-P", pool), STILLROOM_LOADERS="tests.support.project_loaders", PROJECT_TASKS=imported
    )
    order_pages(own_server, db)
    until(lambda: db.llen("project") == 2, "two tasks in the project's queue")
    assert not db.exists("project:told")
    assert "project.tell" not in worker.log
    assert not db.exists("stillroom.maintenance")


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
def test_a_projects_decoder_of_json_does_not_read_our_messages(
    start_worker: StartCelery, own_server: EmbeddedServer, db: Any, pool: str
) -> None:
    """Where a project has kombu read JSON in its own way, an argument of an order stays what the app gave."""
    start_worker("-P", pool, STILLROOM_LOADERS="tests.support.project_json")
    with Stillroom(Settings(redis_url=own_server.url, swr=600, **PATIENT)) as room:

        @room.cache.cached("day:{day}", ttl=60, name="day")
        def day(day: str) -> str:
            return "the app's"

        assert day("2020-01-01") == "the app's"
        age(db, b"stillroom:{0}:e:day:2020-01-01", 61)
        day("2020-01-01")
        until(lambda: day("2020-01-01") == "the worker's", "a refresh")


def test_a_shared_task_of_no_app_says_what_to_do(
    start_worker: StartCelery, own_server: EmbeddedServer, db: Any
) -> None:
    """In a process without the project's Celery app a loader that calls a shared task fails with what to do."""
    worker = start_worker(
        STILLROOM_LOADERS="tests.support.project_loaders", PROJECT_TASKS="orphaned"
    )
    order_pages(own_server, db)
    worker.await_line("'project.tell' is no task of Stillroom's worker")
    assert "import that app in a module that STILLROOM_LOADERS names" in worker.log


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_loader_waits_for_a_task_of_its_project(
    start_worker: StartCelery, own_server: EmbeddedServer, db: Any, pool: str
) -> None:
    """A loader that returns the result of its project's task is refreshed by our worker as it loads in the app."""
    start_worker(
        *("-P", pool), STILLROOM_LOADERS="tests.support.project_loaders", PROJECT_TASKS="late"
    )
    with Stillroom(Settings(redis_url=own_server.url, swr=600, **PATIENT)) as room:

        @room.cache.cached("price:{id}", ttl=60, name="price")
        def price(id: int) -> int:
            return -1

        price(7)
        age(db, b"stillroom:{0}:e:price:7", 61)
        price(7)
        _, sent = db.brpop("project", 15)
        done = {"status": "SUCCESS", "result": 8, "children": [], "traceback": None}
        task_id = json.loads(sent)["headers"]["id"]
        db.set(result := f"celery-task-meta-{task_id}", json.dumps({**done, "task_id": task_id}))
        db.publish(result, db.get(result))
        until(lambda: price(7) == 8, "the refresh")


def order_pages(server: EmbeddedServer, db: Any) -> None:
    """Make a stale read of each loader's page."""
    with Stillroom(Settings(redis_url=server.url, swr=600, **PATIENT)) as room:
        for template, name in (("page:{id}", "page"), ("async-page:{id}", "async_page")):

            @room.cache.cached(template, ttl=60, name=name)
            def page(id: int) -> int:
                return -1

            page(7)
            age(db, b"stillroom:{0}:e:" + template.replace("{id}", "7").encode(), 61)
            page(7)
        until(lambda: room.dispatch.ready, "the dispatch")


# In one environment


@pytest.fixture
def foreign() -> dict[str, str]:
    """Return every variable that could tell Celery something else."""
    return {
        name: "tests.support.nowhere" if name.endswith(("MODULE", "LOADER")) else NOWHERE
        for name in AMBIENT
    }


def test_celerys_own_variables_change_nothing(
    start_worker: StartCelery,
    foreign: dict[str, str],
    own_server: EmbeddedServer,
    db: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all of Celery's variables set a stale read is refreshed, and the worker names those it ignores."""
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    worker = start_worker(STILLROOM_LOADERS="tests.support.shop_app")
    order_a_refresh(own_server, "stillroom", db)
    for name in AMBIENT:
        assert f"{name} is set and has no effect on Stillroom" in worker.log


OPTIONS = {
    "CELERY_WORKER_POOL": "solo",
    "CELERY_WORKER_CONCURRENCY": "1",
    "CELERY_WORKER_QUEUES": "projq",
    "CELERY_WORKER_PURGE": "1",
    "CELERY_BEAT_SCHEDULER": "tests.support.nowhere:Scheduler",
}


def test_options_of_the_projects_workers_are_not_ours(
    start_worker: StartCelery, start: StartCelery, own_server: EmbeddedServer, db: Any
) -> None:
    """A variable that Celery takes for an option of its command changes neither our worker nor our beat."""
    worker = start_worker(**OPTIONS, STILLROOM_LOADERS="tests.support.shop_app")
    order_a_refresh(own_server, "stillroom", db)
    assert "concurrency: 2 (thread)" in worker.log
    assert "CELERY_WORKER_POOL is set and has no effect on Stillroom" in worker.log
    start("beat", **OPTIONS).await_line("Scheduler: Sending due task")


def test_options_of_the_projects_workers_are_theirs(start: StartCelery) -> None:
    """A project that imports Stillroom's app starts its own workers with the options of its variables."""
    theirs = start("worker", app="tests.support.project_beside", **OPTIONS)
    theirs.await_line("concurrency: 1 (solo)")


def test_no_configuration_of_another_app_is_read(
    foreign: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither our workers nor our publishing reads the configuration module of another Celery app."""
    (tmp_path / "their_settings.py").write_text(
        "task_annotations = {'*': {'rate_limit': '1/m'}}\nimports = ['no_such_module']\n"
        "task_always_eager = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "their_settings")
    settings = Settings()
    with make_app(settings) as app:
        assert app.conf.imports == ()
        assert app.tasks["stillroom.reclaim"].rate_limit is None
        assert not app.conf.task_always_eager
    dispatch = CeleryDispatch(settings, Keys(settings.namespace))
    dispatch._connect()
    assert not dispatch._app.conf.task_always_eager


def test_an_app_below_a_spawned_worker_has_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app has all of its tasks where FORKED_BY_MULTIPROCESSING is set, which a spawned worker leaves to what it
    starts.
    """
    monkeypatch.setattr("celery.app.base.USING_EXECV", "1")
    with make_app(Settings()) as app:
        known = set(app.tasks)
    assert {tick.task for tick in SCHEDULE} <= known


def test_publishing_leaves_the_projects_celery_alone(
    own_server: EmbeddedServer, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Django app that published a refresh has no new current or default Celery app, in any thread."""
    from celery import _state

    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.support.nowhere")
    monkeypatch.setattr(_state, "default_app", None)
    before = set(_state._get_active_apps())
    with Stillroom(Settings(redis_url=own_server.url)) as room:
        room.dispatch.wake("stillroom.reclaim")
        until(lambda: db.llen("stillroom.maintenance"), "what was published")
    assert _state.default_app is None
    assert set(_state._get_active_apps()) <= before


def test_a_message_sent_again_leaves_the_projects_connections_alone(
    their_app: Celery, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead letter is sent again while the project publishes, whose pool of connections keeps its size."""
    monkeypatch.setattr(pools, "_limit", [10])  # of all pools of the process
    their_app.conf.broker_pool_limit = 40
    settings = Settings(redis_url=own_server.url)
    with their_app.pool.acquire():
        publish(settings, "stillroom.reclaim", "stillroom.maintenance", [], {})
    assert pools.get_limit() == their_app.pool.limit == 40


def test_results_that_are_asked_for_expire(
    start_worker: StartCelery, own_server: EmbeddedServer, db: Any
) -> None:
    """Each result in a named result backend expires after an hour."""
    start_worker(STILLROOM_RESULT_BACKEND=own_server.url)
    with Celery(broker=own_server.url, backend=own_server.url, set_as_current=False) as sender:
        order = {"kwargs": {"tags": ["t"]}, "queue": "stillroom.maintenance"}
        result = sender.send_task("stillroom.invalidate_tags", **order)
        assert result.get(timeout=30)["deleted"] == 0
        assert 0 < db.ttl(f"celery-task-meta-{result.id}") <= 3_600


@pytest.mark.parametrize(
    ("theirs", "ours", "results"),
    [
        (None, None, None),
        (NOWHERE, None, None),  # the project's own
        ("django-db", None, None),
        ("redis://broker:6379/0", None, "redis://:pw@broker:6379"),  # a sender of ours looks there
        (NOWHERE, "redis://results", "redis://:pw@results"),
    ],
)
def test_where_results_go(
    theirs: str | None, ours: str | None, results: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stillroom's setting says where results go; Celery's variable counts only where it names the broker."""
    if theirs:
        monkeypatch.setenv("CELERY_RESULT_BACKEND", theirs)
    settings = Settings(redis_url="redis://broker:6379", redis_password="pw", result_backend=ours)
    assert settings.results == results
    assert "pw" not in repr(settings)


def test_celery_is_told_how_to_reach_the_place_of_results() -> None:
    """Results get Sentinels' options, and check certificates, whatever the broker is."""
    for place, tls in [
        ("redis://results", None),
        ("rediss://results", {"ssl_cert_reqs": ssl.CERT_REQUIRED}),
        ("rediss+sentinel://results/main", {"ssl_cert_reqs": ssl.CERT_REQUIRED}),
    ]:
        settings = Settings(redis_url="redis://broker", result_backend=place)
        app = make_app(settings)
        told = app.conf.result_backend_transport_options
        assert told.get("master_name") == ("main" if "sentinel" in place else None)
        assert app.backend.connparams.get("ssl_cert_reqs") == (tls or {}).get("ssl_cert_reqs")
