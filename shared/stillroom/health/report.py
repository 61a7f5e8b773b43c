"""Defines a health report as plain frozen models, for both faces, the stream, the endpoints and the page.

**Unknown is null, never 0.** A part that could not be read is null; so is a number that the server does not tell.
Times are seconds (moments: since 1970), sizes are bytes, ratios are 0 to 1; rates are per second where a name says
`per_s`, and what `ns:stats` counts is of the last whole minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from stillroom.durations import LAST_MOMENT

# What another program may have written: a record with a number out of these ranges is none.
Moment = Annotated[float, Field(ge=0, le=LAST_MOMENT)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Length = Annotated[float, Field(ge=0, le=10**12)]  # seconds

Status = Literal["pass", "warn", "fail"]
Severity = Literal["warn", "fail"]
Role = Literal["cache", "state"]

ORDER: Mapping[str, int] = {"pass": 0, "warn": 1, "fail": 2}


class Part(BaseModel):
    """A piece of a report, which ignores fields that a newer version wrote into the stream.

    No number of it is NaN or infinite: JSON has neither, and no page can show it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Advice(Part):
    """One finding: what is the matter, how bad, what would be good, and what to do about it."""

    code: str  # "memory", "evictions": the name of the rule
    severity: Severity
    # The check it belongs to: "redis:memory", "redis.cache:connection", "cache:stats".
    component: str
    what: str
    good: str
    todo: str
    since: float | None = None  # when it was first seen by a snapshot

    @property
    def name(self) -> str:
        """Return the name of the finding, component and code: "redis:memory memory"."""
        return f"{self.component} {self.code}"


class Connection(Part):
    """Tells whether a server answers this process."""

    is_up: bool
    latency_ms: float | None = None  # of this check's one round trip
    breaker: Literal["closed", "open"]
    down_since: float | None = None  # when the breaker opened
    error: str | None = None  # one word: refused, timeout, auth, loading, noperm …


class Memory(Part):
    """Holds what the server reports of its memory."""

    used: int | None = None
    peak: int | None = None
    rss: int | None = None
    limit: int | None = None  # maxmemory; null: none is set, or it is not known
    fragmentation: float | None = None  # rss / used
    policy: str | None = None
    doctor: str | None = None  # MEMORY DOCTOR's own words; as of the last snapshot


class Clients(Part):
    """Connections to the server."""

    connected: int | None = None
    blocked: int | None = None
    limit: int | None = None


class Operations(Part):
    """Counts the server's operations.

    Rates are differences to the last snapshot of the same server run, and null without one.
    """

    per_s: float | None = None  # the server's own figure
    hit_ratio: float | None = None  # of all lookups on the server, not only ours
    evicted_per_s: float | None = None
    expired_per_s: float | None = None
    rejected_per_s: float | None = None  # connections refused for want of room
    errors_per_s: float | None = None
    slow_per_s: float | None = None  # entries that came to the slowlog
    slowlog: int | None = None  # its length


class Persistence(Part):
    """Tells whether the server's data will survive a restart."""

    loading: bool | None = None
    aof: bool | None = None
    aof_ok: bool | None = None  # null: no append-only file
    rdb_ok: bool | None = None
    changes_since_save: int | None = None


class Counters(Part):
    """The server's counts since its start, kept to take differences from."""

    at: float | None = None  # by the server's own clock
    commands: int | None = None
    hits: int | None = None
    misses: int | None = None
    evicted: int | None = None
    expired: int | None = None
    rejected: int | None = None
    errors: int | None = None
    slow: int | None = None  # the slowlog's length: it grows until it is full


class RedisInfo(Part):
    """One server as it describes itself."""

    product: str | None = None  # "redis" or "valkey"
    version: str | None = None
    run_id: str | None = None  # another one: it was restarted, and counts from 0 again
    role: str | None = None  # "master" or "slave", its own words
    link_up: bool | None = None  # of a replica to its master
    uptime_s: int | None = None
    memory: Memory = Memory()
    clients: Clients = Clients()
    operations: Operations = Operations()
    persistence: Persistence = Persistence()
    counters: Counters = Counters()


class Follower(Part):
    """A replica, as its primary sees it."""

    address: str
    is_online: bool  # it copies; else it is connecting, or being sent everything
    lag_s: int | None = None  # since it last said how far it is
    behind: int | None = None  # bytes that it had yet to copy then


class Replication(Part):
    """Tells which replicas copy a server, and how many are wanted."""

    primary: str | None = None  # where the Sentinels say that it is; null: nobody asks any
    followers: tuple[Follower, ...] | None = None  # null: it did not say
    wanted: int = 0  # STILLROOM_REPLICAS
    # So many count for its min-replicas-to-write; null: it wants none, or did not say.
    good: int | None = None
    unconfirmed: int | None = None  # acts that fewer had in time, in the last whole minute

    @property
    def online(self) -> int | None:
        """Return how many replicas are online; None if the server did not say."""
        if self.followers is None:
            return None
        return sum(one.is_online for one in self.followers)


class Server(Part):
    """One server, by what it is for."""

    name: str  # "redis" if one plays both roles, else "redis.cache" and "redis.state"
    roles: tuple[Role, ...]
    connection: Connection
    redis: RedisInfo | None = None  # null: it did not say (away, or this user may not ask)
    replication: Replication = Replication()
    nodes: tuple[Server, ...] = ()  # of a cluster; the server itself is the node of its first keys
    slots: int | None = None  # how many of a cluster's it has, or all nodes together have
    ahead_s: float | None = None  # its clock, of this process's; of a node of the state


def each_server(servers: Iterable[Server]) -> Iterator[Server]:
    """Yield each server, and the other nodes of those that are clusters. The one that stands for all comes once."""
    for server in servers:
        yield server
        run = server.redis and server.redis.run_id
        for node in server.nodes:
            if run is None or node.redis is None or node.redis.run_id != run:
                yield node


class System(Part):
    """The machine, or the container, that this process runs on. Null without psutil."""

    cpu: float | None = None  # ratio, since the last look
    load1: float | None = None  # per CPU
    memory: float | None = None  # ratio in use
    disk: float | None = None  # ratio in use, of the working directory's file system
    fds: int | None = None  # of this process
    fd_limit: int | None = None
    rss: int | None = None  # of this process


class LimitStats(Part):
    """One limit by its name, in the last whole minute."""

    name: str
    checks: int = 0
    denials: int = 0
    cached: int = 0  # of the denials: from memory
    degraded: int = 0  # decided without Redis
    would_deny: int = 0  # in shadow


class RuleStats(Part):
    """One rule of abuse by its name, in the last whole minute."""

    name: str
    patterns: int = 0
    bans: int = 0
    shadow: int = 0  # patterns for which it would have banned


class Limits(Part):
    """Rate limits and abuse, in the last whole minute."""

    checks: int | None = None
    denials: int | None = None
    cached: int | None = None  # denied from memory
    degraded: int | None = None  # decided without Redis
    bans: int | None = None  # begun
    banned: int | None = None  # subjects banned now
    events: int | None = None
    dropped: int | None = None  # abuse events that found no room
    patterns: int | None = None
    each: tuple[LimitStats, ...] | None = None  # by name; not in snapshots
    rules: tuple[RuleStats, ...] | None = None  # by name; not in snapshots


class LoaderStats(Part):
    """One loader by its name, in the last whole minute. A function that is not registered has loads only."""

    name: str
    hits: int = 0
    stale: int = 0
    misses: int = 0
    hit_ratio: float | None = None
    loads: int = 0
    load_errors: int = 0
    load_p50_ms: float | None = None  # half of the loads took no longer; estimated within a bucket
    load_p95_ms: float | None = None
    load_ms: int = 0  # all of them together
    took: Mapping[str, int] | None = None  # the buckets: see cache/figures.py
    refreshes: int = 0
    refresh_errors: int = 0
    refresh_lag_s: float | None = None  # mean
    not_kept: int = 0  # values that could not be kept


class LoadError(Part):
    """The last error of a loader: what it was and where, never its message, which may hold anything."""

    name: str  # the loader's
    kind: str  # the error's class
    place: str  # where it was raised, `shop.db:41`
    at: Moment


class CacheStats(Part):
    """The cache, in the last whole minute."""

    hits: int | None = None
    stale: int | None = None
    misses: int | None = None
    hit_ratio: float | None = None  # stale answers are hits; null without lookups
    usual_ratio: float | None = None  # a moving average over an hour of snapshots
    loads: int | None = None
    load_errors: int | None = None
    refreshes: int | None = None
    refresh_errors: int | None = None
    refresh_lag_s: float | None = None  # mean: from being stale to being fresh again
    refresh_lag_p95_s: float | None = None  # 95 % took no longer (the bound of a bucket)
    fallbacks: int | None = None  # calls answered without Redis
    decode_errors: int | None = None
    not_stored: int | None = None
    # Of the hits, those that a process has answered from what it keeps.
    near_hits: int | None = None
    near_proofs: int | None = None  # looks at the clock that proved all of it
    near_evictions: int | None = None  # copies that made room for others
    near_bytes: int | None = None  # kept by the process that made this report
    not_kept: Mapping[str, int] | None = None  # loader → values that JSON could not give back
    loaders: tuple[LoaderStats, ...] | None = None  # by name; not in snapshots
    errors: tuple[LoadError, ...] | None = None  # the loaders' last ones; not in snapshots

    def last_error(self, loader: str) -> LoadError | None:
        """Return the newest known error of a loader, or None."""
        found = [one for one in self.errors or () if one.name == loader]
        return max(found, key=lambda one: one.at, default=None)


class Figures(Part):
    """Holds the counts of several minutes, by loader, limit and rule. Null: Redis did not tell it."""

    minutes: int
    cache: CacheStats | None = None
    limits: Limits | None = None


class SessionStats(Part):
    """The sessions."""

    active: int | None = None  # with those not swept since they ended
    expired_pending: int | None = None  # due for the sweep
    revoked_pending: int | None = None
    created: int | None = None  # in the last whole minute, like the rest
    destroyed: int | None = None
    expired: int | None = None
    replayed: int | None = None  # uses of a token that was rotated away


class QueueStats(Part):
    """One queue of the broker, if the broker is this Redis."""

    name: str
    depth: int | None = None
    oldest_s: float | None = None  # how long the next message has waited; null: it does not say


class WorkerStats(Part):
    """One worker, as it says itself every few seconds."""

    name: str = ""
    seen_s: float = 0.0  # since then
    queues: tuple[str, ...] = ()  # that it takes from
    threads: Count | None = None
    busy: Count | None = None  # tasks it works on now
    up_s: Length | None = None  # since its start, when it was seen
    done: Count | None = None  # tasks since its start
    failed: Count | None = None
    per_min: Length | None = None  # tasks ended in the last minute


class TaskStats(Part):
    """Background work."""

    queues: tuple[QueueStats, ...] | None = None  # null: the broker is another, or not known
    unacked: int | None = None  # taken by a worker and not done
    todo: int | None = None  # promised work written down by invalidations
    dead_letters: int | None = None  # failed work that waits for a person
    workers: int | None = None  # seen in the last half minute
    crew: tuple[WorkerStats, ...] | None = None  # the workers, seen last first; not in snapshots
    beat_s: float | None = None  # since a tick of beat's was done last; null: none in 30 days
    paused_s: float | None = None  # refreshes are paused for so much longer; null: they are not
    paused_by: str | None = None
    ticks: Mapping[str, float] | None = None  # scheduled task → seconds since it last ended well
    # Those of them that fail while beat goes on. A task without a number has never ended well.
    standing: Mapping[str, float | None] | None = None

    @property
    def aside(self) -> int | None:
        """Return `dead_letters`, by its name in 0.1."""
        return self.dead_letters


class Measures(Part):
    """All that is measured at one moment."""

    time: float
    servers: tuple[Server, ...]
    system: System | None = None
    limits: Limits | None = None
    cache: CacheStats | None = None
    sessions: SessionStats | None = None
    tasks: TaskStats | None = None


class Report(Measures):
    """A health report, as `room.health.check()` returns it."""

    status: Status
    advice: tuple[Advice, ...] = ()
    release: str | None = None  # the app's own version, from settings
    took_ms: float | None = None
    totals: Mapping[str, int] | None = None  # counts of all processes since they began to count


class Snapshot(Measures):
    """A report as the stream keeps it, one a minute. When something is away it has the same fields plus `error`."""

    status: Status
    findings: tuple[str, ...] = ()  # the names of its advice, "component code"
    error: str | None = None


class Nodes(Part):
    """Keep what the nodes of clusters had counted at the last snapshot. Snapshots themselves have no nodes."""

    nodes: Mapping[str, RedisInfo] = {}  # by name, with `run_id` and `counters`


def worst(statuses: tuple[Status, ...] | list[Status]) -> Status:
    """Return the worst of the statuses, which is the status of the whole."""
    return max(statuses, key=ORDER.__getitem__, default="pass")
