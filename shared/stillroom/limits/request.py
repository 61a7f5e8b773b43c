"""A request as Redis is asked about it: whose bans, which logs, and what an event would tell.

Most requests are of a client and limits that were seen a moment ago, so what was made for them is kept.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from stillroom import pepper
from stillroom.counted import LIMIT
from stillroom.edges import CLOUDFLARE
from stillroom.errors import InvalidLimit
from stillroom.exempt import Exempt
from stillroom.keys import Keys, home_of
from stillroom.limits.changes import Changes
from stillroom.limits.identity import CROWD, Crowd, Networks
from stillroom.limits.limit import Limit, check_cost, check_limits
from stillroom.limits.log import Said, fuller
from stillroom.misuse import YES_OR_NO, refuse_other
from stillroom.scripts import Script, limit_check
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.subject import (
    BAN_PREFIXES,
    SITE_PREFIX,
    UNKNOWN,
    hidden,
    is_loopback,
    is_nobody,
    is_private,
    prefixes_of,
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
ROUTE = "the template of the path, as text"
WINDOWS_LIMIT = 1_000  # names of limits whose windows are compared
WINDOWS = b"windows"
QUIET = b"quiet"  # of Request.mode
# A log is kept longer than its name's longest window by this: see lua/lib/hits.lua.
LOG_SLACK_MS = 1_000
_LISTS = (list, tuple)
_EDGES = Networks(CLOUDFLARE)  # read once, not by each room
_US = 1_000_000
_WIDTH = re.compile(rb"([46])/(\d{1,3}) ")


class Plan(NamedTuple):
    """Hold what is the same each time these limits are asked for."""

    names: tuple[bytes, ...]
    numbers: tuple[bytes, ...]  # quota, window µs, ms that the log is kept, quota …
    how_many: bytes
    kinds: frozenset[str]
    counted_away: bool  # Redis' last reply on them matters while it is away
    longest_ms: int  # of the windows
    hides: bool  # some limit counts by a subject that is hidden with a pepper
    memory: tuple[bytes, ...]  # the names under which logs are remembered: see Request.known_as
    letters: bytes  # one for each limit, if one is in shadow: see lua/limit_check.lua
    in_flight: str  # the name of the limit of requests in flight, if any
    counted_as: tuple[str, ...] = ()  # the names that a check, and one of each limit, count under
    telling: bytes = b""  # how many of them, from the first, tell of being near; empty: all


class Request(NamedTuple):
    """Hold what Redis is asked, in the words of its commands."""

    limits: tuple[Limit, ...]
    plan: Plan
    events: bytes  # the stream
    events_kept: bytes  # how many the stream keeps
    # The key of the widths of bans, and what it held when this was made.
    widths: tuple[bytes, bytes]
    bans: tuple[bytes, ...]
    keys: tuple[bytes, ...]  # a log for each limit
    address: str  # as it was given; empty if there is none
    cost: int
    fields: tuple[bytes, ...]  # of an event
    watched: str  # the address it counts as; empty if it has none, or one that is no proxy's
    exempt: bool  # from all limits: see the setting limit_exempt
    mode: bytes  # how it is consumed: see lua/limit_check.lua
    twins: tuple[tuple[int, bytes], ...] = ()  # a limit's number, and its log under another pepper
    taking: bytes = b""  # the command that consumes it, packed, where it is kept
    home: bytes = b""  # in a cluster the shard that has all of it, or …
    parts: tuple[Request, ...] = ()  # … what each of several shards has of it
    places: tuple[int, ...] = ()  # of such a part: which logs of the whole it has
    # What follows from these fields: see with_logs.
    logs: tuple[bytes, ...] = ()  # all that count it: a user has one under each pepper of now
    counted: tuple[Limit, ...] = ()  # the limit of each of these logs
    known_as: tuple[bytes, ...] = ()  # the names that this process remembers these logs by
    denied_as: tuple[bytes, ...] = ()  # the names of all denials that may concern it

    def with_logs(self) -> Request:
        """Return the request with what follows from its keys, twins, bans and plan."""
        numbers = [number for number, _ in self.twins]
        logs, memory = (*self.keys, *[key for _, key in self.twins]), self.plan.memory
        marks = [*memory, *[memory[number] for number in numbers]] if memory else [b""] * len(logs)
        return self._replace(
            logs=logs,
            counted=(*self.limits, *[self.limits[number] for number in numbers]),
            known_as=tuple([key + mark for key, mark in zip(logs, marks, strict=True)]),
            denied_as=(*self.bans, *self.keys),
        )

    def words(
        self, mode: bytes, unseen: bytes = b"", reservation: bytes = b""
    ) -> tuple[bytes, ...]:
        """Return the words that lua/limit_check.lua is run with."""
        plan, bans, logs = self.plan, self.bans, self.logs
        widths_key, widths = self.widths
        keys = (self.events, widths_key, *bans, *logs, *((reservation,) if reservation else ()))
        life = b"%d" % plan.longest_ms if reservation else b""
        how_many = b"%d" % len(logs) if self.twins else plan.how_many
        letters = plan.letters
        if letters and self.twins:
            letters += b"".join([letters[n : n + 1] for n, _ in self.twins])
        cost, banned = b"%d" % self.cost, b"%d" % len(bans)
        telling = plan.telling or plan.how_many
        about = (cost, banned, how_many, unseen, life, telling, widths, letters)
        more = [part for n, _ in self.twins for part in plan.numbers[3 * n : 3 * n + 3]]
        told = (self.events_kept, *self.fields)
        return (b"%d" % len(keys), *keys, mode, *about, *plan.numbers, *more, *told)

    def folded(self, said: Sequence[int]) -> Sequence[int]:
        """Return what is said of each limit: of several logs, what the fullest one says, and the longest wait."""
        if not (said and self.twins):
            return said
        parts = iter(said)
        rows: list[Said] = list(zip(parts, parts, parts, parts, strict=True))
        for row, (number, _) in zip(rows[len(self.limits) :], self.twins, strict=True):
            rows[number] = fuller(rows[number], row)
        return [part for row in rows[: len(self.limits)] for part in row]


class Widths(NamedTuple):
    """Hold the widths of banned networks, besides the widths that are looked for anyway."""

    text: bytes = b""  # as Redis said it last
    v4: tuple[int, ...] = ()
    v6: tuple[int, ...] = ()


class Client(NamedTuple):
    """An address: the subject it is counted as, and the keys that would ban it, among bans of these widths."""

    subject: str
    bans: tuple[bytes, ...]
    widths: bytes
    watched: str
    exempt: bool
    home: bytes = b""  # in a cluster, the shard that its limits and bans are in

    @staticmethod
    def nobody(widths: bytes = b"") -> Client:
        """Return the client of a request without an address."""
        return Client("", (), widths, "", False)


class Requests:
    """Make requests of what an app gives: a subject, its limits and a cost."""

    def __init__(self, settings: Settings, keys: Keys, stats: Stats) -> None:
        self._settings = settings
        self._keys = keys
        self._counted_as = stats.counted_as
        self._peppers: tuple[bytes, ...] = ()
        self.waits: dict[bytes, float] = {}  # the work to do before Redis is asked: see settling.py
        self._widths: dict[bytes, Widths] = {}  # by the shard of the limits that says so
        self._own_windows: dict[str, int] = {}  # of each limit's name the longest one here, µs …
        self._windows: dict[str, int] = {}  # … and in all processes
        self._exempt = Exempt(
            settings.abuse_allow, settings.proxy_networks, settings.limit_v6_prefix
        )
        self._count = 0
        self._crowd = Crowd(CROWD // SAMPLED)
        self._unlimited = Networks(settings.exempt)
        self._suspected: set[str] = set()
        self.changes = Changes()
        self._forget_plans()
        self._forget_clients()

    # These make new caches and clear none: another thread may be making a request of what was known before, and
    # would keep it in a cache that was cleared. What is made of others is forgotten last.

    def _forget_plans(self) -> None:
        self._plan = lru_cache(PLANS)(self._make_plan)
        self._of_address = lru_cache(KEPT)(self._make_of_address)

    def _forget_clients(self) -> None:
        self._client = lru_cache(KEPT)(self._make_client)
        self._of_address = lru_cache(KEPT)(self._make_of_address)

    def make(
        self,
        subject: Subject,
        limits: Sequence[Limit],
        cost: int,
        route: str,
        meant: bool = True,
    ) -> Request:
        """Return the request, as Redis is asked about it. Raises InvalidLimit."""
        self._count += 1
        if type(cost) is not int:
            check_cost(cost)  # a request that is known is found by True as well as by 1
        if meant is not True:
            refuse_other("meant", meant, bool, YES_OR_NO)
        # A list of them is checked once, with its plan.
        wanted = tuple(limits) if type(limits) in _LISTS else check_limits(limits)
        try:
            if self.changes.found:
                wanted = self.changes.applied(wanted, time.monotonic())
            if isinstance(subject, str):
                flagged = Script.flags_are_known
                request = self._of_address(subject, wanted, cost, route, meant, flagged)
            else:
                request = self._of_subject(subject, wanted, cost, route, meant)
        except (TypeError, AttributeError):  # what is no limit, or no text, can't be looked up
            check_limits(wanted)
            refuse_other("route", route, str, ROUTE)
            raise
        if not self._count % SAMPLED and request.watched:
            self._watch(request.watched)
        return request

    def _make_of_address(
        self,
        address: str,
        limits: tuple[Limit, ...],
        cost: int,
        route: str,
        meant: bool,
        flagged: bool,
    ) -> Request:
        """Make the request of an address, with the command that consumes it.

        `flagged`: whether scripts are sent with flags now. A server that knows none wants another text.
        """
        request = self._of_subject({"ip": address}, limits, cost, route, meant)
        return request._replace(taking=pack([limit_check.run(request.words(request.mode))]))

    def _of_subject(
        self,
        subject: Mapping[str, str | None],
        limits: tuple[Limit, ...],
        cost: int,
        route: str,
        meant: bool,
    ) -> Request:
        check_cost(cost)
        _check_texts(subject)
        plan = self._plan(limits)
        address = subject.get("ip")
        client = self._client_of(address)
        values = self._values(subject, plan, client, 0)
        told: dict[str, str] = {kind: found for kind in TOLD if (found := values.get(kind))}
        if route:
            refuse_other("route", route, str, ROUTE)
            told["route"] = route[:ROUTE_LIMIT]
        request = Request(
            limits,
            plan,
            self._keys.abuse,
            b"%d" % self._keys.events_kept,
            (self._keys.ban_widths, client.widths),
            client.bans,
            self._logs(limits, plan, values),
            address or "",
            cost,
            tuple([text.encode(errors="replace") for field in told.items() for text in field]),
            client.watched,
            client.exempt,
            b"take" if meant else QUIET,
            self._twins(subject, limits, plan, client),
        ).with_logs()
        return self._placed(request, client) if self._keys.is_spread else request

    # Shards

    def _placed(self, request: Request, client: Client) -> Request:
        """Return the request with the shard that has its logs and bans, or with a part for each of them."""
        homes: dict[bytes, list[int]] = {client.home: []} if client.bans else {}
        for place, key in enumerate(request.logs):
            homes.setdefault(home_of(key), []).append(place)
        if len(homes) > 1:
            # The address's first, and then in an order that is the same for all: see over_shards.py.
            order = sorted(homes.items(), key=lambda pair: (pair[0] != client.home, pair[0]))
            parts = [self._part(request, client, *home) for home in order]
            return request._replace(parts=tuple(parts))
        home = next(iter(homes), client.home)
        return request._replace(
            events=self._keys.abuse_at(home), widths=self._widths_in(home, client), home=home
        )

    def _part(
        self, request: Request, client: Client, home: bytes, places: Sequence[int]
    ) -> Request:
        """Return the part of a request that one shard has. Each log under another pepper is a limit of its own."""
        logs, counted, has_bans = request.logs, request.counted, home == client.home
        return request._replace(
            limits=tuple([counted[n] for n in places]),
            plan=_plan_of_part(request, places),
            events=self._keys.abuse_at(home),
            widths=self._widths_in(home, client if has_bans else Client.nobody()),
            bans=client.bans if has_bans else (),
            keys=tuple([logs[n] for n in places]),
            twins=(),
            home=home,
            places=tuple(places),
        ).with_logs()

    def _widths_in(self, home: bytes, client: Client) -> tuple[bytes, bytes]:
        if client.bans:
            return self._keys.widths(home), client.widths
        return self._keys.no_widths(home), b""

    def _values(
        self, subject: Mapping[str, str | None], plan: Plan, client: Client, pepper: int
    ) -> dict[str, str]:
        """Return the values that Redis knows a subject's kinds by under one of the peppers, for kinds that matter.

        An empty value: the subject has none of this kind.
        """
        values: dict[str, str] = {}
        for kind, text in subject.items():
            if kind == "ip":
                values[kind] = client.subject
            elif kind == "user" or kind in plan.kinds:
                name = text or ""
                values[kind] = (
                    "" if is_nobody(text) else hidden(kind, name, self._secrets()[pepper])
                )
        return values

    def _logs(
        self, limits: tuple[Limit, ...], plan: Plan, values: Mapping[str, str]
    ) -> tuple[bytes, ...]:
        pairs = zip(limits, plan.names, strict=True)
        return tuple([self._keys.limits(*_whom(limit, values)) + name for limit, name in pairs])

    def _twins(
        self,
        subject: Mapping[str, str | None],
        limits: tuple[Limit, ...],
        plan: Plan,
        client: Client,
    ) -> tuple[tuple[int, bytes], ...]:
        """Return the logs of names under the other peppers. Each hit counts in all of them: who has one pepper sees
        it.
        """
        if not plan.hides or len(self._secrets()) == 1:
            return ()
        own = self._logs(limits, plan, self._values(subject, plan, client, 0))
        twins: list[tuple[int, bytes]] = []
        for number in range(1, len(self._secrets())):
            logs = self._logs(limits, plan, self._values(subject, plan, client, number))
            twins += [(n, key) for n, key in enumerate(logs) if key != own[n]]
        return tuple(twins)

    def _client_of(self, address: str | None) -> Client:
        return self._client(address) if address else Client.nobody(self._widths_at(b"").text)

    def _make_client(self, address: str) -> Client:
        """Make the client of an address.

        No ban is looked for where the client is exempt: it may have been banned before it was exempt.
        """
        prefix = self._settings.limit_v6_prefix
        subject = subject_of(address, prefix)
        _check_address(address, subject)
        banned: list[str] = []
        home = self._keys.home("ip", subject)
        widths = self._widths_at(home)
        if not self._exempt.has(subject):
            v6_widths = (prefix, *BAN_PREFIXES, SITE_PREFIX, *widths.v6)
            banned = prefixes_of(address, v6_widths, widths.v4)
        if _EDGES.has(subject):
            why = f"{subject} is one of Cloudflare's proxies."
            todo = (
                "STILLROOM_TRUSTED_PROXIES=cloudflare and STILLROOM_PROXY_HEADER=cf-connecting-ip"
            )
            self._tell_of_proxy("cloudflare", why, todo)
        is_nowhere = subject == UNKNOWN or is_loopback(subject)
        bans = tuple([self._keys.ban_at(home, name) for name in banned])
        watched, is_unlimited = "" if is_nowhere else subject, self._unlimited.has(subject)
        return Client(subject, bans, widths.text, watched, is_unlimited, home)

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
        """Make the plan. Raises InvalidLimit."""
        plan = _plan_of(limits, self._windows)._replace(
            counted_as=(
                "limit_checks",
                *[self._counted_as(LIMIT, "checks", limit.name) for limit in limits],
            )
        )
        own = self._own_windows
        news = [one for one in limits if one.window * _US > own.get(one.name, 0)]
        for limit in news if len(own) < WINDOWS_LIMIT else ():
            own[limit.name] = limit.window * _US
            self.waits[WINDOWS] = 0.0
            self._learn(limit.name, max(limit.window * _US, self._windows.get(limit.name, 0)))
        return plan

    def own_windows(self) -> dict[str, int]:
        """Return the longest window of each limit's name in this process, µs."""
        return dict(self._own_windows)

    def has_window(self, name: str) -> bool:
        """Return whether this process keeps a window for this limit's name."""
        return name in self._own_windows

    def learn_windows(self, names: Sequence[str], longest: Sequence[bytes]) -> None:
        """Take in the longest window of each of these names in all processes, µs."""
        for name, window in zip(names, longest, strict=True):
            self._learn(name, max(int(window), self._own_windows[name]))

    def _learn(self, name: str, window: int) -> None:
        before = self._windows.get(name)
        self._windows[name] = window
        if before not in (None, window):  # requests made with the other window are wrong
            self._forget_plans()

    def remind(self) -> None:
        """Note that it is time to compare windows again."""
        if self._own_windows:
            self.waits[WINDOWS] = 0.0

    def longest_window(self, limit: Limit) -> int:
        """Return the longest window of this limit's name, µs."""
        return max(limit.window * _US, self._windows.get(limit.name, 0))

    def known_as(self, key: bytes, limit: Limit) -> bytes:
        """Return the name that this process remembers a log by: one for each window of the limit's name."""
        return key + _memory_of(limit, self._windows)

    # Widths of bans

    def _widths_at(self, home: bytes) -> Widths:
        return self._widths.get(home) or Widths()

    def learn_widths(self, text: bytes, home: bytes) -> None:
        """Take in of which widths there are bans in this shard, as Redis writes them."""
        found = [(version, int(width)) for version, width in _WIDTH.findall(text)]
        v4 = tuple([width for version, width in found if version == b"4" and width <= 32])
        v6 = tuple([width for version, width in found if version == b"6" and width <= 128])
        self._widths[home] = Widths(text, v4, v6)
        self._forget_clients()

    def bans_of(self, address: str, widths: Iterable[str]) -> list[bytes]:
        """Return the keys that would ban this address as one of a network of such a width: `4/24` …"""
        sorts: dict[str, list[int]] = {"4": [], "6": []}
        for text in widths:
            version, _, width = text.partition("/")
            sorts[version].append(int(width))
        return list(map(self._keys.ban, prefixes_of(address, sorts["6"], sorts["4"])))

    def again(self, request: Request) -> Request:
        """Return the request with what has been learned since it was made."""
        client = self._client_of(request.address)
        request = request._replace(
            plan=self._plan(request.limits),
            widths=(self._keys.ban_widths, client.widths),
            bans=client.bans,
            taking=b"",
        ).with_logs()
        return self._placed(request, client) if self._keys.is_spread else request

    def _watch(self, client: str) -> None:
        """Log where nearly all requests come from one address, which is then a proxy that no setting names."""
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
    """Raise InvalidLimit without repeating a text that may be somebody's name."""
    if not isinstance(subject, Mapping):
        kind = type(subject).__name__
        raise InvalidLimit(
            kind, "a subject is the text of an address, or a mapping of kinds to texts"
        )
    for kind, text in subject.items():
        if text is not None and not isinstance(text, str):
            raise InvalidLimit(type(text).__name__, f"the {kind} of a subject is a str")


def _plan_of(limits: tuple[Limit, ...], windows: Mapping[str, int]) -> Plan:
    """Return the plan. Raises InvalidLimit."""
    names = [limit.name for limit in check_limits(limits)]
    numbers: list[int] = []
    for limit in limits:
        window = limit.window * _US
        longest = max(window, windows.get(limit.name, 0))
        numbers += (limit.quota, window, longest // 1_000 + LOG_SLACK_MS)
    return Plan(
        tuple(name.encode() for name in names),
        tuple(b"%d" % number for number in numbers),
        b"%d" % len(limits),
        kinds := frozenset(kind for limit in limits for kind in limit.kinds),
        any(not limit.is_open_away for limit in limits),
        max([1_000 * limit.window for limit in limits], default=1),
        kinds - {"ip"} != frozenset(),
        tuple(memory) if any(memory := [_memory_of(limit, windows) for limit in limits]) else (),
        _letters(limits),
        next((limit.name for limit in limits if limit.in_flight), ""),
    )


def _plan_of_part(request: Request, places: Sequence[int]) -> Plan:
    """Return the plan of those of a request's logs that one shard has."""
    plan, whole = request.plan, len(request.limits)
    numbers = [n if n < whole else request.twins[n - whole][0] for n in places]
    letters = b"".join([plan.letters[n : n + 1] for n in numbers])
    return plan._replace(
        names=tuple([plan.names[n] for n in numbers]),
        numbers=tuple([part for n in numbers for part in plan.numbers[3 * n : 3 * n + 3]]),
        how_many=b"%d" % len(places),
        memory=tuple([plan.memory[n] for n in numbers]) if plan.memory else (),
        letters=letters if b"s" in letters else b"",
        counted_as=(),
        telling=b"%d" % sum(n < whole for n in places),
    )


def _letters(limits: Sequence[Limit]) -> bytes:
    letters = b"".join([b"s" if limit.shadow else b"-" for limit in limits])
    return letters if b"s" in letters else b""


def _memory_of(limit: Limit, windows: Mapping[str, int]) -> bytes:
    """Return the suffix that keeps a shorter window's memory apart from that of a longer one of its name."""
    is_shorter = limit.window * _US < windows.get(limit.name, 0)
    return b"@%d" % limit.window if is_shorter else b""


def _whom(limit: Limit, values: Mapping[str, str]) -> tuple[str, str]:
    """Return whom the limit counts: kind and value. Who has no name is counted by address. Raises InvalidLimit."""
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
    """Raise InvalidLimit for a text that is no address, because all such texts would share one quota."""
    if subject == UNKNOWN and address != UNKNOWN:
        kind, colon, _ = address.partition(":")
        kind = kind if colon and kind.isidentifier() and kind != "ip" else "user"
        raise InvalidLimit(  # does not repeat a text that may be somebody's name
            f"{kind}:…" if colon else "a text",
            f"as a str a subject is an address; did you mean {{{kind!r}: …}}? What a server says of a "
            "request becomes an address by limits.client(peer, headers)",
        )
