"""A worker whose broker is behind Sentinels lives through a failover, and what was ordered is done."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from stillroom import Settings, Stillroom
from stillroom.broker import reach, sentinel_options
from stillroom.embedded import free_port
from tests.failover.conftest import UNHURRIED
from tests.support.celery_process import CeleryProcess, until
from tests.support.lag import least, seconds_of
from tests.support.sentinels import MASTER, Sentinels

TASK = "stillroom.trim_marks"


def done(worker: CeleryProcess) -> int:
    return sum(f"Task {TASK}" in line and "succeeded" in line for line in worker.log.splitlines())


def ordered_until_done(room: Stillroom, worker: CeleryProcess, within: float) -> None:
    """Ask for work until some is done: a wake-up may be lost, what has to happen is written down."""
    before = done(worker)

    def asked() -> bool:
        room.dispatch.wake(TASK)
        return done(worker) > before

    until(asked, "a task", within)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("accident", ["killed", "frozen", "cut"])
def test_a_worker_goes_on_with_the_new_primary(
    sentinels: Sentinels, tmp_path: Path, accident: str
) -> None:
    """A worker and a room that orders work go on, without a restart, with the new primary."""
    log, arguments = tmp_path / "worker.log", ("worker", "-l", "INFO", "-P", "threads")
    worker = CeleryProcess(log, {"REDIS_URL": sentinels.url}, *arguments)
    try:
        worker.await_line("ready.", 60)
        settings = Settings(redis_url=sentinels.url, **UNHURRIED)
        with Stillroom(settings) as room:
            ordered_until_done(room, worker, 30)
            with sentinels.accident(accident):
                sentinels.promote_another()
                ordered_until_done(room, worker, 60)
            ordered_until_done(room, worker, 60)
        assert worker.process.poll() is None
        assert worker.terminate() == 0
    finally:
        worker.kill()


@pytest.mark.long
def test_a_primary_that_is_none_any_more_is_tried_each_second(tmp_path: Path) -> None:
    """While Sentinels name a server that takes no writes, a worker tries it once a second, and goes on then."""
    long_ms = 60_000
    with Sentinels(tmp_path, replicas=0, sentinels=1, down_after_ms=long_ms) as alone:
        primary = alone.client(alone.servers[0])
        log, arguments = tmp_path / "worker.log", ("worker", "-B", "-l", "INFO")
        worker = CeleryProcess(log, {"REDIS_URL": alone.url}, *arguments)
        try:
            worker.await_line("ready.", 60)
            primary.execute_command("REPLICAOF", "127.0.0.1", free_port())
            until(lambda: worker.log.count("Cannot connect") >= 6, "several tries", 60)
            primary.execute_command("REPLICAOF", "NO", "ONE")
            before = worker.log.count("succeeded")
            until(lambda: worker.log.count("succeeded") > before, "a task", 60)
            assert "Frequent restarts" not in worker.log
        finally:
            worker.kill()


def test_kombu_is_told_of_the_sentinels() -> None:
    """kombu gets the Sentinels' addresses in its URL, and the primary's name and their login as options."""
    url = f"redis+sentinel://app:secret@s1:26379,s2:26380/{MASTER}/3"
    settings = Settings(redis_url=url, sentinel_user="watch", sentinel_password="canary")
    assert settings.broker == "sentinel://app:secret@s1:26379/3;sentinel://app:secret@s2:26380/3"
    options = sentinel_options(settings)
    assert options["master_name"] == MASTER
    assert options["sentinel_kwargs"]["username"] == "watch"
    assert options["sentinel_kwargs"]["password"] == "canary"
    assert sentinel_options(Settings(redis_url="redis://one")) == {}


def test_a_sentinel_that_does_not_run_holds_up_nobody(sentinels: Sentinels) -> None:
    """The next one is asked at once: a machine that is lost takes its Sentinel along, and workers connect often."""
    running = ",".join(f"127.0.0.1:{one.port}" for one in sentinels.sentinels)
    settings = Settings(redis_url=f"redis+sentinel://127.0.0.1:1,127.0.0.1:2,{running}/{MASTER}/0")
    assert least(lambda: seconds_of(lambda: reach(settings)), 2.0) < 2.0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_beat_and_flower_go_on_with_the_new_primary(sentinels: Sentinels, tmp_path: Path) -> None:
    """Beat's ticks reach a worker again, and Flower shows tasks that were done after the failover."""
    port, environment = free_port(), {"REDIS_URL": sentinels.url}
    flower = ("flower", "--address=127.0.0.1", f"--port={port}")
    with ExitStack() as stack:

        def started(name: str, *arguments: str, app: str = "stillroom_workers") -> CeleryProcess:
            process = CeleryProcess(tmp_path / name, environment, *arguments, app=app)
            stack.callback(process.kill)
            return process

        worker = started("worker", "worker", "-l", "INFO", "-P", "threads")
        beat = started("beat", "beat", "--pidfile=", app="tests.support.quick_beat")
        watching = started("flower", *flower)
        until(lambda: succeeded(port) > 0, "a task in Flower", 60)
        with sentinels.accident("killed"):
            sentinels.promote_another()
            before = done(worker), succeeded(port)
            until(lambda: done(worker) > before[0], "a tick that reached the worker", 60)
            until(lambda: succeeded(port) > before[1] + 5, "new tasks in Flower", 60)
        assert [one.process.poll() for one in (worker, beat, watching)] == [None] * 3


def succeeded(port: int) -> float:
    """Return how many tasks Flower has seen succeed."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            page = answer.read().decode()
    except OSError:
        return 0.0
    found = re.findall(
        r'^flower_events_total\{.*type="task-succeeded".*\} (.+)$', page, re.MULTILINE
    )
    return sum(map(float, found))


SLOW = """
import os, time
from pathlib import Path
from stillroom import Stillroom

room, folder = Stillroom(), Path(os.environ["HELD_FOLDER"])

@room.cache.cached("held:{id}", ttl=600, swr=600, tags=["held"], name="held")
def held(id: int) -> int:
    with (folder / "runs").open("a") as runs:
        runs.write("run\\n")
    while not (folder / "gate").exists():
        time.sleep(0.02)
    return os.getpid()
"""
ORDER = """
import slow, sys, time
from pathlib import Path

slow.room.connect()
while slow.room.cache.get("held:1") is None:
    slow.held(1)
slow.room.cache.invalidate_by_tag("held", soft=True)
while not Path(sys.argv[1]).exists():  # a worker is asked for what is stale now
    slow.held(1)
    time.sleep(0.5)
slow.room.close()
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_what_a_worker_holds_is_done_once(sentinels: Sentinels, tmp_path: Path) -> None:
    """A refresh that is under way when the primary dies is acknowledged to the new one, and is done once."""
    (tmp_path / "slow.py").write_text(SLOW)
    app, held = tmp_path / "app", tmp_path / "worker"
    for folder in (app, held):
        folder.mkdir()
    (app / "gate").touch()
    environment = {
        "REDIS_URL": sentinels.url,
        "STILLROOM_LOADERS": "slow",
        "STILLROOM_CONNECT_TIMEOUT": "5",
        "STILLROOM_COMMAND_TIMEOUT": "5",
        "STILLROOM_CALL_TIMEOUT": "10",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
    }
    of_worker = environment | {"HELD_FOLDER": str(held)}
    worker = CeleryProcess(tmp_path / "log", of_worker, "worker", "-l", "INFO", "-P", "threads")
    try:
        worker.await_line("ready.", 60)
        of_app = os.environ | environment | {"HELD_FOLDER": str(app)}
        order = [sys.executable, "-c", ORDER, str(held / "runs")]
        subprocess.run(order, env=of_app, check=True, timeout=60)
        with Stillroom(Settings(redis_url=sentinels.url, **UNHURRIED)) as room:
            with sentinels.accident("killed"):
                sentinels.promote_another()
                ordered_until_done(
                    room, worker, 60
                )  # it has connected, and taken back what there is
                (held / "gate").touch()
                until(lambda: refreshed(worker), "the end of the refresh", 30)
                new = sentinels.client(sentinels.primary)
                until(lambda: not new.keys("*:unacked"), "the new primary has the acknowledgement")
                ordered_until_done(room, worker, 60)
            ordered_until_done(room, worker, 60)
        assert (held / "runs").read_text().splitlines() == ["run"]
        assert worker.terminate() == 0
    finally:
        worker.kill()


def refreshed(worker: CeleryProcess) -> bool:
    return any(
        "Task stillroom.refresh" in line and "succeeded" in line for line in worker.log.splitlines()
    )
