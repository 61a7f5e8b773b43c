"""Which charts there are: what each shows, in which unit, against which limit. A table to add to. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from stillroom.health.report import (
    CacheStats,
    Limits,
    Measures,
    QueueStats,
    RedisInfo,
    Report,
    Server,
    SessionStats,
    TaskStats,
)
from stillroom.web.status.numbers import Unit, amount, size, span
from stillroom.web.status.series import Getter, whole

BYTES = Unit(size, base=1024, least=1024.0**2)
COUNT = Unit(amount, least=2, is_whole=True)
PER_S = Unit(amount, "/s", least=2)
PER_MIN = Unit(amount, "/min", least=2, is_whole=True)
SECONDS = Unit(span, least=1)


class Figure(NamedTuple):
    """One chart."""

    id: str
    title: str
    unit: Unit
    series: Sequence[tuple[str, Getter]]
    good: str  # what to hope for
    limit: float | None = None
    is_limit_always_drawn: bool = False
    is_stacked: bool = False

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.series]

    @property
    def getters(self) -> list[Getter]:
        return [get for _, get in self.series]

    def lead(self, values: Sequence[float | None]) -> float | None:
        """Return the one number of a row: the whole of what is stacked, else the first series."""
        return whole(values) if self.is_stacked else values[0]


def figures(report: Report) -> list[Figure]:
    """Return all charts, in the order of the tiles: three of Redis, three of what apps do, three of who they do it
    for.
    """
    return [
        *(_memory(server) for server in report.servers),
        Figure(
            "operations",
            "Operations",
            PER_S,
            _per_server(report, lambda i: i.operations.per_s),
            "follows your traffic.",
        ),
        _clients(report),
        Figure(
            "lookups",
            "Cache lookups",
            PER_MIN,
            LOOKUPS,
            "few misses, and no jump of them but after a deploy or a wide invalidation.",
            is_stacked=True,
        ),
        Figure(
            "lag", "Refresh lag", SECONDS, LAG, "under a minute, and below what a page may lag."
        ),
        Figure(
            "sessions",
            "Sessions",
            COUNT,
            [("active", of_sessions(lambda s: s.active))],
            "follows your visitors; a cliff is a mass logout.",
        ),
        Figure(
            "denials",
            "Denials",
            PER_MIN,
            [("denials", of_limits(lambda li: li.denials))],
            "few beside the checks; a plateau is somebody who does not stop.",
        ),
        Figure(
            "banned",
            "Banned clients",
            COUNT,
            [("banned", of_limits(lambda li: li.banned))],
            "0 on a quiet day; it falls by itself after an attack.",
        ),
        Figure(
            "waiting",
            "Tasks waiting",
            COUNT,
            _queues(report),
            "back to 0 within half a minute after each peak.",
            is_stacked=True,
        ),
    ]


def of_server(name: str, get: Callable[[RedisInfo], float | None]) -> Getter:
    """Return a getter for what one server says of itself."""

    def value(measures: Measures) -> float | None:
        infos = [server.redis for server in measures.servers if server.name == name]
        return get(infos[0]) if infos and infos[0] is not None else None

    return value


def of_cache(get: Callable[[CacheStats], float | None]) -> Getter:
    return lambda measures: None if measures.cache is None else get(measures.cache)


def of_sessions(get: Callable[[SessionStats], float | None]) -> Getter:
    return lambda measures: None if measures.sessions is None else get(measures.sessions)


def of_limits(get: Callable[[Limits], float | None]) -> Getter:
    return lambda measures: None if measures.limits is None else get(measures.limits)


def of_tasks(get: Callable[[TaskStats], float | None]) -> Getter:
    return lambda measures: None if measures.tasks is None else get(measures.tasks)


def waiting(tasks: TaskStats) -> float | None:
    """In all queues; None if any is unknown."""
    return whole(queue.depth for queue in tasks.queues) if tasks.queues else None


# Stacked from the last up. The rarest is at the bottom: there a few percent are still a shape that can be read.
LOOKUPS = [
    ("hit", of_cache(lambda c: c.hits)),
    ("stale", of_cache(lambda c: c.stale)),
    ("miss", of_cache(lambda c: c.misses)),
]
LAG = [
    ("95 %", of_cache(lambda c: c.refresh_lag_p95_s)),
    ("mean", of_cache(lambda c: c.refresh_lag_s)),
]


def called(server: Server) -> str:
    """Return a server by what it is for: cache, state, or both."""
    return server.name.removeprefix("redis.") if len(server.roles) == 1 else "Redis"


def _memory(server: Server) -> Figure:
    whose = "" if len(server.roles) > 1 else f", {called(server)}"
    return Figure(
        f"memory-{called(server).lower()}",
        f"Memory{whose}",
        BYTES,
        [("used", of_server(server.name, lambda info: info.memory.used))],
        _good_memory(server),
        limit=server.redis.memory.limit if server.redis else None,
        is_limit_always_drawn=True,
    )


def _clients(report: Report) -> Figure:
    limits = [s.redis.clients.limit for s in report.servers if s.redis and s.redis.clients.limit]
    series = _per_server(report, lambda info: info.clients.connected)
    good = "steady; steps come with deploys and go again."
    return Figure("clients", "Connections", COUNT, series, good, limit=min(limits, default=None))


def _good_memory(server: Server) -> str:
    """Say what good memory is. A cache may be full: it drops what is used least."""
    if server.roles == ("cache",):
        return "full is fine while the hit ratio holds."
    return "under 75 % of the limit: when it is full, writes are refused."


def _per_server(
    report: Report, get: Callable[[RedisInfo], float | None]
) -> list[tuple[str, Getter]]:
    return [(called(server), of_server(server.name, get)) for server in report.servers]


def _queues(report: Report) -> list[tuple[str, Getter]]:
    """Return a series for each current queue, or one of nothing if the broker cannot be read."""
    queues = (report.tasks and report.tasks.queues) or ()
    if not queues:
        return [("tasks", of_tasks(waiting))]
    return [(queue.name.rpartition(".")[2], _depth(queue)) for queue in queues]


def _depth(queue: QueueStats) -> Getter:
    def depth(tasks: TaskStats) -> int | None:
        return next((q.depth for q in tasks.queues or () if q.name == queue.name), None)

    return of_tasks(depth)
