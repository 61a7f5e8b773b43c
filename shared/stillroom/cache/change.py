"""Changes that depend on what is there: add, incr, touch. Each compares before it sets, in one script.

Whether an entry lives is decided here, as it is for every reader; the script only makes sure that it is still the
same one. So a change that an invalidation overtakes has found nothing, and brings nothing back.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple, Unpack

from stillroom.cache.body import LATE, STORED, CacheBody
from stillroom.cache.entry import Entry
from stillroom.cache.loaders import SetOptions, TimeOptions, several
from stillroom.cache.marks import read_clock
from stillroom.codec import MISS
from stillroom.errors import RedisUnavailable
from stillroom.keys import sanitized
from stillroom.operation import IN_TIME, Backoff, Operation, Timed
from stillroom.scripts import add, replace
from stillroom.wire import Command

TRIES = 100  # each lost one means that somebody else's change was made
PAUSE_S = 0.001  # grows with each
HEAD_LIMIT = 512  # bytes of foreign content that are compared


class Seen(NamedTuple):
    """What is under a key: how it begins, what follows, and the living entry, if it is one."""

    head: bytes
    rest: bytes
    entry: Entry | None
    seq: int = 0  # of the clock that was read with it


class ChangeBody(CacheBody):
    """CacheBody, and changes that depend on what is there."""

    def add(self, key: str, value: Any, **options: Unpack[SetOptions]) -> Operation[bool]:
        """Store a value if the key has none; True when it is stored. The options are those of SetOptions.

        Of several at once one wins. Raises ValueTooLarge, Unencodable, InvalidKey. Redis away, full or read-only:
        False.
        """
        name = sanitized(key)
        ttl, swr = self._times(options)
        tags = several(options.get("tags", ()))
        packed = self._pack(name, value, options.get("type", Any), tags, b"")
        keys = self._writing_keys(name, packed)
        try:
            yield from self._before_writing()
            for turn in range(TRIES):
                seen = yield from self._see(name)
                if seen.entry is not None:
                    return False
                epoch = self._new_epoch()
                given = (epoch, IN_TIME, name, packed.rest, ttl, ttl + swr, seen.head)
                (reply,) = yield from self._changing(Timed([add(keys, *given)]))
                if reply == STORED:
                    return True
                if reply == LATE:
                    self._clock.doubt_clock()
                yield Backoff(turn * PAUSE_S * random.random())
        except RedisUnavailable as error:
            self._fall_back("add", error)
        return False

    def incr(self, key: str, by: float = 1) -> Operation[float | None]:
        """Add to the number under `key`; what it is then, or None where there is none. Its end and tags stay.

        None of several at once is lost; one whose time is up before its turn has come raises RedisUnavailable.
        Raises TypeError for a value that is no number.
        Redis away: RedisUnavailable; whether it was added is unknown then.
        """
        name = sanitized(key)
        for turn in range(TRIES):
            seen = yield from self._see(name)
            number = MISS if seen.entry is None else self._decode(seen.entry, Any)
            if seen.entry is None or number is MISS:
                return None
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{key!r} holds a {type(number).__name__}, which can't be added to")
            tags = [tag.decode() for tag in seen.entry.tags]
            packed = self._pack(name, number + by, Any, tags, seen.entry.source)
            adds = self._replace(name, seen, packed.rest, "", "", is_new=True)
            (replaced,) = yield from self._changing(Timed([adds]))
            if replaced == STORED:
                return number + by
            if replaced == LATE:
                self._clock.doubt_clock()
            yield Backoff(turn * PAUSE_S * random.random())
        raise RedisUnavailable("contended", f"{TRIES} others were first")

    def touch(self, key: str, **options: Unpack[TimeOptions]) -> Operation[bool]:
        """Let the value under `key` live from now on for `ttl` and `swr`; False where there is none.

        What was invalidated stays so. Redis away: False.
        """
        name = sanitized(key)
        ttl, swr = self._times(options)
        try:
            for turn in range(TRIES):
                seen = yield from self._see(name)
                if seen.entry is None:
                    return False
                touches = self._replace(name, seen, seen.rest, str(ttl), str(ttl + swr))
                (replaced,) = yield from self._changing(Timed([touches]))
                if replaced == STORED:
                    return True
                if replaced == LATE:
                    self._clock.doubt_clock()
                yield Backoff(turn * PAUSE_S * random.random())
        except RedisUnavailable as error:
            self._fall_back("touch", error)
        return False

    def _see(self, name: bytes) -> Operation[Seen]:
        known = self._judges.synced
        raw, clock = yield from self._read((self._keys.entry(name),), known)
        entry, _ = yield from self._judge(raw, name, clock, known)
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
        """`is_new`: the value is another, and a load that is under way is to lose to it."""
        entry = seen.entry
        assert entry is not None
        keys = [self._keys.entry(name), self._keys.lease(name), self._keys.marks]
        keys += map(self._keys.index, entry.tags)
        becomes = (entry.epoch, entry.stamp, name, body, ttl, life)
        return replace(keys, seen.head, *becomes, IN_TIME, seen.seq, int(is_new))
