"""Health's operations: what they ask Redis, and what they make of it. health.py gives them their two faces.

A check is one batch to each server and bounded in time whatever Redis does. It goes through the room's own
connections and breakers, so it sees what the app sees. It does not raise: what is away is what it reports.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from stillroom.counted import rare
from stillroom.errors import InvalidArgument, RedisUnavailable, did_you_mean, in_code
from stillroom.health.advice import advise, status_of
from stillroom.health.findings import misconfigured
from stillroom.health.past import NOT_TOLD, Past, began, patterns_in
from stillroom.health.probe import Counts, Probe
from stillroom.health.report import (
    Advice,
    CacheStats,
    Figures,
    Limits,
    Measures,
    Part,
    RedisInfo,
    Report,
    Role,
    Server,
    SessionStats,
    Snapshot,
    System,
    TaskStats,
    WorkerStats,
)
from stillroom.health.snapshot import (
    KEPT,
    KEPT_COARSE,
    KEPT_S,
    measures_of,
    packed,
    packed_nodes,
    snapshot_of,
    unpacked,
    unpacked_nodes,
    with_rates,
    with_standing,
)
from stillroom.health.source import (
    MINUTE_MS,
    Answers,
    Source,
    Told,
    added,
    ask,
    ask_counts,
    ask_node,
    attempt,
    counts_in,
    due_counts,
    nodes_of_shards,
)
from stillroom.health.system import SystemWatch
from stillroom.health.webhook import Webhook
from stillroom.keys import Keys
from stillroom.operation import On, Once, Operation, Pause
from stillroom.scripts import fold_counts, health_snapshot, task_ticked, worker_seen
from stillroom.settings import Settings
from stillroom.shown import shown
from stillroom.stats import KEPT_SECONDS
from stillroom.whole import is_whole
from stillroom.wire import Budget, Command

log = logging.getLogger("stillroom.health")

T = TypeVar("T")

SNAPSHOT_TASK = "stillroom.snapshot_health"
WEBHOOK_TASK = "stillroom.tell_webhook"
# Tasks that only beat sends. The newest end of one of them is a sign of life of beat, a few seconds old.
TICKS_OF_BEAT = (
    SNAPSHOT_TASK,
    "stillroom.log_abuse",
    "stillroom.trim_marks",
    "stillroom.trim_indexes",
    "stillroom.warm",
)
SCHEDULED = (*TICKS_OF_BEAT, "stillroom.reclaim", "stillroom.sweep_sessions")
PATTERNS = 50
SHORT_FIGURES, LONG_FIGURES, FIGURES_MOST = 15, 60, 119  # minutes
HOURS = 24 * 366  # more than snapshots are kept
# Fields of all counts: those of two apps that count a hundred names of each kind.
COUNTS_MOST = 8_000
FOLDED_AT_ONCE = 200  # of them, added to others by one script
BITE = 120  # snapshots in one reply: some 300 KB
WORKER_GONE_MS = 600_000
TICKS_KEPT_MS = 30 * 86_400_000  # a schedule that has stopped is a finding for as long
PARTS: Mapping[str, type[Part]] = {
    "cache": CacheStats,
    "sessions": SessionStats,
    "limits": Limits,
    "tasks": TaskStats,
}


class HealthBody:
    """The operations. A driver that has one driver for each source runs them."""

    def __init__(self, settings: Settings, keys: Keys, sources: Sequence[Source]) -> None:
        self.settings = settings
        self._keys = keys
        self._sources = sources  # the first holds the state, and what health itself keeps
        self._system = SystemWatch()
        self._machine = "-".join(shown(os.uname().nodename, 100).split()) or "unnamed"
        self.webhook = Webhook(settings, keys, sources[0].clock.now_ms)

    def register(self, role: Role, probe: Probe, shard: int = 0) -> None:
        """Let a service add to the report. `role` and `shard` say where its data are. Raises InvalidArgument."""
        sources = [source for source in self._sources if role in source.roles]
        if not sources:
            known = sorted({one for source in self._sources for one in source.roles})
            raise InvalidArgument(
                f"role={in_code(role):.100}: {' or '.join(known)}{did_you_mean(role, known)}"
            )
        if not is_whole(shard, least=0, most=len(sources) - 1):
            raise InvalidArgument(f"shard={shard!r}: from 0 to {len(sources) - 1}, as settings say")
        sources[shard].probes.append(probe)

    # Now

    def check(self) -> Operation[Report]:
        """Return a report of servers, machine and services, with advice. Takes `health_timeout` seconds at most.

        Does not raise. Redis away: the report says so, and what can't be known is null.
        """
        started = time.monotonic()
        kept: list[Command] = [
            (b"XREVRANGE", self._keys.health, b"+", b"-", b"COUNT", b"1"),
            (b"HGETALL", self._keys.health_open),
            (b"GET", self._keys.health_nodes),
        ]
        asked = [(n, ask(source, () if n else kept)) for n, source in enumerate(self._sources)]
        answers, nodes = yield from self._ask(asked)
        newest, open_findings, counted = answers[0].rest
        system = self._system.newest()
        before = next(iter(unpacked(newest or ())), None)
        measured = with_standing(_measured(answers, nodes, system), before, SCHEDULED)
        measures = with_rates(measured, before, unpacked_nodes(counted))
        return self._report(measures, answers, counts_in(open_findings) or {}, started)

    def _ask(
        self, asked: Sequence[tuple[int, Operation[Answers]]]
    ) -> Operation[tuple[list[Answers], list[Server]]]:
        """Ask all servers within `health_timeout`, and the nodes of the state's cluster.

        A batch to a cluster waits for each node that it needs: in a thread, for one after the other. So half of the
        time is its own. The other servers have a quarter, and the nodes have what is left.
        """
        timeout = self.settings.health_timeout
        if not self.settings.state_cluster:
            with Budget(timeout):
                return (yield On(asked)), []
        (place, of_state), *others = asked
        end = time.monotonic() + timeout
        with Budget(timeout / 4):
            answers = yield On([(place, _within(timeout / 2, of_state)), *others])
        with Budget(max(0.0, end - time.monotonic())):
            return answers, (yield from self._nodes())

    def _nodes(self) -> Operation[list[Server]]:
        """Ask each node of the state's cluster, those last that did not answer before: the others need not wait."""
        state = self._sources[0]
        places = sorted(state.nodes(), key=lambda node: node.breaker.streak > 0)
        found: list[Server] = yield On([(0, ask_node(state, place)) for place in places])
        return sorted(found, key=lambda server: server.name)

    def _report(
        self, measures: Measures, answers: Sequence[Answers], since_ms: Counts, started: float
    ) -> Report:
        advice = tuple(
            found.model_copy(update={"since": _seconds(since_ms.get(self._told_as(found)))})
            for found in self._advice(measures)
            if found.code not in self.settings.health_accept
        )
        return Report(
            **measures_of(measures),
            status=status_of(advice),
            advice=advice,
            release=self.settings.release,
            took_ms=round((time.monotonic() - started) * 1000, 3),
            totals=added([answer.totals for answer in answers]),
        )

    def _advice(self, measures: Measures) -> Sequence[Advice]:
        """Return the findings. This process's own mistakes need not wait for a minute's counts, nor for Redis."""
        found = advise(measures)
        if (mistake := self._sources[0].stats.mistake) is None:
            return found
        return [*(one for one in found if one.code != "degraded"), misconfigured(mistake)]

    def examine(self) -> Operation[Report]:
        """Check, and ask MEMORY DOCTOR too, which takes the server longer. For operators and snapshots.

        Does not raise.
        """
        return (yield from self._with_doctor((yield from self.check())))

    # Each minute

    def snapshot(self) -> Operation[Snapshot]:
        """Check, and keep the result for charts: the first of each minute. For beat's tick.

        Findings that began, became failures or ended since the last one are logged, once however many workers there
        are.
        Does not raise. Redis away: the snapshot is returned, with `error`; nobody keeps it.
        """
        report = yield from self.examine()
        down = [server for server in report.servers if not server.connection.is_up]
        error = "; ".join(f"{server.name}: {server.connection.error}" for server in down) or None
        snapshot = snapshot_of(report, error)
        try:
            began, ended = yield from self._keep(snapshot, report)
        except RedisUnavailable as refused:
            log.warning("the snapshot of this minute is not kept: %s", refused.reason)
            return snapshot.model_copy(update={"error": error or f"not kept: {refused.reason}"})
        self._tell(report, began, ended)
        yield On([(n, _tidy_counts(source)) for n, source in enumerate(self._sources)])
        return snapshot

    def tell_webhook(self) -> Operation[dict[str, Any]]:
        """Post findings and patterns of abuse to the webhook. See Webhook.tell."""
        return self.webhook.tell()

    def _keep(
        self, snapshot: Snapshot, report: Report
    ) -> Operation[tuple[list[str], Mapping[str, int]]]:
        """Keep a snapshot; return (findings that began or became failures, those that ended and their length in
        ms), nothing if kept already.
        """
        keys = [self._keys.health, self._keys.health_week, self._keys.health_open]
        keys += [self._keys.webhook, self._keys.health_nodes]
        named = [(self._told_as(one), one) for one in report.advice]
        findings = [
            word
            for name, one in named
            for word in (name, one.severity, self.webhook.begun(name, one))
        ]
        kept = health_snapshot(
            keys,
            *(packed(snapshot), KEPT, KEPT_COARSE, KEPT_S, self.webhook.most),
            *(self._machine, packed_nodes(report.servers), *findings),
        )
        ((_, began, ended),) = yield [kept]
        return [name.decode() for name in began], counts_in(ended) or {}

    def _told_as(self, found: Advice) -> str:
        """Return the name by which a finding is told. What is found of a machine is that machine's."""
        return f"{found.name} on {self._machine}" if found.component == "system" else found.name

    def _tell(self, report: Report, began: Sequence[str], ended: Mapping[str, int]) -> None:
        """Log one line with advice when a finding begins or becomes a failure, and one when it ends."""
        by_name = {self._told_as(found): found for found in report.advice}
        for name in began:
            found = by_name[name]
            level = logging.ERROR if found.severity == "fail" else logging.WARNING
            what, todo = shown(found.what), shown(found.todo)  # names in them are an app's
            log.log(level, "%s: %s Good: %s %s", shown(name), what, found.good, todo)
        for name, length_ms in ended.items():
            log.warning("%s: over after %.0f min", shown(name), length_ms / 60_000)

    def _with_doctor(self, report: Report) -> Operation[Report]:
        place = {source.name: n for n, source in reversed(list(enumerate(self._sources)))}
        asked = [server for server in report.servers if server.redis is not None]
        words = iter((yield On([(place[server.name], _doctor()) for server in asked])))
        servers = tuple(
            server.model_copy(update={"redis": _with_words(server.redis, next(words))})
            if server.redis is not None
            else server
            for server in report.servers
        )
        return report.model_copy(update={"servers": servers})

    def history(self, hours: float = 24.0) -> Operation[list[Snapshot]]:
        """Return the snapshots of the last hours, oldest first: each minute's up to 24 h, else every fifth.

        Raises InvalidArgument for a number of hours that is none. Redis away: RedisUnavailable.
        """
        if isinstance(hours, bool) or not isinstance(hours, int | float) or not 0 < hours <= HOURS:
            raise InvalidArgument(
                f"hours={in_code(hours):.100}: a number up to {HOURS}, and more than 0"
            )
        stream = self._keys.health if hours <= 24 else self._keys.health_week
        start = b"%d" % max(0, self._sources[0].clock.now_ms() - int(hours * 3_600_000))
        found: list[Snapshot] = []
        while True:
            (entries,) = yield [(b"XRANGE", stream, start, b"+", b"COUNT", b"%d" % BITE)]
            found += unpacked(entries)
            if len(entries) < BITE:
                return found
            start = b"(" + entries[-1][0]
            yield Pause(0)  # others first; and each bite has its own deadline

    def past(self, hours: float = 24.0) -> Operation[Past]:
        """Return the snapshots of some hours and the newest 50 patterns of abuse, as /status shows them.

        Raises InvalidArgument for a number of hours that is none. Redis away: nothing of it is known.
        """
        streams = self._keys.health, self._keys.health_week
        try:
            history = yield from self.history(hours)
            newest = self._keys.abuse_log, b"+", b"-", b"COUNT", b"%d" % PATTERNS
            entries, *firsts = yield [
                (b"XREVRANGE", *newest),
                *((b"XRANGE", s, b"-", b"+", b"COUNT", b"1") for s in streams),
            ]
        except RedisUnavailable as refused:
            log.debug("the past is not known: %s", refused.reason)
            return NOT_TOLD
        figures = yield from self.figures(SHORT_FIGURES if hours <= 0.25 else LONG_FIGURES)
        since = began([first for rows in firsts for first, _ in rows])
        return Past(history, patterns_in(entries), since, figures)

    def figures(self, minutes: int = 15) -> Operation[Figures]:
        """Return the counts of each loader, limit and rule in the last `minutes` whole minutes, 1 to 119.

        Raises InvalidArgument for any other number. Redis away: what can't be known is null.
        """
        if not is_whole(minutes, most=FIGURES_MOST):
            raise InvalidArgument(
                f"minutes={in_code(minutes):.100}: a whole number from 1 to {FIGURES_MOST}; "
                "counts are kept no longer"
            )
        parts: Mapping[str, type[Part]] = {"cache": CacheStats, "limits": Limits}
        counted = yield On(
            [(n, ask_counts(one, minutes, list(parts))) for n, one in enumerate(self._sources)]
        )
        found = {name: _part(name, model, counted) for name, model in parts.items()}
        return Figures(minutes=minutes, **found)

    # Signs of life

    def seen(self, worker: str, about: WorkerStats | None = None) -> Operation[None]:
        """Note that this worker is at work, and what it does; and write down what its process has counted.

        Redis away: nothing happens.
        """
        said = about.model_dump_json(exclude_defaults=True) if about else ""
        keys = [self._keys.workers, self._keys.workers_about]
        signs = [worker_seen(keys, worker, WORKER_GONE_MS, said)]
        batches = [(n, due_counts(source)) for n, source in enumerate(self._sources)]
        yield On([(0, attempt(signs)), *((n, _once(batch)) for n, batch in batches if batch)])

    def ticked(self, task: str) -> Operation[None]:
        """Note that a scheduled task has ended well. Redis away: nothing happens."""
        yield from attempt([task_ticked([self._keys.ticks], task, TICKS_KEPT_MS)])


def _within(seconds: float, operation: Operation[T]) -> Operation[T]:
    """Run the operation with a time of its own."""
    with Budget(seconds):
        return (yield from operation)


def _measured(
    answers: Sequence[Answers], nodes: Sequence[Server], system: System | None
) -> Measures:
    servers = {answer.server.name: answer.server for answer in reversed(answers)}
    state = answers[0].server
    if nodes:
        slots = sum(node.slots or 0 for node in nodes)
        told = {"nodes": tuple(nodes), "slots": slots}
        servers[state.name] = state.model_copy(update=told)
    if shards := nodes_of_shards(answers[1:]):
        cache = servers[answers[1].server.name]
        servers[cache.name] = cache.model_copy(update={"nodes": shards})
    return Measures(
        # No clock of a machine: workers take turns, and their snapshots are compared.
        time=answers[0].source.clock.now_ms() / 1_000,
        servers=tuple(sorted(servers.values(), key=lambda server: server.name)),
        system=system,
        **{part: _part(part, model, answers) for part, model in PARTS.items()},
    )


def _part(name: str, model: type[Part], answers: Sequence[Told]) -> Part | None:
    """Return one part of the report, or None if nothing of it is known."""
    try:
        fields = _fields(name, answers)
        return model(**fields) if any(value is not None for value in fields.values()) else None
    except Exception:  # a probe's mistake costs its part, not the report
        log.exception("the part %r of the report can't be read", name)
        return None


def _fields(name: str, answers: Sequence[Told]) -> Mapping[str, Any]:
    """Return the fields of all probes of this part."""
    fields: dict[str, Any] = {}
    knowing = {n: a for n, a in enumerate(answers) if any(p.part == name for p, _ in a.probed)}
    minute = added([answer.minute for answer in knowing.values()])
    probed = [(a, probe, replies) for a in knowing.values() for probe, replies in a.probed]
    for answer, probe, replies in probed:
        if probe.part == name:
            fields = _sum(fields, probe.read(replies, answer.now_ms)) | dict(probe.count(minute))
    return fields


def _sum(fields: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Add two shards' numbers up. The sum is unknown if either is."""
    both = {
        name: None if None in (fields[name], more[name]) else fields[name] + more[name]
        for name in fields.keys() & more.keys()
    }
    return {**fields, **more, **both}


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


def _tidy_counts(source: Source) -> Operation[None]:
    """Drop the counts of minutes that are still to come, and bound those by name."""
    minute = source.clock.now_ms() // MINUTE_MS
    # They were counted before the clock was set back, and would be told again when their minute comes.
    ahead = [source.keys.stats(minute + n) for n in range(2, KEPT_SECONDS // 60 + 2)]
    yield from attempt([(b"UNLINK", *ahead)])
    yield from _bound_counts(source.keys)


def _bound_counts(keys: Keys) -> Operation[None]:
    """Add up the rarest of the counts by name, where there are too many names. Redis away: nothing happens."""
    try:
        (size,) = yield [(b"HLEN", keys.counts)]
        if size <= COUNTS_MOST:
            return
        (pairs,) = yield [(b"HGETALL", keys.counts)]
        folds = rare(counts_in(pairs) or {}, COUNTS_MOST // 2)
        for start in range(0, len(folds), FOLDED_AT_ONCE):
            words = [word for fold in folds[start : start + FOLDED_AT_ONCE] for word in fold]
            yield Once([fold_counts([keys.counts], *words)])
            yield Pause(0)
    except RedisUnavailable as error:
        log.debug("counts by name are not bounded: %s", error.reason)


def _once(batch: list[Command]) -> Operation[None]:
    """Send counts, which must not be added twice. Redis away: they are lost, as stats.py says."""
    try:
        yield Once(batch)
    except RedisUnavailable as error:
        log.debug("counts were lost: %s", error.reason)


def _doctor() -> Operation[str | None]:
    outcome = yield from attempt([(b"MEMORY", b"DOCTOR")])
    words = outcome.replies[0]
    return None if words is None else words.decode(errors="replace").strip()


def _with_words(info: RedisInfo, words: str | None) -> RedisInfo:
    memory = info.memory.model_copy(update={"doctor": words})
    return info.model_copy(update={"memory": memory})
