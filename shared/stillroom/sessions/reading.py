"""Reads a session plainly: by three commands without a script, for a request with nothing to write.

The commands are not one act, so their order matters. Revocations are looked for first: a worker deletes the
revoked records and only then forgets the revocation, so whoever finds no revocation finds no revoked record after
it. Then the server's clock, then the record. What the record alone does not tell (an old name, a revocation, a
session that is due to be touched, a key of somebody else's) is left to lua/session_get.lua.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

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


def read_plain(names: Sequence[bytes], replies: Sequence[Any], touch_us: int) -> Reply | None:
    """Return what lua/session_get.lua would reply, or None where only the script can tell.

    `replies`: how many keys hold revocations, the server's time, and the record under each name.
    `touch_us`: µs between two touches; 0 if reading the session does not touch it.
    """
    revocations, time, *records = replies
    if revocations:
        return None
    for name, fields in zip(names, records, strict=True):
        if fields:
            record = _OWN.copy()  # first: what follows in it is data
            field = iter(fields)
            record.update(zip(field, field, strict=True))
            if b"_to" not in record:
                return _answer(name, record, int(time[0]) * 1_000_000 + int(time[1]), touch_us)
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
