"""An app's own room, made at import, on the server of a test."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from stillroom.dispatch import Dispatch, InlineDispatch
from stillroom.misuse import explained, refuse_other
from stillroom.room import AsyncStillroom, Stillroom, listeners_of
from stillroom.settings import Settings
from stillroom.testing.parts import parts_of, twins

R = TypeVar("R", Stillroom, AsyncStillroom)


@explained
@contextmanager
def overridden(room: R, settings: Settings, *, dispatch: Dispatch | None = None) -> Iterator[R]:
    """Let this room, and whoever got hold of a part of it, work with these settings until the block ends.

    Its loaders, and those who listen to its sessions and events, stay. Background work is done at once unless
    `dispatch` says otherwise. A room that is used in an event loop is closed there by its app (`lifespan`), or by
    `async with`.
    """
    refuse_other("room", room, (Stillroom, AsyncStillroom), "the app's Stillroom or AsyncStillroom")
    refuse_other("settings", settings, Settings, "the test's Settings(…)")
    other = type(room)(settings, dispatch=dispatch or InlineDispatch())
    loaders, listeners = room.cache.loaders, listeners_of(room)
    of_the_other = {type(one) for one in other.watch.observers}  # OpenTelemetry's, where that is on
    observers = [one for one in room.watch.observers if type(one) not in of_the_other]
    pairs = list(twins(room, other))
    before = [(old, vars(old), type(old)) for old, _ in pairs]
    stays = {id(new): old for old, new in pairs}
    for old, new in pairs:
        # The very same dict: what either of the two objects is assigned, both have. Its parts are the old ones, so
        # that who gets hold of one now (a middleware that is made by the first request) is led back afterwards.
        attributes = vars(new)
        attributes |= {name: stays.get(id(part), part) for name, part in attributes.items()}
        old.__class__, old.__dict__ = type(new), attributes
    for part in list(parts_of(room)):
        if "loaders" in vars(part):
            part.loaders = loaders
    room.sessions.on_event.extend(listeners)
    for observer in observers:
        room.observe(observer)
    try:
        yield room
    finally:
        try:
            _close(other)
        finally:  # the next test has the app's room, whatever became of this one's
            for old, attributes, kind in before:
                old.__class__, old.__dict__ = kind, attributes


def _close(room: Any) -> None:
    if isinstance(room, Stillroom):
        room.close()
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(room.close())
    # Inside a loop nobody can wait here; the app has closed its room there, or `async with room` has.
