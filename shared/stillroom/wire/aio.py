"""The wire for asyncio: the same promises, a connection per task while its batch lasts."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import hiredis

from stillroom.errors import RedisUnavailable
from stillroom.wire.breaker import Breaker
from stillroom.wire.outcome import checked, judged, refusal
from stillroom.wire.server import Command, ReplyError, Server, pack
from stillroom.wire.sync import Wire

_READ_SIZE = 64 * 1024


class AsyncLink:
    """One connection and its reader, for one event loop."""

    __slots__ = ("_reader", "_stream", "_transport", "_writer", "expired", "used")

    def __init__(self, connection: Any) -> None:
        self._stream: asyncio.StreamReader = connection._reader
        self._writer: asyncio.StreamWriter = connection._writer
        self._transport = self._writer.transport
        self._reader = hiredis.Reader()
        connection._reader = connection._writer = None  # redis-py has done its part
        self.expired = False
        self.used = False

    @classmethod
    async def open(cls, server: Server) -> AsyncLink:
        """Connect, and learn the server's clock."""
        connection = server.async_connection()
        settings = server.settings
        async with asyncio.timeout(settings.connect_timeout + settings.command_timeout):
            await connection.connect()
        link = cls(connection)
        try:
            asked = time.time_ns()
            (reply,) = await link.exchange(pack([(b"TIME",)]), 1, settings.command_timeout)
            if isinstance(reply, ReplyError):
                raise refusal([reply])
            server.learn_clock(reply, asked)
        except BaseException:
            link.close()
            raise
        return link

    async def exchange(self, packed: bytes, count: int, seconds: float) -> list[Any]:
        """Send, then read `count` replies in at most `seconds`."""
        timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        stream, reader = self._stream, self._reader
        replies: list[Any] = []
        try:
            self._transport.write(packed)
            while True:
                data = await stream.read(_READ_SIZE)
                if not data:
                    raise EOFError("the server closed the connection")
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
            timer.cancel()

    def _expire(self) -> None:
        self.expired = True
        self._transport.abort()

    def is_alive(self) -> bool:
        """Whether the idle connection is open and silent."""
        unread = self._stream._buffer  # type: ignore[attr-defined]  # no public way to look without reading
        return not (self._transport.is_closing() or self._stream.at_eof() or unread)

    def close(self) -> None:
        self._transport.abort()


class AsyncWire:
    """Batches to one server, from one event loop at a time. Cancelling a call closes its connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._settings = server.settings
        self.for_threads = Wire(server)  # the prober's, and whoever has no event loop
        self.breaker: Breaker = self.for_threads.breaker
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: list[AsyncLink] = []
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._open = 0

    @property
    def connections(self) -> int:
        """How many are open now."""
        return self._open

    async def execute(
        self, commands: Sequence[Command], left: float, *, idempotent: bool = True
    ) -> list[Any]:
        """See Wire.execute."""
        if self.breaker.is_open:
            raise RedisUnavailable("breaker", self.breaker.reason)
        if left <= 0:
            raise RedisUnavailable("budget")
        if self._loop is not asyncio.get_running_loop():
            self._move()
        packed = pack(commands)
        try:
            link = await self._lease(left, check=not idempotent)
            try:
                replies = await self._exchange(link, packed, len(commands), left)
            except (OSError, EOFError) as error:
                if isinstance(error, TimeoutError) or not (link.used and idempotent):
                    raise
                self._discard_idle()
                link = await self._open_link()
                replies = await self._exchange(link, packed, len(commands), left)
        except BaseException as error:
            raise judged(error, self.breaker) from None
        self._idle.append(link)
        self._wake_one()
        return checked(replies, self.breaker)

    async def _exchange(self, link: AsyncLink, packed: bytes, count: int, left: float) -> list[Any]:
        try:
            replies = await link.exchange(packed, count, min(left, self._settings.command_timeout))
        except BaseException:
            self._drop(link)
            raise
        link.used = True
        return replies

    async def _lease(self, left: float, *, check: bool) -> AsyncLink:
        while True:
            if not self._idle:
                if self._open < self._settings.pool_size:
                    return await self._open_link()
                await self._await_idle(left)
                continue
            link = self._idle.pop()
            if not check or link.is_alive():
                return link
            self._drop(link)

    async def _open_link(self) -> AsyncLink:
        self._open += 1
        try:
            return await AsyncLink.open(self.server)
        except BaseException:
            self._open -= 1
            self._wake_one()
            raise

    async def _await_idle(self, left: float) -> None:
        freed = asyncio.get_running_loop().create_future()
        self._waiting.append(freed)
        try:
            async with asyncio.timeout(min(left, self._settings.pool_timeout)):
                await freed
        except TimeoutError:
            busy = f"{self._settings.pool_size} connections are in use"
            raise RedisUnavailable("pool", busy) from None

    def _wake_one(self) -> None:
        while self._waiting:
            freed = self._waiting.popleft()
            if not freed.done():
                freed.set_result(None)
                return

    def _drop(self, link: AsyncLink) -> None:
        self._open -= 1
        link.close()
        self._wake_one()

    def _discard_idle(self) -> None:
        while self._idle:
            self._drop(self._idle.pop())

    def _move(self) -> None:
        """Another event loop runs now: the connections belong to the one before, which has ended."""
        self._loop = asyncio.get_running_loop()
        self._idle.clear()
        self._waiting.clear()
        self._open = 0

    def ping(self) -> None:
        """See Wire.ping; blocks, so it is for start-up."""
        self.for_threads.ping()

    async def close(self) -> None:
        """Close every idle connection and end the prober. The wire can be used again."""
        self.for_threads.close()
        self._discard_idle()
        await asyncio.sleep(0)  # the event loop closes an aborted socket in its next round
