"""The limits' operations: what they say to Redis, and when. limits.py gives them their two faces.

All limits of a request are one script (lua/limit_check.lua): all of them are consumed, or none, by the server's
clock. On a cluster the limits of one subject are in one shard; a request by several subjects may have several, and
over_shards.py decides about it.
While Redis is away each limit does what its `away` says: see without_redis.py. What was admitted here is charged in
an exchange of its own before Redis is asked about that subject again: see settling.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from stillroom.counted import LIMIT
from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidLimit, RedisUnavailable, is_in_doubt
from stillroom.keys import WOULD_DENY, Keys
from stillroom.known_bans import KnownBans
from stillroom.limits.asking import BANNED, OTHER_WIDTHS, RESERVATION
from stillroom.limits.decision import OK, TOO_MANY, Decision
from stillroom.limits.denials import REMEMBERED_S
from stillroom.limits.limit import Limit, check_cost, check_limits
from stillroom.limits.operating import Operating
from stillroom.limits.over_shards import LOOK, Outcome, OverShards, limits_without_redis, new_id
from stillroom.limits.remembering import Remembering
from stillroom.limits.request import QUIET, Request, Subject
from stillroom.limits.reservation import Reservation
from stillroom.limits.settling import BITE, REFUNDS, now_us
from stillroom.misuse import refuse_other
from stillroom.operation import Once, Operation, Pause
from stillroom.scripts import limit_check
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Breaker, Breakers, Command, Server, StateServer

# A denial is remembered, where what is reserved may be given back, by another process too.
RESERVED_S = 1.0
LONGEST_WAIT_S = 3_600.0
RESERVED = "what reserve() has returned, or hold() for its block"
_US = 1_000_000
_decision = tuple.__new__


class LimitsBody(Operating, Remembering, OverShards):
    """The operations. A driver runs them."""

    def __init__(
        self,
        settings: Settings,
        server: Server | StateServer,
        breaker: Breaker | Breakers,
        keys: Keys,
        stats: Stats,
        bans: KnownBans,
    ) -> None:
        super().__init__(settings, server, breaker, keys, stats, bans)
        stats.riders += [self._settling.remind, self._riding]

    def check(
        self,
        subject: Subject,
        limits: Sequence[Limit],
        cost: int = 1,
        *,
        route: str = "",
        meant: bool = True,
    ) -> Operation[Decision]:
        """Take `cost` from all these limits, or from none of them, and return the decision. One round trip.

        `subject`: an address, or kind → text, such as {"ip": "203.0.113.7", "user": "ann"}; each limit counts the
        kinds in its `by`. Without a name (None, or blank) the address counts. Texts are stored as HMACs only.
        An address in the setting limit_exempt is admitted without asking Redis.
        `cost` 0 consumes nothing, and is denied only if the subject is banned or over a limit that was lowered.
        `route` is the template of the path, for events. `meant=False`: the client did not ask for this itself, a
        page in its browser did; then a denial is not reported as an event. A subject that was just denied is denied
        from memory for up to 5 s. Raises InvalidLimit. Redis away: each limit does what its `away` says, and the
        decision is `degraded`; of bans hold those that some process of this machine knows of.
        """
        request = self._requests.make(subject, limits, cost, route, meant)
        if request.plan.in_flight:
            raise _holds(request)
        return self._decided(request)

    def wait(
        self,
        subject: Subject,
        limits: Sequence[Limit],
        cost: int = 1,
        *,
        timeout: Duration = 10.0,
        route: str = "",
    ) -> Operation[Decision]:
        """Wait until there is quota, then consume it. For calls that your app makes to an API with limits.

        Sleeps for at most `timeout` seconds (up to an hour). Returns a denial at once if waiting would take longer,
        or would not help: a ban, or a cost over a whole quota. Waiting is not reported as a denial. Several waiting
        callers are served in no order. Otherwise like `check`.
        """
        seconds = seconds_of("timeout", timeout, least=0, most=LONGEST_WAIT_S)
        limits = check_limits(limits)  # each try reads them
        request = self._requests.make(subject, limits, cost, route)
        if request.plan.in_flight:
            raise _holds(request)
        return self._waiting(subject, limits, cost, seconds, route)

    def peek(self, subject: Subject, limits: Sequence[Limit], cost: int = 1) -> Operation[Decision]:
        """Return what `check` would decide. It takes, counts and reports nothing.

        Raises InvalidLimit. Redis away: what this process knows by itself.
        """
        request = self._requests.make(subject, limits, cost, "")
        if request.exempt:
            return self._passed(request)
        if request.parts:
            outcome = yield from self._over(request, LOOK)
            return outcome.decision
        try:
            request = yield from self._settled(request, is_look=True)
            reply = yield from self._ask(limit_check.run(request.words(LOOK)))
            if reply[0] == OTHER_WIDTHS:
                request, reply = yield from self._again(request, reply, LOOK)
        except RedisUnavailable as error:
            return self._stand_in(request, error, take=False)
        return self._read(request, reply)

    def reserve(
        self,
        subject: Subject,
        limits: Sequence[Limit],
        cost: int = 1,
        *,
        route: str = "",
        meant: bool = True,
    ) -> Operation[Reservation]:
        """Consume the quota before the work is done; `refund` it afterwards if the work should not count.

        A login that succeeds is an example. Looking first and counting afterwards would let a hundred guesses
        through that are made at the same time. What is neither refunded nor committed stays consumed. If this call
        is cancelled or interrupted before it returns, what it took is given back. Otherwise like `check`.
        """
        return self._reserved(self._requests.make(subject, limits, cost, route, meant))

    def refund(self, reservation: Reservation) -> Operation[bool | None]:
        """Give back what a reservation took: once, and not after `commit`, `settle` or the longest window.

        True: it is given back. (What this process admitted while Redis was away is given back here first, and Redis
        is told before this process asks about the subject again.) False: it stays consumed, or was given back
        before. None: not known yet, because the reply was late or lost, or Redis is away. The refund is then
        repeated when Redis is back, unless this process has ended by then.
        """
        return self._settled_at(reservation, 0)

    def settle(self, reservation: Reservation, cost: int) -> Operation[bool | None]:
        """Charge, once, what the work cost in the end: for a price that is known afterwards (tokens, rows, bytes).

        Less than was reserved is given back; more is counted now, whatever the quota says, because it has been
        used. 0 refunds all. Otherwise like `refund`. Raises InvalidLimit for what no request can cost.
        """
        check_cost(cost)
        return self._settled_at(reservation, cost)

    def hold(
        self, subject: Subject, limits: Sequence[Limit], cost: int = 1, *, route: str = ""
    ) -> Operation[Reservation]:
        """Reserve, for a block that gives back what is in flight. Raises InvalidLimit where nothing is."""
        limits = check_limits(limits)
        request = self._requests.make(subject, limits, cost, route)
        if not request.plan.in_flight:
            name = limits[0].name if limits else "hold()"
            raise InvalidLimit(
                name, "hold() is for limits of what is in flight: Limit(…, in_flight=True)"
            )
        return self._reserved(request)

    def let_go(self, held: Reservation) -> Operation[None]:
        """Give back what is in flight of a reservation. What else it took stays consumed."""
        places = held.of([limit for limit in held.counted if limit.in_flight])
        yield from self.give_back(places)

    def give_back(self, places: Reservation) -> Operation[None]:
        """Give back what others may be waiting for, however little time the request has left for Redis."""
        yield from self._settled_at(places, 0, frees=True)

    def _settled_at(
        self, reservation: Reservation, cost: int, *, frees: bool = False
    ) -> Operation[bool | None]:
        if type(reservation) is not Reservation:
            refuse_other("reservation", reservation, Reservation, RESERVED)
        if not (reservation.id and reservation.keys):
            return False
        here: bool | None = None
        own: Collection[bytes] = ()
        if reservation.local:
            own = self._local.own(reservation.id, self._known_as(reservation))
            here = self._local.refund(
                *(reservation.id, cost, reservation.keys),
                may_be_known=reservation.may_be_known,
                now=now_us(),
            )
            if here is not None and not (here and reservation.may_be_known):
                self._denials.forget(reservation.keys)
                return here
        sent = time.monotonic_ns()
        settled = yield from self._settling.settle(reservation, cost, frees=frees)
        if not here and (settled or (settled is None and not reservation.local)):
            self._settled_since.append((reservation, cost, sent, own))
        self._denials.forget(reservation.keys)
        # The hits of this process are settled. Redis is told of the others if it may know any.
        return True if here else settled

    def commit(self, reservation: Reservation) -> Operation[bool | None]:
        """Keep what a reservation took for good. Return True if it could still be refunded, None if not known.

        Redis away: False.
        """
        refuse_other("reservation", reservation, Reservation, RESERVED)
        if not reservation.id:
            return False
        if reservation.local:
            return self._local.let_go(reservation.id)
        return (yield from self._settling.commit(reservation))

    def reset(self, subject: Subject, limits: Sequence[Limit]) -> Operation[None]:
        """Forget what this subject has used of these limits, and its denials; bans stay. For operators and tests.

        Other processes may still deny from memory for up to 5 s. Raises InvalidLimit. Redis away: RedisUnavailable.
        """
        request = self._requests.make(subject, limits, 0, "")
        if request.keys:  # Once: not what is counted after it
            logs = [part.keys for part in request.parts] or [request.logs]
            yield Once([(b"UNLINK", *_with_markers(some)) for some in logs if some])
        self._denials.forget((*request.bans, *request.keys))
        self._local.forget((*request.logs, *request.known_as))

    def deliver(self) -> Operation[int]:
        """Charge Redis with what was admitted here while it was away. Returns how many logs are left to tell.

        Happens by itself when Redis is back, and before this process asks about a subject again. Does not raise.
        """
        for home in self._settling.homes_of_refunds():
            with suppress(RedisUnavailable):  # the next call tries again
                yield from self._settling.tell_refunds(home)
        for _ in range(len(self._local.logs) // BITE + 1):
            try:
                if charges := self._local.owed(now_us(), (), BITE):
                    yield from self._settling.charge(charges)
            except RedisUnavailable:
                # A node of a cluster that is away keeps nothing from the others.
                if not self._keys.is_spread:
                    break
                self._local.put_last(charges)
            yield Pause(0)
        if self._local.logs or REFUNDS in self._settling.waits:
            self.stats.remind()
        return len(self._local.logs)

    # Deciding

    def _decided(self, request: Request) -> Operation[Decision]:
        if request.exempt:
            return self._passed(request)
        is_unknown = self._denials.has_none_of(request.denied_as)
        if not is_unknown and (denied := self._remembered(request)) is not None:
            if time.monotonic() > self._changes.due:
                yield from self._reading_changes()
            return denied
        self._count(request.plan.counted_as)
        if request.parts:
            return (yield from self._taken_over_shards(request, new_id())).decision
        asked_at, mark = self._denials.forgotten, object()
        try:
            self._flying.begin(request, mark)
            sent = time.monotonic()
            is_due = sent > self.stats.due or sent > self._changes.due
            if is_due or self._settling.waits or self._local.logs:
                request = yield from self._settled(request)
                unseen = self._unseen(request)
                sent = time.monotonic()
                reply = yield from self._ask(_taking(request, unseen))
            else:
                unseen = b"" if is_unknown else self._unseen(request)
                (reply,) = yield Once([_taking(request, unseen)])
            if reply[0] == OTHER_WIDTHS:
                request, reply = yield from self._again(request, reply, request.mode, unseen)
            return self._learned(request, reply, asked_at, sent)
        except RedisUnavailable as error:
            self._flying.end(mark)
            decision = self._stand_in(request, error, take=True)
            if not decision:
                self._count_denial(decision)
            yield from self._settling.tell_at_once(request, error)
            return decision
        finally:
            self._flying.end(mark)

    def _reserved(self, request: Request) -> Operation[Reservation]:
        if request.exempt:
            return Reservation(self._passed(request), ())
        is_unknown = self._denials.has_none_of(request.denied_as)
        if not is_unknown and (denied := self._remembered(request)) is not None:
            if time.monotonic() > self._changes.due:
                yield from self._reading_changes()
            return Reservation(denied, ())
        self._count(request.plan.counted_as)
        name = new_id()
        try:
            if request.parts:
                return (yield from self._taken_over_shards(request, name, is_held=True))
            return (yield from self._reserved_as(request, name))
        except BaseException as error:
            if is_in_doubt(error):
                yield from self._give_up(request, name)
            raise

    def _give_up(self, request: Request, name: str) -> Operation[None]:
        """Give back what a call that ends without its reply has taken, or takes yet: nobody else can."""
        self._local.refund(name)
        yield from self._settling.settle(_lost(request, name), 0, frees=True)

    def _reserved_as(self, request: Request, name: str) -> Operation[Reservation]:
        asked_at, mark = self._denials.forgotten, object()
        try:
            self._flying.begin(request, mark)
            request = yield from self._settled(request)
            sent = time.monotonic()
            unseen, key = self._unseen(request), self._keys.reservation(name, request.home)
            reply = yield from self._ask(_taking(request, unseen, key), RESERVATION)
            if reply[0] == OTHER_WIDTHS:
                request, reply = yield from self._again(request, reply, request.mode, unseen, key)
            decision = self._learned(request, reply, asked_at, sent, RESERVED_S)
            held = name if decision else ""
            at = decision.now_us
            return Reservation(decision, request.logs, held, at, counted=request.counted)
        except RedisUnavailable as error:
            self._flying.end(mark)
            decision = self._stand_in(request, error, take=True, id=name)
            yield from self._settling.tell_at_once(request, error)
            if not decision:
                self._count_denial(decision)
                if error.may_be_done:  # then Redis may have admitted it
                    self._settling.settle_later(_lost(request, name), 0)
                return Reservation(decision, ())
            return Reservation(
                *(decision, request.logs, name),
                local=True,
                counted=request.counted,
                may_be_known=error.may_be_done,
            )
        finally:
            self._flying.end(mark)

    def _waiting(
        self, subject: Subject, limits: Sequence[Limit], cost: int, timeout: float, route: str
    ) -> Operation[Decision]:
        give_up_at = time.monotonic() + timeout
        while True:
            request = self._requests.make(subject, limits, cost, route)
            decision = yield from self._asked_quietly(request)
            wait = decision.retry_after
            if decision or decision.banned or wait is None or time.monotonic() + wait > give_up_at:
                return decision
            # Not all at the same time: one of them will find room.
            yield Pause(wait + random.uniform(0.001, 0.02 + wait / 20))

    def _asked_quietly(self, request: Request) -> Operation[Decision]:
        """Return a decision that denies nobody: no event, no count and no memory of it."""
        if request.exempt:
            return self._passed(request)
        name, sent = new_id(), time.monotonic()
        try:
            self._flying.begin(request, name)
            if request.parts:
                outcome = yield from self._over(request, QUIET, name)
                self._local.let_go(name)
                for one in outcome.verdicts:
                    if one.error is None and not one.ban:
                        self._know(one.part, one.said, one.now_us, sent)
                self._tell_of_degraded(limits_without_redis(outcome.verdicts), outcome.errors)
                return outcome.decision
            request = yield from self._settled(request)
            reply = yield from self._ask(limit_check.run(request.words(QUIET)))
            if reply[0] == OTHER_WIDTHS:
                request, reply = yield from self._again(request, reply, QUIET)
            decision = self._read(request, reply)
            if decision.said:
                self._know(request, reply[2:], reply[1], sent)
            return decision
        except RedisUnavailable as error:
            self._flying.end(name)
            return self._stand_in(request, error, take=True)
        finally:
            self._flying.end(name)

    def _taken_over_shards(
        self, request: Request, name: str, *, is_held: bool = False
    ) -> Operation[Reservation]:
        """Take the parts of a request from their shards. `is_held`: they may be given back later."""
        asked_at = self._denials.forgotten
        try:
            self._flying.begin(request, name)
            sent = time.monotonic()
            kept_as = RESERVATION if is_held else ""
            taking = self._over(request, request.mode, name, is_held=is_held, kept_as=kept_as)
            outcome = yield from taking
            longest = RESERVED_S if is_held else REMEMBERED_S
            self._learn_of_shards(outcome, asked_at, sent, longest)
        finally:  # not before: until then nothing else here knows of these hits
            self._flying.end(name)
        request, decision = outcome.request, outcome.decision
        if not (is_held and decision):
            self._local.let_go(name)
            return Reservation(decision, ())
        is_local = bool(outcome.errors)
        return Reservation(
            *(decision, request.logs, name),
            local=is_local,
            counted=request.counted,
            may_be_known=is_local,
        )

    def _learn_of_shards(
        self, outcome: Outcome, asked_at: int, sent: float, longest: float
    ) -> None:
        """Take in what each shard said."""
        request, decision = outcome.request, outcome.decision
        for one in outcome.verdicts:
            if one.error is not None:
                continue
            if one.ban:
                self._bans.learn(one.part.bans[one.ban - 1], self._server.now_ms() + one.banned_ms)
            elif self._bans.until:
                self._bans.forget_all(one.part.bans)
            self._know(one.part, one.said, one.now_us, sent)
        self._tell_of_degraded(limits_without_redis(outcome.verdicts), outcome.errors)
        if decision.status != OK:
            self._count_denial(decision)
            if asked_at == self._denials.forgotten and not outcome.errors:
                self._remember(request, decision, longest, sent)
        if request.plan.letters and not outcome.errors:
            self._tell_of_shadows(decision)

    def _settled(self, request: Request, *, is_look: bool = False) -> Operation[Request]:
        """Return the request once no hit of it is owed to Redis. A look makes no limit known to other processes.

        Raises RedisUnavailable if this process decides.
        """
        if self._breaker.is_open:  # no need to put the owed hits together first
            raise RedisUnavailable("breaker", self._breaker.reason)
        if self._settling.waits or self._local.logs:
            return (yield from self._settling.before(request, is_look))
        return request

    def _passed(self, request: Request) -> Decision:
        """Return the decision for a client that no limit counts."""
        return Decision((), OK, request.cost, self._server.now_us())

    def _learned(
        self,
        request: Request,
        reply: list[int],
        asked_at: int,
        sent: float,
        longest: float = REMEMBERED_S,
    ) -> Decision:
        """Return the decision in this reply, and what to remember of it for how many seconds."""
        decision = self._read(request, reply)
        if reply[0] == BANNED:
            # Of a cluster one clock is looked at.
            until_ms = self._server.now_ms() if request.home else reply[1] // 1_000
            self._bans.learn(request.bans[reply[3] - 1], until_ms + reply[2])
        elif self._bans.until:
            self._bans.forget_all(request.bans)
        if request.plan.counted_away and decision.said:  # as _know: each check comes here
            self._local.remember(request.known_as, reply[2:], now_us(), reply[1], int(sent * _US))
        if decision.status != OK:
            self._count_denial(decision)
            if asked_at == self._denials.forgotten:
                self._remember(request, decision, longest, sent)
        if request.plan.letters:
            self._tell_of_shadows(decision)
        return decision

    def _know(self, request: Request, said: Sequence[int], server_us: int, sent: float) -> None:
        """Remember what Redis said of these logs, for the case that it goes away."""
        if request.plan.counted_away and said:
            self._local.remember(request.known_as, said, now_us(), server_us, int(sent * _US))

    def _tell_of_shadows(self, decision: Decision) -> None:
        """Count what limits in shadow would have denied, and log it now and then."""
        for limit in decision.would_deny:
            # No more names than are compared: a function of the request may make up any.
            name = limit.name if self._requests.has_window(limit.name) else "others"
            self.stats.counts[WOULD_DENY + name] += 1
            said = f"would have denied a request: {limit.quota} in {limit.window} s were used"
            self.stats.say("limits in shadow", name, f"{limit.name} {said}")

    def _read(self, request: Request, reply: list[int]) -> Decision:
        limits, cost = request.limits, request.cost
        verdict, now_us, *said = reply
        if verdict == BANNED:
            return Decision(limits, TOO_MANY, cost, now_us, wait_us=max(0, said[0]) * 1_000)
        told = request.folded(said) if request.twins else said
        status = OK if verdict else TOO_MANY
        return _decision(Decision, (limits, status, cost, now_us, told, 0, 0, ""))

    def _count_denial(self, decision: Decision) -> None:
        """Count a denial, and one of each limit that denied. A ban counts for no limit."""
        self.stats.counts["limit_denials"] += 1
        for limit in decision.violated:
            self.stats.counts[self.stats.counted_as(LIMIT, "denials", limit.name)] += 1


def _taking(request: Request, unseen: bytes, reservation: bytes = b"") -> Command:
    if request.taking and not unseen and not reservation:
        return request.taking
    return limit_check.run(request.words(request.mode, unseen, reservation))


def _lost(request: Request, name: str) -> Reservation:
    """Return the reservation of a call whose reply did not come."""
    about = Decision(request.limits, OK, request.cost, 0)
    return Reservation(about, request.logs, name, local=True, counted=request.counted)


def _holds(request: Request) -> InvalidLimit:
    """Return the error for a limit of requests in flight, because a check would never give the place back."""
    return InvalidLimit(
        request.plan.in_flight, "it limits requests in flight: use hold(), or reserve and refund"
    )


def _with_markers(keys: Iterable[bytes]) -> list[bytes]:
    """Return the logs and their markers."""
    found: list[bytes] = []
    for key in keys:
        found += (key, key + b"!near", key + b"!born", key[: key.rindex(b":") + 1] + b"!denied")
    return found
