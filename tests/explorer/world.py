"""A world in which operations are run step by step, and everything goes wrong that can, in an order a seed decides.

What is real: the drivers, the wire, the services, their Lua on a real server. What is not: the network, time and
chance. Each call runs in a greenlet of its own; it stops before each command, and somebody else may go on. Between
two commands anything may happen:

* a batch gets lost, is late, or arrives twice: a copy that was held back is delivered at any later moment, long
  after its connection died (see Fate);
* time passes, for all; or the server's clock alone steps;
* the server is another one: begun anew with nothing, with an older snapshot, or with all it had (a failover);
* whatever a model adds: keys that are evicted, scripts that are lost, a process that dies in the middle of a call.

Time stands still unless somebody waits, or an accident lets it pass. So a run is the same each time its seed is
run.

A model says what is called and what must be true: see Model in explorer.py, and cache.py for one.
"""

from __future__ import annotations

import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import hiredis
from greenlet import getcurrent, greenlet

from stillroom.scripts import BY_SHA
from stillroom.wire import Server
from stillroom.wire.outcome import greeted
from stillroom.wire.server import pack
from tests.support.clocked import ClockedServer

T = TypeVar("T")

BEGAN_S = 1_000_000.0  # what time.monotonic() shows when a run begins
SERVER_BEGAN_US = 1_800_000_000_000_000  # what the server's clock shows then
COMMAND_S = 0.000_05  # what one command takes
SOCKET = "socket"  # each server's, in its directory
NO_SCRIPT = b"f" * 40  # the digest of no script
STEPS_LIMIT = 20_000  # of one run: more is a call that never ends


class Fate(Enum):
    """Names the ways a batch and its connection can end."""

    ARRIVES = "arrives"
    UNSENT = "the connection died before anything was sent"
    HELD = "the connection died; a copy is still on its way"
    UNANSWERED = "all is done, and the connection died before the replies"
    CUT = "the connection died in the middle; the rest is still on its way"
    SLOW = "nothing comes back in time; a copy is still on its way"


class Copy(NamedTuple):
    """Holds commands that are still on their way to a server, though nobody waits for them any more."""

    place: int  # which server
    commands: list[bytes]
    whose: str


class Died(BaseException):
    """The process of this call is gone: nothing of it runs any more."""


class Actor:
    """One call of one process, in a greenlet of its own."""

    def __init__(
        self,
        world: World,
        name: str,
        process: int,
        call: Callable[[], Any],
        check: Callable[[Actor], None] | None = None,
    ) -> None:
        self.name = name
        self.process = process
        self.began = world.tick()
        self.returned: int | None = None
        self.returned_s = 0.0  # by time.monotonic()
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_dead = False
        self.wakes = 0.0  # when it goes on, by time.monotonic()
        self._world = world
        self._call = call
        self._check = check
        self._greenlet = greenlet(self._run)

    def die(self) -> None:
        """End it where it stands. What it still wants to say on its way out is not heard."""
        self.is_dead = True
        self._world.current = self
        self._greenlet.throw(Died)
        self._world.current = None

    @property
    def is_done(self) -> bool:
        return self.is_dead or self.returned is not None

    def step(self) -> None:
        """Let the call go on until it stops before its next command, waits, or has ended."""
        self._world.current = self
        self._greenlet.switch()
        self._world.current = None
        if self.returned is not None and self._check is not None:
            self._check(self)

    def _run(self) -> None:
        try:
            self.value = self._call()
        except Died:
            self.is_dead = True
            return
        except Exception as error:
            self.error = error
        self.returned, self.returned_s = self._world.tick(), self._world.monotonic
        told = repr(self.error) if self.error is not None else repr(self.value)
        self._world.note(f"{self.name} → {told[:200]}")


class SteppedLink:
    """A connection of the wire's, through this world's network. See Link in wire/sync.py."""

    world: World
    is_interrupted = False  # there are no signals in this world

    def __init__(self, server: Server) -> None:
        self._server = server
        self._place = -1
        self._is_open = False
        self.generation = server.generation
        self.used = False

    def open(self, deadline: float) -> None:
        world, server = self.world, self._server
        if not world.is_asked_by_a_call:
            raise ConnectionRefusedError(111, "refused")
        world.pause()  # a dead call ends here
        if world.is_away:
            raise ConnectionRefusedError(111, "refused")
        self._place, self._is_open = world.place, True
        asked = time.monotonic_ns()
        replies = [
            world.info if part == "info" else world.execute(self._place, [pack([command])])[0]
            for part, command in server.handshake
        ]
        greeted(replies, server, asked, self)

    def exchange(
        self, packed: bytes, count: int, deadline: float, now: float | None = None
    ) -> list[Any]:
        if deadline <= time.monotonic():
            raise TimeoutError
        if not (self.world.is_asked_by_a_call and self.is_alive()):
            raise ConnectionResetError(104, "reset")
        return self.world.deliver(self, packed, count, deadline)

    def failed(self, error: BaseException, deadline: float) -> None:
        """Do nothing: each failure is this world's."""

    def is_alive(self) -> bool:
        return self._is_open and self._place == self.world.place and not self.world.is_away

    @property
    def place(self) -> int:
        return self._place

    def close(self) -> None:
        self._is_open = False


class World:
    """Three servers of which one is there, a network, a clock, and the calls that are under way."""

    def __init__(self, servers: Sequence[ClockedServer]) -> None:
        self._servers = servers
        self._lines = [_Line(server.directory / SOCKET) for server in servers]
        self._infos = [line.say([pack([("INFO", "server")])])[0] for line in self._lines]
        self._loaded: set[bytes | str] = set()
        self.load_scripts()
        self.trace: list[str] | None = None  # the story of the run, if a caller wants it
        self.begin(0)

    def load_scripts(self) -> None:
        """Load all scripts as they are now: when a script is loaded must not depend on earlier runs."""
        loads = [
            pack([("SCRIPT", "LOAD", BY_SHA[sha].source)]) for sha in BY_SHA.keys() - self._loaded
        ]
        for line in self._lines:
            line.say(loads)
        self._loaded |= BY_SHA.keys()

    def begin(self, seed: int) -> None:
        """Begin an empty world. What follows depends on the seed alone."""
        self.random = random.Random(seed)
        self.place = 0
        self.is_away = False  # nobody can connect
        self.fates: dict[Fate, float] = {Fate.ARRIVES: 1.0}  # with their weights
        self.copies: list[Copy] = []
        self.actors: list[Actor] = []
        self.current: Actor | None = None
        self._scheduler = getcurrent()
        self._monotonic = BEGAN_S
        self._step_us = 0
        self._ticks = 0
        self._steps = 0
        self._snapshot: list[tuple[bytes, int, bytes]] | None = None
        self._show()
        self._lines[0].say([pack([("FLUSHALL",)])])
        # The scripts that a server knows, or None if it has lost none. Those that it lost stay loaded, and are
        # asked for by another digest: to load them all again would take as long as the rest of the run.
        self._known: list[set[bytes] | None] = [None] * len(self._servers)
        if self.trace is not None:
            self.trace.clear()

    def close(self) -> None:
        for line in self._lines:
            line.close()

    @property
    def info(self) -> bytes:
        """Return the present server's answer to INFO server."""
        info: bytes = self._infos[self.place]
        return info

    @property
    def is_asked_by_a_call(self) -> bool:
        """Return whether a stepped call is asking: not a prober's thread in real time, or a process at its exit."""
        return self.current is not None and threading.current_thread() is threading.main_thread()

    def note(self, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self._ticks:4} {what}")

    def tick(self) -> int:
        """Return a moment that is later than all before."""
        self._ticks += 1
        return self._ticks

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # Time

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Give the code inside this world's time, chance and connections."""
        numbers = {
            "time.monotonic": lambda: self._monotonic,
            "time.monotonic_ns": lambda: int(self._monotonic * 1e9),
            "time.clock_gettime_ns": lambda _: int(self._monotonic * 1e9),
            "time.time": lambda: self.server_us / 1e6,
            "time.time_ns": lambda: self.server_us * 1_000,
            "time.sleep": self.sleep,
            "stillroom.locks.body.steady_s": lambda: self._monotonic,
            "stillroom.locks.held.steady_s": lambda: self._monotonic,
            "secrets.token_hex": lambda size=32: (
                f"{self.random.getrandbits(8 * size):0{2 * size}x}"
            ),
            "secrets.token_bytes": lambda size=32: self.random.randbytes(size),
            "secrets.token_urlsafe": lambda size=32: self.random.randbytes(size).hex(),
            "secrets.randbelow": self.random.randrange,
            "os.urandom": self.random.randbytes,
            "random.uniform": self.random.uniform,
            "random.random": self.random.random,
            "random.randint": self.random.randint,
        }
        SteppedLink.world = self
        with ExitStack() as stack:
            stack.enter_context(patch("stillroom.wire.sync.Link", SteppedLink))
            for name, function in numbers.items():
                stack.enter_context(patch(name, function))
            yield

    @property
    def server_us(self) -> int:
        """Return the time of the server's clock, µs since 1970."""
        return SERVER_BEGAN_US + self._step_us + round((self._monotonic - BEGAN_S) * 1e6)

    @property
    def monotonic(self) -> float:
        """Return the time that time.monotonic() shows."""
        return self._monotonic

    @property
    def clock_offset(self) -> float:
        """Return how many seconds the server's clock was set ahead since the run began."""
        return self._step_us / 1e6

    def pass_time(self, seconds: float) -> None:
        """Let time pass for all processes and servers."""
        self._monotonic += seconds
        self._show()

    def step_clock(self, seconds: float) -> None:
        """Set the server's clock to another time."""
        self.note(f"the server's clock steps by {seconds:+.3f} s")
        self._step_us += round(seconds * 1e6)
        self._show()

    def sleep(self, seconds: float) -> None:
        """Sleep in the place of time.sleep: the other calls go on meanwhile."""
        assert self.current is not None
        self.current.wakes = self._monotonic + seconds
        self.pause()

    def _show(self) -> None:
        self._servers[self.place].show(self.server_us)

    # Calls

    def call(
        self,
        name: str,
        process: int,
        call: Callable[[], Any],
        check: Callable[[Actor], None] | None = None,
    ) -> Actor:
        """Begin a call; it stops before its first command. It is checked as soon as it has ended."""
        return self.begin_call(Actor(self, name, process, call, check))

    def begin_call(self, actor: Actor) -> Actor:
        """Begin a call whose actor is made already."""
        self.note(f"{actor.name} begins in process {actor.process}")
        self.actors.append(actor)
        actor.step()
        return actor

    def pause(self) -> None:
        """Let others go on, in a call that is under way."""
        actor = self.current
        assert actor is not None, "only calls have anything to wait for"
        if actor.is_dead:
            raise Died
        self._scheduler.switch()

    def go_on(self, steps: int) -> None:
        """Make this many steps of calls that are under way."""
        for _ in range(steps):
            if not self._go_on_once():
                return

    def finish(self, actor: Actor | None = None) -> None:
        """Run this call to its end, or all of them."""
        while not (actor.is_done if actor else all(one.is_done for one in self.actors)):
            self._go_on_once(actor)

    def run(self, name: str, process: int, call: Callable[[], Any]) -> Actor:
        """A call from its beginning to its end, and nothing else meanwhile if it need not wait for others."""
        actor = self.call(name, process, call)
        self.finish(actor)
        return actor

    def kill(self, process: int) -> None:
        """End a process: its calls stop where they are."""
        self.note(f"process {process} dies")
        for actor in self.actors:
            if actor.process == process and not actor.is_done:
                actor.die()

    def _go_on_once(self, wanted: Actor | None = None) -> bool:
        self._steps += 1
        assert self._steps < STEPS_LIMIT, "a call never ends"
        living = [actor for actor in self.actors if not actor.is_done]
        if not living:
            return False
        ready = [actor for actor in living if actor.wakes <= self._monotonic]
        if not ready:
            self.pass_time(min(actor.wakes for actor in living) - self._monotonic)
            return True
        actor = wanted if wanted in ready else self.random.choice(ready)
        assert actor is not None
        actor.step()
        return True

    # The network

    def deliver(self, link: SteppedLink, packed: bytes, count: int, deadline: float) -> list[Any]:
        """Return the replies to a batch, or raise the error that its connection dies of."""
        if self.current is not None and self.current.is_dead:
            raise Died
        commands = list(_commands(packed))
        fate = self.random.choices(list(self.fates), list(self.fates.values()))[0]
        arrive = {
            Fate.UNSENT: 0,
            Fate.HELD: 0,
            Fate.SLOW: 0,
            Fate.CUT: self.random.randint(0, len(commands)),
        }.get(fate, len(commands))
        replies = self._execute_in_bites(link, commands[:arrive], deadline)
        if fate in (Fate.HELD, Fate.SLOW, Fate.CUT):
            self._hold(link.place, commands[arrive:])
        if fate is not Fate.ARRIVES:
            self._fail(fate, deadline)
        if self.chance(0.3):
            self.pause()  # the replies travel for a while
        return replies

    def _execute_in_bites(
        self, link: SteppedLink, commands: list[bytes], deadline: float
    ) -> list[Any]:
        """Others' commands may come between any two of a batch."""
        replies: list[Any] = []
        while len(replies) < len(commands):
            if self.chance(0.5):
                self.pause()
            if not link.is_alive():
                raise ConnectionResetError(104, "reset")
            if time.monotonic() >= deadline:
                raise TimeoutError
            size = 1 if self.chance(0.4) else len(commands)
            bite = commands[len(replies) : len(replies) + size]
            replies += self.execute(link.place, bite)
            self._monotonic += COMMAND_S * len(bite)
            self._show()
        return replies

    def _hold(self, place: int, commands: list[bytes]) -> None:
        if commands:
            whose = self.current.name if self.current else "?"
            self.note(f"held back, of {whose}: {_told(commands)}")
            self.copies.append(Copy(place, commands, whose))

    def _fail(self, fate: Fate, deadline: float) -> None:
        self.note(f"{fate.value}")
        if fate is Fate.SLOW:
            self.sleep(max(0.0, deadline - self._monotonic))
            raise TimeoutError
        raise ConnectionResetError(104, "reset")

    def deliver_a_copy(self) -> None:
        """Deliver one of the batches that were held back. Nobody reads its replies."""
        if self.copies:
            copy = self.copies.pop(self.random.randrange(len(self.copies)))
            if copy.place == self.place:
                self.note(f"arrives late, of {copy.whose}: {_told(copy.commands)}")
                self.tick()
                self.execute(copy.place, copy.commands)

    def execute(self, place: int, commands: Sequence[bytes]) -> list[Any]:
        """Have a server execute packed commands; their replies."""
        if self.trace is not None and commands:
            self.note(f"  {self.current.name if self.current else ''}: {_told(commands)}")
        self.tick()
        known = self._known[place]
        if known is not None:
            commands = [_as_known(command, known) for command in commands]
        return self._lines[place].say(commands)

    def lose_scripts(self) -> None:
        """Make the server forget all of our scripts."""
        self.note("the scripts are lost")
        self.tick()
        self._known[self.place] = set()

    def ask(self, *words: bytes | str) -> Any:
        """Send a command of the test's own at once: to look, or to let an accident happen."""
        return self.ask_all([words])[0]

    def ask_all(self, commands: Sequence[tuple[bytes | str, ...]]) -> list[Any]:
        """Send several of them in one batch."""
        self.tick()
        return self._lines[self.place].say([pack([words]) for words in commands])

    # The server

    def take_snapshot(self) -> None:
        """Keep what is there, for a server that comes back with it."""
        self.note("a snapshot is taken")
        self._snapshot = self._dump()

    def change_server(self, how: str) -> bool:
        """Another run of the server is there: `empty`, with the `snapshot`, or with `all`. Connections die.

        False where no server is left that has not been there in this run: a run id never comes back.
        """
        if self.place + 1 >= len(self._servers):
            return False
        data = self._dump() if how == "all" else self._snapshot if how == "snapshot" else []
        if data is None:
            return False
        self.note(f"another server, with {how if how != 'empty' else 'nothing'}")
        self.tick()
        self.place += 1
        self._show()
        line = self._lines[self.place]
        line.say([pack([("FLUSHALL",)])])
        if self.chance(0.5):  # or others have brought them back already
            self.lose_scripts()
        restores = [
            pack([(b"RESTORE", key, b"%d" % ends, dumped, b"ABSTTL")]) for key, ends, dumped in data
        ]
        if restores:
            line.say(restores)
        return True

    def _dump(self) -> list[tuple[bytes, int, bytes]]:
        line = self._lines[self.place]
        keys: list[bytes] = line.say([pack([("KEYS", "*")])])[0]
        if not keys:
            return []
        told = line.say([pack([(act, key)]) for act in ("PEXPIRETIME", "DUMP") for key in keys])
        rows = zip(keys, told[: len(keys)], told[len(keys) :], strict=True)
        return [(key, max(0, end), dump) for key, end, dump in rows if dump is not None]


class _Line:
    """A plain connection to a real server, by its socket file: a run is mostly round trips."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._reader = hiredis.Reader()

    def say(self, commands: Sequence[bytes]) -> list[Any]:
        self._socket.sendall(b"".join(commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            self._reader.feed(self._socket.recv(1 << 16))
            while len(replies) < len(commands) and (reply := self._reader.gets()) is not False:
                replies.append(reply)
        return replies

    def close(self) -> None:
        self._socket.close()


def _commands(packed: bytes) -> Iterator[bytes]:
    reader = hiredis.Reader()
    reader.feed(packed)
    while (words := reader.gets()) is not False:
        yield pack([tuple(words)])


def _as_known(command: bytes, known: set[bytes]) -> bytes:
    """Return the command as a server is sent it that knows these scripts only. One that it loads is known."""
    match words := _words(command):
        case [b"SCRIPT", b"LOAD", text]:
            known.add(sha1(text, usedforsecurity=False).hexdigest().encode())
        case [b"EVALSHA", sha, *_] if sha not in known:
            return pack([(b"EVALSHA", NO_SCRIPT, *words[2:])])
    return command


def _words(command: bytes) -> list[bytes]:
    reader = hiredis.Reader()
    reader.feed(command)
    words: list[bytes] = reader.gets()
    return words


def _told(commands: Sequence[bytes]) -> str:
    told = []
    for command in commands:
        words = _words(command)
        script = BY_SHA.get(words[1]) if words[0] == b"EVALSHA" else None
        name = f"{script.script.name}.lua" if script else words[0].decode()
        told.append(f"{name} {b' '.join(words[1 if not script else 3 :])[:150]!r}")
    return "; ".join(told)


_ = secrets  # its functions are replaced by name
