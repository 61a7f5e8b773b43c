"""`room.init_app(app)`: Flask's pattern for extensions, with or without an app factory.

room = Stillroom()                       # at module level: loaders register on it

def create_app():
    app = Flask(__name__)
    room.init_app(app)
    return app
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flask import Flask, current_app, has_app_context
from werkzeug.local import LocalProxy

from stillroom.errors import InvalidArgument, SettingsError
from stillroom.in_force import unread
from stillroom.limits import Routes
from stillroom.misuse import explained, refuse_other
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.web.flask import StillroomSessions
from stillroom.web.flask_limits import answer_shed_loads
from stillroom.web.gate import SubjectOf
from stillroom.web.placing import checked_flag, checked_table
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.within import budgeted
from stillroom.web.wsgi import StillroomMiddleware
from stillroom.web.wsgi_health import HealthWSGI

log = logging.getLogger("stillroom.web")

EXTENSION = "stillroom"
GIVEN = "stillroom.given"  # in app.extensions: the options of init_app …
NOTHING = (True, None, None, None, False)  # … where there are none


@explained
def init_app(
    room: Stillroom,
    app: Flask,
    *,
    sessions: bool = True,
    cookie: SessionCookie | None = None,
    routes: Routes | None = None,
    subject: SubjectOf | None = None,
    health: bool = False,
) -> None:
    """See Stillroom.init_app."""
    if not isinstance(app, Flask):
        raise InvalidArgument(f"init_app(app): a Flask app, not {type(app).__name__}")
    for name, flag in (("sessions", sessions), ("health", health)):
        checked_flag(name, flag)
    checked_table(routes, subject=subject)
    if not isinstance(room, Stillroom):
        raise SettingsError("Flask needs a Stillroom: an AsyncStillroom is awaited")
    if app.extensions.get(EXTENSION) not in (None, room):
        raise SettingsError("this app has another room already")
    given = (sessions, cookie, routes, subject, health)
    if app.extensions.get(EXTENSION) is room:
        if given not in (NOTHING, app.extensions[GIVEN]):
            raise SettingsError(
                "init_app(app, …) was called before, without these options: give them to that call"
            )
        return
    own = StillroomSessions(room, cookie=cookie) if sessions else None
    if own is not None:
        own.check(app)
    inner: Any = budgeted(room, app.wsgi_app)
    if routes is not None:
        inner = StillroomMiddleware(inner, room, sessions=False, routes=routes, subject=subject)
    if health:
        inner = HealthWSGI(room, inner)
    answer_shed_loads(app)
    _tell_of_unread(room, app)
    # Not before: what was refused leaves the app as it was.
    app.extensions[EXTENSION], app.extensions[GIVEN] = room, given
    app.session_interface, app.wsgi_app = own or app.session_interface, inner  # type: ignore[method-assign]
    load_within(room, app)


def _tell_of_unread(room: Stillroom, app: Flask) -> None:
    for variable, field in unread(room.settings, app.config).items():
        log.warning(
            "%s in app.config changes nothing: set it in the environment, or write Stillroom(%s=…)",
            variable,
            field,
        )


def load_within(room: Stillroom | AsyncStillroom, app: Flask) -> None:
    """Run the room's loaders in the app's context: in a worker, or a script, there is none.

    Raises InvalidArgument for what is no Flask app.
    """
    refuse_other("app", app, Flask, "a Flask app")
    around = room.cache.loaders.around
    # One app at a time: a factory that is called again, as in tests, makes the one that counts.
    around[:] = [*(one for one in around if not isinstance(one, AppContext)), AppContext(app)]


class AppContext:
    """Makes the context of an app, unless it is there."""

    def __init__(self, app: Flask) -> None:
        self._app = app

    def __call__(self) -> AbstractContextManager[Any]:
        if has_app_context() and current_app._get_current_object() is self._app:  # type: ignore[attr-defined]
            return nullcontext()
        return self._app.app_context()


def _current_room() -> Stillroom:
    try:
        room: Stillroom = current_app.extensions[EXTENSION]
    except KeyError:
        raise SettingsError("this app has no room: room.init_app(app) comes first") from None
    return room


# The room of the current app, for code that does not import it.
current_room: Stillroom = LocalProxy(_current_room)  # type: ignore[assignment]
