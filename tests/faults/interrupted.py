"""Reads that are interrupted by signals at random instants. Run as a program.

python interrupted.py URL INTERRUPTIONS   → prints "wrong right connections"
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from typing import Any

from stillroom import NoDispatch, Settings, Stillroom


class Interrupted(Exception):
    """Raised by the signal handler, anywhere."""


armed = False


def interrupt(*_: Any) -> None:
    global armed
    if armed:
        armed = False  # one at a time, and none while the test itself counts
        raise Interrupted


def arm() -> None:
    global armed
    armed = True


def send_signals(pid: int) -> None:
    """Send signals now and then, busily: a timer's grain would be milliseconds, and the interesting instants are
    microseconds apart."""
    while os.getppid() == pid:
        until = time.perf_counter() + random.uniform(1e-4, 2e-3)
        while time.perf_counter() < until:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)


def read_until_interrupted(room: Stillroom, n: int, tally: dict[str, int]) -> None:
    while armed:  # a swallowed exception has disarmed
        value = room.cache.get(f"k:{n}")
        if value is not None:
            tally["right" if value == f"value of {n}" else "wrong"] += 1


def main(url: str, interruptions: int) -> None:
    # An exception that strikes in a destructor is swallowed by Python, and says so on stderr.
    sys.unraisablehook = lambda _: None
    room = Stillroom(Settings(redis_url=url), dispatch=NoDispatch())
    for n in range(10):
        room.cache.set(f"k:{n}", f"value of {n}", ttl=3600)
    tally = {"right": 0, "wrong": 0}
    signal.signal(signal.SIGUSR1, interrupt)
    sender = os.fork()
    if sender == 0:
        send_signals(os.getppid())
        os._exit(0)
    for n in range(interruptions):
        try:
            arm()
            read_until_interrupted(room, n % 10, tally)
        except Interrupted:
            pass
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.kill(sender, signal.SIGKILL)
    os.waitpid(sender, 0)
    if room.wire.breaker.is_open or room.cache.get("k:3") != "value of 3":
        sys.exit("the wire did not survive")
    print(tally["wrong"], tally["right"], room.wire.connections)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
