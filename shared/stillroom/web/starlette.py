"""A request's session, read: `Depends(load_session)` in FastAPI, `await load_session(request)` in Starlette."""

from __future__ import annotations

from starlette.requests import HTTPConnection

from stillroom.web.asgi import KEY
from stillroom.web.request_session import AsyncWebSession


async def load_session(connection: HTTPConnection) -> AsyncWebSession:
    """The session of this request: see AsyncWebSession. Redis away: SessionStoreUnavailable, answered with 503."""
    session: AsyncWebSession = connection.scope[KEY]
    return await session.load()
