"""The room of a worker process: made before the first task, closed after the last, seen to be alive."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import signals

from stillroom import AsyncStillroom, NoDispatch, Settings, SettingsError, Stillroom, StillroomError
from stillroom.health import WorkerStats
from stillroom_workers.schedule import SCHEDULE
from stillroom_workers.working import Working

log = logging.getLogger("stillroom.workers")

SEEN_EVERY_S = 5.0


def open_room(settings: Settings) -> Stillroom:
    """A room with the loaders, and the listeners to sessions, of the modules that STILLROOM_LOADERS names.

    It asks nobody for work.
    """
    room = Stillroom(settings, dispatch=NoDispatch())
    for spec in settings.loaders:
        for found in find_rooms(spec):
            room.cache.loaders.adopt(found.cache.loaders)
            room.sessions.on_event.extend(_listeners_to(found))
    return room


def _listeners_to(room: Stillroom | AsyncStillroom) -> list[Any]:
    """The app's. The room's own tells its own abuse detection, which in a worker nobody delivers."""
    return [one for one in room.sessions.on_event if getattr(one, "__self__", None) is not room]


def find_rooms(spec: str) -> list[Stillroom | AsyncStillroom]:
    """The rooms in a module: `shop.cache` (every room in it) or `shop.cache:room` (that one)."""
    path, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `celery -A` does: the app's own folder
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise SettingsError(f"STILLROOM_LOADERS={spec!r}: can't import {path}: {error}") from error
    rooms = _rooms_in(module, attribute)
    if not rooms:
        what = f"{attribute} in {path} is not" if attribute else f"nothing in {path} is"
        raise SettingsError(f"STILLROOM_LOADERS={spec!r}: {what} a Stillroom or AsyncStillroom")
    _load_within_flask(module, rooms)
    return rooms


def _load_within_flask(module: ModuleType, rooms: list[Stillroom | AsyncStillroom]) -> None:
    """Loaders beside a Flask app want its context, even if nobody has said so by `room.init_app(app)`."""
    flask = sys.modules.get("flask")
    apps = [one for one in vars(module).values() if flask and isinstance(one, flask.Flask)]
    if len(apps) == 1:
        from stillroom.web.flask_room import load_within

        for room in rooms:
            if not room.cache.loaders.around:
                load_within(room, apps[0])


def _rooms_in(module: ModuleType, attribute: str) -> list[Stillroom | AsyncStillroom]:
    names = vars(module)
    candidates = [names.get(attribute)] if attribute else list(names.values())
    rooms = [room for room in candidates if isinstance(room, Stillroom | AsyncStillroom)]
    return list({id(room): room for room in rooms}.values())


def attend(app: Any, settings: Settings) -> None:
    """Tie the room to the worker's life. Receivers are kept by the app, as long as it lives."""

    def start(**_: Any) -> None:
        try:
            app.room.connect()
        except StillroomError as error:
            log.critical("the worker can't start: %s", error)
            raise SystemExit(1) from None
        log.info("loaders: %s", ", ".join(app.room.cache.loaders.names()) or "none")

    def stop(**_: Any) -> None:
        app.room.close()
        if settings.heartbeat_file:
            settings.heartbeat_file.unlink(missing_ok=True)

    def beat(**_: Any) -> None:
        if settings.heartbeat_file:
            touch(settings.heartbeat_file)
        signs.give(app.room, working.about)

    def done(sender: Any, **_: Any) -> None:
        if sender.app is app and sender.name in scheduled:
            app.room.upkeep.record_tick(sender.name)

    signs, scheduled = SignsOfLife(), {tick.task for tick in SCHEDULE}
    working = Working(app)
    app.receivers = [*app.receivers, start, stop, beat, done]
    signals.worker_init.connect(start, weak=False)
    signals.worker_shutdown.connect(stop, weak=False)
    signals.worker_ready.connect(beat, weak=False)
    signals.heartbeat_sent.connect(beat, weak=False)
    signals.task_success.connect(done, weak=False)


class SignsOfLife:
    """Tells Redis now and then that this worker is at work. While Redis is away that costs nothing."""

    def __init__(self) -> None:
        self._due = 0.0  # time.monotonic()

    def give(self, room: Stillroom, about: Callable[[], WorkerStats]) -> None:
        """Celery's heart beats every two seconds; this is done every five or six."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + SEEN_EVERY_S
            room.upkeep.record_heartbeat(f"{os.uname().nodename}-{os.getpid()}", about())


def touch(path: Path) -> None:
    """Say that the worker is connected. A disk that is full must not end a worker that works."""
    with contextlib.suppress(OSError):
        path.touch()
