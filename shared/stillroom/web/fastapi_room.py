"""FastAPI: the room and the session as dependencies, and a lifespan that goes together with the app's own.

app = FastAPI(lifespan=lifespan(room, my_lifespan))

@app.get("/products/{id}")
async def product(id: int, room: CurrentRoom, session: CurrentSession): …
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from stillroom.errors import SettingsError
from stillroom.room import AsyncStillroom
from stillroom.web.request_session import AsyncWebSession
from stillroom.web.starlette import load_session

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


def lifespan(room: AsyncStillroom, *others: Lifespan) -> Lifespan:
    """Return a lifespan in which the room is open for the app's own ones, which are entered in their order.

    What they yield (Starlette's lifespan state) is put together; the room is closed after the last of them.
    """
    if not isinstance(room, AsyncStillroom):
        raise SettingsError("FastAPI needs an AsyncStillroom: a Stillroom blocks the event loop")

    @asynccontextmanager
    async def open_all(app: Any) -> AsyncIterator[dict[str, Any]]:
        state: dict[str, Any] = {}
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(room.lifespan(app))
            for other in others:
                state.update(await stack.enter_async_context(other(app)) or {})
            yield state

    return open_all


async def current_room(connection: HTTPConnection) -> AsyncStillroom:
    """The room of the app that is asked. Raises SettingsError where its lifespan is not the room's."""
    room: AsyncStillroom | None = getattr(connection.app.state, "stillroom", None)
    if room is None:
        raise SettingsError("this app has no room: FastAPI(lifespan=room.lifespan) opens one")
    return room


CurrentRoom = Annotated[AsyncStillroom, Depends(current_room)]
CurrentSession = Annotated[AsyncWebSession, Depends(load_session)]
