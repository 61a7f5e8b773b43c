"""Whom to talk to, as the Sentinels say: asked all the time by a thread, so that no call waits for them.

A primary that was cut off does not know that another one has taken its place. So what the Sentinels say is believed
for a while only. They replace a primary when a quorum of them has not heard from it for `down-after-milliseconds`.
Where so many of them that the others are no quorum have just called it well, it stays in office at least that long.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import hiredis

from stillroom.address import Host, SentinelAddress
from stillroom.errors import FINAL, RedisUnavailable
from stillroom.settings import Settings
from stillroom.wire.failure import unavailable
from stillroom.wire.forks import reset_after_fork
from stillroom.wire.names import tell_loop

CALM_S = 1.0  # between two rounds of questions while all is well …
EAGER_S = 0.2  # … and while it is not
LEAST_PAUSE_S = 0.02
MARGIN_S = 0.05  # clocks of several machines run at slightly different speeds
DOWN = {"s_down", "o_down", "disconnected"}
READ_SIZE = 16 * 1024

Connect = Callable[[str, int, float], Any]  # host, port, deadline → a redis-py connection
pack_command: Any = hiredis.pack_command
ReplyError = hiredis.ReplyError


class Told(NamedTuple):
    """What one Sentinel says of the primary."""

    address: Host
    is_well: bool
    epoch: int  # of its configuration: the newest one is right
    quorum: int
    patience_s: float  # how long a primary may be silent
    asked_at: float  # time.monotonic()


class View(NamedTuple):
    """What a round of questions has shown."""

    primary: Host | None
    believed_until: float  # time.monotonic()
    patience_s: float


class Line:
    """A connection to one Sentinel, made anew when it breaks."""

    def __init__(self, connect: Connect, host: Host, first: Sequence[bytes]) -> None:
        self._connect = connect
        self._host = host
        self._first = first
        self._connection: Any = None
        self._reader: Any = None

    def ask(self, question: Sequence[bytes], patience_s: float) -> list[Any]:
        """The replies. Raises OSError, EOFError, and what redis-py raises."""
        deadline = time.monotonic() + patience_s
        try:
            if self._connection is None:
                return self._open(deadline, question)
            try:
                return self._exchange(question, deadline)
            except (OSError, EOFError) as error:
                if isinstance(error, TimeoutError):
                    raise
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
        sock.settimeout(_left(deadline))
        sock.sendall(b"".join(commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            sock.settimeout(_left(deadline))
            data = sock.recv(READ_SIZE)
            if not data:
                raise EOFError("the Sentinel closed the connection")
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                replies.append(reply)
        return replies

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()


class Watch:
    """What the Sentinels of one URL say, for both faces.

    `leave()` is called when they name another primary than before; so is each of `news`.
    """

    def __init__(
        self,
        settings: Settings,
        address: SentinelAddress,
        connect: Connect,
        login: Sequence[Any],
        leave: Callable[[], object],
    ) -> None:
        self.believed_until = 0.0  # time.monotonic()
        self.trouble = "they were not asked yet"
        self.told: dict[Host, Told | None] = {}
        self.news: list[Callable[[], object]] = []
        self._sentinels = address.sentinels
        self._patience = settings.connect_timeout + settings.command_timeout
        # A reply may be as late as this, and must not be taken for one of a primary in office.
        self._margin = settings.command_timeout + MARGIN_S
        name = address.master.encode()
        self._question = [
            pack_command((b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name)),
            pack_command((b"SENTINEL", b"MASTER", name)),
        ]
        self._first = [pack_command(command) for command in login]
        self._connect = connect
        self._leave = leave
        self._primary: Host | None = None
        self._pause = EAGER_S
        self._errors: dict[Host, RedisUnavailable] = {}
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """No thread, and no connections: they belong to the parent of a forked process."""
        self._changed = threading.Condition(threading.RLock())
        self._lines = {host: Line(self._connect, host, self._first) for host in self._sentinels}
        self._begun = self._done = self._wanted = 0  # rounds of questions
        self._waiting: list[Callable[[], object]] = []
        self._nudge = threading.Event()
        self._thread: threading.Thread | None = None

    # For whoever makes a connection

    def primary(self, deadline: float) -> Mapping[str, Any]:
        """Where the primary is, as redis-py's options, before `deadline` (time.monotonic()).

        Waits for the Sentinels only where nothing is known, or what is known was doubted. Raises RedisUnavailable.
        """
        with self._changed:
            self._ask_if_wanted()
            self._changed.wait_for(self._is_known, max(0.0, deadline - time.monotonic()))
            return self._where()

    async def primary_soon(self, deadline: float) -> Mapping[str, Any]:
        """The same for asyncio."""
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

    def doubt(self) -> None:
        """What is known was wrong: the next connection waits for a new answer."""
        with self._changed:
            self._wanted = self._begun + 1
            self.believed_until = 0.0
            self._pause = EAGER_S
            self._nudge.set()

    def stop(self) -> None:
        """End the thread, and close its connections. It begins again when it is needed."""
        with self._changed:
            thread, nudge = self._thread, self._nudge
            self._thread, self._nudge = None, threading.Event()
        if thread is not None:
            nudge.set()
            thread.join(self._patience * len(self._sentinels))

    def _is_known(self) -> bool:
        return self._done >= max(1, self._wanted)

    def _ask_if_wanted(self) -> None:
        if self._thread is None:
            arguments = weakref.ref(self), self._nudge
            self._thread = threading.Thread(
                target=_watch, args=arguments, name="stillroom sentinels", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:  # no more threads: better to wait than not to know
                self._thread = None
                self.ask_all()
        if not self._is_known():
            self._nudge.set()

    def _where(self) -> Mapping[str, Any]:
        if self._primary is None:
            raise self._failure()
        host, port = self._primary
        return {"host": host, "port": port}

    def _failure(self) -> RedisUnavailable:
        """Why no primary is known. What they all say is said as it is."""
        reasons = {error.reason for error in self._errors.values()}
        if len(reasons) == 1 and len(self._errors) == len(self._sentinels) and reasons <= FINAL:
            return next(iter(self._errors.values()))
        return RedisUnavailable("sentinel", self.trouble)

    # The thread

    def is_current(self, nudge: threading.Event) -> bool:
        """Whether the thread with this event is still the one of this watch."""
        return self._nudge is nudge

    def ask_all(self) -> float:
        """One round of questions, those who answered last time first. Returns the seconds to the next one."""
        with self._changed:
            self._begun += 1
            number = self._begun
        before, told = self.told, dict.fromkeys(self._sentinels, None)
        errors: dict[Host, RedisUnavailable] = {}
        for host in sorted(self._sentinels, key=lambda host: before.get(host) is None):
            try:
                told[host] = self._ask(host)
            except Exception as error:
                errors[host] = _as_unavailable(error)
            self._take_in(told, errors, number)
        with self._changed:
            self._finish(number)
        return self._pause

    def _ask(self, host: Host) -> Told:
        asked_at = time.monotonic()
        address, about = self._lines[host].ask(self._question, self._patience)
        for reply in (address, about):
            if isinstance(reply, ReplyError) and not _is_unknown(str(reply)):
                raise RedisUnavailable("sentinel", f"a Sentinel says: {reply}")
        if address is None or isinstance(about, ReplyError):
            raise RedisUnavailable("nomaster", "")
        return _read(address, about, asked_at)

    def _take_in(
        self, told: Mapping[Host, Told | None], errors: Mapping[Host, RedisUnavailable], number: int
    ) -> None:
        """What is known after one more answer. Whoever waits need not wait for the rest, once it is enough."""
        view = view_of([one for one in told.values() if one is not None], len(told), self._margin)
        with self._changed:
            if self._begun != number or self._wanted > number:
                return  # doubted meanwhile
            self.told, self._errors = dict(told), dict(errors)
            self.trouble = _trouble(told, errors, view)
            is_enough = view.believed_until > time.monotonic()
            if view.primary is not None and (is_enough or len(told) == _known(told, errors)):
                self._appoint(view.primary)
            self.believed_until = view.believed_until if is_enough else self.believed_until
            self._pause = min(CALM_S, view.patience_s / 3) if is_enough else EAGER_S
            if is_enough:
                self._finish(number)

    def _appoint(self, primary: Host) -> None:
        if primary == self._primary:
            return
        is_first, self._primary = self._primary is None, primary
        self.believed_until = 0.0
        if not is_first:
            self._leave()
        for tell in self.news:
            tell()

    def _finish(self, number: int) -> None:
        self._done = max(number, self._done)
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, []
        for tell in waiting:
            tell()

    def hang_up(self) -> None:
        for line in self._lines.values():
            line.close()


def view_of(told: Sequence[Told], sentinels: int, margin_s: float) -> View:
    """What these answers of so many Sentinels amount to. Pure.

    The newest configuration names the primary. It is believed if those who call it well are a majority, and so many
    that the rest is no quorum.
    """
    if not told:
        return View(None, 0.0, CALM_S)
    newest = max(told, key=lambda one: (one.epoch, one.is_well))
    well = [one for one in told if one.address == newest.address and one.is_well]
    quorum = min(one.quorum for one in told)
    needed = min(sentinels, max(sentinels // 2 + 1, sentinels - quorum + 1))
    patience_s = min(one.patience_s for one in told)
    if not well:
        return View(None, 0.0, patience_s)
    is_believed = len(well) >= needed
    until = min(one.asked_at for one in well) + patience_s - margin_s
    return View(newest.address, until if is_believed else 0.0, patience_s)


def _watch(watching: weakref.ref[Watch], nudge: threading.Event) -> None:
    """Ask, wait, and ask again, until the watch is stopped or gone."""
    while True:
        watch = watching()
        if watch is None:
            return
        if not watch.is_current(nudge):
            watch.hang_up()
            return
        nudge.clear()
        pause = watch.ask_all()
        del watch
        time.sleep(LEAST_PAUSE_S)  # however often it is doubted
        nudge.wait(pause)


def _read(address: Sequence[bytes], about: Sequence[bytes], asked_at: float) -> Told:
    fields = {
        name.decode(): value.decode() for name, value in zip(about[::2], about[1::2], strict=True)
    }
    where = address[0].decode(), int(address[1])
    # In the middle of a failover the first answer names the new one already, and the second describes the old one.
    is_new = where != (fields["ip"], int(fields["port"]))
    flags = set(fields["flags"].split(","))
    return Told(
        where,
        is_well=is_new or not flags & DOWN,
        epoch=int(fields["config-epoch"]),
        quorum=int(fields["quorum"]),
        patience_s=int(fields["down-after-milliseconds"]) / 1000,
        asked_at=asked_at,
    )


def _as_unavailable(error: Exception) -> RedisUnavailable:
    return unavailable(error) or RedisUnavailable("sentinel", repr(error))


def _is_unknown(text: str) -> bool:
    return "No such master" in text or text.startswith("IDONTKNOW")


def _known(told: Mapping[Host, Told | None], errors: Mapping[Host, RedisUnavailable]) -> int:
    """How many have answered by now, or failed to."""
    return sum(one is not None for one in told.values()) + len(errors)


def _trouble(
    told: Mapping[Host, Told | None], errors: Mapping[Host, RedisUnavailable], view: View
) -> str:
    """What keeps the Sentinels from being believed, for a sentence."""
    answers = sum(one is not None for one in told.values())
    failed = Counter(error.reason for error in errors.values())
    said = [f"{number} {reason}" for reason, number in failed.items()]
    words = f"{answers} of {len(told)} answered" + (f"; {', '.join(said)}" if said else "")
    return words if view.primary is not None or not answers else f"{words}; the primary is down"


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
