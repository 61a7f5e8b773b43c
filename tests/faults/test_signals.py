"""Each call keeps its deadline however often signals come and whatever their handlers call."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, NoReturn

import pytest

from stillroom import (
    AUTH,
    AsyncStillroom,
    NoDispatch,
    SessionStoreUnavailable,
    Settings,
    Stillroom,
    background,
)
from stillroom.cache.orders import Load
from stillroom.daemon import Daemon
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from stillroom.locks.renewer import Renewer
from stillroom.wire import budget
from tests.support.crowd import PATIENT
from tests.support.lag import least, seconds_of

CALL = 0.25  # the most one call may take, seconds
PATIENCE_S = 10
PEPPER = "a-pepper-of-thirty-two-bytes-...."


@contextmanager
def flooded(every: float, kind: int = signal.SIGALRM) -> Iterator[None]:
    """Send a signal with a Python handler this often, by a timer."""
    timers = {signal.SIGALRM: signal.ITIMER_REAL, signal.SIGPROF: signal.ITIMER_PROF}
    before = signal.signal(kind, lambda *_: None)
    stop = threading.Event()
    me = threading.main_thread().ident
    assert me is not None

    def send() -> None:
        while not stop.wait(every):
            signal.pthread_kill(me, kind)

    sender = threading.Thread(target=send, daemon=True)
    if kind in timers:
        signal.setitimer(timers[kind], every, every)
    else:
        sender.start()
    try:
        yield
    finally:
        stop.set()
        if kind in timers:
            signal.setitimer(timers[kind], 0)
        else:
            sender.join()
        signal.signal(kind, before)


@pytest.fixture
def app(own_server: EmbeddedServer) -> Iterator[Stillroom]:
    settings = Settings(
        redis_url=own_server.url,
        session_peppers=PEPPER,
        breaker_failures=1_000,
        breaker_calls=1_000,
    )
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        assert until(lambda: room.cache.set("k", 1) and room.cache.get("k") == 1, 10)
        room.limits.check("203.0.113.9", [AUTH])
        yield room


@pytest.mark.parametrize("every", [0.001, 0.01, 0.05])
@pytest.mark.parametrize("kind", [signal.SIGALRM, signal.SIGCHLD, signal.SIGUSR1])
def test_a_flood_of_signals_takes_no_deadline_away(
    own_server: EmbeddedServer, app: Stillroom, every: float, kind: int
) -> None:
    """Each kind of call to a frozen Redis ends in time, though signals come more often than the deadline."""
    patient = Settings(**PATIENT | {"redis_url": own_server.url, "session_peppers": PEPPER})
    with Stillroom(patient, dispatch=NoDispatch()) as room:
        session = room.sessions.create("ann")
    calls: dict[str, Callable[[], Any]] = {
        "get": lambda: app.cache.get("k"),
        "set": lambda: app.cache.set("k", 2),
        "get_many": lambda: app.cache.get_many(["k", "l"]),
        "get_or_set": lambda: app.cache.get_or_set("l", lambda: 1),
        "check": lambda: app.limits.check("203.0.113.9", [AUTH]),
        "session": lambda: _away(lambda: app.sessions.get(session.token)),
    }
    own_server.freeze()
    try:
        with flooded(every, kind):
            for name, call in calls.items():
                assert least(partial(seconds_of, call), CALL) < CALL, name
    finally:
        own_server.thaw()


def _away(call: Callable[[], Any]) -> None:
    with pytest.raises(SessionStoreUnavailable):
        call()


def test_a_connection_is_begun_in_time_whatever_signals_come(own_server: EmbeddedServer) -> None:
    """A handshake with a silent server ends in time under signals."""
    own_server.freeze()
    try:
        with (
            Stillroom(Settings(redis_url=own_server.url), dispatch=NoDispatch()) as room,
            flooded(0.01),
        ):

            def read() -> None:
                assert room.cache.get("k") is None

            assert least(partial(seconds_of, read), CALL) < CALL
    finally:
        own_server.thaw()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile.

    Python 3.11 ends with a segmentation fault where a handler sets a context variable while a collection interrupts
    another `set`: https://github.com/python/cpython/issues/148891. Handlers run in a collection because Hypothesis
    has a function that each collection calls.
    """
    gc.disable()
    yield
    gc.enable()


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("every", [0.0007, 0.003])
def test_a_handler_may_use_the_room_it_interrupts(own_server: EmbeddedServer, every: float) -> None:
    """A handler that reads, writes, checks and counts, in the thread that holds a lock just then: nobody waits for
    himself, and no reply goes to another."""
    with Stillroom(Settings(**PATIENT, redis_url=own_server.url), dispatch=NoDispatch()) as app:
        _interrupt(app, every)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("every", [0.0007, 0.003])
def test_a_handler_may_use_the_room_while_redis_is_away(
    own_server: EmbeddedServer, every: float, is_full: bool
) -> None:
    """A handler that counts and loads interrupts the same in its own thread: nobody waits, and nothing is torn."""
    own_server.kill()
    # Room for a few values and logs: the oldest of them go all the time.
    little = Settings(redis_url=own_server.url, away_limit=2_000, local_limits=20)
    with Stillroom(little, dispatch=NoDispatch()) as app:
        rounds = 0

        def work(number: int) -> None:
            subject = f"203.0.113.{number % 250}"
            app.limits.refund(app.limits.reserve(subject, [AUTH]))
            assert app.cache.get_or_set(f"k{number}", lambda: number, tags=["t"]) == number

        def handler(*_: Any) -> None:
            nonlocal rounds
            signal.setitimer(signal.ITIMER_REAL, 0)
            rounds += 1
            work(10_000 + rounds)
            signal.setitimer(signal.ITIMER_REAL, every)

        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, every)
            for number in range(10_000):
                work(number)
                if rounds > (1_000 if is_full else 300):
                    break
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(60)
def test_a_handler_may_take_a_lock_while_its_thread_takes_one() -> None:
    """A handler may take a lock at any step of a thread that takes one: nobody waits for himself."""
    renewer = Renewer()
    sooner = itertools.count(10_000, -1)  # than all before, so that the renewer's thread is told
    steps = 0

    def take() -> None:
        renewer.drop(renewer.add(next(sooner), lambda: True))

    def interrupted_at(step: int) -> None:
        nonlocal steps
        steps = 0

        def handler(_frame: object, event: str, _: object) -> Any:
            nonlocal steps
            steps += event == "line"
            if event == "line" and steps == step:
                take()
            return handler

        before = sys.gettrace()
        sys.settrace(handler)
        try:
            take()
        finally:
            sys.settrace(before)

    take()  # starts the thread
    for step in itertools.count(1):
        interrupted_at(step)
        if steps < step:
            return


def _interrupt(app: Stillroom, every: float) -> None:
    wrong: list[Any] = []
    rounds = 0

    def handler(*_: Any) -> None:
        nonlocal rounds
        signal.setitimer(signal.ITIMER_REAL, 0)
        rounds += 1
        if (found := app.cache.get("other")) not in ("o", None):
            wrong.append(found)
        app.cache.set("other", "o")
        app.cache.invalidate_by_tag("t")
        app.limits.check("203.0.113.9", [AUTH])
        app.abuse.report("auth_fail", ip="203.0.113.9")
        signal.setitimer(signal.ITIMER_REAL, every)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, every)
        for turn in range(4_000):
            app.cache.set("k", turn, tags=["t"]) if turn % 20 == 0 else None
            if (found := app.cache.get("k")) is not None and not isinstance(found, int):
                wrong.append(found)
            if rounds > 150:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert wrong == []
    assert rounds > 20


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_time_limit_of_the_app_ends_a_call_that_waits(
    own_server: EmbeddedServer, replicas: int
) -> None:
    """Where a signal's handler raises TimeoutError while a call waits for Redis or for a replica, the app gets that
    error, and it does not count as a failure of the server.
    """

    def end(*_: Any) -> NoReturn:
        raise TimeoutError("the app's")

    patient = PATIENT | {"redis_url": own_server.url, "replicas": replicas, "command_timeout": 2.0}
    with Stillroom(Settings(**patient), dispatch=NoDispatch()) as room:
        room.cache.clear()  # scripts are loaded
        if not replicas:
            own_server.freeze()
        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(TimeoutError, match="the app's"):
                room.cache.clear() if replicas else room.cache.get("k")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            own_server.thaw()
        assert room.wire.breaker.streak == 0


class TooLong(Exception):  # as Celery's SoftTimeLimitExceeded
    """No OSError, which asyncio takes for one of its own pipe's."""


def test_a_load_that_nobody_waits_for_is_cancelled(app: Stillroom) -> None:
    """Where a signal's handler raises while a thread waits for an async loader, as a time limit of Celery's does in
    prefork, that loader does not go on.
    """
    source = AsyncStillroom(app.settings, dispatch=NoDispatch())
    cancelled = threading.Event()

    @source.cache.cached("slow:{id}", name="slow", ttl=60)
    async def slow(id: int) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.sleep(PATIENCE_S)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def end(*_: Any) -> NoReturn:
        raise TooLong

    app.cache.loaders.adopt(source.cache.loaders)
    before = signal.signal(signal.SIGUSR1, end)
    try:
        with pytest.raises(TooLong):
            app.cache.load(Load(loader="slow", args={"id": 1}))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert cancelled.wait(PATIENCE_S)


def test_an_interruption_while_the_loop_of_loaders_starts_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a signal's handler raises while the thread for async loaders starts, its error is raised, and the next
    load finds that thread.
    """
    started: list[threading.Thread] = []

    class Interrupted(Daemon):
        def start(self) -> None:
            super().start()
            started.append(self)
            signal.raise_signal(signal.SIGUSR1)

    async def own_thread() -> threading.Thread:
        return threading.current_thread()

    def end(*_: Any) -> NoReturn:
        raise TooLong

    background._forget_background_loop()
    before = signal.signal(signal.SIGUSR1, end)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(background, "Daemon", Interrupted)
            with pytest.raises(TooLong):
                background.in_background_loop(own_thread())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [background.in_background_loop(own_thread())] == started


class _Struck:
    """A context variable at whose `set` a signal's handler raises, once it is set."""

    def __init__(self, variable: ContextVar[Any]) -> None:
        self._variable = variable
        self._is_armed = True
        self.get = variable.get

    def set(self, value: Any) -> Token[Any]:
        token = self._variable.set(value)
        if self._is_armed:
            self._is_armed = False
            raise TooLong
        return token


@pytest.mark.parametrize("name", ["_current", "_loading", "_leases"])
def test_a_request_or_load_that_is_interrupted_as_it_begins_is_over(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where a signal's handler raises while a request or a load begins, later calls of the thread are not in it."""
    beginning = budget.Budget(1.0) if name == "_current" else budget.load_begun([b"load.1"])
    before = budget.time_left(), budget.loading_since(), budget.leases_of_loads()
    monkeypatch.setattr(budget, name, _Struck(getattr(budget, name)))
    with pytest.raises(TooLong), beginning:
        raise AssertionError("it has begun")
    assert (budget.time_left(), budget.loading_since(), budget.leases_of_loads()) == before
