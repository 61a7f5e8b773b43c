"""`python -m bench.plan --requests 50000 --reads 5 …`: how many servers, shards, processes and workers that takes.

UNITS is the only place for what an act costs. The bench measured it (see `source`), on two cores. Costs
move with the machine by up to two times, ratios between them hardly: a plan is a first guess, to be measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """Holds the cost of one act."""

    client_us: float  # CPU of the calling thread
    server_us: float  # CPU of Redis, on a connection of its own, not pipelined
    bytes: float  # that stay in Redis, of what it makes
    source: str


UNITS: dict[str, Unit] = {
    "request": Unit(
        320,
        0,
        0,
        "page: what a middleware adds to a request that it limits, or whose session it gives",
    ),
    "cached read": Unit(
        62, 10.5, 0, "hits; growth: MGET of an entry and the clock, 32 connections"
    ),
    "near read": Unit(4.2, 0, 0, "page: a kept copy that is decoded"),
    "session read": Unit(53, 13, 0, "sessions; server: a read without a script"),
    "limit check": Unit(
        51, 35, 380, "limits: two limits, two keys for each client; 32 connections"
    ),
    "session": Unit(110, 82, 670, "sessions; server: create, with its indexes"),
    "entry": Unit(84, 67, 700, "growth: set of 250 bytes with two tags"),
    "invalidation": Unit(46, 60, 115, "growth: a mark for each tag"),
    "mark heard": Unit(
        1.8, 0, 43, "growth: for each process that reads, and on the wire, not kept"
    ),
    "refresh": Unit(250, 450, 0, "refreshes: merged orders; a worker's CPU without the loader"),
}

CORE_US = 1_000_000.0
BUSY = 0.6  # of a Redis core at the most: above it waiting grows, and a fork or a failover needs the rest
WORKER_BUSY = 0.7
APP_BUSY = 0.7
WIRE_LIMIT = 60e6  # bytes a second from one server, half of a 1 Gbit/s link
MARKS_CPU_LIMIT = 0.1  # of a process' core, for marks of others
SHARDS_LIMIT = 64  # of the cache, as the setting, and of limits on a cluster
MASTERS_LEAST = 3  # of a Redis Cluster
SPREAD = 1.3  # what the state takes of all nodes together, as a multiple of one server: docs/explanation/scaling.md


class Load(NamedTuple):
    """Holds the load to plan for, in a second."""

    requests: float = 5_000
    reads: float = 5  # cached reads of a request
    checks: float = 1  # limit checks of a request
    sessions: float = 1  # session reads of a request
    invalidations: float = 10
    refreshes: float = 100
    entries: float = 1e6  # kept
    users: float = 1e5  # sessions kept
    clients: float = 1e5  # seen within the longest window
    app_us: float = 1_000  # CPU of a request besides Stillroom
    loader_us: float = 5_000  # CPU, or waiting under the GIL, of one load
    # Reads come from kept copies, and one look at the clock is part of each request.
    near: bool = False


class Plan(NamedTuple):
    """Holds what a load takes: cores, servers, processes and bytes."""

    state_cores: float  # of Redis, for sessions and limits
    cache_cores: float
    state_servers: int  # more than one are the masters of a cluster
    cache_nodes: int
    shards: int
    app_processes: int
    worker_processes: int
    state_bytes: float
    cache_bytes: float
    marks_bytes_s: float  # from one shard to all processes
    marks_cpu: float  # of each process' core
    bends: tuple[str, ...]


def planned(load: Load) -> Plan:
    """Return the plan for a load."""
    state = state_cores(load)
    cache = cache_cores(load)
    cache_nodes = max(1, math.ceil(cache / BUSY))
    shards = (
        1 if cache_nodes == 1 else min(SHARDS_LIMIT, 2 ** math.ceil(math.log2(2 * cache_nodes)))
    )
    processes = math.ceil(load.requests * request_us(load) / CORE_US / APP_BUSY)
    heard = UNITS["mark heard"]
    plan = Plan(
        state_cores=state,
        cache_cores=cache,
        state_servers=1 if state <= BUSY else max(MASTERS_LEAST, math.ceil(SPREAD * state / BUSY)),
        cache_nodes=cache_nodes,
        shards=shards,
        app_processes=max(1, processes),
        worker_processes=max(
            1, math.ceil(load.refreshes * refresh_us(load) / CORE_US / WORKER_BUSY)
        ),
        state_bytes=load.users * UNITS["session"].bytes + load.clients * UNITS["limit check"].bytes,
        cache_bytes=load.entries * UNITS["entry"].bytes,
        # A mark of a tag goes to every shard, and every process reads it from each that it reads.
        marks_bytes_s=processes * load.invalidations * heard.bytes,
        marks_cpu=load.invalidations * shards * heard.client_us / CORE_US,
        bends=(),
    )
    return plan._replace(bends=tuple(bends(plan)))


def state_cores(load: Load) -> float:
    """Return the cores of Redis that sessions and limits keep busy."""
    each = (
        load.checks * UNITS["limit check"].server_us
        + load.sessions * UNITS["session read"].server_us
    )
    return load.requests * each / CORE_US


def cache_cores(load: Load) -> float:
    """Return the cores of Redis that the cache keeps busy."""
    alone = _cache_cores(load, 1 if load.near else load.reads)
    if load.near and alone > BUSY:  # each shard has a clock of its own to be looked at
        return _cache_cores(load, load.reads)
    return alone


def _cache_cores(load: Load, looks: float) -> float:
    reading = load.requests * looks * UNITS["cached read"].server_us
    writing = load.invalidations * UNITS["invalidation"].server_us
    return (reading + writing + load.refreshes * UNITS["refresh"].server_us) / CORE_US


def request_us(load: Load) -> float:
    """Return the CPU µs of an app's process for one request."""
    read = UNITS["near read" if load.near else "cached read"].client_us
    ours = (
        load.checks * UNITS["limit check"].client_us
        + load.sessions * UNITS["session read"].client_us
    )
    middleware = UNITS["request"].client_us if ours else 0.0
    return load.app_us + middleware + ours + load.reads * read


def refresh_us(load: Load) -> float:
    return load.loader_us + UNITS["refresh"].client_us


def bends(plan: Plan) -> Iterator[str]:
    """Yield what does not fit, and what to do then."""
    if plan.state_servers > 1:
        yield (
            f"sessions and limits: {plan.state_cores:.1f} cores of Redis. "
            f"A cluster of {plan.state_servers} masters (STILLROOM_STATE_CLUSTER=1)"
        )
    if plan.cache_nodes > 1:
        yield (
            f"the cache: {plan.cache_cores:.1f} cores of Redis. A cluster of {plan.cache_nodes} masters "
            f"(STILLROOM_CLUSTER=1, STILLROOM_SHARDS={plan.shards}), or near entries"
        )
    if max(plan.cache_nodes, plan.state_servers) > SHARDS_LIMIT:
        yield f"shards: there are {SHARDS_LIMIT} of the cache, and of limits, at the most"
    if plan.marks_bytes_s > WIRE_LIMIT:
        yield (
            f"marks: {plan.marks_bytes_s / 1e6:,.0f} MB/s leave each shard, since each process reads each mark. "
            "Invalidate fewer tags, or in batches"
        )
    if plan.marks_cpu > MARKS_CPU_LIMIT:
        yield f"marks: {plan.marks_cpu:.0%} of each process. Fewer shards, fewer tags"


def lines(plan: Plan) -> Iterator[str]:
    """Yield the plan for people, line by line."""
    nodes = f"{plan.cache_nodes} node(s), {plan.shards} shard(s)"
    sizes = f"{plan.state_bytes / 1e9:.2f} GB of state, {plan.cache_bytes / 1e9:.2f} GB of cache"
    marks = (
        f"{plan.marks_bytes_s / 1e6:.2f} MB/s from each shard, {plan.marks_cpu:.1%} of each process"
    )
    yield f"sessions and limits  {plan.state_cores:.2f} cores of Redis: {plan.state_servers} server(s)"
    yield f"cache                {plan.cache_cores:.2f} cores of Redis: {nodes}"
    yield f"memory               {sizes}"
    yield f"app                  {plan.app_processes:,} processes"
    yield f"workers              {plan.worker_processes:,} processes"
    yield f"marks                {marks}"
    yield from (f"bends: {one}." for one in plan.bends)


def units_table() -> Iterator[str]:
    """Yield UNITS as docs/explanation/scaling.md shows it."""
    yield "| act | client µs | server µs | bytes | measured by |"
    yield "|---|--:|--:|--:|---|"
    for name, unit in UNITS.items():
        yield f"| {name} | {unit.client_us:g} | {unit.server_us:g} | {unit.bytes:g} | {unit.source} |"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=planned.__doc__)
    for name, default in Load()._asdict().items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true")
        else:
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, type=_amount, default=default, help=f"default: {default:g}")
    load = Load(**vars(parser.parse_args(words)))
    print("\n".join(lines(planned(load))))


def _amount(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text}: a number, 0 or more")
    return number


if __name__ == "__main__":
    main()
