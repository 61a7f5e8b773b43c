"""Makes snapshots, reports as the stream keeps them, and the rates between two snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from stillroom.health.report import (
    CacheStats,
    Counters,
    Measures,
    Nodes,
    RedisInfo,
    Report,
    Server,
    Snapshot,
    TaskStats,
)

KEPT = 24 * 60  # snapshots, one a minute: a day …
KEPT_COARSE = 7 * 24 * 12  # … and every fifth minute's for a week
KEPT_S = 8 * 86_400  # without a new one
BEATS_WITHIN_S = 150.0  # as for the finding about beat
# So long after its last good end a task stands still: each is due within a minute.
STANDING_S = 600.0
USUAL_WEIGHT = 1 / 60  # of the newest minute in the moving average: an hour's worth of memory

# Parts that a report has and a snapshot has not: 1,440 snapshots of them would be long.
OF_NOW = {
    "tasks": ("crew", "standing"),
    "cache": ("loaders", "errors"),
    "limits": ("each", "rules"),
}

# The rate in a report → the counter it is the growth of.
RATES = {
    "evicted_per_s": "evicted",
    "expired_per_s": "expired",
    "rejected_per_s": "rejected",
    "errors_per_s": "errors",
    "slow_per_s": "slow",
}


def snapshot_of(report: Report, error: str | None) -> Snapshot:
    """Return the snapshot to keep of a report: its measures and the names of its findings."""
    findings = tuple(found.name for found in report.advice)
    kept = dict(measures_of(report))
    # A day's snapshots of a cluster of fifty nodes would be 50 MB. Findings about nodes are kept.
    kept["servers"] = tuple(one.model_copy(update={"nodes": ()}) for one in report.servers)
    for part, fields in OF_NOW.items():
        if kept[part] is not None:
            kept[part] = kept[part].model_copy(update=dict.fromkeys(fields))
    return Snapshot(**kept, status=report.status, findings=findings, error=error)


def measures_of(measures: Measures) -> Mapping[str, Any]:
    """Return the fields of the measures, for a report or a snapshot that takes them over."""
    return {name: getattr(measures, name) for name in Measures.model_fields}


def packed(snapshot: Snapshot) -> bytes:
    """Return the snapshot as it stands in the stream: JSON without the nulls."""
    return snapshot.model_dump_json(exclude_none=True).encode()


def packed_nodes(servers: Sequence[Server]) -> bytes:
    """Return what the nodes of clusters have counted, as it is kept for the next snapshot. Empty without nodes."""
    known = {
        node.name: RedisInfo(run_id=node.redis.run_id, counters=node.redis.counters)
        for server in servers
        for node in server.nodes
        if node.redis is not None
    }
    return Nodes(nodes=known).model_dump_json(exclude_defaults=True).encode() if known else b""


def unpacked_nodes(text: bytes | None) -> Mapping[str, RedisInfo]:
    """Return what each node had counted at the last snapshot. Another writer's text is as good as none."""
    try:
        return Nodes.model_validate_json(text or b"{}").nodes
    except ValidationError:
        return {}


def unpacked(entries: Sequence[Any]) -> list[Snapshot]:
    """Return the snapshots in a reply to XRANGE. An entry that can't be read (another writer's) is left out."""
    found = [_unpacked(fields) for _, fields in entries]
    return [snapshot for snapshot in found if snapshot is not None]


def _unpacked(fields: Sequence[bytes]) -> Snapshot | None:
    try:
        return Snapshot.model_validate_json(fields[1])
    except (ValidationError, IndexError):
        return None


def with_rates(
    measures: Measures, before: Measures | None, nodes: Mapping[str, RedisInfo] = {}
) -> Measures:
    """Return the measures with the rates since an earlier snapshot, the usual hit ratio and MEMORY DOCTOR's words.

    `nodes`: what the nodes of clusters had counted then.

    A server that was restarted in between counts from 0 again: its rates are unknown, not negative.
    """
    if before is None:
        return measures
    earlier = {**{server.name: server.redis for server in before.servers}, **nodes}
    servers = tuple(_server_with_rates(server, earlier) for server in measures.servers)
    return measures.model_copy(
        update={"servers": servers, "cache": _with_usual_ratio(measures.cache, before.cache)}
    )


def with_standing(
    measures: Measures, before: Measures | None, scheduled: Sequence[str]
) -> Measures:
    """Return the measures with the scheduled tasks that stand still though beat goes on, now and a snapshot ago.

    When workers begin again after hours, each task is late until its turn comes: that is over within a minute.
    A task that never ended well, or not within the time that this is remembered, is None.
    """
    if measures.tasks is None or before is None or measures.time - before.time > BEATS_WITHIN_S:
        return measures
    late, late_before = _late(measures.tasks), _late(before.tasks)
    standing: dict[str, float | None] = dict.fromkeys(_never_done(measures.tasks, scheduled))
    standing |= {task: late[task] for task in scheduled if task in late and task in late_before}
    tasks = measures.tasks.model_copy(update={"standing": standing})
    return measures.model_copy(update={"tasks": tasks})


def _never_done(tasks: TaskStats, scheduled: Sequence[str]) -> Iterator[str]:
    """Yield the tasks that no worker has ever done, once one works for so long that each was due several times."""
    longest_s = max([one.up_s + one.seen_s for one in tasks.crew or () if one.up_s], default=0.0)
    if tasks.ticks is not None and longest_s > STANDING_S and _is_beating(tasks):
        yield from (task for task in scheduled if task not in tasks.ticks)


def _is_beating(tasks: TaskStats) -> bool:
    return tasks.beat_s is not None and tasks.beat_s <= BEATS_WITHIN_S


def _late(tasks: TaskStats | None) -> Mapping[str, float]:
    if tasks is None or not _is_beating(tasks):
        return {}
    return {task: age for task, age in (tasks.ticks or {}).items() if age > STANDING_S}


def _server_with_rates(server: Server, earlier: Mapping[str, RedisInfo | None]) -> Server:
    nodes = tuple(_server_with_rates(node, earlier) for node in server.nodes)
    known = _info_with_rates(server.redis, earlier.get(server.name))
    return server.model_copy(update={"redis": known, "nodes": nodes})


def _info_with_rates(now: RedisInfo | None, before: RedisInfo | None) -> RedisInfo | None:
    if now is None or before is None or now.run_id is None or now.run_id != before.run_id:
        return now
    rates = rates_between(before.counters, now.counters)
    known = {
        "operations": now.operations.model_copy(update=rates),
        "memory": now.memory.model_copy(update={"doctor": before.memory.doctor}),
    }
    return now.model_copy(update=known)


def rates_between(before: Counters, now: Counters) -> Mapping[str, float | None]:
    """Return the fields of Operations that are differences."""
    if now.at is None or before.at is None or now.at <= before.at:
        return dict.fromkeys(RATES)
    seconds = now.at - before.at
    rates = {
        name: _per_second(getattr(before, counter), getattr(now, counter), seconds)
        for name, counter in RATES.items()
    }
    return rates | {"hit_ratio": _hit_ratio(before, now)}


def _per_second(before: int | None, now: int | None, seconds: float) -> float | None:
    grown = _grown(before, now)
    return None if grown is None else grown / seconds


def _grown(before: int | None, now: int | None) -> int | None:
    """Return the growth, or None if either count is unknown or they were reset (CONFIG RESETSTAT)."""
    return None if before is None or now is None or now < before else now - before


def _hit_ratio(before: Counters, now: Counters) -> float | None:
    hits, misses = _grown(before.hits, now.hits), _grown(before.misses, now.misses)
    return ratio(hits, misses) if hits is not None and misses is not None else None


def ratio(hits: int, misses: int) -> float | None:
    """Return the share of hits in all lookups; None without lookups.

    >>> ratio(3, 1), ratio(0, 0)
    (0.75, None)
    """
    return hits / (hits + misses) if hits + misses else None


def _with_usual_ratio(now: CacheStats | None, before: CacheStats | None) -> CacheStats | None:
    if now is None:
        return None
    usual = before.usual_ratio if before else None
    if now.hit_ratio is not None:
        newest = now.hit_ratio
        usual = newest if usual is None else usual + (newest - usual) * USUAL_WEIGHT
    return now.model_copy(update={"usual_ratio": usual})
