"""Asks one server for a report's data, in one batch whose every reply may be missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.health.probe import Counts, Probe
from stillroom.health.redis_info import followers_in, good_followers_in, parse_info
from stillroom.health.report import Connection, RedisInfo, Replication, Role, Server
from stillroom.keys import Keys
from stillroom.operation import Once, Operation
from stillroom.replicas import UNCONFIRMED
from stillroom.stats import Stats
from stillroom.whole import number_in
from stillroom.wire import AWAY, AtSlot, Clock, Command, NodeAway, micros

log = logging.getLogger("stillroom.health")

MINUTE_MS = 60_000
OF_SELF: Sequence[tuple[bytes, ...]] = ((b"INFO",), (b"SLOWLOG", b"LEN"), (b"TIME",))


class Breaker(Protocol):
    """Tells the state of a wire's circuit breaker."""

    @property
    def is_open(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def down_since(self) -> float | None: ...


class NodeBreaker(Breaker, Protocol):
    """Tells besides how often a node has failed since it last answered."""

    @property
    def streak(self) -> int: ...


class Node(Protocol):
    """A node of a cluster, and what it has of the slots."""

    @property
    def address(self) -> str: ...
    @property
    def slot(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def breaker(self) -> NodeBreaker: ...


class Source(NamedTuple):
    """A server that one driver asks.

    A cluster's shards are several sources of one name; the first of them describes the server.
    """

    name: str
    roles: tuple[Role, ...]
    clock: Clock
    breaker: Breaker
    keys: Keys
    stats: Stats
    probes: list[Probe]
    replicas: int = 0  # so many are to have what is acknowledged
    nodes: Callable[[], Sequence[Node]] = tuple  # of a cluster, those to describe besides


class Answers(NamedTuple):
    """Holds the answers of one source. None: the source did not answer that."""

    source: Source
    server: Server
    minute: Counts | None
    totals: Counts | None
    now_ms: int  # by the server's clock
    probed: Sequence[tuple[Probe, Sequence[Any]]]  # and the replies to what it asked
    rest: Sequence[Any]  # the replies to what was asked besides


class Told(Protocol):
    """Gives the data from which a part of a report is made."""

    @property
    def minute(self) -> Counts | None: ...
    @property
    def now_ms(self) -> int: ...
    @property
    def probed(self) -> Sequence[tuple[Probe, Sequence[Any]]]: ...


class Counted(NamedTuple):
    """Holds the counts of one source in several minutes, added up as if they were one minute."""

    minute: Counts | None
    now_ms: int
    probed: Sequence[tuple[Probe, Sequence[Any]]]


class Outcome(NamedTuple):
    """Holds the replies (None for a missing one), the error in one word, and whether the server answered."""

    replies: Sequence[Any]
    error: str | None = None
    answered: bool = True


def ask(source: Source, besides: Sequence[Command]) -> Operation[Answers]:
    """Ask a server for its part of the report. A command that this user may not run leaves a hole, not an error."""
    source.clock.ask_time()  # and the server's role: a replica is not reported on
    now_ms = source.clock.now_ms()
    asked = _asked(source.probes, now_ms)
    own = _own_commands(source, now_ms)
    batch = [*own, *besides, *(command for _, commands in asked for command in commands)]
    started = time.monotonic()
    outcome = yield from attempt(batch, due_counts(source))
    latency_ms = (time.monotonic() - started) * 1000
    place = iter(outcome.replies)
    info, slowlog, clock, minute, totals = [next(place) for _ in own]
    counted = counts_in(minute)
    return Answers(
        source,
        Server(
            name=source.name,
            roles=source.roles,
            connection=_connection(source.breaker, outcome, latency_ms),
            redis=_redis(info, slowlog, clock),
            replication=_replication(source, info, counted),
        ),
        counted,
        counts_in(totals),
        rest=[next(place) for _ in besides],
        probed=[(probe, [next(place) for _ in commands]) for probe, commands in asked],
        now_ms=now_ms,
    )


def ask_node(source: Source, node: Node) -> Operation[Server]:
    """Ask one node of a cluster to describe itself. Does not raise: a node that is away is described as such."""
    started, begun_at = time.monotonic(), time.time()
    own: list[Command] = [AtSlot(node.slot, words) for words in OF_SELF]
    outcome = yield from attempt(own)
    took_s = time.monotonic() - started
    info, slowlog, clock = outcome.replies
    known = _redis(info, slowlog, clock)
    at = known.counters.at if known is not None else None
    return Server(
        name=f"{source.name}@{node.address}",
        roles=source.roles,
        connection=_connection(node.breaker, outcome, took_s * 1000),
        redis=known,
        replication=_replication(source, info),
        slots=node.slots,
        ahead_s=None if at is None else round(at - begun_at - took_s / 2, 3),
    )


def nodes_of_shards(answers: Sequence[Answers]) -> tuple[Server, ...]:
    """Return the nodes of a cluster that was asked by its shards, each once."""
    found: dict[str, Server] = {}
    for answer in answers:
        address = getattr(answer.source.clock, "address", "")
        if address and address not in found:
            name = f"{answer.server.name}@{address}"
            found[address] = answer.server.model_copy(update={"name": name})
    return tuple(found[address] for address in sorted(found))


def ask_counts(source: Source, minutes: int, parts: Sequence[str]) -> Operation[Counted]:
    """Ask for the counts of the last `minutes` whole minutes, and the probes of these parts. Does not raise."""
    now_ms = source.clock.now_ms()
    newest = now_ms // MINUTE_MS - 1
    asked = _asked([probe for probe in source.probes if probe.part in parts], now_ms)
    stats = [(b"HGETALL", source.keys.stats(newest - ago)) for ago in range(minutes)]
    outcome = yield from attempt([*stats, *(one for _, commands in asked for one in commands)])
    place = iter(outcome.replies)
    counted = added([counts_in(next(place)) for _ in stats])
    return Counted(counted, now_ms, [(p, [next(place) for _ in c]) for p, c in asked])


def added(counts: Sequence[Counts | None]) -> Counts | None:
    """Add up by name; None if any of them is not known."""
    summed: dict[str, int] = {}
    for one in counts:
        if one is None:
            return None
        for name, number in one.items():
            summed[name] = summed.get(name, 0) + number
    return summed


def attempt(batch: Sequence[Command], counts: Sequence[Command] = ()) -> Operation[Outcome]:
    """Send a batch, the counts that are due behind it. Does not raise for what Redis does.

    Counts and events are written once. So where the connection dies, the batch alone is sent again.
    """
    size = len(batch)
    try:
        replies = yield Once.joined([list(batch), Once(counts)]) if counts else list(batch)
    except RedisRefused as refused:
        if len(refused.replies) != size + len(counts):  # a script of the batch could not be loaded
            return Outcome([None] * size, refused.reason, answered=False)
        good = [None if isinstance(r, Exception) else r for r in refused.replies[:size]]
        first = refused.replies[0]
        if isinstance(first, NodeAway):  # of a cluster: the node that this server's part is about
            return Outcome(good, first.failure.reason, answered=False)
        failed = any(isinstance(r, Exception) for r in refused.replies[:size])
        return Outcome(good, refused.reason if failed else None)
    except RedisUnavailable as error:
        if counts and error.reason == "closed":
            return (yield from attempt(batch))
        return Outcome([None] * size, error.reason, answered=False)
    return Outcome(replies[:size])


def due_counts(source: Source) -> list[Command]:
    """Return the commands that write down this process's counts, or none while they are not due."""
    if time.monotonic() < source.stats.due:
        return []
    return source.stats.flush(source.clock.now_ms(), source.keys)


def counts_in(pairs: Sequence[bytes] | None) -> dict[str, int] | None:
    """Return the numbers in a reply to HGETALL, by name. Values that are no numbers of Redis are left out."""
    if pairs is None:
        return None
    named = zip(pairs[::2], pairs[1::2], strict=True)
    found = {name.decode(errors="replace"): number_in(value) for name, value in named}
    return {name: number for name, number in found.items() if number is not None}


def _asked(probes: Sequence[Probe], now_ms: int) -> list[tuple[Probe, Sequence[Command]]]:
    """Return the probes with what each asks. One that makes a mistake is left out: it costs no report."""
    asked: list[tuple[Probe, Sequence[Command]]] = []
    for probe in probes:
        try:
            asked.append((probe, list(probe.commands(now_ms))))
        except Exception:
            log.exception("a probe of the part %r can't say what to ask", probe.part)
    return asked


def _own_commands(source: Source, now_ms: int) -> list[Command]:
    return [
        *OF_SELF,
        (b"HGETALL", source.keys.stats(now_ms // MINUTE_MS - 1)),
        (b"HGETALL", source.keys.counts),
    ]


def _connection(breaker: Breaker, outcome: Outcome, latency_ms: float) -> Connection:
    """Return the connection's state. A server that refuses some commands is up; one that is loading is not."""
    is_up = outcome.answered and outcome.error not in AWAY
    return Connection(
        is_up=is_up,
        latency_ms=round(latency_ms, 3) if is_up else None,
        breaker="open" if breaker.is_open else "closed",
        down_since=breaker.down_since,
        error=breaker.reason if outcome.error == "breaker" else outcome.error,
    )


def _replication(source: Source, info: bytes | None, minute: Counts | None = None) -> Replication:
    return Replication(
        primary=source.clock.primary,
        followers=None if info is None else followers_in(info),
        wanted=source.replicas,
        good=None if info is None else good_followers_in(info),
        unconfirmed=None if minute is None else minute.get(UNCONFIRMED, 0),
    )


def _redis(
    info: bytes | None, slowlog: int | None, clock: Sequence[bytes] | None
) -> RedisInfo | None:
    at = None if clock is None else micros(clock) / 1e6
    return None if info is None else parse_info(info, slowlog=slowlog, at=at)
