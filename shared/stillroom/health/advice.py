"""Judges a report: each finding says what is the matter, what would be good, and what to do.

The thresholds are data, each with its source. An unknown number is not a finding. The reason why it is unknown is:
see findings.py, for what is no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from stillroom.health import findings
from stillroom.health.report import (
    Advice,
    Measures,
    RedisInfo,
    Replication,
    Severity,
    Status,
    each_server,
    worst,
)
from stillroom.shown import plural

MIB = 1024 * 1024
# MEMORY DOCTOR's own measure: less waste, or a server with less in it, is nothing to complain of.
WASTE_LEAST = 10 * MIB
USED_LEAST = 5 * MIB
LOOKUPS_LEAST = 1_000  # a minute's ratio of fewer says nothing
BEAT_EVERY_S = 60.0
NAMED = 5  # loaders or limits in a sentence, the worst ones
WAITS_S = 30  # so long does no task wait …
LAGS_S = 10  # … and so far is no replica behind

Value = tuple[str, float | None]  # component, what is measured there


class Counted(float):
    """A value that a sentence may count things by, as one or several.

    >>> f"{Counted(1):entry|entries} and {Counted(2):entry|entries}, {Counted(0.5):.0%}"
    '1 entry and 2 entries, 50%'
    """

    def __format__(self, form: str) -> str:
        one, _, more = form.partition("|")
        return plural(round(self), one, more) if more else super().__format__(form)


class Rule(NamedTuple):
    """A finding when the value is at or over a threshold."""

    code: str
    values: Callable[[Measures], Iterable[Value]]
    warn: float | None
    fail: float | None
    what: str  # {v} is the value; {v:one is|more are}: so many of a thing
    good: str
    todo: str
    source: str  # where the thresholds come from
    # {whose} in `what`: which loaders, which limits.
    whose: Callable[[Measures], str] = lambda _: ""

    def judge(self, value: float) -> Severity | None:
        if self.fail is not None and value >= self.fail:
            return "fail"
        return "warn" if self.warn is not None and value >= self.warn else None


def advise(measures: Measures) -> list[Advice]:
    """Return the findings, the worst first."""
    found = [*findings.found_in(measures)]
    found += [advice for rule in RULES for advice in _applied(rule, measures)]
    return sorted(found, key=lambda advice: advice.severity != "fail")


def codes() -> frozenset[str]:
    """Return the code of each finding that there may be."""
    return frozenset([*findings.OTHERS, *[rule.code for rule in RULES]])


def status_of(advice: Iterable[Advice]) -> Status:
    """Return fail if a finding is a failure, warn if there is any other finding, else pass."""
    return worst([found.severity for found in advice])


def _applied(rule: Rule, measures: Measures) -> Iterator[Advice]:
    for component, value in rule.values(measures):
        if value is not None and (severity := rule.judge(value)) is not None:
            yield Advice(
                code=rule.code,
                severity=severity,
                component=component,
                what=rule.what.format(v=Counted(value), whose=rule.whose(measures)),
                good=rule.good,
                todo=rule.todo,
            )


def _of_servers(
    part: str, measure: Callable[[RedisInfo], float | None], roles: Sequence[str] = ()
) -> Callable[[Measures], Iterator[Value]]:
    """Return a function that yields the value of each server.

    `roles`: only of servers whose last role is one of these. Where one server has both, that is `state`.
    """

    def values(measures: Measures) -> Iterator[Value]:
        for server in each_server(measures.servers):
            if server.redis is not None and (not roles or server.roles[-1] in roles):
                yield f"{server.name}:{part}", measure(server.redis)

    return values


def _of_replication(
    part: str, measure: Callable[[Replication], float | None]
) -> Callable[[Measures], Iterator[Value]]:
    """Return a function that yields a value about each server's replicas."""

    def values(measures: Measures) -> Iterator[Value]:
        for server in each_server(measures.servers):
            yield f"{server.name}:{part}", measure(server.replication)

    return values


def _missing_replicas(known: Replication) -> float | None:
    return None if known.online is None else known.wanted - known.online


def _lag(known: Replication) -> float | None:
    return max((one.lag_s or 0 for one in known.followers or ()), default=None)


def _one(component: str, measure: Callable[[Measures], float | None]) -> Callable[..., list[Value]]:
    return lambda measures: [(component, measure(measures))]


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _fragmentation(info: RedisInfo) -> float | None:
    memory = info.memory
    if memory.rss is None or memory.used is None or memory.used < USED_LEAST:
        return None
    return memory.fragmentation if memory.rss - memory.used > WASTE_LEAST else None


def _ratio_drop(measures: Measures) -> float | None:
    cache = measures.cache
    if cache is None or cache.hit_ratio is None or cache.usual_ratio is None:
        return None
    lookups = (cache.hits or 0) + (cache.stale or 0) + (cache.misses or 0)
    return cache.usual_ratio - cache.hit_ratio if lookups >= LOOKUPS_LEAST else None


def _broken(fine: bool | None) -> float | None:
    return None if fine is None else float(not fine)


def _oldest_waiting(measures: Measures) -> float | None:
    return max(_waited_s(measures).values(), default=None)


def _waited_s(measures: Measures) -> Mapping[str, float]:
    queues = (measures.tasks and measures.tasks.queues) or ()
    return {queue.name: queue.oldest_s for queue in queues if queue.oldest_s is not None}


def _queues_that_wait(measures: Measures) -> str:
    waited_s = {name: age_s for name, age_s in _waited_s(measures).items() if age_s >= WAITS_S}
    if not waited_s:
        return ""
    untaken = ", ".join(_untaken(measures, waited_s))
    told = f". No worker takes from {untaken}" if untaken else ""
    return f": {_listed_with_s(waited_s)}{told}"


def _untaken(measures: Measures, queues: Iterable[str]) -> list[str]:
    """Return the queues that no worker takes from, or none where a worker of an older release does not say."""
    crew = findings.alive(measures)
    if not crew or not all(one.queues for one in crew):
        return []
    return sorted({*queues} - {name for one in crew for name in one.queues})


def _replicas_that_lag(measures: Measures) -> str:
    known = [one.replication.followers or () for one in each_server(measures.servers)]
    lags_s = {one.address: float(one.lag_s or 0) for followers in known for one in followers}
    late = {address: lag_s for address, lag_s in lags_s.items() if lag_s >= LAGS_S}
    return f": {_listed_with_s(late)}" if late else ""


def _loaders_that_fail(measures: Measures) -> str:
    """Name the failing loaders, the worst first, and the newest of their errors."""
    cache = measures.cache
    named = _worst((one.name, one.load_errors) for one in (cache and cache.loaders) or ())
    if cache is None or not named:
        return ""
    errors = [error for name, _ in named if (error := cache.last_error(name)) is not None]
    last = max(errors, key=lambda error: error.at, default=None)
    said = (
        ""
        if last is None
        else f". The last error, of {last.name}: {last.kind} at {last.place or 'no place'}"
    )
    return f": {_listed(named)}{said}"


def _loaders_that_miss(measures: Measures) -> str:
    loaders = (measures.cache and measures.cache.loaders) or ()
    named = _worst((one.name, one.misses) for one in loaders)
    return f". The most misses: {_listed(named)}" if named else ""


def _loaders_that_lag(measures: Measures) -> str:
    loaders = (measures.cache and measures.cache.loaders) or ()
    lags_s = {one.name: one.refresh_lag_s for one in loaders if one.refresh_lag_s}
    return f". The latest in the mean: {_listed_with_s(lags_s)}" if lags_s else ""


def _limits_without_redis(measures: Measures) -> str:
    limits = (measures.limits and measures.limits.each) or ()
    named = _worst((one.name, one.degraded) for one in limits)
    return f": {_listed(named)}" if named else ""


def _worst(counted: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    found = [(name, count) for name, count in counted if count]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:NAMED]


def _listed_with_s(seconds: Mapping[str, float]) -> str:
    """Return what took longest, with its seconds."""
    worst = sorted(seconds.items(), key=lambda pair: (-pair[1], pair[0]))[:NAMED]
    return ", ".join(f"{name} ({taken:.0f} s)" for name, taken in worst)


def _listed(named: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in named)


def _workers_missing(measures: Measures) -> float | None:
    """Return how much work waits for a worker, where there is none. A room without workers wants none."""
    tasks = measures.tasks
    if tasks is None or tasks.workers is None:
        return None
    waiting = sum(queue.depth or 0 for queue in tasks.queues or ()) + (tasks.todo or 0)
    return float(waiting) if tasks.workers == 0 else None


RULES: list[Rule] = [
    Rule(
        "memory",
        _of_servers("memory", lambda info: _share(info.memory.used, info.memory.limit), ("state",)),
        0.75,
        0.90,
        "{v:.0%} of maxmemory is used. At 100 % writes are refused.",
        "Under 75 %.",
        "Raise maxmemory, shorten TTLs, or give the cache a server of its own (STILLROOM_CACHE_URL).",
        "redis-mixin alerts at 90 %; 75 % leaves time",
    ),
    Rule(
        "fragmentation",
        _of_servers("memory", _fragmentation),
        1.4,
        None,
        "The process holds {v:.1f} times the memory its data take.",
        "Under 1.4.",
        "CONFIG SET activedefrag yes, or restart it at a quiet hour.",
        "MEMORY DOCTOR: over 1.4, over 10 MB, from 5 MB used",
    ),
    Rule(
        "evictions",
        _of_servers("memory", lambda info: info.operations.evicted_per_s, ("state",)),
        None,
        1e-9,
        "{v:.3g} keys a second are thrown away for want of memory: sessions, limits or tasks may be among them.",
        "None where state is kept.",
        "Raise maxmemory now; set maxmemory-policy noeviction; move the cache away (STILLROOM_CACHE_URL).",
        "any eviction of state is a loss",
    ),
    Rule(
        "evictions",
        _of_servers("memory", lambda info: info.operations.evicted_per_s, ("cache",)),
        1e-9,
        None,
        "{v:.3g} entries a second are thrown away for want of memory.",
        "None, or few with a good hit ratio.",
        "Raise maxmemory, or shorten TTLs.",
        "evicted_keys grew since the last snapshot",
    ),
    Rule(
        "rejected",
        _of_servers("clients", lambda info: info.operations.rejected_per_s),
        None,
        1e-9,
        "{v:.3g} connections a second are refused: maxclients is reached.",
        "None.",
        "Raise maxclients (and the file limit), or lower STILLROOM_POOL_SIZE.",
        "rejected_connections grew since the last snapshot",
    ),
    Rule(
        "clients",
        _of_servers("clients", lambda info: _share(info.clients.connected, info.clients.limit)),
        0.8,
        0.95,
        "{v:.0%} of maxclients are connected.",
        "Under 80 %.",
        "Look for a process that opens connections and keeps them (CLIENT LIST); raise maxclients.",
        "room for one more restart of the apps",
    ),
    Rule(
        "slow",
        _of_servers("operations", lambda info: info.operations.slow_per_s),
        1e-9,
        None,
        "Commands are in the slowlog that were not there at the last snapshot.",
        "None: every command holds up all others.",
        "An operator reads SLOWLOG GET (it shows keys and values) and finds who sends them.",
        "the slowlog grew since the last snapshot",
    ),
    Rule(
        "aof",
        _of_servers("persistence", lambda info: _broken(info.persistence.aof_ok)),
        None,
        1,
        "The last write to the append-only file failed: what is written now may be lost.",
        "aof_last_write_status is ok.",
        "Look at the server's disk (space, rights) and its log.",
        "INFO persistence",
    ),
    Rule(
        "rdb",
        _of_servers("persistence", lambda info: _broken(info.persistence.rdb_ok)),
        1,
        None,
        "The last background save failed. A server that saves by itself refuses all writes until one succeeds.",
        "rdb_last_bgsave_status is ok.",
        "Look at the server's disk and memory (fork needs room), and its log.",
        "INFO persistence",
    ),
    Rule(
        "replica",
        _of_servers("connection", lambda info: _broken(info.link_up)),
        None,
        1,
        "The room is connected to a replica whose master is away.",
        "It is connected to a master.",
        "Point REDIS_URL at the master, or see that a replica is promoted.",
        "INFO replication",
    ),
    Rule(
        "read-only",
        _of_servers("connection", lambda info: float(info.role == "slave")),
        None,
        1,
        "The room is connected to a replica: nothing can be written.",
        "It is connected to a master.",
        "Point REDIS_URL at the master.",
        "INFO replication",
    ),
    Rule(
        "read-only",
        _of_replication(
            "replication", lambda known: None if known.good is None else not known.good
        ),
        None,
        1,
        "No replica is close behind, and the server wants some (min-replicas-to-write): nothing can be written.",
        "As many follow as the server wants.",
        "Start them, or look at their logs for why they do not follow.",
        "INFO replication",
    ),
    Rule(
        "replicas",
        _of_replication("replication", _missing_replicas),
        1,
        None,
        "{v:replica is|replicas are} missing that STILLROOM_REPLICAS wants: what is acknowledged now can be lost.",
        "As many follow as STILLROOM_REPLICAS says, or more.",
        "Start them, or look at their logs for why they do not follow.",
        "INFO replication",
    ),
    Rule(
        "replica-lag",
        _of_replication("replication", _lag),
        LAGS_S,
        None,
        "A replica was last heard of {v:.0f} s ago{whose}. Were it promoted now, what was written since would be "
        "missing.",
        "Under two seconds: replicas say each second how far they are.",
        "Look at that replica's CPU, and at the network between.",
        "ten of their reports",
        _replicas_that_lag,
    ),
    Rule(
        "unconfirmed",
        _of_replication("replication", lambda known: known.unconfirmed if known.wanted else None),
        1,
        None,
        "{v:act of the last minute was|acts of the last minute were} done, and too few replicas had them in time.",
        "None: STILLROOM_REPLICAS replicas have what is acknowledged.",
        "See that replicas follow, and that WAIT is answered within STILLROOM_COMMAND_TIMEOUT.",
        "each can be lost if the primary fails before they copy it",
    ),
    Rule(
        "hit-ratio",
        _one("cache:stats", _ratio_drop),
        0.20,
        None,
        "The hit ratio is {v:.0%} below what is usual{whose}.",
        "Within 20 points of the last hour's average.",
        "Was something invalidated widely, or a key template changed? Compare misses and loads.",
        "20 points against an hour's moving average, from 1,000 lookups a minute",
        _loaders_that_miss,
    ),
    Rule(
        "fallbacks",
        _one("cache:stats", lambda m: m.cache.fallbacks if m.cache else None),
        1,
        None,
        "{v:call|calls} of the cache fell back in the last minute, because Redis did not answer.",
        "None.",
        "If Redis is up now, look for timeouts: its slowlog, its CPU, the network.",
        "each is a call that was slower, or loaded what was cached",
    ),
    Rule(
        "decoding",
        _one("cache:stats", lambda m: m.cache.decode_errors if m.cache else None),
        1,
        None,
        "{v:entry|entries} could not be read in the last minute.",
        "None, but for the minute after a model was changed.",
        "If it goes on: two versions of the app, with different models, share a namespace.",
        "each is a miss",
    ),
    Rule(
        "loading",
        _one("cache:stats", lambda m: m.cache.load_errors if m.cache else None),
        1,
        None,
        "{v:load|loads} failed in the last minute{whose}.",
        "None.",
        "The loaders' errors are the app's: look at its log, and at the database behind it.",
        "a failed load reaches the caller",
        _loaders_that_fail,
    ),
    Rule(
        "refresh-lag",
        _one("cache:stats", lambda m: m.cache.refresh_lag_p95_s if m.cache else None),
        60,
        None,
        "Refreshes come late: 5 % took longer than {v:.0f} s{whose}.",
        "Under a minute.",
        "Start more workers for the refresh queue, or look for slow loaders.",
        "twice the refresh lease",
        _loaders_that_lag,
    ),
    Rule(
        "queue-age",
        _one("tasks:queues", _oldest_waiting),
        WAITS_S,
        300,
        "A task has waited for {v:.0f} s{whose}.",
        "Under 30 s.",
        "Are the workers alive (`workers`), and are they enough? Start more.",
        "30 s is half of the shortest task's life",
        _queues_that_wait,
    ),
    Rule(
        "workers",
        _one("tasks:workers", _workers_missing),
        1,
        None,
        "No worker was seen in the last half minute, and {v:piece of work waits|pieces of work wait}.",
        "One at least.",
        "Start one: celery -A stillroom_workers worker.",
        "they say so every few seconds",
    ),
    Rule(
        "beat",
        _one("tasks:beat", lambda m: m.tasks.beat_s if m.tasks else None),
        2 * BEAT_EVERY_S + 30,
        10 * BEAT_EVERY_S,
        "Beat's last tick was {v:.0f} s ago.",
        "One every few seconds.",
        "Is beat running, and a worker for the maintenance queue? celery -A stillroom_workers beat.",
        "what beat orders each minute was missed twice, and half a minute for a busy queue",
    ),
    Rule(
        "dead-letters",
        _one("tasks:queues", lambda m: m.tasks.dead_letters if m.tasks else None),
        1,
        None,
        "{v:dead letter waits|dead letters wait} for a person: orders that were refused, messages that no worker "
        "takes.",
        "None.",
        "`stillroom dead-letters list` shows them with their reasons; then `retry` or `drop` each.",
        "each was somebody's order",
    ),
    Rule(
        "degraded",
        _one("limits:stats", lambda m: m.limits.degraded if m.limits else None),
        1,
        None,
        "{v:rate-limit decision of the last minute was|rate-limit decisions of the last minute were} made without "
        "Redis{whose}.",
        "None.",
        "Quotas are kept per process meanwhile: bring Redis back.",
        "each process counts alone then",
        _limits_without_redis,
    ),
    Rule(
        "abuse-dropped",
        _one("limits:stats", lambda m: m.limits.dropped if m.limits else None),
        1,
        None,
        "{v:abuse event of the last minute was|abuse events of the last minute were} dropped.",
        "None.",
        "Redis was away or full, or a process saw a flood: over 50 of a kind in a second. Patterns in what was "
        "dropped are not seen.",
        "detection is blind to what is dropped",
    ),
    Rule(
        "replays",
        _one("sessions:stats", lambda m: m.sessions.replayed if m.sessions else None),
        1,
        None,
        "{v:session token that was rotated away was|session tokens that were rotated away were} used in the last "
        "minute.",
        "None: each may be a stolen cookie.",
        "Look for 'session replayed' in the log, and end that user's sessions.",
        "OWASP session management",
    ),
    Rule(
        "disk",
        _one("system", lambda m: m.system.disk if m.system else None),
        0.85,
        0.95,
        "The disk is {v:.0%} full.",
        "Under 85 %.",
        "Make room: logs, old images, the append-only file.",
        "a full disk ends persistence",
    ),
    Rule(
        "ram",
        _one("system", lambda m: m.system.memory if m.system else None),
        0.90,
        0.97,
        "The machine's memory is {v:.0%} in use.",
        "Under 90 %.",
        "Find the process that grows, or add memory, before the kernel ends one.",
        "the OOM killer",
    ),
    Rule(
        "load",
        _one("system", lambda m: m.system.load1 if m.system else None),
        4.0,
        None,
        "{v:.1f} processes wait for each CPU.",
        "About 1.",
        "Find out what computes; deadlines will be missed meanwhile.",
        "above that, deadlines of 100 ms are missed",
    ),
    Rule(
        "fds",
        _one("system", lambda m: _share(m.system.fds, m.system.fd_limit) if m.system else None),
        0.8,
        0.95,
        "{v:.0%} of this process' file descriptors are in use.",
        "Under 80 %.",
        "Raise `ulimit -n`, or find what opens files and sockets and does not close them.",
        "at 100 % no connection can be made",
    ),
]
