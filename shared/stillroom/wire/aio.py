"""The wire for asyncio: the same promises, a connection per task while its batch lasts."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import hiredis

from stillroom.errors import RedisUnavailable
from stillroom.wire.breaker import Breaker
from stillroom.wire.idle import OWN_LIMIT_S, IdleTimeout, Lateness
from stillroom.wire.outcome import checked, greeted, judged
from stillroom.wire.server import (
    ASK_TIME_EVERY_S,
    TIME,
    Command,
    ReplyError,
    Server,
    pack,
    pack_timed,
)
from stillroom.wire.sync import Wire

_READ_SIZE = 64 * 1024
_LATE_S = 0.005  # a timer that comes so late says that the loop was busy
_NO_REPLY = "the server closed the connection"


class AsyncLink:
    """One connection and its reader, for one event loop."""

    __slots__ = ("_reader", "_stream", "_timer", "_transport", "_writer", "expired", "used")

    def __init__(self, connection: Any) -> None:
        self._stream: asyncio.StreamReader = connection._reader
        self._writer: asyncio.StreamWriter = connection._writer
        self._transport = self._writer.transport
        self._reader = hiredis.Reader()
        connection._reader = connection._writer = None  # redis-py has done its part
        self.expired = False
        self.used = False

    @classmethod
    async def open(
        cls, server: Server, deadline: float, lateness: Lateness
    ) -> tuple[AsyncLink, float]:
        """Connect, say who we are, and learn which server answers and its clock, before `deadline`.

        Returns the deadline too: the loop's own work has moved it.
        """
        now = time.monotonic()
        connection = server.async_connection()
        until = min(deadline, now + server.settings.connect_timeout)
        async with IdleTimeout(lateness, until) as wait:
            await connection.connect()
        deadline += wait.deadline - until
        link = cls(connection)
        try:
            asked_ns = time.monotonic_ns()
            packed = pack([command for _, command in server.handshake])
            greeted(await link.exchange(packed, len(server.handshake), deadline), server, asked_ns)
        except BaseException:
            link.close()
            raise
        return link, deadline

    async def exchange(
        self, packed: bytes, count: int, deadline: float, now: float | None = None
    ) -> list[Any]:
        """Send, then read `count` replies before `deadline` (time.monotonic(), as `now`)."""
        left = deadline - (time.monotonic() if now is None else now)
        if left <= 0:
            raise TimeoutError
        self._timer = asyncio.get_running_loop().call_later(left, self._expire, deadline)
        stream, reader = self._stream, self._reader
        replies: list[Any] = []
        try:
            self._transport.write(packed)
            while True:
                data = await stream.read(_READ_SIZE)
                if not data:
                    refused = replies and isinstance(replies[-1], ReplyError)
                    raise EOFError(str(replies[-1]) if refused else _NO_REPLY)
                reader.feed(data)
                while len(replies) < count:
                    reply = reader.gets()
                    if reply is False:
                        break
                    replies.append(reply)
                else:
                    return replies
        except BaseException:
            if self.expired:
                raise TimeoutError from None
            raise
        finally:
            self._timer.cancel()

    def _expire(self, deadline: float, granted: float = 0.0) -> None:
        """Give up; or, if the loop was busy when this was due, read first what has arrived meanwhile."""
        now = time.monotonic()
        late = now - deadline
        if late > _LATE_S and granted < OWN_LIMIT_S:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(late, self._expire, now + late, granted + late)
            return
        self.expired = True
        self._transport.abort()

    def is_alive(self) -> bool:
        """Whether the idle connection is open and silent."""
        unread = self._stream._buffer  # type: ignore[attr-defined]  # no public way to look without reading
        return not (self._transport.is_closing() or self._stream.at_eof() or unread)

    def close(self) -> None:
        self._transport.abort()


class _Pool:
    """The connections of one event loop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._settings = server.settings
        self._idle: list[AsyncLink] = []
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._lateness = Lateness()
        self.open = 0

    async def lease(self, deadline: float, *, check: bool) -> tuple[AsyncLink, float]:
        """A connection, and the deadline as the loop's own work has moved it."""
        while True:
            if not self._idle:
                if self.open < self._settings.pool_size:
                    return await self.open_link(deadline)
                deadline = await self._await_idle(deadline)
                continue
            link = self._idle.pop()
            if not check or link.is_alive():
                return link, deadline
            self.drop(link)

    async def open_link(self, deadline: float) -> tuple[AsyncLink, float]:
        self.open += 1
        try:
            return await AsyncLink.open(self._server, deadline, self._lateness)
        except BaseException:
            self.open -= 1
            self._wake_one()
            raise

    def give_back(self, link: AsyncLink) -> None:
        self._idle.append(link)
        self._wake_one()

    def drop(self, link: AsyncLink) -> None:
        self.open -= 1
        link.close()
        self._wake_one()

    def discard_idle(self) -> None:
        while self._idle:
            self.drop(self._idle.pop())

    async def _await_idle(self, deadline: float) -> float:
        """Wait in line for all of the call's time: a burst of tasks is not an outage. Returns the deadline then."""
        freed = asyncio.get_running_loop().create_future()
        self._waiting.append(freed)
        try:
            async with IdleTimeout(self._lateness, deadline) as wait:
                await freed
        except TimeoutError:
            busy = f"{self._settings.pool_size} connections are in use"
            raise RedisUnavailable("pool", busy) from None
        return wait.deadline

    def _wake_one(self) -> None:
        while self._waiting:
            freed = self._waiting.popleft()
            if not freed.done():
                freed.set_result(None)
                return


class AsyncWire:
    """Batches to one server, from any event loop: each has connections of its own.

    Cancelling a call closes its connection.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._settings = server.settings
        self.for_threads = Wire(server)  # the prober's, and whoever has no event loop
        self.breaker: Breaker = self.for_threads.breaker
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = WeakKeyDictionary()
        # The last loop and its pool, as one value: two loops may run in two threads.
        self._current: tuple[asyncio.AbstractEventLoop | None, _Pool] = None, _Pool(server)

    @property
    def connections(self) -> int:
        """How many are open now, in all event loops."""
        return sum(pool.open for pool in self._pools.values())

    async def execute(
        self,
        commands: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
    ) -> list[Any]:
        """See Wire.execute."""
        if self.breaker.is_open:
            raise RedisUnavailable("breaker", self.breaker.reason)
        if left <= 0:
            raise RedisUnavailable("budget")
        once = timed or not idempotent
        deadline = time.monotonic() + left
        packed = b"" if timed else pack(commands)
        pool = self._pool()
        try:
            link, deadline = await pool.lease(deadline, check=once)
            if timed:
                replies = await self._exchange_timed(pool, link, commands, deadline)
            else:
                try:
                    replies = await self._exchange(pool, link, packed, len(commands), deadline)
                except (OSError, EOFError) as error:
                    if isinstance(error, TimeoutError) or once or not link.used:
                        raise
                    pool.discard_idle()
                    link, deadline = await pool.open_link(deadline)
                    replies = await self._exchange(pool, link, packed, len(commands), deadline)
        except BaseException as error:
            raise judged(error, self.breaker) from None
        pool.give_back(link)
        return checked(replies, self.breaker)

    async def _exchange(
        self, pool: _Pool, link: AsyncLink, packed: bytes, count: int, deadline: float
    ) -> list[Any]:
        """See Wire._exchange."""
        server, asked, now = self.server, 0, time.monotonic()
        if now >= server.time_due:
            server.time_due = now + ASK_TIME_EVERY_S
            packed, asked = packed + TIME, time.monotonic_ns()
        try:
            patience = min(deadline, now + self._settings.command_timeout)
            replies = await link.exchange(packed, count + bool(asked), patience, now)
        except BaseException:
            pool.drop(link)
            raise
        if asked and not isinstance(said := replies.pop(), ReplyError):
            server.learn_clock(said, asked)
        link.used = True
        return replies

    async def _exchange_timed(
        self, pool: _Pool, link: AsyncLink, commands: Sequence[Command], deadline: float
    ) -> list[Any]:
        """See Wire._exchange_timed."""
        server = self.server
        if not server.is_clock_good:
            server.time_due = 0.0
            await self._exchange(pool, link, b"", 0, deadline)
        now = time.monotonic()
        given_up = min(deadline, now + self._settings.command_timeout)
        packed = pack_timed(commands, server.in_time(now, given_up))
        try:
            return await self._exchange(pool, link, packed, len(commands), given_up)
        except Exception:
            await asyncio.sleep(max(0.0, given_up - time.monotonic()))
            raise

    def _pool(self) -> _Pool:
        loop = asyncio.get_running_loop()
        last, pool = self._current
        if last is not loop:
            pool = self._pools.setdefault(loop, _Pool(self.server))
            self._current = loop, pool
        return pool

    def ping(self) -> None:
        """See Wire.ping; blocks, so it is for start-up."""
        self.for_threads.ping()

    async def close(self) -> None:
        """Close this loop's idle connections and end the prober. The wire can be used again."""
        self.for_threads.close()
        self._pool().discard_idle()
        await asyncio.sleep(0)  # the event loop closes an aborted socket in its next round
