"""A reader beside others' invalidations; and what a process asks for when there are many marks."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

from bench.growth.curve import Curve, ratio, used_memory
from bench.others import doing
from bench.processes import cpus
from bench.report import Section
from bench.stage import Effort, Stage, stage
from stillroom import NoDispatch, Stillroom

PER_S = 100  # reads of a process that is not busy
SELDOM_S = 2.0  # between two reads of a process that hardly reads


def rate(effort: Effort, section: Section) -> None:
    """Measure a hit while other tags are invalidated. The reader reads as fast as it can, or 100 times a second."""
    rates = effort.pick(
        smoke=[0, 50],
        quick=[0, 100, 1_000],
        usual=[0, 10, 100, 1_000, 3_000],
        full=[0, 10, 100, 1_000, 3_000, 5_000],
    )
    curve = Curve(
        "invalidations",
        "A hit beside others' invalidations, × GET",
        "invalidations a second",
        {
            "reading all the time, × GET": "{:.2f}",
            "100 reads/s, × GET": "{:.2f}",
            "bytes a read, 100 reads/s": "{:,.0f}",
            "bytes a read, one in 2 s": "{:,.0f}",
        },
    )
    reads = effort.pick(smoke=5, quick=100, usual=300, full=600)
    times = effort.pick(smoke=1, quick=2, usual=3, full=5)
    with stage() as here:
        room, client = here.room, here.client
        room.cache.set("k", "x" * 200, tags=["mine"], ttl=3_600)
        client.set("plain", "x" * 200)

        def get() -> object:
            return room.cache.get("k", str)

        def plain() -> object:
            return client.get("plain")

        for per_s in rates:
            with invalidating(here, per_s) if per_s else nullcontext():
                busy = ratio(get, plain, effort.rounds, effort.hits)
                calm, size = calmly(client, get, plain, reads)
                seldom = bytes_each(client, get, SELDOM_S, times=times)
            curve.add(per_s, busy=busy, calm=calm, bytes_each=size, seldom=seldom)
    curve.give(section, ["reading all the time, × GET", "100 reads/s, × GET"])


def invalidating(here: Stage, per_s: int) -> AbstractContextManager[object]:
    """Have another process invalidate that many tags a second, on the server's CPU."""
    return doing("invalidate", here.url, per_s, cpu=cpus()[1])


def calmly(client: Any, get: Any, plain: Any, reads: int) -> tuple[float, float]:
    """Do a hundred of both a second. Return (CPU of ours as a multiple of GET, bytes of ours)."""
    mine: list[int] = []
    theirs: list[int] = []
    for _ in range(reads):
        time.sleep(1 / PER_S)
        for act, taken in ((plain, theirs), (get, mine)):
            began = time.thread_time_ns()
            act()
            taken.append(time.thread_time_ns() - began)
    return median(mine) / median(theirs), bytes_each(client, get, 1 / PER_S, times=10)


def bytes_each(client: Any, get: Any, every_s: float, *, times: int) -> float:
    """Return what the server sends for one of so many reads, without what others ask it for in that time."""
    sent = []
    for act in (_nothing, get):
        before = client.info("stats")["total_net_output_bytes"]
        for _ in range(times):
            time.sleep(every_s)
            act()
        sent.append(client.info("stats")["total_net_output_bytes"] - before)
    return max(0.0, float(sent[1] - sent[0]) / times)


def _nothing() -> None:
    """Stand in for a read."""


def marks(effort: Effort, section: Section) -> None:
    """Measure the first read of a process that has just started."""
    sizes = effort.pick(
        smoke=[10, 100],
        quick=[100, 1_000, 10_000, 30_000],
        usual=[100, 1_000, 10_000, 60_000],
        full=[100, 1_000, 10_000, 60_000, 200_000],
    )
    curve = Curve(
        "marks",
        "The first read of a new process: longest command, µs",
        "marks kept",
        {
            "longest command µs": "{:,.0f}",
            "CPU of the process ms": "{:.2f}",
            "bytes read": "{:,.0f}",
            "bytes of Redis a mark": "{:,.0f}",
        },
    )
    with stage() as here:
        room, client, made = here.room, here.client, 0
        room.cache.set("k", 1, tags=["mine"], ttl=3_600)
        room.cache.invalidate_by_tag("first")
        before = used_memory(client)
        for size in sizes:
            for start in range(made, size, 100):
                room.cache.invalidate_by_tag(*[f"m:{n}" for n in range(start, start + 100)])
            made = max(made, size)
            each = (used_memory(client) - before) / made
            found = [_first_read(here) for _ in range(5)]
            us, ms, read = (median(column) for column in zip(*found, strict=True))
            curve.add(size, us=us, ms=ms, read=read, each=each)
    curve.give(section, ["longest command µs"])


def _first_read(here: Stage) -> tuple[float, float, float]:
    """Measure a new process' first read: (µs of its longest command, ms of CPU, bytes)."""
    client = here.client
    client.config_set("slowlog-log-slower-than", 0)
    with Stillroom(here.settings, dispatch=NoDispatch()) as new:
        client.slowlog_reset()
        before = client.info("stats")["total_net_output_bytes"]
        began = time.thread_time()
        assert new.cache.get("k") == 1
        ms = 1_000 * (time.thread_time() - began)
        size = client.info("stats")["total_net_output_bytes"] - before
        longest = max(one["duration"] for one in client.slowlog_get(50))
    client.config_set("slowlog-log-slower-than", -1)
    return longest, ms, size
