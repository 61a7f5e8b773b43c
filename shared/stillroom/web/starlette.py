"""Starlette: `@limited(AUTH)` on an endpoint, and a request's session: `await load_session(request)`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from stillroom.durations import Duration, seconds_of
from stillroom.errors import SessionNotFresh, SessionNotLoaded
from stillroom.misuse import explained
from stillroom.web.carriers import GUARD, MAKES_GUARD
from stillroom.web.request_session import AsyncWebSession
from stillroom.web.starlette_limits import LimitExceeded, exempt, limited
from stillroom.web.visit import KEY

__all__ = ["LimitExceeded", "exempt", "limited", "load_session"]


async def load_session(connection: HTTPConnection) -> AsyncWebSession:
    """Return the session of this request or websocket: see AsyncWebSession.

    Raises SessionNotLoaded where no middleware gives one. Redis away: SessionStoreUnavailable, answered with 503.
    """
    session: AsyncWebSession | None = connection.scope.get(KEY)
    if session is None:
        raise SessionNotLoaded(
            "this request has no session here: app.add_middleware(StillroomMiddleware, room=room) comes behind the "
            "lines that add middlewares which look at it, because the last one added is the outermost; and "
            "sessions=True is left as it is"
        )
    return await session.load()


class Asking(Protocol):
    """Is called by FastAPI, which gives a dependency its parameters by name."""

    def __call__(self, *, connection: HTTPConnection) -> Awaitable[AsyncWebSession]:
        """Return the session of this request."""


@explained
def fresh_session(seconds: Duration) -> Asking:
    """Return a dependency: the session, if its user has proved within so many seconds who they are; else 401.

    `Depends(fresh_session(600))` is for a page that changes a password. After the user has proved it again, call
    `session.confirm()`. In Starlette, which has no dependencies, call `session.require_fresh(600)` in the endpoint.
    Otherwise see `load_session`.
    """
    within = seconds_of("seconds", seconds, least=0)

    # By name, as FastAPI gives it: so `@fresh_session(600)` on an endpoint is an error, and no lost guard.
    async def load(*, connection: HTTPConnection) -> AsyncWebSession:
        session = await load_session(connection)
        try:
            session.require_fresh(within)
        except SessionNotFresh as error:
            raise HTTPException(401, str(error)) from error
        return session

    load.__qualname__ = "Depends(fresh_session(…))"  # for the message of that error
    setattr(load, GUARD, "fresh_session(…)")
    return load


setattr(fresh_session, MAKES_GUARD, "fresh_session(…)")
