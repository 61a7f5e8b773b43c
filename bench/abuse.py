"""Measures how many events a second workers can read while an attack goes on.

Failed logins are the dearest: each event counts for several rules, and each address and user has counts of its own.
"""

from __future__ import annotations

import random
import time
from typing import NamedTuple

from bench.report import Promise, Section, Table
from bench.stage import Effort, Stage, server_cpu_us, stage
from stillroom.abuse import LOG_TASK
from stillroom.abuse.body import SCAN_S
from stillroom_workers.schedule import SCHEDULE

ADDRESSES, USERS = 16_384, 5_000
SUSTAINED = 5_000  # events a second
RUNS = 3


class Cost(NamedTuple):
    per_s: float
    worker_us: float  # of each event
    server_us: float


def run(effort: Effort) -> Section:
    count = effort.pick(smoke=50, quick=5_000, usual=20_000, full=50_000)
    kinds = {"failed logins": "auth_fail", "denials": "denied"}
    with stage() as here:
        costs = {name: scan(here, kind, count) for name, kind in kinds.items()}
    table = Table([f"{count:,} events", "a second", "worker µs", "server µs"])
    for name, cost in costs.items():
        table.add(name, f"{cost.per_s:,.0f}", f"{cost.worker_us:.0f}", f"{cost.server_us:.0f}")
    return Section(
        name="abuse",
        title="Reading events of abuse",
        tables=[table],
        promises=[
            Promise(
                "failed logins read a second, as often as beat starts a scan",
                costs["failed logins"].per_s * share(),
                SUSTAINED,
                at_most=False,
                by="wall time",
            )
        ],
    )


def share() -> float:
    """Return the share of the time in which a scan runs: it ends after a while, and beat starts the next."""
    [every] = [tick.every for tick in SCHEDULE if tick.task == LOG_TASK]
    return min(1.0, SCAN_S / every)


def scan(here: Stage, kind: str, count: int) -> Cost:
    """Return the best of some runs: another process may take CPU from a run, and none can add any."""
    return max(_scan_once(here, kind, count, seed) for seed in range(RUNS))


def _scan_once(here: Stage, kind: str, count: int, seed: int) -> Cost:
    client, chance = here.client, random.Random(seed)
    client.flushall()
    pipe = client.pipeline(transaction=False)
    for _ in range(count):
        address = chance.randrange(ADDRESSES)
        ip = f"100.64.{address >> 8}.{address & 255}"
        user = f"{chance.randrange(USERS):032x}"
        event = {"kind": kind, "n": 1, "ip": ip}
        event |= {"user": user} if kind == "auth_fail" else {"limit": "page", "route": "/"}
        pipe.xadd(here.room.keys.abuse, event)
    pipe.execute()
    server, cpu, began = server_cpu_us(client), time.thread_time(), time.perf_counter()
    report = here.room.abuse.scan(seconds=600)
    seconds = time.perf_counter() - began
    assert report["events"] == count
    worker_us = 1e6 * (time.thread_time() - cpu) / count
    return Cost(count / seconds, worker_us, (server_cpu_us(client) - server) / count)
