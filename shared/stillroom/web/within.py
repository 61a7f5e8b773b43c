"""Makes a framework's request one of the room: its Redis calls share a time, and it has a beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from stillroom.room import Stillroom
from stillroom.web.explain import ExplainWSGI
from stillroom.wire import time_left


def within(room: Stillroom) -> AbstractContextManager[Any]:
    """Begin a request of the room, unless a middleware further out has begun it."""
    return nullcontext() if time_left() is not None else room.request()


def budgeted(room: Stillroom, app: Callable[..., Iterable[bytes]]) -> Any:
    """Return the WSGI app, each request of which is within one of the room."""
    if room.settings.explain_header:
        app = ExplainWSGI(app, room)

    def called(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with within(room):
            return app(environ, start_response)

    return called
