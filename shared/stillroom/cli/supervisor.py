"""Several programs under one roof: one readable log, one Ctrl-C, nobody left behind.

Ctrl-C or SIGTERM stops the services in the reverse order of their start, each with its own grace. A
service that ends by itself takes the others with it: half a system that looks alive helps nobody.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from types import FrameType
from typing import Self, TextIO

from stillroom.errors import StillroomError
from stillroom.leash import Leashed, until

POLL = 0.05  # seconds until an ended service or a Ctrl-C is noticed
LAST_LINES_WITHIN = 1.0  # seconds for a stopped service's last lines to be printed
LINE_LIMIT = 65_536  # bytes; a longer line is printed in pieces
COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92")  # ANSI: neither black, white nor red
OURSELVES = "up"  # the name our own lines stand under
KILLED_AT_ONCE = 128 + signal.SIGINT


class ServiceError(StillroomError):
    """A service can't be started."""


@dataclass(frozen=True)
class Service:
    """One program to run: what it is called in the log, and how long it may take to stop."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)  # on top of ours
    stop_after: float = 10.0  # seconds from SIGTERM to SIGKILL


class Supervisor:
    """Runs services until one ends or somebody asks to stop; `with` or `start()`/`stop()` embed it.

    None of them outlives this process, not even when it dies by SIGKILL.
    """

    def __init__(self, services: Sequence[Service], *, out: TextIO | None = None) -> None:
        self._services = tuple(services)
        self._log = _Log(sys.stdout if out is None else out, [one.name for one in self._services])
        self._running: list[_Child] = []
        self._signals = 0

    def run(self) -> int:
        """Start all and block; returns the exit code of whichever ended, or 0 if asked to stop.

        A second Ctrl-C kills what is left and returns 130. To be called in the main thread.
        """
        with self._counting_signals():
            try:
                self.start()
                ended = self._wait_for_an_end()
            finally:
                self.stop()
            if self._signals > 1:
                return KILLED_AT_ONCE
            return 0 if ended is None else _shell_code(ended)

    def start(self) -> None:
        """Start all in their order; raises `ServiceError` for a command that can't be run."""
        try:
            for service in self._services:
                self._start_one(service)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all in the reverse order, and return when none is left."""
        while self._running:
            self._stop_one(self._running[-1])
            self._running.pop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_one(self, service: Service) -> None:
        try:
            child = _Child(service, self._log)
        except OSError as error:
            what = f"{service.name} ({shlex.join(service.command)})"
            raise ServiceError(f"can't start {what}: {error.strerror}") from error
        self._running.append(child)
        self._say(f"{service.name} started, pid {child.leashed.pid}")
        child.follow()  # behind that line, so that what it says comes after it

    def _wait_for_an_end(self) -> int | None:
        # A loop that looks, not a thread per child: then one thread signals and reaps, and no
        # signal can go to a process id that somebody else has reaped a moment ago.
        while not self._signals and not self._log.is_broken:
            for child in self._running:
                code = child.leashed.exit_code
                if code is not None:
                    self._say(f"{child.service.name} {_ending(code)}, stopping the others")
                    return code
            time.sleep(POLL)
        return None

    def _stop_one(self, child: _Child) -> None:
        name, grace = child.service.name, child.service.stop_after
        if child.leashed.exit_code is None:
            self._say(f"stopping {name}")
            # To the service alone: it knows better than we in which order its own children should end.
            child.leashed.send(signal.SIGTERM)
            until(lambda: child.leashed.exit_code is not None or self._signals > 1, grace)
        if child.leashed.exit_code is None:
            why = "a second signal came" if self._signals > 1 else f"it did not stop in {grace:g} s"
            self._say(f"killing {name}: {why}")
        child.close()

    def _say(self, text: str) -> None:
        self._log.write(OURSELVES, text)

    @contextlib.contextmanager
    def _counting_signals(self) -> Iterator[None]:
        self._signals = 0
        before = {number: signal.signal(number, self._count_signal) for number in _stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        # Only counts. `threading.Event.set` takes a lock that the interrupted main thread may be holding.
        self._signals += 1


class _Child:
    """A running service and the thread that copies its output into the log."""

    def __init__(self, service: Service, log: _Log) -> None:
        self.service = service
        # A Python program buffers its lines as soon as it writes into a pipe: they would come in lumps.
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **service.env}
        self.leashed = Leashed(service.command, stdout=subprocess.PIPE, env=env)
        self._reader = threading.Thread(
            target=self._copy_output, args=(log,), name=f"log of {service.name}", daemon=True
        )

    def follow(self) -> None:
        """Copy its output from now on; nothing it has said before is lost."""
        self._reader.start()

    def close(self) -> None:
        """Kill what is left of it, and wait for its last lines."""
        self.leashed.kill()
        if self._reader.ident is not None:  # it was started
            self._reader.join(LAST_LINES_WITHIN)
        # A daemon it left behind may hold the pipe open for ever; then the reader stays with it,
        # and closing the file under a reading thread would block us too.
        if not self._reader.is_alive():
            self.leashed.output.close()

    def _copy_output(self, log: _Log) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
        goes_on = False
        while piece := self.leashed.output.readline(LINE_LIMIT):
            is_whole = piece.endswith(b"\n")
            text = decode(piece, final=is_whole).rstrip("\r\n")
            if text or (is_whole and not goes_on):
                log.write(self.service.name, text)
            goes_on = not is_whole
        if rest := decode(b"", final=True):
            log.write(self.service.name, rest)


class _Log:
    """The one stream all lines go to, each whole and under its writer's name."""

    def __init__(self, out: TextIO, names: Sequence[str]) -> None:
        self.is_broken = False
        self._out = out
        self._encoding = getattr(out, "encoding", None) or "utf-8"
        self._lock = threading.Lock()
        self._prefixes = _prefixes(names, coloured=out.isatty() and not os.environ.get("NO_COLOR"))

    def write(self, name: str, text: str) -> None:
        """Print one line. Never raises: a reader that stops reading would block its service."""
        line = f"{self._prefixes[name]}{text}\n"
        # A byte that this terminal can't show is still worth reading, and no reason to fall silent.
        line = line.encode(self._encoding, "backslashreplace").decode(self._encoding)
        with self._lock:
            try:
                self._out.write(line)
                self._out.flush()
            except (OSError, ValueError):  # `stillroom up | head`, or a closed file
                self.is_broken = True


def _prefixes(names: Sequence[str], *, coloured: bool) -> dict[str, str]:
    width = max(len(name) for name in (*names, OURSELVES))
    plain = {name: f"{name:{width}} | " for name in (*names, OURSELVES)}
    if not coloured:
        return plain
    colours = dict(zip(names, cycle(COLOURS), strict=False)) | {OURSELVES: "2"}
    return {name: f"\x1b[0m\x1b[{colours[name]}m{prefix}\x1b[0m" for name, prefix in plain.items()}


def _stop_signals() -> list[signal.Signals]:
    # SIGHUP, a closed terminal, stops as well, unless `nohup` asked to survive it.
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signals.remove(signal.SIGHUP)
    return signals


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _shell_code(code: int) -> int:
    # A negative code can't be an exit code; shells say 128 + the signal.
    return code if code >= 0 else 128 - code
