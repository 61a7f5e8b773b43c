"""Measures reads of what a process keeps (`near`): one kept value, and a request that reads five.

All ways to read take turns in rounds, one request of each with five reads, by the CPU of the thread. A kept value
is read in a request that has proved it, and the proof is one round trip.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, NamedTuple

from bench.contestants import ADAPTER, BODY, PRODUCT, Product
from bench.harness import Spread
from bench.report import Promise, Section, Table
from bench.stage import NEVER, Effort, Stage, stage

READS = 5  # of a request
KEPT_OVER_GET = 0.15  # of a bare GET with validation, at most
REQUEST_OVER_GETS = 0.5
BARE, PLAIN = "redis-py, GET and validate_json", "a loader"
MODEL, SCALAR = "a loader with near, a model", "a loader with near, an int"


class Way(NamedTuple):
    """One way to read: what a read is made in, and the read."""

    inside: Callable[[], AbstractContextManager[object]]
    read: Callable[[int], object]


class Cost(NamedTuple):
    """Holds CPU µs of one round."""

    request: float  # with five reads, and with its proof
    read: float  # after the first one of a request


def run(effort: Effort) -> Section:
    rounds = effort.pick(smoke=3, quick=100, usual=400, full=1_000)
    with stage() as here:
        costs = in_turns(ways(here), rounds)
    table = Table(["reading", "one read, µs", "× GET", f"a request with {READS}, µs", "× GETs"])
    for name, found in costs.items():
        whole, one = (median(column) for column in zip(*found, strict=True))
        ratios = [_over(costs, name, place).p50 for place in ("read", "request")]
        table.add(name, f"{one:.1f}", f"{ratios[0]:.2f}", f"{whole:.0f}", f"{ratios[1]:.2f}")
    promises = [
        Promise(f"{name}: a kept read, × GET", _over(costs, name, "read"), KEPT_OVER_GET, by="CPU")
        for name in (MODEL, SCALAR)
    ]
    whole_ratio = _over(costs, MODEL, "request")
    claim = f"a request with {READS} kept models and its proof, × as many GETs"
    return Section(
        name="near",
        title="Reads of what a process keeps",
        tables=[table],
        promises=[*promises, Promise(claim, whole_ratio, REQUEST_OVER_GETS, by="CPU")],
        notes=[f"the model has {len(BODY)} bytes; the proof of a request is one round trip"],
        figures={name: [cost._asdict() for cost in found] for name, found in costs.items()},
    )


def ways(here: Stage) -> dict[str, Way]:
    """Return the ways to read, each of values that are there."""
    room, client = here.room, here.client
    room.stats.due = NEVER

    @room.cache.cached("plain:{id}", ttl=600, tags=["products", "brand:acme"])
    def plain(id: int) -> Product:
        return PRODUCT

    @room.cache.cached("kept:{id}", ttl=600, tags=["products", "brand:acme"], near=True)
    def kept(id: int) -> Product:
        return PRODUCT

    @room.cache.cached("stock:{id}", ttl=600, tags=["products", "brand:acme"], near=True)
    def stock(id: int) -> int:
        return 17

    for number in range(READS):
        client.set(f"bare:{number}", BODY)
        for load in (plain, kept, stock):
            for _ in range(2):  # loaded, then read and kept
                with room.request():
                    load(number)

    def bare(number: int) -> Any:
        return ADAPTER.validate_json(client.get(f"bare:{number}"))

    return {
        BARE: Way(nullcontext, bare),
        PLAIN: Way(room.request, plain),
        MODEL: Way(room.request, kept),
        SCALAR: Way(room.request, stock),
    }


def in_turns(ways: dict[str, Way], rounds: int) -> dict[str, list[Cost]]:
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            costs[name].append(_cost(way))
    return costs


def _cost(way: Way) -> Cost:
    began = time.thread_time_ns()
    with way.inside():
        way.read(0)
        first = time.thread_time_ns()
        for number in range(1, READS):
            way.read(number)
        last = time.thread_time_ns()
    whole = time.thread_time_ns() - began
    return Cost(whole / 1_000, (last - first) / 1_000 / (READS - 1))


def _over(costs: dict[str, list[Cost]], name: str, place: str) -> Spread:
    """Return this cost as a multiple of redis-py's, by rounds."""
    pairs = zip(costs[name], costs[BARE], strict=True)
    return Spread.of([getattr(ours, place) / getattr(bare, place) for ours, bare in pairs])
