"""One Redis server as both wires see it: how to reach it, and its clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import hiredis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

import redis
from stillroom.settings import Settings

# Never a number: hiredis packs one through repr(), which may run a signal handler, and does not look at the
# result. A handler that raises just then ends the process (hiredis 3.5, src/pack.c).
# One that is sent often may be the bytes that `pack` makes of it: packing costs more than a system call.
Command = tuple[bytes | str, ...] | bytes

CLOCK_GOOD_FOR_NS = 60_000_000_000

pack_command: Any = hiredis.pack_command  # its stubs want a tuple of one
ReplyError = hiredis.ReplyError


class Clock(Protocol):
    """A server's clock, as far as this process knows it."""

    def now_ms(self) -> int:
        """ms since 1970."""

    def learn_clock(self, reply: Sequence[bytes], asked_ns: int, *, anew: bool = False) -> None:
        """See Server.learn_clock."""


class Server:
    """The address and manners of one server, and how far its clock is from ours."""

    def __init__(self, settings: Settings, url: str, name: str) -> None:
        self.settings = settings
        self.name = name
        self.run = b""  # the server's run id, as the newest connection heard it; empty while it is not known
        # redis-py as a connection factory, without its patience: the wire keeps the deadlines. RESP2, because
        # pushes on RESP3 switch off redis-py's check for unread replies, and two handshake replies are enough.
        pool = redis.ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=settings.connect_timeout,
            socket_connect_timeout=settings.connect_timeout,
            driver_info=None,
            health_check_interval=0,
        )
        self._options: dict[str, Any] = dict(pool.connection_kwargs)
        self.handshake = _handshake({"password": settings.password, **self._options})
        self._connection_class = pool.connection_class
        self._clock_offset_ns = time.time_ns() - time.monotonic_ns()  # until the first connection
        self._clock_error_ns = 0
        self._clock_read_ns = -CLOCK_GOOD_FOR_NS

    def connection(self, seconds: float) -> Any:
        """A new redis-py connection that will connect (TCP, TLS, socket) and no more, each in so many seconds."""
        options = self._options | {"socket_connect_timeout": seconds, "socket_timeout": seconds}
        return self._connection_class(
            retry=Retry(NoBackoff(), 0), redis_connect_func=_connected, **options
        )

    def async_connection(self) -> Any:
        """The same for asyncio."""
        kinds = {
            redis.SSLConnection: redis.asyncio.SSLConnection,
            redis.UnixDomainSocketConnection: redis.asyncio.UnixDomainSocketConnection,
        }
        kind = kinds.get(self._connection_class, redis.asyncio.Connection)
        retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
        return kind(retry=retry, redis_connect_func=_connected, **self._options)

    def now_ms(self) -> int:
        """The server's clock, in ms since 1970, as well as this process knows it."""
        return (time.monotonic_ns() + self._clock_offset_ns) // 1_000_000

    def now_us(self) -> int:
        return (time.monotonic_ns() + self._clock_offset_ns) // 1_000

    def learn_clock(self, reply: Sequence[bytes], asked_ns: int, *, anew: bool = False) -> None:
        """Take in a reply to TIME that was asked for at `asked_ns` (time.monotonic_ns()).

        It is exact to half its round trip, so slow ones are used only for want of better. `anew`: what was known is
        wrong, the server's clock has stepped. This machine's wall clock may step as it likes: it is not looked at.
        """
        answered_ns = time.monotonic_ns()
        round_trip = answered_ns - asked_ns
        outdated = anew or answered_ns - self._clock_read_ns > CLOCK_GOOD_FOR_NS
        if outdated or round_trip <= 2 * self._clock_error_ns:
            server_ns = int(reply[0]) * 1_000_000_000 + int(reply[1]) * 1_000
            self._clock_offset_ns = server_ns - (asked_ns + answered_ns) // 2
            self._clock_error_ns = max(round_trip, 50_000)
            self._clock_read_ns = answered_ns


def _connected(_: Any) -> None:
    """Instead of redis-py's handshake, which is a round trip for each of its commands."""


def _handshake(options: Mapping[str, Any]) -> list[Command]:
    """What a new connection says first, in one batch: who it is, which database, and what time it is there."""
    commands: list[Command] = []
    if password := options.get("password"):
        username = options.get("username")
        commands.append(("AUTH", username, password) if username else ("AUTH", password))
    if database := options.get("db"):
        commands.append(("SELECT", str(database)))
    return [*commands, ("TIME",)]


def pack(commands: Sequence[Command]) -> bytes:
    """The bytes of a batch."""
    if len(commands) == 1:
        return _packed(commands[0])
    return b"".join(map(_packed, commands))


def _packed(command: Command) -> bytes:
    packed: bytes = command if type(command) is bytes else pack_command(command)
    return packed


def words_of(command: Command) -> Sequence[bytes | str]:
    """The words of a command, packed or not."""
    if not isinstance(command, bytes):
        return command
    reader = hiredis.Reader()  # a command looks like a reply: an array of texts
    reader.feed(command)
    words: list[bytes] = reader.gets()
    return words
