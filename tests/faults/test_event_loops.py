"""One async room in many event loops has connections of its own in each and leaves none behind."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from asgiref.sync import async_to_sync

import redis
from stillroom import AsyncStillroom, NoDispatch, Settings
from stillroom.embedded import EmbeddedServer
from stillroom.wire import AsyncWire
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.threads import at_once

LOOPS = 100


@pytest.fixture
def room(server: EmbeddedServer) -> AsyncStillroom:
    return AsyncStillroom(Settings(**{"redis_url": server.url} | PATIENT), dispatch=NoDispatch())


@pytest.fixture
def is_clean(server: EmbeddedServer, room: AsyncStillroom) -> Iterator[None]:
    """Check that as many connections and descriptors are open after the test as before it."""
    with redis.Redis.from_url(server.url) as client:
        before, descriptors = len(client.client_list()), psutil.Process().num_fds()
        yield
        gc.collect()
        until(lambda: len(client.client_list()) <= before, "the server sees them go")
        assert room.wire.connections == 0
        assert psutil.Process().num_fds() <= descriptors


async def use(room: AsyncStillroom) -> None:
    assert await room.cache.set("a", 1)
    values = await asyncio.gather(*(room.cache.get("a") for _ in range(3)))
    assert values == [1, 1, 1]


def ran(room: AsyncStillroom) -> None:
    asyncio.run(use(room))


def adapted(room: AsyncStillroom) -> None:
    async_to_sync(use)(room)


def in_a_thread(room: AsyncStillroom) -> None:
    thread = threading.Thread(target=ran, args=(room,))
    thread.start()
    thread.join()


def cancelled(room: AsyncStillroom) -> None:
    async def begin() -> None:
        await use(room)
        task = asyncio.ensure_future(room.cache.get("a"))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(begin())


WAYS: list[Callable[[AsyncStillroom], None]] = [ran, adapted, in_a_thread, cancelled]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("is_clean")
def test_a_loop_that_ends_leaves_no_connection_behind(
    room: AsyncStillroom, way: Callable[[AsyncStillroom], None]
) -> None:
    """A hundred event loops of asyncio.run, async_to_sync, threads and cancelled tasks leave no connection."""
    for _ in range(LOOPS if way is ran else LOOPS // 4):
        way(room)


@pytest.mark.usefixtures("is_clean")
def test_no_loop_is_kept_alive(room: AsyncStillroom) -> None:
    """The room keeps no event loop alive, and only the loop holds its connections."""
    loops: list[Any] = []

    async def note() -> None:
        await use(room)
        loops.append(weakref.ref(asyncio.get_running_loop()))

    for _ in range(5):
        asyncio.run(note())
    gc.collect()
    assert [loop() for loop in loops] == [None] * 5


@pytest.mark.usefixtures("is_clean")
@pytest.mark.parametrize("timed", [False, True])
def test_a_word_that_can_not_be_sent_takes_no_connection(
    room: AsyncStillroom, is_clean: None, timed: bool
) -> None:
    """A command with a word that can't be encoded raises, and the loop has all of its connections afterwards."""

    async def send() -> None:
        await use(room)
        for _ in range(room.settings.pool_size + 1):
            with pytest.raises(UnicodeEncodeError):
                await room.wire.execute([(b"GET", "\ud800")], 10.0, timed=timed)
        await use(room)

    asyncio.run(send())


def test_two_loops_at_once_have_their_own(room: AsyncStillroom) -> None:
    """Two event loops in two threads have their own connections, and the end of one does not disturb the other."""

    async def often() -> None:
        for _ in range(50):
            await use(room)

    at_once(2, lambda _: asyncio.run(often()))


@pytest.mark.parametrize("look", [AsyncWire._discard_idle, lambda wire: wire.connections])
@pytest.mark.usefixtures("is_clean")
def test_a_loop_may_begin_while_somebody_looks_at_the_others(
    room: AsyncStillroom, look: Callable[[AsyncWire], object]
) -> None:
    """The connections of all event loops are counted or closed while another loop begins, between any two steps."""
    loops = []

    def begin(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename == weakref.__file__ and len(loops) < 20:
            sys.settrace(None)
            loops.append(asyncio.new_event_loop())
            loops[-1].run_until_complete(use(room))
            sys.settrace(begin)
        return begin

    asyncio.run(use(room))
    before = sys.gettrace()
    sys.settrace(begin)
    try:
        look(room.wire)
    finally:
        sys.settrace(before)
        for loop in loops:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
    assert loops
