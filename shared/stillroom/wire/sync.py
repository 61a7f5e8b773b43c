"""The wire for threads and greenlets: one batch, one send, one connection of one's own while it lasts."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # no stubs: signal's functions stand for it
import _socket
import queue
import signal
import socket
import ssl
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import hiredis

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.readable import watch
from stillroom.wire.breaker import Breaker
from stillroom.wire.failure import is_turned_away, unavailable
from stillroom.wire.forks import reset_after_fork
from stillroom.wire.outcome import (
    PeerFailed,
    checked,
    ended,
    greeted,
    is_dead,
    is_there,
    judged,
    may_repeat,
    refusal,
    told_by,
)
from stillroom.wire.server import (
    CLUSTER_IS_DOWN,
    NO_REPLY,
    NOT_YET,
    PING,
    TOO_MANY,
    Command,
    ReplyError,
    Server,
    pack,
    pack_timed,
)

_READ_SIZE = 16 * 1024
_LARGE_SEND = 8 * 1024  # more than an empty socket buffer is sure to take at once
# The kernel's own timeout (SO_RCVTIMEO) for a receive that is tried at once: two ticks of a slow kernel, seconds.
_SLICE_S = 0.005
# Signals that may come in a flood, and whether one has a handler: then each of them interrupts a receive. Not those
# that servers have handlers for (SIGUSR1 and others): no flood of them is known, and each call would pay for it.
_FLOODS = tuple(map(int, (signal.SIGALRM, signal.SIGPROF, signal.SIGVTALRM, signal.SIGCHLD)))
_INTERRUPTIONS = 100  # are waited out; whoever goes on is heard
_handler_of = _signal.getsignal  # signal's own makes an enum of each answer


class Link:
    """One connection and its reader."""

    __slots__ = (
        "__weakref__",
        "_buffer",
        "_connection",
        "_is_plain",
        "_patience",
        "_reader",
        "_server",
        "_socket",
        "_timeout",
        "_wait",
        "generation",
        "heard",
        "is_interrupted",
        "used",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        # Any: its stubs do not know that it reads buffers.
        self._reader: Any = hiredis.Reader(notEnoughData=NOT_YET)
        self._buffer = bytearray(_READ_SIZE)
        self._patience = server.settings.command_timeout
        self._connection: Any = None
        self._is_plain = False
        self._timeout = 0.0
        self.generation = server.generation
        self.heard: Sequence[Any] = ()  # the replies so far to a batch that has not all of them
        self.is_interrupted = False  # a TimeoutError of the app's ended a batch
        self.used = False

    def open(self, deadline: float) -> None:
        """Connect, say who we are, and learn which server answers and its clock, before `deadline`."""
        server = self._server
        patience = time.monotonic() + server.settings.connect_timeout
        self._connection = server.connection(min(deadline, patience))
        self._connection.connect()
        self._socket = self._connection._get_socket()
        self._is_plain = _is_plain(self._socket)
        if self._is_plain:
            self._socket.settimeout(None)
            timeval = struct.pack("@ll", 0, int(_SLICE_S * 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._wait = watch(self._socket)
        asked = time.monotonic_ns()
        packed = pack([command for _, command in server.handshake])
        replies = self.exchange(packed, len(server.handshake), deadline, time.monotonic())
        greeted(replies, server, asked, self)

    def ping(self, *, to_read: bool = False) -> None:
        """Send one PING, and look at who answers. Raises RedisUnavailable.

        `to_read`: a server that refuses the PING alone answers, too: it can't write its file, or this user lacks
        the right, and reads are answered.
        """
        server, now, asked = self._server, time.monotonic(), time.monotonic_ns()
        look, count = server.look(now)
        read, reads = server.read_of_a_node() if to_read else (b"", 0)
        packed, expected = PING + look + read, 1 + count + reads
        pong, *looked = self.exchange(packed, expected, now + self._patience, now)
        if isinstance(pong, ReplyError) and not (to_read and is_there(str(pong))):
            raise refusal([pong])
        if reads and str(looked.pop()).startswith(CLUSTER_IS_DOWN):
            raise refusal([ReplyError(CLUSTER_IS_DOWN)])
        server.looked(looked, asked)

    def exchange(self, packed: bytes, count: int, deadline: float, now: float) -> list[Any]:
        """Send, then read `count` replies before `deadline` (time.monotonic(), as `now`)."""
        left = deadline - now
        if left <= 0:
            raise TimeoutError
        sock, is_plain = self._socket, self._is_plain
        if not is_plain or len(packed) > _LARGE_SEND:
            self._send_in_time(packed, left)
            left = deadline - time.monotonic()
        else:
            sock.sendall(packed)
        buffer, reader = self._buffer, self._reader
        replies: list[Any] = []
        reset: OSError | None = None
        while True:
            # A plain socket blocks for five milliseconds by the kernel's own timeout, which costs no system call
            # and is enough for nearly every reply; then `_wait` takes over. The kernel's timeout alone would
            # not do: it begins again with each receive that a signal interrupts (PEP 475 repeats it), so a signal
            # every 50 ms would hold a call of 100 ms for ever. Where a flood of signals could do that to five
            # milliseconds, that is first.
            if not is_plain or left < _SLICE_S or any(map(_handler_of, _FLOODS)):
                self._await_data(left)
            try:
                size = sock.recv_into(buffer)
            except BlockingIOError:  # the kernel's word for a timeout of a plain socket
                self._await_data(deadline - time.monotonic())
                size = sock.recv_into(buffer)
            except ConnectionResetError as error:
                size, reset = 0, error
            if not size:
                raise _ended(replies, reset)
            reader.feed(buffer, 0, size)
            reply = reader.gets()
            if count == 1 and reply is not NOT_YET and not reader.has_data():  # nearly always
                return [reply]
            if self._takes_all(replies, reply, count):
                self.heard = ()  # an idle connection keeps no values
                return replies
            self.heard = replies
            left = deadline - time.monotonic()

    def _takes_all(self, replies: list[Any], reply: Any, count: int) -> bool:
        """Add this reply and those behind it to the others. Return whether they are all now. Raises EOFError."""
        if reply is not NOT_YET:
            replies += [reply, *iter(self._reader.gets, NOT_YET)]
        if len(replies) > count:
            raise EOFError(TOO_MANY)
        return len(replies) == count

    def _await_data(self, left: float) -> None:
        """Wait until a plain socket has data; have a receive of TLS or greenlets wait so long, in its own way."""
        if not self._is_plain:
            self._wait_at_most(left)
        elif left <= 0 or not self._wait(left * 1000):
            raise TimeoutError

    def _wait_at_most(self, left: float) -> None:
        """Set how long each call of a socket of TLS or greenlets waits."""
        if left <= 0:
            raise TimeoutError
        seconds = min(left, self._patience)
        if seconds != self._timeout:
            self._socket.settimeout(seconds)
            self._timeout = seconds

    def _send_in_time(self, packed: bytes, left: float) -> None:
        """Send everything in time, however small the pieces are that the server takes."""
        if len(packed) <= _LARGE_SEND:
            self._wait_at_most(left)
            self._socket.sendall(packed)
            return
        self._socket.settimeout(left)
        self._socket.sendall(packed)
        self._timeout = 0.0
        if self._is_plain:
            self._socket.settimeout(None)

    def failed(self, error: BaseException, deadline: float) -> None:
        """Take in why an exchange has failed. A timeout before its deadline was raised by a signal's handler."""
        if isinstance(error, TimeoutError) and error.errno is None:
            self.is_interrupted = time.monotonic() < deadline - _SLICE_S

    def is_alive(self) -> bool:
        """Return whether the idle connection is open and silent. Costs a system call."""
        if not self._wait(0):
            return True
        # Something came: under TLS perhaps nothing that concerns us.
        self._socket.settimeout(0)
        self._timeout = 0.0
        try:
            self._socket.recv(1)  # a byte or an end, either way not a clean connection
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            self._socket.settimeout(None if self._is_plain else self._patience)
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()


def _ended(replies: Sequence[Any], reset: OSError | None) -> Exception:
    """Return why a connection has ended: what the server said last, if that was an error.

    A server that is full or protected says so, and closes before it reads what the client sent. Where that has
    arrived already, the system resets the connection instead of ending it.
    """
    if replies and isinstance(replies[-1], ReplyError):
        return EOFError(told_by(replies[-1]))
    return reset or EOFError(NO_REPLY)


def _is_plain(sock: Any) -> bool:
    """Return whether receive is the system's own call, which it is not with TLS, gevent and eventlet."""
    return type(sock).recv_into is _socket.socket.recv_into


def _wait_out(until: float) -> None:
    """Wait until then (time.monotonic()), whatever interrupts it meanwhile. Raises the last interruption then."""
    interruption: BaseException | None = None
    for _ in range(_INTERRUPTIONS):
        if (left := until - time.monotonic()) <= 0:
            break
        try:
            time.sleep(left)
        except BaseException as error:  # a second timeout of gevent's, another signal
            interruption = error
    if interruption is not None:
        raise interruption


class Wire:
    """Batches to one server. Thread-safe, fork-safe; under gevent and eventlet greenlets are its threads."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._settings = server.settings
        self._patience = server.settings.command_timeout
        self.breaker = Breaker(self._settings, server.name, self._probe)
        # Called where a probe fails: the server may be full of connections that nobody uses meanwhile.
        self.probed_in_vain: list[Callable[[], object]] = [self._discard_idle]
        if server.watch is not None:
            server.watch.news.append(self.breaker.hurry)
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Have no connections: they belong to the parent of a forked process."""
        self._idle: queue.SimpleQueue[Link] = queue.SimpleQueue()
        # Who waits in line for one of them, each at a place of its own, or (None) to be told to open one.
        self._waiting: deque[queue.SimpleQueue[Link | None]] = deque()
        # Not a counter: an exception out of a signal handler can strike between any two steps, and a link that
        # is lost that way leaves this set, and closes, when it is collected.
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
        self._lock = threading.RLock()  # a signal handler may call while this thread holds it
        self.breaker.reset()

    @property
    def connections(self) -> int:
        """Return how many connections are open now."""
        return len(self._links)

    def execute(
        self,
        commands: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
    ) -> list[Any]:
        """Return the replies to one batch, in order. `left`: seconds the call may still take.

        Raises RedisUnavailable, or RedisRefused if a reply is an error. The batch is sent a second time only if
        an idle connection turned out dead and doing it twice does no harm. `timed`: its scripts are told while
        this caller waits (IN_TIME); it is sent once, and if its connection dies, that time is waited out: what
        is still on its way then is refused.
        """
        if self.breaker.is_open or left <= 0:
            raise self.breaker.no_call()
        once = timed or not idempotent
        now = time.monotonic()
        deadline = now + left
        link: Link | None = None
        try:
            link = self._lease(check=once)
            if link is None:
                link = self._open_or_await(deadline)
                now = time.monotonic()  # it may have waited in line
            if timed:
                replies = self._exchange_timed(link, commands, deadline)
            else:
                packed = pack(commands)
                try:
                    if link.used and now < self.server.due:
                        # As _exchange, and past it: this is run on every hit.
                        until = min(deadline, now + self._patience)
                        replies = link.exchange(packed, len(commands), until, now)
                    else:
                        when = time.monotonic()
                        replies = self._exchange(link, packed, len(commands), deadline, when)
                except BaseException as error:
                    link.failed(error, min(deadline, now + self._patience))
                    self._drop(link)
                    if once or not link.used or not is_dead(error):
                        raise
                    self._leave(link)
                    link = self._open_or_await(deadline)
                    when = time.monotonic()
                    replies = self._exchange(link, packed, len(commands), deadline, when)
            self._idle.put(link)
            if self._waiting:  # as _give_back
                self._serve()
            return checked(replies, self.breaker)
        except PeerFailed as failed:
            return self._ask_another(link, commands, failed, deadline, once=once, timed=timed)
        except BaseException as error:
            return ended(commands, link, error, self.breaker)

    def _ask_another(
        self,
        left: Link | None,
        commands: Sequence[Command],
        failed: PeerFailed,
        deadline: float,
        *,
        once: bool,
        timed: bool,
    ) -> list[Any]:
        """Return another server's replies. The one that answered is not, or no longer, the one to talk to.

        The batch is sent once more where nothing of it can have been applied, or twice does no harm.
        """
        if left is not None:
            self._leave(left)
        try:
            if not may_repeat(commands, failed.replies, idempotent=not once):
                failed.is_in_doubt = True
                raise failed
            link = self._open_or_await(deadline)
            if timed:
                replies = self._exchange_timed(link, commands, deadline)
            else:
                packed, when = pack(commands), time.monotonic()
                replies = self._exchange(link, packed, len(commands), deadline, when)
            self._give_back(link)
            return checked(replies, self.breaker)
        except RedisRefused:
            raise
        except BaseException as error:
            raise judged(error, self.breaker) from None

    def _exchange(
        self, link: Link, packed: bytes, count: int, deadline: float, now: float
    ) -> list[Any]:
        """Return the replies. Now and then the batch also asks for the server's clock and role."""
        patience = now + self._patience
        if patience < deadline:
            deadline = patience
        try:
            if now >= self.server.due:
                replies = self._exchange_looking(link, packed, count, deadline, now)
            else:
                replies = link.exchange(packed, count, deadline, now)
        except BaseException as error:
            # After any error unread replies may follow on this connection, so no call may use it again.
            link.failed(error, deadline)
            self._drop(link)
            raise
        link.used = True
        return replies

    def _exchange_looking(
        self, link: Link, packed: bytes, count: int, deadline: float, now: float
    ) -> list[Any]:
        """Return the replies to a batch that asks for the server's clock and role as well."""
        look, riding = self.server.look(now)
        asked = time.monotonic_ns()
        replies = link.exchange(packed + look, count + riding, deadline, now)
        look_replies = replies[-riding:]
        del replies[-riding:]
        try:
            self.server.looked(look_replies, asked)
        except RedisUnavailable as failure:
            told = self.server.explain(failure)
            raise PeerFailed(told.reason, told.detail, replies) from None
        return replies

    def _exchange_timed(
        self, link: Link, commands: Sequence[Command], deadline: float
    ) -> list[Any]:
        """Exchange a batch whose scripts are told until when they may act."""
        server, now = self.server, time.monotonic()
        if not server.is_clock_good:
            server.due = 0.0
            try:
                self._exchange(link, b"", 0, deadline, now)
            except BaseException:
                link.heard = ()  # these are no replies to the batch
                raise
            now = time.monotonic()
        given_up = min(deadline, now + self._patience)
        packed = pack_timed(commands, server.in_time(now, given_up))
        try:
            return self._exchange(link, packed, len(commands), given_up, now)
        except PeerFailed:
            raise
        except BaseException:  # also an interruption: its caller may invalidate next
            _wait_out(given_up)
            raise

    def _lease(self, *, check: bool) -> Link | None:
        """Return an idle connection, or None if there is none."""
        while True:
            try:
                link = self._idle.get_nowait()
            except queue.Empty:
                return None
            if link.generation == self.server.generation and (not check or link.is_alive()):
                return link
            self._drop(link)

    def _open_or_await(self, deadline: float) -> Link:
        """Open a connection, or wait in line. Raises RedisUnavailable when `pool_timeout` is over."""
        until = min(deadline, time.monotonic() + self._settings.pool_timeout)
        while True:
            if link := self._open_link(deadline) or self._await_idle(until):
                return link

    def _open_link(self, deadline: float) -> Link | None:
        """Open a connection, or wait for another one if the server takes no more of them.

        Return None if there are as many as allowed.
        """
        link = Link(self.server)
        with self._lock:
            if len(self._links) >= self._settings.pool_size:
                return None
            self._links.add(link)
        try:
            link.open(deadline)
        except Exception as error:
            self._close(link)  # nobody is woken: a server that is full has no room for them either
            failure = unavailable(error)
            if is_turned_away(failure) and (other := self._await_let_in(deadline)):
                return other
            self._hand_on(None)
            self.server.doubt()
            raise (error if failure is None else self.server.explain(failure)) from None
        except BaseException:
            self._drop(link)
            raise
        return link

    def _await_let_in(self, deadline: float) -> Link | None:
        """Return a connection that the server has let in, or None if it may have let in none.

        Raises RedisUnavailable if those are in use for too long.
        """
        if not self._links:
            return None
        until = min(deadline, time.monotonic() + self._settings.pool_timeout)
        try:
            return self._await_idle(until, is_turned_away=True) or self._open_link(until)
        except RedisUnavailable:
            with self._lock:
                if any(link.used for link in self._links):
                    raise
        return None

    def _leave(self, link: Link) -> None:
        """Close this connection and all others to the same server, which is not the one to talk to."""
        self.server.leave(link.generation)
        self.server.doubt()
        self._drop(link)
        self._discard_idle()

    def _give_back(self, link: Link) -> None:
        self._idle.put(link)
        if self._waiting:
            self._serve()

    def _await_idle(self, until: float, *, is_turned_away: bool = False) -> Link | None:
        """Wait in line. Return None if there may be room to open one. Raises RedisUnavailable when time is up.

        At a place of its own: where a thread that calls again at once takes what woke another one, Python's
        SimpleQueue forgets that one's timeout, and it waits for as long as that goes on.
        """
        place: queue.SimpleQueue[Link | None] = queue.SimpleQueue()
        self._waiting.append(place)
        try:
            self._serve()  # one may have come back before this stood in line, or have been closed
            if len(self._links) < self._settings.pool_size and not is_turned_away and place.empty():
                return None
            return place.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            busy = f"{len(self._links)} connections are in use"
            raise RedisUnavailable("pool", busy) from None
        finally:
            with self._lock, suppress(ValueError):
                self._waiting.remove(place)
            with suppress(queue.Empty):  # it came too late, or a signal's handler raised
                late = place.get_nowait()
                self._hand_on(None) if late is None else self._give_back(late)

    def _serve(self) -> None:
        """Hand idle connections to those who wait in line."""
        while self._waiting:
            try:
                link = self._idle.get_nowait()
            except queue.Empty:
                return
            if not self._hand_on(link):  # another thread has served them
                self._idle.put(link)

    def _hand_on(self, link: Link | None) -> bool:
        """Give the first in line a connection, or None: there is room for one. Return whether anybody waits.

        Whoever leaves the line meanwhile takes the lock too, and finds what they were given.
        """
        with self._lock, suppress(IndexError):
            self._waiting.popleft().put(link)
            return True
        return False

    def _drop(self, link: Link) -> None:
        self._close(link)
        self._hand_on(None)

    def _close(self, link: Link) -> None:
        with self._lock:
            self._links.discard(link)
        link.close()

    def forget(self) -> None:
        """Close all connections, those in use after their reply: the server has left its cluster."""
        self.server.leave()
        self._discard_idle()
        self.breaker.leave()

    def _discard_idle(self) -> None:
        """Close all idle connections."""
        while True:
            try:
                self._drop(self._idle.get_nowait())
            except queue.Empty:
                return

    def _probe(self) -> None:
        """See whether the server answers again, on a new connection. Raises RedisUnavailable.

        Where it does, the connections of before are left. A firewall or NAT that has forgotten them drops what they
        send without a word, so each of them would cost a call its deadline, and five of them the next outage.
        """
        self.ping(to_read=True)
        self.server.leave()

    def ping(self, *, to_read: bool = False) -> None:
        """Send one PING on a connection of its own, whatever the breaker says. Raises RedisUnavailable.

        See Link.ping.
        """
        link = Link(self.server)
        try:
            patience = self._settings.connect_timeout + self._settings.command_timeout
            link.open(time.monotonic() + patience)
            link.ping(to_read=to_read)
        except Exception as error:
            self.server.doubt()
            for let_go in self.probed_in_vain:
                let_go()
            failure = unavailable(error)
            raise (error if failure is None else self.server.explain(failure)) from None
        finally:
            link.close()

    def close(self) -> None:
        """Close every idle connection and end the prober. The wire can be used again."""
        self.breaker.stop()
        if self.server.watch is not None:
            self.server.watch.stop()
        self._discard_idle()
