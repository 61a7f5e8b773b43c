"""The room of a worker process: made before the first task, closed after the last, seen to be able to work."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import signals

import redis
from stillroom import (
    AsyncStillroom,
    NoDispatch,
    RedisUnavailable,
    Settings,
    SettingsError,
    Stillroom,
    StillroomError,
)
from stillroom.address import SCHEMES
from stillroom.errors import WHO_MAY, did_you_mean, is_misconfigured
from stillroom.own_celery import ignored
from stillroom.place import each_url
from stillroom.room import listeners_of
from stillroom.shown import shown
from stillroom.wire import Server, Wire
from stillroom.wire.outcome import owner_of
from stillroom_workers import logs, rabbit
from stillroom_workers.contained import contained_call, each_load
from stillroom_workers.frameworks import room_of_django, wrap_loads
from stillroom_workers.schedule import SCHEDULE
from stillroom_workers.signs import SignsOfLife
from stillroom_workers.working import Working

log = logging.getLogger("stillroom.workers")

LIBRARIES = (
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
    sysconfig.get_path("platlib"),
)
ELSEWHERE = "STILLROOM_LOADERS=%s: a room in it has another %s than this worker, which does none of its work"
# Seconds. Nobody waits for a worker: on a busy machine late is better than given up and done again.
UNHURRIED = {"connect_timeout": 1.0, "command_timeout": 2.0, "call_timeout": 5.0}
BROKERS_WE_KNOW = tuple(f"{scheme}://" for scheme in SCHEMES)


def open_room(settings: Settings) -> Stillroom:
    """Return a room with the loaders, and the listeners to sessions, of the modules that STILLROOM_LOADERS names.

    It asks nobody for work, and takes more time for a call than a request has, unless the settings say how much.
    """
    unhurried = {name: s for name, s in UNHURRIED.items() if name not in settings.model_fields_set}
    room = Stillroom(settings.model_copy(update=unhurried), dispatch=NoDispatch())
    _contain_loads(room)
    # A room that one module imports from another is found in both. All modules are imported first, because
    # each_load goes around the contexts that frameworks add.
    rooms = {id(one): (one, spec) for spec in settings.loaders for one in find_rooms(spec)}
    for found, spec in rooms.values():
        if other := found.settings.differs_in(settings):
            log.warning(ELSEWHERE, shown(spec), other)
        _contain_loads(found)
        room.cache.loaders.adopt(found.cache.loaders)
        room.sessions.on_event.extend(map(contained_call, listeners_of(found)))
    return room


def _contain_loads(room: Stillroom | AsyncStillroom) -> None:
    """Have whatever a loader raises be the failure of its load, in each task that loads."""
    around = room.cache.loaders.around
    if each_load not in around:
        around.insert(0, each_load)


def _meant(path: str) -> str:
    """Return the module that a file's name stands for: `shop/cache.py` is `shop.cache`."""
    named = path.removesuffix(".py").strip("./").replace("/", ".")
    return f"; did you mean {named}?" if named and named != path else ""


def find_rooms(spec: str) -> list[Stillroom | AsyncStillroom]:
    """Return the rooms in a module: `shop.cache` (every room in it) or `shop.cache:room` (that one).

    Where a module has none, Django's is meant, if there is one: its loaders are registered on `room()`.

    Raises SettingsError, whatever the module raises: an import may do anything, and end in SystemExit too.
    """
    path, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `celery -A` does: the app's own folder
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        said = f"STILLROOM_LOADERS={spec!r}: can't import {path}: {error}{_meant(path)}"
        raise SettingsError(said) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        what = f"{type(error).__name__}: {error}{_where(error)}{_meant(path)}"
        raise SettingsError(f"STILLROOM_LOADERS={spec!r}: {path} raised {what}") from error
    rooms = _rooms_in(module, attribute) or ([] if attribute else room_of_django())
    if not rooms:
        raise SettingsError(f"STILLROOM_LOADERS={spec!r}: {_why_none(module, path, attribute)}")
    wrap_loads(module, rooms)
    return rooms


def _why_none(module: ModuleType, path: str, attribute: str) -> str:
    kind = "a Stillroom or AsyncStillroom"
    if not attribute:
        return f"nothing in {path} is {kind}"
    if attribute in vars(module):
        return f"{attribute} in {path} is not {kind}"
    rooms = [name for name, one in vars(module).items() if _is_room(one)]
    return f"there is no {attribute} in {path}{did_you_mean(attribute, rooms)}"


def _where(error: BaseException) -> str:
    """Return the last line of the project's code that led to the error, or nothing for a SyntaxError,
    which has one.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if not one.filename.startswith((*LIBRARIES, "<frozen"))] or frames
    if isinstance(error, SyntaxError) or not own:
        return ""
    return f" ({own[-1].filename}, line {own[-1].lineno})"


def _rooms_in(module: ModuleType, attribute: str) -> list[Stillroom | AsyncStillroom]:
    names = vars(module)
    candidates: list[Any] = [names.get(attribute)] if attribute else list(names.values())
    return list({id(room): room for room in candidates if _is_room(room)}.values())


def _is_room(thing: object) -> bool:
    # By type, not isinstance: that would ask a proxy, such as a shared task of Celery's, what it stands for.
    return issubclass(type(thing), Stillroom | AsyncStillroom)


def begin(app: Any) -> None:
    """Import the loaders and reach Redis. Whatever hinders that is raised."""
    for sentence in ignored():
        log.warning("%s", sentence)
    with within(
        app.settings.loaders_timeout, f"STILLROOM_LOADERS={','.join(app.settings.loaders)}"
    ):
        room = app.room
    logs.enable()
    room.connect()
    look_at_broker(app.settings)
    log.info("loaders: %s", ", ".join(room.cache.loaders.names()) or "none")


def look_at_broker(settings: Settings) -> None:
    """Refuse a broker that will never do, such as a cluster. One that is away is waited for.

    Raises RedisUnavailable.
    """
    url = settings.broker_url or ""
    if not url.startswith(BROKERS_WE_KNOW) or len(each_url(url)) > 1:
        return
    try:
        Wire(Server(settings, url, "the broker", "broker_url")).ping()
    except RedisUnavailable as error:
        if is_misconfigured(error):
            raise


@contextmanager
def ending_the_process() -> Iterator[None]:
    """End the process with one sentence and exit code 1 if an error is raised inside.

    Celery logs what a receiver of its signals raises, and goes on: the worker would take tasks and fail them all.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        _give_up(str(error) if isinstance(error, StillroomError) else repr(error))
        raise SystemExit(1) from None


@contextmanager
def ending_where_refused(settings: Settings) -> Iterator[None]:
    """End the process with one sentence and exit code 1 if the broker refuses what it needs inside."""
    try:
        yield
    except (redis.ResponseError, *rabbit.ERRORS) as error:
        setting = "REDIS_URL" if settings.broker_url is None else "STILLROOM_BROKER_URL"
        if _lacks_a_right(error):
            why = f"the user in {setting} lacks a right that workers need at the broker ({error})"
            log.critical("the worker can't go on: %s; %s", shown(why), WHO_MAY)
        elif refused := rabbit.refusal(error, setting):
            log.critical("the worker can't go on: %s", shown(refused))
        else:
            raise
        raise SystemExit(1) from None


def _lacks_a_right(error: Exception) -> bool:
    """Return whether Redis refused a right, of a command or of one in a script, for which kombu has one."""
    in_script = isinstance(error, redis.ResponseError) and owner_of(f"ERR {error}") == "noperm"
    return in_script or isinstance(error, redis.exceptions.NoPermissionError)


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """End the process if what is inside takes longer: an import that hangs can't be interrupted by anything
    else."""
    timer = threading.Timer(seconds, _end_hanging, [seconds, what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_hanging(seconds: float, what: str) -> None:
    _give_up(f"{what}: the import has not ended within STILLROOM_LOADERS_TIMEOUT, {seconds:g} s")
    logging.shutdown()
    os._exit(1)


def _give_up(why: str) -> None:
    logs.enable()  # an import may have disabled them, and be what failed
    log.critical("the worker can't start: %s", shown(why))


def attend(app: Any, settings: Settings) -> None:
    """Tie the room to the worker's life. Celery keeps these receivers to the end of the process."""

    def leave(**_: Any) -> None:
        if "room" in vars(app):
            app.room.close()

    def stop(**_: Any) -> None:
        leave()
        signs.end()

    def beat(**_: Any) -> None:
        if "room" in vars(app):
            signs.of_worker(app.room, working.about)

    def done(sender: Any, **_: Any) -> None:
        if sender.app is app and sender.name in scheduled:
            app.room.upkeep.record_tick(sender.name)

    signs = app.signs = SignsOfLife(settings, app)
    scheduled = {tick.task for tick in SCHEDULE}
    working = Working(app)
    signals.worker_process_shutdown.connect(leave, weak=False)  # in a process of the pool
    signals.worker_shutdown.connect(stop, weak=False)
    signals.worker_ready.connect(beat, weak=False)
    signals.heartbeat_sent.connect(beat, weak=False)
    signals.task_success.connect(done, weak=False)
