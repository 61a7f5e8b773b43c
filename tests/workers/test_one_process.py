"""`stillroom worker` does all background work in one process, with signs of life for containers and systemd."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import BaseModel

from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import CeleryProcess, until
from tests.support.crowd import PATIENT
from tests.support.entries import age
from tests.support.processes import STILLROOM, run_to_end

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/stillroom-worker.service"

StartOne = Callable[..., CeleryProcess]


class OneProcess(CeleryProcess):
    """`stillroom worker …`, as a person types it."""

    program = (STILLROOM,)


@pytest.fixture
def start_one(own_server: EmbeddedServer, tmp_path: Path, db: Any) -> Iterator[StartOne]:
    started: list[OneProcess] = []

    def start_one(*arguments: str, **changes: str) -> OneProcess:
        environment = {
            "REDIS_URL": own_server.url,
            "STILLROOM_HEARTBEAT_FILE": str(tmp_path / "heartbeat"),
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
        }
        log = tmp_path / f"{len(started)}.log"
        started.append(OneProcess(log, environment | changes, "worker", *arguments))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Return systemd's end of the notifications."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(110)
        yield listener


class Product(BaseModel):
    """A product as the worker's loader returns it."""

    id: int
    version: int


def test_one_process_does_it_all(
    start_one: StartOne,
    own_server: EmbeddedServer,
    tmp_path: Path,
    db: Any,
    listener: socket.socket,
) -> None:
    """One process refreshes stale values and runs the schedule, both visible from outside, and SIGTERM
    ends it well.
    """
    worker = start_one(
        *("--threads", "3"),
        STILLROOM_LOADERS="tests.support.shop_app",
        NOTIFY_SOCKET=str(tmp_path / "notify"),
    )
    assert listener.recv(100) == b"READY=1\nWATCHDOG=1"
    assert (tmp_path / "heartbeat").exists()
    assert "concurrency: 3" in worker.log
    until(lambda: db.hexists("stillroom:ticks", "stillroom.log_abuse"), "a tick")
    with Stillroom(Settings(redis_url=own_server.url, swr=600, **PATIENT)) as room:

        @room.cache.cached("product:{id}", ttl=60, name="product")
        def product(id: int) -> Product:
            return Product(id=id, version=-1)

        product(1)
        age(db, b"stillroom:{0}:e:product:1", 61)
        product(1)
        until(lambda: product(1).version == 0, "the value", 60)
    assert worker.terminate() == 0
    said = set()
    listener.settimeout(0.2)
    while b"STOPPING=1" not in said:
        said.add(listener.recv(100))
    assert not (tmp_path / "heartbeat").exists()


class AsModule(CeleryProcess):
    """`python -m stillroom_workers …`"""

    program = ("-m", "stillroom_workers")


def test_it_runs_on_greenlets(environment: dict[str, str], tmp_path: Path, db: Any) -> None:
    """With `--pool gevent` it patches Python in time: it does the ticks of its schedule, and ends at SIGTERM."""
    worker = AsModule(tmp_path / "log", environment, "--pool", "gevent", "--concurrency", "2")
    try:
        until(lambda: db.hexists("stillroom:ticks", "stillroom.log_abuse"), "a tick", 60)
        assert worker.terminate() == 0
    finally:
        worker.kill()


def test_celerys_option_for_beat_is_a_thread_too(
    start_worker: StartOne, tmp_path: Path, db: Any
) -> None:
    """`celery worker -B` starts no process, which would show signs of life when the worker is dead."""
    worker = start_worker("-B", STILLROOM_HEARTBEAT_FILE=str(tmp_path / "heartbeat"))
    until(lambda: db.hexists("stillroom:ticks", "stillroom.log_abuse"), "a tick")
    assert psutil.Process(worker.process.pid).children() == []
    until((tmp_path / "heartbeat").exists, "a sign of life")


# What Celery's command reads for its own options, and many environments have for something else.
SHORT_NAMES = ("APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE")


def test_an_environment_with_variables_of_somebody_elses_starts_it(
    start_one: StartOne, tmp_path: Path
) -> None:
    """APP, LOADER and the like, and the options of a project's Celery workers, are not read."""
    foreign = dict.fromkeys(SHORT_NAMES, "elsewhere") | {"CELERY_WORKER_POOL": "solo"}
    worker = start_one(**foreign)
    until(
        lambda: (tmp_path / "heartbeat").exists() or worker.process.poll() is not None, "a sign", 60
    )
    assert worker.process.poll() is None
    assert "(thread)" in worker.log


def test_it_does_not_go_to_the_background(environment: dict[str, str], tmp_path: Path) -> None:
    """`python -m stillroom_workers -D` is refused. Celery would end it well, with no worker left behind."""
    worker = AsModule(tmp_path / "log", environment, "-D")
    assert worker.process.wait(110) == 2
    assert "No such option '-D'" in worker.log


def test_a_mistake_in_loaders_ends_it(start_one: StartOne, tmp_path: Path) -> None:
    """A mistake in the loaders ends it with one sentence and exit code 1, as the workers of the stack."""
    (tmp_path / "mistake.py").write_text("1 / 0\n")
    worker = start_one(STILLROOM_LOADERS="mistake")
    assert worker.process.wait(110) == 1
    assert "mistake raised ZeroDivisionError" in worker.log
    assert "Traceback" not in worker.log


def test_a_mistake_in_settings_ends_it(start_one: StartOne) -> None:
    """A mistake in a setting ends it before anything starts, and the sentence names the setting."""
    worker = start_one(STILLROOM_WORKER_THREADS="many")
    assert worker.process.wait(110) == 1
    assert "STILLROOM_WORKER_THREADS" in worker.log
    assert "Traceback" not in worker.log


NO_CLOCK = """
from stillroom import Stillroom
from stillroom_workers.beat import Scheduler

def tick(self, *args, **options):
    raise RuntimeError("no clock")

Scheduler.tick = tick
room = Stillroom()
"""


def test_it_does_not_go_on_without_its_schedule(start_one: StartOne, tmp_path: Path) -> None:
    """When beat ends the process ends, and its supervisor starts it again."""
    (tmp_path / "clockless.py").write_text(NO_CLOCK)
    worker = start_one(STILLROOM_LOADERS="clockless")
    assert worker.process.wait(110) != 0
    assert "beat ended, and the worker ends with it: RuntimeError('no clock')" in worker.log
    assert not (tmp_path / "heartbeat").exists()


@pytest.fixture
def voiceless(own_server: EmbeddedServer, db: Any) -> Iterator[str]:
    """Return the URL of a user who may do everything but publish."""
    rights = ("on", ">voiceless", "~*", "&*", "+@all", "-lpush")
    db.execute_command("ACL", "SETUSER", "voiceless", *rights)
    yield f"redis://voiceless:voiceless@127.0.0.1:{own_server.port}"
    db.execute_command("ACL", "DELUSER", "voiceless")


def test_a_beat_that_nobody_hears_shows_no_life(
    start: Callable[..., CeleryProcess], voiceless: str, tmp_path: Path
) -> None:
    """A beat whose ticks cannot be sent shows no sign of life, logs a line for each, and goes on."""
    heartbeat = tmp_path / "heartbeat"
    beat = start(
        *("beat", "--pidfile="),
        app="tests.support.quick_beat",
        REDIS_URL=voiceless,
        STILLROOM_HEARTBEAT_FILE=str(heartbeat),
    )
    until(lambda: beat.log.count("could not be sent") > 3, "ticks that are refused", 90)
    assert not heartbeat.exists()
    assert "Traceback" not in beat.log


def test_the_unit_is_what_systemd_reads() -> None:
    """`systemd-analyze verify` accepts the unit, except that the program is not installed here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = run_to_end(["systemd-analyze", "verify", "--man=no", str(UNIT)])
    about_us = [line for line in done.stderr.splitlines() if "stillroom-worker" in line]
    assert [line for line in about_us if "is not executable" not in line] == []


def test_the_unit_starts_a_command_that_there_is() -> None:
    """The unit starts an existing command, waits longer than two signs of life, and has the stack's limits."""
    unit = ConfigParser(strict=False, interpolation=None, delimiters="=", comment_prefixes="#")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["ExecStart"].endswith("/stillroom worker")
    assert (service["Type"], service["WatchdogSec"]) == ("notify", "30")
    assert f'memory: {service["MemoryMax"]}, cpus: "1", pids: {service["TasksMax"]}' in (
        ROOT / "stack.yml"
    ).read_text(encoding="utf-8")


def test_a_manager_that_does_not_listen_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing, dead or foreign notification socket raises nothing."""
    from stillroom_workers.signs import notify

    for address in ("", str(tmp_path / "gone"), "vsock:2:1", "@nobody", "/"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("READY=1")
