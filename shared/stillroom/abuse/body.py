"""The operations on abuse: what they say to Redis, and when. abuse.py gives them their two faces.

The app and the limiter write events into a stream; a worker reads it (scan.py), and may be behind: nobody waits.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any, TypeAlias

from stillroom import pepper
from stillroom.abuse.allowance import Allowance
from stillroom.abuse.ban import Ban, read_ban
from stillroom.abuse.event import TEXT_LIMIT, Event, check_kind, cleaned_route, kinds_of_apps
from stillroom.abuse.rules import Rule, kinds_of, read_rules
from stillroom.abuse.scan import EVENT_LIFE_MS, PEACE_MS, Scan
from stillroom.abuse.spreading import WIDTHS_LIMIT, end_bans, spread_bans
from stillroom.durations import Duration, seconds_of
from stillroom.errors import (
    BanRefused,
    EventRefused,
    InvalidArgument,
    RedisRefused,
    RedisUnavailable,
    in_code,
)
from stillroom.exempt import Exempt
from stillroom.keys import Keys
from stillroom.known_bans import KnownBans
from stillroom.operation import Once, Operation, Pause
from stillroom.scripts import abuse_lift, ban
from stillroom.settings import Settings
from stillroom.shown import shown
from stillroom.stats import Stats
from stillroom.subject import (
    UNKNOWN,
    hidden,
    prefixes_of,
    subject_of,
    unwrapped_network,
    width_of,
)
from stillroom.whole import is_whole
from stillroom.wire import Command, Server, StateServer, micros, reset_after_fork

ADDRESSES = (IPv4Address, IPv6Address, IPv4Network, IPv6Network)
Address: TypeAlias = str | IPv4Address | IPv6Address | IPv4Network | IPv6Network

log = logging.getLogger("stillroom.abuse")

LOG_TASK = "stillroom.log_abuse"
HELD_LIMIT = 1_000  # events of one kind that wait for a batch to ride along with
RIDING = 1_000  # of all kinds, with one batch
BITE = 200  # events that are counted in one batch
SCAN_S = 5.0  # one scan ends after this; the next goes on
LONGEST_BY_HAND_S = 30 * 86_400
BANS_LISTED = 1_000
SPREAD_EVERY_S = 30.0  # how often bans are written again to the shards of a cluster
EXEMPT_EVERY_S = 600.0  # how often the bans in force are compared with the exemptions
V6_CLIENTS = range(56, 65)  # widths that a client's network may be set to


class AbuseBody:
    """The operations. A driver runs them."""

    def __init__(
        self,
        settings: Settings,
        server: Server | StateServer,
        keys: Keys,
        stats: Stats,
        bans: KnownBans,
    ) -> None:
        self.settings = settings
        self._bans = bans
        self.rules: tuple[Rule, ...] = read_rules(settings.abuse_rules)
        self._server = server
        self._keys = keys
        self._stats = stats
        self._peppers: tuple[bytes, ...] = ()
        self._kinds = kinds_of_apps(kinds_of(self.rules))
        allowed, proxies = settings.abuse_allow, settings.proxy_networks
        self._exempt = Exempt(allowed, proxies, settings.limit_v6_prefix)
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Start without held events. After a fork the parent sends the events that it holds."""
        # Each event with when it happened, time.monotonic().
        self._held: dict[str, deque[tuple[Event, float]]] = {
            kind: deque() for kind in sorted(self._kinds)
        }
        self._allowance = Allowance()
        self._compares_exempt_at = 0.0  # time.monotonic()
        self._spreads_at = 0.0

    # Events

    def report(
        self,
        kind: str,
        *,
        ip: Address | None = None,
        user: str | None = None,
        route: str | None = None,
        token: str | None = None,
    ) -> Operation[bool | None]:
        """Report an event that is abuse if it is frequent: auth_fail, auth_ok, not_found, csrf_fail …

        `ip`: the client's address. `user`: the user it tried to be, stored as an HMAC only. `route`: the template
        of the path, or for `not_found` the path; its query, and what could be a token, are left out. `token`: a
        token that opened nothing, stored as an HMAC only, so that the same token counts as one guess.

        Return True if it was written down. False if not: this process has reported too many of this kind, or Redis
        is away or full. None if that is not known, because no answer came in time; reported again, it might count
        twice. Both are counted and not raised. Raises EventRefused for a kind that no rule knows, or without ip and
        user, and InvalidArgument for a user, a route or a token that is not a text.
        """
        event = self._event(kind, ip, user, route, token)
        if not self._allowance.take(kind, time.monotonic()):
            self._stats.counts["abuse_dropped"] += 1
            return False
        return (yield from self._write([*self._take_held(RIDING), event]))

    def hold(
        self,
        kind: str,
        *,
        ip: str | None = None,
        user: str | None = None,
        route: str | None = None,
        token: str | None = None,
    ) -> None:
        """Queue an event, to be sent with this process' next counts. Without `ip` and `user` it is ignored.

        After an outage it is sent with its age: what happened in an hour is not what happened in one moment.
        Each kind has a limit of its own: a flood of one that any client can make drowns no other's alarm.
        """
        if ip is None and user is None:
            return
        event = self._event(kind, ip, user, route, token)
        held, now = self._held[kind], time.monotonic()
        if len(held) >= HELD_LIMIT or not self._allowance.take(kind, now):
            self._stats.counts["abuse_dropped"] += 1
            return
        held.append((event, now))

    def riding(self) -> list[Command]:
        """Return the commands that write down what is held. They may get lost with the batch that they ride in."""
        events = self._take_held(RIDING)
        if events:
            self._stats.counts["abuse_events"] += len(events)
        return list(map(self._adding, events))

    def deliver(self) -> Operation[int]:
        """Write down now what waits to ride along. Returns how many events were lost, or may be. Does not raise."""
        lost = 0
        while events := self._take_held(RIDING):
            lost += 0 if (yield from self._write(events)) else len(events)
        return lost

    # Background work

    def scan(self, limit: int = BITE, seconds: Duration = SCAN_S) -> Operation[dict[str, Any]]:
        """Read what has happened, `limit` events a bite, and log the patterns in it. For a worker.

        Each pattern is one line of the logger `stillroom.abuse`, one entry of the stream `ns:abuse:log`, and a ban
        if its rule bans. Returns counts: {"events", "patterns", "bans", "aside", "late", "done"}; `aside` could not
        be read, `late` came too late to be judged, and `done` is False if `seconds` were up first.
        Several at once share the work. Raises InvalidArgument.
        Redis away: RedisUnavailable; what was read is read again, a minute later.
        """
        if not is_whole(limit):
            raise InvalidArgument(f"limit={in_code(limit):.100}: 1 or more events a bite")
        within = seconds_of("seconds", seconds, least=0)
        about = (self.settings, self._server, self._keys, self._stats, self._bans)
        scan = Scan(*about, self.rules, self._exempt)
        done = yield from scan.run(limit, within)
        yield from self._lift_exempt()
        yield from self._spread_again()
        return done

    # Bans

    def ban(self, subject: Address, seconds: Duration, reason: str = "") -> Operation[Ban]:
        """Ban an address (of IPv6: the client's /64) or a network for some time. It replaces an earlier ban.

        Each width of networks that has a ban (`203.0.113.0/24`) costs every check a look; there may be 8 of them at
        a time, besides an IPv4 address and an IPv6 /64, /60, /56 and /48, which are looked for anyway.
        Raises BanRefused for private ranges, proxies, what is on the allowlist, a network of IPv6 that is less than
        a client's, a ninth width, and a time out of range. Redis away: RedisUnavailable.
        """
        name = self._bannable(subject)
        _check_text("reason", reason)
        seconds = seconds_of("seconds", seconds, least=-LONGEST_BY_HAND_S)
        if not 1 <= seconds <= LONGEST_BY_HAND_S:
            raise BanRefused(subject, f"{seconds:,.15g} seconds; a ban is for 1 second to 30 days")
        ms, why = round(seconds * 1000), shown(reason, TEXT_LIMIT)
        keys = [self._keys.ban(name), self._keys.bans, self._keys.ban_widths]
        (times,) = yield Once([ban(keys, name, ms, why, width_of(name), WIDTHS_LIMIT)])
        if not times:
            raise BanRefused(
                subject, f"there are bans of networks of {WIDTHS_LIMIT} other widths already"
            )
        yield from spread_bans(self._keys, [name])
        since, until = map(int, times)
        self._bans.learn(keys[0], until)
        self._stats.counts["bans"] += 1
        log.warning("%s is banned for %g s by an operator%s", name, seconds, why and f": {why}")
        return Ban(name, "operator", "", why, 0, since / 1000, until / 1000)

    def lift(self, subject: Address) -> Operation[bool]:
        """End a ban, and forget what led to it. Return True if there was one. No rule bans again for ten minutes.

        A process that has just denied the subject may do so, from memory, for 5 s more.
        Redis away: RedisUnavailable.
        """
        names = [self._named(subject)]
        if "/" not in (address := str(subject)):
            # Of a client: of whatever width processes have, or had, its network.
            names += prefixes_of(address, V6_CLIENTS)
        names = list(dict.fromkeys(names))
        lifted = yield from self._lift(names)
        for name in [name for name, done in zip(names, lifted, strict=True) if done]:
            self._bans.forget(self._keys.ban(name))
            log.warning("the ban of %s was lifted", name)
        return any(lifted)

    def _lift(self, names: Sequence[str]) -> Operation[list[bool]]:
        """Lift the bans of these subjects, in a cluster in all shards; return whether each was banned.

        The shards come first. With one of them away nothing is lifted, and workers write the ban again to the
        others: else it would hold there, and no list would show it. They come last, too, because a worker may have
        written it again meanwhile.
        """
        first = yield from end_bans(self._keys, names, EVENT_LIFE_MS + PEACE_MS)
        here = yield Once(map(self._lifting, names))
        last = yield from end_bans(self._keys, names, EVENT_LIFE_MS + PEACE_MS)
        return [any(held) for held in zip(first, here, last, strict=True)]

    def _lifting(self, name: str) -> Command:
        keys, counts = self._keys, [self._keys.abuse_count(rule.name, name) for rule in self.rules]
        own = [keys.ban(name), keys.ban_level(name), keys.ban_lifted(name)]
        own += [keys.bans, keys.ban_widths]
        return abuse_lift([*own, *counts], name, EVENT_LIFE_MS + PEACE_MS, width_of(name))

    def _lift_exempt(self) -> Operation[None]:
        """Lift the bans of clients that became exempt. This runs now and then, because other workers may lag."""
        if time.monotonic() < self._compares_exempt_at:
            return
        start, page = 0, [b""]
        while page:
            last = b"%d" % (start + BANS_LISTED - 1)
            (page,) = yield [(b"ZRANGE", self._keys.bans, b"%d" % start, last)]
            names = [name.decode(errors="replace") for name in page]
            exempt = [name for name in names if self._exempt.has(name)]
            for name in exempt:
                yield from self._lift([name])
                self._bans.forget(self._keys.ban(name))
                log.warning("the ban of %s was lifted: it is exempt", name)
            start += len(page) - len(exempt)  # they have left the index
            yield Pause(0)
        self._compares_exempt_at = time.monotonic() + EXEMPT_EVERY_S

    def _spread_again(self) -> Operation[None]:
        """Write the bans in force to the shards of a cluster again, because some may have been away."""
        if not self._keys.is_spread or time.monotonic() < self._spreads_at:
            return
        self._spreads_at = time.monotonic() + SPREAD_EVERY_S
        start, page = 0, [b""]
        while page:
            last = b"%d" % (start + BANS_LISTED - 1)
            (page,) = yield [(b"ZRANGE", self._keys.bans, b"%d" % start, last)]
            try:
                yield from spread_bans(self._keys, [name.decode(errors="replace") for name in page])
            except RedisUnavailable as error:  # the next time
                log.warning("bans do not hold in each shard yet: %s", error)
            start += len(page)

    def bans(self, limit: int = BANS_LISTED) -> Operation[list[Ban]]:
        """Return the bans in force, up to `limit`, the one that ends last first.

        Raises InvalidArgument for a `limit` that is none. Redis away: RedisUnavailable.
        """
        if not is_whole(limit):
            raise InvalidArgument(f"limit={in_code(limit):.100}: 1 or more bans")
        query = (b"ZREVRANGE", self._keys.bans, b"0", b"%d" % (limit - 1), b"WITHSCORES")
        clock, found = yield [(b"TIME",), query]
        now_ms = micros(clock) // 1_000
        pairs = zip(found[::2], map(float, found[1::2]), strict=True)
        listed = [
            (name.decode(errors="replace"), until / 1_000)
            for name, until in pairs
            if until >= now_ms
        ]
        if not listed:
            return []
        (texts,) = yield [(b"MGET", *(self._keys.ban(subject) for subject, _ in listed))]
        bans = [read_ban(*one, text) for one, text in zip(listed, texts, strict=True)]
        return [ban for ban in bans if ban is not None]

    # Writing events

    def _event(
        self,
        kind: str,
        ip: Address | None,
        user: str | None,
        route: str | None,
        token: str | None,
    ) -> Event:
        check_kind(kind, self._kinds)
        if ip is None and user is None:
            raise EventRefused(f"{kind}: an event needs a subject: give ip=, user= or both")
        ip = str(ip) if isinstance(ip, ADDRESSES) else ip
        for name, text in {"ip": ip, "user": user, "route": route, "token": token}.items():
            if text is not None:
                _check_text(name, text)
        return Event(
            kind,
            ip="" if ip is None else subject_of(ip, self.settings.limit_v6_prefix),
            user="" if user is None else hidden("user", user, self._pepper()),
            route=cleaned_route(route or ""),
            token="" if token is None else hidden("token", token, self._pepper()),
        )

    def _pepper(self) -> bytes:
        """Return the pepper that hides names, which is the limiter's."""
        if not self._peppers:
            self._peppers = pepper.ring(
                self.settings,
                self.settings.session_peppers,
                "STILLROOM_SESSION_PEPPERS",
                without="users are not known again by other processes, or later",
            )
        return self._peppers[0]

    def _write(self, events: Sequence[Event]) -> Operation[bool | None]:
        """Return whether the events, or at least the last, were written. None means unknown.

        Once: an event that is written twice counts twice.
        """
        try:
            yield Once(map(self._adding, events))
        except RedisRefused as refused:
            bad = [isinstance(reply, Exception) for reply in refused.replies] or [True]
            self._stats.counts["abuse_dropped"] += sum(bad)
            self._stats.say("events of abuse are lost", refused.reason, refused)
            return not bad[-1]
        except RedisUnavailable as error:
            self._stats.counts["abuse_dropped"] += len(events)
            self._stats.say("events of abuse are lost", error.reason, error)
            return None if error.may_be_done else False
        self._stats.counts["abuse_events"] += len(events)
        return True

    def _adding(self, event: Event) -> Command:
        keys = self._keys
        home = keys.home("ip", event.ip) if event.ip else keys.home("user", event.user)
        kept = b"%d" % keys.events_kept
        return (b"XADD", keys.abuse_at(home), b"MAXLEN", b"~", kept, b"*", *event.fields())

    def _take_held(self, most: int) -> list[Event]:
        """Take queued events, the rarest kinds first. Several threads may call this; each event is taken once."""
        events: list[Event] = []
        for held in sorted(self._held.values(), key=len):
            while held and len(events) < most:
                try:
                    event, at = held.popleft()
                except IndexError:  # another thread took the last one
                    break
                events.append(replace(event, ago=int((time.monotonic() - at) * 1_000)))
        return events

    def _bannable(self, subject: Address) -> str:
        name = self._named(subject)
        if why := self._exempt.why(name):
            raise BanRefused(subject, why)
        return name

    def _named(self, text: object) -> str:
        """Return the subject a person means: a network as it stands, and an IPv6 address as its client's prefix."""
        if isinstance(text, ADDRESSES):
            text = str(text)
        if not isinstance(text, str):
            return UNKNOWN
        if "/" not in text:
            return subject_of(text, self.settings.limit_v6_prefix)
        try:
            network = unwrapped_network(ip_network(text.strip(), strict=False))
        except ValueError:
            return UNKNOWN
        is_address = network.version == 4 and network.prefixlen == 32
        return str(network.network_address if is_address else network)


def _check_text(name: str, given: object) -> None:
    """Raise InvalidArgument for what is no text, without repeating it: it may be somebody's name."""
    if not isinstance(given, str):
        raise InvalidArgument(f"{name} is text, not {type(given).__name__}")
