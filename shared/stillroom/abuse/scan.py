"""Read the stream of events, and find the patterns of abuse in it.

Workers read as one group, and one may be killed at any point: what it had not acknowledged is read again. Hence
**nothing here counts reading**: a count is a set of what was seen, and a pattern with its ban is one script, which
knows the event that completed it.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from stillroom.abuse.event import BadEvent, Entry, cleaned, read_event
from stillroom.abuse.patterns import (
    Finding,
    Pattern,
    Sample,
    Tally,
    findings,
    pattern_of,
    samples_of,
)
from stillroom.abuse.rules import Rule
from stillroom.abuse.spreading import spread_bans
from stillroom.counted import RULE
from stillroom.errors import OF_THE_COMMAND, RedisRefused, RedisUnavailable
from stillroom.exempt import Exempt
from stillroom.keys import Keys
from stillroom.known_bans import KnownBans
from stillroom.operation import Once, Operation, Pause
from stillroom.scripts import abuse_count, abuse_judge, abuse_tidy
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Command, Server, StateServer, micros, refusal

log = logging.getLogger("stillroom.abuse")

GROUP = b"workers"
# All workers are one consumer: abandoned events are known by their idle time, and no list of dead workers grows.
CONSUMER = b"worker"
LEFT_AFTER_MS = 60_000  # a worker that read an event and has not finished by then is dead
LATE_MS = 2 * LEFT_AFTER_MS  # a count is kept for those that somebody else reads then
DELIVERIES = 5  # an event that was read so often, and never finished, is not read again
LEFT_BITE = 100  # of those that a dead worker left
PATTERNS_KEPT = 10_000
ASIDE_KEPT = 1_000
EVENT_LIFE_MS = 3_600_000  # no ban for an older event: the address may be another client's by now
GROUPS_LIMIT = 50_000  # counts, of all rules together
LONGEST_BAN_MS = 86_400_000
JITTER = 0.1  # so that those banned together do not come back together
LEVEL_KEPT_MS = 7 * 86_400_000  # a week without a ban, and the next is a first one
PEACE_MS = 600_000  # after a ban was lifted
PART = 100  # scripts in one batch: it has to be done within `command_timeout`, by a busy server too
AT_ONCE = 50  # samples that one script counts …
MEMBERS_AT_ONCE = 4_000  # … and members that they may have: it takes a millisecond at the most
OF_EACH = 50  # events that are read at a time from each of a cluster's streams
COUNTS = ("events", "patterns", "bans", "aside", "late")

# An entry as the stream has it: id, and name, value, name, value …
Raw = tuple[bytes, Sequence[bytes]]


class Stream(NamedTuple):
    """Hold one of the streams of events: there is one, or one in each of a cluster's shards of limits."""

    home: bytes  # the hash tag of the shard
    key: bytes
    shift_ms: int = 0  # see Entry

    @property
    def suffix(self) -> bytes:
        """Return what tells the ids of this stream from those of the others."""
        return b"@" + self.home[1:-1] if self.home else b""


class Scan:
    """One reading of the stream, for a few seconds at most."""

    def __init__(
        self,
        settings: Settings,
        server: Server | StateServer,
        keys: Keys,
        stats: Stats,
        bans: KnownBans,
        rules: tuple[Rule, ...],
        exempt: Exempt,
    ) -> None:
        self._settings = settings
        self._server = server
        self._keys = keys
        self._stats = stats
        self._bans = bans
        self._rules = rules
        self._exempt = exempt
        self._done: Counter[str] = Counter()
        self._streams = [Stream(home, keys.abuse_at(home)) for home in keys.homes]
        self._now_ms = 0  # the server's clock, as it was when the newest events were read
        # In a cluster the clock of the node that counts, and when that was read.
        self._judges_ms = (0, 0.0)
        self._trouble: RedisUnavailable | None = None  # why a stream of a cluster could not be read

    def run(self, limit: int, seconds: float) -> Operation[dict[str, Any]]:
        """See AbuseBody.scan."""
        deadline = time.monotonic() + seconds
        yield from self._read_judges_clock()
        yield from self._take_over(deadline)
        found = yield from self._read(limit)
        while found:
            for stream, entries in found:
                yield from self._finish(stream, entries)
                yield Pause(0)  # others first; and each bite has its own deadline
            if time.monotonic() > deadline:
                break
            found = yield from self._read(limit)
        yield from self._tidy()
        if self._trouble is not None:
            raise self._trouble  # what it keeps is read by the next one
        return {name: self._done[name] for name in COUNTS} | {"done": not found}

    # Reading

    def _read(self, limit: int) -> Operation[list[tuple[Stream, Sequence[Raw]]]]:
        """Read the next events that no worker has read, of all streams at the same time."""
        count = b"%d" % (limit if len(self._streams) == 1 else min(limit, OF_EACH))

        def reading(stream: Stream) -> list[Command]:
            group = (b"XREADGROUP", b"GROUP", GROUP, CONSUMER)
            return [(*group, b"COUNT", count, b"STREAMS", stream.key, b">"), (b"TIME",)]

        found: list[tuple[Stream, Sequence[Raw]]] = []
        for stream, (reply, clock) in (yield from self._in_groups(reading)):
            now_ms = micros(clock) // 1_000
            if reply:
                found.append((self._timed(stream, now_ms), reply[0][1]))
            elif len(self._streams) == 1:
                self._now_ms = now_ms
        return found

    def _timed(self, stream: Stream, now_ms: int) -> Stream:
        """Return the stream with its clock as it is now, because this process's estimate may be hours off."""
        if not self._keys.is_spread:
            self._now_ms = now_ms
            return stream
        read_ms, at = self._judges_ms
        self._now_ms = read_ms + int((time.monotonic() - at) * 1_000)
        return stream._replace(shift_ms=self._now_ms - now_ms)

    def _read_judges_clock(self) -> Operation[None]:
        """In a cluster, read the clock that events are counted by. Ids of events are by their stream's node."""
        if self._keys.is_spread:
            _, clock = yield [(b"EXISTS", self._keys.bans), (b"TIME",)]
            self._judges_ms = micros(clock) // 1_000, time.monotonic()

    def _take_over(self, deadline: float) -> Operation[None]:
        """Take over a dead worker's unfinished events one by one, because one of them may have killed it.

        Not by XAUTOCLAIM: it does not say how often an entry was delivered, and what it says of an entry that the
        stream no longer has differs from version to version.
        """
        for stream, (left,) in (yield from self._in_groups(self._pending)):
            for name, _, _, deliveries in left:
                if time.monotonic() > deadline:
                    return
                if deliveries < DELIVERIES:
                    yield from self._finish(*(yield from self._claim(stream, name)))
                else:
                    _, fields = yield from self._look_up(stream, name)
                    why = f"read {deliveries} times, never finished"
                    yield from self._set_aside(stream, name, why, fields)
                yield Pause(0)

    def _pending(self, stream: Stream) -> list[Command]:
        """Ask for (id, consumer, idle ms, deliveries) of the events that were read a while ago and not
        acknowledged.
        """
        limits = (b"IDLE", b"%d" % LEFT_AFTER_MS, b"-", b"+", b"%d" % LEFT_BITE)
        return [(b"XPENDING", stream.key, GROUP, *limits)]

    def _claim(self, stream: Stream, name: bytes) -> Operation[tuple[Stream, Sequence[Raw]]]:
        """Claim the entry; return nothing if another worker was first or the stream no longer has it."""
        idle = b"%d" % LEFT_AFTER_MS
        claims = (b"XCLAIM", stream.key, GROUP, CONSUMER, idle, name)
        (claimed,) = yield Once([claims])
        stream, fields = yield from self._look_up(stream, name)
        if not fields:  # trimmed away: Redis 6.2 would keep it among the pending for ever
            yield [_acknowledging(stream, [name])]
        return stream, [(name, fields)] if claimed and fields else []

    def _look_up(self, stream: Stream, name: bytes) -> Operation[tuple[Stream, Sequence[bytes]]]:
        """Return the fields of an entry, or none if the stream no longer has it."""
        found, clock = yield [(b"XRANGE", stream.key, name, name), (b"TIME",)]
        return self._timed(stream, micros(clock) // 1_000), found[0][1] if found else []

    def _in_groups(
        self, commands: Callable[[Stream], list[Command]]
    ) -> Operation[list[tuple[Stream, Sequence[Any]]]]:
        """Return each stream with its replies, and make the consumer group where it is missing: at the start, and
        after a flush.

        Raises RedisUnavailable where no stream can be read; why others can't is in `_trouble`.
        """
        told = yield from self._of_each(self._streams, commands)
        missing = [stream for stream, replies in told if _reason_in(replies) == "nogroup"]
        for stream in missing:
            yield from self._make_group(stream)
        if missing:
            told = [pair for pair in told if pair[0] not in missing]
            told += yield from self._of_each(missing, commands)
        good = [(stream, replies) for stream, replies in told if not _reason_in(replies)]
        if len(good) < len(told):
            self._trouble = refusal([one for _, replies in told for one in replies])
        if self._trouble is not None and not good:
            raise self._trouble
        return good

    def _of_each(
        self, streams: Sequence[Stream], commands: Callable[[Stream], list[Command]]
    ) -> Operation[list[tuple[Stream, Sequence[Any]]]]:
        """Return each stream with its replies, errors among them."""
        asked = [commands(stream) for stream in streams]
        batch = Once([command for some in asked for command in some])
        batch.parts = [(len(some), True) for some in asked]
        try:
            replies: Sequence[Any] = yield batch
        except RedisRefused as refused:
            if len(refused.replies) != len(batch):
                raise
            replies = refused.replies
        place = iter(replies)
        return [
            (one, [next(place) for _ in some]) for one, some in zip(streams, asked, strict=True)
        ]

    def _make_group(self, stream: Stream) -> Operation[None]:
        """Make the consumer group, beginning with the events that were written before there were workers."""
        try:
            yield [(b"XGROUP", b"CREATE", stream.key, GROUP, b"0", b"MKSTREAM")]
        except RedisRefused as refused:
            if refused.reason != "busygroup":  # another worker was first
                raise

    # Finishing

    def _finish(self, stream: Stream, raw: Sequence[Raw]) -> Operation[None]:
        """Judge these entries and acknowledge them. If one makes judging fail, all stay pending: see _take_over."""
        if not raw:
            return
        try:
            yield from self._judge((yield from self._readable(stream, raw)))
        except RedisUnavailable as error:
            if error.reason not in OF_THE_COMMAND:  # Redis is away
                raise
            log.exception("%d events could not be judged; they are read again", len(raw))
            return
        except Exception:
            log.exception("%d events could not be judged; they are read again", len(raw))
            return
        yield [_acknowledging(stream, [name for name, _ in raw])]
        self._done["events"] += len(raw)

    def _readable(self, stream: Stream, raw: Sequence[Raw]) -> Operation[list[Entry]]:
        """Return the readable entries that are not too old.

        Unreadable ones become dead letters; old ones are counted.
        """
        entries: list[Entry] = []
        for name, fields in raw:
            try:
                entries.append(Entry(name + stream.suffix, read_event(fields), stream.shift_ms))
            except BadEvent as error:
                yield from self._set_aside(stream, name, str(error), fields)
        oldest = self._now_ms - EVENT_LIFE_MS
        timely = [entry for entry in entries if entry.ms >= oldest]
        self._done["late"] += len(entries) - len(timely)
        return timely

    def _set_aside(
        self, stream: Stream, name: bytes, reason: str, fields: Sequence[bytes]
    ) -> Operation[None]:
        """Move the event to the dead letters with its reason. It is never read again."""
        texts = [cleaned(part.decode("utf-8", "backslashreplace")) for part in fields[:20]]
        about = (b"id", name, b"reason", reason.encode(), b"event", json.dumps(texts).encode())
        adds = (b"XADD", self._keys.abuse_aside, b"MAXLEN", b"~", b"%d" % ASIDE_KEPT, b"*", *about)
        try:
            yield Once([adds, _acknowledging(stream, [name])])
        except RedisRefused as refused:
            # A server that is full takes no dead letter. The event must not keep the others from being judged.
            if len(refused.replies) != 2 or isinstance(refused.replies[1], Exception):
                raise
        log.error("the abuse event %s is now a dead letter: %s", name.decode(), reason)
        self._done["aside"] += 1

    def _tidy(self) -> Operation[None]:
        """Drop expired bans from the index and write the counts down."""
        try:
            yield Once([abuse_tidy([self._keys.bans]), *self._stats.flush(self._server.now_ms())])
        except RedisRefused as refused:
            # A server that is full, or that has something else in the place of a count, refuses to count.
            if not refused.replies or isinstance(refused.replies[0], Exception):
                raise

    # Judging

    def _judge(self, entries: Sequence[Entry]) -> Operation[None]:
        samples = [sample for entry in entries for sample in samples_of(self._rules, entry)]
        samples = yield from self._passing(samples)
        replies = yield from _in_parts(list(map(self._counting, _groups(samples))))
        found = findings(samples, [Tally.read(one) for reply in replies for one in reply])
        if not found:
            return
        patterns = [pattern_of(finding, self._action(finding)) for finding in found]
        commands = [self._judging(*pair) for pair in zip(found, patterns, strict=True)]
        verdicts = yield from _in_parts(commands, apart=True)
        banned = [
            pattern.subject
            for pattern, (_, *outcome) in zip(patterns, verdicts, strict=True)
            if outcome and outcome[0] == b"ban" and not pattern.shadow
        ]
        yield from self._spread(banned)
        for pattern, (verdict, *outcome) in zip(patterns, verdicts, strict=True):
            if verdict == b"known":
                continue
            action, level, ban_ms = outcome
            if action == b"ban" and ban_ms:
                self._bans.learn(self._keys.ban(pattern.subject), self._now_ms + ban_ms)
            if verdict == b"late":
                self._tell_ban(pattern, ban_ms)
            else:
                self._tell(pattern.judged(action.decode(), level, ban_ms), verdict == b"new")

    def _spread(self, subjects: Sequence[str]) -> Operation[None]:
        """Let bans hold in the shards of a cluster. One that is away gets them later: see AbuseBody.scan."""
        try:
            yield from spread_bans(self._keys, list(dict.fromkeys(subjects)))
        except RedisUnavailable as error:
            log.warning("bans do not hold in each shard yet: %s", error)

    def _passing(self, samples: Sequence[Sample]) -> Operation[list[Sample]]:
        """Return the samples without those of an address below its own threshold: see Rule.each."""
        asked = [sample for sample in samples if sample.needs > 1]
        if not asked:
            return list(samples)
        own = [sample.own for sample in asked]
        replies = yield from _in_parts(list(map(self._counting, _groups(own))))
        counts = [int(one[0]) for reply in replies for one in reply]
        few = {
            id(sample)
            for sample, count in zip(asked, counts, strict=True)
            if max(count, sample.entry.event.n) < sample.needs
        }
        return [sample for sample in samples if id(sample) not in few]

    def _counting(self, samples: Sequence[Sample]) -> Command:
        """Return one script call that counts all samples."""
        rules = list({_name_of(sample.rule): sample.rule for sample in samples}.values())
        places = {_name_of(rule): place for place, rule in enumerate(rules, 1)}
        words: list[bytes | int] = [word for rule in rules for word in _words(rule)]
        for rule, _, member, entry in samples:
            words += (places[_name_of(rule)], member, entry.ms)
        counts = [self._keys.abuse_count(one.rule.name, one.group) for one in samples]
        keys = [self._keys.abuse_groups, *counts]
        return abuse_count(keys, GROUPS_LIMIT, len(rules), *words)

    def _action(self, finding: Finding) -> str:
        """Return what to do: the rule's action, except for clients that are never banned."""
        rule, subject = finding.sample.rule, finding.sample.group
        return "exempt" if rule.action == "ban" and self._exempt.why(subject) else rule.action

    def _judging(self, finding: Finding, pattern: Pattern) -> Command:
        rule, entry = finding.sample.rule, finding.sample.entry
        window, fields = rule.window * 1000, pattern.fields()
        keys = [self._keys.abuse_seen(rule.name, finding.sample.claim), self._keys.abuse_log]
        about = (entry.id, entry.ms, window, window + EVENT_LIFE_MS, PATTERNS_KEPT, pattern.action)
        bans = pattern.action == "ban" and not rule.shadow
        more, how = self._banning(rule, pattern.subject) if bans else ([], ())
        return abuse_judge([*keys, *more], *about, len(fields), *fields, *how)

    def _banning(self, rule: Rule, subject: str) -> tuple[list[bytes], Sequence[str | int]]:
        """Return the further arguments with which the script bans."""
        keys = self._keys
        own = [keys.ban(subject), keys.ban_level(subject), keys.ban_lifted(subject)]
        jitter = f"{random.uniform(0, JITTER):.4f}"
        times = (rule.ban * 1000, LONGEST_BAN_MS, jitter, self._settings.ban_cap)
        how = (subject, rule.name, *times, LEVEL_KEPT_MS, PEACE_MS)
        return [*own, keys.bans, keys.ban_times], how

    def _tell(self, pattern: Pattern, is_new: bool) -> None:
        """Log one line that no client text can break. A worker that died may have logged it before."""
        log.warning("abuse.pattern %s", pattern.line())
        if is_new:
            self._done["patterns"] += 1
            self._stats.counts["abuse_patterns"] += 1
            self._count(pattern, "patterns")
            if pattern.shadow:
                self._count(pattern, "shadow")
        if is_new and pattern.action == "ban" and not pattern.shadow:
            self._done["bans"] += 1
            self._stats.counts["bans"] += 1
            self._count(pattern, "bans")

    def _count(self, pattern: Pattern, what: str) -> None:
        """Add one to the rule's count."""
        self._stats.counts[self._stats.counted_as(RULE, what, pattern.rule)] += 1

    def _tell_ban(self, pattern: Pattern, ban_ms: int) -> None:
        """Log a ban for a pattern that was logged before, while the cap was full or another ban in force."""
        seconds = ban_ms / 1000
        log.warning(
            "%s is banned for %g s: it goes on with %s", pattern.subject, seconds, pattern.rule
        )
        self._done["bans"] += 1
        self._stats.counts["bans"] += 1
        self._count(pattern, "bans")


def _acknowledging(stream: Stream, names: Iterable[bytes]) -> Command:
    return (b"XACK", stream.key, GROUP, *names)


def _reason_in(replies: Sequence[Any]) -> str:
    """Return the reason of the first error among the replies; empty if there is none."""
    return refusal(replies).reason if any(isinstance(r, Exception) for r in replies) else ""


def _name_of(rule: Rule) -> tuple[str, int]:
    """Return the counter's name. A rule with another threshold counts single addresses: see Sample.own."""
    return rule.name, rule.threshold


def _words(rule: Rule) -> Sequence[int]:
    """Return a rule as the arguments of lua/abuse_count.lua."""
    window = rule.kept if rule.consecutive else rule.window
    times = (window * 1000, rule.kept * 1000 + LATE_MS)
    return (*times, rule.most, int(rule.consecutive), rule.threshold, rule.window * 1000)


def _groups(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """Split the samples into one group for each script call, which may look at a bounded number of members."""
    some: list[Sample] = []
    members = 0
    for sample in samples:
        members += sample.rule.most
        if some and (members > MEMBERS_AT_ONCE or len(some) == AT_ONCE):
            yield some
            some, members = [], sample.rule.most
        some.append(sample)
    if some:
        yield some


def _in_parts(commands: Sequence[Command], *, apart: bool = False) -> Operation[list[Any]]:
    """Return the replies to all batches. With `apart` no batch is sent again because another one has to be."""
    replies: list[Any] = []
    for start in range(0, len(commands), PART):
        part = commands[start : start + PART]
        replies += yield Once.apart(part) if apart else list(part)
        yield Pause(0)
    return replies
