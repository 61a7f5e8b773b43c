"""Frameworks on anyio cancel a task at each of its awaits: what others wait for is given back all the same."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest

import redis
from stillroom import AsyncStillroom, Limit, NoDispatch, Routes, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from stillroom.web.asgi import StillroomMiddleware
from stillroom.web.session_cookie import SessionCookie
from tests.faults.test_sent_once import WRITES
from tests.support import celery_process
from tests.support.monitor import scripts_run
from tests.support.proxy import Proxy

COMMAND_S = 0.5
PLACE = Limit("place", 1, 600, in_flight=True)

# What a task is in the middle of: a function that calls `stop`, which cancels it, and is awaited for ever.
Act = Callable[[AsyncStillroom, Callable[[], None]], Awaitable[Any]]


def _load(stop: Callable[[], None]) -> Callable[..., Awaitable[Any]]:
    async def load(*_: Any) -> Any:
        stop()
        await anyio.sleep_forever()

    return load


async def _in_a_load(room: AsyncStillroom, stop: Callable[[], None]) -> None:
    await room.cache.get_or_set("k", _load(stop))


async def _in_a_load_of_many(room: AsyncStillroom, stop: Callable[[], None]) -> None:
    await room.cache.get_or_set_many(["k", "l", "m"], _load(stop))


async def _in_a_load_with_a_place(room: AsyncStillroom, stop: Callable[[], None]) -> None:
    async def load() -> str:
        return str(await _load(stop)())

    await room.cache.cached("k", at_once=1)(load)()


async def _with_a_lock(room: AsyncStillroom, stop: Callable[[], None]) -> None:
    async with room.lock("k"):
        await _load(stop)()


async def _in_the_queue_for_a_lock(room: AsyncStillroom, stop: Callable[[], None]) -> None:
    async with room.lock("k"):
        asyncio.get_running_loop().call_later(0.05, stop)
        async with room.lock("k", wait=60):
            raise AssertionError("the lock is held")


ACTS: dict[str, Act] = {
    "a load": _in_a_load,
    "a load of many": _in_a_load_of_many,
    "a load with at_once": _in_a_load_with_a_place,
    "a lock": _with_a_lock,
    "a queue for a lock": _in_the_queue_for_a_lock,
}


@pytest.mark.parametrize("act", ACTS)
def test_a_task_that_is_cancelled_again_and_again_holds_nothing(
    settings: Settings, client: redis.Redis, act: str
) -> None:
    """A task that an anyio scope cancels leaves no lease, no place, no lock and no waiter in Redis."""

    async def scenario() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            with anyio.CancelScope() as scope:
                await ACTS[act](room, scope.cancel)
            assert scope.cancelled_caught
            held = [*client.keys("*:l:*"), *client.keys("*:slots"), *client.keys("*:queue")]
            assert [key for key in held if client.type(key) != b"zset" or client.zcard(key)] == []

    asyncio.run(scenario())


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_is_cancelled_again_and_again_ends_when_it_can_no_longer_act(
    proxy: Proxy, make_room: Any, client: redis.Redis, write: str
) -> None:
    """A write that an anyio scope cancels ends once it can no longer act, so that later invalidations hold."""
    other: Stillroom = make_room()
    other.cache.get("k")
    patience = {"connect_timeout": 5.0, "command_timeout": COMMAND_S, "call_timeout": 5.0}

    async def cancel_on_the_way() -> None:
        settings = Settings(redis_url=proxy.url, **patience)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as app:
            await app.cache.set("warm", 1)
            proxy.hold_requests()
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(WRITES[write], app.cache)
                    assert await asyncio.to_thread(proxy.held.wait, 5)
                    scope.cancel()

    asyncio.run(cancel_on_the_way())
    other.cache.invalidate_by_tag("t")
    before = scripts_run(client)
    proxy.let_go()
    assert until(lambda: scripts_run(client) > before, 5)
    assert other.cache.get("k") is None


def test_a_gather_that_is_cancelled_ends_its_scope_whatever_its_calls_do() -> None:
    """An anyio scope that cancels a gather catches the cancellation, also if the last call ends with a value."""

    async def scenario() -> None:
        settings = Settings(redis_url="redis://127.0.0.1:1")
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            await room.cache.get("k")  # it is known to be away: the loads have no more to say to it

            @room.cache.cached("n:{id}")
            async def number(id: int) -> int:
                if id:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.Event().wait()
                return id

            with anyio.CancelScope() as scope:
                asyncio.get_running_loop().call_later(0.05, scope.cancel)
                await room.cache.gather(partial(number, 0), partial(number, 1))
            assert scope.cancelled_caught

    asyncio.run(scenario())


def test_a_cancelled_call_to_several_shards_ends_when_none_of_its_writes_can_act(
    proxy: Proxy, make_room: Any, client: redis.Redis
) -> None:
    """A cancelled set_many waits for each shard's write, so that an invalidation behind it holds for all keys."""
    keys = [f"k{n}" for n in range(8)]
    other: Stillroom = make_room(shards=2)
    other.cache.set_many(dict.fromkeys(keys, 0), tags=["t"])
    patience = {"connect_timeout": 5.0, "command_timeout": COMMAND_S, "call_timeout": 5.0}

    async def cancel_on_the_way() -> None:
        settings = Settings(redis_url=proxy.url, shards=2, pool_size=1, **patience)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as app:
            await app.cache.set_many(dict.fromkeys(keys, 1), tags=["t"])
            proxy.hold_requests()
            writing = asyncio.create_task(app.cache.set_many(dict.fromkeys(keys, 2), tags=["t"]))
            assert await asyncio.to_thread(proxy.held.wait, 5)
            writing.cancel()  # one shard's write is on its way, and the other waits for the connection
            with pytest.raises(asyncio.CancelledError):
                await writing
            await asyncio.to_thread(other.cache.invalidate_by_tag, "t")
            before = scripts_run(client)
            proxy.let_go()
            assert await asyncio.to_thread(until, lambda: scripts_run(client) > before, 5)

    asyncio.run(cancel_on_the_way())
    assert other.cache.get_many(keys) == {}


def test_a_request_that_is_cancelled_again_and_again_gives_its_place_back(
    settings: Settings,
) -> None:
    """A request in an anyio scope that is cancelled, in its app or at its last byte, holds no place in flight."""
    cancel: list[Callable[[], None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/stuck":
            cancel[0]()
            await anyio.sleep_forever()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/last":
            cancel[0]()
        await send({"type": "http.response.body", "body": b""})

    async def ask(door: Any, path: str) -> list[Any]:
        told: list[Any] = []

        async def send(message: Any) -> None:
            told.append(message)

        asked = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode()}
        where = {"query_string": b"", "headers": [], "client": ("203.0.113.9", 1)}
        with anyio.CancelScope() as scope:
            cancel[:] = [scope.cancel]
            await door({**asked, **where, "scheme": "http", "root_path": ""}, None, send)
        return told

    async def scenario() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            door = StillroomMiddleware(app, room=room, routes=Routes([], default=[PLACE]))
            for path in ("/stuck", "/last"):
                await ask(door, path)
                begun = (await ask(door, "/quick"))[0]
                assert begun["status"] == 200, path

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["with its session", "with a proof"])
def test_a_request_that_is_cancelled_while_its_limits_are_asked_for_holds_no_place(
    proxy: Proxy, settings: Settings, client: redis.Redis, what: str
) -> None:
    """A request whose session, or proof of copies, goes along with its check gives its place back, too."""

    async def scenario() -> None:
        behind = settings.model_copy(update={"redis_url": proxy.url})
        async with AsyncStillroom(behind, dispatch=NoDispatch()) as room:

            @room.cache.cached("n", near=60 if what == "with a proof" else None)
            async def number() -> int:
                return 1

            async def app(scope: Any, receive: Any, send: Any) -> None:
                if what == "with its session":
                    await scope["stillroom.session"].load()
                await number()
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b""})

            door = StillroomMiddleware(app, room, routes=Routes([], default=[PLACE]))
            session = await room.sessions.create("ann")
            cookie = f"{SessionCookie().name}={session.token}".encode()
            asked = {
                "type": "http",
                "method": "GET",
                "path": "/",
                "raw_path": b"/",
                "query_string": b"",
            }
            where = {"headers": [(b"cookie", cookie)], "scheme": "https", "root_path": ""}
            statuses: list[int] = []

            async def send(message: Any) -> None:
                statuses.append(message.get("status", 0))

            async def ask() -> None:
                await door({**asked, **where, "client": ("203.0.113.9", 1)}, None, send)

            for _ in range(3):
                await ask()
            before = scripts_run(client)
            proxy.hold_replies()
            asking = asyncio.create_task(ask())
            assert await asyncio.to_thread(until, lambda: scripts_run(client) > before, 5)
            asking.cancel()
            proxy.let_go()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await ask()
            assert statuses == [200, 0] * 4

    asyncio.run(scenario())


def test_a_turn_that_comes_when_its_task_gives_up_is_the_next_tasks(
    own_server: EmbeddedServer,
) -> None:
    """A connection that is free in the moment in which the next task gives up goes to the one behind it."""
    patience = {"connect_timeout": 20.0, "command_timeout": 30.0, "call_timeout": 60.0}

    async def scenario() -> None:
        settings = Settings(redis_url=own_server.url, pool_size=1, **patience)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:

            async def bounded() -> Any:
                async with asyncio.timeout(0.2):
                    return await room.cache.get("k")

            await room.cache.set("k", 1)
            while room.wire.connections != 1 or await room.cache.get("k") != 1:
                pass
            own_server.freeze()
            first = asyncio.create_task(room.cache.get("k"))
            await asyncio.sleep(0)
            second = asyncio.create_task(bounded())
            await asyncio.sleep(0)
            third = asyncio.create_task(room.cache.get("k"))
            await asyncio.sleep(0)
            own_server.thaw()
            # This loop is busy until the reply has arrived and the second's time is up.
            time.sleep(0.5)
            async with asyncio.timeout(20):
                assert [await first, await third] == [1, 1]
            assert isinstance(
                (await asyncio.gather(second, return_exceptions=True))[0], TimeoutError
            )

    asyncio.run(scenario())


def test_a_task_that_is_cancelled_at_a_dead_connection_takes_no_place_of_the_pool(
    settings: Settings, client: redis.Redis
) -> None:
    """A task that is cancelled while it looks at an idle connection leaves its place to the others."""

    async def scenario() -> None:
        alone = settings.model_copy(update={"pool_size": 1})
        async with AsyncStillroom(alone, dispatch=NoDispatch()) as room:
            await room.cache.set("k", 1)
            client.client_kill_filter(_type="normal", skipme=True)
            # The loop is held meanwhile: it has not seen that the connection ended.
            celery_process.until(
                lambda: len(client.client_list(_type="normal")) == 1, "the connection's end"
            )
            setting = asyncio.create_task(room.cache.set("k", 2))
            await asyncio.sleep(0)
            setting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await setting
            assert room.wire.connections == 0
            assert await room.cache.set("k", 3)

    asyncio.run(scenario())


@pytest.mark.parametrize("is_answered_late", [True, False], ids=["reply", "request"])
def test_a_reservation_that_is_cancelled_on_its_way_holds_no_place(
    proxy: Proxy, settings: Settings, client: redis.Redis, is_answered_late: bool
) -> None:
    """A reservation whose task is cancelled before its reply is given back, also where it arrives only then."""

    async def scenario() -> None:
        behind = settings.model_copy(update={"redis_url": proxy.url})
        async with (
            AsyncStillroom(behind, dispatch=NoDispatch()) as room,
            AsyncStillroom(settings, dispatch=NoDispatch()) as other,
        ):
            for warm in range(3):
                async with room.limits.hold(f"203.0.113.{warm}", [PLACE]):
                    pass
            (proxy.hold_replies if is_answered_late else proxy.hold_requests)()
            taking = asyncio.create_task(room.limits.reserve("203.0.113.9", [PLACE]))

            def is_on_its_way() -> bool:
                taken = client.keys("*203.0.113.9*") != []
                return taken if is_answered_late else proxy.held.is_set()

            assert await asyncio.to_thread(until, is_on_its_way, 5)
            taking.cancel()
            proxy.let_go()
            with pytest.raises(asyncio.CancelledError):
                await taking
            assert await other.limits.reserve("203.0.113.9", [PLACE])

    asyncio.run(scenario())
