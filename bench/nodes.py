"""Measures what checks and sessions cost the servers: one alone, and clusters of one, two and three nodes.

Every request is a trip of its own, by one of many clients. CPU is the servers', as they count it: of all nodes
together, and of the busiest, which is full first. What a node takes while nobody asks it anything is taken off,
because it does not grow with the requests. All take turns, as the speed of the machine drifts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from statistics import median
from typing import Any

import redis
from bench.report import Section, Table
from bench.sessions import DATA
from bench.stage import NEVER, PATIENT, Effort, clear_environment, server_cpu_us
from stillroom import Limit, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.cluster import RedisCluster

NODES = (1, 2, 3)
CLIENTS = 500
ROUNDS = 10
IDLE_S = 1.0
BY_ADDRESS = [Limit("minute", 100_000, 60), Limit("hour", 1_000_000, 3_600)]
BY_BOTH = [Limit("minute", 100_000, 60), Limit("user", 100_000, 60, by="user")]
ACTS = ("a check by address, and a session", "a check by address and by user")
ALONE = "one server"

Costs = list[list[float]]  # of each round: µs of each node a request


def run(effort: Effort) -> Section:
    requests = effort.pick(smoke=2, quick=200, usual=600, full=2_000)  # in a round
    clear_environment()
    with ExitStack() as stack:
        places = {ALONE: _alone(stack)}
        places |= {f"a cluster of {count}": _cluster(stack, count) for count in NODES}
        taken = {act: _in_turns(act, places, requests) for act in ACTS}
    table = Table(["µs of server CPU a request", "all nodes", "the busiest", "× as many requests"])
    figures = {
        f"{act}: {name}": _figures(rounds, costs[ALONE])
        for act, costs in taken.items()
        for name, rounds in costs.items()
    }
    for name, (together, busiest, more) in figures.items():
        table.add(name, f"{together:.0f}", f"{busiest:.0f}", f"{more:.2f}")
    return Section(
        name="nodes",
        title="Sessions and limits on several nodes",
        tables=[table],
        notes=["× as many requests: until the busiest node is as full as the one server"],
        figures=figures,
    )


class Place:
    """Holds a room, and a client of each node that it is on."""

    def __init__(self, stack: ExitStack, nodes: Sequence[EmbeddedServer], **settings: Any) -> None:
        given = Settings(**PATIENT | settings)
        self._room = room = stack.enter_context(Stillroom(given, dispatch=NoDispatch()))
        room.state_stats.due = NEVER
        self._clients = [stack.enter_context(redis.Redis.from_url(node.url)) for node in nodes]
        self._tokens = [room.sessions.create(f"u{n}", DATA).token for n in range(CLIENTS)]
        self._numbers = cycle(range(CLIENTS))
        self.acts = dict(zip(ACTS, (self._visit, self._check), strict=True))
        self._idle = self._taken(lambda: time.sleep(IDLE_S))

    def cost(self, act: Callable[[], object], requests: int) -> list[float]:
        """Return what a request takes of each node, µs."""
        began = time.monotonic()
        taken = self._taken(lambda: [act() for _ in range(requests)])
        share = (time.monotonic() - began) / IDLE_S
        return [(us - idle * share) / requests for us, idle in zip(taken, self._idle, strict=True)]

    def _visit(self) -> None:
        number = next(self._numbers)
        self._room.limits.check(_ip(number), BY_ADDRESS)
        self._room.sessions.get(self._tokens[number])

    def _check(self) -> None:
        number = next(self._numbers)
        self._room.limits.check({"ip": _ip(number), "user": f"u{number}"}, BY_BOTH)

    def _taken(self, act: Callable[[], object]) -> list[float]:
        before = [server_cpu_us(client) for client in self._clients]
        act()
        after = [server_cpu_us(client) for client in self._clients]
        return [end - begin for begin, end in zip(before, after, strict=True)]


def _alone(stack: ExitStack) -> Place:
    server = stack.enter_context(EmbeddedServer())
    return Place(stack, [server], redis_url=server.url)


def _cluster(stack: ExitStack, count: int) -> Place:
    other = stack.enter_context(EmbeddedServer())
    cluster = stack.enter_context(RedisCluster(primaries=count))
    places = {"redis_url": cluster.url, "cache_url": other.url, "broker_url": other.url}
    return Place(stack, cluster.nodes, state_cluster=True, **places)


def _in_turns(act: str, places: dict[str, Place], requests: int) -> dict[str, Costs]:
    for place in places.values():
        place.cost(place.acts[act], requests)
    costs: dict[str, Costs] = {name: [] for name in places}
    for _ in range(ROUNDS):
        for name, place in places.items():
            costs[name].append(place.cost(place.acts[act], requests))
    return costs


def _figures(rounds: Costs, alone: Costs) -> tuple[float, float, float]:
    """Return the medians of (µs of all nodes, µs of the busiest, times as many requests until that one is full)."""
    busiest = max(range(len(rounds[0])), key=lambda node: sum(one[node] for one in rounds))
    more = median(other[0] / one[busiest] for one, other in zip(rounds, alone, strict=True))
    return median(map(sum, rounds)), median(one[busiest] for one in rounds), more


def _ip(number: int) -> str:
    return f"198.51.{number >> 8}.{number & 255}"
