"""A request as Redis is asked about it: whose bans, which logs, and what an event would tell.

Most requests are of a client and limits that were seen a moment ago, so what was made for them is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from stillroom import pepper
from stillroom.errors import InvalidLimit
from stillroom.keys import Keys
from stillroom.limits.identity import CROWD, Crowd
from stillroom.limits.limit import Limit, check_cost
from stillroom.settings import Settings
from stillroom.subject import hidden, is_private, site_of, subject_of

log = logging.getLogger("stillroom.limits")

Subject = str | Mapping[str, str | None]

KEPT = 4_096  # requests by address
PLANS = 1_024  # sets of limits
TOLD = ("ip", "user")  # of a subject, in an event
ROUTE_LIMIT = 200  # characters, in an event
_US = 1_000_000


class Plan(NamedTuple):
    """What is the same each time these limits are asked for."""

    names: tuple[bytes, ...]
    numbers: tuple[bytes, ...]  # quota, window µs, quota …
    how_many: bytes
    kinds: frozenset[str]
    counted_away: bool  # what Redis says of them matters while it is away
    longest_ms: int  # of the windows


class Request(NamedTuple):
    """What Redis is asked, in its own words."""

    limits: tuple[Limit, ...]
    plan: Plan
    events: bytes  # the stream
    bans: tuple[bytes, ...]
    keys: tuple[bytes, ...]  # a log for each limit
    cost: int
    fields: tuple[bytes, ...]  # of an event
    private: str  # the address, if it is one inside somebody's network
    taking: tuple[bytes, ...] = ()  # the words that consume it, where they are kept

    def words(self, mode: bytes, unseen: int = 0, reservation: bytes = b"") -> tuple[bytes, ...]:
        """What lua/limit_check.lua is run with."""
        _, plan, events, bans, logs, cost, fields, *_ = self
        keys = (events, *bans, *logs, reservation) if reservation else (events, *bans, *logs)
        life = b"%d" % plan.longest_ms if reservation else b""
        numbers = (b"%d" % cost, b"%d" % len(bans), plan.how_many, b"%d" % unseen, life)
        return (b"%d" % len(keys), *keys, mode, *numbers, *plan.numbers, *fields)


class Client(NamedTuple):
    """An address: the subject it is counted as, the keys that would ban it, and whether it is a private one."""

    subject: str
    bans: tuple[bytes, ...]
    private: bool


NOBODY = Client("", (), False)


class Requests:
    """Makes them."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys
        self._pepper = b""
        self._count = 0
        self._crowd = Crowd()
        self._suspected: set[str] = set()
        self._plan = lru_cache(PLANS)(_plan_of)
        self._client = lru_cache(KEPT)(self._make_client)
        self._of_address = lru_cache(KEPT)(self._make_of_address)

    def make(self, subject: Subject, limits: Sequence[Limit], cost: int, route: str) -> Request:
        """Raises InvalidLimit."""
        self._count += 1
        if isinstance(subject, str):
            request = self._of_address(subject, tuple(limits), cost, route)
        else:
            request = self._of_subject(subject, tuple(limits), cost, route)
        if request.private and self._crowd.saw(request.private, self._count):
            self._suspect(request.private)
        return request

    def _make_of_address(
        self, address: str, limits: tuple[Limit, ...], cost: int, route: str
    ) -> Request:
        request = self._of_subject({"ip": address}, limits, cost, route)
        return request._replace(taking=request.words(b"take"))

    def _of_subject(
        self, subject: Mapping[str, str | None], limits: tuple[Limit, ...], cost: int, route: str
    ) -> Request:
        check_cost(cost)
        _check_texts(subject)
        plan = self._plan(limits)
        client = self._client(subject["ip"] or "") if "ip" in subject else NOBODY
        values = self._values(subject, plan, client)
        told: dict[str, str] = {kind: values[kind] for kind in TOLD if kind in values}
        if route:
            told["route"] = route[:ROUTE_LIMIT]
        return Request(
            limits,
            plan,
            self._keys.abuse,
            client.bans,
            self._logs(limits, plan, values),
            cost,
            tuple([text.encode(errors="replace") for field in told.items() for text in field]),
            client.subject if client.private else "",
        )

    def _values(
        self, subject: Mapping[str, str | None], plan: Plan, client: Client
    ) -> dict[str, str]:
        """What Redis knows the kinds of a subject by: those that matter."""
        values: dict[str, str] = {}
        for kind, text in subject.items():
            if kind == "ip":
                values[kind] = client.subject
            elif kind == "user" or kind in plan.kinds:
                values[kind] = hidden(kind, text or "", self._secret())
        return values

    def _logs(
        self, limits: tuple[Limit, ...], plan: Plan, values: Mapping[str, str]
    ) -> tuple[bytes, ...]:
        pairs = zip(limits, plan.names, strict=True)
        return tuple(
            [self._keys.limits(limit.by, _value(limit, values)) + name for limit, name in pairs]
        )

    def _make_client(self, address: str) -> Client:
        subject = subject_of(address, self._settings.limit_v6_prefix)
        banned = [one for one in (subject, site_of(subject)) if one]
        return Client(subject, tuple(map(self._keys.ban, banned)), is_private(subject))

    def _secret(self) -> bytes:
        if not self._pepper:
            ring = pepper.ring(
                self._settings,
                self._settings.session_peppers,
                "STILLROOM_SESSION_PEPPERS",
                without="limits by user count in this process only",
            )
            self._pepper = ring[0]
        return self._pepper

    def _suspect(self, client: str) -> None:
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


def _check_texts(subject: object) -> None:
    """Raises InvalidLimit, which does not repeat what may be somebody's name."""
    if not isinstance(subject, Mapping):
        kind = type(subject).__name__
        raise InvalidLimit(kind, "a subject is an address, or a mapping of kinds to texts")
    for kind, text in subject.items():
        if text is not None and not isinstance(text, str):
            raise InvalidLimit(type(text).__name__, f"the {kind} of a subject is a str")


def _plan_of(limits: tuple[Limit, ...]) -> Plan:
    """Raises InvalidLimit."""
    names = [limit.name for limit in limits]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidLimit(twice, "two limits of one request have this name")
    numbers = [number for limit in limits for number in (limit.quota, limit.window * _US)]
    return Plan(
        tuple(name.encode() for name in names),
        tuple(b"%d" % number for number in numbers),
        b"%d" % len(limits),
        frozenset(kind for limit in limits for kind in limit.kinds),
        any(limit.away != "open" for limit in limits),
        max([1_000 * limit.window for limit in limits], default=1),
    )


def _value(limit: Limit, values: Mapping[str, str]) -> str:
    """Whom the limit counts. Raises InvalidLimit."""
    missing = [kind for kind in limit.kinds if kind not in values]
    if missing:
        raise InvalidLimit(
            limit.name, f"it counts by {limit.by}; the subject has no {' and no '.join(missing)}"
        )
    return "&".join([values[kind] for kind in limit.kinds])
