"""A real worker deletes revoked and expired sessions behind the request."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from stillroom import SessionEvent, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom_workers.lifecycle import open_room
from stillroom_workers.schedule import SCHEDULE
from tests.support.celery_process import CeleryProcess, until
from tests.support.processes import Program
from tests.support.sessions import age_all, sessions_keys

StartCelery = Callable[..., CeleryProcess]


def test_a_worker_deletes_what_was_revoked(
    start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """A thousand revoked sessions of one user are dead at once, and the woken worker frees their memory."""
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
    """After a day without workers beat has the expired sessions swept, though nobody wakes a worker."""
    for n in range(500):
        room.sessions.create(f"u{n}", {"n": n}, tags=["t"])
    age_all(db, room, 2 * 86_400)
    start_worker()
    start_worker(STILLROOM_LOADERS="tests.support.shop_app")
    start("beat", "--pidfile=", app="tests.support.quick_beat")
    until(lambda: sessions_keys(db) == [], "an empty server")


def test_a_worker_takes_over_the_apps_listeners_alone() -> None:
    """A worker takes over only the app's listeners of expired sessions, so that a replay is reported once."""
    settings = Settings(redis_url="redis://127.0.0.1:1", loaders="tests.support.shop_app")
    with open_room(settings) as room:
        first, *others = room.sessions.on_event
        assert getattr(first, "__self__", None) is room
        assert [type(one).__name__ for one in others] == ["function"]


def test_an_apps_listeners_hear_of_it_in_the_worker(
    start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """A listener in the module that STILLROOM_LOADERS names hears of expired sessions in the worker."""
    start_worker(STILLROOM_LOADERS="tests.support.shop_app")
    for _ in range(3):
        room.sessions.create("u1")
    age_all(db, room, 2 * 86_400)
    room.dispatch.wake("stillroom.sweep_sessions")
    until(lambda: db.lrange("db:events", 0, -1) == [b"expired"] * 3, "three events")


def test_a_listener_that_ends_its_thread_hears_of_the_others(
    own_server: EmbeddedServer, room: Stillroom, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a listener raises, be it no Exception, keeps a worker from telling it of no session that has ended."""
    heard: list[str | None] = []

    def listen(event: SessionEvent) -> None:
        heard.append(event.user_id)
        raise SystemExit(3)

    module = types.ModuleType("heard_of")
    module.room = Stillroom(Settings(redis_url=own_server.url))  # type: ignore[attr-defined]
    module.room.sessions.on_event.append(listen)
    monkeypatch.setitem(sys.modules, "heard_of", module)
    for _ in range(3):
        room.sessions.create("u1")
    age_all(db, room, 2 * 86_400)
    with open_room(Settings(redis_url=own_server.url, loaders="heard_of")) as worker:
        worker.upkeep.sweep_sessions()
    module.room.close()
    assert heard == ["u1"] * 3


def test_a_room_that_two_modules_have_is_listened_to_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener is called once by a worker, also where a second loaders module imports the room of the first."""
    with Stillroom(Settings(redis_url="redis://127.0.0.1:1")) as shared:
        shared.sessions.on_event.append(lambda event: None)
        for name in ("first_of_two", "second_of_two"):
            module = types.ModuleType(name)
            module.room = shared  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
        loaders = "first_of_two,second_of_two"
        with open_room(Settings(redis_url="redis://127.0.0.1:1", loaders=loaders)) as worker:
            assert len(worker.sessions.on_event) == 2  # with its own


def test_the_schedule_has_the_sweep() -> None:
    """The schedule has the sweep every minute."""
    assert [tick.every for tick in SCHEDULE if tick.task == "stillroom.sweep_sessions"] == [60]


def test_the_task_reports_on_its_own_apps_room(
    own_server: EmbeddedServer, room: Stillroom, db: Any
) -> None:
    """The task's result is for Flower, and another app with another server in the process changes nothing."""
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
