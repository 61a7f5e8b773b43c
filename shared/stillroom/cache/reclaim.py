"""Finish the work that an invalidation leaves: free memory, and load softly invalidated entries again.

An invalidation is true when it returns; what it killed still takes up memory. It left a line in `todo`
(lua/lib/todo.lua). Here that is worked off: in bites, under a time budget, resumable, by any number of workers.
Nothing here decides what a reader sees, and nothing alive is deleted: scripts look at each entry as it is. What
apps ordered is another list: ordering.py.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from pydantic import BaseModel, ValidationError

from stillroom.cache.body import CacheBody
from stillroom.cache.core import Stale
from stillroom.cache.entry import Entry, parse_head
from stillroom.cache.marks import TRIMMED, Marks, Verdict, question, read_clock, seqs_of
from stillroom.cache.orders import OF_0_1
from stillroom.cache.terms import LEASE_LIMIT, LIFE_LIMIT
from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.keys import OTHER, glob_literal, quoted
from stillroom.operation import Once, Operation, Pause
from stillroom.pauses import PUT_OFF_MS, Pauses, are_paused
from stillroom.scripts import (
    drop_globs,
    finish_todo,
    forget,
    reclaim_tag,
    take_todo,
    trim_index,
    trim_marks,
)
from stillroom.shown import repr_of
from stillroom.wire import Command, micros, run_of

# Three times the length of a run: then the work of a worker that died is due again.
HELD_MS = 60_000
SAVE_EVERY_S = 0.5
KEPT_S = b"600"  # for how long one can see how far a piece of work has got
HEAD_BYTES = 1_024  # fetched of an entry to read its header; more where that was not all of it
HEAD_LIMIT = 64 * 1_024
ON = b"+"  # in front of work that has begun: go on with it
SWEEP, TAG, SOFT = b"sweep", b"t:", b"s:"
HOTTEST = 200  # refreshed in one pass over an index; the next pass finds the next ones
TRIM_BITE = 2_000  # marks dropped by one script call: 2 ms of the server
BYTES = "latin-1"  # any bytes as text: a cursor may name an entry
SCRIPT_KEYS = 1_000  # Lua's stack takes no more at once
TIME = (b"TIME",)
# A soft invalidation's entries whose loaders this worker does not know are left to another one, so often.
LEFT_LIMIT = 4
LOOKS = 3  # at a bite in which something dead could not be deleted


class Progress(BaseModel):
    """Record how far a piece of work has got."""

    seen: int = 0  # entries looked at
    deleted: int = 0
    refreshed: int = 0
    total: int | None = None  # entries to look at, where that is known
    done: bool = False
    again: bool = False  # asked for anew while it was under way
    cursor: str = "0"
    run: str = ""  # of the server: a scan's cursors mean nothing in its next run
    began_us: int = 0  # server time
    epoch: str = ""  # of the cache
    # Another server answered on the way, or something dead could not be deleted.
    is_broken: bool = False
    left: int = 0  # how often it was left to a worker that knows the loaders …
    is_left: bool = False  # … and whether it is now


Report: TypeAlias = Callable[[Progress], object]


class Work(NamedTuple):
    """A line of `todo` that is ours until `due`."""

    member: bytes
    due: bytes
    name: bytes
    progress: Progress


class Run:
    """One run's limits: until when, and how many entries it takes at once, fewer when Redis gets slow.

    Bites are what other clients wait behind. So they are measured by the server's clock, which leaves out the way
    there, and after each one Redis is left to the others.
    """

    SMALLEST, FIRST, LARGEST = 10, 20, 100
    GOOD_S, SLOW_S = 0.000_1, 0.000_2
    SHORTEST, LONGEST = 0.001, 0.05  # pauses, seconds: a sleep of less takes longer than it is to
    PAUSED = 0.1  # of a bite's time; other clients wait for the length of a bite, not for the number of bites

    def __init__(self, budget: float, report: Report | None) -> None:
        self.deadline = time.monotonic() + budget
        self.report = report
        self.bite = self.FIRST
        self.held = 0.0  # seconds for which the bite under way has held Redis so far
        self.owed = 0.0  # seconds of pauses that are too short to be slept
        self.saved = 0.0

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()

    def took(self, seconds: float) -> float:
        """Learn what the last bite took, with the way there. Return the pause after it, in seconds."""
        held, self.held = self.held, 0.0
        if held > self.SLOW_S:
            self.bite = max(self.SMALLEST, self.bite // 2)
        elif held < self.GOOD_S:
            self.bite = min(self.LARGEST, self.bite + self.bite // 4)
        self.owed += seconds * self.PAUSED
        if self.owed < self.SHORTEST:
            return 0.0
        pause, self.owed = min(self.owed, self.LONGEST), 0.0
        return pause

    def measure(self, replies: list[Any]) -> list[Any]:
        """Take the answers to TIME off both ends, and add for how long Redis was held in between."""
        began, *others, ended = replies
        self.held += max(0, micros(ended) - micros(began)) / 1_000_000
        return others

    def failed(self, error: RedisUnavailable) -> float:
        """Return the pause after a bite that was not answered in time. Raises what a smaller bite will not mend."""
        if error.reason != "timeout" or self.bite == self.SMALLEST:
            raise error
        self.bite, self.held = max(self.SMALLEST, self.bite // 4), 0.0
        return 0.5


class Hottest:
    """Pick the most-read entries among those that went stale by a tag, as the server sees it.

    A server that evicts by use counts it (OBJECT FREQ); any other knows how long ago it was (OBJECT IDLETIME).
    """

    def __init__(self, counted: bool, tag: bytes, seq: int, loaders: set[str]) -> None:
        self.measure = b"FREQ" if counted else b"IDLETIME"
        self._tag, self._seq, self._loaders = tag, seq, loaders
        self._heap: list[tuple[int, bytes, Stale]] = []
        self.unknown = 0  # entries of other loaders

    def offer(self, entry: Entry, degree: int) -> None:
        if entry.stamp >= self._seq or self._tag not in entry.tags or not entry.loader:
            return
        if entry.loader in self._loaders:
            heat = degree if self.measure == b"FREQ" else -degree
            push = heapq.heappush if len(self._heap) < HOTTEST else heapq.heappushpop
            push(self._heap, (heat, entry.key, Stale(entry.key, entry, entry.source)))
        else:
            self.unknown += 1

    def first(self) -> list[Stale]:
        """Return the stale values, the hottest first."""
        return [stale for _, _, stale in sorted(self._heap, key=lambda hot: -hot[0])]


class Reclaim:
    """The work behind the invalidations of a cache, or of one of its shards. A driver of it runs the operations."""

    def __init__(self, cache: CacheBody, pauses: Pauses) -> None:
        self._cache = cache
        self._pauses = pauses
        self._keys = cache.keys

    def clear_up(
        self,
        *,
        budget: float,
        progress: Report | None = None,
        loads: bool = True,
        orders: list[Work] | None = None,
    ) -> Operation[dict[str, int]]:
        """Do what is written down in `todo`. Return the counts that `reclaim` returns.

        `loads=False`: leave soft invalidations to a process that knows the app's loaders. `orders` gets the orders
        that 0.1 left here. They stay written down, and are due again later.
        """
        run = Run(budget, progress)
        counts = dict.fromkeys(("done", "seen", "deleted", "refreshed", "patterns_dropped"), 0)
        while run.left > 0 and (work := (yield from self._take())) is not None:
            if work.name.startswith(OF_0_1):
                if orders is not None:
                    orders.append(work)
                continue
            if work.name.startswith(SOFT) and not loads:
                yield self._finishing(work, work.member, PUT_OFF_MS)
                continue
            before = work.progress.model_copy()
            yield from self._do(work, run)
            counts["patterns_dropped"] += yield from self._hand_back(work)
            for count in ("done", "seen", "deleted", "refreshed"):
                counts[count] += getattr(work.progress, count) - getattr(before, count)
        left, (now_s, _) = yield [(b"ZCARD", self._keys.todo), (b"TIME",)]
        now_ms = now_s + b"999"
        (due,) = yield [(b"ZCOUNT", self._keys.todo, b"-inf", now_ms)]
        return {**counts, "left": left, "due": due}

    def pending(self, *members: bytes) -> Operation[dict[bytes, Progress | None]]:
        """See Housekeeping.pending."""
        if not members:
            return {}
        names = [name for member in members for name in (member, ON + member)]
        scores, states = yield [
            (b"ZMSCORE", self._keys.todo, *names),
            (b"MGET", *(self._keys.at(member) for member in members)),
        ]
        waiting = {
            name.removeprefix(ON) for name, score in zip(names, scores, strict=True) if score
        }
        return {
            member: _progress(state)
            for member, state in zip(members, states, strict=True)
            if member in waiting
        }

    def trim_marks(self) -> Operation[dict[str, int]]:
        """See Housekeeping.trim_marks."""
        terms = self._cache.terms
        longest = terms.longest(LIFE_LIMIT) + terms.longest(LEASE_LIMIT)
        keys = [self._keys.clock, self._keys.marks, self._keys.globs]
        dropped = 0
        while True:
            ((bite, left),) = yield [trim_marks(keys, int(longest * 1_000_000), TRIM_BITE)]
            dropped += bite
            if bite < TRIM_BITE:
                return {"dropped": dropped, "left": left}
            yield Pause(0)  # others first; and each bite has its own deadline

    def trim_indexes(self, *, budget: float) -> Operation[dict[str, int]]:
        """See Housekeeping.trim_indexes."""
        run, counts = Run(budget, None), {"indexes": 0, "members": 0}
        run_id, _ = yield from self._about_server()
        (at,) = yield [(b"GET", self._keys.trimmed)]
        known, _, cursor = (at or b"").partition(b" ")
        cursor = cursor if run_id and known == run_id.encode() else b"0"
        while run.left > 0:
            cursor, keys = yield from self._scan(cursor, self._keys.index_prefix, run)
            yield from self._trim_some(keys, run, counts)
            yield [(b"SET", self._keys.trimmed, run_id.encode() + b" " + cursor, b"EX", KEPT_S)]
            if cursor == b"0":
                break
        return counts

    # Taking work and handing it back

    def cross_off(self, works: Sequence[Work]) -> Operation[None]:
        """Cross off what is done elsewhere. What was written down again meanwhile stays."""
        yield [command for work in works for command in self._finishing(work, b"", 0)]

    def _take(self) -> Operation[Work | None]:
        longest = self._sweep_again_ms() + HELD_MS
        (taken,) = yield Once([take_todo([self._keys.todo], HELD_MS, longest)])
        if taken is None:
            return None
        member, due, now_us = taken
        name = member.removeprefix(ON)
        run_id, _ = yield from self._about_server()
        ((state, clock),) = yield [(b"MGET", self._keys.at(name), self._keys.clock)]
        epoch, known = _epoch_in(clock), _progress(state)
        if known is None or known.done or known.run != run_id:
            known = Progress(run=run_id, began_us=int(now_us), epoch=epoch)
        elif member == name:  # not handed back but asked for anew, or its worker died
            known.again = True
        return Work(member, due, name, known)

    def _do(self, work: Work, run: Run) -> Operation[None]:
        if work.name == SWEEP:
            yield from self._sweep(work, run)
        elif work.name.startswith(TAG):
            yield from self._reclaim_tag(work, run)
        elif work.name.startswith(SOFT):
            yield from self._refresh_tag(work, run)
        else:
            work.progress.done = True  # of no kind that is known here

    def _hand_back(self, work: Work) -> Operation[int]:
        """Cross the work off, or write down the rest of it. Return how many patterns need no mark any more."""
        state, dropped, again_ms = work.progress, 0, 0
        left = b"" if state.done else ON + work.name
        if left and work.name.startswith(SOFT):
            if (yield from are_paused(self._pauses)):
                again_ms = PUT_OFF_MS
            elif state.is_left:
                again_ms = PUT_OFF_MS * 2 ** (state.left - 1)
        if state.done and work.name == SWEEP:
            is_complete = yield from self._is_complete(state)
            dropped, is_left = (yield from self._drop_globs(state)) if is_complete else (0, True)
            if is_left:  # once more, when the longest lease has passed for the rest
                left, again_ms = SWEEP, self._sweep_again_ms()
        if state.done and state.again:
            left, again_ms = work.name, 0
        yield from self._save(work)
        yield self._finishing(work, left, again_ms)
        return dropped

    def _finishing(self, work: Work, left: bytes, again_ms: int) -> list[Command]:
        return [finish_todo([self._keys.todo], work.member, work.due, left, again_ms)]

    def _is_complete(self, state: Progress) -> Operation[bool]:
        """Return whether a sweep saw every entry, on one run of one server from its beginning to its end.

        Its slot may have moved meanwhile, or a replica taken over: SCAN has no key, and any server answers to
        another one's cursor. Where this user may not ask for the run, no sweep is known to be complete.
        """
        run_id, _ = yield from self._about_server()
        return not state.is_broken and run_id != "" and run_id == state.run

    def _sweep_again_ms(self) -> int:
        return int(self._cache.terms.longest(LEASE_LIMIT) * 1000) + 1

    def _drop_globs(self, state: Progress) -> Operation[tuple[int, bool]]:
        """Drop the swept patterns; return (patterns dropped, whether some are left)."""
        longest_us = int(self._cache.terms.longest(LEASE_LIMIT) * 1_000_000)
        keys = [self._keys.marks, self._keys.globs]
        ((dropped, newest),) = yield [drop_globs(keys, state.began_us, longest_us)]
        return dropped, newest is not None

    def _save(self, work: Work) -> Operation[None]:
        """Save the progress. A full server refuses this, and its dead entries have to be deleted all the same."""
        state = work.progress.model_dump_json(exclude_defaults=True).encode()
        yield from self._tolerant([(b"SET", self._keys.at(work.name), state, b"EX", KEPT_S)])

    # Walking

    def _walk(
        self,
        work: Work,
        run: Run,
        bite: Callable[[bytes, Run], Operation[tuple[bytes, int]]],
    ) -> Operation[None]:
        """Bite from the cursor on to the end or until the time is up."""
        state = work.progress
        while not state.done and run.left > 0:
            began = time.monotonic()
            try:
                cursor, seen = yield from bite(state.cursor.encode(BYTES), run)
            except RedisUnavailable as error:
                pause = run.failed(error)
            else:
                pause = run.took(time.monotonic() - began)
                state.cursor, state.seen = cursor.decode(BYTES), state.seen + seen
                state.done = cursor == b"0"
            yield Pause(pause)
            yield from self._tell(work, run)  # with a deadline of its own

    def _tell(self, work: Work, run: Run) -> Operation[None]:
        now = time.monotonic()
        if now - run.saved >= SAVE_EVERY_S:
            run.saved = now
            yield from self._save(work)
            if run.report:
                run.report(work.progress)

    def _scan_index(
        self, tag: bytes, cursor: bytes, run: Run
    ) -> Operation[tuple[bytes, list[bytes]]]:
        """Return the next cursor, and names in the index of a tag. Those that stay there are all seen by the end.

        A key that is no sorted set counts as an empty index.
        """
        try:
            ((cursor, rows),) = yield [
                (b"ZSCAN", self._keys.index(tag), cursor, b"COUNT", b"%d" % run.bite)
            ]
        except RedisRefused as refused:
            if refused.reason != "wrongtype":
                raise
            return b"0", []
        return cursor, rows[::2]

    def _scan(self, cursor: bytes, prefix: bytes, run: Run) -> Operation[tuple[bytes, list[bytes]]]:
        """Return the next cursor, and keys with this prefix."""
        pattern = glob_literal(prefix) + b"*"
        scan = (b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % run.bite)
        ((cursor, keys),) = yield [scan]
        return cursor, keys

    def _count_index(self, tag: bytes) -> Operation[int | None]:
        try:
            (count,) = yield [(b"ZCARD", self._keys.index(tag))]
        except RedisRefused:
            return None
        return int(count)

    # A tag

    def _reclaim_tag(self, work: Work, run: Run) -> Operation[None]:
        tag = work.name.removeprefix(TAG)
        state = work.progress
        if state.total is None:
            state.total = yield from self._count_index(tag)
        clock, scores = yield [
            (b"GET", self._keys.clock),
            (b"ZMSCORE", self._keys.marks, work.name, TRIMMED),
        ]
        epoch = (clock or b"").partition(b".")[0]
        mark = max(seqs_of(scores))
        yield from self._walk(work, run, partial(self._bite_tagged, tag, epoch, mark, state))

    def _bite_tagged(
        self, tag: bytes, epoch: bytes, mark: int, state: Progress, cursor: bytes, run: Run
    ) -> Operation[tuple[bytes, int]]:
        index, prefix = self._keys.index(tag), self._keys.entry_prefix
        script = reclaim_tag([index], tag, prefix, cursor, run.bite, epoch, mark)
        ((cursor, seen, deleted),) = yield from self._holding(run, [script])
        state.deleted += deleted
        return cursor, seen

    # Everything

    def _sweep(self, work: Work, run: Run) -> Operation[None]:
        marks = [Marks()]  # this sweep's marks; replaced when a new epoch begins
        yield from self._walk(work, run, partial(self._bite_dead, marks, work.progress))
        if work.progress.done and marks[0].epoch.decode(errors="replace") != work.progress.epoch:
            work.progress.again = True  # entries passed by before it are dead now

    def _bite_dead(
        self, marks: list[Marks], state: Progress, cursor: bytes, run: Run
    ) -> Operation[tuple[bytes, int]]:
        cursor, keys = yield from self._scan(cursor, self._keys.entry_prefix, run)
        for _ in range(LOOKS):
            if not (yield from self._delete_dead(marks, state, keys, run)):
                break
        else:
            state.is_broken = True
        if self._cache.clock.run.decode() != state.run:
            state.is_broken = True
        return cursor, len(keys)

    def _delete_dead(
        self, marks: list[Marks], state: Progress, keys: list[bytes], run: Run
    ) -> Operation[bool]:
        """Delete the dead entries: those of another epoch, and those that a pattern or a tag ended.

        Return whether to look once more: an entry was written over a dead one between the look and the deletion,
        and may be as dead (`touch` keeps the stamp).
        """
        heads, clock, globs = yield from self._heads(keys, run)
        try:
            epoch, seq = read_clock(clock or b"")
        except ValueError:
            return False  # the clock is lost: the next write begins an epoch and asks for a sweep
        known = marks[0] if marks[0].epoch == epoch else Marks(epoch)
        marks[0] = known
        known.synced = max(seq, known.synced)
        for glob, named_at in zip(globs[::2], seqs_of(globs[1::2]), strict=True):
            known.learn_glob(glob, named_at)
        tags = list({tag for _, entry in heads.values() for tag in entry.tags})
        (scores,) = yield [(b"ZMSCORE", self._keys.marks, *question(tags, epoch))]
        if not known.answer(tags, scores, 0):
            return False
        dead = {k: begins for k, (begins, e) in heads.items() if known.verdict(e) is Verdict.DEAD}
        left = len(dead)
        for start in range(0, len(dead), SCRIPT_KEYS):
            some = list(dead.items())[start : start + SCRIPT_KEYS]
            script = forget([key for key, _ in some], *(begins for _, begins in some))
            (deleted,) = yield from self._holding(run, [script])
            state.deleted += deleted
            left -= deleted
        return left > 0

    def _heads(
        self, keys: Sequence[bytes], run: Run
    ) -> Operation[tuple[dict[bytes, tuple[bytes, Entry]], bytes | None, list[bytes]]]:
        """Return (by key: how the entry begins, its header), the clock after that, and the globs."""
        last: list[Command] = [
            (b"GET", self._keys.clock),
            (b"ZRANGE", self._keys.globs, b"0", b"-1", b"WITHSCORES"),
        ]
        *raws, clock, globs = yield from self._tolerant([*map(_head, keys), *last], run)
        texts = [raw or b"" for raw in raws]
        cut = [n for n, t in enumerate(texts) if len(t) == HEAD_BYTES and b"\n" not in t]
        if cut:  # their headers go on. The clock is read after them, or they could be newer than it
            longer = [_head(keys[n], HEAD_LIMIT) for n in cut]
            *raws, clock, globs = yield from self._tolerant([*longer, *last], run)
            for n, raw in zip(cut, raws, strict=True):
                texts[n] = raw or b""
        heads = {}
        for key, text in zip(keys, texts, strict=True):
            name = key.removeprefix(self._keys.entry_prefix)
            if head := parse_head(text, name.removesuffix(OTHER)):
                begins, entry = head
                heads[key] = begins, entry._replace(is_beside=name.endswith(OTHER))
        return heads, clock, globs or []

    def _holding(self, run: Run, batch: Sequence[Command]) -> Operation[list[Any]]:
        """Return the replies, and let the run learn for how long the batch held Redis."""
        replies: list[Any] = yield [TIME, *batch, TIME]
        return run.measure(replies)

    def _tolerant(self, batch: Sequence[Command], run: Run | None = None) -> Operation[list[Any]]:
        """Return the replies, with None for a key of a type that we do not write."""
        if not batch:
            return []
        try:
            replies: list[Any] = yield batch if run is None else [TIME, *batch, TIME]
        except RedisRefused as refused:
            replies = refused.replies
            if not replies or (run is not None and isinstance(replies[0], Exception)):
                raise
        if run is not None:
            replies = run.measure(replies)
        return [None if isinstance(reply, Exception) else reply for reply in replies]

    # Soft invalidation

    def _refresh_tag(self, work: Work, run: Run) -> Operation[None]:
        """Load the entries that this tag made stale, the most read first, until a pass finds nothing to load.

        While refreshes are paused it is left to do. So it is where this worker lacks loaders: another one, of the
        release that is being deployed, may have them. After some tries the reads are to order the rest.
        """
        tag, state = work.name.removeprefix(SOFT), work.progress
        state.is_left = False
        if (yield from are_paused(self._pauses)):
            return
        _, policy = yield from self._about_server()
        scores = yield [(b"ZSCORE", self._keys.marks, work.name)]
        (mark,) = seqs_of(scores)
        hottest = Hottest("lfu" in policy, tag, mark, set(self._cache.loaders.names()))
        state.total = yield from self._count_index(tag)
        finding = Run(run.left / 2, run.report)
        yield from self._walk(work, finding, partial(self._bite_stale, hottest, tag))
        found_all, progressed = state.done, False
        state.done = False
        for stale in hottest.first():
            if run.left <= 0 or (yield from are_paused(self._pauses)):
                return
            progressed = (yield from self._refresh_one(stale, state)) or progressed
            yield from self._tell(work, run)
        is_over = found_all and not progressed
        state.is_left = is_over and hottest.unknown > 0 and state.left < LEFT_LIMIT
        state.left += state.is_left
        state.done = is_over and not state.is_left

    def _bite_stale(
        self, hottest: Hottest, tag: bytes, cursor: bytes, run: Run
    ) -> Operation[tuple[bytes, int]]:
        cursor, names = yield from self._scan_index(tag, cursor, run)
        keys = [self._keys.entry(name) for name in names]
        heads, _, _ = yield from self._heads(keys, run)
        asked = [(b"OBJECT", hottest.measure, key) for key in heads]
        degrees = yield from self._tolerant(asked, run)
        for (_, entry), degree in zip(heads.values(), degrees, strict=True):
            hottest.offer(entry, degree or 0)
        return cursor, len(names)

    def _refresh_one(self, stale: Stale, state: Progress) -> Operation[bool]:
        """Load a key unless another caller does, at `refresh_rate` a second at most.

        Return whether it is fresh now.
        """
        began = time.monotonic()
        (lease,) = yield from self._cache.lease_refreshes([stale])
        task = self._cache.order_of(stale, lease) if lease else None
        if task is None:
            return False
        try:
            refreshed = bool((yield from self._cache.refresh(task))["outcome"] == "refreshed")
        except RedisUnavailable:
            raise
        except Exception as error:
            self._cache.stats.say(
                "a refresh failed", task.loader, f"{quoted(stale.name)}: {repr_of(error)}"
            )
            refreshed = False
        state.refreshed += refreshed
        yield Pause(max(0.0, 1 / self._cache.settings.refresh_rate - (time.monotonic() - began)))
        return refreshed

    # Small things

    def _trim_some(
        self, keys: Sequence[bytes], run: Run, counts: dict[str, int]
    ) -> Operation[None]:
        began = time.monotonic()
        trims = [trim_index([key], SCRIPT_KEYS) for key in keys]
        replies = yield from self._tolerant(trims, run)
        counts["indexes"] += len(keys)
        counts["members"] += sum(reply or 0 for reply in replies)
        yield Pause(run.took(time.monotonic() - began))

    def _about_server(self) -> Operation[tuple[str, str]]:
        """Return (which run of the server this is, its eviction policy), empty where this user may not ask."""
        asked = [(b"INFO", section) for section in (b"server", b"replication", b"memory")]
        said = b"\n".join(reply or b"" for reply in (yield from self._tolerant(asked)))
        facts = dict(line.split(":", 1) for line in said.decode().splitlines() if ":" in line)
        return run_of(said, said).decode(), facts.get("maxmemory_policy", "")


def _head(key: bytes, size: int = HEAD_BYTES) -> Command:
    return (b"GETRANGE", key, b"0", b"%d" % (size - 1))


def _epoch_in(clock: bytes | None) -> str:
    """Return the epoch that a clock shows; empty where there is none, or another program wrote it."""
    try:
        return read_clock(clock or b"")[0].decode(errors="replace")
    except ValueError:
        return ""


def _progress(state: bytes | None) -> Progress | None:
    try:
        return Progress.model_validate_json(state) if state else None
    except ValidationError:
        return None
