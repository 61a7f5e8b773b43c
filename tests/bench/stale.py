"""What does a stale hit cost beside a fresh one, and how often does it cost more?

    python tests/bench/stale.py

Three kinds of read of the same value through a registered loader, interleaved in rounds: a fresh hit; the
first stale read of a period, which takes the refresh lease and hands an order to the dispatcher; and the stale
reads after it. For each: round trips as the server counted them, and the median wall and thread CPU time.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import redis

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests.support

from harness import Table
from hit import pin_to_one_cpu
from tests.support.entries import Recording, age

from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer

ROUNDS = 300
READS = 20  # fresh ones, and stale ones after the first, in each round


def main() -> None:
    pin_to_one_cpu()
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        with Stillroom(Settings(redis_url=server.url), dispatch=Recording()) as room:
            print(table(measure(room, client)))
    print(f"{ROUNDS} rounds, medians; the order is handed to a dispatch that only keeps it")


def measure(room: Stillroom, client: Any) -> dict[str, list[tuple[float, float, float]]]:
    """Kind of read → (round trips, wall µs, CPU µs) of one read, per round."""

    @room.cache.cached("product:{id}", ttl=600, swr=600, tags=["products", "brand:acme"])
    def load(id: int) -> dict[str, Any]:
        return {"id": id, "name": "Plum jam", "price_cents": 350}

    results: dict[str, list[tuple[float, float, float]]] = {}
    room.stats.due = 1 << 62  # the counts that ride along every 5 s are not what is measured
    for n in range(ROUNDS):
        load(n)
        sample(results, "fresh hit", client, lambda n=n: load(n), READS)
        age(client, room.keys.entry(b"product:%d" % n), 601)
        sample(results, "stale, first of its period", client, lambda n=n: load(n), 1)
        sample(results, "stale, after that", client, lambda n=n: load(n), READS)
    return results


def sample(
    results: dict[str, list[tuple[float, float, float]]],
    kind: str,
    client: Any,
    read: Callable[[], object],
    times: int,
) -> None:
    before = commands(client)
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    for _ in range(times):
        read()
    cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
    trips = commands(client) - before - 1  # this count is a command too
    results.setdefault(kind, []).append((trips / times, wall / times / 1000, cpu / times / 1000))


def commands(client: Any) -> int:
    """How many commands clients have sent; a script's own calls are not among them."""
    stats = client.info("commandstats")
    return sum(
        stats[name]["calls"]
        for name in ("cmdstat_mget", "cmdstat_evalsha", "cmdstat_zrange", "cmdstat_info")
        if name in stats
    )


def table(results: dict[str, list[tuple[float, float, float]]]) -> Table:
    printed = Table("read", "round trips", "wall µs", "CPU µs")
    for kind, samples in results.items():
        trips, wall, cpu = (median(column) for column in zip(*samples, strict=True))
        printed.add(kind, f"{trips:.2f}", f"{wall:.1f}", f"{cpu:.1f}")
    return printed


if __name__ == "__main__":
    os.environ.pop("REDIS_URL", None)
    main()
