"""Changes that depend on what is there: add, incr, touch. Each compares before it sets, in one script.

Whether an entry lives is decided here, as it is for every reader; the script only makes sure that it is still the
same one. So a change that an invalidation overtakes has found nothing, and brings nothing back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from stillroom.cache.core import STORED_VALUE, Core
from stillroom.cache.entry import Entry
from stillroom.cache.keeping import Life
from stillroom.cache.loads import LATE, STORED
from stillroom.cache.marks import read_clock
from stillroom.cache.outbox import KEY
from stillroom.codec import MISS
from stillroom.durations import Duration
from stillroom.errors import InvalidArgument, RedisUnavailable, in_code
from stillroom.keys import sanitized, written
from stillroom.operation import Backoff, Operation, Timed
from stillroom.scripts import add, replace
from stillroom.wire import IN_TIME, Command

TRIES = 100  # each lost one means that somebody else's change was made
PAUSE_S = 0.001  # grows with each
HEAD_LIMIT = 512  # bytes of foreign content that are compared


class Seen(NamedTuple):
    """Hold the content of a key: how it begins, what follows, and the living entry, if it is one."""

    head: bytes
    rest: bytes
    entry: Entry | None
    seq: int = 0  # the seq of the clock that was read with it


class Changes(Core):
    """The operations that change a value only if it is there, or only if it is not."""

    def add(
        self,
        key: str,
        value: Any,
        *,
        ttl: Duration | None = None,
        swr: Duration | None = None,
        tags: Sequence[str] = (),
        type: Any = Any,
    ) -> Operation[bool]:
        """Store a value if the key has none. Return True if it is stored. Of several callers at once one wins.

        The options are those of `set`. Raises ValueTooLarge, Unencodable, InvalidKey, InvalidArgument.
        Redis away, full or read-only: False.
        """
        name = sanitized(key)
        self.loaders.refuse_unfilled(key)
        packed = self._pack(
            *(name, value, type, self._given_tags(tags), b""), self._keeper.life(ttl, swr)
        )
        keys = self._writing_keys(name, packed)
        self.away.forget([KEY + name])
        try:
            yield from self._before_writing()
            for turn in range(TRIES):
                seen = yield from self._see(name)
                if seen.entry is not None:
                    return False
                if self._judges.is_unverified:
                    yield from self._judges.verify()
                epoch, life = self.terms.new_epoch(), packed.life
                given = (epoch, IN_TIME, name, packed.rest, life.ttl, life.whole, seen.head)
                (reply,) = yield from self._memo.changing(
                    Timed([add(keys, *given)]), [name], STORED_VALUE
                )
                # Where this very call met another run of the server, nobody knows whether its epoch goes on.
                if reply == STORED and not self._judges.is_unverified:
                    return True
                if reply == LATE:
                    self.clock.doubt_clock()
                yield Backoff(turn * PAUSE_S * random.random())
        except RedisUnavailable as error:
            self._fall_back("add", error)
        return False

    def incr(self, key: str, by: float = 1) -> Operation[float | None]:
        """Add to the number under `key`, and return the sum, or None if there is no value. Its end and tags stay.

        Of several calls at the same time none is lost; one whose time is up before its turn raises
        RedisUnavailable. Raises InvalidArgument if `by` or the value is not a number, or the sum is too large for a
        float; Unencodable for an int of more digits than JSON readers take. Redis away: RedisUnavailable; whether
        it was added is unknown then.
        """
        name = sanitized(key)
        self.loaders.refuse_unfilled(key)
        is_number = isinstance(by, int | float) and not isinstance(by, bool)
        if not is_number or not (isinstance(by, int) or math.isfinite(by)):
            raise InvalidArgument(f"by={in_code(by):.100}: a number, an int or a finite float")
        self.away.forget([KEY + name])
        for turn in range(TRIES):
            seen = yield from self._see(name)
            number = MISS if seen.entry is None else self._decode(seen.entry, Any)
            if seen.entry is None or number is MISS:
                return None
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise InvalidArgument(
                    f"{key!r} holds a {type(number).__name__}, which can't be added to"
                )
            tags = [*map(written, seen.entry.tags)]
            total = _sum(key, number, by)
            encoded = self._codec.encoded(total)
            packed = self._packed(name, encoded, tags, seen.entry.source, Life(0, 0))
            adds = self._replace(name, seen, packed.rest, "", "", is_new=True)
            (replaced,) = yield from self._memo.changing(Timed([adds]), [name], STORED_VALUE)
            if replaced == STORED:
                return total
            if replaced == LATE:
                self.clock.doubt_clock()
            yield Backoff(turn * PAUSE_S * random.random())
        raise RedisUnavailable("contended", f"other writers were first {TRIES} times")

    def touch(
        self, key: str, *, ttl: Duration | None = None, swr: Duration | None = None
    ) -> Operation[bool]:
        """Let the value under `key` live for `ttl` and `swr` from now on. Return False if there is no value.

        Seconds or a timedelta, by default the settings'. What was invalidated stays so. Redis away: False.
        """
        name = sanitized(key)
        self.loaders.refuse_unfilled(key)
        life = self._keeper.jittered(self._keeper.life(ttl, swr))
        try:
            for turn in range(TRIES):
                seen = yield from self._see(name)
                if seen.entry is None:
                    return False
                touches = self._replace(name, seen, seen.rest, str(life.ttl), str(life.whole))
                (replaced,) = yield from self._memo.changing(Timed([touches]), [name])
                if replaced == STORED:
                    return True
                if replaced == LATE:
                    self.clock.doubt_clock()
                yield Backoff(turn * PAUSE_S * random.random())
        except RedisUnavailable as error:
            self._fall_back("touch", error)
        return False

    def _see(self, name: bytes) -> Operation[Seen]:
        known = self._judges.marks.synced
        keys = self.keys.entry(name), self.keys.other(name)
        first, other, clock = yield from self._read((b"MGET", *keys, self.keys.clock), known)
        own = self._own(first, other, name, b"")
        entry, _ = yield from self._judge_own(own, clock, known)
        if entry is None and (own is None or not own.is_beside):
            entry, _ = yield from self._judge(other, name, clock, known, True)
        # Where none lives, how the first one begins decides whether it may be replaced.
        raw = other if entry is not None and entry.is_beside else first
        if raw is None:
            return Seen(b"", b"", None)
        fields = raw.split(b"\t", 4)
        if len(fields) < 5:
            return Seen(raw[:HEAD_LIMIT], b"", None)
        checksum = fields[4].partition(b"\t")[0]
        seq = read_clock(clock)[1] if entry is not None else 0
        return Seen(b"\t".join([*fields[:4], checksum]) + b"\t", fields[4], entry, seq)

    def _replace(
        self, name: bytes, seen: Seen, body: bytes, ttl: str, life: str, *, is_new: bool = False
    ) -> Command:
        """Replace the entry. `is_new` says that the value changed, so that a load under way loses to it."""
        entry = seen.entry
        assert entry is not None
        place = self.keys.other if entry.is_beside else self.keys.entry
        keys = [place(name), self.keys.lease(name), self.keys.clock, self.keys.marks]
        keys += [self.keys.near, self.keys.named]
        keys += map(self.keys.index, entry.tags)
        indexed = place(name).removeprefix(self.keys.entry_prefix)
        becomes = (entry.epoch, entry.stamp, indexed, body, ttl, life)
        given = IN_TIME, seen.seq, int(is_new), self.terms.new_epoch(), name
        return replace(keys, seen.head, *becomes, *given)


def _sum(key: str, number: float, by: float) -> float:
    """Return the sum. Raises InvalidArgument where it is too large for a float: Python makes an infinity of it, or
    raises OverflowError where one of both is an int of hundreds of digits.
    """
    try:
        total = number + by
        if isinstance(total, int) or math.isfinite(total) or not math.isfinite(number):
            return total
    except OverflowError:
        pass
    raise InvalidArgument(
        f"by: this {type(by).__name__} can't be added to the {type(number).__name__} under {key!r}; "
        "their sum would be a float, which is 1.8e308 at most"
    )
