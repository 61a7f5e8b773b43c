"""A program from a nursery is as good as one of its own: environment, arguments, files, signals and end are its."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import nursery
from tests.support.processes import WITHIN, all_gone, is_gone

LOOK = """
import os, sys
print(sys.argv, sys.path[1], os.getcwd(), sorted(os.environ), sys.stdout.encoding, __name__)
print("é" if sys.stdout.encoding == "utf-8" else "e", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_program_has_what_it_is_given_and_nothing_else(tmp_path: Path, encoding: str) -> None:
    """Arguments, path, directory, environment, output and exit code are as of a program that is started alone."""
    environment = {"PYTHONPATH": "/nowhere", "PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"}
    told = {}
    for start in (nursery.start, nursery.start_alone):
        with (tmp_path / "out").open("wb") as out:
            child = start(
                ["-c", LOOK, "a", "b"],
                environment,
                folder=tmp_path,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            assert child.wait(WITHIN) == 3
        told[start] = (tmp_path / "out").read_text(encoding)
    assert len({*told.values()}) == 1


def test_a_fork_of_an_unbuffered_program_loses_nothing() -> None:
    """Where PYTHONUNBUFFERED is set, what is printed is out before a fork ends without a word."""
    forks = (
        "import os\nprint('one')\nif os.fork() == 0:\n    print('two')\n    os._exit(0)\nos.wait()"
    )
    done = nursery.run(["-c", forks], os.environ | {"PYTHONUNBUFFERED": "1"})
    assert done.stdout == b"one\ntwo\n"


def test_it_has_imported_no_framework_that_an_app_may_do_without() -> None:
    """Modules that Stillroom looks for, to see what an app uses, are not there because of the nursery."""
    there = "import sys; print(*{'django.apps', 'flask', 'fastapi', 'pytest'} & {*sys.modules})"
    done = nursery.run(["-c", there], os.environ)
    assert (done.returncode, done.stdout) == (0, b"\n")


def test_it_leads_a_group_and_ends_by_signals() -> None:
    """A signal reaches the program and is its exit code; nothing of it is left."""
    sleeps = ["-c", "import time; print('here', flush=True); time.sleep(60)"]
    child = nursery.start(sleeps, os.environ, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"here\n"
    assert os.getpgid(child.pid) == child.pid
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.send_signal(signal.SIGINT)
    assert child.wait(WITHIN) == -signal.SIGINT
    child.kill()  # which nobody hears any more
    child.stdout.close()
    assert is_gone(child.pid)


def test_programs_outlive_a_nursery_and_a_nursery_ends_with_the_tests() -> None:
    """When the tests are killed their nursery ends. Its programs are ended by those who started them, as ever."""
    source = (
        "import os\nfrom tests.support import nursery\n"
        "child = nursery.start(['-c', 'import time; time.sleep(60)'], os.environ, stdout=-3)\n"
        "print(child.pid, nursery._nursery()._process.pid, flush=True)\nos._exit(0)"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    program, its_nursery = map(int, done.stdout.split())
    assert all_gone(its_nursery)
    assert not is_gone(program)
    os.kill(program, signal.SIGKILL)
    assert all_gone(program)


def test_a_nursery_ends_with_tests_that_are_killed_in_the_middle_of_an_order() -> None:
    """A nursery that reads half an order, of tests that were killed, ends and does not read on for ever."""
    one = nursery._Nursery()
    atexit.unregister(one.close)
    socket.send_fds(one._orders, [(100).to_bytes(nursery.LENGTH)], [0, 1, 2, 1])
    one._orders.sendall(b"half")
    one._orders.close()
    try:
        assert one._process.wait(WITHIN) == 0
    finally:
        one._process.kill()
