"""A child process that never outlives this one, not even when this one dies by SIGKILL.

Why not the usual ways:

- `atexit` and signal handlers don't run on SIGKILL.
- PR_SET_PDEATHSIG is Linux only, needs `preexec_fn`, which can deadlock once there are threads, and
  fires when the *thread* that started the child ends: a server started in a pool's thread dies with
  the pool.

So a watcher leads a process group of its own, and the child joins it. The watcher reads a pipe that
only we hold open. When we are gone, the kernel closes our end, and the watcher kills its group with
itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

GONE_WITHIN = 0.2  # seconds for a killed group to disappear
POLL = 0.005  # seconds

# getppid: after a fork without exec (multiprocessing, a prefork pool) our forks hold the pipe open
# too.
_WATCHER = """
import os, select, signal, sys
while os.getppid() == int(sys.argv[1]) and not select.select([0], [], [], 1.0)[0]:
    pass
os.kill(0, signal.SIGKILL)
"""

_DEAF_TO = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Leashed:
    """One running command in a process group that is killed when this process is gone.

    A terminal's Ctrl-C does not reach the group. A process that leaves the group (`setsid`, a
    daemon) is off the leash. `stdout` takes both streams; stdin is empty. Raises `OSError` if there
    is no such command.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: int | IO[bytes],
        env: Mapping[str, str] | None = None,  # None: ours
        cwd: Path | None = None,  # None: ours
    ) -> None:
        self._starter = os.getpid()
        self._watcher = _start_watcher()
        try:
            # No gap to die in: until it execs, the fork holds a copy of our end of the pipe, and it
            # joins the group before that. The watcher can't read the end of the pipe and miss this
            # child.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                process_group=self._watcher.pid,
            )
        except BaseException:
            self._kill_group()
            raise

    @property
    def pid(self) -> int:
        """Return the command's own process id: nothing stands between it and us."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Return None while the command runs; -9 if SIGKILL ended it. A fork is not told how it ended: 0."""
        if self._starter != os.getpid():
            return None if _exists(self.pid) else 0
        return self._process.poll()

    @property
    def output(self) -> IO[bytes]:
        """Return our end of its stdout and stderr, if it was started with `stdout=subprocess.PIPE`."""
        assert self._process.stdout is not None, "started without a pipe"
        return self._process.stdout

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command alone; nothing happens if it has ended."""
        self._process.send_signal(number)

    def wait_stopped(self, seconds: float) -> bool:
        """Return whether a SIGSTOP arrives within `seconds`. Until it has, the command may still answer.

        Each stop is told once.
        """
        return until(self._has_stopped, seconds)

    def kill(self) -> None:
        """Kill what is left of the group, children's children too; returns when all are gone.

        In a fork of the process that started the command it runs on: it is no child of the fork.
        """
        if self._starter != os.getpid():
            # Else Python would warn of what is open, and still runs, when this is dropped.
            self._process.returncode = self._watcher.returncode = 0
            if self._watcher.stdin is not None:
                self._watcher.stdin.close()
        elif self._watcher.returncode is None:
            self._kill_group()
            self._process.wait()
            until(self._group_is_gone, GONE_WITHIN)

    def _has_stopped(self) -> bool:
        if self._process.returncode is not None:
            return True
        pid, status = os.waitpid(self.pid, os.WUNTRACED | os.WNOHANG)
        if pid and not os.WIFSTOPPED(status):
            # It has ended instead, and we have reaped it.
            self._process.returncode = os.waitstatus_to_exitcode(status)
        return pid != 0

    def _kill_group(self) -> None:
        # The id can't have passed to another group: the watcher carries it and is not reaped yet.
        # macOS answers EPERM for a group of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._watcher.pid, signal.SIGKILL)
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()
        self._watcher.wait()

    def _group_is_gone(self) -> bool:
        # A killed grandchild keeps its port and its files for some ms. Its zombie keeps nothing but
        # counts here until init reaps it, and in a container without an init nobody does: hence the
        # short limit.
        try:
            os.killpg(self._watcher.pid, 0)
        except (ProcessLookupError, PermissionError):
            return True
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # the second: its number is another's by now
        return False
    return True


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask every 5 ms until `condition` holds; False if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def _start_watcher() -> subprocess.Popen[bytes]:
    # -I -S: starts in 15 ms with 4 MB, and a `select.py` in the working directory is not imported.
    # No caller waits for these 15 ms: the process leads its group from the first moment, and the pipe can wait.
    with _blocked(_DEAF_TO):
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHER, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd="/",
            process_group=0,
        )


@contextlib.contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    # When we die while the child is frozen, the kernel sends SIGHUP to its orphaned group. Ignoring
    # it in the watcher comes too late: on a busy machine the watcher died while Python started, and
    # the server, which ignores SIGHUP, stayed. What is blocked stays so across fork and exec.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
