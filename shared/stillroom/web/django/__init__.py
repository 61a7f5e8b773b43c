"""Django: a cache backend, a session engine, and a middleware that answers 503 while Redis is away.

    CACHES = {"default": {"BACKEND": "stillroom.web.django.cache.StillroomCache"}}
    SESSION_ENGINE = "stillroom.web.django.sessions"
    MIDDLEWARE = ["stillroom.web.django.middleware.SessionMiddleware", …]

All of a process share one room. `STILLROOM` in Django's settings says which: the path of yours
("shop.cache:room"), or settings for a new one ({"redis_url": …}). Without it the environment says what there is
to say.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.utils.module_loading import import_string

from stillroom.errors import SettingsError
from stillroom.room import Stillroom
from stillroom.settings import Settings, shown_url

_lock = threading.RLock()  # a signal handler may call while this thread holds it
# By the id of the setting STILLROOM, for tests that override it.
_rooms: dict[int, tuple[Any, Stillroom]] = {}


def room() -> Stillroom:
    """Return the room of this process, which Django's setting `STILLROOM` names. Raises SettingsError.

    `STILLROOM` is the path of a room of yours ("shop.cache:room"), or settings for a new one ({"redis_url": …}).
    Without it the environment has the settings.
    """
    given = getattr(settings, "STILLROOM", None)
    known = _rooms.get(id(given))
    if known is None:
        with _lock:
            known = _rooms.setdefault(id(given), (given, _room(given)))
    return known[1]


def has_room() -> bool:
    """Return whether this process has asked for the room that the settings name."""
    return settings.configured and id(getattr(settings, "STILLROOM", None)) in _rooms


def _room(given: Any) -> Stillroom:
    if isinstance(given, str) and "://" not in given:
        found = import_string(given.replace(":", "."))
        if not isinstance(found, Stillroom):
            raise SettingsError(f"STILLROOM={given!r} is a {type(found).__name__}, not a Stillroom")
        return found
    if given is None or isinstance(given, Mapping):
        return Stillroom(Settings(**(given or {})))
    raise SettingsError(
        f"STILLROOM={shown_url(given)}: the path of a room, or a dict of its settings, such as {{'redis_url': …}}"
    )
