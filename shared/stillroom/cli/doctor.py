"""`stillroom doctor`: each line says what is right, or what is wrong and what to do."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import typer
from rich.text import Text

from stillroom.broker import is_amqp, reach
from stillroom.cache import shard_keys
from stillroom.cli.health import COLOURS, console, number, size
from stillroom.cli.tables import AsJson, print_json
from stillroom.dispatch import NoDispatch
from stillroom.errors import DispatchFailed, RedisUnavailable, StillroomError, did_you_mean
from stillroom.health import Advice, Report
from stillroom.health.advice import codes
from stillroom.health.findings import NO, WHY
from stillroom.health.report import Persistence, Replication, Server, Status, each_server, worst
from stillroom.keys import OF_A_SHARD, OF_THE_STATE
from stillroom.limits import Limit
from stillroom.limits.changes import REHEARSED
from stillroom.moving import SHARDS, Side, shut_shards
from stillroom.operation import Driver
from stillroom.probes import state_keys, types_of
from stillroom.room import Stillroom
from stillroom.settings import Settings
from stillroom.shown import shown
from stillroom.stats import Stats
from stillroom.urls import redact
from stillroom.wire import ShardWire, Wire
from stillroom.wire.sentinel import Watch

CLOCK_S = 1.0
JUST_STARTED_S = 90.0  # every tick is due within a minute, and a worker takes some time to begin
SIGNS = {"pass": "✓", "warn": "!", "fail": "✗"}
SAID = 200  # characters of what a library says


class Line(NamedTuple):
    """One finding, good or bad."""

    status: Status
    about: str
    sentence: str


def doctor(as_json: AsJson = False) -> None:
    """Examine settings, servers, rights, the broker, clocks and pending work, and say what to do.

    Of servers it looks at connections, versions, eviction, clients, slowlog and memory.

    What the app does is rehearsed with a key and a session of its own. Exit code: 1 if something fails.
    """
    with Stillroom(dispatch=NoDispatch()) as room:
        lines = list(examined(room))
    print_json([line._asdict() for line in lines]) if as_json else print_lines(lines)
    if worst([line.status for line in lines]) == "fail":
        raise typer.Exit(1)


def print_lines(lines: Iterable[Line]) -> None:
    """Print the findings, each with its sign. What somebody else has written is text."""
    printer = console()
    for line in lines:
        colour = COLOURS[line.status]
        told = Text.assemble(
            (SIGNS[line.status], colour), f" {shown(line.about)}: {shown(line.sentence)}"
        )
        printer.print(told, soft_wrap=True)


def examined(room: Stillroom) -> Iterator[Line]:
    """Yield all lines, in the order of their causes: who can't connect has no policy to look at."""
    yield from _settings(room.settings)
    report = room.health.examine()
    told: list[Advice] = []
    for server in report.servers:
        wire = room.state_wire if "state" in server.roles else room.wire
        if isinstance(wire, Wire) and not server.connection.is_up:
            yield from _in_full(server.name, wire)
        for part, sentence in _of_server(server):
            advice = [
                found for found in report.advice if found.component == f"{server.name}:{part}"
            ]
            told += advice
            yield from _judged(f"{server.name} {part}", advice, sentence)
        for one in each_server([server]):
            yield from _beyond_advice(one)
        yield from _nodes(server)
        yield from _sentinels(server.name, wire.server.watch)
        if server.connection.is_up:
            yield _clock(server.name, wire.server.now_ms() / 1000 - time.time())
    if all(server.connection.is_up for server in report.servers):
        yield from _moved(room)
        yield from _foreign(room)
        yield from rights(room)
    yield from _pending(report)
    if report.system is None:
        yield Line("pass", "system", "not looked at: pip install 'stillroom[health]' brings psutil")
    for found in report.advice:
        if found not in told:
            yield Line(found.severity, found.component, f"{found.what} {found.todo}")


def _settings(settings: Settings) -> Iterator[Line]:
    where = redact(settings.redis_url)
    if settings.cache_url is not None:
        where += f", the cache's {redact(settings.cache_url)}"
    yield Line("pass", "settings", f"namespace {settings.namespace}, Redis at {where}")
    if not settings.session_peppers:
        severity: Status = "fail" if settings.production else "warn"
        todo = "Sessions end with the process that made them: set STILLROOM_SESSION_PEPPERS."
        yield Line(severity, "settings", f"no pepper is set. {todo}")
    yield from unusable(settings)
    if settings.health_token is None:
        todo = "Set STILLROOM_HEALTH_TOKEN to see /health's details from elsewhere."
        yield Line("pass", "settings", f"details of health are for health_networks only. {todo}")


def unusable(settings: Settings) -> Iterator[Line]:
    """Yield a warning for each setting that names what does not exist."""
    root = settings.image_root
    if root is not None and not root.is_dir():
        said = f"STILLROOM_IMAGE_ROOT is {root}: there is no such folder."
        yield Line("warn", "settings", said)
    for code in settings.health_accept:
        if code not in (known := codes()):
            hint = did_you_mean(code, known)
            yield Line("warn", "settings", f"STILLROOM_HEALTH_ACCEPT: {code} is no finding{hint}.")


def _of_server(server: Server) -> Iterator[tuple[str, str]]:
    """Yield (the part, what is right about it if no advice says otherwise)."""
    yield "connection", f"answers in {server.connection.latency_ms or 0:.1f} ms"
    info = server.redis
    if info is None:
        return
    yield "version", f"{info.product or 'redis'} {info.version or 'unknown'}"
    roles = " and ".join(server.roles)
    limit = ", no maxmemory" if info.memory.limit is None else f" of {size(info.memory.limit)}"
    yield "memory", f"{size(info.memory.used)}{limit}; {info.memory.policy} is right for {roles}"
    yield "clients", f"{number(info.clients.connected)} of {number(info.clients.limit)}"
    yield "operations", f"{number(info.operations.slowlog)} commands in the slowlog, no new ones"
    yield "persistence", _persistence(info.persistence)
    yield "replication", _replication(server.replication)


def _persistence(known: Persistence) -> str:
    if known.aof is None:
        return "it does not say what it writes to disk"
    if known.aof:
        return "the last writes to the append-only file went well"
    lost = (
        f"{number(known.changes_since_save)} changes since the last snapshot end with this server"
    )
    return f"no append-only file: {lost}"


def _nodes(server: Server) -> Iterator[Line]:
    """Yield a line for each node of a cluster that answers. A node that does not is among the advice."""
    for node in server.nodes:
        info = node.redis
        if info is None:
            continue
        told = [f"a {'primary' if info.role == 'master' else info.role or 'node'}"]
        told += [] if node.slots is None else [f"{number(node.slots)} slots"]
        told += [f"{size(info.memory.used)}", f"{number(info.clients.connected)} clients"]
        told += [f"{number(info.operations.per_s)} operations/s"]
        told += [] if node.ahead_s is None else [f"its clock {node.ahead_s * 1000:+.0f} ms"]
        yield Line("pass", node.name, ", ".join(told))


def _beyond_advice(server: Server) -> Iterator[Line]:
    """Yield the lines that only an operator asks for."""
    info = server.redis
    if info is None:
        return
    if info.memory.limit is None:
        todo = "It may take all memory of its machine: CONFIG SET maxmemory."
        yield Line("warn", f"{server.name} memory", f"no limit is set. {todo}")
    if info.memory.doctor:
        yield Line("pass", f"{server.name} MEMORY DOCTOR", " ".join(info.memory.doctor.split()))


def _replication(known: Replication) -> str:
    """Return a sentence on the primary, its replicas and their lag."""
    who = f"the primary is {known.primary}" if known.primary else "a primary"
    if known.followers is None:
        return f"{who}; it does not say who follows"
    if not known.followers:
        return f"{who}; nobody follows"
    behind = [
        f"{one.address} ({number(one.lag_s)} s, {number(one.behind)} bytes behind)"
        if one.is_online
        else f"{one.address} (does not copy yet)"
        for one in known.followers
    ]
    return f"{who}; it is followed by {', '.join(behind)}"


def _in_full(name: str, wire: Wire) -> Iterator[Line]:
    """Yield a line with what a new connection meets, in the system's words too: a report has one word for it."""
    try:
        wire.ping()
    except RedisUnavailable as error:
        if error.detail:
            yield Line("fail", f"{name} connection", f"{error.detail}.")


def _sentinels(name: str, watch: Watch | None) -> Iterator[Line]:
    """Yield a line for each Sentinel."""
    for host, is_good, words in [] if watch is None else watch.said():
        yield Line("pass" if is_good else "warn", f"{name} Sentinel {host}", words)


def _clock(name: str, ahead_s: float) -> Line:
    if abs(ahead_s) < CLOCK_S:
        return Line("pass", f"{name} clock", f"{abs(ahead_s) * 1000:.0f} ms from this machine's")
    sentence = f"{abs(ahead_s):.1f} s from this machine's. Nothing breaks, but logs and charts disagree: run NTP."
    return Line("warn", f"{name} clock", sentence)


def _judged(about: str, advice: Iterable[Advice], good: str) -> Iterator[Line]:
    wrong = [Line(found.severity, about, f"{found.what} {found.todo}") for found in advice]
    yield from wrong or [Line("pass", about, good)]


def _moved(room: Stillroom) -> Iterator[Line]:
    """Yield a line for shards of the sessions that `stillroom move-state` has shut."""
    try:
        left, arriving = shut_shards(Side(room.keys, room.state.run))
    except RedisUnavailable:  # whatever it is, the rehearsal meets it too
        return
    if left:
        yield Line(
            "fail",
            "sessions",
            f"{left} of {len(SHARDS)} shards have moved to another server, and are unavailable to processes with "
            "these settings. Give them those of the new server, or take the sessions back: stillroom move-state",
        )
    if arriving:
        yield Line(
            "warn",
            "sessions",
            f"{arriving} of {len(SHARDS)} shards are on their way to this server, and unavailable meanwhile. If no "
            "stillroom move-state runs, it broke off: run it again, or the other way round",
        )


def _foreign(room: Stillroom) -> Iterator[Line]:
    """Yield a line for each key in whose place another program has written something else."""
    places = zip(_wires_of_shards(room), shard_keys(room.settings), strict=True)
    asked = [(wire, keys, OF_A_SHARD) for wire, keys in places]
    for wire, keys, types in [*asked, (room.state_wire, state_keys(room.settings), OF_THE_STATE)]:
        named: list[bytes] = [getattr(keys, name) for name in types]
        found = Driver(wire).run(types_of(named))
        for key, own, other in zip(named, types.values(), found, strict=False):
            if isinstance(other, bytes) and other.decode() not in (own, "none"):
                what = f"{key.decode()} is a {other.decode()}, where Stillroom has a {own}"
                todo = f"{NO['wrongtype']} If nobody needs that key, delete it: Stillroom makes its own."
                yield Line("fail", "keys", f"{what}. {todo}")


def _wires_of_shards(room: Stillroom) -> Sequence[Wire | ShardWire[Wire]]:
    wire = room.wire
    return [wire] * room.settings.shards if isinstance(wire, Wire) else wire.shards


# The rights of this user are found out by using each service once.


def rights(room: Stillroom) -> Iterator[Line]:
    """Tell whether this user may do what the app does, and order work from workers."""
    yield _rehearsed("rights to cache", _use_cache, room)
    yield _rehearsed("rights to sessions", _use_sessions, room)
    yield _rehearsed("rights to limits", _use_limits, room)
    yield _rehearsed("rights to abuse", _use_abuse, room)
    yield _broker(room.settings)


def _rehearsed(about: str, act: Callable[[Stillroom], None], room: Stillroom) -> Line:
    room.stats.last_said = room.state_stats.last_said = None
    try:
        act(room)
    except RedisUnavailable as error:
        if error.reason == "tryagain":
            return Line("warn", about, f"{error}. Try again when all has arrived.")
        todo = WHY.get(error.reason, NO.get(error.reason, ""))
        if error.lacks_right or error.reason == "time":
            todo = "Give an app's user the commands it lacks. A worker's has fewer: ask where the app runs."
        return Line("fail", about, f"{str(error).rstrip('.')}. {todo}".rstrip())
    except StillroomError as error:
        return Line("fail", about, f"what was written is not found again: {error}")
    finally:
        for stats in (room.stats, room.state_stats):
            stats.reset()  # what this user may not do is nothing that happened to the app
    return Line("pass", about, "this user may do what the app does")


def _unsaid(stats: Stats, what: str) -> RedisUnavailable:
    """Return why a service has gone on without Redis. It tells that to the log alone."""
    reason, sentence = stats.last_said or ("err", "Redis did not say why")
    error = RedisUnavailable(reason)
    error.args = (f"{what}: {sentence}",)
    return error


def _use_cache(room: Stillroom) -> None:
    """Use the cache once. `invalidate` raises what the others fall back from silently."""
    key = _own()
    room.cache.invalidate(key)
    if not room.cache.set(key, 1, ttl=10, tags=[REHEARSED]) or room.cache.get(key) != 1:
        raise _unsaid(room.stats, "a value could not be stored and read")
    room.cache.invalidate(key)


def _use_sessions(room: Stillroom) -> None:
    user = _own()
    session = room.sessions.create(user, idle=10, absolute=10)
    room.sessions.update(session, {"a": 1})
    room.sessions.list_for_user(user)
    room.sessions.destroy(session)


def _own() -> str:
    """Return a name that no other doctor has, who may be at work at the same time."""
    return f"{REHEARSED}:{secrets.token_hex(8)}"


def _use_limits(room: Stillroom) -> None:
    """Use the limits once. Where Redis refuses, a check goes on without it."""
    subject = f"127.{'.'.join(map(str, secrets.token_bytes(3)))}"  # no other doctor's
    limits = [Limit(REHEARSED, 1, 10)]
    held = room.limits.reserve(subject, limits)
    if held.decision.degraded or not room.limits.refund(held):
        raise _unsaid(room.state_stats, "a limit could not be counted")
    room.limits.reset(subject, limits)


def _use_abuse(room: Stillroom) -> None:
    """Report an event of this machine, which no rule ever bans."""
    if not room.abuse.report("session_unknown", ip="127.0.0.1"):
        raise _unsaid(room.state_stats, "an event could not be written")


def _broker(settings: Settings) -> Line:
    """Tell whether orders to workers can be published."""
    where = "REDIS_URL" if settings.broker_url is None else "STILLROOM_BROKER_URL"
    try:
        reach(settings)
    except DispatchFailed as error:
        what = f"the broker in {where} takes no orders ({shown(error, SAID)})"
        return Line("fail", "broker", f"{what}. Stale values are not refreshed meanwhile.")
    if is_amqp(settings):  # a right that lacks shows when something is sent
        return Line("pass", "broker", "it takes this login; rights and queues there are not tried")
    return Line("pass", "broker", "this user may order work there")


def _pending(report: Report) -> Iterator[Line]:
    tasks, sessions = report.tasks, report.sessions
    if tasks is None:
        return
    depths = [f"{queue.name} {number(queue.depth)}" for queue in tasks.queues or ()]
    waiting = ", ".join([*depths, f"todo {number(tasks.todo)}"])
    due = (
        ""
        if sessions is None
        else f", sessions due for the sweep {number(sessions.expired_pending)}"
    )
    yield Line("pass", "pending work", f"{waiting}{due}")
    if tasks.beat_s is None and _has_just_started(report):
        yield Line("pass", "beat", "just started: its first tick is done within a minute")
    elif tasks.beat_s is None and all(found.code != "no-beat" for found in report.advice):
        todo = "Start a worker and a beat: stillroom up, or see the README."
        yield Line("warn", "beat", f"no tick was seen yet, or none for 30 days. {todo}")


def _has_just_started(report: Report) -> bool:
    """Return whether a worker, or Redis itself, began so lately that no tick could be done yet."""
    workers = (report.tasks and report.tasks.crew) or ()
    ages = [one.up_s + one.seen_s for one in workers if one.up_s is not None]
    told = [server.redis.uptime_s for server in report.servers if server.redis]
    ages += [uptime for uptime in told if uptime is not None]
    return min(ages, default=JUST_STARTED_S) < JUST_STARTED_S
