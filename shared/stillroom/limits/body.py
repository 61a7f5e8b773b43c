"""The limits' operations: what they say to Redis, and when. limits.py gives them their two faces.

All limits of a request are one script (lua/limit_check.lua): all of them are consumed, or none, by the server's
clock. It takes the keys of several subjects at once: what holds the limits is never a cluster (see settings).
While Redis is away each limit does what its `away` says: see local.py. What was admitted here is charged in an
exchange of its own before Redis is asked about that subject again: see settling.py.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.keys import Keys
from stillroom.limits.decision import NEVER, OK, PARTS, TOO_MANY, UNAVAILABLE, UNTOLD, Decision
from stillroom.limits.denials import REMEMBERED_S, Denial, Denials
from stillroom.limits.limit import Limit
from stillroom.limits.local import LocalLimits
from stillroom.limits.request import Request, Requests, Subject
from stillroom.limits.reservation import Reservation
from stillroom.limits.settling import BITE, Settling
from stillroom.operation import Once, Operation, Pause
from stillroom.replicas import kept
from stillroom.scripts import limit_check
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Breaker, Command, Server, reset_after_fork

TRY_AGAIN_US = 1_000_000  # Redis is looked for about this often

_BANNED = -1  # what limit_check replies first; else 1 admitted, 0 denied
_US = 1_000_000


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
        self._settling = Settling(settings, keys, self._requests, self._local, stats)
        # What Redis is being asked for: it may admit that, and nobody here knows yet.
        self._flying: dict[object, Request] = {}
        stats.riders.append(self._settling.remind)
        reset_after_fork(self._denials)
        reset_after_fork(self._local)
        reset_after_fork(self._settling)

    def check(
        self, subject: Subject, limits: Sequence[Limit], cost: int = 1, *, route: str = ""
    ) -> Operation[Decision]:
        """Consume `cost` of all these limits, or of none of them: the decision says which. One round trip.

        `subject`: an address, or kind → text, such as {"ip": "203.0.113.7", "user": "ann"}; each limit counts the
        kinds in its `by`. Users and other texts are stored as an HMAC only; an empty one is a name like any other.
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
        try:
            request = yield from self._settled(request)
            reply = yield from self._ask(limit_check.run(request.words(b"look")))
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

    def refund(self, reservation: Reservation) -> Operation[bool | None]:
        """Give back what was consumed: once, and not after `commit` or the longest window.

        True: it is given back. What this process admitted while Redis was away may be given back here, and Redis
        hears of it before this process asks about the subject again. False: it stays consumed, or was given back
        before. None: not known, the reply was late or lost; Redis is asked again by itself.
        Redis away: False for what Redis holds; ask again when it is back.
        """
        if not reservation.id:
            return False
        here: bool | None = None
        if reservation.local:
            here = self._local.refund(reservation.id)
            if here is not None and not (here and reservation.may_be_known):
                self._denials.forget(reservation.keys)
                return here
        refunded = yield from self._settling.refund(reservation)
        self._denials.forget(reservation.keys)
        # What was given back here is, and Redis is told of the rest if it may know of any.
        return True if here else refunded

    def commit(self, reservation: Reservation) -> Operation[bool | None]:
        """It counts: from now on it can't be refunded. True if that was still possible; None: not known.

        Redis away: False.
        """
        if not reservation.id:
            return False
        if reservation.local:
            return self._local.let_go(reservation.id)
        return (yield from self._settling.commit(reservation))

    def reset(self, subject: Subject, limits: Sequence[Limit]) -> Operation[None]:
        """Forget what this subject has used of these limits, and its denials; bans stay. For operators and tests.

        Other processes may deny from memory for 5 s more. Raises InvalidLimit. Redis away: RedisUnavailable.
        """
        request = self._requests.make(subject, limits, 0, "")
        if request.keys:
            yield [(b"UNLINK", *_with_markers(request.logs))]
        self._denials.forget((*request.bans, *request.keys))
        self._local.forget((*request.logs, *request.known_as))

    def deliver(self) -> Operation[int]:
        """Charge Redis with what was admitted here while it was away. Returns how many logs are left to tell.

        Happens by itself when Redis is back, and before this process asks about a subject again. Does not raise.
        """
        try:
            yield from self._settling.tell_refunds()
            while charges := self._local.owed(_now_us(), (), BITE):
                yield from self._settling.charge(charges)
                yield Pause(0)
        except RedisUnavailable:
            pass  # the next call tries again
        return len(self._local.logs)

    # Deciding

    def _decided(self, request: Request) -> Operation[Decision]:
        self.stats.counts["limit_checks"] += 1
        if self._denials.found and (denied := self._remembered(request)) is not None:
            return denied
        asked_at, mark = self._denials.forgotten, object()
        self._flying[mark] = request
        try:
            if self._settling.waits or self._local.logs or time.monotonic() > self.stats.due:
                request = yield from self._settled(request)
                reply = yield from self._ask(self._taking(request))
            else:
                (reply,) = yield Once([self._taking(request)])
            return self._learned(request, reply, asked_at)
        except RedisUnavailable as error:
            del self._flying[mark]
            decision = self._stand_in(request, error, take=True)
            yield from self._settling.tell_at_once(request, error)
            return decision
        finally:
            self._flying.pop(mark, None)

    def _reserved(self, request: Request) -> Operation[Reservation]:
        self.stats.counts["limit_checks"] += 1
        if self._denials.found and (denied := self._remembered(request)) is not None:
            return Reservation(denied, request.keys)
        name, asked_at, mark = secrets.token_urlsafe(12), self._denials.forgotten, object()
        self._flying[mark] = request
        try:
            request = yield from self._settled(request)
            takes = self._taking(request, self._reservation(name))
            reply = yield from self._ask(takes, "a reservation")
            decision = self._learned(request, reply, asked_at)
            held = name if decision else ""
            at = decision.now_us
            return Reservation(decision, request.logs, held, at, counted=request.counted)
        except RedisUnavailable as error:
            del self._flying[mark]
            decision = self._stand_in(request, error, take=True, id=name)
            yield from self._settling.tell_at_once(request, error)
            if not decision:
                return Reservation(decision, request.keys)
            return Reservation(
                *(decision, request.logs, name),
                local=True,
                counted=request.counted,
                may_be_known=error.may_be_done,
            )
        finally:
            self._flying.pop(mark, None)

    def _settled(self, request: Request) -> Operation[Request]:
        """The request, once nothing of it is owed to Redis. Raises RedisUnavailable where this process decides."""
        if self._breaker.is_open:  # what is owed need not be put together to find that out
            raise RedisUnavailable("breaker", self._breaker.reason)
        if self._settling.waits or self._local.logs:
            return (yield from self._settling.before(request))
        return request

    def _learned(self, request: Request, reply: list[int], asked_at: int) -> Decision:
        """The decision in this reply, and what there is to remember of it."""
        decision = self._read(request, reply)
        if request.plan.counted_away and decision.said:
            self._local.remember(request.known_as, reply[2:], _now_us(), reply[1])
        if decision.status != OK:
            self.stats.counts["limit_denials"] += 1
            if asked_at == self._denials.forgotten:
                self._remember(request, decision)
        return decision

    def _read(self, request: Request, reply: list[int]) -> Decision:
        limits, cost, verdict, now_us = request.limits, request.cost, reply[0], reply[1]
        if verdict == _BANNED:
            return Decision(limits, TOO_MANY, cost, now_us, wait_us=max(0, reply[2]) * 1_000)
        said = request.folded(reply[2:])
        return Decision(limits, OK if verdict else TOO_MANY, cost, now_us, said)

    def _stand_in(
        self, request: Request, error: RedisUnavailable, *, take: bool, id: str = ""
    ) -> Decision:
        """What this process decides by itself."""
        self.stats.counts["limit_degraded"] += 1
        limits, reason = request.limits, error.reason
        self.stats.say("limits", reason, f"decided without Redis: {error}")
        if take and reason == "breaker":
            self._settling.was_away()
        status, said = self._decide_here(request, take=take, id=id)
        if take and status != OK:
            self.stats.counts["limit_denials"] += 1
        wait_us = TRY_AGAIN_US if status == UNAVAILABLE else 0
        now_us = self._server.now_us()
        return Decision(
            *(limits, status, request.cost, now_us, request.folded(said)),
            wait_us=wait_us,
            degraded=reason,
        )

    def _decide_here(self, request: Request, *, take: bool, id: str) -> tuple[int, tuple[int, ...]]:
        limits = request.limits
        if self.settings.limits_strict_503 and any(limit.away == "strict" for limit in limits):
            return UNAVAILABLE, ()
        flying = [(other.logs, other.cost) for other in list(self._flying.values())]
        return self._local.decide(
            *(request.logs, request.counted, request.cost, _now_us()),
            take=take,
            id=id,
            flying=flying,
            known=request.known_as,
        )

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

    def _ask(self, command: Command, kept_as: str = "") -> Operation[Any]:
        """The reply. Counts that are due ride along behind. `kept_as`: see stillroom/replicas.py."""
        flush: list[Command] = []
        if time.monotonic() > self.stats.due:
            flush = self.stats.flush(self._server.now_ms())
        try:
            batch = Once([command, *flush])
            if kept_as:
                reply, *_ = yield from kept(batch, self.settings, self.stats, kept_as)
            else:
                reply, *_ = yield batch
        except RedisRefused as refused:
            # A server that is full refuses to count, not to decide.
            reply = refused.replies[0] if refused.replies else refused
            if isinstance(reply, Exception):
                raise
        return reply

    def _taking(self, request: Request, reservation: bytes = b"") -> Command:
        unseen = self._denials.take_unseen(request.keys) if self._denials.found else b""
        if request.taking and not unseen and not reservation:
            return request.taking
        return limit_check.run(request.words(b"take", unseen, reservation))


def _said_of(denial: Denial, request: Request) -> tuple[int, ...]:
    """What is remembered of the limit that denied; of the others nothing, they may be another subject's."""
    said: list[int] = []
    for key, limit in zip(request.keys, request.limits, strict=True):
        found = key in denial.keys and limit == denial.limit
        place = PARTS * denial.keys.index(key) if found else 0
        said += denial.decision.said[place : place + PARTS] if found else UNTOLD
    return tuple(said)


def _with_markers(keys: Iterable[bytes]) -> list[bytes]:
    """The logs, and what stands beside them."""
    found: list[bytes] = []
    for key in keys:
        found += (key, key + b"!near", key + b"!born", key[: key.rindex(b":") + 1] + b"!denied")
    return found


def _long(wait_us: int) -> float:
    return float("inf") if wait_us == NEVER else float(wait_us)


def _now_us() -> int:
    return time.monotonic_ns() // 1_000
