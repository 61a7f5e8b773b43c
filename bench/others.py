"""Runs the work of other processes while something is measured: `python -m bench.others <what> <url> …`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import redis
from bench.processes import on
from bench.stage import NEVER, PATIENT
from stillroom import NoDispatch, Settings, Stillroom


class Other:
    """Another process, which has said that it is ready."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def is_done(self) -> bool:
        return self._process.poll() is not None

    def go(self) -> None:
        """Let it begin, where it waits for that."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def report(self) -> Any:
        """Wait until the process is done, and return its report."""
        return json.loads(self._process.communicate()[0])


@contextmanager
def doing(what: str, *arguments: object, cpu: set[int]) -> Iterator[Other]:
    """Run this work in another process, which is killed at the end."""
    words = [sys.executable, "-m", "bench.others", what, *map(str, arguments)]
    with on(cpu):
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield Other(process)
    finally:
        process.kill()
        process.wait()


def latencies(client: Any, enough: Callable[[float], bool]) -> list[float]:
    """Return the seconds that each GET took, one after the other."""
    times: list[float] = []
    started = time.perf_counter()
    while not enough(time.perf_counter() - started):
        for _ in range(50):
            began = time.perf_counter()
            client.get("probe")
            times.append(time.perf_counter() - began)
    return times


def percentile(times: list[float], share: float = 0.99) -> float:
    return sorted(times)[int(len(times) * share)]


# --- what they do ---------------------------------------------------------------------------------


def reclaim(url: str) -> dict[str, float]:
    """Reclaim as a worker's thread does behind an invalidation."""
    with _room(url) as room:
        _ready()
        began, deleted = time.perf_counter(), 0
        while (done := room.cache.reclaim(budget=600))["done"]:
            deleted += done["deleted"]
        return {"deleted": deleted, "seconds": time.perf_counter() - began}


def gets(url: str, seconds: str) -> int:
    """Send one GET of redis-py after the other, and return how many."""
    with redis.Redis.from_url(url) as client:
        _ready()
        return len(latencies(client, lambda waited: waited > float(seconds)))


def hits(url: str, seconds: str) -> dict[str, float]:
    """Make one hit after the other, from when all processes are ready."""
    with _room(url) as room:
        room.stats.due = NEVER
        room.cache.get("k", str)
        _ready()
        sys.stdin.readline()
        times: list[float] = []
        until, cpu = time.perf_counter() + float(seconds), time.thread_time()
        while (began := time.perf_counter()) < until:
            room.cache.get("k", str)
            times.append(time.perf_counter() - began)
        cpu_us = 1e6 * (time.thread_time() - cpu) / len(times)
        return {"hits": len(times), "cpu_us": cpu_us, "p99_ms": 1e3 * percentile(times)}


def invalidate(url: str, per_s: str) -> NoReturn:
    """Invalidate so many other tags a second, until this process is ended."""
    with _room(url) as room:
        _ready()
        began, done = time.perf_counter(), 0
        while True:
            room.cache.invalidate_by_tag(f"other:{done % 50_000}")
            done += 1
            time.sleep(max(0.0, began + done / float(per_s) - time.perf_counter()))


def _room(url: str) -> Stillroom:
    return Stillroom(Settings(**{"redis_url": url} | PATIENT), dispatch=NoDispatch())


def _ready() -> None:
    print("ready", flush=True)


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    acts: dict[str, Callable[..., Any]] = {
        "reclaim": reclaim,
        "gets": gets,
        "hits": hits,
        "invalidate": invalidate,
    }
    print(json.dumps(acts[what](*arguments)))
