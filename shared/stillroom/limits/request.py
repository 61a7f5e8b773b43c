"""A request as Redis is asked about it: whose bans, which logs, and what an event would tell.

Most requests are of a client and limits that were seen a moment ago, so what was made for them is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from stillroom import pepper
from stillroom.edges import CLOUDFLARE
from stillroom.errors import InvalidLimit
from stillroom.keys import Keys
from stillroom.limits.identity import CROWD, Crowd, Networks
from stillroom.limits.limit import Limit, check_cost, check_limits
from stillroom.scripts import Text, limit_check
from stillroom.settings import Settings
from stillroom.subject import (
    UNKNOWN,
    hidden,
    is_loopback,
    is_nobody,
    is_private,
    site_of,
    subject_of,
)
from stillroom.wire import pack

log = logging.getLogger("stillroom.limits")

Subject = str | Mapping[str, str | None]

KEPT = 4_096  # requests by address
SAMPLED = 10  # one request in so many is looked at, whether a proxy sends them all
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
    watched: str  # the address it counts as; empty if it has none, or one that is no proxy's
    exempt: bool  # from all limits: see the setting limit_exempt
    taking: bytes = b""  # the command that consumes it, packed, where it is kept

    def words(
        self, mode: bytes, unseen: bytes = b"", reservation: bytes = b""
    ) -> tuple[bytes, ...]:
        """What lua/limit_check.lua is run with."""
        _, plan, events, bans, logs, cost, fields, *_ = self
        keys = (events, *bans, *logs, reservation) if reservation else (events, *bans, *logs)
        life = b"%d" % plan.longest_ms if reservation else b""
        numbers = (b"%d" % cost, b"%d" % len(bans), plan.how_many, unseen, life)
        return (b"%d" % len(keys), *keys, mode, *numbers, *plan.numbers, *fields)


class Client(NamedTuple):
    """An address: the subject it is counted as, and the keys that would ban it."""

    subject: str
    bans: tuple[bytes, ...]
    watched: str
    exempt: bool


NOBODY = Client("", (), "", False)


class Requests:
    """Makes them."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys
        self._pepper = b""
        self._count = 0
        self._crowd = Crowd(CROWD // SAMPLED)
        self._exempt = Networks(settings.exempt)
        self._edges = Networks(CLOUDFLARE)
        self._suspected: set[str] = set()
        self._plan = lru_cache(PLANS)(_plan_of)
        self._client = lru_cache(KEPT)(self._make_client)
        self._of_address = lru_cache(KEPT)(self._make_of_address)

    def make(self, subject: Subject, limits: Sequence[Limit], cost: int, route: str) -> Request:
        """Raises InvalidLimit."""
        self._count += 1
        if type(limits) is tuple:  # a list of them is checked once, with its plan
            wanted: tuple[Limit, ...] = limits
        else:
            wanted = tuple(limits) if type(limits) is list else check_limits(limits)
        if isinstance(subject, str):
            request = self._of_address(subject, wanted, cost, route, limit_check.text)
        else:
            request = self._of_subject(subject, wanted, cost, route)
        if not self._count % SAMPLED and request.watched:
            self._watch(request.watched)
        return request

    def _make_of_address(
        self, address: str, limits: tuple[Limit, ...], cost: int, route: str, text: Text
    ) -> Request:
        """`text`: of the script as it is sent now. Another server may want another."""
        request = self._of_subject({"ip": address}, limits, cost, route)
        return request._replace(taking=pack([(b"EVALSHA", text.sha, *request.words(b"take"))]))

    def _of_subject(
        self, subject: Mapping[str, str | None], limits: tuple[Limit, ...], cost: int, route: str
    ) -> Request:
        check_cost(cost)
        _check_texts(subject)
        plan = self._plan(limits)
        address = subject.get("ip")
        client = self._client(address) if address else NOBODY
        values = self._values(subject, plan, client)
        told: dict[str, str] = {kind: found for kind in TOLD if (found := values.get(kind))}
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
            client.watched,
            client.exempt,
        )

    def _values(
        self, subject: Mapping[str, str | None], plan: Plan, client: Client
    ) -> dict[str, str]:
        """What Redis knows the kinds of a subject by: those that matter. Empty: it has none of this kind."""
        values: dict[str, str] = {}
        for kind, text in subject.items():
            if kind == "ip":
                values[kind] = client.subject
            elif kind == "user" or kind in plan.kinds:
                values[kind] = "" if is_nobody(text) else hidden(kind, text or "", self._secret())
        return values

    def _logs(
        self, limits: tuple[Limit, ...], plan: Plan, values: Mapping[str, str]
    ) -> tuple[bytes, ...]:
        pairs = zip(limits, plan.names, strict=True)
        return tuple([self._keys.limits(*_whom(limit, values)) + name for limit, name in pairs])

    def _make_client(self, address: str) -> Client:
        subject = subject_of(address, self._settings.limit_v6_prefix)
        _check_address(address, subject)
        banned = [one for one in (subject, site_of(subject)) if one]
        bans = tuple(map(self._keys.ban, banned))
        is_nowhere = subject == UNKNOWN or is_loopback(subject)
        if self._edges.has(subject):
            why = f"{subject} is one of Cloudflare's proxies."
            todo = (
                "STILLROOM_TRUSTED_PROXIES=cloudflare and STILLROOM_PROXY_HEADER=cf-connecting-ip"
            )
            self._tell_of_proxy("cloudflare", why, todo)
        return Client(subject, bans, "" if is_nowhere else subject, self._exempt.has(subject))

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

    def _watch(self, client: str) -> None:
        """Say so where nearly all requests come from one address: then it is a proxy, and nobody said so."""
        if not self._crowd.saw(client, self._count // SAMPLED):
            return
        todo = "its network in STILLROOM_TRUSTED_PROXIES and its header in STILLROOM_PROXY_HEADER"
        if is_private(client):
            todo += ". A Swarm that publishes through its mesh hides all: publish with mode: host"
        count = f"{CROWD:,}"
        why = f"nearly all of the last {count} requests came from {client}. Is it a proxy?"
        self._tell_of_proxy(client, why, todo)

    def _tell_of_proxy(self, whose: str, why: str, todo: str) -> None:
        if whose not in self._suspected:
            self._suspected.add(whose)
            log.warning(
                "%s Unless it is trusted its clients share one quota, and one ban: set %s",
                why,
                todo,
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
    names = [limit.name for limit in check_limits(limits)]
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


def _whom(limit: Limit, values: Mapping[str, str]) -> tuple[str, str]:
    """Whom the limit counts, kind and value. Who has no name is counted by address. Raises InvalidLimit."""
    missing = [kind for kind in limit.kinds if kind not in values]
    if missing:
        raise InvalidLimit(
            limit.name, f"it counts by {limit.by}; the subject has no {' and no '.join(missing)}"
        )
    found = [values[kind] for kind in limit.kinds]
    if all(found):
        return limit.by, "&".join(found)
    if not values.get("ip"):
        raise InvalidLimit(
            limit.name,
            f"it counts by {limit.by}, and the subject is nobody: give its address too, {{'ip': …}}, "
            "by which it is counted then",
        )
    return "ip", values["ip"]


def _check_address(address: str, subject: str) -> None:
    """Raises InvalidLimit for a text that is no address: all such texts would share one quota."""
    if subject == UNKNOWN and address != UNKNOWN:
        kind, colon, _ = address.partition(":")
        kind = kind if colon and kind.isidentifier() and kind != "ip" else "user"
        raise InvalidLimit(  # which does not repeat what may be somebody's name
            f"{kind}:…" if colon else "a text",
            f"as a str a subject is an address; did you mean {{{kind!r}: …}}? What a server says of a "
            "request becomes an address by limits.client(peer, headers)",
        )
