"""The app's own modules, for the commands that look at its loaders, routes and limits."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from stillroom.errors import SettingsError
from stillroom.limits.routes import Routes
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.settings import Settings
from stillroom.web.carriers import held
from stillroom.web.known_routes import Known, inner_apps, known_routes

log = logging.getLogger("stillroom.cli")

MOST = 1_000  # apps within apps, and whatever else they hold that can be called

App = Annotated[
    list[str] | None,
    typer.Option(
        "--app", help="Where the app or its Routes is: shop.web:app. Default: STILLROOM_LOADERS."
    ),
]


@contextmanager
def open_room_with_loaders() -> Iterator[Stillroom]:
    """Open a room that is connected, and knows the loaders of the modules that STILLROOM_LOADERS names."""
    with Stillroom() as room:
        for found in rooms_of(room.settings):
            room.cache.loaders.adopt(found.cache.loaders)
            if sentence := elsewhere(found, room.settings):
                log.warning("%s", sentence)
        room.connect_cache()
        yield room


def rooms_of(settings: Settings) -> list[Stillroom | AsyncStillroom]:
    """Import the modules that STILLROOM_LOADERS names, and return their rooms. Raises SettingsError."""
    if not settings.loaders:
        return []
    _prepare_imports()
    # By name: the library knows no workers, and only who has the command line has both.
    find_rooms = importlib.import_module("stillroom_workers.lifecycle").find_rooms
    return [room for spec in settings.loaders for room in find_rooms(spec)]


def elsewhere(found: Stillroom | AsyncStillroom, settings: Settings) -> str:
    """Return what is to be said of a room that has its settings from elsewhere; empty for any other."""
    other = found.settings.differs_in(settings)
    if not other:
        return ""
    return (
        f"a room in STILLROOM_LOADERS has another {other} than this command, which sees and changes nothing of it. "
        f"Give the command the app's {other}."
    )


def apps_of(specs: Sequence[str]) -> list[tuple[str, Any]]:
    """Return what `shop.web` (all there is in it) or `shop.web:app` (that one) names. Raises SettingsError."""
    if not specs:
        return []
    _prepare_imports()
    found: list[tuple[str, Any]] = []
    for spec in specs:
        path, _, attribute = spec.partition(":")
        try:
            module = importlib.import_module(path)
            names = [attribute] if attribute else [n for n in vars(module) if n[:1] != "_"]
            found += [(f"{path}:{name}", getattr(module, name)) for name in names]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # an import may do anything, and end in SystemExit too
            raise SettingsError(f"{spec}: {type(error).__name__}: {error}") from error
    return found


def _prepare_imports() -> None:
    """Let the app's modules be imported as in a worker: from this folder, and after Django's setup, if it has one.

    Raises SettingsError.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if (name := os.environ.get("DJANGO_SETTINGS_MODULE")) and find_spec("django"):
        try:
            importlib.import_module("django").setup()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # settings are the app's code, too
            raise SettingsError(
                f"DJANGO_SETTINGS_MODULE={name}: {type(error).__name__}: {error}"
            ) from error


def tables_in(found: Sequence[tuple[str, Any]]) -> dict[str, Routes]:
    """Return the tables of limits by where they were found: a Routes itself, or an app that a middleware guards."""
    tables: dict[int, tuple[str, Routes]] = {}
    for name, thing in found:
        for one in _inward(thing):
            routes = (
                one if isinstance(one, Routes) else getattr(_part(one, "_gate"), "routes", None)
            )
            if isinstance(routes, Routes):
                tables.setdefault(id(routes), (name, routes))
    return dict(tables.values())


def endpoints_in(found: Sequence[tuple[str, Any]]) -> list[tuple[str, Any, list[Known]]]:
    """Return the name, the app and the routes of each app that was found, without those that are in another one."""
    apps = {id(app): (name, app, routes) for name, app in found if (routes := _routes_of(app))}
    inner = {id(one) for _, app, _ in apps.values() for one in inner_apps(app)}
    return [found for key, found in apps.items() if key not in inner]


def _routes_of(thing: Any) -> list[Known]:
    if isinstance(thing, type | Routes | Stillroom | AsyncStillroom):
        return []
    try:
        return known_routes(thing) or []
    except Exception:  # it is no app, but an object that makes up attributes when asked
        return []


def _inward(thing: Any) -> Iterator[Any]:
    """Yield the app, what it wraps under whatever name, and the tables of a Starlette app's middleware to come.

    What is put around a Flask app is one of its attributes.
    """
    apps, seen = [thing], set[int]()
    for app in apps:
        if id(app) in seen or len(seen) == MOST:
            continue
        seen.add(id(app))
        yield app
        for middleware in _part(app, "user_middleware") or ():
            options = getattr(middleware, "kwargs", {})
            yield from (value for value in options.values() if isinstance(value, Routes))
        with suppress(Exception):  # it is no app, but a proxy of nothing
            apps += [one for one in held(app) if callable(one) and not isinstance(one, type)]


def _part(thing: Any, name: str) -> Any:
    """Return an attribute of an app, or None for an object that makes up attributes when asked."""
    try:
        return vars(thing).get(name)
    except TypeError:
        return None
