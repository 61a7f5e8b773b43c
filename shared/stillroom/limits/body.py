"""The limits' operations: what they say to Redis, and when. limits.py gives them their two faces.

All limits of a request are one script (lua/limit_check.lua): all of them are consumed, or none, by the server's
clock. It takes the keys of several subjects at once: what holds the limits is never a cluster (see settings).
While Redis is away each limit does what its `away` says: see local.py.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from stillroom import pepper
from stillroom.errors import InvalidLimit, RedisRefused, RedisUnavailable
from stillroom.keys import Keys
from stillroom.limits.decision import NEVER, OK, PARTS, TOO_MANY, UNAVAILABLE, UNTOLD, Decision
from stillroom.limits.denials import REMEMBERED_S, Denial, Denials
from stillroom.limits.identity import CROWD, Crowd
from stillroom.limits.limit import Limit, check_cost
from stillroom.limits.local import Charge, LocalLimits
from stillroom.operation import Once, Operation, Pause
from stillroom.scripts import limit_charge, limit_check, limit_refund
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.subject import hidden, is_private, site_of, subject_of
from stillroom.wire import Command, Server, reset_after_fork

log = logging.getLogger("stillroom.limits")

Subject = str | Mapping[str, str | None]

CLIENTS = 8_192  # addresses whose keys are remembered
PLANS = 1_024  # sets of limits
ROUTE_LIMIT = 200  # characters, in an event
BITE = 100  # charges in one batch …
RIDING = 20  # … and in front of a request
TRY_AGAIN_US = 1_000_000  # Redis is looked for about this often

_ADMITTED, _BANNED = 1, -1  # what limit_check replies first
_TAKE, _LOOK = b"take", b"look"
_US = 1_000_000


class Client(NamedTuple):
    """An address, as the keys name it."""

    subject: str
    prefix: bytes
    bans: tuple[bytes, ...]
    fields: tuple[bytes, ...]  # of an event
    private: bool


class Plan(NamedTuple):
    """What is the same each time these limits are asked for."""

    limits: tuple[Limit, ...]
    names: tuple[bytes, ...]
    numbers: tuple[bytes, ...]  # quota, window µs, quota …
    how_many: bytes
    kinds: frozenset[str]
    only_ip: bool
    counted_away: bool  # what Redis says of them matters while it is away


class Request(NamedTuple):
    """One request, in terms of Redis."""

    plan: Plan
    bans: tuple[bytes, ...]
    keys: tuple[bytes, ...]  # a log for each limit
    cost: int
    fields: tuple[bytes, ...]  # of an event


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

    def __init__(self, settings: Settings, server: Server, keys: Keys, stats: Stats) -> None:
        self.settings = settings
        self.stats = stats
        self._server = server
        self._keys = keys
        self._pepper = b""
        self._crowd = Crowd()
        self._suspected: set[str] = set()
        self._client = lru_cache(CLIENTS)(self._make_client)
        self._plans: dict[tuple[Limit, ...], Plan] = {}
        self._denials = Denials(settings.limits_memory)
        self._local = LocalLimits(settings.processes, settings.local_limits, settings.limits_memory)
        reset_after_fork(self._denials)
        reset_after_fork(self._local)

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
        return self._decided(self._request(subject, limits, cost, route))

    def peek(self, subject: Subject, limits: Sequence[Limit], cost: int = 1) -> Operation[Decision]:
        """What `check` would decide. Consumes, counts and tells nothing.

        Raises InvalidLimit. Redis away: what this process knows by itself.
        """
        request = self._request(subject, limits, cost, "")
        try:
            (reply,) = yield from self._ask([self._command(request, _LOOK)], request.keys)
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
        return self._reserved(self._request(subject, limits, cost, route))

    def refund(self, reservation: Reservation) -> Operation[bool]:
        """Give back what was consumed. True if it was, now: once, and not after `commit` or the longest window.

        Redis away: False, it stays consumed (unless it was consumed while Redis was away, too).
        """
        if not reservation.id:
            return False
        self._denials.forget(reservation.keys)
        if reservation.local:
            return self._refund_here(reservation)
        decision = reservation.decision
        windows = [_us(limit.window) for limit in decision.limits]
        keys = (self._keys.reservation(reservation.id), *reservation.keys)
        command = limit_refund(keys, reservation.at_us, decision.cost, *windows)
        return (yield from self._told("refund", command))

    def commit(self, reservation: Reservation) -> Operation[bool]:
        """It counts: from now on it can't be refunded. True if that was still possible. Redis away: False."""
        if not reservation.id:
            return False
        if reservation.local:
            return self._local.let_go(reservation.id)
        return (
            yield from self._told("commit", (b"UNLINK", self._keys.reservation(reservation.id)))
        )

    def reset(self, subject: Subject, limits: Sequence[Limit]) -> Operation[None]:
        """Forget what this subject has used of these limits, and its denials; bans stay. For operators and tests.

        Other processes may deny from memory for 5 s more. Raises InvalidLimit. Redis away: RedisUnavailable.
        """
        request = self._request(subject, limits, 0, "")
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
                yield from self._charge([], charges)
            except RedisUnavailable:
                break
            yield Pause(0)
        return len(self._local)

    # Deciding

    def _decided(self, request: Request) -> Operation[Decision]:
        self.stats.counts["limit_checks"] += 1
        if self._denials and (denied := self._remembered(request)) is not None:
            return denied
        try:
            (reply,) = yield from self._ask([self._command(request, _TAKE)], request.keys)
        except RedisUnavailable as error:
            return self._stand_in(request, error, take=True)
        return self._learned(request, reply)

    def _reserved(self, request: Request) -> Operation[Reservation]:
        self.stats.counts["limit_checks"] += 1
        if self._denials and (denied := self._remembered(request)) is not None:
            return Reservation(denied, request.keys)
        name = secrets.token_urlsafe(12)
        try:
            (reply,) = yield from self._ask([self._command(request, _TAKE, name)], request.keys)
        except RedisUnavailable as error:
            at = _now_us()
            decision = self._stand_in(request, error, take=True)
            if not decision:
                return Reservation(decision, request.keys)
            self._local.hold(name)
            return Reservation(decision, request.keys, name, at, local=True)
        decision = self._learned(request, reply)
        return Reservation(decision, request.keys, name if decision else "", decision.now_us)

    def _learned(self, request: Request, reply: list[int]) -> Decision:
        """The decision in this reply, and what there is to remember of it."""
        decision = self._read(request, reply)
        if request.plan.counted_away and decision.said:
            self._local.remember(request.keys, decision.said, _now_us())
        if not decision:
            self.stats.counts["limit_denials"] += 1
            self._remember(request, decision)
        return decision

    def _read(self, request: Request, reply: list[int]) -> Decision:
        verdict, now_us, *said = reply
        limits = request.plan.limits
        if verdict == _BANNED:
            wait_us = max(0, said[0]) * 1_000
            return Decision(limits, TOO_MANY, request.cost, now_us, wait_us=wait_us)
        status = OK if verdict == _ADMITTED else TOO_MANY
        return Decision(limits, status, request.cost, now_us, said)

    def _stand_in(self, request: Request, error: RedisUnavailable, *, take: bool) -> Decision:
        """What this process decides by itself."""
        self.stats.counts["limit_degraded"] += 1
        plan, reason = request.plan, error.reason
        self.stats.say("limits", reason, f"decided without Redis: {error}")
        status, said = self._decide_here(request, take=take)
        if take and status != OK:
            self.stats.counts["limit_denials"] += 1
        wait_us = TRY_AGAIN_US if status == UNAVAILABLE else 0
        now_us = self._server.now_us()
        return Decision(
            *(plan.limits, status, request.cost, now_us, said), wait_us=wait_us, degraded=reason
        )

    def _decide_here(self, request: Request, *, take: bool) -> tuple[int, tuple[int, ...]]:
        limits = request.plan.limits
        if self.settings.limits_strict_503 and any(limit.away == "strict" for limit in limits):
            return UNAVAILABLE, ()
        return self._local.decide(request.keys, limits, request.cost, _now_us(), take=take)

    # Denials that are remembered

    def _remembered(self, request: Request) -> Decision | None:
        now = time.monotonic()
        plan, keys = request.plan, request.keys
        denial = self._denials.find(request.bans, keys, plan.limits, request.cost, now)
        if denial is None:
            return None
        denial.unseen += 1
        self.stats.counts["limit_denials"] += 1
        self.stats.counts["limit_cached"] += 1
        before, age_us = denial.decision, int((now - denial.at) * _US)
        said = before.said
        if said and (denial.keys != keys or before.limits is not plan.limits):
            said = _said_of(denial, request)
        cost, wait_us = request.cost, before.wait_us
        return Decision(plan.limits, TOO_MANY, cost, before.now_us, said, age_us, wait_us)

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

    def _ask(self, commands: list[Command], keys: Sequence[bytes]) -> Operation[list[Any]]:
        """The replies. In front goes what is owed, by these logs and some others; behind, the counts that are due."""
        charges = self._local.owed(_now_us(), keys, RIDING) if self._local else []
        if charges:
            return (yield from self._charge(commands, charges))
        if time.monotonic() < self.stats.due:
            return (yield Once(commands))  # type: ignore[no-any-return]
        flush = self.stats.flush(self._server.now_ms())
        try:
            replies: list[Any] = yield Once([*commands, *flush])
        except RedisRefused as refused:
            # A server that is full refuses to count, not to decide.
            if any(isinstance(reply, Exception) for reply in refused.replies[: len(commands)]):
                raise
            replies = refused.replies
        return replies[: len(commands)]

    def _charge(self, commands: list[Command], charges: list[Charge]) -> Operation[list[Any]]:
        """The replies to the commands, which follow the charges."""
        told = False
        try:
            replies: list[Any] = yield Once([*map(_charging, charges), *commands])
            told = True
        finally:
            self._local.settle(charges, _now_us(), told=told)
        return replies[len(charges) :]

    def _told(self, what: str, command: Command) -> Operation[bool]:
        try:
            (done,) = yield [command]
        except RedisUnavailable as error:
            self.stats.say(what, error.reason, f"a reservation stays as it was: {error}")
            return False
        return bool(done)

    def _command(self, request: Request, mode: bytes, hold: str = "") -> Command:
        plan, bans, keys, cost, fields = request
        unseen = self._denials.take_unseen(keys) if self._denials and mode is _TAKE else 0
        all_keys = [self._keys.abuse, *bans, *keys]
        if hold:
            all_keys.append(self._keys.reservation(hold))
        life = str(1_000 * max((limit.window for limit in plan.limits), default=1)) if hold else ""
        counts = (b"%d" % len(bans), plan.how_many, b"%d" % unseen, life)
        return limit_check(all_keys, mode, b"%d" % cost, *counts, *plan.numbers, *fields)

    def _refund_here(self, reservation: Reservation) -> bool:
        if not self._local.let_go(reservation.id):
            return False
        self._local.refund(reservation.keys, reservation.decision.cost, reservation.at_us)
        return True

    # Requests

    def _request(self, subject: Subject, limits: Sequence[Limit], cost: int, route: str) -> Request:
        """Raises InvalidLimit."""
        if cost != 1:
            check_cost(cost)
        given = tuple(limits)
        plan = self._plans.get(given) or self._make_plan(given)
        client: Client | None
        if isinstance(subject, str):
            client, names = self._client(subject), _NOBODY
        else:
            client, names = self._who(subject, plan)
        if client is None:
            bans: tuple[bytes, ...] = ()
            fields: tuple[bytes, ...] = ()
        else:
            bans, fields = client.bans, client.fields
            if proxy := self._crowd.saw(client.subject, private=client.private):
                self._warn_of_proxy(proxy)
        if plan.only_ip and client is not None:
            keys = tuple([client.prefix + name for name in plan.names])
        else:
            keys = self._logs(plan, client, names)
        if user := names.get("user"):
            fields += (b"user", user.encode())
        if route:
            fields += (b"route", route[:ROUTE_LIMIT].encode(errors="replace"))
        return Request(plan, bans, keys, cost, fields)

    def _who(
        self, subject: Mapping[str, str | None], plan: Plan
    ) -> tuple[Client | None, Mapping[str, str]]:
        """The client, and the hidden names of the other kinds that matter."""
        for kind, text in subject.items():
            if text is not None and not isinstance(text, str):
                raise InvalidLimit(type(text).__name__, f"the {kind} of a subject is a str")
        address = subject.get("ip") if "ip" in subject else None
        client = self._client(address or "") if "ip" in subject else None
        wanted = [kind for kind in subject if kind in plan.kinds or kind == "user"]
        return client, {
            kind: hidden(kind, subject[kind] or "", self._secret())
            for kind in wanted
            if kind != "ip"
        }

    def _logs(
        self, plan: Plan, client: Client | None, names: Mapping[str, str]
    ) -> tuple[bytes, ...]:
        values = {**names} if client is None else {**names, "ip": client.subject}
        return tuple(
            [
                self._keys.limits(limit.by, _value(limit, values)) + name
                for limit, name in zip(plan.limits, plan.names, strict=True)
            ]
        )

    def _make_client(self, address: str) -> Client:
        subject = subject_of(address, self.settings.limit_v6_prefix)
        banned = [subject, *filter(None, [site_of(subject)])]
        return Client(
            subject,
            self._keys.limits("ip", subject),
            tuple(map(self._keys.ban, banned)),
            (b"ip", subject.encode()),
            is_private(subject),
        )

    def _make_plan(self, limits: tuple[Limit, ...]) -> Plan:
        names = [limit.name for limit in limits]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidLimit(twice, "two limits of one request have this name")
        numbers = [n for limit in limits for n in (limit.quota, _us(limit.window))]
        plan = Plan(
            limits,
            tuple(name.encode() for name in names),
            tuple(b"%d" % number for number in numbers),
            b"%d" % len(limits),
            frozenset(kind for limit in limits for kind in limit.kinds),
            all(limit.by == "ip" for limit in limits),
            any(limit.away != "open" for limit in limits),
        )
        if len(self._plans) >= PLANS:
            self._plans.clear()
        self._plans[limits] = plan
        return plan

    def _secret(self) -> bytes:
        if not self._pepper:
            ring = pepper.ring(
                self.settings,
                self.settings.session_peppers,
                "STILLROOM_SESSION_PEPPERS",
                without="limits by user count in this process only",
            )
            self._pepper = ring[0]
        return self._pepper

    def _warn_of_proxy(self, client: str) -> None:
        if client in self._suspected:
            return
        self._suspected.add(client)
        log.warning(
            "nearly all of the last %d requests came from %s. Is it a proxy? Then name its network in "
            "STILLROOM_TRUSTED_PROXIES, or its clients share one quota. A Swarm that publishes through its mesh "
            "hides them all: publish with mode: host",
            CROWD,
            client,
        )


_NOBODY: Mapping[str, str] = {}


def _value(limit: Limit, values: Mapping[str, str]) -> str:
    """Whom the limit counts. Raises InvalidLimit."""
    missing = [kind for kind in limit.kinds if kind not in values]
    if missing:
        raise InvalidLimit(
            limit.name, f"it counts by {limit.by}; the subject has no {' and no '.join(missing)}"
        )
    return "&".join([values[kind] for kind in limit.kinds])


def _said_of(denial: Denial, request: Request) -> tuple[int, ...]:
    """What is remembered of the limit that denied; of the others nothing, they may be another subject's."""
    said: list[int] = []
    for key, limit in zip(request.keys, request.plan.limits, strict=True):
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
