"""Many processes that read at the same time."""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median

from bench.growth.curve import Curve
from bench.others import doing
from bench.processes import cpus
from bench.report import Section
from bench.stage import Effort, Stage, server_cpu_us, stage


def processes(effort: Effort, section: Section) -> None:
    """Measure hits by the number of processes. All read as fast as they can, on one CPU; Redis has the other."""
    sizes = effort.pick(
        smoke=[1, 2], quick=[1, 4], usual=[1, 2, 4, 8, 16], full=[1, 2, 4, 8, 16, 32]
    )
    seconds = effort.pick(smoke=0.1, quick=1.0, usual=2.0, full=3.0)
    curve = Curve(
        "processes",
        "Hits by processes that read: µs of CPU",
        "processes",
        {
            "CPU µs of a hit": "{:.0f}",
            "server CPU µs": "{:.0f}",
            "hits/s": "{:,.0f}",
            "p99 ms": "{:.1f}",
        },
    )
    with stage() as here:
        here.room.cache.set("k", "x" * 200, tags=["mine"], ttl=3_600)
        for size in sizes:
            hits, cpu, p99, server = together(here, size, seconds)
            curve.add(size, cpu_us=cpu, server_us=server, per_s=hits / seconds, p99_ms=p99)
    curve.give(section, ["CPU µs of a hit", "server CPU µs"])


def together(here: Stage, size: int, seconds: float) -> tuple[int, float, float, float]:
    """Return (hits of all processes, CPU µs of a hit, p99 in ms, server CPU µs of a hit)."""
    measured, _ = cpus()
    with ExitStack() as stack:
        fleet = [
            stack.enter_context(doing("hits", here.url, seconds, cpu=measured)) for _ in range(size)
        ]
        before = server_cpu_us(here.client)
        for one in fleet:
            one.go()
        found = [one.report() for one in fleet]
    hits = sum(one["hits"] for one in found)
    server = (server_cpu_us(here.client) - before) / hits
    cpu, p99 = (median(one[name] for one in found) for name in ("cpu_us", "p99_ms"))
    return hits, cpu, p99, server
