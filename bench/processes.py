"""Other processes: on which CPU they run, what they take, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from stillroom.leash import until

ROOT = Path(__file__).parent.parent
START_WITHIN, STOP_WITHIN = 30.0, 10.0  # seconds


EVERYWHERE = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()


def cpus() -> tuple[set[int], set[int]]:
    """Return the CPU for what is measured, and the CPUs for other processes: the same where there is only one."""
    measured = {max(EVERYWHERE)} if EVERYWHERE else EVERYWHERE
    return measured, EVERYWHERE - measured or measured


def pin(cpu: set[int], pid: int = 0) -> None:
    if cpu:
        os.sched_setaffinity(pid, cpu)


@contextmanager
def on(cpu: set[int]) -> Iterator[None]:
    """Run what is started inside on these CPUs: a child begins where its parent is."""
    if not cpu:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpu)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def apart_from(server_pid: int) -> None:
    """Pin this process to one CPU and the server to the others, where there are any.

    As in real life, where Redis is on another machine: what a request needs is still in the caches of its CPU, and
    the server has not pushed it out. CPU time is counted, so waiting for another CPU to wake costs nothing.
    """
    measured, others = cpus()
    pin(measured)
    pin(others, server_pid)


class Process:
    """One that was started here."""

    def __init__(self, process: psutil.Popen, log: IO[str]) -> None:
        self._process = process
        self._log = log

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    @property
    def cpu_us(self) -> float:
        """Return the CPU µs that it and its children have taken so far."""
        family = (self._process, *self._process.children(recursive=True))
        times = [one.cpu_times() for one in family]
        return 1e6 * float(sum(one.user + one.system for one in times))

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Have it and its children do nothing meanwhile."""
        family = [self._process, *self._process.children(recursive=True)]
        for one in family:
            one.suspend()
        try:
            yield
        finally:
            for one in family:
                one.resume()

    def wait_for(self, ready: Callable[[], Any]) -> None:
        """Wait until it is ready. Raises RuntimeError with its log if that takes too long."""
        if not until(lambda: ready() or self._process.poll() is not None, START_WITHIN):
            raise RuntimeError(f"{self._process.args} is not ready: {self.log}")
        if self._process.poll() is not None:
            raise RuntimeError(f"{self._process.args} ended: {self.log}")


@contextmanager
def python(
    words: Sequence[str], cpu: set[int], environment: Mapping[str, str]
) -> Iterator[Process]:
    """Run `python <words>` on this CPU, and end it with its children."""
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with tempfile.TemporaryFile("w+") as log:
        with on(cpu):
            process = psutil.Popen(
                [sys.executable, *words],
                env={**os.environ, "PYTHONPATH": paths, **environment},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Process(process, log)
        finally:
            _end(process)


@contextmanager
def worker(url: str, cpu: set[int], loaders: str, **changes: str) -> Iterator[Process]:
    """Run a Celery worker of ours; it is ready when the block begins."""
    words = ["-m", "celery", "-A", "stillroom_workers", "worker", "-l", "INFO"]
    environment = {"REDIS_URL": url, "STILLROOM_LOADERS": loaders, **changes}
    with python([*words, "--without-gossip", "--without-mingle"], cpu, environment) as process:
        process.wait_for(lambda: " ready." in process.log)
        yield process


def _end(process: psutil.Popen) -> None:
    """End it and its children. One that has ended by itself hides no error that says why."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    _, alive = psutil.wait_procs(family, STOP_WITHIN)
    for one in alive:
        one.kill()
