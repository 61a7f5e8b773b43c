"""Sessions and a real worker: what was revoked or has expired is deleted behind the request."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom_workers.lifecycle import open_room
from stillroom_workers.schedule import SCHEDULE
from tests.support.celery_process import CeleryProcess, until
from tests.support.processes import Program
from tests.support.sessions import age_all, sessions_keys

StartCelery = Callable[..., CeleryProcess]


@pytest.fixture
def room(own_server: EmbeddedServer, db: Any) -> Iterator[Stillroom]:
    """The app's process. Its pepper is none of the worker's business."""
    settings = Settings(
        redis_url=own_server.url, session_peppers="p" * 32, call_timeout=5, command_timeout=5
    )
    with Stillroom(settings) as room:
        yield room


def test_a_worker_deletes_what_was_revoked(
    start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """A thousand of one user are dead at once; the revocation wakes a worker, and their memory is free."""
    process = start_worker()
    made = [room.sessions.create("u1", tags=["t"]) for _ in range(1_000)]
    other = room.sessions.create("u2")
    assert room.sessions.destroy_for_user("u1") == 1_000
    assert room.sessions.get(made[-1]) is None
    until(lambda: room.sessions.count() == 1, "the deletion")
    assert room.sessions.get(other) is not None
    process.await_line("sweep_sessions")
    assert room.sessions.destroy(other)
    until(lambda: sessions_keys(db) == [], "an empty server")


def test_beat_has_the_expired_swept(
    start: StartCelery, start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """Nobody wakes anybody: two workers off for a day are started, and what expired since is deleted."""
    for n in range(500):
        room.sessions.create(f"u{n}", {"n": n}, tags=["t"])
    age_all(db, room, 2 * 86_400)
    start_worker()
    start_worker(STILLROOM_LOADERS="tests.support.shop_app")
    start("beat", "--pidfile=", app="tests.support.quick_beat")
    until(lambda: sessions_keys(db) == [], "an empty server", 30)


def test_a_worker_takes_over_the_apps_listeners_alone() -> None:
    """Those that the rooms of the app have for themselves stay theirs: a replay is told to abuse once."""
    settings = Settings(redis_url="redis://127.0.0.1:1", loaders="tests.support.shop_app")
    with open_room(settings) as room:
        first, *others = room.sessions.on_event
        assert getattr(first, "__self__", None) is room
        assert [type(one).__name__ for one in others] == ["function"]


def test_an_apps_listeners_hear_of_it_in_the_worker(
    start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """The module that STILLROOM_LOADERS names has a room with a listener: it is told of what expired."""
    start_worker(STILLROOM_LOADERS="tests.support.shop_app")
    for _ in range(3):
        room.sessions.create("u1")
    age_all(db, room, 2 * 86_400)
    room.dispatch.wake("stillroom.sweep_sessions")
    until(lambda: db.lrange("db:events", 0, -1) == [b"expired"] * 3, "three events")


def test_the_schedule_has_the_sweep() -> None:
    """Every minute."""
    assert [tick.every for tick in SCHEDULE if tick.task == "stillroom.sweep_sessions"] == [60]


def test_the_task_reports_on_its_own_apps_room(
    own_server: EmbeddedServer, room: Stillroom, db: Any
) -> None:
    """What a person reads in Flower; another app in the process, with another server, changes nothing."""
    room.sessions.create("u1")
    age_all(db, room, 86_400 + 100)
    program = Program(
        f"""
        from stillroom import Settings
        from stillroom_workers import make_app
        make_app(Settings(redis_url="redis://127.0.0.1:1")).finalize()
        app = make_app(Settings(redis_url={own_server.url!r}))
        print("report", app.tasks["stillroom.sweep_sessions"].run())
        """
    )
    with program:
        report = ast.literal_eval(program.read_word("report "))
    assert (report["expired"], report["deleted"], report["done"]) == (1, 0, True)
    assert report["lag_s"] == pytest.approx(100, abs=30)
