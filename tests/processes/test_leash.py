"""A leashed process ends when the process that started it ends, however it ends."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from stillroom.leash import Leashed
from tests.support.processes import OwnProgram, all_gone, is_gone, our_children

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]

PROGRAM = """
import os, signal, subprocess, sys, time
from stillroom.leash import Leashed

leashed = Leashed([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"], stdout=1)
"""


@pytest.fixture
def leashed() -> Iterator[Leashed]:
    leashed = Leashed(SLEEP, stdout=subprocess.DEVNULL)
    yield leashed
    leashed.kill()


def test_it_dies_with_its_parent() -> None:
    """SIGKILL for the parent ends the child."""
    with OwnProgram(PROGRAM + "print('pid', leashed.pid); time.sleep(60)") as parent:
        pid = int(parent.read_word("pid"))
        assert not is_gone(pid)
        parent.kill()
        assert all_gone(pid)


def test_it_dies_frozen_with_a_parent_that_dies_early() -> None:
    """The kernel's SIGHUP to a frozen orphan does not end the watcher, not even a starting one."""
    source = """
    import os, signal, subprocess
    from stillroom.leash import Leashed
    deaf = ["sh", "-c", "trap '' HUP; echo deaf; exec sleep 60"]
    leashed = Leashed(deaf, stdout=subprocess.PIPE)
    leashed.output.readline()
    leashed.send(signal.SIGSTOP)
    leashed.wait_stopped(5)
    print("pid", leashed.pid)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with OwnProgram(source) as parent:
        assert all_gone(int(parent.read_word("pid")))


def test_it_dies_with_its_parent_although_a_fork_lives_on() -> None:
    """A fork of the parent inherits the pipe but does not keep the child alive."""
    fork = """
fork = os.fork()
if fork == 0:
    time.sleep(60)
    os._exit(0)
print("fork", fork)
print("pid", leashed.pid)
time.sleep(60)
"""
    with OwnProgram(PROGRAM + fork) as parent:
        fork_pid, pid = int(parent.read_word("fork")), int(parent.read_word("pid"))
        parent.kill()
        try:
            assert all_gone(pid)
            assert not is_gone(fork_pid)
        finally:
            os.kill(fork_pid, signal.SIGKILL)


def test_it_dies_with_a_parent_that_just_ends() -> None:
    """A parent that forgets its child and exits leaves nobody behind."""
    with OwnProgram(PROGRAM + "print('pid', leashed.pid); os._exit(0)") as parent:
        assert all_gone(int(parent.read_word("pid")))


def test_it_outlives_the_thread_that_started_it() -> None:
    """The end of the starting thread is not the end of the process."""
    started: list[Leashed] = []
    thread = threading.Thread(
        target=lambda: started.append(Leashed(["/bin/cat", "/dev/zero"], stdout=subprocess.PIPE))
    )
    thread.start()
    thread.join()
    leashed = started[0]
    # It writes more than a pipe holds, so it was alive when the last of this was read.
    assert len(leashed.output.read(1_000_000)) == 1_000_000
    assert leashed.exit_code is None
    leashed.kill()
    leashed.output.close()


def test_kill_leaves_nobody(others: set[int], leashed: Leashed) -> None:
    """After kill() neither the child nor its watcher exists, not even as a zombie."""
    assert leashed.pid in our_children()
    leashed.kill()
    leashed.kill()
    assert leashed.exit_code == -signal.SIGKILL
    assert our_children() == others


def test_stop_is_told_apart_from_an_end(leashed: Leashed) -> None:
    """Waiting for a stop returns when the child ends instead, and its exit code is kept."""
    leashed.send(signal.SIGKILL)
    assert leashed.wait_stopped(5.0)
    assert leashed.exit_code == -signal.SIGKILL


def test_no_such_command_leaves_nobody(others: set[int]) -> None:
    """A command that can't be run raises OSError, and the watcher is gone."""
    with pytest.raises(FileNotFoundError):
        Leashed(["/no/such/command"], stdout=subprocess.DEVNULL)
    assert our_children() == others
