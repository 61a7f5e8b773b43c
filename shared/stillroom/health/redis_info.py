"""Parses INFO, the server's description of itself, into the report's models. A missing value is null."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from stillroom.health.report import (
    Clients,
    Counters,
    Follower,
    Memory,
    Operations,
    Persistence,
    RedisInfo,
)

T = TypeVar("T")


class Fields:
    """The lines of INFO by name."""

    def __init__(self, text: bytes) -> None:
        lines = text.decode(errors="replace").splitlines()
        self._values: Mapping[str, str] = dict(
            line.split(":", 1) for line in lines if ":" in line and not line.startswith("#")
        )

    def text(self, name: str) -> str | None:
        return self._values.get(name) or None

    def number(self, name: str) -> int | None:
        return self._read(name, int)

    def ratio(self, name: str) -> float | None:
        value = self._read(name, float)
        return value if value is not None and math.isfinite(value) else None

    def flag(self, name: str, true: str = "1") -> bool | None:
        value = self.text(name)
        return None if value is None else value == true

    def _read(self, name: str, kind: Callable[[str], T]) -> T | None:
        try:
            return kind(self._values[name])
        except (KeyError, ValueError):
            return None


def parse_info(text: bytes, *, slowlog: int | None = None, at: float | None = None) -> RedisInfo:
    """Return the info in a reply to INFO (no section named), with the reply to SLOWLOG LEN and the server's time.

    >>> parse_info(b"# Server\\r\\nredis_version:7.2.4\\r\\nmaxmemory:0\\r\\nused_memory:900\\r\\n").memory.used
    900
    """
    said = Fields(text)
    return RedisInfo(
        product="valkey" if said.text("valkey_version") else said.text("redis_version") and "redis",
        version=said.text("valkey_version") or said.text("redis_version"),
        run_id=said.text("run_id"),
        role=said.text("role"),
        link_up=said.flag("master_link_status", "up"),
        uptime_s=said.number("uptime_in_seconds"),
        memory=_memory(said),
        clients=Clients(
            connected=said.number("connected_clients"),
            blocked=said.number("blocked_clients"),
            limit=said.number("maxclients"),
        ),
        operations=Operations(per_s=said.ratio("instantaneous_ops_per_sec"), slowlog=slowlog),
        persistence=_persistence(said),
        counters=_counters(said, slowlog, at),
    )


def followers_in(text: bytes) -> tuple[Follower, ...]:
    """Return the replicas in a reply to INFO: `slave0:ip=…,port=…,state=online,offset=…,lag=0`.

    >>> one = b"slave0:ip=10.0.0.2,port=6379,state=online,offset=90,lag=1"
    >>> followers_in(one + b"\\r\\nconnected_slaves:1\\r\\nmaster_repl_offset:100")
    (Follower(address='10.0.0.2:6379', is_online=True, lag_s=1, behind=10),)
    """
    said = Fields(text)
    written = said.number("master_repl_offset")
    rows = [said.text(f"slave{n}") for n in range(said.number("connected_slaves") or 0)]
    return tuple(_follower(row, written) for row in rows if row)


def good_followers_in(text: bytes) -> int | None:
    """Return how many replicas count for min-replicas-to-write; None where the server wants none."""
    return Fields(text).number("min_slaves_good_slaves")


def _follower(row: str, written: int | None) -> Follower:
    told = dict(part.partition("=")[::2] for part in row.split(","))
    offset, lag = told.get("offset", ""), told.get("lag", "")
    return Follower(
        address=f"{told.get('ip', '')}:{told.get('port', '')}",
        is_online=told.get("state") == "online",
        lag_s=int(lag) if lag.isdigit() else None,
        behind=max(0, written - int(offset)) if written is not None and offset.isdigit() else None,
    )


def _memory(said: Fields) -> Memory:
    return Memory(
        used=said.number("used_memory"),
        peak=said.number("used_memory_peak"),
        rss=said.number("used_memory_rss"),
        limit=said.number("maxmemory") or None,
        fragmentation=said.ratio("mem_fragmentation_ratio"),
        policy=said.text("maxmemory_policy"),
    )


def _persistence(said: Fields) -> Persistence:
    has_aof = said.flag("aof_enabled")
    return Persistence(
        loading=said.flag("loading"),
        aof=has_aof,
        aof_ok=said.flag("aof_last_write_status", "ok") if has_aof else None,
        rdb_ok=said.flag("rdb_last_bgsave_status", "ok"),
        changes_since_save=said.number("rdb_changes_since_last_save"),
    )


def _counters(said: Fields, slowlog: int | None, at: float | None) -> Counters:
    return Counters(
        at=at,
        commands=said.number("total_commands_processed"),
        hits=said.number("keyspace_hits"),
        misses=said.number("keyspace_misses"),
        evicted=said.number("evicted_keys"),
        expired=said.number("expired_keys"),
        rejected=said.number("rejected_connections"),
        errors=said.number("total_error_replies"),
        slow=slowlog,
    )
