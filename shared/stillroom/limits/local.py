"""Limits while Redis is away: this process counts by itself. Pure: time is an argument, µs of one steady clock.

A process admits its share of each quota (quota / processes, at least 1). What Redis said last of a subject is where
its count begins, so an outage is no fresh quota; what was admitted here is owed to Redis, and charged there when it
is back, so its end is none either.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice, repeat
from typing import NamedTuple

from stillroom.limits.decision import NEVER, OK, PARTS, TOO_MANY, UNAVAILABLE, UNTOLD
from stillroom.limits.limit import Limit

SLICES = 24  # of a window: see lua/lib/hits.lua
LOOKED_AT = 8  # old logs, for each new one that finds no room
_US = 1_000_000

Said = tuple[int, ...]


class Charge(NamedTuple):
    """Hits of one log that Redis does not know of."""

    key: bytes
    limit: Limit
    hits: int
    age_us: int  # since the last of them


class _Entry:
    __slots__ = ("count", "last", "owed")

    def __init__(self, last: int, count: int, *, owed: bool) -> None:
        self.last = last
        self.count = count
        self.owed = owed  # False: it is from Redis


class Log:
    """The hits of one subject against one limit: the log of lua/lib/hits.lua, kept here."""

    __slots__ = ("_entries", "charging", "limit")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.charging = False  # its hits are on their way to Redis
        self._entries: list[_Entry] = []

    def seed(self, last: int, count: int) -> None:
        """What Redis said of it last."""
        if count > 0:
            self._entries.append(_Entry(last, count, owed=False))

    def said(self, share: int, cost: int, now: int) -> Said:
        """Hits used, as if the share were the quota; µs until some are back, until `cost` fits, until all are."""
        self._forget(now)
        used = sum([entry.count for entry in self._entries])
        left = share - used if used < share else 0
        wait = self._wait(used + cost - share, cost, share, now)
        return self.limit.quota - left, self._leaves(0, now), wait, self._leaves(-1, now)

    def add(self, cost: int, now: int) -> int:
        """µs until some of all hits are back."""
        newest = self._entries[-1] if self._entries else None
        slice_us = self.limit.window * _US / SLICES
        shares = self.limit.quota > SLICES and newest is not None and newest.owed
        if shares and newest and newest.last // slice_us == now // slice_us:
            newest.last, newest.count = now, newest.count + cost
        else:
            self._entries.append(_Entry(now, cost, owed=True))
        return self._leaves(0, now)

    def is_over(self, now: int) -> bool:
        self._forget(now)
        return not self._entries

    def owed(self, now: int) -> tuple[int, int]:
        """(hits, µs since the last of them)."""
        self._forget(now)
        own = [entry for entry in self._entries if entry.owed]
        return sum(entry.count for entry in own), now - own[-1].last if own else 0

    def settle(self, hits: int) -> None:
        """Redis knows of so many now."""
        for entry in self._entries:
            taken = min(hits, entry.count) if entry.owed else 0
            entry.count -= taken
            hits -= taken
        self._entries = [entry for entry in self._entries if entry.count]

    def give_back(self, cost: int, at: int) -> None:
        for entry in self._entries:
            if entry.owed and entry.last >= at:
                entry.count -= min(cost, entry.count)
                break
        self._entries = [entry for entry in self._entries if entry.count]

    def _forget(self, now: int) -> None:
        gone = now - self.limit.window * _US
        if self._entries and self._entries[0].last <= gone:
            self._entries = [entry for entry in self._entries if entry.last > gone]

    def _leaves(self, place: int, now: int) -> int:
        return self._entries[place].last + self.limit.window * _US - now if self._entries else 0

    def _wait(self, excess: int, cost: int, share: int, now: int) -> int:
        if excess <= 0:
            return 0
        if cost > share:  # not here; but once Redis is back it may fit into the quota
            return self.limit.window * _US if cost <= self.limit.quota else NEVER
        for place, entry in enumerate(self._entries):
            excess -= entry.count
            if excess <= 0:
                return self._leaves(place, now)
        return NEVER


class LocalLimits:
    """All that this process counts, and what it remembers for the case that it has to. Thread-safe."""

    def __init__(self, processes: int, most: int, most_known: int) -> None:
        self._processes = processes
        self._most = most
        self._most_known = most_known
        self.reset()

    def reset(self) -> None:
        """Nothing counted: what a forked process inherits is its parent's to tell."""
        self._lock = threading.Lock()
        self.logs: OrderedDict[bytes, Log] = OrderedDict()
        self._known: OrderedDict[bytes, tuple[int, Sequence[int], Sequence[bytes]]] = OrderedDict()
        self._held: OrderedDict[str, None] = OrderedDict()

    def remember(self, keys: Sequence[bytes], said: Sequence[int], now: int) -> None:
        """What Redis said just now. No lock: each step is one of the interpreter's own."""
        known, found = self._known, (now, said, keys)
        for key in keys:
            known[key] = found
        while len(known) > self._most_known:
            known.popitem(last=False)

    def decide(
        self, keys: Sequence[bytes], limits: Sequence[Limit], cost: int, now: int, *, take: bool
    ) -> tuple[int, Said]:
        """The status, and what there is to say of each limit: all of them are consumed, or none."""
        with self._lock:
            logs = [self._log(*pair, now) for pair in zip(keys, limits, strict=True)]
            said = [self._said(log, cost, now) for log in logs]
            if any(fits for _, _, fits, _ in said):
                return TOO_MANY, _flat(said)
            if not take or not cost:
                return OK, _flat(said)
            if not self._keep(keys, logs, now):
                return UNAVAILABLE, ()
            return OK, _flat(map(_after, logs, said, repeat(cost), repeat(now)))

    def owed(self, now: int, keys: Iterable[bytes] = (), most: int = 100) -> list[Charge]:
        """What Redis has to be told: of these logs, and of so many others. Then `settle` it."""
        charges: list[Charge] = []
        with self._lock:
            for key in dict.fromkeys([*keys, *islice(self.logs, most)]):
                log = self.logs.get(key)
                if log is None or log.charging:
                    continue
                hits, age = log.owed(now)
                if hits:
                    log.charging = True
                    charges.append(Charge(key, log.limit, hits, age))
                else:
                    del self.logs[key]
        return charges

    def settle(self, charges: Iterable[Charge], now: int, *, told: bool) -> None:
        """Redis knows of these now, or (not `told`) may not: then they are told again. Rather twice than never."""
        with self._lock:
            for charge in charges:
                if (log := self.logs.get(charge.key)) is None:
                    continue
                log.charging = False
                if told:
                    log.settle(charge.hits)
                    if not log.owed(now)[0]:
                        del self.logs[charge.key]

    def forget(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                self.logs.pop(key, None)
                self._known.pop(key, None)

    def hold(self, id: str) -> None:
        """A reservation made here may be refunded."""
        with self._lock:
            self._held[id] = None
            if len(self._held) > self._most:
                self._held.popitem(last=False)

    def let_go(self, id: str) -> bool:
        """It may not any more; True if it might have been."""
        with self._lock:
            return self._held.pop(id, self) is not self

    def refund(self, keys: Iterable[bytes], cost: int, at: int) -> None:
        with self._lock:
            for key in keys:
                if log := self.logs.get(key):
                    log.give_back(cost, at)

    def _log(self, key: bytes, limit: Limit, now: int) -> Log:
        """The log that is kept, or one that begins with what Redis said last."""
        kept = self.logs.get(key)
        if kept is not None:
            kept.limit = limit
            return kept
        log = Log(limit)
        if known := self._known.get(key):
            at, said, keys = known
            place = PARTS * keys.index(key)
            used, _, _, full = said[place : place + PARTS]
            if at + full > now:
                left = max(0, limit.quota - used) // self._processes
                log.seed(at + full - limit.window * _US, self._share(limit) - left)
        return log

    def _said(self, log: Log, cost: int, now: int) -> Said:
        if log.limit.away == "open":
            return UNTOLD
        return log.said(self._share(log.limit), cost, now)

    def _share(self, limit: Limit) -> int:
        return min(limit.quota, max(1, limit.quota // self._processes))

    def _keep(self, keys: Sequence[bytes], logs: Sequence[Log], now: int) -> bool:
        """Keep the logs, as far as there is room. False if one that is strict finds none."""
        new = [(k, log) for k, log in zip(keys, logs, strict=True) if self._is_new(k, log)]
        room = self._make_room(len(new), now)
        if room < len(new) and any(log.limit.away == "strict" for _, log in new):
            return False
        for key, log in new[:room]:
            self.logs[key] = log
        return True

    def _is_new(self, key: bytes, log: Log) -> bool:
        return log.limit.away != "open" and key not in self.logs

    def _make_room(self, wanted: int, now: int) -> int:
        """How many more there may be. Some of the oldest are looked at: over, they go; else they are put last."""
        if wanted and len(self.logs) + wanted > self._most:
            for key in [key for key, _ in zip(self.logs, range(LOOKED_AT), strict=False)]:
                if self.logs[key].is_over(now):
                    del self.logs[key]
                else:
                    self.logs.move_to_end(key)
        return max(0, self._most - len(self.logs))


def _after(log: Log, said: Said, cost: int, now: int) -> Said:
    """What there is to say once `cost` is consumed."""
    if log.limit.away == "open":
        return said
    return said[0] + cost, log.add(cost, now), 0, log.limit.window * _US


def _flat(said: Iterable[Said]) -> Said:
    return tuple(number for numbers in said for number in numbers)
