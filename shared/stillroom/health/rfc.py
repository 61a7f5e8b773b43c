"""A report as `application/health+json` (draft-inadarei-api-health-check-06)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from stillroom.health.advice import status_of
from stillroom.health.report import Part, RedisInfo, Report, Server, Status, TaskStats, each_server

MEDIA_TYPE = "application/health+json"
Checks = dict[str, list[dict[str, Any]]]


def public_json(status: Status) -> bytes:
    """Return the public answer: the status and nothing else."""
    return json.dumps({"status": status}).encode()


def details_json(report: Report, age_s: float) -> bytes:
    """Return the whole report, for operators. `age_s`: how old the report is by now."""
    body = {
        "status": report.status,
        "version": "1",
        **({} if report.release is None else {"releaseId": report.release}),
        "time": _moment(report.time),
        "age_ms": round(age_s * 1000),
        "took_ms": report.took_ms,
        "checks": _with_status(_checks(report), report),
        "advice": [found.model_dump() for found in report.advice],
    }
    return json.dumps(body).encode()


def _checks(report: Report) -> Checks:
    checks: Checks = {}
    for server in each_server(report.servers):
        checks |= _of_server(server)
    return checks | {
        "limits:stats": [_check("component", report.limits)],
        "cache:stats": [_check("component", report.cache)],
        "sessions:stats": [_check("component", report.sessions)],
        **_of_tasks(report.tasks),
        "system": [_check("system", report.system)],
    }


def _of_tasks(known: TaskStats | None) -> Checks:
    tasks = known or TaskStats()
    return {
        "tasks:queues": [
            _check("component", known, without=("workers", "crew", "beat_s", "ticks", "standing"))
        ],
        "tasks:workers": [_observed("component", tasks.workers, "workers")],
        "tasks:beat": [_observed("component", tasks.beat_s, "s") | {"ticks": tasks.ticks}],
    }


def _of_server(server: Server) -> Checks:
    info, connection = server.redis, server.connection
    about = {"roles": server.roles, **connection.model_dump()}
    if info is not None:
        about |= info.model_dump(include={"product", "version", "role", "link_up", "uptime_s"})
    return {
        f"{server.name}:connection": [_observed("datastore", connection.latency_ms, "ms") | about],
        f"{server.name}:version": [_version(info)],
        f"{server.name}:memory": [_check("datastore", info and info.memory)],
        f"{server.name}:clients": [_check("datastore", info and info.clients)],
        f"{server.name}:operations": [_check("datastore", info and info.operations)],
        f"{server.name}:persistence": [_check("datastore", info and info.persistence)],
        **_of_replication(server),
        **_of_cluster(server),
    }


def _of_replication(server: Server) -> Checks:
    """Return the check of replication where replicas follow, are wanted, or Sentinels name a primary."""
    known = server.replication
    if not (known.followers or known.wanted or known.primary):
        return {}
    observed = _observed("datastore", known.online, "replicas")
    return {f"{server.name}:replication": [observed | known.model_dump()]}


def _of_cluster(server: Server) -> Checks:
    """Return the checks of a cluster's slots and clocks, where the server stands for one."""
    if server.slots is None or not server.nodes:
        return {}
    ahead = {node.name.partition("@")[2]: node.ahead_s for node in server.nodes}
    slots = _observed("datastore", server.slots, "slots")
    clocks = {"componentType": "datastore", "ahead_s": ahead}
    return {f"{server.name}:slots": [slots], f"{server.name}:clocks": [clocks]}


def _version(info: RedisInfo | None) -> dict[str, Any]:
    product, version = (info.product, info.version) if info else (None, None)
    return {"componentType": "datastore", "observedValue": version, "product": product}


def _check(kind: str, part: Part | None, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return a check. A part that is not known is one null in place of its figures."""
    figures = {"observedValue": None} if part is None else part.model_dump(exclude=set(without))
    return {"componentType": kind, **figures}


def _observed(kind: str, value: float | None, unit: str) -> dict[str, Any]:
    return {"componentType": kind, "observedValue": value, "observedUnit": unit}


def _with_status(checks: Checks, report: Report) -> Checks:
    """Return each check with the worst status of its advice, or null where nothing is known."""
    found: Mapping[str, list[Any]] = {name: [] for name in checks}
    for advice in report.advice:
        found.get(advice.component, []).append(advice)
    for name, (check,) in checks.items():
        known = check.get("observedValue", ...) is not None
        check["status"] = status_of(found[name]) if known or found[name] else None
        if found[name]:
            check["output"] = " ".join(advice.what for advice in found[name])
    return checks


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
