"""The wire for threads and greenlets: one batch, one send, one connection of one's own while it lasts."""

from __future__ import annotations

import _socket
import queue
import select
import socket
import ssl
import struct
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import hiredis

from stillroom.errors import RedisUnavailable
from stillroom.wire.breaker import Breaker
from stillroom.wire.forks import reset_after_fork
from stillroom.wire.outcome import checked, greeted, judged, refusal, unavailable
from stillroom.wire.server import Command, ReplyError, Server, pack

_READ_SIZE = 16 * 1024
_LARGE_SEND = 32 * 1024  # more than a socket buffer is sure to take at once


class Link:
    """One connection and its reader."""

    __slots__ = (
        "__weakref__",
        "_buffer",
        "_connection",
        "_is_timed_by_kernel",
        "_patience",
        "_poll",
        "_reader",
        "_server",
        "_socket",
        "used",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader: Any = hiredis.Reader()  # its stubs do not know that it reads buffers
        self._buffer = bytearray(_READ_SIZE)
        self._patience = server.settings.command_timeout
        self._connection: Any = None
        self._is_timed_by_kernel = False
        self.used = False

    def open(self, left: float) -> None:
        """Connect, say who we are, and learn the server's clock, all in `left` seconds (but for a slow DNS)."""
        deadline = time.monotonic() + left
        self._connection = self._server.connection(min(left, self._server.settings.connect_timeout))
        self._connection.connect()
        self._socket = self._connection._get_socket()
        self._is_timed_by_kernel = _can_be_timed_by_kernel(self._socket)
        if self._is_timed_by_kernel:
            self._socket.settimeout(None)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._shorten(deadline)
        asked = time.monotonic_ns()
        handshake = self._server.handshake
        greeted(self.exchange(pack(handshake), len(handshake), deadline), self._server, asked)
        self._wait_at_most(self._patience)

    def ask(self, command: Command) -> Any:
        """The reply to one command. Raises RedisRefused."""
        (reply,) = self.exchange(pack([command]), 1, time.monotonic() + self._patience)
        if isinstance(reply, ReplyError):
            raise refusal([reply])
        return reply

    def exchange(self, packed: bytes, count: int, deadline: float) -> list[Any]:
        """Send, then read `count` replies before `deadline` (time.monotonic()).

        The socket's own timeout covers the usual case, one receive, for nothing. It starts again with each
        receive, so a link that drips would hold the call for ever: from the second one on it is what is left.
        """
        sock, reader = self._socket, self._reader
        replies: list[Any] = []
        try:
            if shortened := len(packed) > _LARGE_SEND:
                self._send_large(packed, deadline)
            else:
                sock.sendall(packed)
            while True:
                size = sock.recv_into(self._buffer)
                if not size:
                    raise EOFError("the server closed the connection")
                reader.feed(self._buffer, 0, size)
                while len(replies) < count:
                    reply = reader.gets()
                    if reply is False:  # RESP2 has no booleans: hiredis' word for "not yet"
                        break
                    replies.append(reply)
                else:
                    break
                shortened = self._shorten(deadline)
        except BlockingIOError:
            raise TimeoutError from None  # the kernel's word for it
        if shortened:
            self._wait_at_most(self._patience)
        return replies

    def _send_large(self, packed: bytes, deadline: float) -> None:
        """All of it before the deadline: the kernel's time begins again with each piece that the server takes."""
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        self._socket.sendall(packed)
        if self._is_timed_by_kernel:
            self._socket.settimeout(None)
        self._shorten(deadline)

    def _shorten(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._wait_at_most(left)
        return True

    def _wait_at_most(self, seconds: float) -> None:
        """For each call of the socket. The kernel does that for nothing; Python's own timeout makes a system call
        more, before each send and receive."""
        if self._is_timed_by_kernel:
            whole = int(seconds)
            timeval = struct.pack("@ll", whole, max(1, int((seconds - whole) * 1_000_000)))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        else:
            self._socket.settimeout(seconds)

    def limit(self, seconds: float) -> None:
        """Be less patient than usual, for this exchange."""
        if seconds <= 0:
            raise TimeoutError
        self._wait_at_most(seconds)

    def unlimit(self) -> None:
        self._wait_at_most(self._patience)

    def is_alive(self) -> bool:
        """Whether the idle connection is open and silent. Costs a system call."""
        if not self._poll.poll(0):
            return True
        # Something came: under TLS perhaps nothing that concerns us.
        self._socket.settimeout(0)
        try:
            self._socket.recv(1)  # a byte or an end, either way not a clean connection
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            self._socket.settimeout(None if self._is_timed_by_kernel else self._patience)
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()


def _can_be_timed_by_kernel(sock: Any) -> bool:
    """Whether its receive is the system's own call: TLS, and gevent, have theirs."""
    is_plain = type(sock).recv_into is _socket.socket.recv_into
    return is_plain and sys.platform == "linux"


class Wire:
    """Batches to one server. Thread-safe, fork-safe; under gevent greenlets are its threads."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._settings = server.settings
        self.breaker = Breaker(self._settings, server.name, self.ping)
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """No connections: they belong to the parent of a forked process."""
        self._idle: queue.SimpleQueue[Link] = queue.SimpleQueue()
        # Not a counter: an exception out of a signal handler can strike between any two steps, and a link that
        # is lost that way leaves this set, and closes, when it is collected.
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.breaker.reset()

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._links)

    def execute(
        self, commands: Sequence[Command], left: float, *, idempotent: bool = True
    ) -> list[Any]:
        """The replies to one batch, in order. `left`: seconds the call may still take.

        Raises RedisUnavailable, or RedisRefused if a reply is an error. The batch is sent a second time only if
        an idle connection turned out dead and doing it twice does no harm.
        """
        if self.breaker.is_open:
            raise RedisUnavailable("breaker", self.breaker.reason)
        if left <= 0:
            raise RedisUnavailable("budget")
        packed = pack(commands)
        started = time.monotonic()
        try:
            link = self._lease(left, check=not idempotent)
            try:
                if not link.used:
                    left -= time.monotonic() - started
                replies = self._exchange(link, packed, len(commands), left)
            except (OSError, EOFError) as error:
                if isinstance(error, TimeoutError) or not (link.used and idempotent):
                    raise
                self._discard_idle()
                left -= time.monotonic() - started
                link = self._open_link(left) or self._await_idle(left)
                replies = self._exchange(link, packed, len(commands), left)
        except BaseException as error:
            raise judged(error, self.breaker) from None
        self._idle.put(link)
        return checked(replies, self.breaker)

    def _exchange(self, link: Link, packed: bytes, count: int, left: float) -> list[Any]:
        patience = self._settings.command_timeout
        hurried = left < patience
        try:
            if hurried:
                link.limit(left)
            deadline = time.monotonic() + (left if hurried else patience)
            replies = link.exchange(packed, count, deadline)
        except BaseException:
            # Whatever it was, unread replies may follow on this connection: nobody may use it again.
            self._drop(link)
            raise
        if hurried:
            link.unlimit()
        link.used = True
        return replies

    def _lease(self, left: float, *, check: bool) -> Link:
        while True:
            try:
                link = self._idle.get_nowait()
            except queue.Empty:
                return self._open_link(left) or self._await_idle(left)
            if not check or link.is_alive():
                return link
            self._drop(link)

    def _open_link(self, left: float) -> Link | None:
        """A new connection, or None if there are as many as there may be."""
        link = Link(self.server)
        with self._lock:
            if len(self._links) >= self._settings.pool_size:
                return None
            self._links.add(link)
        try:
            link.open(left)
        except BaseException:
            self._drop(link)
            raise
        return link

    def _await_idle(self, left: float) -> Link:
        try:
            return self._idle.get(timeout=min(left, self._settings.pool_timeout))
        except queue.Empty:
            busy = f"{self._settings.pool_size} connections are in use"
            raise RedisUnavailable("pool", busy) from None

    def _drop(self, link: Link) -> None:
        with self._lock:
            self._links.discard(link)
        link.close()

    def _discard_idle(self) -> None:
        """One idle connection was dead: its server went away, so all of them are."""
        while True:
            try:
                self._drop(self._idle.get_nowait())
            except queue.Empty:
                return

    def ping(self) -> None:
        """One PING on a connection of its own, whatever the breaker says. Raises RedisUnavailable."""
        link = Link(self.server)
        try:
            link.open(self._settings.connect_timeout + self._settings.command_timeout)
            link.ask((b"PING",))
        except Exception as error:
            raise unavailable(error) or error from None
        finally:
            link.close()

    def close(self) -> None:
        """Close every idle connection and end the prober. The wire can be used again."""
        self.breaker.stop()
        self._discard_idle()
