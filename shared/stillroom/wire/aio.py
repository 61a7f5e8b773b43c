"""The wire for asyncio: the same promises, a connection per task while its batch lasts."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from stillroom.errors import Misplaced, RedisRefused, RedisUnavailable
from stillroom.wire.aio_link import AsyncLink
from stillroom.wire.breaker import Breaker
from stillroom.wire.failure import is_turned_away, unavailable
from stillroom.wire.forks import reset_after_fork
from stillroom.wire.idle import IdleTimeout, Lateness
from stillroom.wire.outcome import PeerFailed, checked, ended, is_dead, judged, may_repeat
from stillroom.wire.server import (
    Command,
    Server,
    pack,
    pack_timed,
)
from stillroom.wire.sync import Wire

T = TypeVar("T")
TEN_YEARS_S = 3e8
TURNS = 64  # of connections that tasks which come later may have before the first who waits in line


class _Pool:
    """The connections of one event loop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._settings = server.settings
        self._idle: list[AsyncLink] = []
        # Who waits in line, each for a connection, or (None) to be told to look for one.
        self._waiting: deque[asyncio.Future[AsyncLink | None]] = deque()
        self._turns = 0  # since a connection was handed to one of them
        self._lateness = Lateness()
        self.open = 0
        self.guard: AsyncGenerator[None, None] | None = None  # closes it together with its loop

    def lease_at_once(self, *, check: bool) -> AsyncLink | None:
        """Return an idle connection, unless there is something to be done first: see `lease`."""
        if not self._idle:
            return None
        link = self._idle[-1]
        if link.generation != self._server.generation or (check and not link.is_quiet()):
            return None
        return self._idle.pop()

    async def lease(self, deadline: float, *, check: bool) -> tuple[AsyncLink, float]:
        """Return a connection, and the deadline as the loop's own work has moved it."""
        link, waits = None, False
        while True:
            if link is None and not self._idle:
                has_room = self.open < self._settings.pool_size
                if has_room and (opened := await self._open_link(deadline)):
                    return opened
                if not self._idle:  # one may have come back while the server turned another away
                    link, deadline = await self._await_idle(deadline, is_first=waits)
                    waits = True
                continue
            link = link or self._idle.pop()
            is_good = link.generation == self._server.generation
            try:
                if is_good and check:
                    is_good = await link.is_alive()
            except BaseException:  # cancelled: nobody else knows of it by now
                self.drop(link)
                raise
            if is_good:
                return link, deadline
            self.drop(link)
            link = None

    async def _open_link(self, deadline: float) -> tuple[AsyncLink, float] | None:
        """Return a new connection; None if the server has no room for it, and this loop has others."""
        self.open += 1
        try:
            return await AsyncLink.open(self._server, deadline, self._lateness)
        except BaseException as error:
            self.open -= 1
            failure = unavailable(error)
            if is_turned_away(failure) and self.open:
                return None  # nobody is woken: there is no room for them either
            self._hand_on(None)
            if failure is None:
                raise
            self._server.doubt()
            raise self._server.explain(failure) from None

    def give_back(self, link: AsyncLink) -> None:
        """Leave a connection to whoever is next: a call that has begun ends soonest if it goes on with it.

        Now and then it is handed to the first in line, or tasks that call again at once would keep all others out.
        """
        if link.generation != self._server.generation:
            return self.drop(link)
        if self._waiting:
            self._turns += 1
            if self._turns > TURNS and self._hand_on(link):
                self._turns = 0
                return None
            self._hand_on(None)
        self._idle.append(link)
        return None

    def leave(self, link: AsyncLink) -> None:
        """See Wire._leave."""
        self._server.leave(link.generation)
        self._server.doubt()
        self.drop(link)
        self.discard_idle()

    def drop(self, link: AsyncLink) -> None:
        if link.is_dropped:
            return
        link.is_dropped = True
        self.open -= 1
        link.close()
        self._hand_on(None)

    def discard_idle(self) -> None:
        while self._idle:
            self.drop(self._idle.pop())

    async def _await_idle(
        self, deadline: float, *, is_first: bool
    ) -> tuple[AsyncLink | None, float]:
        """Wait in line for all of the call's time, because a burst of tasks is no outage.

        Return what was handed on, and the deadline then. `is_first`: it has waited, and another was faster.
        """
        handed: asyncio.Future[AsyncLink | None] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if is_first else self._waiting.append)(handed)
        try:
            async with IdleTimeout(self._lateness, deadline) as wait:
                link = await handed
        except BaseException as error:
            if not handed.cancel() and not handed.cancelled():  # its turn came too late
                late = handed.result()
                self._hand_on(None) if late is None else self.give_back(late)
            if not isinstance(error, TimeoutError):
                raise
            busy = f"{self.open} connections are in use"
            raise RedisUnavailable("pool", busy) from None
        return link, wait.deadline

    def _hand_on(self, link: AsyncLink | None) -> bool:
        """Wake the first in line, with a connection or None. Return whether anybody waits."""
        while self._waiting:
            handed = self._waiting.popleft()
            if not handed.done():
                handed.set_result(link)
                return True
        return False


async def to_its_end(awaitable: Coroutine[Any, Any, T]) -> T:
    """Await to the end, however often the caller is cancelled meanwhile. Raises CancelledError then.

    asyncio cancels a task once. Frameworks on anyio (Starlette, FastAPI) cancel it again at each await, until it
    has left the block that was cancelled.
    """
    work, cancelled = asyncio.ensure_future(awaitable), None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        work.exception()  # it is told to nobody, and asyncio logs errors that nobody has looked at
        raise cancelled  # the same: anyio knows its own by what it says
    return work.result()


async def side_by_side(awaitables: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all to their ends, and return their results. Cancelling the caller cancels each of them.

    The first error is raised once all have ended: a write that may still act outlives no call. asyncio.gather
    leaves the others running then, and drops the message by which anyio knows its own cancellation.
    """
    works, cancelled = [asyncio.ensure_future(one) for one in awaitables], None
    while running := [work for work in works if not work.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancelled = error
            for work in running:
                work.cancel(*error.args)
    for failed in [cancelled, *map(_error_of, works)]:
        if failed is not None:
            raise failed
    return [work.result() for work in works]


def _error_of(work: asyncio.Future[Any]) -> BaseException | None:
    """Return the error of what has ended. asyncio logs errors that nobody has looked at."""
    return asyncio.CancelledError() if work.cancelled() else work.exception()


async def _until_the_loop_ends(pool: _Pool) -> AsyncGenerator[None, None]:
    """Close a pool's connections with its event loop, which closes its generators when it ends."""
    try:
        yield
    finally:
        pool.discard_idle()
        await asyncio.sleep(0)  # the event loop closes an aborted socket in its next round


def _begin_pool(server: Server, loop: asyncio.AbstractEventLoop) -> _Pool:
    """Begin a pool that lives as long as the event loop and keeps no loop alive."""
    pool = _Pool(server)
    pool.guard = _until_the_loop_ends(pool)
    with contextlib.suppress(StopIteration):  # it is begun, and has nothing to wait for
        pool.guard.__anext__().send(None)
    # The loop holds the pool, and nobody else does: connections hold their loop.
    loop.call_later(TEN_YEARS_S, pool.discard_idle)
    return pool


class AsyncWire:
    """Batches to one server, from any event loop: each has connections of its own.

    Cancelling a call closes its connection.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._patience = server.settings.command_timeout
        self.for_threads = Wire(server)  # the prober's, and whoever has no event loop
        self.for_threads.probed_in_vain.append(self._discard_idle)
        self.breaker: Breaker = self.for_threads.breaker
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Have no connections: see Wire.reset. Those of a loop that goes on in a forked process are not closed.

        They are registered with the parent's selector, which the loop still has.
        """
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_Pool]] = (
            WeakKeyDictionary()
        )
        # The last loop and its pool, as one value: two loops may run in two threads.
        self._current: tuple[Callable[[], Any], Callable[[], _Pool | None]] = _nobody, _nobody

    @property
    def connections(self) -> int:
        """Return how many connections are open now, in all event loops that are not closed."""
        return sum(pool.open for loop, pool in self._known_pools() if not loop.is_closed())

    def _known_pools(self) -> list[tuple[asyncio.AbstractEventLoop, _Pool]]:
        """Return the event loops and their pools.

        Not by iterating over the mapping: another thread's loop may begin its pool meanwhile.
        """
        loops = [loop for ref in self._pools.keyrefs() if (loop := ref()) is not None]
        found = [(loop, self._pools.get(loop, _nobody)()) for loop in loops]
        return [(loop, pool) for loop, pool in found if pool is not None]

    def forget(self) -> None:
        """See Wire.forget."""
        self.for_threads.forget()
        self._discard_idle()

    def _discard_idle(self) -> None:
        """Have the idle connections of all event loops closed. Any thread may call this."""
        for loop, pool in self._known_pools():
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(pool.discard_idle)

    async def execute(
        self,
        commands: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
    ) -> list[Any]:
        """See Wire.execute."""
        if self.breaker.is_open or left <= 0:
            raise self.breaker.no_call()
        once = timed or not idempotent
        now = time.monotonic()
        deadline = now + left
        # First: a word that can't be sent raises, and no connection is leased yet that would be lost.
        packed = b"" if timed else pack(commands)
        pool, link = self._pool(), None
        try:
            link = pool.lease_at_once(check=once)
            if link is None:
                link, deadline = await pool.lease(deadline, check=once)
                now = time.monotonic()
            if timed:
                replies = await self._exchange_timed(pool, link, commands, deadline)
            else:
                try:
                    if link.used and now < self.server.due:
                        # As _exchange, and past it: this is run on every hit.
                        until = now + self._patience
                        replies = await link.exchange(
                            packed, len(commands), until if until < deadline else deadline, now
                        )
                    else:
                        replies = await self._exchange(pool, link, packed, len(commands), deadline)
                except BaseException as error:
                    pool.drop(link)
                    if once or not link.used or not is_dead(error):
                        raise
                    pool.leave(link)
                    link, deadline = await pool.lease(deadline, check=False)
                    replies = await self._exchange(pool, link, packed, len(commands), deadline)
            pool.give_back(link)
            return checked(replies, self.breaker)
        except PeerFailed as failed:
            return await self._ask_another(
                pool, link, commands, failed, deadline, once=once, timed=timed
            )
        except BaseException as error:
            return ended(commands, link, error, self.breaker)

    async def _ask_another(
        self,
        pool: _Pool,
        left: AsyncLink | None,
        commands: Sequence[Command],
        failed: PeerFailed,
        deadline: float,
        *,
        once: bool,
        timed: bool,
    ) -> list[Any]:
        """See Wire._ask_another."""
        if left is not None:
            pool.leave(left)
        try:
            if not may_repeat(commands, failed.replies, idempotent=not once):
                failed.is_in_doubt = True
                raise failed
            link, deadline = await pool.lease(deadline, check=False)
            if timed:
                replies = await self._exchange_timed(pool, link, commands, deadline)
            else:
                packed = pack(commands)
                replies = await self._exchange(pool, link, packed, len(commands), deadline)
            pool.give_back(link)
            return checked(replies, self.breaker)
        except RedisRefused:
            raise
        except BaseException as error:
            raise judged(error, self.breaker) from None

    async def _exchange(
        self, pool: _Pool, link: AsyncLink, packed: bytes, count: int, deadline: float
    ) -> list[Any]:
        """See Wire._exchange."""
        server, asked, riding, now = self.server, 0, 0, time.monotonic()
        if now >= server.due:
            look, riding = server.look(now)
            packed, asked = packed + look, time.monotonic_ns()
        try:
            patience = min(deadline, now + self._patience)
            replies = await link.exchange(packed, count + riding, patience, now)
        except BaseException:
            pool.drop(link)
            raise
        if riding:
            look_replies = replies[count:]
            del replies[count:]
            try:
                server.looked(look_replies, asked)
            except RedisUnavailable as failure:
                pool.drop(link)
                told = server.explain(failure)
                raise PeerFailed(told.reason, told.detail, replies) from None
        link.used = True
        return replies

    async def _exchange_timed(
        self, pool: _Pool, link: AsyncLink, commands: Sequence[Command], deadline: float
    ) -> list[Any]:
        """See Wire._exchange_timed."""
        server = self.server
        if not server.is_clock_good:
            server.due = 0.0
            try:
                await self._exchange(pool, link, b"", 0, deadline)
            except BaseException:
                link.heard.clear()  # these are no replies to the batch
                raise
        now = time.monotonic()
        given_up = min(deadline, now + self._patience)
        try:
            packed = pack_timed(commands, server.in_time(now, given_up))
        except BaseException:
            pool.drop(link)
            raise
        try:
            return await self._exchange(pool, link, packed, len(commands), given_up)
        except (PeerFailed, GeneratorExit):
            raise
        except BaseException:  # also a cancellation: its caller may invalidate next
            await to_its_end(asyncio.sleep(max(0.0, given_up - time.monotonic())))
            raise

    def _pool(self) -> _Pool:
        loop = asyncio._get_running_loop() or running_loop()
        last, current = self._current
        if last() is loop and (pool := current()) is not None:
            return pool
        known = self._pools.get(loop)
        pool = None if known is None else known()
        if pool is None:
            pool = _begin_pool(self.server, loop)
            self._pools[loop] = weakref.ref(pool)
        self._current = weakref.ref(loop), weakref.ref(pool)
        return pool

    def ping(self, *, to_read: bool = False) -> None:
        """See Wire.ping; blocks, so it is for start-up."""
        self.for_threads.ping(to_read=to_read)

    async def close(self) -> None:
        """Close this loop's idle connections and end the prober. The wire can be used again."""
        self.for_threads.close()
        self._pool().discard_idle()
        await asyncio.sleep(0)  # the event loop closes an aborted socket in its next round


def running_loop() -> asyncio.AbstractEventLoop:
    """Return asyncio's event loop. Raises Misplaced where none runs, as under Trio."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise Misplaced(
            "an AsyncStillroom is awaited in an event loop of asyncio, and none runs here. Under Trio: have the "
            "server use asyncio, as Hypercorn does without `-k trio`"
        ) from None


def _nobody() -> None:
    """Stand in for the weak reference to an event loop or a pool where there is none."""
