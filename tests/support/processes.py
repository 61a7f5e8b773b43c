"""Programs of our own to kill, and a look at the processes that are left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from stillroom.leash import until
from tests.support import nursery

STILLROOM = str(Path(sys.executable).with_name("stillroom"))  # the command
WITHIN = 40.0  # seconds a test waits for anything before it fails, on a busy machine too


@contextmanager
def halted(group: int) -> Iterator[None]:
    """Halt all processes of a group meanwhile. They answer nobody; their connections stay open."""
    os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(group, signal.SIGCONT)


class Program:
    """A Python program in a process group of its own; it is killed if it outlives its deadline."""

    _start = staticmethod(nursery.start)

    def __init__(self, source: str, within: float = WITHIN) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self.process = self._start(
            ["-c", textwrap.dedent(source)],
            {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        self._deadline = threading.Timer(within, self.process.kill)
        self._deadline.start()

    def read_until(self, text: str) -> list[str]:
        """Return the lines up to and with the first that contains `text`."""
        lines: list[str] = []
        while line := self.stdout.readline().decode():
            lines.append(line.rstrip("\n"))
            if text in line:
                return lines
        raise AssertionError(f"no {text!r} in {lines}")

    def read_word(self, after: str) -> str:
        """Return the word behind `after` in the next line that has it."""
        return self.read_until(after)[-1].partition(after)[2].strip()

    def read_rest(self) -> list[str]:
        return self.stdout.read().decode().splitlines()

    def exit_code(self) -> int:
        return self.process.wait(WITHIN)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ctrl_c(self) -> None:
        """Send SIGINT to the whole group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._deadline.cancel()
        self._deadline.join()
        self.kill()
        self.stdout.close()


def run_to_end(
    words: Sequence[Any], *, timeout: float = 100.0, **where: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its exit code is; return the text it wrote."""
    return subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=timeout, **where
    )


@contextmanager
def attended(
    words: Sequence[str], environment: Mapping[str, str], within: float = 100.0, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run a program that prints text, in a process group of its own, while the block runs.

    If the program still runs when the block ends, or after `within` seconds, its group is killed: nobody waits for
    ever for its end or for another line of it.
    """
    with subprocess.Popen(words, env=environment, text=True, process_group=0, **options) as process:

        def kill() -> None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

        guard = threading.Timer(within, kill)
        guard.start()
        try:
            yield process
        finally:
            guard.cancel()
            kill()


class OwnProgram(Program):
    """A program that is started as any other, for tests of what starts and ends processes."""

    _start = staticmethod(nursery.start_alone)


def is_gone(pid: int) -> bool:
    """Return whether nothing runs under this id; an orphan's zombie is left to init."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def all_gone(*pids: int) -> bool:
    """Wait until all have ended; return whether they have."""
    return until(lambda: all(map(is_gone, pids)), WITHIN)


def our_children() -> set[int]:
    """Return the process ids of all our descendants, zombies included."""
    return {child.pid for child in psutil.Process().children(recursive=True)}
