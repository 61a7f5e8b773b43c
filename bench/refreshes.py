"""Measures how many refreshes a worker carries out in a second, and how soon a single one is done.

Everything goes the whole way: an app's stale read, the thread that publishes, the broker, a worker's process, and
the value in Redis. The app and Redis share a CPU, the worker has the other.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

from bench.harness import quiet_gc
from bench.others import percentile
from bench.processes import Process, cpus, pin, worker
from bench.report import Promise, Section, Table
from bench.stage import NEVER, Effort, Stage, stage
from stillroom import Stillroom
from stillroom.leash import until
from tests.support.entries import age

THREADS = 8
FREE_RATE, SLOW_MS, SLOW_SHARE = 2_000, 20, 0.6
SINGLE_P50_MS, SINGLE_P99_MS = 10.0, 30.0
SINGLES = 300
STALE_S = 61.0
AT_ONCE = 200  # entries that are looked at
IDLE_S = 3.0  # a worker that has refreshed nothing for so long does no more


class Rate(NamedTuple):
    per_s: float
    cpu_us: float  # of the worker, for each
    share: float  # of the orders that were carried out


def run(effort: Effort) -> Section:
    free = effort.pick(smoke=30, quick=3_000, usual=10_000, full=20_000)
    slow = effort.pick(smoke=30, quick=600, usual=2_000, full=4_000)
    table = Table(["refreshes by one worker", "a second", "worker CPU µs each", "carried out"])
    single: list[float] = []
    rates = {}
    for loader_ms, count in ((0, free), (SLOW_MS, slow)):
        with stage(apart=False) as here:
            rates[loader_ms] = rate(here, loader_ms, count, single)
        name = f"{count:,}, the loader takes {loader_ms} ms, {THREADS} threads"
        figures = rates[loader_ms]
        table.add(name, f"{figures.per_s:,.0f}", f"{figures.cpu_us:,.0f}", f"{figures.share:.0%}")
    p50, p99 = median(single), percentile(single)
    alone = Table(["a single refresh on an idle worker", "p50 ms", "p99 ms"])
    alone.add("from the stale read to the new value", f"{p50:.1f}", f"{p99:.1f}")
    most = 1_000 / SLOW_MS * THREADS
    return Section(
        name="refreshes",
        title="Refreshes",
        tables=[table, alone],
        promises=[
            Promise("refreshes a second", rates[0].per_s, FREE_RATE, at_most=False, by="wall time"),
            Promise(
                f"refreshes a second of a {SLOW_MS} ms loader, × what {THREADS} threads can do",
                rates[SLOW_MS].per_s / most,
                SLOW_SHARE,
                at_most=False,
                by="wall time",
            ),
            Promise("a single refresh, ms, p50", p50, SINGLE_P50_MS, by="wall time"),
            Promise("a single refresh, ms, p99", p99, SINGLE_P99_MS, by="wall time"),
        ],
    )


def rate(here: Stage, loader_ms: int, count: int, single: list[float]) -> Rate:
    """Read so many stale values, one by one, and wait for all of them to be fresh."""
    worker_cpu, others = cpus()
    changes = {"STILLROOM_WORKER_THREADS": str(THREADS), "BENCH_LOADER_MS": str(loader_ms)}
    with (
        worker(here.url, worker_cpu, "bench.loaders", **changes) as process,
        Stillroom(here.settings) as room,
    ):
        pin(others)
        pin(others, here.server.pid)
        room.stats.due = NEVER
        load = loader(room)
        for n in range(count):
            load(n)
        one_alone(here, room, load, 0)  # the first one imports Celery
        if not loader_ms:
            with quiet_gc():  # a collection of this process takes longer than ten refreshes
                single += [one_alone(here, room, load, n) for n in range(min(SINGLES, count))]
        make_stale(here, room, count)
        return _carried_out(here, room, process, load, count)


def _carried_out(here: Stage, room: Stillroom, process: Process, load: Any, count: int) -> Rate:
    with process.stopped():
        for n in range(count):
            load(n)
    cpu, began = process.cpu_us, time.perf_counter()
    waiting, done_at = list(range(count)), began
    while waiting and time.perf_counter() - done_at < IDLE_S:
        time.sleep(0.02)
        if fresh := first_fresh(here, room, waiting):
            waiting, done_at = [n for n in waiting if n not in fresh], time.perf_counter()
    done = max(1, count - len(waiting))
    return Rate(done / (done_at - began), (process.cpu_us - cpu) / done, done / count)


def one_alone(here: Stage, room: Stillroom, load: Any, n: int) -> float:
    """Return the ms from a stale read to the new value."""
    key = room.keys.entry(b"product:%d" % n)
    age(here.client, key, STALE_S)
    old = here.client.get(key)
    began = time.perf_counter()
    load(n)
    until(lambda: here.client.get(key) != old, 10.0)
    return 1_000 * (time.perf_counter() - began)


def loader(room: Stillroom) -> Any:
    """Register the app's loader, which is not run again: bench.loaders has the worker's."""

    @room.cache.cached("product:{id}", ttl=STALE_S - 1, swr=600, tags=["products"])
    def product(id: int) -> dict[str, Any]:
        return {"id": id, "name": "x" * 200}

    return product


def make_stale(here: Stage, room: Stillroom, count: int) -> None:
    for n in range(count):
        age(here.client, room.keys.entry(b"product:%d" % n), STALE_S)


def first_fresh(here: Stage, room: Stillroom, waiting: list[int]) -> set[int]:
    """Return those that are fresh now. As they were ordered in turn, no more is read than is found, and a few."""
    fresh: set[int] = set()
    for start in range(0, len(waiting), AT_ONCE):
        some = waiting[start : start + AT_ONCE]
        entries = here.client.mget([room.keys.entry(b"product:%d" % n) for n in some])
        now_ms = time.time() * 1_000
        found = {
            n
            for n, entry in zip(some, entries, strict=True)
            if int(entry.split(b"\t", 4)[3]) > now_ms
        }
        fresh |= found
        if len(found) < len(some) // 2:
            break
    return fresh
