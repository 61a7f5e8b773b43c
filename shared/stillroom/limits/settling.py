"""Exchanges what this process and Redis have to know before a subject is asked about.

A batch keeps no order where the server lost a script, and other threads have connections of their own. So nothing
that must be told first rides in front of a check: it is told, and answered, before the check is sent. Until then
the process decides by itself (local.py), and knows of all hits.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Any

from stillroom.errors import (
    OF_THE_COMMAND,
    READS_ONLY,
    REFUSED_FOR_GOOD,
    RedisRefused,
    RedisUnavailable,
    is_in_doubt,
)
from stillroom.keys import Keys, home_of
from stillroom.limits.local import LocalLimits
from stillroom.limits.log import Charge
from stillroom.limits.request import WINDOWS, WINDOWS_LIMIT, Request, Requests
from stillroom.limits.reservation import Reservation
from stillroom.operation import Freeing, Once, Operation
from stillroom.scripts import limit_charge, limit_settle, limit_windows
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Command

BITE = 100  # charges, or refunds, in one batch …
RIDING = 20  # … and charges of others before a request
REFUNDS_LIMIT = 10_000  # that wait for Redis
OVER_MS = 600_000  # no reservation is on its way for longer
AWAY, REFUNDS = b"away", b"refunds"
FOR_ALL = READS_ONLY | {"breaker"}  # reasons that all processes meet
_US = 1_000_000


class Settling:
    """The operations that come before a check."""

    def __init__(
        self, settings: Settings, keys: Keys, requests: Requests, local: LocalLimits, stats: Stats
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._requests = requests
        self._local = local
        self._stats = stats
        # The work to do before Redis is asked. Each request looks whether there is any.
        self.waits: dict[bytes, float] = requests.waits
        self.reset()

    def reset(self) -> None:
        """Forget all that waits: a forked process leaves to its parent what is its parent's."""
        self._refunds: OrderedDict[bytes, tuple[Reservation, int]] = OrderedDict()
        self.waits.pop(REFUNDS, None)

    def before(self, request: Request, is_look: bool = False) -> Operation[Request]:
        """Return the request, once nothing of it is owed to Redis. Raises RedisUnavailable where this process
        decides.
        """
        yield from self.know_shard(request.home)
        if WINDOWS in self.waits and not is_look:
            request = yield from self.with_windows(request)
        yield from self.charge_first(request)
        return request

    def know_shard(self, home: bytes) -> Operation[None]:
        """Make sure that nothing but charges is owed to this shard. Raises RedisUnavailable."""
        if AWAY + home in self.waits:
            self._await_others(home)
        if REFUNDS in self.waits:
            yield from self.tell_refunds(home)

    def with_windows(self, request: Request) -> Operation[Request]:
        """Return the request as it is once this process knows the windows of all the others."""
        yield from self._compare_windows()
        return self._requests.again(request)

    def charge_first(self, request: Request) -> Operation[None]:
        """Charge what is owed of these logs. Raises RedisUnavailable where this process decides."""
        others = RIDING
        while charges := self._local.owed(now_us(), request.logs, others, request.home):
            yield from self.charge(charges)
            others = 0
        if self._local.is_owing(request.logs):
            raise RedisUnavailable(
                "charging", "Redis is being told of what was admitted without it"
            )

    # After an outage

    def was_away(self, home: bytes, reason: str) -> None:
        """Note why Redis, or this shard of it, did not decide: other processes may decide by themselves too."""
        if self._settings.processes > 1 and reason in FOR_ALL:
            self.waits[AWAY + home] = 0.0

    def _await_others(self, home: bytes) -> None:
        """Let this process decide until all processes have noticed that Redis is back and reported their hits.

        Each has its share of the quota. Redis would admit the share of a process that has not reported yet
        once more.
        """
        now = time.monotonic()
        back_at = self.waits[AWAY + home] = self.waits.get(AWAY + home) or now
        if now < back_at + 2 * self._settings.probe_limit:
            raise RedisUnavailable("settling", "other processes tell Redis what they admitted")
        self.waits.pop(AWAY + home, None)

    def tell_at_once(self, request: Request, error: RedisUnavailable) -> Operation[None]:
        """Tell Redis of what was decided here only because others still settle."""
        if error.reason != "settling":
            return
        try:
            if charges := self._local.owed(now_us(), request.logs, 0):
                yield from self.charge(charges)
        except RedisUnavailable as again:  # it stays owed
            self.was_away(request.home, again.reason)

    # Charges

    def charge(self, charges: Sequence[Charge]) -> Operation[list[Any]]:
        """Tell Redis of hits that were admitted here. What it replies is what is known of these logs from then on.

        Returns the replies. Raises RedisUnavailable where they are to be told again.
        """
        replies: Sequence[Any] = [None] * len(charges)
        failure: RedisUnavailable | None = None
        sent = now_us()
        try:
            replies = yield Once.apart(list(map(self._charging, charges)))
        except RedisRefused as refused:
            failure = refused
            if len(refused.replies) == len(charges):
                replies = refused.replies
        except RedisUnavailable as error:
            failure = error
        finally:  # also where this operation is given up
            arrived = failure is None or isinstance(failure, RedisRefused) or failure.may_be_done
            self._settle(charges, replies, sent, arrived)
        if failure is not None and any(map(_is_unsettled, replies)):
            raise failure
        return list(replies)

    def _settle(
        self, charges: Sequence[Charge], replies: Sequence[Any], sent: int, arrived: bool
    ) -> None:
        now = now_us()
        for charge, reply in zip(charges, replies, strict=True):
            self._local.settle([charge], now, told=not _is_unsettled(reply), arrived=arrived)
            if isinstance(reply, list):
                *said, server_us = reply
                known_as = self._requests.known_as(charge.key, charge.limit)
                self._local.remember([known_as], said, now, server_us, sent)
            elif reply is not None:
                self._stats.say("limits", "charge", f"Redis refuses to count hits: {reply}")

    def _charging(self, charge: Charge) -> Command:
        home = home_of(charge.key)
        keys = [charge.key, self._keys.told(charge.log, home)]
        keys += [self._keys.reservation(one.id, home) for one in charge.reserved]
        limit, longest = charge.limit, self._requests.longest_window(charge.limit)
        about = (charge.hits, charge.age_us, limit.quota, limit.window * _US, charge.total, longest)
        reserved = [number for one in charge.reserved for number in (one.hits, one.age_us)]
        return limit_charge(keys, *about, *reserved)

    # Reservations

    def settle(
        self, reservation: Reservation, cost: int, *, frees: bool = False
    ) -> Operation[bool | None]:
        """Return whether Redis settled the reservation at this cost, now.

        Redis away: None, and it is settled later. A user who may not settle: False. `frees`: others may be waiting
        for it.
        """
        send = Freeing if frees else Once.apart
        try:
            homes = reservation.by_home().values()
            settled = yield send([self._settlement(one, cost) for one in homes])
        except RedisUnavailable as error:
            if error.reason in OF_THE_COMMAND:  # it would be refused again, before each check
                self._stats.say("refund", error.reason, f"nothing is given back: {error}")
                return False
            self._stats.say("refund", error.reason, f"it is given back later: {error}")
            self.settle_later(reservation, cost)
            return None
        except BaseException as error:
            if is_in_doubt(error):
                self.settle_later(reservation, cost)
            raise
        return any(settled)  # a shard of which only a limit in shadow was asked may hold nothing

    def settle_later(self, reservation: Reservation, cost: int) -> None:
        """Keep this until Redis is asked about a subject again, or is back."""
        for home, one in reservation.by_home().items():
            self._refunds[home + one.id.encode()] = one, cost
        while len(self._refunds) > REFUNDS_LIMIT:
            self._refunds.popitem(last=False)
            self._stats.say("refund", "full", "too many wait for Redis: the oldest is given up")
        self.waits[REFUNDS] = 0.0
        self._stats.remind()

    def commit(self, reservation: Reservation) -> Operation[bool | None]:
        """Return whether the reservation could be refunded until now, and can't any more. None: not known.

        Redis away: False.
        """
        try:
            done = yield Once(
                [
                    (b"UNLINK", self._keys.reservation(reservation.id, home))
                    for home in reservation.by_home()
                ]
            )
        except RedisUnavailable as error:
            self._stats.say("commit", error.reason, f"a reservation stays as it was: {error}")
            return None if error.may_be_done else False
        return any(done)

    def tell_refunds(self, home: bytes = b"") -> Operation[None]:
        """Give back what could not be, and is not known to be; to this shard, if one is given.

        Raises RedisUnavailable.
        """
        while bite := self._owed_refunds(home):
            try:
                replies: Sequence[Any] = yield Once.apart(
                    [self._settlement(*one) for _, one in bite]
                )
            except RedisRefused as refused:
                replies = refused.replies
                if len(replies) != len(bite) or all(map(_is_unsettled, replies)):
                    raise
            for (name, _), reply in zip(bite, replies, strict=True):
                if not _is_unsettled(reply):
                    self._refunds.pop(name, None)
        self.waits.pop(REFUNDS, None)
        if self._refunds:  # one that came just now
            self.waits[REFUNDS] = 0.0

    def homes_of_refunds(self) -> set[bytes]:
        """Return the shards that have to hear of something to give back."""
        return {home_of(one.keys[0]) for one, _ in list(self._refunds.values())}

    def _owed_refunds(self, home: bytes) -> list[tuple[bytes, tuple[Reservation, int]]]:
        found = (
            pair for pair in list(self._refunds.items()) if not home or pair[0].startswith(home)
        )
        return list(islice(found, BITE))

    def _settlement(self, reservation: Reservation, cost: int) -> Command:
        """Return the command for a reservation of one shard."""
        home = home_of(reservation.keys[0])
        keys = (self._keys.reservation(reservation.id, home), *reservation.keys)
        over_ms = OVER_MS if reservation.local else 0
        numbers = [
            number
            for limit in reservation.counted
            for number in (limit.quota, limit.window * _US, self._requests.longest_window(limit))
        ]
        before = reservation.decision.cost
        return limit_settle(keys, reservation.at_us, before, cost, over_ms, *numbers)

    # Windows

    def remind(self) -> list[Command]:
        """Have the windows of limits compared now and then. Each flush of the counts calls this."""
        self._requests.remind()
        return []

    def _compare_windows(self) -> Operation[None]:
        """Write this process's windows and read the longest ones. A user without the right goes on without."""
        own = self._requests.own_windows()
        words = [word for name, window in own.items() for word in (name, window)]
        try:
            (longest,) = yield [limit_windows([self._keys.limit_windows], WINDOWS_LIMIT, *words)]
        except RedisRefused as refused:
            if not (refused.reason in OF_THE_COMMAND or self._keys.is_spread):
                raise
            self._stats.say("limits", refused.reason, f"windows can't be compared: {refused}")
        except RedisUnavailable:
            if not self._keys.is_spread:
                raise  # else the shard that is asked for hits may answer all the same: see remind
        else:
            self._requests.learn_windows(list(own), longest)
        if own == self._requests.own_windows():  # no other limit has come meanwhile
            self.waits.pop(WINDOWS, None)


def _is_unsettled(reply: Any) -> bool:
    """Return whether to send a command again: it was not answered, or refused by a server that cannot serve."""
    if isinstance(reply, Exception):
        return str(reply).partition(" ")[0].lower() not in REFUSED_FOR_GOOD
    return reply is None


def now_us() -> int:
    """Return time.monotonic() in whole µs."""
    return time.monotonic_ns() // 1_000
