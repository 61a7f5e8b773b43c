"""One Redis server as both wires see it: how to reach it, which run of it that is, its role, and its clock."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import hiredis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

import redis
from stillroom.address import is_sentinel, read_sentinel
from stillroom.errors import RedisUnavailable
from stillroom.settings import Settings
from stillroom.wire.connect import DEADLINED, FOR_ASYNCIO
from stillroom.wire.explain import explained, source_of
from stillroom.wire.forks import reset_after_fork
from stillroom.wire.sentinel import Watch
from stillroom.wire.trust import trust_in

# Never a number: hiredis packs one through repr(), which may run a signal handler, and does not look at the
# result. A handler that raises just then ends the process (hiredis 3.5, src/pack.c).
# One that is sent often may be the bytes that `pack` makes of it: packing costs more than a system call.
Command = tuple[bytes | str, ...] | bytes

# In a timed batch: becomes `<from>-<to>`, in µs of the server's clock, while its caller waits for it.
IN_TIME = b"<in time>"
# TIME, and the question after the server's role, ride along with a batch this often.
LOOK_EVERY_S = 2.0
FOLLOWS_S = 1  # a replica that follows has said so this many seconds ago at the most
CLOCK_GOOD_FOR_NS = 20_000_000_000  # an older reading is no base for a deadline
# A server's clock that is being set right slowly moves 500 µs a second, the most that NTP does.
DRIFT = 2_000
LEAST_ERROR_NS = 50_000
# The clock of this machine that goes on while it sleeps. On Linux time.monotonic() stands still then.
STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

pack_command: Any = hiredis.pack_command  # its stubs want a tuple of one
ReplyError = hiredis.ReplyError
TIME: bytes = pack_command((b"TIME",))
NOT_YET = object()  # a reader's answer while a reply is incomplete
NO_REPLY = "the server closed the connection"
TOO_MANY = "the server said more than it was asked"
PING: bytes = pack_command((b"PING",))
CLUSTER_IS_DOWN = "CLUSTERDOWN The cluster is down"
ROLE: Command = ("INFO", "replication")
LOOK: bytes = TIME + pack_command(ROLE)

_RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)
# The history that a replica copied before it took over; zeros in a server that never did.
_COPIED = re.compile(rb"^master_replid2:(?!0+\b)(\w+)", re.MULTILINE)
_IS_IN_CLUSTER = re.compile(rb"^(?:redis|server)_mode:cluster", re.MULTILINE)
_VERSION = re.compile(rb"^redis_version:((\d+)\.(\d+)[\w.]*)", re.MULTILINE)
# The version that a server has at least; Valkey and others say which Redis they are like.
OLDEST = (6, 2)
_IS_REPLICA = re.compile(rb"^role:slave", re.MULTILINE)
_FOLLOWER = re.compile(rb"^slave\d+:.*\bstate=online\b.*\blag=(\d+)", re.MULTILINE)


class Clock(Protocol):
    """A server's clock, as far as this process knows it, and which run of the server it belongs to."""

    @property
    def run(self) -> bytes:
        """Return the server's run: see run_of. Empty while it is not known."""

    @property
    def primary(self) -> str | None:
        """Return where the Sentinels say that the server is; None where no Sentinel is asked."""

    def now_ms(self) -> int:
        """Return ms since 1970."""

    def ask_time(self) -> None:
        """See Server.ask_time."""

    def doubt_clock(self) -> None:
        """See Server.doubt_clock."""


class Reading(NamedTuple):
    """Hold what one reply to TIME said, in ns of this machine's monotonic clock."""

    offset: int  # from the monotonic clock to the server's
    error: int  # the offset is off by this much at the most
    at: int


class Server:
    """The address and manners of one server, which run of it answers, and how far its clock is from ours.

    `setting`: the field of the settings that holds the URL. `is_node`: one of a cluster, where a replica sends its
    clients on by itself. `is_found`: the cluster has told its address, which is not the one of the setting.
    """

    def __init__(
        self,
        settings: Settings,
        url: str,
        name: str,
        setting: str = "redis_url",
        *,
        is_node: bool = False,
        is_found: bool = False,
        probe: bytes = b"",
    ) -> None:
        self.settings = settings
        self.name = name
        self.run = b""  # see run_of, as it was last heard; empty while it is not known
        # Counts up after an outage, and when the server that answered turns out not to be, or no longer, the one to
        # talk to. Connections of an earlier generation are closed when they are looked at next.
        self.generation = 0
        self._source = source_of(settings, setting, url, is_found=is_found)
        self._is_node = is_node
        self._probe = probe  # a key that each user may read, for a node of a cluster
        # Replicas that followed when it was last known for sure who is the primary.
        self._followers = 0
        self.reset()
        reset_after_fork(self)
        # redis-py as a connection factory, without its patience: the wire keeps the deadlines. RESP2, because
        # pushes on RESP3 switch off redis-py's check for unread replies, and two handshake replies are enough.
        primary = read_sentinel(url).primary if is_sentinel(url) else url
        pool = redis.ConnectionPool.from_url(
            primary,
            protocol=2,
            socket_timeout=settings.connect_timeout,
            socket_connect_timeout=settings.connect_timeout,
            driver_info=None,
            health_check_interval=0,
        )
        self._options: dict[str, Any] = dict(pool.connection_kwargs)
        self.handshake = _handshake({"password": settings.password, **self._options})
        self._connection_class = pool.connection_class
        is_tls = self._connection_class is redis.SSLConnection
        self._trust = trust_in(primary) if is_tls else None
        self.watch = self._watch_of(url) if is_sentinel(url) else None
        self.due = 0.0  # time.monotonic(): a look rides along with the next batch after it
        self._is_clock_known = False
        # Until the first reply to TIME this machine's own clock: it may label counts, and decides nothing.
        self._reading = Reading(time.time_ns() - time.monotonic_ns(), 0, 0)

    def reset(self) -> None:
        """Make a lock that no other thread holds."""
        self._lock = threading.RLock()

    # Connecting

    def connection(self, deadline: float) -> Any:
        """Return a new redis-py connection that will connect (TCP, TLS, socket) and no more, before `deadline`."""
        where = {} if self.watch is None else self.watch.primary(deadline)
        return self._connection_to(where, deadline)

    async def connection_soon(self, deadline: float) -> Any:
        """Return a connection for asyncio, which asks `until` for its deadline: see AsyncTcpConnection.

        redis-py's own timeouts are off: they know nothing of a loop that is late.
        """
        where = {} if self.watch is None else await self.watch.primary_soon(deadline)
        kind = FOR_ASYNCIO[self._connection_class]
        retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
        options = {**self._options, "socket_connect_timeout": None, "socket_timeout": None, **where}
        connection = kind(retry=retry, redis_connect_func=_connected, **options)
        connection.ssl_context = self._trust
        return connection

    def _connection_to(self, where: Mapping[str, Any], deadline: float) -> Any:
        seconds = max(0.001, deadline - time.monotonic())
        patience = {"socket_connect_timeout": seconds, "socket_timeout": seconds}
        options = {**self._options, **patience, **where}
        kind = DEADLINED.get(self._connection_class, self._connection_class)
        connection = kind(retry=Retry(NoBackoff(), 0), redis_connect_func=_connected, **options)
        connection.deadline = deadline
        connection.ssl_context = self._trust
        return connection

    def _watch_of(self, url: str) -> Watch:
        """Return the watch that asks the Sentinels for the primary."""
        login = _handshake(self.settings.sentinel_login)
        said_first = [command for part, command in login if part == "auth"]

        def connect(host: str, port: int, deadline: float) -> Any:
            return self._connection_to({"host": host, "port": port}, deadline)

        address = read_sentinel(url)
        return Watch(self.settings, address, connect, said_first, self.ask_time, self.leave)

    def explain(self, failure: RedisUnavailable) -> RedisUnavailable:
        """Return the failure to make a connection, with the setting that leads there and what to do."""
        return explained(failure, self._source)

    # The peer

    @property
    def primary(self) -> str | None:
        """Return where the Sentinels say that the server is: `host:port`.

        None where the URL names no Sentinels, or they have named no server.
        """
        where = None if self.watch is None else self.watch.last_named
        return None if where is None else f"{where[0]}:{where[1]}"

    def leave(self, generation: int | None = None) -> None:
        """Leave the server that connections of this generation (None: of any) lead to: it is the wrong one, or they
        do not reach it.
        """
        with self._lock:
            if generation in (None, self.generation):
                self.generation += 1

    def doubt(self) -> None:
        """Note that the server that the Sentinels named was not there, or not the primary: they are asked again."""
        if self.watch is not None:
            self.watch.doubt()

    def learn_peer(self, info: Any, replication: Any) -> bool:
        """Take in what a server says of itself on a new connection, as far as this user may ask.

        True if it is another server, or another run of it, than the one before. Raises RedisUnavailable for a
        replica, for a node of a cluster that no setting names, and for a version that lacks commands.
        """
        self._refuse_replica(replication)
        self._refuse_unfit(info)
        run = run_of(info, replication)
        with self._lock:
            is_another = bool(self.run) and run != self.run
            self.run = run
            self.generation += is_another  # connections to the one before may still look alive
        return is_another

    def look(self, now: float) -> tuple[bytes, int]:
        """Return the commands that ride along with a batch, as bytes, and how many replies they have."""
        self.due = now + LOOK_EVERY_S
        if self.watch is not None:
            self.due = min(self.due, max(now, self.watch.believed_until))
        return LOOK, 2

    def read_of_a_node(self) -> tuple[bytes, int]:
        """Return a read for a node of a cluster, as bytes, and how many replies it has.

        A node of a cluster that is down answers PING, and refuses each command that names a key.
        """
        return (pack_command((b"GET", self._probe)), 1) if self._probe else (b"", 0)

    def looked(self, replies: Sequence[Any], asked_ns: int) -> None:
        """Take in the replies to a look. Raises RedisUnavailable if this is not the server to talk to."""
        clock, replication = replies
        if not isinstance(clock, ReplyError):
            self.learn_clock(clock, asked_ns)
        self._refuse_replica(replication)
        if self.run:
            self.run = run_of(b"run_id:" + self.run, replication)
        if self.watch is not None and not isinstance(replication, ReplyError):
            self._must_be_believed(replication)

    def _refuse_replica(self, replication: Any) -> None:
        is_told = not isinstance(replication, ReplyError) and not self._is_node
        if is_told and _IS_REPLICA.search(replication):
            raise RedisUnavailable("readonly")

    def _refuse_unfit(self, info: Any) -> None:
        """Raise RedisUnavailable for a server on which some calls would work and others would not."""
        if isinstance(info, ReplyError):
            return
        if not self._is_node and _IS_IN_CLUSTER.search(info):
            raise RedisUnavailable("cluster")
        version = _VERSION.search(info)
        if version and (int(version[2]), int(version[3])) < OLDEST:
            raise RedisUnavailable("old", f"it says that it is {version[1].decode()}")

    def _must_be_believed(self, replication: bytes) -> None:
        """Raise RedisUnavailable for a server that is not believed.

        It is believed where most Sentinels have named it a moment ago, or, while they are silent and name no other
        one, where its replicas still follow. Where neither is so, it may have been cut off from the others, who
        have another primary by now.
        """
        followers = sum(int(lag) <= FOLLOWS_S for lag in _FOLLOWER.findall(replication))
        if self.watch is None or time.monotonic() < self.watch.believed_until:
            self._followers = followers
        elif self.watch.is_outnumbered or not followers or followers < self._followers:
            raise RedisUnavailable("sentinel", self.watch.trouble)

    # Its clock

    def now_ms(self) -> int:
        """Return the server's clock, in ms since 1970, as well as this process knows it."""
        return (time.monotonic_ns() + self._reading.offset) // 1_000_000

    def now_us(self) -> int:
        return (time.monotonic_ns() + self._reading.offset) // 1_000

    @property
    def is_clock_good(self) -> bool:
        """Return whether enough is known of the server's clock to make a deadline in its time."""
        age = time.monotonic_ns() - self._reading.at
        return self._is_clock_known and age < CLOCK_GOOD_FOR_NS

    def in_time(self, now: float, deadline: float) -> bytes:
        """Return `now` and `deadline` (time.monotonic()) as the server's clock shows them, or a moment before each.

        Never a moment later: what is refused after the end can't happen once its caller has given up. Before the
        beginning it is refused, too: then the clock was put back while it was on its way.
        """
        offset, error, at = self._reading
        before = offset - error - (time.monotonic_ns() - at) // DRIFT
        began_us, ends_us = ((int(when * 1e9) + before) // 1_000 for when in (now, deadline))
        return b"%d-%d" % (began_us, ends_us)

    def ask_time(self) -> None:
        """Let TIME ride along with the next batch."""
        self.due = 0.0

    def doubt_clock(self) -> None:
        """Distrust the known clock: a script said "too late", and yet its reply was here in time.

        TIME is asked for before another deadline is made from it.
        """
        self._is_clock_known = False
        self.due = 0.0

    def learn_clock(self, reply: Sequence[bytes], asked_ns: int) -> None:
        """Take in a reply to TIME that was asked for at `asked_ns` (time.monotonic_ns()).

        It is exact to half its round trip, so a slow one is used only for want of better. One that contradicts
        what is known by more than both errors is believed at once: the server's clock has stepped, or another
        server answers. This machine's wall clock may step as it likes: it is not looked at.
        """
        answered_ns = time.monotonic_ns()
        error = max((answered_ns - asked_ns) // 2, LEAST_ERROR_NS)
        server_ns = int(reply[0]) * 1_000_000_000 + int(reply[1]) * 1_000
        offset = server_ns - (asked_ns + answered_ns) // 2
        known = self._reading
        grown = known.error + (answered_ns - known.at) // DRIFT
        contradicts = abs(offset - known.offset) > error + grown
        if not self._is_clock_known or contradicts or error <= grown:
            self._reading = Reading(offset, error, answered_ns)
            self._is_clock_known = True


def _connected(_: Any) -> None:
    """Connect without redis-py's handshake, which is a round trip for each of its commands."""


def _handshake(options: Mapping[str, Any]) -> list[tuple[str, Command]]:
    """Return the first batch of a new connection, each part with its name.

    Who it is, which database it wants, what time it is there, which run of the server answers, and its role.
    """
    parts: list[tuple[str, Command]] = []
    username, password = options.get("username"), options.get("password") or ""
    if username:  # one that needs no password takes any
        parts.append(("auth", ("AUTH", username, password)))
    elif password:
        parts.append(("auth", ("AUTH", password)))
    if database := options.get("db"):
        parts.append(("select", ("SELECT", str(database))))
    return [*parts, ("time", ("TIME",)), ("info", ("INFO", "server")), ("role", ROLE)]


def run_of(info: Any, replication: Any) -> bytes:
    """Return which run of a server this is, by INFO server and INFO replication; empty where neither may be asked.

    A server that was a replica meanwhile, and has taken over again, is another one: it may lack what another server
    has acknowledged. So the history that it copied is a part of the name.
    """
    run, copied = (
        None if isinstance(said, ReplyError) else word.search(said)
        for word, said in ((_RUN_ID, info), (_COPIED, replication))
    )
    return b"" if run is None else run[1] + (b"" if copied is None else b"+" + copied[1])


def micros(time: Sequence[bytes]) -> int:
    """Return a reply to TIME as a number of µs."""
    seconds, us = time
    return int(seconds) * 1_000_000 + int(us)


_BYTES = {bytes}


def pack(commands: Sequence[Command]) -> bytes:
    """Return the bytes of a batch."""
    if len(commands) == 1:
        (command,) = commands
        return command if type(command) is bytes else pack_command(command)
    if {*map(type, commands)} == _BYTES:
        return b"".join(commands)  # type: ignore[arg-type]  # all of them are packed
    return b"".join(map(_packed, commands))


def pack_timed(commands: Sequence[Command], in_time: bytes) -> bytes:
    """Return the bytes of a batch whose scripts are told while its caller waits for it."""
    return pack(
        [
            tuple(in_time if word is IN_TIME else word for word in words_of(command))
            for command in commands
        ]
    )


def _packed(command: Command) -> bytes:
    packed: bytes = command if type(command) is bytes else pack_command(command)
    return packed


def words_of(command: Command) -> Sequence[bytes | str]:
    """Return the words of a command, packed or not."""
    if not isinstance(command, bytes):
        return command
    reader = hiredis.Reader()  # a command looks like a reply: an array of texts
    reader.feed(command)
    words: list[bytes] = reader.gets()
    return words


def name_of(command: Command) -> bytes:
    """Return the name of a command, packed or not: its first word."""
    name = words_of(command)[0]
    return name if isinstance(name, bytes) else name.encode()
