"""Counts subjects together while a process counts by itself and has no room for each. Pure.

One attacker with a /48 has 65,536 addresses, and must not fill the table for all others. So the part of the table
that one network may take is bounded. A subject that finds no room is counted with its neighbours: as strictly as
if they were one.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from contextlib import suppress
from hashlib import blake2b
from ipaddress import IPv6Address

from stillroom.limits.limit import Limit
from stillroom.limits.log import Log
from stillroom.oldest import oldest

TOGETHER = 1_024  # logs of each width
LOOKED_AT = 8  # old logs, for each new one that finds no room
_KEY = re.compile(rb".*\{rl:([^:]*):(.*)\}:(.*)", re.DOTALL)

Names = tuple[bytes, ...]  # of what a subject is counted with, the narrowest first


class Neighbours:
    """Count the logs that each network has in a table, and hold the logs of subjects that found no room there."""

    def __init__(self, most: int) -> None:
        # The most networks that are counted: of a /24 of IPv4 or a /48 of IPv6, and of a /16 or a /32.
        self._most = (max(256, most // 8), max(512, most // 4))
        self._counts: Counter[bytes] = Counter()
        self._together = tuple([OrderedDict[bytes, Log]() for _ in range(3)])

    def have_room(self, key: bytes) -> bool:
        """Return whether the networks of this log's subject may have another log."""
        return all(
            self._counts[name] < most
            for name, most in zip(_networks(key), self._most, strict=False)
        )

    def count(self, key: bytes, by: int) -> None:
        """Note that a log of this name has come, or gone (-1)."""
        for name in _networks(key):
            self._counts[name] += by
            if not self._counts[name]:
                del self._counts[name]

    def log(self, key: bytes, limit: Limit, now: int) -> Log:
        """Return the log that a subject is counted in with its neighbours: the nearest for which there is room."""
        *nearer, widest = zip(_together_with(key), self._together, strict=True)
        for name, logs in nearer:
            if name in logs or _has_room(logs, now):
                return _of(logs, name, limit)
        name, logs = widest
        if name not in logs and not _has_room(logs, now):
            logs.popitem(last=False)
        return _of(logs, name, limit)


def _of(logs: OrderedDict[bytes, Log], name: bytes, limit: Limit) -> Log:
    if name not in logs:
        logs[name] = Log(limit, is_shared=True)
    return logs[name].used_by(limit)


def _has_room(logs: OrderedDict[bytes, Log], now: int) -> bool:
    if len(logs) >= TOGETHER:
        for name in oldest(logs, LOOKED_AT):
            log = logs.get(name)
            if log is None or log.is_over(now):
                logs.pop(name, None)
            else:
                with suppress(KeyError):  # a handler that came just now has dropped it
                    logs.move_to_end(name)
    return len(logs) < TOGETHER


def _networks(key: bytes) -> Names:
    """Return the networks of its address, or none where the subject has no address."""
    match = _KEY.fullmatch(key)
    if match is None:
        return ()
    kinds, values = match[1].split(b"&"), match[2].split(b"&")
    address = values[kinds.index(b"ip")] if b"ip" in kinds else b""
    text = address.partition(b"/")[0]
    if b":" in text:
        try:
            packed = IPv6Address(text.decode()).packed
        except ValueError:
            return ()
        return packed[:6], packed[:4]
    parts = text.split(b".")
    return (b".".join(parts[:3]), b".".join(parts[:2])) if len(parts) == 4 else ()


def _together_with(key: bytes) -> Names:
    """Return the growing groups that a subject is counted with: its networks, or else a part of all names."""
    match = _KEY.fullmatch(key)
    about = b"%b %b " % (match[1], match[3]) if match else b""
    digest = blake2b(key, digest_size=2).digest()
    nearer = _networks(key) or (b"%d" % (digest[0] % 4 * 256 + digest[1]), b"%d" % digest[1])
    return (*[about + name for name in nearer], about)
