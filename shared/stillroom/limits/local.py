"""Limits while Redis is away: this process counts by itself. Pure: time is an argument, µs of one steady clock.

A process admits its share of each quota (quota / processes, at least 1). It goes on from what Redis said last of a
subject, so an outage is no fresh quota. What was admitted here is owed to Redis and charged there when it is back:
nor is the end of an outage one. And it counts against the share for as long as its window lasts, charged or not:
however often Redis goes away, no more is admitted than in one outage. Of whom there is no room for, a limit that is
strict counts with his neighbours, and Redis is not told; others let him through.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple

from stillroom.keys import home_of
from stillroom.limits.decision import OK, PARTS, TOO_MANY, UNTOLD
from stillroom.limits.limit import Limit
from stillroom.limits.log import SLICES, Charge, Entry, Hits, Log, Said
from stillroom.limits.neighbours import LOOKED_AT, Neighbours
from stillroom.oldest import oldest

_US = 1_000_000

InFlight = Mapping[bytes, int]  # how many hits Redis is being asked for, by log
NONE: InFlight = MappingProxyType({})


class Known(NamedTuple):
    """Hold the last reply of Redis about some logs."""

    at: int
    said: Sequence[int]
    keys: Sequence[bytes]
    server_us: int  # when it said so, by its own clock


_known = tuple.__new__


class LocalLimits:
    """All that this process counts, and what it remembers for the case that it has to. Thread-safe."""

    def __init__(self, processes: int, most: int, most_known: int) -> None:
        self._processes = processes
        self._most = most
        self._most_known = most_known
        self.reset()

    def reset(self) -> None:
        """Forget all counts: what a forked process inherits is its parent's to tell."""
        self._lock = threading.RLock()  # a signal handler may call while this thread holds it
        self.logs: OrderedDict[bytes, Log] = OrderedDict()  # with hits that Redis may not know of
        self._neighbours = Neighbours(self._most)
        self._settled: OrderedDict[bytes, Log] = OrderedDict()  # it knows all of theirs
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        # The hits of each reservation, and how many they are.
        self._held: OrderedDict[str, list[tuple[bytes, Log, Entry, int]]] = OrderedDict()

    def remember(
        self,
        keys: Sequence[bytes],
        said: Sequence[int],
        now: int,
        server_us: int = 0,
        sent: int | None = None,
    ) -> None:
        """Remember what Redis said of these logs just now, when it was asked at `sent`.

        No lock is taken: each step is one of the interpreter's own. Replies to calls that overlapped may arrive out
        of order: the server's time says which is newer. Of other calls this process knows the order itself,
        whatever became of that clock meanwhile.
        """
        known, found = self._known, _known(Known, (now, said, keys, server_us))
        since = now if sent is None else sent
        for key in keys:
            before = known.get(key)
            if before is None or before.server_us <= server_us or before.at <= since:
                known[key] = found
        while len(known) > self._most_known:
            known.popitem(last=False)

    def correct(
        self, pairs: Iterable[tuple[bytes, Limit]], more: int, now: int, at_us: int = 0
    ) -> None:
        """Add hits, or take some off, in what Redis said of these logs: it has settled a reservation since `now`.

        What it said later counts them already, perhaps. `at_us`: when the server says that it was reserved; 0 where
        it did not. Nothing is taken off what was said without the reservation.
        """
        for key, limit in pairs:
            known = self._known.get(key)
            if known is None or known.at > now:
                continue
            said, place = list(known.said), PARTS * known.keys.index(key)
            if more < 0 < at_us and not _may_include(known, place, limit, at_us):
                continue
            said[place] = max(0, said[place] + more)
            if more > 0:
                said[place + 3] = now + limit.window * _US - known.at
            self._known[key] = known._replace(said=said)

    def decide(
        self,
        keys: Sequence[bytes],
        limits: Sequence[Limit],
        cost: int,
        now: int,
        *,
        take: bool,
        id: str = "",
        flying: InFlight = NONE,
        known: Sequence[bytes] | None = None,
    ) -> tuple[int, tuple[int, ...]]:
        """Return the status, and what there is to say of each limit: all of them are consumed, or none.

        `id`: of a reservation, which may be given back. `known`: what `remember` called the logs, if not so.
        """
        with self._lock:
            is_full = len(self.logs) + len(keys) > self._most
            if is_full:
                self._look_at_old(now)
                is_full = len(self.logs) + len(keys) > self._most
            pairs = zip(keys, limits, strict=True)
            logs = [self._log(key, limit, now, is_full=is_full) for key, limit in pairs]
            rows = list(zip(logs, keys, known or keys, strict=True))
            said = [self._said(*row, flying, cost, now) for row in rows]
            if any(fits for _, _, fits, _ in said):
                return TOO_MANY, _flat(said)
            if not take or not (cost or id):  # what is reserved at no cost may cost something later
                return OK, _flat(said)
            self._keep(keys, logs)
            self._consume(keys, logs, cost, now, id)
            return OK, _flat([self._said(*row, flying, 0, now) for row in rows])

    def owed(
        self, now: int, keys: Iterable[bytes] = (), most: int = 100, home: bytes = b""
    ) -> list[Charge]:
        """Return the hits that Redis has to be told of: of these logs and so many others. Then `settle` them.

        `home`: the others are those of this shard.
        """
        charges: list[Charge] = []
        with self._lock:
            some = oldest(self.logs, most)
            others = [key for key in some if not home or home_of(key) == home]
            for key in dict.fromkeys([*keys, *others]):
                log = self.logs.get(key)
                if log is None or log.charging:
                    continue
                if log.is_owing(now):
                    charges.append(log.charge(key, now))
                else:
                    self._put_away(key, log)
        return charges

    def is_owing(self, keys: Iterable[bytes]) -> bool:
        """Return whether Redis has yet to be told of hits in one of these logs, or is being told."""
        return any(key in self.logs for key in keys)

    def settle(
        self, charges: Iterable[Charge], now: int, *, told: bool, arrived: bool = True
    ) -> None:
        """Note that Redis knows of these charges, or (not `told`) may know of them.

        Then it is told again, and adds only what is new to it. `arrived=False`: they can't have come to Redis.
        """
        with self._lock:
            for charge in charges:
                if (log := self.logs.get(charge.key)) is None:
                    continue
                log.settle(now, told=told, arrived=arrived)
                if told and not log.is_owing(now):
                    self._put_away(charge.key, log)

    def put_last(self, charges: Iterable[Charge]) -> None:
        """Let Redis be told of all others first."""
        with self._lock:
            for charge in charges:
                if charge.key in self.logs:
                    self.logs.move_to_end(charge.key)

    def forget(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._drop(key)
                self._settled.pop(key, None)
                self._known.pop(key, None)

    def let_go(self, id: str) -> bool:
        """Keep a reservation made here from being given back; True if it might have been."""
        with self._lock:
            return self._held.pop(id, None) is not None

    def own(self, id: str, known_as: Mapping[bytes, bytes]) -> Collection[bytes]:
        """Return the logs in which this process counts a reservation itself, beside what Redis said of them.

        `known_as`: by log the name that it is remembered by.
        """
        with self._lock:
            heard = {key: self._known.get(name) for key, name in known_as.items()}
            at = {key: known.at if known else -1 for key, known in heard.items()}
            held = self._held.get(id, ())
            return {key for key, log, entry, _ in held if key in at and log.adds(entry, at[key])}

    def refund(
        self,
        id: str,
        cost: int = 0,
        keys: Container[bytes] | None = None,
        *,
        may_be_known: bool = False,
        now: int = 0,
    ) -> bool | None:
        """Let a reservation have cost only this much here, or more, in these logs; in others it stays consumed.

        None: Redis was told of it, or may have been, and has to settle it as well. False: none is held, or its hits
        can't be told from others. `may_be_known`: Redis has to settle it in any case.
        """
        with self._lock:
            held = self._held.pop(id, None)
            if held is None:
                return False
            rows = [row for row in held if keys is None or row[0] in keys]
            if not rows and may_be_known:
                return None
            is_owed = all(log.owes(entry, id) for _, log, entry, _ in rows if entry.id)
            done = [
                log.settle_entry(entry, cost, is_all=is_owed and not may_be_known)
                if entry.id
                else log.settle_shared(entry, cost - before, now)
                for _, log, entry, before in rows
            ]
            for key, log, _, _ in rows:
                if key in self._settled and log.is_owing(now):  # it cost more
                    self._keep([key], [log])
        return bool(rows) and all(done) if is_owed else None

    # One decision

    def _log(self, key: bytes, limit: Limit, now: int, *, is_full: bool) -> Log:
        log = self.logs.get(key) or self._settled.get(key)
        if log is not None:
            return log.used_by(limit)
        is_strict = limit.away == "strict" and not limit.shadow
        if is_strict and (is_full or not self._neighbours.have_room(key)):
            return self._neighbours.log(key, limit, now)
        return Log(limit).used_by(limit)

    def _said(
        self, log: Log, key: bytes, known: bytes, flying: InFlight, cost: int, now: int
    ) -> Said:
        limit, share = log.limit, self._share(log.limit)
        if limit.is_open_away:
            return UNTOLD
        base, at = self._base(known, limit, share, now)
        return log.said(base, at, flying.get(key, 0), share, cost, now)

    def _base(self, key: bytes, limit: Limit, share: int, now: int) -> tuple[list[Hits], int]:
        """Return the hits that Redis reported last, as far as they may still count, and the time of that report."""
        known = self._known.get(key)
        if known is None:
            return [], -1
        place = PARTS * known.keys.index(key)
        used, _, _, full = known.said[place : place + PARTS]
        if known.at + full <= now:
            return [], known.at
        left = max(0, limit.quota - used) // self._processes
        last = known.at + full - limit.window * _US
        return ([(last, share - left)] if share > left else []), known.at

    def _share(self, limit: Limit) -> int:
        return min(limit.quota, max(1, limit.quota // self._processes))

    def _consume(
        self, keys: Sequence[bytes], logs: Sequence[Log], cost: int, now: int, id: str
    ) -> None:
        pairs = zip(keys, logs, strict=True)
        taken = [
            (key, log, log.add(cost, now, id), cost)
            for key, log in pairs
            if not log.limit.is_open_away
        ]
        if id:
            self._held[id] = taken
            if len(self._held) > self._most:
                self._held.popitem(last=False)

    # Room

    def _look_at_old(self, now: int) -> None:
        """Look at some of the oldest logs: expired ones are dropped and the others put last."""
        for key in oldest(self.logs, LOOKED_AT):
            log = self.logs.get(key)
            if log is None or log.is_over(now):
                self._drop(key)
            else:
                with suppress(KeyError):  # a handler that came just now has dropped it
                    self.logs.move_to_end(key)

    def _keep(self, keys: Sequence[bytes], logs: Sequence[Log]) -> None:
        """Keep the logs, as far as there is room."""
        for key, log in zip(keys, logs, strict=True):
            if log.limit.is_open_away or log.is_shared or key in self.logs:
                continue
            may_stay = log.limit.away == "strict" or self._neighbours.have_room(key)
            if may_stay and len(self.logs) < self._most:
                self._settled.pop(key, None)
                self.logs[key] = log
                self._neighbours.count(key, 1)

    def _drop(self, key: bytes) -> None:
        if self.logs.pop(key, None) is not None:
            self._neighbours.count(key, -1)

    def _put_away(self, key: bytes, log: Log) -> None:
        """Put away a log whose hits Redis all knows, so that they count on in the next outage."""
        self._drop(key)
        self._settled[key] = log
        while len(self._settled) > self._most:
            self._settled.popitem(last=False)


def _may_include(known: Known, place: int, limit: Limit, at_us: int) -> bool:
    """Return whether a hit of this time may be among those that Redis told of.

    None are as old where the log was reset since, or lost with a server's data; and none as new where it was told
    before. Hits that share an entry, as those of one slice do where the quota is large, have the time of the last.
    """
    _, some, _, full = known.said[place : place + PARTS]
    window = limit.window * _US
    began = known.server_us - window
    oldest, newest = float(began + some), began + full
    if limit.quota > SLICES:
        oldest -= oldest % (window / SLICES)
    return oldest <= at_us <= newest


def _flat(said: Iterable[Said]) -> tuple[int, ...]:
    return tuple([number for numbers in said for number in numbers])
