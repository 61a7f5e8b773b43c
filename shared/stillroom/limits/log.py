"""The hits that one process admitted to one subject against one limit, while Redis was away. Pure.

The log of lua/lib/hits.lua, kept here; and which of the hits Redis has been told of.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stillroom.limits.decision import NEVER
from stillroom.limits.limit import Limit

SLICES = 24  # of a window: see lua/lib/hits.lua
APART = 100  # reservations in one log that have an entry each, and can be given back
_US = 1_000_000

OWED, SENT, TOLD = range(3)  # Redis does not know of a hit; may know; knows

Said = tuple[int, int, int, int]  # as lua/limit_check.lua says it of one limit
Hits = tuple[int, int]  # when the last of them were, µs, and how many


class Reserved(NamedTuple):
    """Hits of one reservation."""

    id: str
    hits: int
    age_us: int


class Charge(NamedTuple):
    """Hits of one log that Redis does not know of. It may be sent again: Redis adds what is new of `total`."""

    key: bytes
    limit: Limit
    hits: int  # but those of reservations
    age_us: int = 0  # since the last of them
    log: str = ""  # how this process calls the log
    total: int = 0  # hits of this process in it, ever
    reserved: tuple[Reserved, ...] = ()


class Entry:
    """Hits that share a time."""

    __slots__ = ("count", "id", "last", "reserved", "state", "told_at")

    def __init__(self, last: int, count: int, id: str) -> None:
        self.last = last
        self.count = count
        self.id = id  # of the reservation that has this entry for itself …
        self.reserved = count  # … and what Redis is charged for that: it settles it by itself
        self.state = OWED
        self.told_at = 0

    def is_beside(self, said_at: int) -> bool:
        """Return whether these hits are not among those that Redis told of at this time, or perhaps not."""
        return self.state != TOLD or self.told_at > said_at


class Log:
    """The hits of one subject against one limit."""

    __slots__ = (
        *("_entries", "_id", "_keep_us", "_newly_sent", "_total"),
        *("charging", "is_shared", "limit"),
    )

    def __init__(self, limit: Limit, *, is_shared: bool = False) -> None:
        self.limit = limit
        self.is_shared = is_shared  # with neighbours: see neighbours.py. It is nobody's, and Redis not told of it
        self.charging = False  # some are on their way to Redis
        self._keep_us = 0  # the longest window of the limits that use it
        self._entries: list[Entry] = []
        # With the charge that is on its way, and with none before.
        self._newly_sent: list[Entry] = []
        self._id = secrets.token_hex(8)
        self._total = 0

    def used_by(self, limit: Limit) -> Log:
        """Return this log, used by `limit` from now on: limits of one name may differ in quota and window."""
        self.limit = limit
        self._keep_us = max(self._keep_us, limit.window * _US)
        return self

    def said(
        self, base: Iterable[Hits], base_at: int, flying: int, share: int, cost: int, now: int
    ) -> Said:
        """Return the hits used, as if the share were the quota; µs until some are back, `cost` fits, all are back.

        `base`: hits by what Redis said at `base_at`. `flying`: hits that Redis is being asked for just now.
        All hits of the subject must fit into the share, and so must those that this process admitted by itself.
        """
        self._forget(now)
        counted = [entry for entry in self._entries if entry.last > now - self.limit.window * _US]
        own = [(entry.last, entry.count) for entry in counted]
        since = [(e.last, e.count) for e in counted if e.is_beside(base_at)]
        everywhere = sorted([*base, *since])
        if flying:
            everywhere.append((now, flying))
        said = _standing(everywhere, self.limit, share, cost, now)
        return (
            said
            if len(since) == len(own)
            else fuller(said, _standing(own, self.limit, share, cost, now))
        )

    def add(self, cost: int, now: int, id: str) -> Entry:
        """Return the entry that the hits are in."""
        newest = self._entries[-1] if self._entries else None
        apart = bool(id) and len(self._entries) < APART
        if not apart:
            self._total += cost
        if newest and not apart and self._shares(newest, now):
            newest.last, newest.count = now, newest.count + cost
            return newest
        self._entries.append(Entry(now, cost, id if apart else ""))
        return self._entries[-1]

    def adds(self, entry: Entry, base_at: int) -> bool:
        """Return whether the hits of this entry count here, beside those that Redis told of at `base_at`."""
        return entry in self._entries and entry.is_beside(base_at)

    def owes(self, entry: Entry, id: str) -> bool:
        """Return whether the hits of a reservation are this entry, and Redis was never told of it."""
        return entry.id == id and entry.state == OWED and entry in self._entries

    def settle_entry(self, entry: Entry, cost: int, *, is_all: bool) -> bool:
        """Let the reservation of this entry have cost this much. `is_all`: Redis is told by the charge alone."""
        if entry in self._entries:
            entry.count = cost
            if is_all:
                entry.reserved = cost
            if not cost:
                self._entries.remove(entry)
        return True

    def settle_shared(self, entry: Entry, more: int, now: int) -> bool:
        """Let a reservation whose hits share this entry have cost more, or less. False: Redis was told how many."""
        is_owed = entry.state == OWED and entry in self._entries
        if is_owed:
            entry.count += more
            self._total += more
        elif more > 0:
            self.add(more, max(now, self._entries[-1].last if self._entries else 0), "")
        return is_owed or more >= 0

    def is_over(self, now: int) -> bool:
        self._forget(now)
        return not self._entries

    def is_owing(self, now: int) -> bool:
        """Return whether there are hits that Redis may not know of."""
        self._forget(now)
        return any(entry.state != TOLD for entry in self._entries)

    def charge(self, key: bytes, now: int) -> Charge:
        """Return the charge that Redis has to be told. Then `settle` it."""
        self._forget(now)
        owed = [entry for entry in self._entries if entry.state != TOLD]
        plain = [entry for entry in owed if not entry.id]
        self._newly_sent = [entry for entry in owed if entry.state == OWED]
        for entry in owed:
            entry.state = SENT
        self.charging = True
        return Charge(
            key,
            self.limit,
            sum(entry.count for entry in plain),
            now - plain[-1].last if plain else 0,
            self._id,
            self._total,
            tuple([Reserved(e.id, e.reserved, now - e.last) for e in owed if e.id]),
        )

    def settle(self, now: int, *, told: bool, arrived: bool = True) -> None:
        """Note that Redis knows of the charge, or (not `told`) may know of it. Then the hits are charged again.

        `arrived=False`: the charge can't have come to Redis, so it knows no more than before.
        """
        self.charging = False
        if not arrived:
            for entry in self._newly_sent:
                entry.state = OWED
        self._newly_sent = []
        for entry in self._entries:
            if told and entry.state == SENT:
                entry.state, entry.told_at = TOLD, now

    def _shares(self, newest: Entry, now: int) -> bool:
        """Return whether a hit of now shares this entry, which Redis does not know and no reservation owns."""
        slice_us = self.limit.window * _US / SLICES
        is_open = self.limit.quota > SLICES and newest.state == OWED and not newest.id
        return is_open and newest.last // slice_us == now // slice_us

    def _forget(self, now: int) -> None:
        gone = now - self._keep_us
        if self._entries and self._entries[0].last <= gone:
            self._entries = [entry for entry in self._entries if entry.last > gone]


def fuller(one: Said, other: Said) -> Said:
    """Return the count that leaves less, of two ways to count the same hits, with the longer wait."""
    used, some, _, full = max(one, other)
    wait = NEVER if NEVER in (one[2], other[2]) else max(one[2], other[2])
    return used, some, wait, full


def _standing(hits: Sequence[Hits], limit: Limit, share: int, cost: int, now: int) -> Said:
    window = limit.window * _US
    used = sum([count for _, count in hits])
    left = max(0, share - used)
    some, full = (hits[0][0] + window - now, hits[-1][0] + window - now) if hits else (0, 0)
    return limit.quota - left, some, _wait(hits, limit, share, cost, now), full


def _wait(hits: Sequence[Hits], limit: Limit, share: int, cost: int, now: int) -> int:
    """Return the µs until `cost` fits."""
    excess = sum([count for _, count in hits]) + cost - share
    if excess <= 0:
        return 0
    if cost > share:  # not here; but once Redis is back it may fit into the quota
        return limit.window * _US if cost <= limit.quota else NEVER
    for last, count in hits:
        excess -= count
        if excess <= 0:
            return last + limit.window * _US - now
    return NEVER
