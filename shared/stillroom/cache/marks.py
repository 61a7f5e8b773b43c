"""Remember the invalidations that this process knows of, and decide by one rule whether an entry is alive. Pure.

The rule: an entry remembers the clock as it was before its load began; **it is dead if a later mark
names it**. An invalidation adds one to the clock and leaves a mark: `t:<tag>` hard, `s:<tag>` soft, or
`p:<glob>`, which names every key the glob matches.

A process keeps the marks it has seen, complete from `floor` up to `synced`. So a read decides alone
while the clock it gets with its entry equals `clock`; behind it, one ZRANGE brings the marks since.
Loss is always a miss: another epoch, a stamp ahead of the clock, marks that do not reach the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from math import ceil, isfinite

from stillroom.cache.entry import Entry
from stillroom.cache.glob import compile_glob
from stillroom.keys import original

GLOBS_LIMIT = 2_000  # more than are ever kept in Redis (lua/mark.lua)
# Before an epoch: its score is the clock's seq; marks without it are not the whole story.
NEWEST = b"~"
NEWEST_GLOB = b"?"  # its score: the globs' own key without one as new has lost some
# Its score: an entry stamped before it is dead, and the marks from before it are gone.
TRIMMED = b"!"
DROPPED = b"*"  # its score: patterns up to it were dropped, when no entry was left that they name
ENTRIES_END = (
    b"ts!*"  # the beginnings of marks by which entries may no longer be alive, besides globs
)


class Verdict(Enum):
    """Tell what the marks say of an entry."""

    ALIVE = "alive"
    SOFT = "soft"  # softly invalidated: serve it stale
    DEAD = "dead"
    ASK = "ask"  # older than what this process remembers: ask Redis for its tags (ZMSCORE)


class Marks:
    """The marks of one epoch, as far as one process knows them.

    Readers take no lock: `learn` only ever adds, and moves `turn` and `clock` last. What would take something
    away (a new epoch, a prune) makes a new Marks, so that a reader decides by one consistent table.
    """

    __slots__ = (
        "asked",
        "clock",
        "dead_below",
        "dropped",
        "epoch",
        "floor",
        "globs",
        "hard",
        "newest_glob",
        "soft",
        "synced",
        "turn",
    )

    def __init__(self, epoch: bytes = b"", *, dead_below: int = 0, floor: int = 0) -> None:
        self.epoch = epoch
        self.clock = b""  # the clock up to which the marks are complete, as Redis spells it
        self.synced = 0  # the same, as a number
        self.dead_below = dead_below  # stamps before it are dead: their marks were lost or trimmed
        self.floor = floor  # stamps before it: not all their marks are here
        # Another object whenever there is a mark by which an entry may no longer be alive. Changed keys leave none.
        self.turn = object()
        self.hard: dict[bytes, int] = {}
        self.soft: dict[bytes, int] = {}
        self.globs: dict[bytes, tuple[int, Callable[[bytes], object]]] = {}
        self.newest_glob = 0
        # Up to it patterns may have come and gone that this process has not seen.
        self.dropped = floor
        self.asked: set[bytes] = set()  # tags whose marks from before the floor are known too

    def verdict(self, entry: Entry) -> Verdict:
        """Apply the rule to an entry that was read together with a clock equal to `self.clock`."""
        stamp = entry.stamp
        if entry.epoch != self.epoch or stamp < self.dead_below or stamp > self.synced:
            return Verdict.DEAD
        if stamp == self.synced:  # nothing was invalidated since it was loaded
            return Verdict.ALIVE
        if self.newest_glob > stamp and self._is_named_by_glob(entry.key, stamp):
            return Verdict.DEAD
        if stamp < self.floor and not self.asked.issuperset(entry.tags):
            return Verdict.ASK
        soft = False
        for tag in entry.tags:
            if self.hard.get(tag, 0) > stamp:
                return Verdict.DEAD
            soft = soft or self.soft.get(tag, 0) > stamp
        return Verdict.SOFT if soft else Verdict.ALIVE

    def _is_named_by_glob(self, key: bytes, stamp: int) -> bool:
        written = original(key)
        return any(seq > stamp and matches(written) for seq, matches in list(self.globs.values()))

    def learn_glob(self, glob: bytes, seq: int) -> None:
        known, _ = self.globs.get(glob, (0, None))
        if seq > known:
            self.globs[glob] = seq, compile_glob(glob)
            self.newest_glob = max(seq, self.newest_glob)
            self.turn = object()

    def learn(self, rows: Sequence[bytes], epoch: bytes) -> None:
        """Take in marks: a flat list of member, score, newest first.

        Another thread may have learned newer ones meanwhile: `synced` never goes back. It did once, and a reader
        between its two looks at it took an entry for untouched that the newer marks had killed.
        """
        newest, is_turn = self.synced, False
        for member, seq in zip(rows[::2], seqs_of(rows[1::2]), strict=True):
            is_turn = is_turn or member[:1] in ENTRIES_END
            kind, _, tag = member.partition(b":")
            if kind == b"t":
                self.hard[tag] = max(seq, self.hard.get(tag, 0))
            elif kind == b"s":
                self.soft[tag] = max(seq, self.soft.get(tag, 0))
            elif kind == b"p":
                self.learn_glob(tag, seq)
            elif member == NEWEST + epoch:
                newest = max(seq, newest)
            elif member == TRIMMED:
                self.dead_below = max(seq, self.dead_below)
            elif member == DROPPED:
                self.dropped = max(seq, self.dropped)
        if is_turn:
            self.turn = object()
        if newest > self.synced:
            self.synced = newest
            self.clock = b"%b.%d" % (epoch, newest)

    def answer(self, tags: Sequence[bytes], scores: Sequence[bytes | None], synced: int) -> bool:
        """Take in what `question(tags)` asked for, when `synced` was this: the marks from before the floor.

        False if these marks are not those the clock was read with: they were lost, or another epoch began.
        """
        trimmed, newest, *pairs = seqs_of(scores)
        if newest < synced:
            return False
        for tag, hard, soft in zip(tags, pairs[::2], pairs[1::2], strict=True):
            if hard:
                self.hard[tag] = max(hard, self.hard.get(tag, 0))
            if soft:
                self.soft[tag] = max(soft, self.soft.get(tag, 0))
        self.dead_below = max(trimmed, self.dead_below)
        self.asked.update(tags)
        self.turn = object()
        return True

    def pruned(self, limit: int) -> Marks:
        """Return these marks, or a younger copy that remembers half as many marks and asks for the rest.

        A tag that was asked for stays known as long as its marks are remembered, or it has none.
        """
        if len(self.globs) > GLOBS_LIMIT:
            return Marks()  # most of them are long gone in Redis: begin anew
        crowded = len(self.hard) + len(self.soft) > limit
        if not crowded and len(self.asked) <= limit:
            return self
        seqs = sorted([*self.hard.values(), *self.soft.values()])
        floor = seqs[len(seqs) // 2] if crowded else 0
        young = Marks(self.epoch, dead_below=self.dead_below, floor=max(floor, self.floor))
        young.hard = {tag: seq for tag, seq in self.hard.items() if seq > floor}
        young.soft = {tag: seq for tag, seq in self.soft.items() if seq > floor}
        if len(self.asked) <= limit:
            young.asked = self.asked - (self.hard.keys() - young.hard.keys())
            young.asked -= self.soft.keys() - young.soft.keys()
        young.globs, young.newest_glob, young.dropped = self.globs, self.newest_glob, self.dropped
        young.synced, young.clock = self.synced, self.clock
        return young


def extended(
    marks: Marks,
    rows: Sequence[bytes],
    globs: Sequence[bytes],
    clock: bytes,
    limit: int,
    newest_glob: int = 0,
) -> Marks:
    """Return `marks` with the rows since `marks.synced`, complete up to `clock` and beyond.

    Where the rows do not reach the clock, marks were lost (evicted, flushed, a failover): then everything
    loaded before this clock is dead. Where there are `limit` rows, which only a beginning may have, older ones were
    left behind: a tag can be asked for later, a glob can't, so `globs` (a flat list of glob, score) brings all of
    them with the first rows.
    """
    epoch, seq = read_clock(clock)
    seqs = zip(rows[::2], seqs_of(rows[1::2]), strict=True)
    newest = {member: number for member, number in seqs if member[:1] == NEWEST}
    reached = newest.get(NEWEST + epoch, marks.synced)
    if reached < seq and any(other >= seq for other in newest.values()):
        return Marks()  # another epoch has begun since the clock was read: all of this one is dead
    if reached < seq:
        lost = Marks(epoch, dead_below=seq)
        lost.synced, lost.clock = seq, clock
        return lost
    if len(rows) >= 2 * limit:
        marks = Marks(epoch, floor=seqs_of(rows[-1:])[0])
    for glob, named_at in zip(globs[::2], seqs_of(globs[1::2]), strict=True):
        marks.learn_glob(glob, named_at)
    if newest_glob > marks.newest_glob:  # some were lost: whatever they may have named is dead
        marks.dead_below = max(newest_glob, marks.dead_below)
        marks.turn = object()
    if rows:
        marks.learn(rows, epoch)
    return marks


def question(tags: Sequence[bytes], epoch: bytes) -> list[bytes]:
    """Return the members whose scores decide over entries with these tags that are older than the floor."""
    return [TRIMMED, NEWEST + epoch, *(prefix + tag for tag in tags for prefix in (b"t:", b"s:"))]


def seqs_of(scores: Sequence[bytes | None]) -> list[int]:
    """Return the numbers in scores; 0, which kills nothing, where there is no mark.

    A score that no clock has given, because another program wrote it, counts as the next number, and an infinity
    as no mark: each read of each process meets it.
    """
    try:
        return [int(score) if score else 0 for score in scores]
    except ValueError:
        return [_rounded(float(score)) if score else 0 for score in scores]


def _rounded(score: float) -> int:
    return ceil(score) if isfinite(score) else 0


def read_clock(raw: bytes) -> tuple[bytes, int]:
    """Return (epoch, seq) from `<epoch>.<seq>`. Raises ValueError for anything else."""
    epoch, _, seq = raw.partition(b".")
    return epoch, int(seq)
