"""A worker that cannot work says why and ends; one that can shows it."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from celery import Celery
from celery.worker.state import task_ready

from stillroom import RedisUnavailable, Settings, Stillroom
from stillroom.broker import publish
from stillroom.embedded import EmbeddedServer
from stillroom_workers import lifecycle
from stillroom_workers.app import make_app
from stillroom_workers.channels import Channel
from stillroom_workers.lifecycle import open_room
from stillroom_workers.request import Request
from tests.support.celery_process import PATIENCE_S, CeleryProcess, until
from tests.support.crowd import PATIENT
from tests.support.entries import age

MAINTENANCE = "stillroom.maintenance"
StartCelery = Callable[..., CeleryProcess]

# What a module of loaders does → what the sentence says. A name in here is nothing that the worker foresees.
MISTAKES = {
    "import os; os.environ['NOT_SET_ANYWHERE']": "raised KeyError: 'NOT_SET_ANYWHERE'",
    "def broken(:": "SyntaxError",
    "1 / 0": "raised ZeroDivisionError: division by zero",
    "raise SystemExit('no license')": "raised SystemExit: no license",
    "import sys; sys.exit(0)": "raised SystemExit: 0",
    "raise BaseException('rare')": "raised BaseException: rare",
    "import asyncio; raise asyncio.CancelledError": "raised CancelledError",
    "raise ValueError('two\\nlines \\x1b[31m')": r"raised ValueError: two\nlines \x1b[31m",
    "from no_such_package import loaders": "can't import mistake: No module named 'no_such_package'",
    "from os import no_such_name": "cannot import name 'no_such_name'",
    "import django.contrib.auth.models": "ImproperlyConfigured",
    "room = None": "nothing in mistake is a Stillroom",
    """
from stillroom import Stillroom
room, other = Stillroom(), Stillroom()
room.cache.cached("a:{n}", name="a")(lambda n: n)
other.cache.cached("b:{n}", name="a")(lambda n: n)
""": "a loader named 'a' exists already",
    "from stillroom import Settings; Settings(ttl=-1)": "raised SettingsError",
}


@pytest.fixture
def heartbeat(tmp_path: Path) -> Path:
    return tmp_path / "heartbeat"


@pytest.fixture
def environment(environment: dict[str, str], heartbeat: Path, tmp_path: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    return environment | {"STILLROOM_HEARTBEAT_FILE": str(heartbeat), "PYTHONPATH": paths}


@pytest.mark.parametrize(("source", "sentence"), MISTAKES.items(), ids=list(MISTAKES.values()))
def test_whatever_loaders_raise_ends_the_worker_with_a_sentence(
    start: StartCelery, tmp_path: Path, heartbeat: Path, source: str, sentence: str
) -> None:
    """An error in the loaders ends the worker with exit code 1 and one line: module, error and place."""
    (tmp_path / "mistake.py").write_text(source + "\n")
    worker = start("worker", STILLROOM_LOADERS="mistake")
    assert worker.process.wait(PATIENCE_S) == 1
    (told,) = [line for line in worker.log.splitlines() if "the worker can't start" in line]
    assert "STILLROOM_LOADERS" in told or "a loader named" in told
    assert sentence in told
    assert " ready." not in worker.log
    assert "Traceback" not in worker.log
    assert not heartbeat.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_an_app_that_configures_its_log_silences_no_worker(
    start: StartCelery, tmp_path: Path, fails: bool
) -> None:
    """An app that configures logging disables all loggers there are. A worker that imports it is still heard."""
    (tmp_path / "logged.py").write_text(f"""
from logging.config import dictConfig
from stillroom import Stillroom
to_stderr = {{"wsgi": {{"class": "logging.StreamHandler"}}}}
dictConfig({{"version": 1, "handlers": to_stderr, "root": {{"level": "INFO", "handlers": ["wsgi"]}}}})
room = Stillroom()
{"1 / 0" if fails else ""}
""")
    worker = start("worker", STILLROOM_LOADERS="logged")
    worker.await_line("raised ZeroDivisionError" if fails else " ready.", PATIENCE_S)


def test_what_watches_celery_s_tasks_sees_those_of_a_worker(
    start_worker: StartCelery, tmp_path: Path, own_server: EmbeddedServer
) -> None:
    """A tool that replaces what Celery runs tasks by, as Sentry does in the loaders' app, sees each task."""
    (tmp_path / "watched.py").write_text("""
from celery.app import trace
from stillroom import Stillroom
room, stock = Stillroom(), trace.build_tracer
def build_tracer(name, task, *args, **options):
    run = stock(name, task, *args, **options)
    return lambda *given, **fields: print("seen", name, flush=True) or run(*given, **fields)
trace.build_tracer = build_tracer
""")
    worker = start_worker(STILLROOM_LOADERS="watched")
    publish(Settings(redis_url=own_server.url), "stillroom.trim_marks", MAINTENANCE, [], {})
    worker.await_line("seen stillroom.trim_marks")


@pytest.mark.parametrize("setting", ["REDIS_URL", "STILLROOM_CACHE_URL", "STILLROOM_BROKER_URL"])
def test_a_server_that_can_not_do_ends_the_worker(start: StartCelery, setting: str) -> None:
    """A node of a cluster, where no setting names one: the line says which setting leads there, and what to do."""
    with EmbeddedServer(options={"cluster-enabled": "yes"}) as node:
        worker = start("worker", **{setting: node.url})
        assert worker.process.wait(PATIENCE_S) == 1
    (told,) = [line for line in worker.log.splitlines() if "the worker can't start" in line]
    assert f"the server in {setting} is a node of a Redis Cluster" in told
    assert " ready." not in worker.log


@pytest.mark.parametrize("lacking", ["-set", "-llen", "-hset", "-zadd"])  # ZADD in a script
def test_a_right_that_is_missing_at_the_broker_ends_the_worker(
    start: StartCelery, own_server: EmbeddedServer, db: Any, heartbeat: Path, lacking: str
) -> None:
    """A worker whose user may not do what the broker takes ends with one sentence, at its start or later."""
    db.execute_command("ACL", "SETUSER", "weak", "on", ">weak", "~*", "&*", "+@all", lacking)
    worker = start("worker", STILLROOM_BROKER_URL=f"redis://weak:weak@127.0.0.1:{own_server.port}")
    if lacking == "-hset":  # which it needs only when there is a message
        worker.await_line(" ready.", 60)
        with Celery(broker=own_server.url) as client:
            client.send_task("stillroom.trim_marks", queue="stillroom.maintenance")
    assert worker.process.wait(PATIENCE_S) == 1
    (told,) = [line for line in worker.log.splitlines() if "CRITICAL" in line]
    assert "the user in STILLROOM_BROKER_URL lacks a right that workers need" in told
    assert f"'{lacking[1:]}'" in told
    assert "Traceback" not in worker.log


def test_a_right_that_is_lost_while_a_worker_runs_is_one_line(
    start: StartCelery, own_server: EmbeddedServer, db: Any
) -> None:
    """Tasks that Redis refuses fail without a traceback; one error tells the reason of both."""
    db.execute_command("ACL", "SETUSER", "weak", "on", ">weak", "~*", "&*", "+@all")
    weak = f"redis://weak:weak@127.0.0.1:{own_server.port}"
    worker = start("worker", REDIS_URL=weak, STILLROOM_BROKER_URL=own_server.url)
    worker.await_line(" ready.", 60)
    db.execute_command("ACL", "SETUSER", "weak", "-evalsha")
    with Celery(broker=own_server.url) as client:
        for _ in range(2):
            client.send_task("stillroom.reclaim", queue="stillroom.maintenance")
    until(lambda: worker.log.count("raised expected: RedisRefused") == 2, "both failures")
    assert worker.log.count("stillroom.reclaim could not be done: Redis refuses this (noperm)") == 1
    assert "'evalsha'" in worker.log
    assert "Traceback" not in worker.log


def test_a_line_of_the_module_is_named(start: StartCelery, tmp_path: Path) -> None:
    """The sentence names the line of the module, also when a called function makes the mistake."""
    (tmp_path / "helper.py").write_text("def connect():\n    raise OSError('no database')\n")
    (tmp_path / "mistake.py").write_text("import helper\n\nhelper.connect()\n")
    worker = start("worker", STILLROOM_LOADERS="mistake")
    assert worker.process.wait(PATIENCE_S) == 1
    assert f"raised OSError: no database ({tmp_path}/helper.py, line 2)" in worker.log


@pytest.mark.parametrize(
    "hang",
    [
        "import time; time.sleep(600)",
        "while True: pass",
        "import threading; threading.Event().wait()",
    ],
)
def test_loaders_that_hang_end_the_worker(
    start: StartCelery, tmp_path: Path, heartbeat: Path, hang: str
) -> None:
    """A loaders module that hangs past STILLROOM_LOADERS_TIMEOUT ends the worker."""
    (tmp_path / "slow.py").write_text(hang + "\n")
    worker = start("worker", STILLROOM_LOADERS="slow", STILLROOM_LOADERS_TIMEOUT="0.5")
    assert worker.process.wait(PATIENCE_S) == 1
    assert "has not ended within STILLROOM_LOADERS_TIMEOUT, 0.5 s" in worker.log
    assert not heartbeat.exists()


def test_a_queue_of_nobody_is_refused(start: StartCelery) -> None:
    """A queue without a task is refused, because a worker that reads a misspelt queue looks alive and
    does nothing.
    """
    worker = start("worker", "-Q", "stillroom.refersh")
    assert worker.process.wait(PATIENCE_S) == 1
    assert (
        "'stillroom.refersh' is no queue of Stillroom; did you mean stillroom.refresh?"
        in worker.log
    )


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({}, None),
        ({"redis_url": "redis://user@ONE/0"}, None),
        ({"namespace": "shop"}, "another STILLROOM_NAMESPACE than this worker"),
        ({"redis_url": "redis://one/3"}, "another REDIS_URL than this worker"),
        ({"broker_url": "amqp://elsewhere"}, "another STILLROOM_BROKER_URL than this worker"),
    ],
)
def test_a_room_of_other_settings_is_told(
    own: dict[str, Any],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker whose loaders belong to a room elsewhere says so, because it does nothing for that room."""
    module = ModuleType("loaders_of_another")
    module.room = Stillroom(Settings(**{"redis_url": "redis://one", **own}))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = Settings(redis_url="redis://one", loaders=(module.__name__,))
    make_app(settings).room.close()
    assert [line for line in caplog.messages if said is None or said in line] == caplog.messages
    assert bool(caplog.messages) is bool(said)


def test_a_worker_outwaits_a_server_that_stands_still_for_half_a_second(
    own_server: EmbeddedServer, usual_deadlines: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's calls take up to some seconds, for nobody waits for them, unless a setting says how much."""
    settings = Settings(redis_url=own_server.url)
    with open_room(settings) as worker, Stillroom(settings) as app:
        for room in (worker, app):
            assert room.cache.set("k", 1)
        own_server.freeze()
        thaw = threading.Timer(0.5, own_server.thaw)
        thaw.start()
        with pytest.raises(RedisUnavailable):
            app.cache.invalidate("other")
        worker.cache.invalidate("k")
        thaw.join()
        assert worker.cache.get("k") is None
    monkeypatch.setenv("STILLROOM_COMMAND_TIMEOUT", "0.3")
    with open_room(Settings(redis_url=own_server.url, call_timeout=0.7)) as worker:
        told = worker.settings
        assert (told.command_timeout, told.call_timeout, told.connect_timeout) == (0.3, 0.7, 1.0)


def test_a_worker_asks_no_worker_for_work(own_server: EmbeddedServer, db: Any) -> None:
    """A loader that reads a stale value in a worker orders nothing: that is for who serves requests."""
    with open_room(Settings(redis_url=own_server.url, swr=600)) as room:

        @room.cache.cached("k:{n}", ttl=60)
        def load(n: int) -> int:
            return n

        load(1)
        age(db, b"stillroom:{0}:e:k:1", 61)
        load(1)
        room.cache.invalidate_by_tag("t")
    assert db.keys("stillroom.*") == []


def test_an_import_that_has_ended_in_time_ends_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What watches over the import of the loaders ends with it."""
    ended = threading.Event()
    monkeypatch.setattr(lifecycle, "_end_hanging", lambda *_: ended.set())
    with lifecycle.within(0.05, "an import"):
        pass
    assert not ended.wait(0.2)


def test_threads_are_not_scaled(start: StartCelery) -> None:
    """`--autoscale` is refused where it cannot work: Celery ends such a worker with the first task it grows for."""
    worker = start("worker", "--autoscale", "4,1")
    assert worker.process.wait(110) == 1
    assert "--autoscale is for processes: add --pool prefork" in worker.log
    assert "Traceback" not in worker.log


@pytest.mark.parametrize(
    ("pool", "idle"),
    [
        ("threads", "--time-limit, --soft-time-limit, --max-tasks-per-child"),
        ("gevent", "--soft-time-limit, --max-tasks-per-child"),
        ("prefork", None),
    ],
)
def test_a_limit_that_a_pool_can_not_keep_is_told(
    start_worker: StartCelery, pool: str, idle: str | None
) -> None:
    """A worker whose pool does not heed a limit of Celery's says so when it starts."""
    limits = ("--time-limit", "60", "--soft-time-limit", "50", "--max-tasks-per-child", "9")
    log = start_worker("-P", pool, *limits).log
    assert ("without effect in this pool" in log) is (idle is not None)
    assert idle is None or f"{idle}. Add --pool prefork" in log


@pytest.mark.parametrize("scale", ["0,0", "-1,-3"])
def test_a_scale_of_nothing_is_refused(start: StartCelery, scale: str) -> None:
    """A worker that could never have a process does not start: it would take messages for ever, and look alive."""
    worker = start("worker", "-P", "prefork", "--autoscale", scale)
    assert worker.process.wait(110) == 1
    assert "--autoscale takes the most processes, at least 1" in worker.log
    assert "Traceback" not in worker.log


def test_a_pool_that_is_named_is_taken(start_worker: StartCelery) -> None:
    """`-P prefork` runs processes, which also scale. Celery takes it for its own default, and an app's pool for
    that."""
    assert "(thread)" in start_worker().log
    worker = start_worker("-P", "prefork", "--autoscale", "2,1")
    assert "(prefork)" in worker.log
    assert len(psutil.Process(worker.process.pid).children()) == 1


@pytest.mark.long
def test_the_heartbeat_stops_with_the_broker(
    start_worker: StartCelery, heartbeat: Path, own_server: EmbeddedServer
) -> None:
    """The heartbeat file grows old when the broker freezes, because it says that the broker answers."""
    worker = start_worker()
    until(heartbeat.exists, "the first sign of life")
    own_server.freeze()
    try:
        until(lambda: age_of(heartbeat) > 17, "the sign of life to grow old", 45)
    finally:
        own_server.thaw()
    until(lambda: age_of(heartbeat) < 3, "a sign of life again")
    assert worker.terminate() == 0


@pytest.mark.parametrize("url", ["redis://one", "redis+sentinel://one/main", "unix:///one"])
def test_life_depends_on_the_answers_of_any_redis(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker shows no life without answers of its broker, however that Redis is reached."""
    signs = make_app(Settings(redis_url=url)).signs
    for answered, can_work in [(time.monotonic(), True), (time.monotonic() - 16, False)]:
        monkeypatch.setattr(Channel, "answered", answered)
        assert signs.can_work() is can_work


def test_a_beat_in_a_worker_shows_life_by_its_ticks_alone(
    own_server: EmbeddedServer, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker sends by itself says nothing of the beat in its thread; a tick does."""
    monkeypatch.setattr(Channel, "answered", time.monotonic())
    with make_app(Settings(redis_url=own_server.url)) as app:
        app.signs.with_beat = True
        app.send_task("stillroom.reclaim")
        assert not app.signs.can_work()
        app.send_task("stillroom.reclaim", headers={"celery_beat_task": True})
        assert app.signs.can_work()


@pytest.mark.parametrize("option", ["--without-heartbeat", "--heartbeat-interval=600"])
def test_a_worker_shows_life_whatever_its_options_are(
    start_worker: StartCelery, heartbeat: Path, option: str
) -> None:
    """An option against Celery's heartbeat, which much advice names, takes no sign of life from a container."""
    start_worker(option)
    for _ in range(2):  # the first is of the worker that has begun
        until(heartbeat.exists, "a sign of life", 10)
        heartbeat.unlink()


def test_a_heartbeat_that_is_published_is_an_answer(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose threads are all busy asks for no message: that it can publish says that its broker answers."""
    with (
        make_app(Settings(redis_url=own_server.url)) as app,
        app.connection_for_write() as connection,
    ):
        events = app.events.Dispatcher(connection)
        events.send("worker-heartbeat")  # connects
        monkeypatch.setattr(Channel, "answered", 0.0)
        events.send("worker-heartbeat")
        assert time.monotonic() - Channel.answered < 10


def test_a_clock_that_is_set_forward_makes_no_busy_worker_a_stuck_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker whose threads are all busy goes on showing life when its machine's clock is set a day forward."""
    app = make_app(Settings(worker_threads=1))
    app.loader.import_default_modules()
    task, now = app.tasks["stillroom.reclaim"], time.time
    headers = {"id": "one", "task": task.name}
    body: tuple[list[Any], dict[str, Any], dict[str, Any]] = ([], {}, {})
    message = SimpleNamespace(delivery_info={}, properties={})
    request = Request(message, app=app, task=task, decoded=True, headers=headers, body=body)
    request.on_accepted(os.getpid(), time.monotonic())
    try:
        monkeypatch.setattr(Channel, "answered", time.monotonic())
        monkeypatch.setattr(time, "time", lambda: now() + 86_400)
        assert app.signs.can_work()
    finally:
        task_ready(request)


def age_of(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def test_a_worker_whose_threads_are_all_stuck_shows_no_life(
    start_worker: StartCelery, heartbeat: Path, tmp_path: Path, own_server: EmbeddedServer, db: Any
) -> None:
    """A worker whose threads are all held by endless loads names each of them once, and shows no heartbeat."""
    (tmp_path / "stuck.py").write_text(STUCK)
    leases = {f"STILLROOM_{name}": "0.5" for name in ("LEASE", "REFRESH_LEASE", "LEASE_LIMIT")}
    worker = start_worker(STILLROOM_LOADERS="stuck", STILLROOM_WORKER_THREADS="2", **leases)
    until(heartbeat.exists, "the first sign of life")
    with Stillroom(Settings(redis_url=own_server.url, swr=600, **PATIENT)) as room:

        @room.cache.cached("stuck:{id}", ttl=60, name="stuck", lease=0.5)
        def stuck(id: int) -> int:
            return id

        for n in range(2):
            stuck(n)
            age(db, b"stillroom:{0}:e:stuck:%d" % n, 61)
            stuck(n)
        until(lambda: db.llen("db:stuck") == 2, "both threads to be stuck")
    # Twice the longest lease is a second: what still runs then is stuck.
    until(lambda: age_of(heartbeat) > 5, "the last sign of life")
    named = re.findall(
        r"Task stillroom\.refresh: stuck\[.+\] has run for \d s and holds one of 2", worker.log
    )
    assert len(named) == len(set(named)) == 2


STUCK = """
import threading
import redis
from stillroom import Settings, Stillroom

room = Stillroom()

@room.cache.cached("stuck:{id}", ttl=60, name="stuck", lease=0.5)
def stuck(id: int) -> int:
    redis.Redis.from_url(Settings().redis_url).rpush("db:stuck", id)
    threading.Event().wait()
"""
