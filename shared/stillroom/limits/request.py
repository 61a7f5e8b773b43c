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
from stillroom.exempt import Exempt
from stillroom.keys import Keys
from stillroom.limits.decision import NEVER, PARTS
from stillroom.limits.identity import CROWD, Crowd
from stillroom.limits.limit import Limit, check_cost
from stillroom.scripts import Text, limit_check
from stillroom.settings import Settings
from stillroom.subject import BAN_PREFIXES, SITE_PREFIX, hidden, is_private, prefixes_of, subject_of
from stillroom.wire import pack

log = logging.getLogger("stillroom.limits")

Subject = str | Mapping[str, str | None]

KEPT = 4_096  # requests by address
PLANS = 1_024  # sets of limits
TOLD = ("ip", "user")  # of a subject, in an event
ROUTE_LIMIT = 200  # characters, in an event
WINDOWS_LIMIT = 1_000  # names of limits whose windows are compared
WINDOWS = "windows"
_US = 1_000_000


class Plan(NamedTuple):
    """What is the same each time these limits are asked for."""

    names: tuple[bytes, ...]
    numbers: tuple[bytes, ...]  # quota, window µs, longest window of the name µs, quota …
    how_many: bytes
    kinds: frozenset[str]
    counted_away: bool  # what Redis says of them matters while it is away
    longest_ms: int  # of the windows
    hides: bool  # some limit counts by what only has a name under a pepper
    memory: tuple[bytes, ...]  # what is remembered of a log is told apart by: see Request.known_as


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
    twins: tuple[tuple[int, bytes], ...] = ()  # a limit's number, and its log under another pepper
    taking: bytes = b""  # the command that consumes it, packed, where it is kept

    @property
    def logs(self) -> tuple[bytes, ...]:
        """All logs that count it. While peppers are changed a user has a name, and a log, under each of them."""
        return (*self.keys, *[key for _, key in self.twins]) if self.twins else self.keys

    @property
    def counted(self) -> tuple[Limit, ...]:
        """The limit of each of these logs."""
        twins = [self.limits[number] for number, _ in self.twins]
        return (*self.limits, *twins) if twins else self.limits

    @property
    def known_as(self) -> tuple[bytes, ...]:
        """What is remembered of these logs under."""
        if not self.plan.memory:
            return self.logs
        memory = [*self.plan.memory, *[self.plan.memory[number] for number, _ in self.twins]]
        return tuple([key + mark for key, mark in zip(self.logs, memory, strict=True)])

    def words(
        self, mode: bytes, unseen: bytes = b"", reservation: bytes = b""
    ) -> tuple[bytes, ...]:
        """What lua/limit_check.lua is run with."""
        plan, bans, logs = self.plan, self.bans, self.logs
        keys = (
            (self.events, *bans, *logs, reservation) if reservation else (self.events, *bans, *logs)
        )
        life = b"%d" % plan.longest_ms if reservation else b""
        how_many = b"%d" % len(logs) if self.twins else plan.how_many
        about = (b"%d" % self.cost, b"%d" % len(bans), how_many, unseen, life, plan.how_many)
        more = [part for n, _ in self.twins for part in plan.numbers[3 * n : 3 * n + 3]]
        return (b"%d" % len(keys), *keys, mode, *about, *plan.numbers, *more, *self.fields)

    def folded(self, said: Sequence[int]) -> Sequence[int]:
        """What is said of each limit. If it has several logs: of the fullest one, and the longest wait of all."""
        if not self.twins:
            return said
        rows = [list(said[start : start + PARTS]) for start in range(0, len(said), PARTS)]
        for row, (number, _) in zip(rows[len(self.limits) :], self.twins, strict=True):
            rows[number] = _fuller(rows[number], row)
        return [part for row in rows[: len(self.limits)] for part in row]


def _fuller(one: list[int], other: list[int]) -> list[int]:
    used, some, _, full = max(one, other)
    wait = NEVER if NEVER in (one[2], other[2]) else max(one[2], other[2])
    return [used, some, wait, full]


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
        self._peppers: tuple[bytes, ...] = ()
        self.waits: dict[
            str, float
        ] = {}  # what has to be done before Redis is asked: see settling.py
        self._own_windows: dict[str, int] = {}  # of each limit's name the longest one here, µs …
        self._windows: dict[str, int] = {}  # … and in all processes
        self._exempt = Exempt(
            settings.abuse_allow, settings.proxy_networks, settings.limit_v6_prefix
        )
        self._count = 0
        self._crowd = Crowd()
        self._suspected: set[str] = set()
        self._plan = lru_cache(PLANS)(self._make_plan)
        self._client = lru_cache(KEPT)(self._make_client)
        self._of_address = lru_cache(KEPT)(self._make_of_address)

    def make(self, subject: Subject, limits: Sequence[Limit], cost: int, route: str) -> Request:
        """Raises InvalidLimit."""
        self._count += 1
        if isinstance(subject, str):
            request = self._of_address(subject, tuple(limits), cost, route, limit_check.text)
        else:
            request = self._of_subject(subject, tuple(limits), cost, route)
        if request.private and self._crowd.saw(request.private, self._count):
            self._suspect(request.private)
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
        client = self._client(subject["ip"] or "") if "ip" in subject else NOBODY
        values = self._values(subject, plan, client, 0)
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
            self._twins(subject, limits, plan, client),
        )

    def _values(
        self, subject: Mapping[str, str | None], plan: Plan, client: Client, pepper: int
    ) -> dict[str, str]:
        """What Redis knows the kinds of a subject by, under one of the peppers: those that matter."""
        values: dict[str, str] = {}
        for kind, text in subject.items():
            if kind == "ip":
                values[kind] = client.subject
            elif kind == "user" or kind in plan.kinds:
                values[kind] = hidden(kind, text or "", self._secrets()[pepper])
        return values

    def _logs(
        self, limits: tuple[Limit, ...], plan: Plan, values: Mapping[str, str]
    ) -> tuple[bytes, ...]:
        pairs = zip(limits, plan.names, strict=True)
        return tuple(
            [self._keys.limits(limit.by, _value(limit, values)) + name for limit, name in pairs]
        )

    def _twins(
        self,
        subject: Mapping[str, str | None],
        limits: tuple[Limit, ...],
        plan: Plan,
        client: Client,
    ) -> tuple[tuple[int, bytes], ...]:
        """The logs of names under the other peppers. Each hit counts in all of them: who has one pepper sees it."""
        if not plan.hides or len(self._secrets()) == 1:
            return ()
        twins: list[tuple[int, bytes]] = []
        for number in range(1, len(self._secrets())):
            logs = self._logs(limits, plan, self._values(subject, plan, client, number))
            twins += [(n, key) for n, key in enumerate(logs) if limits[n].by != "ip"]
        return tuple(twins)

    def _make_client(self, address: str) -> Client:
        """Who is exempt from bans is not looked for among them: he may have been banned before he was exempt."""
        prefix = self._settings.limit_v6_prefix
        subject = subject_of(address, prefix)
        banned: list[str] = []
        if not self._exempt.has(subject):
            banned = prefixes_of(address, (prefix, *BAN_PREFIXES, SITE_PREFIX))
        return Client(subject, tuple(map(self._keys.ban, banned)), is_private(subject))

    def _secrets(self) -> tuple[bytes, ...]:
        if not self._peppers:
            self._peppers = pepper.ring(
                self._settings,
                self._settings.session_peppers,
                "STILLROOM_SESSION_PEPPERS",
                without="limits by user count in this process only",
            )
        return self._peppers

    # Windows

    def _make_plan(self, limits: tuple[Limit, ...]) -> Plan:
        """Raises InvalidLimit."""
        plan = _plan_of(limits, self._windows)
        own = self._own_windows
        news = [one for one in limits if one.window * _US > own.get(one.name, 0)]
        for limit in news if len(own) < WINDOWS_LIMIT else ():
            own[limit.name] = limit.window * _US
            self.waits[WINDOWS] = 0.0
            self._learn(limit.name, max(limit.window * _US, self._windows.get(limit.name, 0)))
        return plan

    def own_windows(self) -> dict[str, int]:
        """The longest window of each limit's name in this process, µs."""
        return dict(self._own_windows)

    def learn_windows(self, names: Sequence[str], longest: Sequence[bytes]) -> None:
        """Take in the longest window of each of these names in all processes, µs."""
        for name, window in zip(names, longest, strict=True):
            self._learn(name, max(int(window), self._own_windows[name]))

    def _learn(self, name: str, window: int) -> None:
        before = self._windows.get(name)
        self._windows[name] = window
        if before not in (None, window):  # what was made with the other one is wrong
            self._plan.cache_clear()
            self._of_address.cache_clear()

    def remind(self) -> None:
        """It is time to compare windows again."""
        if self._own_windows:
            self.waits[WINDOWS] = 0.0

    def longest_window(self, limit: Limit) -> int:
        """The longest window of this limit's name, µs."""
        return max(limit.window * _US, self._windows.get(limit.name, 0))

    def known_as(self, key: bytes, limit: Limit) -> bytes:
        """What is remembered of a log under: by each of the windows that its name has."""
        return key + _memory_of(limit, self._windows)

    def again(self, request: Request) -> Request:
        """The same request, with what has been learned since it was made."""
        return request._replace(plan=self._plan(request.limits), taking=b"")

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


def _plan_of(limits: tuple[Limit, ...], windows: Mapping[str, int]) -> Plan:
    """Raises InvalidLimit."""
    names = [limit.name for limit in limits]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidLimit(twice, "two limits of one request have this name")
    numbers: list[int] = []
    for limit in limits:
        window = limit.window * _US
        numbers += (limit.quota, window, max(window, windows.get(limit.name, 0)))
    return Plan(
        tuple(name.encode() for name in names),
        tuple(b"%d" % number for number in numbers),
        b"%d" % len(limits),
        kinds := frozenset(kind for limit in limits for kind in limit.kinds),
        any(limit.away != "open" for limit in limits),
        max([1_000 * limit.window for limit in limits], default=1),
        kinds - {"ip"} != frozenset(),
        tuple(memory) if any(memory := [_memory_of(limit, windows) for limit in limits]) else (),
    )


def _memory_of(limit: Limit, windows: Mapping[str, int]) -> bytes:
    """Nothing, unless the name has a longer window too: what is known by one says nothing of the other."""
    is_shorter = limit.window * _US < windows.get(limit.name, 0)
    return b"@%d" % limit.window if is_shorter else b""


def _value(limit: Limit, values: Mapping[str, str]) -> str:
    """Whom the limit counts. Raises InvalidLimit."""
    missing = [kind for kind in limit.kinds if kind not in values]
    if missing:
        raise InvalidLimit(
            limit.name, f"it counts by {limit.by}; the subject has no {' and no '.join(missing)}"
        )
    return "&".join([values[kind] for kind in limit.kinds])
