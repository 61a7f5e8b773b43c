"""Flask: its own `session`, kept by the room, and limits on views and blueprints.

app.session_interface = StillroomSessions(room)
StillroomLimits(app, room)
"""

from __future__ import annotations

from typing import Any

from flask import Flask, Request, Response, request
from flask.sessions import SessionInterface, SessionMixin

from stillroom.errors import SettingsError
from stillroom.room import Stillroom
from stillroom.web.ending import ending
from stillroom.web.flask_limits import LimitExceeded, StillroomLimits, exempt, limited
from stillroom.web.request_session import WebSession
from stillroom.web.session_cookie import SessionCookie

__all__ = [
    "FlaskSession",
    "LimitExceeded",
    "StillroomLimits",
    "StillroomSessions",
    "exempt",
    "limited",
]


class FlaskSession(WebSession, SessionMixin):
    """`flask.session`: a WebSession, so that it also has `login`, `logout`, `renew` and `user_id`.

    Values are JSON: a tuple comes back as a list. It is read by the first look, and saved where something changed,
    in a list or dict too, whatever `modified` says.
    """

    @property
    def permanent(self) -> bool:
        """Always: the cookie lives as long as the session does."""
        return True

    @permanent.setter
    def permanent(self, value: bool) -> None:
        if not value:
            raise SettingsError(
                "permanent=False: a session lives for session_idle, and its cookie too"
            )


class StillroomSessions(SessionInterface):
    """Keeps Flask's sessions in Redis; the cookie is ours, whatever SESSION_COOKIE_NAME says.

    A response of 5xx saves nothing. Redis away: the request that looks is answered with 503, the cookie untouched.
    """

    def __init__(self, room: Stillroom, *, cookie: SessionCookie | None = None) -> None:
        self._room = room
        self._cookie = cookie or SessionCookie()

    def open_session(self, app: Flask, request: Request) -> FlaskSession:
        """Flask's first step in each request. Nothing is read yet."""
        token = self._cookie.read(request.headers.get("Cookie", ""))
        return FlaskSession(self._room._sessions_body, self._room.state, self._cookie, token)

    def save_session(self, app: Flask, session: Any, response: Response) -> None:
        """Flask's last step: the session is written, or the response becomes one that says why not."""
        end = self._room.state.run(
            ending(session, response.status_code, response.headers, request.method)
        )
        if end.instead is None:
            response.headers.extend(end.headers)
        else:
            response.status_code = end.instead.status
            response.headers.clear()
            response.headers.extend(end.instead.headers)
            response.set_data(end.instead.body)
