"""The async room seen through blocking calls, so that one test body runs on both faces."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom

FACES = ["sync", "async"]


@contextmanager
def open_room(face: str, settings: Settings, dispatch: Any) -> Iterator[Any]:
    """Open a room with one of the two faces, called without await."""
    if face == "sync":
        with Stillroom(settings, dispatch=dispatch) as room:
            yield room
        return
    with asyncio.Runner() as runner:
        blocking = BlockingRoom(AsyncStillroom(settings, dispatch=dispatch), runner.get_loop())
        yield blocking
        blocking.close()


@contextmanager
def opening_rooms(**given: Any) -> Iterator[Callable[..., Any]]:
    """Yield a function that opens rooms with these settings and its own, and close them all at the end."""
    with ExitStack() as stack:

        def make(face: str = "sync", dispatch: Any = None, **changes: Any) -> Any:
            settings = Settings(**given | changes)
            return stack.enter_context(open_room(face, settings, dispatch or NoDispatch()))

        yield make


@contextmanager
def locked(room: Any, *args: Any, method: str = "lock", **options: Any) -> Iterator[Any]:
    """Enter `with room.lock(…)` with either face; the room's event loop drives an async lock."""
    if not isinstance(room, BlockingRoom):
        with getattr(room, method)(*args, **options) as held:
            yield held
        return
    lock = getattr(room.inner, method)(*args, **options)
    held = room._loop.run_until_complete(lock.__aenter__())
    try:
        yield held
    finally:
        room._loop.run_until_complete(lock.__aexit__(None, None, None))


class Blocking:
    """An object whose coroutine methods block; everything else is passed through."""

    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return self._blocking(getattr(self._inner, name))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._blocking(self._inner)(*args, **kwargs)

    def _blocking(self, value: Any) -> Any:
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return (
                self._loop.run_until_complete(_finish(result))
                if inspect.isawaitable(result)
                else result
            )

        return call


def _unwrapped(call: Any) -> Any:
    """Return a call of the async face for one of a function that blocks."""
    if isinstance(call, partial) and isinstance(call.func, Blocking):
        return partial(call.func._inner, *call.args, **call.keywords)
    return call._inner if isinstance(call, Blocking) else call


async def _finish(awaitable: Any) -> Any:
    return await awaitable


class BlockingRoom:
    """An AsyncStillroom with the calls of a Stillroom. One thread, one event loop."""

    def __init__(self, room: AsyncStillroom, loop: asyncio.AbstractEventLoop) -> None:
        self.inner = room
        self.settings = room.settings
        self.keys = room.keys
        self.dispatch = room.dispatch
        self._loop = loop
        self.cache = BlockingCache(room.cache, loop)
        self.tasks = Blocking(room.tasks, loop)
        self.sessions = Blocking(room.sessions, loop)
        self.limits = Blocking(room.limits, loop)
        self.abuse = Blocking(room.abuse, loop)
        self.health = Blocking(room.health, loop)
        self.upkeep = Blocking(room.upkeep, loop)
        self.state = Blocking(room.state, loop)
        self.dead_letters = room.dead_letters
        self.agreed = room.agreed

    @property
    def stats(self) -> Any:
        return self.inner.stats

    @property
    def state_stats(self) -> Any:
        return self.inner.state_stats

    @property
    def wire(self) -> Any:
        return self.inner.wire

    def request(self) -> Any:
        return self.inner.request()

    def connect(self) -> None:
        self._loop.run_until_complete(self.inner.connect())

    def close(self) -> None:
        self._loop.run_until_complete(self.inner.close())


class BlockingCache(Blocking):
    """The async cache; `cached` gives functions that block."""

    def cached(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        register = self._inner.cached(*args, **kwargs)
        return lambda function: Blocking(register(function), self._loop)

    def gather(self, *calls: Any) -> Any:
        return self._blocking(self._inner.gather)(*map(_unwrapped, calls))
