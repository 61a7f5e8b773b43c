"""Starlette: `@limited(AUTH)` on an endpoint, and a request's session: `await load_session(request)`."""

from __future__ import annotations

from starlette.requests import HTTPConnection

from stillroom.web.asgi import KEY
from stillroom.web.request_session import AsyncWebSession
from stillroom.web.starlette_limits import LimitExceeded, exempt, limited

__all__ = ["LimitExceeded", "exempt", "limited", "load_session"]


async def load_session(connection: HTTPConnection) -> AsyncWebSession:
    """The session of this request: see AsyncWebSession. Redis away: SessionStoreUnavailable, answered with 503."""
    session: AsyncWebSession = connection.scope[KEY]
    return await session.load()
