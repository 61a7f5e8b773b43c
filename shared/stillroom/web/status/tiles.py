"""One tile for each part of Stillroom: its state, its one number, and what belongs to it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from stillroom.health.report import (
    Advice,
    CacheStats,
    Limits,
    Report,
    Server,
    SessionStats,
    Status,
    System,
    TaskStats,
    worst,
)
from stillroom.web.status.figures import (
    called,
    of_cache,
    of_limits,
    of_server,
    of_sessions,
    of_tasks,
    waiting,
)
from stillroom.web.status.numbers import ago, amount, number, plural, said, share, size, span
from stillroom.web.status.series import Getter, whole
from stillroom.web.status.state import State


class Tile(NamedTuple):
    """Hold what a tile says. `chart` is the id of the chart that shows more of it."""

    name: str
    state: State
    number: str
    of: str  # the things that the number counts
    facts: tuple[str, ...]
    get: Getter  # its line through the day …
    say: Callable[[float], str]  # … and how its values are said
    chart: str | None = None

    @property
    def shown_facts(self) -> tuple[str, ...]:
        """Return no facts where nothing is known: three more dashes say no more than one."""
        return self.facts if self.state != "unknown" else ()


def tiles(report: Report) -> list[Tile]:
    """Return the tiles, Redis first: a fault there shows everywhere."""
    return [
        _redis(report),
        _cache(report),
        _sessions(report),
        _limits(report),
        _tasks(report),
        _machine(report),
    ]


def _state(advice: Sequence[Advice], component: str, part: object) -> State:
    """Return the worst state of any finding, or unknown if nothing is known and nothing was found."""
    said: list[Status] = [one.severity for one in advice if _is_of(one.component, component)]
    return "unknown" if part is None and not said else worst(said)


def _is_of(component: str, part: str) -> bool:
    """Return whether a finding is of this part: `redis.cache:memory` is of redis."""
    return component.partition(":")[0].partition(".")[0] == part


def _redis(report: Report) -> Tile:
    server = max(report.servers, key=_fullness)
    memory = server.redis.memory if server.redis else None
    fullness = _fullness(server)
    used = memory.used if memory else None
    limit = f"of {size(memory.limit)} " if memory and memory.limit else ""
    whose = "" if len(report.servers) == 1 else f", {called(server)}"
    return Tile(
        "Redis",
        _state(report.advice, "redis", server.redis),
        share(fullness) if fullness >= 0 else said(used, size),
        f"{limit}memory{whose}",
        tuple(_of_each(report)),
        of_server(server.name, lambda info: info.memory.used),
        size,
        f"memory-{called(server).lower()}",
    )


def _fullness(server: Server) -> float:
    """Return used of the limit, or -1 without a limit or a known figure."""
    memory = server.redis.memory if server.redis else None
    if memory is None or memory.used is None or not memory.limit:
        return -1.0
    return memory.used / memory.limit


def _of_each(report: Report) -> Iterator[str]:
    several = len(report.servers) > 1
    for server in report.servers:
        if server.nodes:
            up = sum(node.connection.is_up for node in server.nodes)
            yield f"{called(server)}: {up} of {len(server.nodes)} nodes answer"
        if not server.connection.is_up:
            yield f"{called(server)} is away ({server.connection.error or 'unknown'})"
            continue
        latency = said(server.connection.latency_ms, lambda ms: span(ms / 1000))
        operations = said(_per_s(server), amount)
        if several:
            yield f"{called(server)}: {latency}, {operations}/s"
        else:
            yield f"answers in {latency}"
            yield f"{operations} operations/s"


def _per_s(server: Server) -> float | None:
    return server.redis.operations.per_s if server.redis else None


def _cache(report: Report) -> Tile:
    cache = report.cache or CacheStats()
    lookups = whole([cache.hits, cache.stale, cache.misses])
    lag = cache.refresh_lag_s
    return Tile(
        "Cache",
        _state(report.advice, "cache", report.cache),
        said(cache.hit_ratio, share),
        "hits",
        (
            f"{said(lookups, amount)} lookups/min",
            *([f"{amount(cache.near_hits)} answered near"] if cache.near_hits else []),
            f"{said(cache.misses, amount)} misses/min",
            f"fresh again in {span(lag)}" if lag is not None else "no refresh in this minute",
        ),
        of_cache(lambda c: c.hit_ratio),
        share,
        "lookups",
    )


def _sessions(report: Report) -> Tile:
    sessions = report.sessions or SessionStats()
    return Tile(
        "Sessions",
        _state(report.advice, "sessions", report.sessions),
        said(sessions.active, amount),
        "active",
        (
            f"{said(sessions.created, amount)} begun/min",
            f"{said(sessions.expired_pending, amount)} to be swept",
        ),
        of_sessions(lambda s: s.active),
        amount,
        "sessions",
    )


def _limits(report: Report) -> Tile:
    limits = report.limits or Limits()
    return Tile(
        "Limits",
        _state(report.advice, "limits", report.limits),
        said(limits.denials, amount),
        "denials/min",
        (
            f"of {said(limits.checks, amount)} checks/min",
            f"{said(limits.banned, amount)} banned now",
        ),
        of_limits(lambda li: li.denials),
        amount,
        "denials",
    )


def _tasks(report: Report) -> Tile:
    tasks = report.tasks or TaskStats()
    beat = tasks.beat_s
    return Tile(
        "Tasks",
        _state(report.advice, "tasks", report.tasks),
        said(waiting(tasks), amount),
        "waiting",
        (
            f"oldest {said(_oldest(tasks), span)}",
            f"{said(tasks.workers, amount)} {'worker' if tasks.workers == 1 else 'workers'}",
            f"beat's last tick {ago(beat)}" if beat is not None else "beat not seen",
            *_letters(tasks),
        ),
        of_tasks(waiting),
        amount,
        "waiting",
    )


def _letters(tasks: TaskStats) -> Iterator[str]:
    """Show dead letters only where there are some, because each waits for a person."""
    if tasks.dead_letters:
        yield plural(tasks.dead_letters, "dead letter")
    if tasks.paused_s:
        yield f"refreshes paused for {span(tasks.paused_s)}"


def _oldest(tasks: TaskStats) -> float | None:
    ages = [queue.oldest_s for queue in tasks.queues or ()]
    return max((age for age in ages if age is not None), default=None)


def _machine(report: Report) -> Tile:
    system = report.system or System()
    return Tile(
        "Machine",
        _state(report.advice, "system", report.system),
        said(system.cpu, share),
        "CPU",
        (
            f"{said(system.memory, share)} memory",
            f"{said(system.disk, share)} disk",
            f"load {said(system.load1, number)} per CPU",
        ),
        lambda measures: measures.system.cpu if measures.system else None,
        share,
    )
