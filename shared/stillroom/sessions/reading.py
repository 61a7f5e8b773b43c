"""Reads a session: plainly, by three commands without a script, where there is nothing to write.

The commands are not one act, so their order matters. Revocations are looked for first: a worker deletes the
revoked records and only then forgets the revocation, so whoever finds no revocation finds no revoked record after
it. Then the server's clock, then the record. What the record alone does not tell (an old name, a revocation, a
session that is due to be touched, a key of somebody else's) is left to lua/session_get.lua.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

from stillroom.errors import SessionStoreUnavailable
from stillroom.keys import Keys
from stillroom.misuse import YES_OR_NO, refuse_other
from stillroom.operation import Operation
from stillroom.scripts import session_get
from stillroom.sessions.named import Named
from stillroom.sessions.token import NAME_LENGTH, SHARDS_LIMIT, Place
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Command, Server, StateServer, pack

TOUCHES_KNOWN = 10_000  # sessions of which a process knows when they are to be touched
SCRIPTED_S = 10.0  # where a shard has revocations its sessions are read by the script for so long

_BLANK = b"?" * NAME_LENGTH  # where a name goes
_TIME = pack([(b"TIME",)])
_NEVER = float("inf")

# The fields of a record that are no data, and what stands for one that it may lack. See lua/lib/session.lua.
_HEAD = (b"_u", b"_c", b"_l", b"_x", b"_i", b"_v", b"_a", b"_t", b"_m")
_MAY_LACK = (b"_c", b"_v", b"_a", b"_m", b"_b")
_OWN = {field: b"" if field in _MAY_LACK else None for field in (*_HEAD, b"_s", b"_b")}
_head_of = itemgetter(*_HEAD)
_numbers_of = itemgetter(b"_l", b"_x", b"_i", b"_s")
_json_of = b'"%b":%b'.__mod__  # a field and its value
_MOST = 3 * 2**53  # more than three numbers that Lua holds exactly
_NO_DATA = b"_"  # the names of fields that are no data begin with this

Reply = Sequence[Any]  # as lua/session_get.lua replies


class Reading(Named):
    """Read sessions, by the script where this process knows that there is something to write."""

    def __init__(
        self, settings: Settings, server: Server | StateServer, keys: Keys, stats: Stats
    ) -> None:
        super().__init__(settings, server, keys, stats)
        self._touch_us = int(settings.session_touch * 1_000_000)
        self._touch = b"%d" % self._touch_us
        self._frames: dict[tuple[int, bool], tuple[bytes, bytes, bytes]] = {}
        self._plain_frames: dict[int, tuple[bytes, bytes, bytes]] = {}
        # time.monotonic(): when a session is to be touched, and until when a shard has revocations to be looked at.
        self._touch_due: dict[bytes, float] = {}
        self._scripted_until = [0.0] * SHARDS_LIMIT

    def _looked_up(self, place: Place, touch: bool) -> Operation[Any]:
        """Return the reply of lua/session_get.lua, or of a plain read that says the same.

        The script is asked where this process knows that there is something to write, so that a session that is
        read once a minute is one round trip, too.
        """
        shard, names = place
        if touch is True:
            due = self._touch_due.get(names[0], _NEVER)
        else:
            refuse_other("touch", touch, bool, YES_OR_NO)
            due = _NEVER
        now = time.monotonic()
        if due > now >= self._scripted_until[shard]:
            try:
                replies = yield from self._ask(self._plain_reads(place))
            except SessionStoreUnavailable as error:
                if error.reason != "wrongtype":
                    raise
            else:
                reply = read_plain(names, replies, self._touch_us if touch else 0)
                if reply is not None:
                    if touch and due is _NEVER:
                        self._note_touch(names[0], reply, now)
                    return reply
                if replies[0]:
                    self._scripted_until[shard] = now + SCRIPTED_S
        (reply,) = yield from self._ask([self._reading(place, touch)])
        if touch:
            self._note_touch(names[0], reply, now)
        return reply

    def _note_touch(self, name: bytes, reply: Any, now: float) -> None:
        """Remember when this process knows that the session is to be touched again."""
        if reply[0] == b"ok":
            if len(self._touch_due) >= TOUCHES_KNOWN:
                self._touch_due.clear()
            self._touch_due[name] = now + (touch_after(reply[2], self._touch_us) - reply[4]) / 1e6

    def _plain_reads(self, place: Place) -> list[Command]:
        shard, names = place
        looks, before, after = self._plain_frames.get(shard) or self._make_plain_frame(shard)
        if len(names) == 1:
            return [looks, _TIME, before + names[0] + after]
        return [looks, _TIME, *[before + name + after for name in names]]

    def _make_plain_frame(self, shard: int) -> tuple[bytes, bytes, bytes]:
        """Pack the look for revocations, and all but the name in the read of a record, once."""
        looks = pack([(b"EXISTS", self._keys.revocations(shard), self._keys.all_revoked(shard))])
        read = pack([(b"HGETALL", *self._keys.sessions(shard, [_BLANK]))])
        before, _, after = read.partition(_BLANK)
        self._plain_frames[shard] = looks, before, after
        return looks, before, after

    def _reading(self, place: Place, touch: bool) -> Command:
        """Return the command that reads a session, packed once but for the name, because each request sends one."""
        shard, names = place
        if len(names) > 1:  # peppers are being changed
            return self._reads(shard, names, touch)
        frame = self._frames.get((shard, touch))
        if frame is None:
            whole = pack([self._reads(shard, [_BLANK], touch)])
            frame = self._frames[shard, touch] = whole.partition(_BLANK)
        return frame[0] + names[0] + frame[2]

    def _reads(self, shard: int, names: Sequence[bytes], touch: bool) -> Command:
        return session_get(*self._keys.record(shard, names), self._touch if touch else b"")


def read_plain(names: Sequence[bytes], replies: Sequence[Any], touch_us: int) -> Reply | None:
    """Return what lua/session_get.lua would reply, or None where only the script can tell.

    `replies`: how many keys hold revocations, the server's time, and the record under each name.
    `touch_us`: µs between two touches; 0 if reading the session does not touch it.
    """
    revocations, clock, *records = replies
    if revocations:
        return None
    for name, fields in zip(names, records, strict=True):
        if fields:
            record = _OWN.copy()  # first: what follows in it is data
            field = iter(fields)
            record.update(zip(field, field, strict=True))
            if b"_to" not in record:
                return _answer(name, record, int(clock[0]) * 1_000_000 + int(clock[1]), touch_us)
            if b"_alias" not in record or record[b"_to"] not in names:
                return None
    return (b"missing",)


def touch_after(head: bytes, touch_us: int) -> int:
    """Return how many µs after the last one a touch is due. `head`: what the record says of itself."""
    try:
        return min(touch_us, int(head.split(b"\t", 5)[4]) // 20)
    except ValueError:  # a stranger wrote it
        return touch_us


def _answer(name: bytes, record: dict[bytes, Any], now: int, touch_us: int) -> Reply | None:
    try:
        seen, limit, idle, stamp = map(int, _numbers_of(record))
        head = b"\t".join(_head_of(record))
    except (TypeError, ValueError):  # a stranger wrote it
        return None
    if limit + idle + stamp > _MOST:  # the script says what becomes of it
        return None
    unseen = now - seen
    if unseen >= idle or now >= limit:
        return (b"expired",)
    # Less than nothing: the clock has stepped back.
    if touch_us and (unseen >= touch_us or 20 * abs(unseen) >= idle):
        return None
    data = b",".join(map(_json_of, islice(record.items(), len(_OWN), None)))
    if b'"_' in data:  # somewhere, perhaps in the name of a field
        data = b",".join([_json_of(one) for one in record.items() if one[0][:1] != _NO_DATA])
    return b"ok", name, head, b"{%b}" % data, unseen
