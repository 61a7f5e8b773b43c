"""A day in the life of a shop, as snapshots: quiet nights, a deploy, a peak, an outage, a wave of abuse."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from stillroom.health.past import Pattern
from stillroom.health.report import (
    Advice,
    CacheStats,
    Clients,
    Connection,
    Limits,
    Memory,
    Operations,
    QueueStats,
    RedisInfo,
    Report,
    Server,
    SessionStats,
    Snapshot,
    System,
    TaskStats,
)
from stillroom.health.snapshot import measures_of, packed

MINUTES = 1_440
MB = 1024 * 1024
LIMIT = 1024 * MB
# Minutes ago
DEPLOY = range(488, 500)
PEAK = range(180, 300)
OUTAGE = range(690, 702)  # twelve minutes in which nobody could write a snapshot
CACHE_AWAY = range(60, 72)  # of two servers one was away: snapshots with an error
ATTACK = range(95, 130)
SPIKE = 1_111  # one minute
SPIKE_PER_S = 9_400.0


def a_day(now: float, *, two_servers: bool = False, minutes: int = MINUTES) -> list[Snapshot]:
    """Return one snapshot a minute, the oldest first; the same each time."""
    chance = random.Random(7)
    ago = [m for m in range(minutes, 0, -1) if m not in OUTAGE]
    return [_minute(now, m, chance, two_servers=two_servers) for m in ago]


def a_week(now: float) -> list[Snapshot]:
    """Return seven such days, one behind the other."""
    day = a_day(now)
    return [
        one.model_copy(update={"time": one.time - ago * 86_400})
        for ago in range(6, -1, -1)
        for one in day
    ]


def a_report(newest: Snapshot, **changes: Any) -> Report:
    """Return the report of a check at that moment."""
    given: dict[str, Any] = {"status": "pass", "release": "shop 2026.11.3", "took_ms": 3.1}
    return Report(**{**measures_of(newest), **given, **changes})


def advice(severity: str = "warn", **changes: Any) -> Advice:
    """Return a finding."""
    given = {
        "code": "memory",
        "severity": severity,
        "component": "redis:memory",
        "what": "78% of maxmemory is used. At 100 % writes are refused.",
        "good": "Under 75 %.",
        "todo": "Raise maxmemory, shorten TTLs, or give the cache a server of its own (STILLROOM_CACHE_URL).",
    }
    return Advice(**{**given, **changes})


def patterns(now: float) -> list[Pattern]:
    """Return the patterns that the attack left, the newest first."""
    found: list[tuple[str, str, int, int, str, bool, float]] = [
        ("credential-stuffing", "203.0.113.77", 412, 97 * 60, "ban", False, 1260.0),
        ("hammer", "198.51.100.7", 2_048, 104 * 60, "ban", False, 300.0),
        ("scanner", "2001:db8:7::/48", 96, 118 * 60, "ban", True, 300.0),
        ("password-spraying", "u:5f2c9b1e77a04d13", 31, 121 * 60, "log", False, 0.0),
        ("hammer", "198.51.100.24", 16_384, 20 * 3600, "capped", False, 0.0),
    ]
    return [
        Pattern(
            rule=rule,
            subject=subject,
            count=count,
            last=now - ago,
            action=action,
            shadow=shadow,
            ban_seconds=seconds,
        )
        for rule, subject, count, ago, action, shadow, seconds in found
    ]


def seed_patterns(client: Any, stream: bytes, found: list[Pattern]) -> None:
    """Write the patterns as the worker that found them does: the oldest first, all fields as text."""
    for pattern in reversed(found):
        fields = {
            name: json.dumps(value).strip('"') for name, value in pattern.model_dump().items()
        }
        client.xadd(stream, fields)


def seed(client: Any, stream: bytes, snapshots: list[Snapshot]) -> None:
    """Write the snapshots to the stream, as the worker does."""
    with client.pipeline(transaction=False) as pipe:
        for one in snapshots:
            pipe.xadd(stream, {"snapshot": packed(one)}, id=f"{int(one.time * 1000)}-0")
        pipe.execute()


def _minute(now: float, ago: int, chance: random.Random, *, two_servers: bool) -> Snapshot:
    traffic = _traffic(now, ago) * chance.uniform(0.98, 1.02)
    is_away = two_servers and ago in CACHE_AWAY
    return Snapshot(
        time=now - ago * 60,
        servers=_servers(traffic, ago, chance, two_servers=two_servers, is_away=is_away),
        system=System(
            cpu=min(1.0, 0.06 + traffic * 0.45),
            load1=0.2 + traffic,
            memory=0.61,
            disk=0.402,
            fds=57,
            fd_limit=1024,
            rss=96 * MB,
        ),
        limits=_limits(traffic, ago, chance),
        cache=None if is_away else _cache(traffic, ago, chance),
        sessions=SessionStats(
            active=int(900 + 2600 * _traffic(now, ago + 25)),
            expired_pending=3,
            revoked_pending=0,
            created=int(traffic * 40),
            destroyed=int(traffic * 9),
            expired=int(traffic * 22),
            replayed=0,
        ),
        tasks=_tasks(traffic, ago, chance),
        status="fail" if is_away else "pass",
        error="redis.cache: refused" if is_away else None,
    )


def _traffic(now: float, ago: int) -> float:
    """Return 0 to about 1.6, by the hour of the day in UTC, and a peak."""
    hour = ((now - ago * 60) % 86_400) / 3600
    usual = 0.12 + 0.88 * max(0.0, math.sin((hour - 5) / 17 * math.pi)) ** 1.4
    into = (ago - PEAK.start) / len(PEAK)
    return usual + (0.6 * math.sin(into * math.pi) if ago in PEAK else 0.0)


def _servers(
    traffic: float, ago: int, chance: random.Random, *, two_servers: bool, is_away: bool
) -> tuple[Server, ...]:
    used = int((420 + 260 * traffic + 60 * (1 - ago / MINUTES)) * MB * chance.uniform(0.995, 1.005))
    if ago in range(DEPLOY.start - 200, DEPLOY.stop):
        used -= 90 * MB
    per_s = SPIKE_PER_S if ago == SPIKE else 240 + 2_900 * traffic
    if not two_servers:
        return (_server("redis", ("cache", "state"), used, per_s, traffic),)
    away = Connection(is_up=False, breaker="open", error="refused")
    cache = _server("redis.cache", ("cache",), used, per_s, traffic)
    return (
        Server(name=cache.name, roles=cache.roles, connection=away) if is_away else cache,
        _server("redis.state", ("state",), used // 4, per_s / 6, traffic / 3),
    )


def _server(name: str, roles: Any, used: int, per_s: float, traffic: float) -> Server:
    return Server(
        name=name,
        roles=roles,
        connection=Connection(is_up=True, latency_ms=0.42 + traffic / 5, breaker="closed"),
        redis=RedisInfo(
            product="valkey",
            version="9.0.1",
            run_id="f" * 40,
            role="master",
            link_up=None,
            uptime_s=864_000,
            memory=Memory(
                used=used, peak=900 * MB, rss=int(used * 1.1), limit=LIMIT, fragmentation=1.1
            ),
            clients=Clients(connected=int(38 + 55 * traffic), blocked=2, limit=10_000),
            operations=Operations(per_s=per_s, hit_ratio=0.93, evicted_per_s=0.0, slowlog=3),
        ),
    )


def _cache(traffic: float, ago: int, chance: random.Random) -> CacheStats:
    lookups = int(traffic * 18_000 * chance.uniform(0.99, 1.01))
    misses = 0.042 if ago not in DEPLOY else 0.55 * (ago - DEPLOY.start + 2) / len(DEPLOY)
    missed, stale = int(lookups * misses), int(lookups * 0.035)
    lag = 0.35 + 0.5 * traffic + (6.5 if ago in DEPLOY else 0) + chance.random() * 0.15
    return CacheStats(
        hits=lookups - missed - stale, stale=stale, misses=missed,
        hit_ratio=(lookups - missed) / lookups if lookups else None, usual_ratio=0.957,
        loads=missed, load_errors=0, refreshes=stale // 3, refresh_errors=0,
        refresh_lag_s=lag, refresh_lag_p95_s=lag * 2.6, fallbacks=0, decode_errors=0, not_stored=0,
    )  # fmt: skip


def _limits(traffic: float, ago: int, chance: random.Random) -> Limits:
    is_attacked = ago in ATTACK
    denials = int(traffic * 6 * chance.random()) + (chance.randint(600, 820) if is_attacked else 0)
    return Limits(
        checks=int(traffic * 9_000) + denials, denials=denials, cached=denials // 3, degraded=0,
        bans=int(is_attacked), banned=min(11, max(0, ATTACK.stop - ago) // 3) if ago > 40 else 1,
        events=denials // 20, dropped=0, patterns=int(is_attacked),
    )  # fmt: skip


def _tasks(traffic: float, ago: int, chance: random.Random) -> TaskStats:
    behind = 160 * (ago - DEPLOY.start) / len(DEPLOY) if ago in DEPLOY else 0
    refresh = int(traffic * 7 * chance.random() + behind)
    return TaskStats(
        queues=(
            QueueStats(name="stillroom.refresh", depth=refresh, oldest_s=0.4 if refresh else None),
            QueueStats(name="stillroom.maintenance", depth=chance.randint(0, 2)),
        ),
        unacked=1, todo=4, dead_letters=0, workers=2, beat_s=12.0,
    )  # fmt: skip
