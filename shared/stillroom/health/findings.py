"""Finds what is the matter where it is no number: a server that is away, a policy that does not fit, a pause."""

from __future__ import annotations

from collections.abc import Iterator

from stillroom.health.lifetimes import why_old
from stillroom.health.report import (
    Advice,
    Measures,
    Server,
    Severity,
    WorkerStats,
    each_server,
)

SLOTS = 16_384  # of a Redis Cluster
CLOCKS_APART_S = 1.0
BEATLESS_S = 150.0  # as for the finding about beat's last tick
SEEN_S = 30.0  # a worker says that it lives every few seconds

# code → what it says.
OTHERS: dict[str, str] = {
    "away": "A server does not serve this process.",
    "clocks": "The clocks of a cluster's nodes are a second or more apart.",
    "degraded": "Redis can't decide on this process's limits as it is configured.",
    "no-beat": "Workers run, and no tick of beat was ever done.",
    "not-kept": "Values of a loader could not be kept, because they would come back different.",
    "paused": "An operator has paused the refreshes.",
    "policy": "The server's maxmemory-policy does not fit what is kept there.",
    "refused": "A server refused a part of the check.",
    "rights": "The user at Redis may not do all of the check.",
    "server_old": "The server's version gets no repairs, or lacks some.",
    "slots": "Slots of a cluster have no node.",
    "standing": "A scheduled task does not end well, though beat goes on.",
}

# The wire's word for why → what to do about it.
WHY: dict[str, str] = {
    "refused": "Is the server running, and is its address in REDIS_URL right?",
    "name": "The host in REDIS_URL has no address: set or correct it (unset it is redis://redis:6379), or look at "
    "the name server.",
    "closed": "It, or a proxy before it, closes connections: compare clients with maxclients, look at its log, "
    "and see whether that port is for TLS (rediss://).",
    "proxy": "A proxy before it has lost the server: look at the proxy's log.",
    "protocol": "What answers there is no Redis: correct the host and the port.",
    "nocluster": "It is in no Redis Cluster: leave STILLROOM_CLUSTER and STILLROOM_STATE_CLUSTER out.",
    "tls": "TLS fails: look at the server's certificate, at ssl_ca_certs in the URL, and, if the server asks for a "
    "certificate of its clients, at ssl_certfile and ssl_keyfile there.",
    "readonly": "It is a replica: let the setting lead to the primary, or see that one is promoted.",
    "cluster": "It is a node of a Redis Cluster. REDIS_URL leads to one server, or to a node with "
    "STILLROOM_STATE_CLUSTER=1; for the cache there are STILLROOM_CACHE_URL and STILLROOM_CLUSTER=1.",
    "old": "Update it: Redis 6.2 or newer, or Valkey.",
    "crossslot": "It is a Redis Cluster, or a proxy before one: REDIS_URL leads to one server.",
    "moved": "It is a node of a Redis Cluster: REDIS_URL leads to one server, STILLROOM_CACHE_URL too without "
    "STILLROOM_CLUSTER=1.",
    "ask": "It is a node of a Redis Cluster: REDIS_URL leads to one server, STILLROOM_CACHE_URL too without "
    "STILLROOM_CLUSTER=1.",
    "noscript": "It does not keep scripts: let the setting lead to one server, past any proxy.",
    "unsupported": "It, or a proxy before it, does not know a command: let the setting lead to a Redis or Valkey.",
    "sentinel": "Most Sentinels that the URL names must run, reach each other, and name the same primary. If they "
    "close connections, see whether their ports are for TLS (rediss+sentinel://) and want ssl_certfile in the URL.",
    "nomaster": "The Sentinels know no primary of the name in the URL: correct it.",
    "unblocked": "It has just become a replica: see that the setting leads to the primary.",
    "clusterdown": "Some slots of its cluster have no node, and then it serves none: bring that node back.",
    "tryagain": "A slot of its cluster is on its way to another node: wait. If nobody moves it any more, "
    "`redis-cli --cluster check` names it, and `redis-cli --cluster fix` ends the move.",
    "oom": "It is full: raise its maxmemory, or find out who fills it (MEMORY STATS).",
    "misconf": "It can't write its file: look at the server's disk (space, rights) and its log.",
    "noreplicas": "It wants replicas (min-replicas-to-write), and too few follow it: start them.",
    "timeout": "It is frozen, overloaded or cut off: look at its CPU, at SLOWLOG, and at the network between.",
    "auth": "The password or user is wrong: compare REDIS_PASSWORD with the server's ACL, and, if it is Sentinels "
    "that ask, STILLROOM_SENTINEL_USER and STILLROOM_SENTINEL_PASSWORD with theirs.",
    "noauth": "The server wants a password: set REDIS_PASSWORD.",
    "wrongpass": "The password or user is wrong: compare REDIS_PASSWORD with the server's ACL.",
    "select": "The database in the URL does not exist there, or this user may not SELECT it.",
    "time": "Give this user TIME and the other commands of its role: users.acl lists them.",
    "noperm": "Give this user the commands of its role; `stillroom doctor` lists what is missing.",
    "loading": "It is reading its data after a start. Wait; if that takes minutes, look at its log.",
    "masterdown": "It is a replica that lost its master: see that one is promoted.",
    "busy": "A script runs too long: SCRIPT KILL ends it.",
    "pool": "All connections of this process are in use: raise STILLROOM_POOL_SIZE, or use fewer threads.",
    "budget": "It did not answer within STILLROOM_HEALTH_TIMEOUT.",
}

# The same, for what a server says of a part of the check.
NO = {
    "noperm": "Give it these rights (`ACL SETUSER … +info +slowlog|len +memory|doctor +time`).",
    "wrongtype": "Another program writes into this namespace: give Stillroom one of its own (STILLROOM_NAMESPACE).",
    "unsupported": "It, or a proxy before it, does not know one of these commands. Where that is on purpose, as on "
    "many managed servers, accept the finding: STILLROOM_HEALTH_ACCEPT=refused.",
}

# Where another setting leads to the server.
WHY_CACHE = {
    "refused": "Is the server running, and is its address in STILLROOM_CACHE_URL right?",
    "name": "The host in STILLROOM_CACHE_URL has no address: correct it, or look at the name server.",
}
WHY_NODE = {
    "refused": "Start the node that its cluster names and that does not run.",
    "name": "The host that a node announces has no address: look at the name server.",
}


def found_in(measures: Measures) -> Iterator[Advice]:
    """Yield these findings, in no order."""
    finders = [_connections, _said_no, _policies, _old, _not_kept]
    finders += [_paused, _slots, _clocks, _standing, _no_beat]
    for find in finders:
        yield from find(measures)


def alive(measures: Measures) -> list[WorkerStats]:
    """Return the workers that have just shown a sign of life."""
    crew = (measures.tasks and measures.tasks.crew) or ()
    return [one for one in crew if one.seen_s < SEEN_S]


def misconfigured(reason: str) -> Advice:
    """Return the finding that the configuration keeps this process's limits from Redis. `reason`: the wire's."""
    return Advice(
        code="degraded",
        severity="warn",
        component="limits:stats",
        what=f"Redis can't decide on this process's limits as it is configured ({reason}): strict limits answer "
        "503, and this process counts the others by itself.",
        good="Redis decides.",
        todo=WHY.get(reason, "`stillroom doctor` says what is missing."),
    )


def why(reason: str, server: Server) -> str:
    """Return what to do about a server that does not serve this process, with the setting that leads there."""
    own: dict[str, str] = WHY_CACHE if server.roles == ("cache",) else {}
    if server.nodes or "@" in server.name:
        own = WHY_NODE
    return own.get(reason) or WHY.get(reason, "Look at the server's log.")


def _connections(measures: Measures) -> Iterator[Advice]:
    for server in each_server(measures.servers):
        is_node = "@" in server.name
        # A check that waited for one node in vain had no time left for the next one, which may be well.
        if not server.connection.is_up and not (is_node and server.connection.error == "budget"):
            reason = server.connection.error or "unknown"
            yield Advice(
                code="away",
                severity="fail",
                component=f"{server.name}:connection",
                what=f"{_called(server)} does not serve this process ({reason}).",
                good="It answers within milliseconds.",
                todo=why(reason, server),
            )


def _slots(measures: Measures) -> Iterator[Advice]:
    for server in measures.servers:
        if server.slots is not None and server.slots < SLOTS:
            yield Advice(
                code="slots",
                severity="fail",
                component=f"{server.name}:slots",
                what=f"{SLOTS - server.slots:,} of {SLOTS:,} slots have no node: what is in them is away.",
                good="Each slot has a node.",
                todo="`redis-cli --cluster check` says which; `--cluster fix` gives them to a node.",
            )


def _clocks(measures: Measures) -> Iterator[Advice]:
    for server in measures.servers:
        known = {one.name: one.ahead_s for one in server.nodes if one.ahead_s is not None}
        if len(known) < 2:
            continue
        first, last = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        apart_s = known[last] - known[first]
        if apart_s >= CLOCKS_APART_S:
            yield Advice(
                code="clocks",
                severity="warn",
                component=f"{server.name}:clocks",
                what=f"The clocks of {_address(last)} and {_address(first)} are {apart_s:.1f} s apart.",
                good="Less than a second: a key that moves to another node takes its times along.",
                todo="Run NTP on the nodes.",
            )


def _said_no(measures: Measures) -> Iterator[Advice]:
    """Warn of a server that is up and refused some commands."""
    for server in each_server(measures.servers):
        error = server.connection.error
        is_told = any(not node.connection.is_up for node in server.nodes)  # it has a finding
        if server.connection.is_up and error is not None and not (is_told and error not in NO):
            blind = "" if server.redis else " Without INFO its memory and load are unknown."
            yield Advice(
                code="rights" if error == "noperm" else "refused",
                severity="warn",
                component=f"{server.name}:connection",
                what=f"{_called(server)} refused a part of this check ({error}).{blind}",
                good="This user may INFO, SLOWLOG LEN, MEMORY DOCTOR and TIME, and read what Stillroom keeps.",
                todo=NO.get(error, "Look at the server's log."),
            )


_REVIVES = (
    "may throw away the note that a session has ended before the session, which then lives again"
)
# What a policy may take first where state lies beside the cache. volatile-lru takes what nobody has asked for for
# longest; all of the state that decides something is asked for again and again.
_GOES_FIRST = {
    "volatile-ttl": "throws away what ends first: the limits' counts, so that nobody is limited",
    "volatile-lfu": _REVIVES,
    "volatile-random": _REVIVES,
}


def _policies(measures: Measures) -> Iterator[Advice]:
    for server in each_server(measures.servers):
        memory = server.redis.memory if server.redis else None
        if memory is None or memory.policy is None:
            continue
        if "state" in server.roles and memory.policy.startswith("allkeys"):
            yield _policy(
                server,
                "fail",
                f"{memory.policy} may throw away queued tasks, sessions and limits when memory is short.",
                "noeviction where state is kept; volatile-lru where one server does both.",
                "CONFIG SET maxmemory-policy, and give the cache a server of its own (STILLROOM_CACHE_URL).",
            )
        elif server.roles == ("state",) and memory.policy.startswith("volatile"):
            yield _policy(
                server,
                "warn",
                f"{memory.policy} throws away sessions and limits when memory is short: they have an end.",
                "noeviction where only state is kept.",
                "CONFIG SET maxmemory-policy noeviction.",
            )
        elif "state" in server.roles and memory.policy in _GOES_FIRST:
            yield _policy(
                server,
                "warn",
                f"When memory is short, {memory.policy} {_GOES_FIRST[memory.policy]}.",
                "volatile-lru where one server does both.",
                "CONFIG SET maxmemory-policy volatile-lru.",
            )
        elif server.roles == ("cache",) and memory.policy == "noeviction" and memory.limit:
            yield _policy(
                server,
                "warn",
                "noeviction: a full cache stores nothing new.",
                "allkeys-lfu or allkeys-lru where only the cache lives.",
                "CONFIG SET maxmemory-policy allkeys-lfu.",
            )


def _old(measures: Measures) -> Iterator[Advice]:
    for server in each_server(measures.servers):
        info = server.redis
        if info is None or info.version is None:
            continue
        found = why_old(info.product or "redis", info.version, measures.time)
        if found is not None:
            severity, sentence = found
            yield Advice(
                code="server_old",
                severity=severity,
                component=f"{server.name}:version",
                what=sentence,
                good="A version that its makers still repair, with the newest patch.",
                todo="Update it. If your distribution repairs this one under its old number, "
                "accept the finding: STILLROOM_HEALTH_ACCEPT=server_old.",
            )


def _not_kept(measures: Measures) -> Iterator[Advice]:
    """Warn of loaders whose values are loaded by every call, because they would come back different."""
    loaders = (measures.cache and measures.cache.not_kept) or {}
    if loaders:
        yield Advice(
            code="not-kept",
            severity="warn",
            component="cache:stats",
            what=f"{sum(loaders.values())} values could not be kept in the last minute: {', '.join(loaders)}.",
            good="None: each call loads what can't be kept.",
            todo="The log says what would be lost ('a loaded value can't be kept'). Declare what the loader "
            "returns, and return that.",
        )


def _paused(measures: Measures) -> Iterator[Advice]:
    tasks = measures.tasks
    if tasks is not None and tasks.paused_s is not None:
        whose = f", by {tasks.paused_by}" if tasks.paused_by else ""
        yield Advice(
            code="paused",
            severity="warn",
            component="tasks:refreshes",
            what=f"Refreshes are paused for {tasks.paused_s / 60:.0f} min more{whose}: stale values stay.",
            good="They run, but while a database is being repaired.",
            todo="It ends by itself; `stillroom resume refresh` ends it now.",
        )


def _standing(measures: Measures) -> Iterator[Advice]:
    """Warn of scheduled tasks that fail each time. Who else would notice that nobody looks for abuse?"""
    standing = (measures.tasks and measures.tasks.standing) or {}
    if standing:
        named = ", ".join(
            f"{task} ({'never' if age is None else f'{age / 60:.0f} min ago'})"
            for task, age in standing.items()
        )
        yield Advice(
            code="standing",
            severity="warn",
            component="tasks:beat",
            what=f"Scheduled tasks do not end well, though beat goes on. Last done: {named}.",
            good="Each is done every minute, or oftener.",
            todo="The workers' log says why they fail.",
        )


def _no_beat(measures: Measures) -> Iterator[Advice]:
    """Warn of a beat that was forgotten. Its last tick tells of one that has stopped, and here there is none."""
    tasks = measures.tasks
    if tasks is None or tasks.ticks is None or tasks.beat_s is not None:
        return
    up_s = max((one.up_s or 0.0 for one in alive(measures)), default=0.0)
    if up_s >= BEATLESS_S:
        yield Advice(
            code="no-beat",
            severity="warn",
            component="tasks:beat",
            what=f"A worker has run for {up_s / 60:.0f} min, and no tick of beat was ever done: nothing is swept, "
            "and nobody looks for abuse.",
            good="One every few seconds.",
            todo="Start beat (celery -A stillroom_workers beat), and a worker for the maintenance queue. "
            "`stillroom worker` is both.",
        )


def _policy(server: Server, severity: Severity, what: str, good: str, todo: str) -> Advice:
    component = f"{server.name}:memory"
    return Advice(
        code="policy", severity=severity, component=component, what=what, good=good, todo=todo
    )


def _called(server: Server) -> str:
    name, address = server.name.partition("@")[0], _address(server.name)
    whose = {"redis": "Redis", "redis.cache": "The cache's Redis"}.get(name, "The state's Redis")
    return f"{whose} at {address}" if address else whose


def _address(name: str) -> str:
    """Return the address in the name of a cluster's node; empty for another server's."""
    return name.partition("@")[2]
