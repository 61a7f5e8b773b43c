"""Limits while Redis is away: this process counts by itself. Pure: time is an argument, µs of one steady clock.

A process admits its share of each quota (quota / processes, at least 1). It goes on from what Redis said last of a
subject, so an outage is no fresh quota. What was admitted here is owed to Redis and charged there when it is back:
nor is the end of an outage one. And it counts against the share for as long as its window lasts, charged or not:
however often Redis goes away, no more is admitted than in one outage.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from stillroom.limits.decision import OK, PARTS, TOO_MANY, UNAVAILABLE, UNTOLD
from stillroom.limits.limit import Limit
from stillroom.limits.log import Charge, Entry, Hits, Log, Said

LOOKED_AT = 8  # old logs, for each new one that finds no room
# Replies of Redis may be taken in out of their order. One that is older than the newest by more than this was not
# overtaken: the server's clock has stepped back.
OVERTAKEN_US = 10_000_000
_US = 1_000_000

Flying = Sequence[
    tuple[Sequence[bytes], int]
]  # what Redis is being asked for: logs, and hits of each


class Known(NamedTuple):
    """What Redis said last of some logs."""

    at: int
    said: Sequence[int]
    keys: Sequence[bytes]
    server_us: int  # when it said so, by its own clock


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
        self.logs: OrderedDict[bytes, Log] = OrderedDict()  # with hits that Redis may not know of
        self._settled: OrderedDict[bytes, Log] = OrderedDict()  # it knows all of theirs
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._held: OrderedDict[str, list[tuple[Log, Entry]]] = OrderedDict()  # by reservation

    def remember(
        self, keys: Sequence[bytes], said: Sequence[int], now: int, server_us: int = 0
    ) -> None:
        """What Redis said just now. No lock: each step is one of the interpreter's own."""
        known, found = self._known, Known(now, said, keys, server_us)
        for key in keys:
            before = known.get(key)
            if before is None or not 0 < before[3] - server_us < OVERTAKEN_US:
                known[key] = found
        while len(known) > self._most_known:
            known.popitem(last=False)

    def decide(
        self,
        keys: Sequence[bytes],
        limits: Sequence[Limit],
        cost: int,
        now: int,
        *,
        take: bool,
        id: str = "",
        flying: Flying = (),
        known: Sequence[bytes] | None = None,
    ) -> tuple[int, tuple[int, ...]]:
        """The status, and what there is to say of each limit: all of them are consumed, or none.

        `id`: of a reservation, which may be given back. `known`: what `remember` called the logs, if not so.
        """
        with self._lock:
            logs = [self._log(key, limit) for key, limit in zip(keys, limits, strict=True)]
            rows = list(zip(logs, keys, known or keys, strict=True))
            said = [self._said(*row, flying, cost, now) for row in rows]
            if any(fits for _, _, fits, _ in said):
                return TOO_MANY, _flat(said)
            if not take or not cost:
                return OK, _flat(said)
            if not self._keep(keys, logs, now):
                return UNAVAILABLE, ()
            self._consume(logs, cost, now, id)
            return OK, _flat([self._said(*row, flying, 0, now) for row in rows])

    def owed(self, now: int, keys: Iterable[bytes] = (), most: int = 100) -> list[Charge]:
        """What Redis has to be told: of these logs, and of so many others. Then `settle` it."""
        charges: list[Charge] = []
        with self._lock:
            for key in dict.fromkeys([*keys, *islice(self.logs, most)]):
                log = self.logs.get(key)
                if log is None or log.charging:
                    continue
                if log.is_owing(now):
                    charges.append(log.charge(key, now))
                else:
                    self._put_away(key, log)
        return charges

    def is_owing(self, keys: Iterable[bytes]) -> bool:
        """Whether Redis has yet to be told of hits in one of these logs, or is being told."""
        return any(key in self.logs for key in keys)

    def settle(self, charges: Iterable[Charge], now: int, *, told: bool) -> None:
        """Redis knows of these now, or (not `told`) may: then it is told again, and adds only what is new to it."""
        with self._lock:
            for charge in charges:
                if (log := self.logs.get(charge.key)) is None:
                    continue
                log.settle(now, told=told)
                if told and not log.is_owing(now):
                    self._put_away(charge.key, log)

    def forget(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                self.logs.pop(key, None)
                self._settled.pop(key, None)
                self._known.pop(key, None)

    def let_go(self, id: str) -> bool:
        """A reservation made here is not given back any more; True if it might have been."""
        with self._lock:
            return self._held.pop(id, None) is not None

    def refund(self, id: str) -> bool | None:
        """Give back what a reservation took here. None: Redis knows of some of it, or may. False: none is held."""
        with self._lock:
            held = self._held.pop(id, None)
            if held is None:
                return False
            given = [log.give_back(entry, id) for log, entry in held]
        return bool(given) if all(given) else None

    # One decision

    def _log(self, key: bytes, limit: Limit) -> Log:
        log = self.logs.get(key) or self._settled.get(key) or Log(limit)
        return log.used_by(limit)

    def _said(
        self, log: Log, key: bytes, known: bytes, flying: Flying, cost: int, now: int
    ) -> Said:
        limit, share = log.limit, self._share(log.limit)
        if limit.away == "open":
            return UNTOLD
        asked = sum([hits for logs, hits in flying if key in logs])
        base, at = self._base(known, limit, share, now)
        return log.said(base, at, asked, share, cost, now)

    def _base(self, key: bytes, limit: Limit, share: int, now: int) -> tuple[list[Hits], int]:
        """The hits by what Redis said last, as far as they may still count, and when that was."""
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

    def _consume(self, logs: Sequence[Log], cost: int, now: int, id: str) -> None:
        taken = [(log, log.add(cost, now, id)) for log in logs if log.limit.away != "open"]
        if id:
            self._held[id] = taken
            if len(self._held) > self._most:
                self._held.popitem(last=False)

    # Room

    def _keep(self, keys: Sequence[bytes], logs: Sequence[Log], now: int) -> bool:
        """Keep the logs, as far as there is room. False if one that is strict finds none."""
        new = [(k, log) for k, log in zip(keys, logs, strict=True) if self._is_new(k, log)]
        room = self._make_room(len(new), now)
        if room < len(new) and any(log.limit.away == "strict" for _, log in new):
            return False
        for key, log in new[:room]:
            self._settled.pop(key, None)
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

    def _put_away(self, key: bytes, log: Log) -> None:
        """Redis knows of all its hits: they count on in the next outage."""
        del self.logs[key]
        self._settled[key] = log
        while len(self._settled) > self._most:
            self._settled.popitem(last=False)


def _flat(said: Iterable[Said]) -> tuple[int, ...]:
    return tuple([number for numbers in said for number in numbers])
