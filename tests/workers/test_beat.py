"""Beat keeps no state, shows that it lives, and does no harm when there are two of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from json import loads
from pathlib import Path
from typing import Any

import pytest
from celery.beat import ScheduleEntry
from celery.schedules import schedule

import redis
from stillroom import NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom_workers.app import TICKS_LIMIT, make_app
from stillroom_workers.beat import Scheduler
from stillroom_workers.schedule import SCHEDULE
from stillroom_workers.signs import SignsOfLife
from tests.support.celery_process import CeleryProcess, until
from tests.support.sessions import age_all

Start = Callable[..., CeleryProcess]


@pytest.fixture
def start(own_server: EmbeddedServer, tmp_path: Path, db: Any) -> Iterator[Start]:
    with ExitStack() as started:

        def start(name: str, *arguments: str, **environment: str) -> CeleryProcess:
            process = CeleryProcess(
                tmp_path / f"{name}.log",
                {"REDIS_URL": own_server.url} | environment,
                *arguments,
                *("-l", "INFO"),
                app="tests.support.quick_beat",
            )
            started.callback(process.kill)
            return process

        yield start


@pytest.fixture
def room(own_server: EmbeddedServer, db: Any) -> Iterator[Stillroom]:
    settings = Settings(redis_url=own_server.url, session_peppers="p" * 32, command_timeout=5)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield room


@pytest.mark.parametrize("scheduler", [(), ("-S", "celery.beat:Scheduler")], ids=["ours", "stock"])
def test_it_touches_its_heartbeat_file_and_keeps_no_other(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: tuple[str, ...]
) -> None:
    """Each tick of any scheduler touches beat's heartbeat file. Ours keeps no file that a crash could break."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    heartbeat = tmp_path / "heartbeat"
    options = ("--pidfile=", *scheduler)
    beat = start("beat", "beat", *options, STILLROOM_HEARTBEAT_FILE=str(heartbeat))
    until(heartbeat.exists, "the first sign of life")
    heartbeat.unlink()
    until(heartbeat.exists, "another")
    assert beat.terminate() == 0
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", ["nowhere/heartbeat", "folder/file/heartbeat"])
def test_a_heartbeat_file_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A container is killed again and again where its sign of life can't be written; the log says why, once."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    signs = SignsOfLife(Settings(heartbeat_file=tmp_path / name), object())
    for _ in range(3):
        signs.of_beat()
    signs.end()
    (line,) = caplog.messages
    assert line.startswith(f"STILLROOM_HEARTBEAT_FILE={tmp_path / name} can't be written: No")


@pytest.mark.parametrize("died", [False, True], ids=["two at once", "one killed and replaced"])
def test_two_beats_have_the_effect_of_one(
    start: Start, room: Stillroom, own_server: EmbeddedServer, died: bool
) -> None:
    """With two beats and two workers every tick comes twice, and each ended session is reported once."""
    for n in range(2):
        start(
            f"worker-{n}",
            *("worker", "-n", f"w{n}@%h", "--without-gossip", "--without-mingle"),
            STILLROOM_LOADERS="tests.support.shop_app",
        ).await_line(" ready.")
    beats = [start(f"beat-{n}", "beat", "--pidfile=") for n in range(2)]
    for beat in beats:
        beat.await_line("Sending due task")
    if died:
        beats[0].kill()
    for n in range(300):
        room.sessions.create(f"u{n}")
    with redis.Redis.from_url(own_server.url) as db:
        age_all(db, room, 2 * 86_400)
        until(lambda: room.sessions.count() == 0, "the sweep")
        until(lambda: db.llen("db:events") >= 300, "an event for each")
        assert db.lrange("db:events", 0, -1) == [b"expired"] * 300


def test_a_clock_that_is_an_hour_off_loses_no_tick() -> None:
    """A beat or worker whose clock is off by up to two hours loses no tick."""
    entries: dict[str, Any] = make_app(Settings()).conf.beat_schedule
    assert len(entries) == len(SCHEDULE)
    assert {entry["options"]["expires"] for entry in entries.values()} == {7_200.0}


@pytest.mark.parametrize("hours", [-24 * 365, -1, 0, 1])
def test_a_clock_that_is_set_stops_no_tick(
    hours: int, monkeypatch: pytest.MonkeyPatch, own_server: EmbeddedServer
) -> None:
    """Beat goes on when its machine's clock is set while it runs, and sends each tick when it is due, and once."""
    app = make_app(Settings(redis_url=own_server.url))
    sent: list[str] = []
    ahead: list[timedelta] = []
    monkeypatch.setattr(app, "now", lambda: datetime.now(UTC) + sum(ahead, timedelta()))
    scheduler = Scheduler(app)
    monkeypatch.setattr(scheduler, "apply_async", lambda entry, **_: sent.append(entry.name))

    def ticks_within(seconds: float) -> list[str]:
        sent.clear()
        ahead.append(timedelta(seconds=seconds))
        while scheduler.tick() == 0:
            pass
        return sorted(sent)

    scheduler.tick()
    assert ticks_within(5.1) == ["log-abuse"]
    ahead.append(timedelta(hours=hours))
    ticks_within(0)
    assert ticks_within(61) == sorted(tick.name for tick in SCHEDULE)
    scheduler.close()
    scheduler.connection.release()


def test_the_projects_ticks_are_not_ours_to_send(own_server: EmbeddedServer, db: Any) -> None:
    """A scheduler with one schedule for all apps gives our beat the project's ticks too: it sends its own only."""
    app = make_app(Settings(redis_url=own_server.url))
    scheduler = Scheduler(app)
    for name in ("proj.mail", "stillroom.reclaim"):
        tick = ScheduleEntry(name=name, task=name, schedule=schedule(timedelta(1)), app=app)
        scheduler.apply_async(tick)
    scheduler.close()
    scheduler.connection.release()
    sent = [loads(one)["headers"]["task"] for one in db.lrange("stillroom.maintenance", 0, -1)]
    assert sent == ["stillroom.reclaim"]


def test_a_beat_without_workers_does_not_fill_redis(
    own_server: EmbeddedServer, db: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Ticks that nobody takes leave half of the queue to orders. Beat says so once, lives, and goes on behind."""
    app = make_app(Settings(redis_url=own_server.url))
    scheduler = Scheduler(app)
    entry = scheduler.schedule["reclaim"]
    db.rpush("stillroom.maintenance", *["another"] * (TICKS_LIMIT - 1))
    for _ in range(3):
        app.signs._beat = 0.0
        scheduler.apply_async(entry, producer=scheduler.producer)
        assert app.signs._beat > 0
    assert db.llen("stillroom.maintenance") == TICKS_LIMIT
    (line,) = caplog.messages
    assert line.startswith("5,000 tasks or more wait in stillroom.maintenance")
    db.rpop("stillroom.maintenance")
    scheduler.apply_async(entry, producer=scheduler.producer)
    assert db.llen("stillroom.maintenance") == TICKS_LIMIT
    scheduler.close()
    scheduler.connection.release()


def test_a_schedule_in_redis_is_of_one_namespace() -> None:
    """redbeat deletes what its schedule no longer names, so each app's lies under a name of its own."""
    first, second = [
        make_app(Settings(namespace=name)).conf.redbeat_key_prefix for name in ("shop", "blog")
    ]
    assert (first, second) == ("shop:redbeat:", "blog:redbeat:")
