"""FastAPI: the room and the session as dependencies, and a lifespan that goes together with the app's own.

app = FastAPI(lifespan=lifespan(room, my_lifespan))

@app.get("/products/{id}")
async def product(id: int, room: CurrentRoom, session: CurrentSession): …
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Annotated, Any, Self

from fastapi import Depends
from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from stillroom.background import in_background_loop
from stillroom.errors import InvalidArgument, SettingsError, in_code
from stillroom.misuse import refuse_other
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.web.asgi import LIMITER
from stillroom.web.request_session import AsyncWebSession
from stillroom.web.starlette import load_session
from stillroom.wire import beside_all

MOUNTED = "app_root_path"  # in the scope of a mounted app

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


def lifespan(room: AsyncStillroom, *others: Lifespan) -> Lifespan:
    """Return a lifespan in which the room is open for the app's own ones, which are entered in their order.

    What they yield (Starlette's lifespan state) is put together; the room is closed after the last of them.
    """
    if not isinstance(room, AsyncStillroom):
        raise SettingsError("FastAPI needs an AsyncStillroom: a Stillroom blocks the event loop")
    for other in others:
        if not callable(other):
            raise InvalidArgument(f"lifespan(room, {in_code(other):.100}): a function of the app")

    @asynccontextmanager
    async def open_all(app: Any) -> AsyncIterator[dict[str, Any]]:
        state: dict[str, Any] = {}
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(room.lifespan(app))
            for other in others:
                state.update(await stack.enter_async_context(other(app)) or {})
            yield state

    return open_all


def load_within(room: AsyncStillroom, app: Starlette) -> None:
    """Have the app's lifespan run where its loaders do.

    In a worker no server runs it: the first load does, once, and it lasts as long as the process. Where a server
    runs it, nothing changes.

    What loaders need stands in `app.state`; what the lifespan yields is for requests only. Raises InvalidArgument.
    """
    refuse_other("room", room, (AsyncStillroom, Stillroom), "an AsyncStillroom")
    refuse_other("app", app, Starlette, "an app of FastAPI or Starlette")
    room.around_load(AppLifespan(app))


class AppLifespan:
    """The context of a load: the lifespan of the app is running."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._lifespan = app.router.lifespan_context
        app.router.lifespan_context = self._run_by_server
        self._is_served = False
        self._ours: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None

    def __call__(self) -> Self:
        return self

    async def __aenter__(self) -> None:
        if self._is_served:
            return
        loop, ready = asyncio.get_running_loop(), self._ready
        if ready is None or ready.get_loop() is not loop or _has_failed(ready):
            ready = self._ready = loop.create_future()
            # It goes on when this load has ended, with all tasks that it begins.
            self._ours = beside_all().run(loop.create_task, self._run_here(ready))
        await asyncio.shield(ready)

    async def __aexit__(self, *_: object) -> None:
        """Do nothing: the room goes on."""

    def __enter__(self) -> None:
        """Wait, for a loader that is not async, until the lifespan has begun on the loop of the async loaders."""
        if not self._is_served:
            in_background_loop(self.__aenter__())

    def __exit__(self, *_: object) -> None:
        """Do nothing: the room goes on."""

    @asynccontextmanager
    async def _run_by_server(self, app: Any) -> AsyncIterator[Any]:
        async with self._lifespan(app) as state:
            self._is_served = True
            try:
                yield state
            finally:
                self._is_served = False

    async def _run_here(self, ready: asyncio.Future[None]) -> None:
        """Run in a task of its own, because a context that began in a task may have to end in it."""
        try:
            async with self._lifespan(self._app):
                ready.set_result(None)
                await asyncio.Event().wait()
        except BaseException as error:
            if ready.done():
                raise
            if isinstance(error, asyncio.CancelledError):
                ready.cancel()
                raise
            ready.set_exception(error)  # an exit, too: raised here it would leave the loads waiting


def _has_failed(ready: asyncio.Future[None]) -> bool:
    return ready.done() and (ready.cancelled() or ready.exception() is not None)


async def current_room(connection: HTTPConnection) -> AsyncStillroom:
    """Return the room of the app that is asked; of a mounted app without one, that of the middleware around it.

    Raises SettingsError where its lifespan is not the room's, and no middleware has one.
    """
    scope = connection.scope
    room: AsyncStillroom | None = getattr(connection.app.state, "stillroom", None)
    if room is None and MOUNTED in scope and (limiter := scope.get(LIMITER)) is not None:
        room = limiter.room
    if room is None:
        raise SettingsError(
            "this app has no room: FastAPI(lifespan=room.lifespan) opens one. A mounted app's lifespan is not run: "
            "give it the room by mounted.state.stillroom = room, or add StillroomMiddleware to the outer app"
        )
    return room


CurrentRoom = Annotated[AsyncStillroom, Depends(current_room)]
CurrentSession = Annotated[AsyncWebSession, Depends(load_session)]
