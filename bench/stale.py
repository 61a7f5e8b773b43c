"""Measures what a stale hit costs beside a fresh one, and how often it costs more.

Three kinds of read of the same value through a registered loader, interleaved in rounds: a fresh hit; the first
stale read of a period, which takes the refresh lease and hands an order to the dispatcher; and the stale reads
after it. Each has the round trips as the server counted them, and the median wall and thread CPU time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from bench.report import Promise, Section, Table
from bench.stage import NEVER, Effort, Stage, stage
from stillroom import Stillroom
from tests.support.entries import Recording, age

READS = 20  # fresh ones, and stale ones after the first, in each round
FRESH, FIRST, STALE = "fresh hit", "stale, first of its period", "stale, after that"
STALE_OVER_FRESH = 1.2  # at most


class Cost(NamedTuple):
    """Holds the cost of one read."""

    trips: float
    wall_us: float
    cpu_us: float


def run(effort: Effort) -> Section:
    rounds = effort.pick(smoke=3, quick=100, usual=300, full=500)
    with stage() as here, Stillroom(here.settings, dispatch=Recording()) as room:
        costs = measure(here, room, rounds)
    table = Table(["read", "round trips", "wall µs", "CPU µs"])
    for kind, samples in costs.items():
        trips, wall, cpu = (median(column) for column in zip(*samples, strict=True))
        table.add(kind, f"{trips:.2f}", f"{wall:.1f}", f"{cpu:.1f}")
    ratios = [a.cpu_us / b.cpu_us for a, b in zip(costs[STALE], costs[FRESH], strict=True)]
    trips = median(cost.trips for cost in costs[STALE])
    return Section(
        name="stale",
        title="Stale reads",
        tables=[table],
        promises=[
            Promise("round trips of a stale read", trips, 1.0, by="the server's count"),
            Promise("a stale read takes, × a fresh", median(ratios), STALE_OVER_FRESH, by="CPU"),
        ],
        notes=["the order is handed to a dispatch that only keeps it"],
    )


def measure(here: Stage, room: Stillroom, rounds: int) -> dict[str, list[Cost]]:
    """Return what each kind of read cost, round by round."""

    @room.cache.cached("product:{id}", ttl=600, swr=600, tags=["products", "brand:acme"])
    def load(id: int) -> dict[str, Any]:
        return {"id": id, "name": "Plum jam", "price_cents": 350}

    costs: dict[str, list[Cost]] = {FRESH: [], FIRST: [], STALE: []}
    room.stats.due = NEVER
    for n in range(rounds):
        load(n)
        costs[FRESH].append(cost(here.client, lambda n=n: load(n), READS))
        age(here.client, room.keys.entry(b"product:%d" % n), 601)
        costs[FIRST].append(cost(here.client, lambda n=n: load(n), 1))
        costs[STALE].append(cost(here.client, lambda n=n: load(n), READS))
    return costs


def cost(client: Any, read: Callable[[], object], times: int) -> Cost:
    before = commands(client)
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    for _ in range(times):
        read()
    cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
    trips = commands(client) - before - 1  # this count is a command too
    return Cost(trips / times, wall / times / 1000, cpu / times / 1000)


def commands(client: Any) -> int:
    """Return how many commands clients have sent, without a script's own calls."""
    stats = client.info("commandstats")
    names = ("cmdstat_mget", "cmdstat_evalsha", "cmdstat_zrange", "cmdstat_info")
    return sum(stats[name]["calls"] for name in names if name in stats)
