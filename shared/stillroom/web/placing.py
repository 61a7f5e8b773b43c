"""Checks what a middleware is given when it is put around an app, and raises at once if it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from stillroom.errors import InvalidArgument, InvalidLimit, SettingsError, in_code
from stillroom.limits import Route, Routes
from stillroom.limits.routes import check_plain
from stillroom.misuse import takes
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.web.session_cookie import SessionCookie

R = TypeVar("R", Stillroom, AsyncStillroom)
F = TypeVar("F")

_OTHER = {
    Stillroom: "AsyncStillroom() is for asyncio; WSGI apps, Flask and Django take a Stillroom()",
    AsyncStillroom: "Stillroom() blocks the event loop; ASGI apps take an AsyncStillroom()",
}
# The module of a face's middleware, and with how many arguments its apps are called; then those of the other face.
_CALLS = {Stillroom: ("wsgi", 2, "asgi", 3), AsyncStillroom: ("asgi", 3, "wsgi", 2)}


def checked_room(room: object, kind: type[R], who: str) -> R:
    """Return the room. Raises SettingsError for one of the other face, or for what is none."""
    if isinstance(room, kind):
        return room
    given = type(room).__name__
    meant = _OTHER[kind] if isinstance(room, Stillroom | AsyncStillroom) else "give room=room"
    raise SettingsError(f"{who} needs a room of the type {kind.__name__}, not {given}: {meant}")


def app_and_room(
    given: Sequence[Any], app: Any, room: Any, kind: type[R], who: str, *, needs_app: bool = False
) -> tuple[Any, R]:
    """Return the app, or None, and the room, by name or in whichever order they were given.

    Frameworks that add middleware give the app first: `app.add_middleware(HealthASGI, room=room)`. Raises
    SettingsError for a room, or an app, of the other face.
    """
    for one in given:
        if room is None and isinstance(one, Stillroom | AsyncStillroom):
            room = one
        elif app is None:
            app = one
        else:
            raise SettingsError(
                f"{who} takes an app and a room; {type(one).__name__} is one too many"
            )
    room = checked_room(room, kind, who)
    if needs_app or app is not None:
        checked_app(app, kind, who)
    return app, room


def checked_routes(routes: object) -> Routes | None:
    """Return the route table. Raises InvalidLimit for a bare list of routes, or for what is none."""
    if routes is None or isinstance(routes, Routes):
        return routes
    if isinstance(routes, list | tuple) and all(isinstance(one, Route) for one in routes):
        raise InvalidLimit(routes, "routes= is a table; did you mean Routes([…])?")
    raise InvalidLimit(routes, f"routes= is a Routes([…]), not a {type(routes).__name__}")


def checked_table(routes: object, **given: object) -> None:
    """Raise InvalidLimit for an option that says how a table of limits counts, where there is no table."""
    for name, one in given.items():
        if routes is None and one is not None:
            own = "by" if name == "subject" else name
            raise InvalidLimit(
                one,
                f"{name}= is for a table of limits: give routes=Routes([…]) too. Endpoints take it where they are "
                f"limited, as in limited(API, {own}=…)",
            )


def checked_app(app: object, kind: type[R], who: str) -> None:
    """Raise SettingsError for what can't be called as the apps of this face are."""
    if not callable(app):
        raise SettingsError(f"{who} is put around an app, not around {type(app).__name__}")
    module, number, others, other = _CALLS[kind]
    if not takes(app, number) and takes(app, other):
        meant = who.replace(module.upper(), others.upper())
        if meant == who:  # both are called so
            who, meant = f"{who} of stillroom.web.{module}", f"that of stillroom.web.{others}"
        raise SettingsError(f"{who} is put around an app of the other face; did you mean {meant}?")


def checked_view(view: object, for_class: str) -> None:
    """Raise InvalidArgument for what is no view. `for_class`: how it is written for a class of views."""
    if isinstance(view, type) or not callable(view):
        hint = f"; for a class of views it is {for_class}" if isinstance(view, type) else ""
        raise InvalidArgument(f"@fresh(…) is put on a view, not on {in_code(view):.100}{hint}")


def checked_cookie(cookie: object) -> SessionCookie | None:
    """Return the cookie. Raises SettingsError for its mere name."""
    if cookie is None or isinstance(cookie, SessionCookie):
        return cookie
    meant = f"; did you mean SessionCookie({cookie!r})?" if isinstance(cookie, str) else ""
    raise SettingsError(f"cookie={cookie!r}: a SessionCookie(…){meant}")


def checked_flag(name: str, given: object) -> bool:
    """Return whether it is set. Raises SettingsError for what is neither True nor False."""
    if not isinstance(given, bool):
        raise SettingsError(f"{name}={given!r}: True or False")
    return given


def checked_function(name: str, given: F, what: str) -> F:
    """Return the function, or None. Raises InvalidLimit for what can't be called, or would have to be awaited."""
    if given is not None and not callable(given):
        raise InvalidLimit(given, f"{name}= is a function of the request: {what}")
    check_plain(name, given)
    return given
