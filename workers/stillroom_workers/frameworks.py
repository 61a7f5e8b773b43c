"""Does around each load of a worker what a framework does around each request. The app need not ask for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from stillroom import AsyncStillroom, Stillroom


def wrap_loads(module: ModuleType, rooms: Sequence[Stillroom | AsyncStillroom]) -> None:
    """Wrap the loads of the rooms of a loaders module, as the frameworks that it uses want them."""
    _within_flask(module, rooms)
    _beside_django(rooms)


def room_of_django() -> list[Stillroom | AsyncStillroom]:
    """Return the room that Django's cache, sessions and loaders share, if this process has asked for it."""
    django = sys.modules.get("stillroom.web.django")
    return [django.room()] if django is not None and django.has_room() else []


def _within_flask(module: ModuleType, rooms: Sequence[Stillroom | AsyncStillroom]) -> None:
    """Run loaders beside a Flask app in its context, also without a call of `room.init_app(app)`."""
    flask = sys.modules.get("flask")
    names = vars(module).values()
    apps = [one for one in names if flask and issubclass(type(one), flask.Flask)]  # not a proxy
    if len(apps) == 1:
        from stillroom.web.flask_room import load_within

        for room in rooms:
            if not room.cache.loaders.around:
                load_within(room, apps[0])


def _beside_django(rooms: Sequence[Stillroom | AsyncStillroom]) -> None:
    """Drop dead database connections as the end of a request does in Django: a worker's threads end none."""
    django = sys.modules.get("django.apps")
    if django is None or not django.apps.ready:
        return
    from stillroom.web.django.loads import looked_after

    for room in rooms:
        if looked_after not in room.cache.loaders.around:
            room.cache.loaders.around.insert(0, looked_after)
