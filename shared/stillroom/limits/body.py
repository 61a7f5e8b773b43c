"""The limits' operations: what they say to Redis, and when. limits.py gives them their two faces.

All limits of a request are one script (lua/limit_check.lua): all of them are consumed, or none, by the server's
clock. It takes the keys of several subjects at once: what holds the limits is never a cluster (see settings).
While Redis is away each limit does what its `away` says: see local.py.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.keys import Keys
from stillroom.limits.decision import NEVER, OK, PARTS, TOO_MANY, UNAVAILABLE, UNTOLD, Decision
from stillroom.limits.denials import REMEMBERED_S, Denial, Denials
from stillroom.limits.limit import Limit
from stillroom.limits.local import Charge, LocalLimits
from stillroom.limits.request import Request, Requests, Subject
from stillroom.operation import Once, Operation, Pause
from stillroom.scripts import limit_charge, limit_check, limit_refund
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Breaker, Command, Server, reset_after_fork

BITE = 100  # charges in one batch …
RIDING = 20  # … and in front of a request
TRY_AGAIN_US = 1_000_000  # Redis is looked for about this often

_BANNED = -1  # what limit_check replies first; else 1 admitted, 0 denied
_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Reservation:
    """Quota that was consumed and may be given back, once: see `reserve`. True if there was enough."""

    decision: Decision
    keys: tuple[bytes, ...]
    id: str = ""
    at_us: int = 0
    local: bool = False  # made while Redis was away

    def __bool__(self) -> bool:
        return self.decision.allowed

    @property
    def allowed(self) -> bool:
        return self.decision.allowed


class LimitsBody:
    """The operations. A driver runs them."""

    def __init__(
        self, settings: Settings, server: Server, breaker: Breaker, keys: Keys, stats: Stats
    ) -> None:
        self.settings = settings
        self.stats = stats
        self._server = server
        self._breaker = breaker
        self._reservation = keys.reservation
        self._requests = Requests(settings, keys)
        self._denials = Denials(settings.limits_memory)
        self._local = LocalLimits(settings.processes, settings.local_limits, settings.limits_memory)
        reset_after_fork(self._denials)
        reset_after_fork(self._local)

    def check(
        self, subject: Subject, limits: Sequence[Limit], cost: int = 1, *, route: str = ""
    ) -> Operation[Decision]:
        """Consume `cost` of all these limits, or of none of them: the decision says which. One round trip.

        `subject`: an address, or kind → text, such as {"ip": "203.0.113.7", "user": "ann"}; each limit counts the
        kinds in its `by`. Who has no name (None, or blank) is counted by address. Texts are stored as an HMAC only.
        An address in the setting limit_exempt is admitted, and nobody asks Redis.
        `cost` 0 consumes nothing, and is denied only to who is banned or over a limit that was lowered. `route` is
        the template of the path, for events. Who was denied a moment ago is denied from memory for up to 5 s.
        Raises InvalidLimit. Redis away: each limit does what its `away` says, and the decision is `degraded`.
        """
        return self._decided(self._requests.make(subject, limits, cost, route))

    def peek(self, subject: Subject, limits: Sequence[Limit], cost: int = 1) -> Operation[Decision]:
        """What `check` would decide. Consumes, counts and tells nothing.

        Raises InvalidLimit. Redis away: what this process knows by itself.
        """
        request = self._requests.make(subject, limits, cost, "")
        if request.exempt:
            return self._passed(request)
        try:
            reply = yield from self._ask(limit_check.run(request.words(b"look")), request.keys)
        except RedisUnavailable as error:
            return self._stand_in(request, error, take=False)
        return self._read(request, reply)

    def reserve(
        self, subject: Subject, limits: Sequence[Limit], cost: int = 1, *, route: str = ""
    ) -> Operation[Reservation]:
        """Consume first, then do the work, and `refund` if it should not have counted: a login that succeeds.

        To look, work and count afterwards would let a hundred guesses through that are made at the same time.
        What is neither refunded nor committed stays consumed. Otherwise like `check`.
        """
        return self._reserved(self._requests.make(subject, limits, cost, route))

    def refund(self, reservation: Reservation) -> Operation[bool]:
        """Give back what was consumed. True if it was, now: once, and not after `commit` or the longest window.

        Redis away: False, it stays consumed. What was consumed while it was away can be refunded until Redis
        is back and has been told of it.
        """
        if not reservation.id:
            return False
        if reservation.local:
            refunded = self._refund_here(reservation)
        else:
            refunded = yield from self._told("refund", self._refunding(reservation))
        self._denials.forget(reservation.keys)
        return refunded

    def commit(self, reservation: Reservation) -> Operation[bool]:
        """It counts: from now on it can't be refunded. True if that was still possible. Redis away: False."""
        if not reservation.id:
            return False
        if reservation.local:
            return self._local.let_go(reservation.id)
        return (yield from self._told("commit", (b"UNLINK", self._reservation(reservation.id))))

    def reset(self, subject: Subject, limits: Sequence[Limit]) -> Operation[None]:
        """Forget what this subject has used of these limits, and its denials; bans stay. For operators and tests.

        Other processes may deny from memory for 5 s more. Raises InvalidLimit. Redis away: RedisUnavailable.
        """
        request = self._requests.make(subject, limits, 0, "")
        if request.keys:
            yield [(b"UNLINK", *_with_markers(request.keys))]
        self._denials.forget((*request.bans, *request.keys))
        self._local.forget(request.keys)

    def deliver(self) -> Operation[int]:
        """Charge Redis with what was admitted here while it was away. Returns how many logs are left to tell.

        Happens by itself when Redis is back, and before this process asks about a subject again. Does not raise.
        """
        while charges := self._local.owed(_now_us(), (), BITE):
            try:
                yield from self._charge(charges)
            except RedisUnavailable:
                break
            yield Pause(0)
        return len(self._local.logs)

    # Deciding

    def _decided(self, request: Request) -> Operation[Decision]:
        if request.exempt:
            return self._passed(request)
        self.stats.counts["limit_checks"] += 1
        if self._denials.found and (denied := self._remembered(request)) is not None:
            return denied
        asked_at = self._denials.forgotten
        try:
            if self._local.logs or time.monotonic() > self.stats.due:
                reply = yield from self._ask(self._taking(request), request.keys)
            else:
                (reply,) = yield Once([self._taking(request)])
        except RedisUnavailable as error:
            return self._stand_in(request, error, take=True)
        return self._learned(request, reply, asked_at)

    def _reserved(self, request: Request) -> Operation[Reservation]:
        if request.exempt:
            return Reservation(self._passed(request), ())
        self.stats.counts["limit_checks"] += 1
        if self._denials.found and (denied := self._remembered(request)) is not None:
            return Reservation(denied, request.keys)
        name, asked_at = secrets.token_urlsafe(12), self._denials.forgotten
        command = self._taking(request, self._reservation(name))
        try:
            reply = yield from self._ask(command, request.keys)
        except RedisUnavailable as error:
            return self._reserved_here(request, error, name)
        decision = self._learned(request, reply, asked_at)
        return Reservation(decision, request.keys, name if decision else "", decision.now_us)

    def _reserved_here(self, request: Request, error: RedisUnavailable, name: str) -> Reservation:
        at = _now_us()
        decision = self._stand_in(request, error, take=True)
        if not decision:
            return Reservation(decision, request.keys)
        self._local.hold(name)
        return Reservation(decision, request.keys, name, at, local=True)

    def _passed(self, request: Request) -> Decision:
        """Of a client that no limit counts."""
        return Decision((), OK, request.cost, self._server.now_us())

    def _learned(self, request: Request, reply: list[int], asked_at: int) -> Decision:
        """The decision in this reply, and what there is to remember of it."""
        decision = self._read(request, reply)
        if request.plan.counted_away and decision.said:
            self._local.remember(request.keys, decision.said, _now_us())
        if decision.status != OK:
            self.stats.counts["limit_denials"] += 1
            if asked_at == self._denials.forgotten:
                self._remember(request, decision)
        return decision

    def _read(self, request: Request, reply: list[int]) -> Decision:
        limits, cost, verdict, now_us = request.limits, request.cost, reply[0], reply[1]
        if verdict == _BANNED:
            return Decision(limits, TOO_MANY, cost, now_us, wait_us=max(0, reply[2]) * 1_000)
        return Decision(limits, OK if verdict else TOO_MANY, cost, now_us, reply[2:])

    def _stand_in(self, request: Request, error: RedisUnavailable, *, take: bool) -> Decision:
        """What this process decides by itself."""
        self.stats.counts["limit_degraded"] += 1
        limits, reason = request.limits, error.reason
        self.stats.say("limits", reason, f"decided without Redis: {error}")
        status, said = self._decide_here(request, take=take)
        if take and status != OK:
            self.stats.counts["limit_denials"] += 1
        wait_us = TRY_AGAIN_US if status == UNAVAILABLE else 0
        now_us = self._server.now_us()
        return Decision(
            *(limits, status, request.cost, now_us, said), wait_us=wait_us, degraded=reason
        )

    def _decide_here(self, request: Request, *, take: bool) -> tuple[int, tuple[int, ...]]:
        limits = request.limits
        if self.settings.limits_strict_503 and any(limit.away == "strict" for limit in limits):
            return UNAVAILABLE, ()
        return self._local.decide(request.keys, limits, request.cost, _now_us(), take=take)

    # Denials that are remembered

    def _remembered(self, request: Request) -> Decision | None:
        now = time.monotonic()
        limits, keys, cost = request.limits, request.keys, request.cost
        denial = self._denials.find(request.bans, keys, limits, cost, now)
        if denial is None:
            return None
        denial.unseen += 1
        self.stats.counts["limit_denials"] += 1
        self.stats.counts["limit_cached"] += 1
        before, age_us = denial.decision, int((now - denial.at) * _US)
        said = before.said
        if said and (denial.keys != keys or before.limits != limits):
            said = _said_of(denial, request)
        return Decision(limits, TOO_MANY, cost, before.now_us, said, age_us, before.wait_us)

    def _remember(self, request: Request, decision: Decision) -> None:
        now = time.monotonic()
        if decision.banned:
            key, limit, wait_us = request.bans[0], None, float(decision.wait_us)
        else:
            waits = [_long(wait_us) for wait_us in decision.said[2::PARTS]]
            number = waits.index(max(waits))
            key, limit, wait_us = request.keys[number], decision.limits[number], waits[number]
        until = now + min(wait_us / _US, REMEMBERED_S)
        self._denials.add(key, Denial(decision, request.keys, limit, now, until))

    # Asking

    def _ask(self, command: Command, keys: Sequence[bytes]) -> Operation[Any]:
        """The reply. In front goes what is owed, by these logs and some others; behind, counts that are due."""
        if self._breaker.is_open:  # what is owed need not be put together to find that out
            raise RedisUnavailable("breaker", self._breaker.reason)
        charges = self._local.owed(_now_us(), keys, RIDING) if self._local.logs else []
        flush: list[Command] = []
        if time.monotonic() > self.stats.due:
            flush = self.stats.flush(self._server.now_ms())
        replies = yield from self._charge(charges, [command], flush)
        return replies[len(charges)]

    def _charge(
        self, charges: list[Charge], commands: Sequence[Command] = (), flush: Sequence[Command] = ()
    ) -> Operation[list[Any]]:
        """The replies, which begin with those to the charges."""
        told = False
        try:
            replies: list[Any] = yield Once([*map(_charging, charges), *commands, *flush])
            told = True
        except RedisRefused as refused:
            # A server that is full refuses to count, not to decide.
            replies = refused.replies[: len(charges) + len(commands)]
            if any(isinstance(reply, Exception) for reply in replies):
                raise
            told = True
        finally:
            self._local.settle(charges, _now_us(), told=told)
        return replies

    def _told(self, what: str, command: Command) -> Operation[bool]:
        try:
            (done,) = yield [command]
        except RedisUnavailable as error:
            self.stats.say(what, error.reason, f"a reservation stays as it was: {error}")
            return False
        return bool(done)

    def _taking(self, request: Request, reservation: bytes = b"") -> Command:
        unseen = self._denials.take_unseen(request.keys) if self._denials.found else b""
        if request.taking and not unseen and not reservation:
            return request.taking
        return limit_check.run(request.words(b"take", unseen, reservation))

    def _refunding(self, reservation: Reservation) -> Command:
        decision = reservation.decision
        windows = [_us(limit.window) for limit in decision.limits]
        keys = (self._reservation(reservation.id), *reservation.keys)
        return limit_refund(keys, reservation.at_us, decision.cost, *windows)

    def _refund_here(self, reservation: Reservation) -> bool:
        if not self._local.let_go(reservation.id):
            return False
        return self._local.refund(reservation.keys, reservation.decision.cost, reservation.at_us)


def _said_of(denial: Denial, request: Request) -> tuple[int, ...]:
    """What is remembered of the limit that denied; of the others nothing, they may be another subject's."""
    said: list[int] = []
    for key, limit in zip(request.keys, request.limits, strict=True):
        found = key in denial.keys and limit == denial.limit
        place = PARTS * denial.keys.index(key) if found else 0
        said += denial.decision.said[place : place + PARTS] if found else UNTOLD
    return tuple(said)


def _charging(charge: Charge) -> Command:
    limit = charge.limit
    numbers = (charge.hits, charge.age_us, limit.quota, _us(limit.window))
    return limit_charge([charge.key], *numbers)


def _with_markers(keys: Iterable[bytes]) -> list[bytes]:
    """The logs, and what stands beside them."""
    found: list[bytes] = []
    for key in keys:
        found += (key, key + b"!near", key[: key.rindex(b":") + 1] + b"!denied")
    return found


def _long(wait_us: int) -> float:
    return float("inf") if wait_us == NEVER else float(wait_us)


def _us(seconds: int) -> int:
    return seconds * _US


def _now_us() -> int:
    return time.monotonic_ns() // 1_000
