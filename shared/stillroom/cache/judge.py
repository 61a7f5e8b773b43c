"""Decides over entries, and keeps what it takes to decide: this process' marks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from stillroom.cache.entry import Entry, Freshness
from stillroom.cache.marks import (
    NEWEST,
    NEWEST_GLOB,
    Marks,
    Verdict,
    extended,
    question,
    read_clock,
    seqs_of,
)
from stillroom.keys import Keys
from stillroom.operation import Operation
from stillroom.wire import Clock, Command, reset_after_fork

# Marks ride along with a read where the clock moves more often than once in so many reads. Without news they cost a
# read a tenth of its steps; the second round trip that they save costs more than the read itself.
READS_A_MOVE = 8
# As many marks as a process asks for at once: 43 kB and 2 ms of its CPU, however fast others invalidate. Twenty
# thousand kept Redis busy for 10 ms, once for each process of a deploy. One that is further behind begins anew with
# the newest. About older entries it asks by tag, once for each tag that it meets.
MARKS_AT_ONCE = 1_000

_ALIVE, _FRESH, _STALE = Verdict.ALIVE, Freshness.FRESH, Freshness.STALE
_GRADES = {Verdict.SOFT: Freshness.STALE, Verdict.DEAD: Freshness.DEAD, Verdict.ASK: None}


class Judge:
    """Freshness of entries, by the rule in marks.py. One per room, shared by its threads.

    It trusts what it knows on one run of the server. On another one it first has the epoch verified (`verifying`
    makes that command from how far the clock had got): see lua/verify_epoch.lua.
    """

    def __init__(
        self,
        keys: Keys,
        clock: Clock,
        limit: int,
        verifying: Callable[[int], Operation[Command]],
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._now_ms = clock.now_ms
        self._limit = limit
        self._most = min(MARKS_AT_ONCE, limit)
        self._verifying = verifying
        # What this process knows of invalidations. Read `marks.synced` before asking for the clock.
        self.marks = Marks()
        self._run: bytes | None = None  # the server's, on which the epoch was verified
        # How many reads there were since the clock was last seen to move, not exactly, for it takes no lock, and
        # only until there were enough; and up to which of them marks ride along.
        self._reads, self._riding = READS_A_MOVE + 1, 0
        self.counts = True  # whether the next read is to be counted
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Make a lock that no other thread holds. The marks stay: what they lack was not yet counted as known.

        A signal handler may read the cache while its own thread holds the lock.
        """
        self._lock = threading.RLock()

    @property
    def run(self) -> bytes | None:
        """Return the run of the server on which the epoch was verified, or None if it never was."""
        return self._run

    @property
    def is_unverified(self) -> bool:
        """Return whether the server that answers is known to be in another run than when the epoch was verified."""
        return bool(self._clock.run) and self._run != self._clock.run

    def verify(self) -> Operation[None]:
        """Have the epoch verified, and learn its marks."""
        yield from self._verified(self.marks)

    def rides(self) -> bool:
        """Count a read. Return whether the clock moves so often that the read should ask for the marks, too."""
        self._reads += 1
        return self._reads <= self._riding

    def goes_alone(self) -> bool:
        """Count a read that no marks ride along with. If they should, return False and do not count it."""
        if self._reads < self._riding:
            return False
        self._reads += 1
        self.counts = self._reads <= READS_A_MOVE
        return True

    def _moved(self) -> None:
        """Note that the clock has moved since it was last seen."""
        self._riding = READS_A_MOVE if self._reads <= READS_A_MOVE else 0
        self._reads = 0
        self.counts = True

    def marks_since(self, synced: int) -> Command:
        """Return the command that brings the newer marks, the newest first."""
        newest_first = (b"BYSCORE", b"REV", b"LIMIT", b"0", b"%d" % self._most, b"WITHSCORES")
        return (b"ZRANGE", self._keys.marks, b"+inf", b"(%d" % synced, *newest_first)

    def at_once(self, entry: Entry, clock: bytes | None) -> Freshness | None:
        """Return what a reader may do with an entry that was read together with `clock`.

        None if that takes another question to Redis: the clock has moved, the entry is very old, or another run of
        the server has answered.
        """
        marks = self.marks
        if marks.clock != clock or self._run != self._clock.run:
            return None
        verdict = marks.verdict(entry)
        if verdict is _ALIVE:  # as _graded: this is run on every hit
            return _FRESH if self._now_ms() < entry.fresh_until else _STALE
        return _GRADES[verdict]

    def turn_at(self, clock: bytes | None) -> object:
        """Return the turn of the marks, where they are known up to this clock that was read; None else.

        What was alive at a turn is alive where it is read again at the same.
        """
        marks = self.marks
        if marks.clock != clock or self._run != self._clock.run:
            return None
        return marks.turn  # behind the clock: marks that are learned meanwhile move the turn first

    def settle(
        self, entries: Sequence[Entry], clock: bytes | None, known: int
    ) -> Operation[list[Freshness]]:
        """Judge entries that were read together, and ask Redis what is not known: two round trips at the most.

        `known` is `marks.synced` as it was before entries and clock were read.
        """
        marks = yield from self.caught_up(clock, known)
        verdicts = [marks.verdict(entry) for entry in entries]
        if Verdict.ASK in verdicts:
            asked = zip(entries, verdicts, strict=True)
            tags = list(
                {tag for entry, verdict in asked if verdict is Verdict.ASK for tag in entry.tags}
            )
            synced = marks.synced
            (scores,) = yield [(b"ZMSCORE", self._keys.marks, *question(tags, marks.epoch))]
            with self._lock:
                if not marks.answer(tags, scores, synced):
                    marks = Marks()
                elif marks is self.marks:
                    self.marks = marks.pruned(self._limit)
            verdicts = [marks.verdict(entry) for entry in entries]
        now = self._now_ms()
        graded = zip(entries, verdicts, strict=True)
        return [_graded(entry, verdict, now) or Freshness.DEAD for entry, verdict in graded]

    def caught_up(self, clock: bytes | None, known: int) -> Operation[Marks]:
        """Return the marks up to a clock that was read, those of no epoch where they are lost. See settle."""
        marks = self.marks
        if marks.clock == clock and self._run == self._clock.run:
            return marks
        return (yield from self._catch_up(clock, known))

    def _catch_up(self, clock: bytes | None, known: int) -> Operation[Marks]:
        try:
            clock = clock or b""
            epoch, seq = read_clock(clock)
        except ValueError:  # no clock, or not one of ours: nothing that was stored can be trusted
            return Marks()
        marks = self.marks
        if self._run != self._clock.run or (marks.epoch == epoch and seq < known):
            return (yield from self._verified(marks))
        if marks.epoch != epoch:
            return (yield from self._from_the_beginning(clock, []))
        since = marks.synced
        if seq <= since:
            return marks  # another thread has caught up, or further, in the meantime
        (rows,) = yield [self.marks_since(since)]
        if not self._are_cut(rows):
            return self.learn(since, rows, (), clock) or Marks()
        newest_glob, globs = yield self._all_globs()
        return self.learn(0, rows, globs, clock, *seqs_of([newest_glob])) or Marks()

    def _verified(self, marks: Marks) -> Operation[Marks]:
        """Return all marks once the epoch is verified, after another run answered or the clock went back.

        Entries that were read before are judged by these marks.
        """
        run = self._clock.run
        verify = yield from self._verifying(marks.synced)
        learned = yield from self._from_the_beginning(None, [verify])
        self._run = run
        return learned

    def _from_the_beginning(self, clock: bytes | None, verify: list[Command]) -> Operation[Marks]:
        """Return all marks up to a clock that was read, or up to the clock in the reply to `verify`."""
        # In this order: a new epoch or a pattern that comes in between is among the marks.
        *verified, newest_glob, globs, rows = yield [
            *verify,
            *self._all_globs(),
            self.marks_since(0),
        ]
        upto = verified[0] if verified else clock
        return self.learn(0, rows, globs, upto, *seqs_of([newest_glob])) or Marks()

    def _all_globs(self) -> list[Command]:
        """Return the commands that tell how new the newest glob is, and bring all of them.

        In this order: no glob is taken for lost that comes in between.
        """
        return [
            (b"ZSCORE", self._keys.marks, NEWEST_GLOB),
            (b"ZRANGE", self._keys.globs, b"0", b"-1", b"WITHSCORES"),
        ]

    def _are_cut(self, rows: Sequence[bytes]) -> bool:
        """Return whether these are as many marks as are asked for at once, so that there may be more."""
        return len(rows) >= 2 * self._most

    def is_behind(self, clock: bytes | None) -> bool:
        """Return whether there may be marks up to this clock that are not known."""
        marks = self.marks
        if marks.clock == clock:
            return False
        try:
            epoch, seq = read_clock(clock or b"")
        except ValueError:
            return True
        return epoch != marks.epoch or seq > marks.synced

    def learn_own(self, before: bytes, after: bytes, members: Sequence[bytes]) -> None:
        """Take in the marks that this process has left, where what is known goes up to the clock before them.

        No read had to find out that the clock had moved.
        """
        with self._lock:
            marks = self.marks
            if not before or marks.clock != before or self._run != self._clock.run:
                return
            epoch, seq = read_clock(after)
            if epoch == marks.epoch:
                score = b"%d" % seq
                rows = [NEWEST + epoch, score]
                for member in members:
                    rows += member, score
                marks.learn(rows, epoch)
                self.marks = marks.pruned(self._limit)

    def learn(
        self,
        since: int,
        rows: Sequence[bytes],
        globs: Sequence[bytes],
        clock: bytes | None,
        newest_glob: int = 0,
    ) -> Marks | None:
        """Take in the marks after `since`, the newest of all if that is 0.

        None if they do not continue what this process knows by now, or are not all.
        """
        try:
            clock = clock or b""
            epoch, _ = read_clock(clock)
        except ValueError:
            return None
        with self._lock:
            before = self.marks.clock
            marks = self.marks if since else Marks(epoch)
            if marks.epoch != epoch or marks.synced < since or (since and self._are_cut(rows)):
                return None
            grown = extended(marks, rows, globs, clock, self._most, newest_glob)
            if grown.epoch == self.marks.epoch and grown.synced < self.marks.synced:
                return self.marks  # all marks that were asked for earlier arrive behind newer ones
            if grown.clock != before:
                self._moved()
            self.marks = grown.pruned(self._limit)
            return self.marks


def _graded(entry: Entry, verdict: Verdict, now_ms: int) -> Freshness | None:
    if verdict is Verdict.ALIVE:
        return Freshness.FRESH if now_ms < entry.fresh_until else Freshness.STALE
    return _GRADES[verdict]
