"""Whom to talk to, as the Sentinels say: asked all the time by a thread, so that no call waits for them.

A primary that was cut off does not know that another one has taken its place. So it is believed for a while only.
Sentinels replace a primary when a quorum of them has not heard from it for `down-after-milliseconds`. Where so many
that the others are no quorum have heard from it a moment ago, it stays in office for that long, less the moment. A
Sentinel that begins to replace it says so to whoever listens, and we do.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import hiredis

from stillroom.address import Host, SentinelAddress
from stillroom.daemon import Daemon
from stillroom.errors import FINAL, RedisUnavailable
from stillroom.readable import watch
from stillroom.settings import Settings
from stillroom.shown import shown
from stillroom.wire.connect import time_for
from stillroom.wire.failure import unavailable
from stillroom.wire.forks import reset_after_fork
from stillroom.wire.names import tell_loop

CALM_S = 1.0  # between two rounds of questions while all is well …
EAGER_S = 0.2  # … and while it is not
LEAST_S = 0.02  # between any two
MARGIN_S = 0.05  # clocks of several machines run at slightly different speeds
# From the moment that a Sentinel has given a primary up it takes longer than this to appoint another one: where
# `down-after-milliseconds` is very short there is nothing better to count on.
APPOINTED_S = 0.3
REPLACED = {"s_down", "o_down", "failover_in_progress"}
# How a Sentinel refuses who has no login there, or one with too few rights.
WITHOUT_LOGIN = ("NOAUTH", "NOPERM")
READ_SIZE = 16 * 1024
TROUBLE_LENGTH = 120  # characters of what a Sentinel says

Connect = Callable[[str, int, float], Any]  # host, port, deadline → a redis-py connection
pack_command: Any = hiredis.pack_command
ReplyError = hiredis.ReplyError
LISTEN: bytes = pack_command((b"PSUBSCRIBE", b"*"))


class Told(NamedTuple):
    """Hold what one Sentinel says of the primary."""

    address: Host
    is_well: bool
    epoch: int  # of its configuration: the newest one is right
    quorum: int
    in_office_until: float  # time.monotonic(): before that this Sentinel does not give it up


class View(NamedTuple):
    """Hold the conclusion from the answers of the Sentinels."""

    primary: Host | None
    believed_until: float  # time.monotonic()


class Line:
    """A connection to one Sentinel, made anew when it breaks."""

    def __init__(self, connect: Connect, host: Host, first: Sequence[bytes]) -> None:
        self._connect = connect
        self._host = host
        self._first = first
        self._connection: Any = None
        self._reader: Any = None

    @property
    def socket(self) -> socket.socket | None:
        return None if self._connection is None else self._connection._get_socket()

    def ask(self, question: Sequence[bytes], patience_s: float) -> list[Any]:
        """Return the replies. Raises OSError, EOFError, RedisUnavailable, and what redis-py raises."""
        deadline = time.monotonic() + patience_s
        try:
            if self._connection is not None:
                with contextlib.suppress(ConnectionError, EOFError):
                    return self._exchange(question, deadline)
                self.close()  # it was idle: perhaps the Sentinel was restarted meanwhile
            return self._open(deadline, question)
        except BaseException:
            self.close()
            raise

    def _open(self, deadline: float, question: Sequence[bytes]) -> list[Any]:
        self._connection = self._connect(*self._host, deadline)
        self._connection.connect()
        self._reader = hiredis.Reader()
        replies = self._exchange([*self._first, *question], deadline)
        for reply in replies[: len(self._first)]:
            if isinstance(reply, ReplyError):
                raise RedisUnavailable("auth", f"a Sentinel says: {reply}")
        return replies[len(self._first) :]

    def _exchange(self, commands: Sequence[bytes], deadline: float) -> list[Any]:
        sock = self._connection._get_socket()
        sock.settimeout(time_for(deadline))
        sock.sendall(b"".join(commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            sock.settimeout(time_for(deadline))
            self._reader.feed(_received(sock))
            while (reply := self._reader.gets()) is not False:
                replies.append(reply)
        return replies

    def hear(self) -> None:
        """Take in what came without being asked for; what it is does not matter. Closes a line that has ended."""
        sock = self.socket
        if sock is None:
            return
        try:
            sock.settimeout(0)
            while _received(sock):
                pass
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, EOFError) as error:
            if not _is_of_tls(error):
                self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()


class Watch:
    """Ask the Sentinels of one URL where the primary is, for both faces.

    `doubted()` is called when the primary is not believed any more, `left()` when another one is in its place, and
    each of `news` when there is one to believe.
    """

    def __init__(
        self,
        settings: Settings,
        address: SentinelAddress,
        connect: Connect,
        login: Sequence[Any],
        doubted: Callable[[], object],
        left: Callable[[], object],
    ) -> None:
        self.believed_until = 0.0  # time.monotonic()
        self.is_outnumbered = False  # those who name the primary, by those who name another server
        self.trouble = "none of them has answered yet"
        self.told: dict[Host, Told | None] = {}
        self.news: list[Callable[[], object]] = []
        self._sentinels = address.sentinels
        self._patience = settings.connect_timeout + settings.command_timeout
        # A reply of the primary may be as late as this, and must still be one of a primary in office.
        self._margin = settings.command_timeout + MARGIN_S
        name = address.master.encode()
        self._question = [
            pack_command((b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name)),
            pack_command((b"SENTINEL", b"MASTER", name)),
        ]
        self._first = [pack_command(command) for command in login]
        self._connect = connect
        self._doubted = doubted
        self._left = left
        self._primary: Host | None = None
        self._announced: Host | None = None  # the last one that was news
        self._errors: dict[Host, RedisUnavailable] = {}
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Have no thread and no connections: they belong to the parent of a forked process."""
        self._changed = threading.Condition(threading.RLock())
        self._lines = {host: Line(self._connect, host, self._first) for host in self._sentinels}
        self._ears = {host: Line(self._connect, host, self._first) for host in self._sentinels}
        self._begun = self._done = self._wanted = 0  # rounds of questions
        self._waiting: list[Callable[[], object]] = []
        self._bell: Bell | None = None  # of the thread, while there is one

    # For whoever makes a connection

    def primary(self, deadline: float) -> Mapping[str, Any]:
        """Return where the primary is, as redis-py's options, before `deadline` (time.monotonic()).

        Waits for the Sentinels only where nothing is known, or what is known was doubted. Raises RedisUnavailable.
        """
        with self._changed:
            self._ask_if_wanted()
            self._changed.wait_for(self._is_known, max(0.0, deadline - time.monotonic()))
            return self._where()

    async def primary_soon(self, deadline: float) -> Mapping[str, Any]:
        """Return where the primary is, for asyncio. See primary."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                self._ask_if_wanted()
                left = deadline - time.monotonic()
                if self._is_known() or left <= 0:
                    return self._where()
                changed = loop.create_future()
                self._waiting.append(partial(tell_loop, loop, changed))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await changed

    @property
    def last_named(self) -> Host | None:
        """Return the last primary that they have named."""
        return self._primary

    def said(self) -> list[tuple[str, bool, str]]:
        """Return (host, whether it answers and stands by the primary, what it says) of each Sentinel, as text."""
        return [(f"{host}:{port}", *self._saying((host, port))) for host, port in self._sentinels]

    def _saying(self, host: Host) -> tuple[bool, str]:
        told, error = self.told.get(host), self._errors.get(host)
        if told is None:
            return False, "does not answer" + (f" ({error.reason})" if error else " yet")
        where = f"{told.address[0]}:{told.address[1]}"
        if not told.is_well:
            return False, f"gives the primary up, or replaces it: {where}"
        named = [one.address for one in self.told.values() if one is not None]
        if named.count(told.address) * 2 <= len(named):
            return False, f"names {where}, and most others do not: see whether it is theirs"
        return True, f"names {where}"

    def doubt(self) -> None:
        """Stop believing the known primary: the next connection waits for a new answer of the Sentinels."""
        with self._changed:
            self._wanted = self._begun + 1
            self._disbelieve()
            self._ring()

    def stop(self) -> None:
        """End the thread, and close its connections. It begins again when it is needed."""
        with self._changed:
            bell, self._bell = self._bell, None
        if bell is not None:
            bell.ring()
            bell.stopped.wait(self._patience * len(self._sentinels))

    def _is_known(self) -> bool:
        return self._done >= max(1, self._wanted)

    def _ask_if_wanted(self) -> None:
        if self._bell is None:
            bell = self._bell = Bell()
            try:
                Daemon(_watch, "stillroom sentinels", (weakref.ref(self), bell)).start()
            except RuntimeError:  # no more threads: better to wait than not to know
                self._bell = None
                self.ask_all()
        if not self._is_known():
            self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    def _where(self) -> Mapping[str, Any]:
        if self._primary is None or self.is_outnumbered:
            raise self._failure()
        host, port = self._primary
        return {"host": host, "port": port}

    def _failure(self) -> RedisUnavailable:
        """Return why no primary is known. A reason that all Sentinels give is quoted."""
        reasons = {error.reason for error in self._errors.values()}
        if len(reasons) == 1 and len(self._errors) == len(self._sentinels) and reasons <= FINAL:
            return next(iter(self._errors.values()))
        return RedisUnavailable("sentinel", self.trouble)

    # The thread

    def is_watched_by(self, bell: Bell) -> bool:
        """Return whether the thread with this bell is still the one of this watch."""
        return self._bell is bell

    def has_ended(self, bell: Bell) -> None:
        """Note that the thread with this bell has ended, for any reason: whoever needs one begins another."""
        with self._changed:
            if self._bell is bell:
                self._bell = None

    def ask_all(self) -> float:
        """Ask one round of questions, those who answered last time first. Returns the seconds to the next one."""
        with self._changed:
            self._begun += 1
            number = self._begun
        before: Mapping[Host, Told | None] = self.told
        told: dict[Host, Told | None] = dict.fromkeys(self._sentinels)
        errors: dict[Host, RedisUnavailable] = {}
        for host in sorted(self._sentinels, key=lambda host: before.get(host) is None):
            try:
                told[host] = self._ask(host)
            except Exception as error:
                failure = unavailable(error)
                errors[host] = failure or RedisUnavailable("sentinel", f"its answer is {error!r}")
            self._take_in(told, errors, number)
        with self._changed:
            self._finish(number)
            left = self.believed_until - time.monotonic()
        return min(CALM_S, max(LEAST_S, left / 2)) if left > 0 else EAGER_S

    def listen(self) -> list[Line]:
        """Return the lines on which the Sentinels tell what happens. They are no reason to wait for anybody."""
        for host, ear in self._ears.items():
            if ear.socket is None and self.told.get(host) is not None:
                with contextlib.suppress(Exception):  # it is not heard, and is asked all the same
                    ear.ask([LISTEN], self._patience)
        return [ear for ear in self._ears.values() if ear.socket is not None]

    def _ask(self, host: Host) -> Told:
        asked_at = time.monotonic()
        address, about = self._lines[host].ask(self._question, self._patience)
        for reply in (address, about):
            if isinstance(reply, ReplyError) and not _is_unknown(str(reply)):
                reason = "auth" if str(reply).startswith(WITHOUT_LOGIN) else "sentinel"
                raise RedisUnavailable(reason, f"a Sentinel says: {reply}")
        if address is None or isinstance(about, ReplyError):
            raise RedisUnavailable("nomaster", "")
        return _read(address, about, asked_at, self._margin)

    def _take_in(
        self, told: Mapping[Host, Told | None], errors: Mapping[Host, RedisUnavailable], number: int
    ) -> None:
        """Take in one more answer. The caller need not wait for the others once enough is known."""
        answers = [one for one in told.values() if one is not None]
        view = view_of(answers, len(told))
        with self._changed:
            if self._wanted > number:
                return  # doubted meanwhile
            is_complete = len(answers) + len(errors) == len(told)
            if self.is_outnumbered and not is_complete:
                return  # a majority is not enough while one of them has known better
            is_believed = view.believed_until > time.monotonic()
            self.told, self._errors = dict(told), dict(errors)
            self.trouble = _trouble(answers, errors, len(told))
            if view.primary is not None and (is_believed or is_complete):
                self.is_outnumbered = not is_believed and is_outnumbered(answers, view.primary)
                self._appoint(view.primary)
            is_news = is_believed and view.primary != self._announced
            if is_believed:
                self.believed_until, self._announced = view.believed_until, view.primary
                self._finish(number)
            elif any(not one.is_well for one in answers):
                self._announced = None
                self._disbelieve()
        if is_news:
            for tell in self.news:
                tell()

    def _appoint(self, primary: Host) -> None:
        if primary == self._primary:
            return
        is_first, self._primary = self._primary is None, primary
        self._disbelieve()
        if not is_first:
            self._left()

    def _disbelieve(self) -> None:
        self.believed_until = 0.0
        self._doubted()

    def _finish(self, number: int) -> None:
        self._done = max(number, self._done)
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, []
        for tell in waiting:
            tell()

    def hang_up(self) -> None:
        """Close all connections."""
        for line in [*self._lines.values(), *self._ears.values()]:
            line.close()


class Bell:
    """Wakes the thread up: a Condition can't be waited for together with connections."""

    def __init__(self) -> None:
        self.near, self._far = socket.socketpair()
        self.near.setblocking(False)
        self._far.setblocking(False)
        self.stopped = threading.Event()

    def ring(self) -> None:
        with contextlib.suppress(OSError):  # it has rung often enough, or nobody hears it any more
            self._far.send(b"!")

    def wait(self, ears: Sequence[Line], seconds: float) -> None:
        """Wait until the bell rings, a Sentinel tells something, or the time is up."""
        heard = {ear.socket.fileno(): ear for ear in ears if ear.socket is not None}
        for descriptor, _ in watch(self.near.fileno(), *heard)(seconds * 1000):
            if descriptor == self.near.fileno():
                with contextlib.suppress(BlockingIOError):
                    self.near.recv(READ_SIZE)
            else:
                heard[descriptor].hear()

    def close(self) -> None:
        self.near.close()
        self._far.close()
        self.stopped.set()


def view_of(told: Sequence[Told], sentinels: int) -> View:
    """Return the primary that these answers of so many Sentinels name, and until when it is believed. Pure.

    The newest configuration names the primary, and of several that are as new the one that most name. It is
    believed if those who call it well are a majority, and so many that the rest is no quorum.
    """
    if not told:
        return View(None, 0.0)
    votes = Counter((one.epoch, one.address) for one in told)
    newest = max(told, key=lambda one: (one.epoch, votes[one.epoch, one.address], one.is_well))
    well = sorted(
        (one.in_office_until for one in told if one.address == newest.address and one.is_well),
        reverse=True,
    )
    quorum = min(one.quorum for one in told)
    needed = min(sentinels, max(sentinels // 2 + 1, sentinels - quorum + 1))
    is_replaced = any(not one.is_well and one.epoch == newest.epoch for one in told)
    if not well:
        return View(None, 0.0)
    is_believed = len(well) >= needed and not (is_replaced and len(told) - len(well) >= quorum)
    return View(newest.address, well[needed - 1] if is_believed else 0.0)


def is_outnumbered(told: Sequence[Told], primary: Host) -> bool:
    """Return whether another server is well to as many Sentinels as name this one, or more. Pure.

    So it is for a moment after a failover that somebody has ordered. It stays so where a Sentinel of another
    deployment is in the list, whose configuration is newer: its primary has followers, and would take our writes.
    """
    named = sum(one.address == primary for one in told)
    return named <= sum(one.address != primary and one.is_well for one in told)


def _watch(watching: weakref.ref[Watch], bell: Bell) -> None:
    """Ask, wait and ask again, until the watch is stopped or gone."""
    ears: list[Line] = []
    try:
        while (watch := watching()) is not None:
            if not watch.is_watched_by(bell):
                return watch.hang_up()
            pause, ears = watch.ask_all(), watch.listen()
            del watch
            time.sleep(LEAST_S)  # however often it rings
            bell.wait(ears, pause)
        for ear in ears:
            ear.close()
    finally:
        if (watch := watching()) is not None:
            watch.has_ended(bell)
        bell.close()
    return None


def _read(
    address: Sequence[bytes], about: Sequence[bytes], asked_at: float, margin_s: float
) -> Told:
    fields = {
        name.decode(): value.decode() for name, value in zip(about[::2], about[1::2], strict=True)
    }
    where = address[0].decode(), int(address[1])
    # In the middle of a failover the first answer names the new one already, and the second describes the old one,
    # with its epoch.
    is_new = where != (fields["ip"], int(fields["port"]))
    unheard_ms = 0 if is_new else int(fields["last-ok-ping-reply"])
    patience_s = (int(fields["down-after-milliseconds"]) - unheard_ms) / 1000
    return Told(
        where,
        is_well=is_new or not set(fields["flags"].split(",")) & REPLACED,
        epoch=int(fields["config-epoch"]) + is_new,
        quorum=int(fields["quorum"]),
        in_office_until=asked_at + max(APPOINTED_S, patience_s - margin_s),
    )


def _is_unknown(text: str) -> bool:
    return "No such master" in text or text.startswith("IDONTKNOW")


def _trouble(
    answers: Sequence[Told], errors: Mapping[Host, RedisUnavailable], sentinels: int
) -> str:
    """Return why the Sentinels cannot be believed, as part of a sentence."""
    words = [f"{len(answers)} of {sentinels} answered"]
    failed = Counter(
        shown(error.detail, TROUBLE_LENGTH) if error.reason == "sentinel" else error.reason
        for error in errors.values()
    )
    words += [f"{number} of them: {why}" for why, number in failed.items()]
    down = sum(not one.is_well for one in answers)
    if len({one.address for one in answers}) > 1:
        words.append("they name different servers")
    if down:
        words.append(f"{down} say that the primary is down or is being replaced")
    return "; ".join(words)


def _received(sock: Any) -> bytes:
    data: bytes = sock.recv(READ_SIZE)
    if not data:
        raise EOFError("the Sentinel closed the connection")
    return data


def _is_of_tls(error: BaseException) -> bool:
    """Return whether TLS itself has to read or write first. Then nothing that concerns us has come yet."""
    return type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError")
