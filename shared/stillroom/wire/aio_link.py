"""One connection of an event loop: asyncio's transport, with hiredis as the protocol that reads it.

A reply wakes the task that waits for it at once, in the callback that read it, and not a round of the event loop
later. There is one timer, which is set again when it is due and not at each exchange.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any

import hiredis

from stillroom.readable import watch
from stillroom.wire.idle import OWN_LIMIT_S, IdleTimeout, LateBy, Lateness
from stillroom.wire.outcome import greeted, told_by
from stillroom.wire.server import NO_REPLY, NOT_YET, TOO_MANY, ReplyError, Server, pack

_READ_SIZE = 64 * 1024
_LATE_S = 0.005  # a timer that comes so late says that the loop was busy

_Wake = Callable[[Any], object]


class Arrival:
    """Hold what one task awaits, and end that once: a future that wakes its task itself, not by the event loop.

    It does of asyncio's protocol of futures what a Task asks for, and nothing else: only one task may await it.
    Once it has ended it can be used again: `is_done` is set to False for the next task.
    """

    __slots__ = ("_asyncio_future_blocking", "_context", "_error", "_loop", "_wake", "is_done")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._error: BaseException | None = None
        self._wake: _Wake | None = None
        self.is_done = True  # nobody is to await it before it is begun

    def __await__(self) -> Generator[Any, None, None]:
        if not self.is_done:
            self._asyncio_future_blocking = True
            yield self
        self.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, wake: _Wake, *, context: Context) -> None:
        self._wake, self._context = wake, context

    def result(self) -> None:
        """Raise the error that ended the wait, if one did: once, so that nothing holds its frames."""
        if self._error is None:
            return
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error

    def end(self, error: BaseException | None = None, *, soon: bool = False) -> None:
        """Wake the task. `soon`: in the next round of the loop, because another task is running now."""
        if self.is_done:
            return
        self.is_done, self._error = True, error
        wake, self._wake = self._wake, None
        if wake is None:
            return
        if soon:
            self._loop.call_soon(wake, self, context=self._context)
        else:
            self._context.run(wake, self)

    def cancel(self, msg: object = None) -> bool:
        """Cancel the wait, as a Task does that is cancelled itself."""
        if self.is_done:
            return False
        self.end(
            asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg), soon=True
        )
        return True


class AsyncLink(asyncio.BufferedProtocol):
    """One connection and its reader, for one event loop."""

    __slots__ = (
        "_arrival",
        "_buffer",
        "_count",
        "_due",
        "_granted",
        "_has_ended",
        "_is_plain",
        "_loop",
        "_reader",
        "_replies",
        "_timer",
        "_transport",
        "_wait",
        "_wakes_at",
        "_writer",
        "generation",
        "is_dropped",
        "used",
    )

    is_interrupted = False  # no signal's handler raises in a task

    def __init__(self, connection: Any, generation: int) -> None:
        stream: Any = connection._reader
        # It closes its transport when it goes.
        self._writer: asyncio.StreamWriter = connection._writer
        connection._reader = connection._writer = None  # redis-py has done its part
        self._transport: Any = self._writer.transport
        self._is_plain = self._transport.get_extra_info("sslcontext") is None
        self._loop = asyncio.get_running_loop()
        self._reader: Any = hiredis.Reader(notEnoughData=NOT_YET)
        self._buffer = memoryview(bytearray(_READ_SIZE))  # a view: asyncio's TLS fills slices of it
        self._replies: list[Any] = []
        self._count = 0
        self._arrival = Arrival(self._loop)  # done, unless an exchange is under way
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0  # time.monotonic(), as the next
        self._due: float | None = None
        self._granted = 0.0  # seconds that the loop's lateness has added to it
        self._has_ended = stream._eof or self._transport.is_closing()
        self._wait = watch(self._transport.get_extra_info("socket"))
        self.generation = generation
        self.is_dropped = False
        self.used = False
        self._transport.set_protocol(self)
        if early := bytes(stream._buffer):  # the server spoke before it was asked: it refuses us
            self._take(early, len(early))

    @classmethod
    async def open(
        cls, server: Server, deadline: float, lateness: Lateness
    ) -> tuple[AsyncLink, float]:
        """Connect, say who we are, and learn which server answers and its clock, before `deadline`.

        Returns the deadline too: the loop's own work has moved it.
        """
        generation = server.generation
        until = min(deadline, time.monotonic() + server.settings.connect_timeout)
        with LateBy(lateness) as late:
            connection = await server.connection_soon(until)
        async with IdleTimeout(lateness, until + late.seconds) as wait:
            connection.until = wait.moved
            await connection.connect()
        deadline += wait.deadline - until
        link = cls(connection, generation)
        try:
            asked_ns = time.monotonic_ns()
            packed = pack([command for _, command in server.handshake])
            count, now = len(server.handshake), time.monotonic()
            replies = await link.exchange(packed, count, deadline, now)
            greeted(replies, server, asked_ns, link)
        except BaseException:
            link.close()
            raise
        return link, deadline

    async def exchange(self, packed: bytes, count: int, deadline: float, now: float) -> list[Any]:
        """Send, then read `count` replies before `deadline` (time.monotonic(), as `now`)."""
        if deadline <= now:
            raise TimeoutError
        if self._replies and self.used:
            raise EOFError(TOO_MANY)
        if self._has_ended:
            raise EOFError(self._last_words())
        arrival = self._arrival
        self._count = count
        self._due, self._granted = deadline, 0.0
        if self._timer is None or self._wakes_at > deadline:
            self._wind(deadline)
        arrival.is_done = False
        try:
            self._transport.write(packed)
            await arrival
        finally:
            arrival.is_done, self._due = True, None
        replies, self._replies = self._replies, []
        return replies

    @property
    def heard(self) -> list[Any]:
        """Return the replies that have arrived to a batch that was not answered in time."""
        return self._replies

    # Called by the transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._take(self._buffer, nbytes)

    def eof_received(self) -> None:
        self._end(EOFError(self._last_words()))

    def connection_lost(self, exc: BaseException | None) -> None:
        if exc is None or (isinstance(exc, ConnectionResetError) and self._is_refused()):
            exc = EOFError(self._last_words())
        self._end(exc)

    def _take(self, data: bytes | memoryview, size: int) -> None:
        """Read replies. Bytes that nobody asked for are kept: see exchange and is_alive."""
        replies = self._replies
        try:
            self._reader.feed(data, 0, size)
            replies.extend(iter(self._reader.gets, NOT_YET))
        except Exception as error:  # these bytes are no reply of Redis
            self._end(error)
            return
        if self._due is None:
            return
        if len(replies) == self._count:
            self._arrival.end(soon=not self._is_plain)  # TLS goes on with what it has read
        elif len(replies) > self._count:
            self._end(EOFError(TOO_MANY))

    def _end(self, error: BaseException) -> None:
        """End the connection: with it the exchange that is under way, and each later one."""
        self._has_ended = True
        self._arrival.end(error, soon=not self._is_plain)

    def _is_refused(self) -> bool:
        """Return whether the last that the server said is why it closes: see sync.py."""
        return bool(self._replies) and isinstance(self._replies[-1], ReplyError)

    def _last_words(self) -> str:
        return told_by(self._replies[-1]) if self._is_refused() else NO_REPLY

    # Time

    def _wind(self, at: float) -> None:
        """Set the timer. One that is due before an exchange's end looks then, and is set again."""
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = at
        self._timer = self._loop.call_later(at - time.monotonic(), self._tick)

    def _tick(self) -> None:
        self._timer, due, now = None, self._due, time.monotonic()
        if due is None:
            return
        late = now - due
        if late < 0:
            self._wind(due)
        elif late > _LATE_S and self._granted < OWN_LIMIT_S:
            # The loop was busy when this was due: read first the bytes that have arrived meanwhile.
            self._granted += late
            self._due = now + late
            self._wind(self._due)
        else:
            self._transport.abort()
            self._end(TimeoutError())

    # Between exchanges

    def is_quiet(self) -> bool:
        """Return whether the idle connection is open and silent. Costs a system call."""
        return not (self._wait(0) or self._has_ended or self._replies) and self._is_open()

    async def is_alive(self) -> bool:
        """Return the same, once the event loop has seen what it had no time for when it came."""
        if self._wait(0):
            # It looks at its sockets in the first round, and reads in the second.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return not (self._has_ended or self._replies) and self._is_open()

    def _is_open(self) -> bool:
        return not self._transport.is_closing()

    def close(self) -> None:
        self._transport.abort()
