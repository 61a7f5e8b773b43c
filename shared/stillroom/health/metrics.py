"""Writes a report as Prometheus reads it: the text exposition format, 0.0.4.

The counters are those that all processes add up in Redis, so any process may be scraped, and each tells the same.
Labels are names of ours, of settings and of limits, never a key, an address or a user. The format is a dozen lines
and needs no library; prometheus-client counts per process, which is what we do not want.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from stillroom.counted import LIMIT, LOAD_BOUNDS, LOADER, OTHERS, RULE, TOOK, by_name
from stillroom.health.report import ORDER, RedisInfo, Report, Server, each_server
from stillroom.keys import WOULD_DENY

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str], float | None]  # labels, value; one that is not known is left out

_OURS = re.compile(r"[a-z][a-z0-9_]{0,39}")  # the names of our counts; foreign ones are left out


class Family(NamedTuple):
    """One metric and its samples."""

    name: str
    kind: str
    about: str
    samples: Sequence[Sample]
    suffixes: Sequence[str] = ()  # of the samples' names: a histogram has samples of three


class Question(NamedTuple):
    """Counts that are answers to one question, told apart by a label."""

    about: str
    label: str
    answers: Mapping[str, str]  # count → the label's value


_RESULTS = {"hits": "hit", "stale": "stale", "misses": "miss"}
QUESTIONS: Mapping[str, Question] = {
    "stillroom_cache_requests_total": Question(
        "Lookups in the cache, by how they ended.",
        "result",
        _RESULTS,
    ),
    "stillroom_near_total": Question(
        "Values that processes keep: reads they answered, looks at the clock that proved them, and evictions.",
        "event",
        {"near_hits": "hit", "near_proofs": "proof", "near_evictions": "eviction"},
    ),
    "stillroom_limit_checks_total": Question(
        "Rate-limit checks; those that were denied, denied from memory, or decided without Redis are among `all`.",
        "outcome",
        {
            "limit_checks": "all",
            "limit_denials": "denied",
            "limit_cached": "cached",
            "limit_degraded": "degraded",
        },
    ),
}
ASKED = {count for question in QUESTIONS.values() for count in question.answers}

OF_SERVER: Sequence[tuple[str, str, Callable[[Server], float | None]]] = [
    ("up", "Whether the server answers this process.", lambda s: s.connection.is_up),
    ("latency_seconds", "Of this check's round trip.", lambda s: _seconds(s.connection.latency_ms)),
    (
        "breaker_open",
        "Whether this process' breaker is open.",
        lambda s: s.connection.breaker == "open",
    ),
]
OF_REDIS: Sequence[tuple[str, str, Callable[[RedisInfo], float | None]]] = [
    ("uptime_seconds", "Since its start.", lambda i: i.uptime_s),
    ("memory_used_bytes", "used_memory.", lambda i: i.memory.used),
    ("memory_peak_bytes", "used_memory_peak.", lambda i: i.memory.peak),
    ("memory_limit_bytes", "maxmemory, where one is set.", lambda i: i.memory.limit),
    ("memory_fragmentation_ratio", "rss / used.", lambda i: i.memory.fragmentation),
    ("clients", "Connections.", lambda i: i.clients.connected),
    ("clients_blocked", "Connections that wait.", lambda i: i.clients.blocked),
    ("operations_per_second", "The server's own figure.", lambda i: i.operations.per_s),
    ("slowlog_length", "Entries of the slowlog.", lambda i: i.operations.slowlog),
]
# Counters of the server itself: they begin again at 0 when it does.
OF_RUN: Sequence[tuple[str, str, Callable[[RedisInfo], float | None]]] = [
    ("commands_total", "Commands carried out.", lambda i: i.counters.commands),
    ("evicted_keys_total", "Keys thrown away for want of memory.", lambda i: i.counters.evicted),
    ("expired_keys_total", "Keys that ran out.", lambda i: i.counters.expired),
    ("rejected_connections_total", "For want of room.", lambda i: i.counters.rejected),
]
# Name, what it is, and where it stands in the report.
OF_SERVICES: Sequence[tuple[str, str, str, str]] = [
    ("sessions", "Sessions, with those not swept yet.", "sessions", "active"),
    ("sessions_due", "Sessions due for the sweep.", "sessions", "expired_pending"),
    ("banned_subjects", "Banned now.", "limits", "banned"),
    ("workers", "Seen in the last half minute.", "tasks", "workers"),
    ("beat_age_seconds", "Since beat's last tick was done.", "tasks", "beat_s"),
    ("todo", "Pieces of work that invalidations left to do.", "tasks", "todo"),
    ("dead_letters", "What could not be done and waits for a person.", "tasks", "dead_letters"),
    ("unacked_tasks", "Taken by a worker and not done.", "tasks", "unacked"),
    ("near_bytes", "Of values that the scraped process keeps.", "cache", "near_bytes"),
    ("refresh_lag_seconds", "Mean of the last whole minute.", "cache", "refresh_lag_s"),
]


def exposition(report: Report, age_s: float) -> bytes:
    """Return the text of a scrape. `age_s`: how old the report is."""
    families = [
        *_overall(report, age_s),
        *_servers(report),
        *_services(report),
        *_counted(report.totals or {}),
    ]
    return "".join(f"{line}\n" for family in families for line in _lines(family)).encode()


def _overall(report: Report, age_s: float) -> Iterator[Family]:
    yield _gauge("stillroom_health", "0 pass, 1 warn, 2 fail.", [({}, ORDER[report.status])])
    yield _gauge("stillroom_health_age_seconds", "How old this report is.", [({}, age_s)])
    findings: list[Sample] = [
        ({"component": found.component, "code": found.code, "severity": found.severity}, 1)
        for found in report.advice
    ]
    yield _gauge("stillroom_finding", "1 for each finding there is.", list(_once(findings)))


def _servers(report: Report) -> Iterator[Family]:
    for name, about, value in OF_SERVER:
        samples = [
            ({"server": server.name}, value(server)) for server in each_server(report.servers)
        ]
        yield _gauge(f"stillroom_redis_{name}", about, samples)
    said = [
        (server.name, server.redis)
        for server in each_server(report.servers)
        if server.redis is not None
    ]
    for kind, table in (("gauge", OF_REDIS), ("counter", OF_RUN)):
        for name, about, figure in table:
            samples = [({"server": server}, figure(info)) for server, info in said]
            yield Family(f"stillroom_redis_{name}", kind, about, samples)


def _services(report: Report) -> Iterator[Family]:
    for name, about, part, field in OF_SERVICES:
        known: float | None = getattr(getattr(report, part), field, None)
        yield _gauge(f"stillroom_{name}", about, [({}, known)])
    queues = (report.tasks and report.tasks.queues) or ()
    depth, oldest = "Messages that wait.", "How long the next one has waited."
    yield _gauge("stillroom_queue_depth", depth, [({"queue": q.name}, q.depth) for q in queues])
    yield _gauge(
        "stillroom_queue_oldest_seconds", oldest, [({"queue": q.name}, q.oldest_s) for q in queues]
    )


def _counted(totals: Mapping[str, int]) -> Iterator[Family]:
    """Return the totals that all processes counted."""
    if not totals:
        return
    for name, question in QUESTIONS.items():
        samples: list[Sample] = [
            ({question.label: answer}, totals.get(count, 0))
            for count, answer in question.answers.items()
        ]
        yield Family(name, "counter", question.about, samples)
    shadows: list[Sample] = [
        ({"limit": name.removeprefix(WOULD_DENY)}, number)
        for name, number in sorted(totals.items())
        if name.startswith(WOULD_DENY)
    ]
    about = "Requests that a limit in shadow would have denied."
    yield Family("stillroom_limit_would_deny_total", "counter", about, shadows)
    yield from _by_name(totals)
    others: list[Sample] = [
        ({"event": name}, number)
        for name, number in sorted(totals.items())
        if name not in ASKED and _OURS.fullmatch(name)
    ]
    yield Family("stillroom_events_total", "counter", "Whatever else is counted.", others)


class Named(NamedTuple):
    """A metric of things that are counted by name: loaders, limits, rules."""

    name: str  # without `stillroom_`
    about: str
    kind: str  # of the things; also the label
    label: str  # another label of its samples; empty: none
    whats: Mapping[str, str]  # the thing counted → the label's value
    scale: float = 1.0


_OUTCOMES = {"checks": "all", "denials": "denied", "cached": "cached", "degraded": "degraded"}
NAMED: Sequence[Named] = [
    Named("loader_requests_total", "Lookups, by how they ended.", LOADER, "result", _RESULTS),
    Named("loader_loads_total", "Loads that ended well.", LOADER, "", {"loads": ""}),
    Named("loader_load_errors_total", "Loads that failed.", LOADER, "", {"load_errors": ""}),
    Named("loader_refreshes_total", "Refreshes that ended well.", LOADER, "", {"refreshes": ""}),
    Named("loader_refresh_errors_total", "And that failed.", LOADER, "", {"refresh_errors": ""}),
    Named(
        "loader_refresh_lag_seconds_total",
        "How long values had been stale when they were refreshed, added up.",
        *(LOADER, "", {"lag_ms": ""}, 0.001),
    ),
    Named("loader_not_kept_total", "Values that can't be kept.", LOADER, "", {"not_kept": ""}),
    Named("limit_requests_total", "Checks of a limit, by outcome.", LIMIT, "outcome", _OUTCOMES),
    Named("rule_patterns_total", "Patterns of abuse it has found.", RULE, "", {"patterns": ""}),
    Named("rule_bans_total", "Bans by a rule.", RULE, "", {"bans": ""}),
    Named("rule_shadow_total", "Bans a rule in shadow did not make.", RULE, "", {"shadow": ""}),
]
NAMES_MOST = 100  # of a kind; the least counted are added up as `others`


def _by_name(totals: Mapping[str, int]) -> Iterator[Family]:
    """Return the counts of each loader, limit and rule."""
    counted = {kind: _bounded(by_name(totals, kind)) for kind in (LOADER, LIMIT, RULE)}
    for metric in NAMED:
        samples: list[Sample] = [
            (
                {metric.kind: name} | ({metric.label: value} if metric.label else {}),
                counts.get(what, 0) * metric.scale,
            )
            for name, counts in counted[metric.kind].items()
            for what, value in metric.whats.items()
        ]
        yield Family(f"stillroom_{metric.name}", "counter", metric.about, samples)
    yield _load_seconds(counted[LOADER])


def _bounded(found: dict[str, dict[str, int]]) -> Mapping[str, Mapping[str, int]]:
    """Return the largest counts by name, and the others added up."""
    others = found.pop(OTHERS, {})
    by_use = sorted(found, key=lambda name: (-sum(found[name].values()), name))
    for name in by_use[NAMES_MOST:]:
        for what, number in found.pop(name).items():
            others[what] = others.get(what, 0) + number
    return dict(sorted(found.items())) | ({OTHERS: others} if others else {})


def _load_seconds(loaders: Mapping[str, Mapping[str, int]]) -> Family:
    samples: list[Sample] = []
    suffixes: list[str] = []
    bounds = [*(f"{bound / 1000:g}" for bound in LOAD_BOUNDS), "+Inf"]
    for name, counts in loaders.items():
        reached = 0
        for bound, what in zip(bounds, TOOK, strict=True):
            reached += counts.get(what, 0)
            samples.append(({LOADER: name, "le": bound}, reached))
        samples.append(({LOADER: name}, counts.get("load_ms", 0) / 1000))
        samples.append(({LOADER: name}, reached))
        suffixes += [*["_bucket"] * len(bounds), "_sum", "_count"]
    about = "How long loads took, whether they ended well or not."
    return Family("stillroom_loader_load_seconds", "histogram", about, samples, suffixes)


def _gauge(name: str, about: str, samples: Sequence[Sample]) -> Family:
    return Family(name, "gauge", about, samples)


def _once(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Drop the second sample of one name and labels, which Prometheus would refuse."""
    seen: list[Mapping[str, str]] = []
    for labels, value in samples:
        if labels not in seen:
            seen.append(labels)
            yield labels, value


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def _lines(family: Family) -> Iterator[str]:
    suffixes = family.suffixes or [""] * len(family.samples)
    known = [
        (family.name + suffix, labels, value)
        for suffix, (labels, value) in zip(suffixes, family.samples, strict=True)
        if value is not None
    ]
    if not known:
        return
    yield f"# HELP {family.name} {family.about}"
    yield f"# TYPE {family.name} {family.kind}"
    for name, labels, value in known:
        named = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield f"{name}{{{named}}} {float(value)!r}" if named else f"{name} {float(value)!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
