"""A call that is cancelled, or interrupted, on its way leaves nothing behind that nobody could end."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import CodeType
from typing import Any

import pytest

from stillroom import AsyncStillroom, Limit, NoDispatch, Settings, Stillroom
from stillroom.cache.loads import Loads
from stillroom.embedded import EmbeddedServer
from stillroom.operation import Driver
from stillroom.together import together
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.interruption import Interruption, interrupted_at
from tests.support.monitor import scripts_run
from tests.support.proxy import Proxy

IP = "203.0.113.7"
PLACE = Limit("place", 1, 3600, in_flight=True)
GUESSES = Limit("guesses", 1, 3600, by="user")
GUESSES_OF_IP = Limit("guesses-of-ip", 1_000, 3600)
TRY_LEASE = Loads._try_lease
ONLY: dict[str, Any] = {"max_per_user": 1, "on_cap": "reject"}


def _settings(proxy: Proxy, **changes: Any) -> Settings:
    return Settings(**{"redis_url": proxy.url} | PATIENT | changes)


async def _lost(client: Any, proxy: Proxy, act: Awaitable[Any]) -> None:
    """Cancel the act once the server has run its script; the reply is held back."""
    before = scripts_run(client)
    proxy.hold_replies()
    task = asyncio.ensure_future(act)
    await asyncio.to_thread(until, lambda: scripts_run(client) > before, "the script")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    proxy.let_go()


def _lose(proxy: Proxy, server: EmbeddedServer) -> None:
    """Lose the request that is held, with its connection, and let new ones pass."""
    proxy.lead_to(server.port)
    proxy.let_go()


def _run(
    server: EmbeddedServer,
    story: Callable[[AsyncStillroom, Proxy], Awaitable[None]],
    **changes: Any,
) -> None:
    async def told() -> None:
        with Proxy(server.port) as proxy:
            settings = _settings(proxy, **changes)
            async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
                session = await room.sessions.create("eve", **ONLY)  # loads the scripts
                await room.sessions.destroy(await room.sessions.rotate(session))
                async with room.limits.hold("198.51.100.1", [PLACE]):
                    pass
                await story(room, proxy)

    asyncio.run(told())


def test_a_cancelled_login_takes_no_place_of_a_cap(server: EmbeddedServer, client: Any) -> None:
    """A login that is cancelled on its way is ended before the next one is counted."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        await _lost(client, proxy, room.sessions.create("ann", **ONLY))
        made = await room.sessions.create("ann", **ONLY)
        listed = await room.sessions.list_for_user("ann")
        assert [one.handle for one in listed] == [made.handle]

    _run(server, story)


@pytest.mark.parametrize("on_cap", ["evict_oldest", "reject"])
def test_the_session_before_a_cancelled_login_ends_too(
    server: EmbeddedServer, client: Any, on_cap: str
) -> None:
    """The session that a cancelled login was to replace opens nothing afterwards."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        for _ in range(3):
            guest = await room.sessions.create(None)
            login = room.sessions.create("ann", replaces=guest, max_per_user=3, on_cap=on_cap)
            await _lost(client, proxy, login)
            assert await room.sessions.get(guest) is None
            assert await room.sessions.count("ann") == 0

    _run(server, story)


@pytest.mark.parametrize("grace", [0, 60])
@pytest.mark.parametrize("act", ["rotate", "confirm"])
def test_a_cancelled_rotation_logs_nobody_out(
    server: EmbeddedServer, client: Any, act: str, grace: int
) -> None:
    """The old token of a rotation that was cancelled stays good, and is no replay."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        events: list[Any] = []
        room.sessions.on_event.append(events.append)
        session = await room.sessions.create("ann", {"a": 1})
        await _lost(client, proxy, getattr(room.sessions, act)(session, grace=grace))
        found = await room.sessions.get(session)
        assert found is not None
        assert found.data == {"a": 1}
        assert events == []

    _run(server, story)


def test_operations_that_are_cancelled_together_are_each_undone(
    server: EmbeddedServer, client: Any
) -> None:
    """A login and a refund that go to Redis in one batch leave no session, and no hits, where it is cancelled."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        guesses = {"user": "ann"}, [GUESSES]
        held = await room.limits.reserve(*guesses)
        login, refund = (
            room.operations.sessions.create("ann", **ONLY),
            room.operations.limits.refund(held),
        )
        await _lost(client, proxy, room.state.run(together(login, refund)))
        made = await room.sessions.create("ann", **ONLY)
        assert [one.handle for one in await room.sessions.list_for_user("ann")] == [made.handle]
        assert await room.limits.reserve(*guesses)

    _run(server, story)


def test_a_cancelled_logout_that_may_wait_ends_the_session(server: EmbeddedServer) -> None:
    """A logout with `defer` that is cancelled before it comes to Redis is told to Redis later."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        session = await room.sessions.create("ann")
        proxy.hold_requests()
        logout = asyncio.ensure_future(room.sessions.destroy(session, defer=True))
        assert await asyncio.to_thread(proxy.held.wait, 5)
        logout.cancel()
        with pytest.raises(asyncio.CancelledError):
            await logout
        _lose(proxy, server)
        assert await room.sessions.get(session) is None
        assert await room.sessions.deliver() == 0
        assert await room.sessions.count("ann") == 0

    _run(server, story)


@pytest.mark.parametrize(
    ("subject", "limit"),
    [(IP, PLACE), ({"ip": IP, "user": "ann"}, GUESSES)],
    ids=["place", "quota"],
)
def test_a_cancelled_reservation_is_given_back(
    server: EmbeddedServer, client: Any, subject: Any, limit: Limit
) -> None:
    """What a cancelled reservation took is free again, because nobody has it to give it back."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        await _lost(client, proxy, room.limits.reserve(subject, [limit]))
        assert await room.limits.reserve(subject, [limit])
        assert not await room.limits.reserve(subject, [limit])

    _run(server, story, call_timeout=2.0)  # for as long it tries to give the place back


def test_a_check_that_is_cancelled_leaves_the_windows_to_be_compared(
    server: EmbeddedServer,
) -> None:
    """Windows are compared before the next check, where the first is cancelled while it compares them."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        proxy.hold_requests()
        checking = asyncio.ensure_future(room.limits.check(IP, [Limit("new", 9, 3600)]))
        assert await asyncio.to_thread(proxy.held.wait, 5)
        checking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await checking
        _lose(proxy, server)
        await room.limits.check(IP, [Limit("new", 9, 3600)])
        assert await room.limits.names() == ["new", "place"]

    _run(server, story)


def test_a_place_whose_return_is_cancelled_comes_back(server: EmbeddedServer) -> None:
    """A place that is given back by a call that is cancelled comes back without waiting for the lease."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        held = await room.limits.reserve(IP, [PLACE])
        proxy.hold_requests()
        giving = asyncio.ensure_future(room.limits.refund(held))
        assert await asyncio.to_thread(proxy.held.wait, 5)
        giving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await giving
        _lose(proxy, server)
        assert await room.limits.reserve(IP, [PLACE])

    _run(server, story)


@pytest.mark.parametrize("what", ["a lock", "a load"])
def test_a_lease_whose_return_is_cancelled_and_lost_is_free(
    server: EmbeddedServer, client: Any, what: str
) -> None:
    """What others wait for is given back once more where a task is cancelled while it gives it back."""

    async def story(room: AsyncStillroom, proxy: Proxy) -> None:
        async def load() -> int:
            proxy.hold_requests()
            return 1

        async def use() -> None:
            if what == "a load":
                await room.cache.get_or_set("k", load)
                return
            async with room.lock("k"):
                proxy.hold_requests()

        using = asyncio.ensure_future(use())
        assert await asyncio.to_thread(proxy.held.wait, 5)
        _lose(proxy, server)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        assert client.keys("*:l:*") == client.keys("*:slots") == []

    _run(server, story)


def test_an_interrupted_login_takes_no_place_of_a_cap(server: EmbeddedServer, client: Any) -> None:
    """A login that a signal handler interrupts is ended before the next one is counted."""

    def interrupt(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with (
            Proxy(server.port) as proxy,
            Stillroom(_settings(proxy), dispatch=NoDispatch()) as room,
        ):
            room.sessions.create("eve", **ONLY)
            proxy.hold_replies()
            called = scripts_run(client)

            def signal_once_it_is_done() -> None:
                until(lambda: scripts_run(client) > called, "the script")
                os.kill(os.getpid(), signal.SIGUSR1)

            threading.Thread(target=signal_once_it_is_done).start()
            with pytest.raises(Interruption):
                room.sessions.create("ann", **ONLY)
            proxy.let_go()
            made = room.sessions.create("ann", **ONLY)
            assert [one.handle for one in room.sessions.list_for_user("ann")] == [made.handle]
    finally:
        signal.signal(signal.SIGUSR1, before)


def _between_steps(code: CodeType) -> set[int]:
    """Return the lines at which a driver goes on with an operation, or a load has taken its lease."""
    lines, first = inspect.getsourcelines(code)
    goes_on = ("step = send(answer)", "return Attempt(clock=clock)")
    return {n for n, line in enumerate(lines, first) if line.strip() in goes_on}


def _load(room: Stillroom) -> object:
    return room.cache.get_or_set("k", lambda: 1)


def _lock(room: Stillroom) -> None:
    with room.lock("k"):
        pass


def _hold(room: Stillroom) -> None:
    with room.limits.hold(IP, [PLACE]):
        pass


@pytest.mark.parametrize("act", [_load, _lock, _hold])
def test_what_a_call_took_before_it_was_interrupted_between_two_steps_is_free(
    make_room: Any, client: Any, act: Callable[[Stillroom], object]
) -> None:
    """A call that a signal's handler interrupts while it waits for nothing gives back what it took, too."""
    room: Stillroom = make_room()
    act(room)  # loads the scripts
    lines = {code: _between_steps(code) for code in (Driver.run.__code__, TRY_LEASE.__code__)}
    for step in itertools.count(1):
        room.cache.clear()
        interrupted = True
        with suppress(Interruption), interrupted_at(step, lines) as reached:
            act(room)
            interrupted = False
        held = [*client.keys("*:l:*"), *client.keys("*:slots"), *client.keys("*:queue")]
        assert [key for key in held if client.type(key) != b"zset" or client.zcard(key)] == []
        assert room.limits.peek(IP, [PLACE])
        if not interrupted:
            assert len(reached) == step - 1 > 0
            return


def test_a_coroutine_that_comes_after_its_load_was_cancelled_is_closed(
    settings: Settings, recwarn: pytest.WarningsRecorder
) -> None:
    """A load by a plain function that returns a coroutine warns of nothing where it is cancelled in its thread."""
    goes_on, has_begun = threading.Event(), threading.Event()

    async def fetch() -> int:
        return 1

    def load() -> Awaitable[int]:
        has_begun.set()
        goes_on.wait(5)
        return fetch()

    async def scenario() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            loading = asyncio.ensure_future(room.cache.get_or_set("k", load))
            assert await asyncio.to_thread(has_begun.wait, 5)
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            goes_on.set()
            await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(scenario())
    gc.collect()
    assert [str(one.message) for one in recwarn if "awaited" in str(one.message)] == []


def _but_the_end(code: CodeType) -> set[int]:
    """Return the lines of a function, but those that end what is counted as under way."""
    lines, first = inspect.getsourcelines(code)
    return {n for n, line in enumerate(lines, first) if "_flying.end" not in line}


CHECKS: dict[str, Callable[[Stillroom], object]] = {
    "check": lambda room: room.limits.check(IP, [GUESSES_OF_IP]),
    "reserve": lambda room: room.limits.refund(room.limits.reserve(IP, [GUESSES_OF_IP])),
    "wait": lambda room: room.limits.wait(IP, [GUESSES_OF_IP]),
}


@pytest.mark.parametrize("act", CHECKS)
def test_a_check_that_a_signal_interrupts_is_under_way_no_longer(make_room: Any, act: str) -> None:
    """A check that was interrupted takes nothing from its subject in a later outage: it counts as ended."""
    room: Stillroom = make_room()
    CHECKS[act](room)
    body = room.operations.limits
    steps = body._decided, body._reserved_as, body._asked_quietly, body._flying.begin
    lines = {step.__code__: _but_the_end(step.__code__) for step in steps}
    for step in itertools.count(1):
        interrupted = True
        with suppress(Interruption), interrupted_at(step, lines) as reached:
            CHECKS[act](room)
            interrupted = False
        assert body._flying._asked == {}
        if not interrupted:
            assert len(reached) == step - 1 > 3
            return
