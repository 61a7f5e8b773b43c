"""Describes abuse as data: the built-in rules, and the operator's file that changes and adds rules. Pure.

The file is TOML. A table with a built-in rule's name changes the fields that it names; any other is a new rule:

    [rules.scanner]
    shadow = false          # from now on it bans

    [rules.card_testing]
    kinds = ["card_declined"]       # the app may report this kind from now on
    group_by = "ip"
    threshold = 5
    window = 600
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stillroom.abuse.event import KIND_GRAMMAR, Event
from stillroom.errors import SettingsError, did_you_mean
from stillroom.subject import site_of

# Files that browsers and well-behaved robots request by themselves: most sites lack them, and asking is no attack.
ASKED_FOR_BY_ITSELF = (
    "*/favicon.ico",
    "*/favicon*.png",
    "*/apple-touch-icon*.png",
    "*/apple-app-site-association",
    "*/mstile-*.png",
    "*/android-chrome-*.png",
    "*/browserconfig.xml",
    "*/manifest.json",
    "*/*.webmanifest",
    "*/service-worker.js",
    "*/sw.js",
    "/.well-known/*",
    "/robots.txt",
    "/humans.txt",
    "/security.txt",
    "/ads.txt",
    "/app-ads.txt",
    "/llms.txt",
    "/crossdomain.xml",
    "/clientaccesspolicy.xml",
    "/sitemap*.xml*",
    "/feed",
    "/feed.xml",
    "/rss",
    "/rss.xml",
    "/atom.xml",
)

RULE_GRAMMAR = r"[a-z][a-z0-9_]{0,39}"
MEMBERS_PER_THRESHOLD = 4  # how far a rule counts on, so that its line can say how bad it is

Kind = Annotated[str, Field(pattern=f"^{KIND_GRAMMAR}$")]
EachKind = Annotated[str, Field(pattern=f"^{KIND_GRAMMAR}(:[A-Za-z0-9._-]{{1,64}})?$")]
Group = Literal["ip", "user", "network"]
Distinct = Literal["none", "user", "ip", "route", "network", "token"]
Action = Literal["log", "ban"]


class Rule(BaseModel):
    """A rule finds a pattern when one group has `threshold` events of its kinds within `window` seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=f"^{RULE_GRAMMAR}$")
    why: str = Field("", max_length=200)  # a sentence for the reader of the log
    kinds: tuple[Kind, ...] = Field(min_length=1)
    group_by: Group  # an address (of IPv6 the client's prefix), a user, an IPv6 /48
    distinct: Distinct = "none"  # count different users, routes …; none: count events
    # With distinct="ip": an address counts when it has so many events of a kind of its own. Of `denied` that is how
    # often it was denied (`denied:auth`: by that limit), of `not_found` how many different pages it has asked for.
    each: Mapping[EachKind, Annotated[int, Field(ge=1, le=1_000)]] = {}
    exempt: tuple[str, ...] = ()  # paths whose events do not count, as globs: "*/favicon.ico"
    threshold: int = Field(ge=1, le=1_000)
    window: int = Field(ge=1, le=86_400)  # seconds
    n: int = Field(1, ge=1)  # only events that have happened so often: denials come at 1, 2, 4, 8 …
    consecutive: bool = False  # count windows in a row that had an event of this kind
    then: Kind | None = None  # the pattern is complete when an event of this kind follows
    action: Action = "log"
    ban: int = Field(300, ge=1, le=86_400)  # seconds of a first ban; each next is 4 times as long
    shadow: bool = True  # log the action without taking it

    @model_validator(mode="after")
    def _make_sense(self) -> Rule:
        if self.action == "ban" and self.group_by == "user":
            # A client that knows a name could lock its owner out, so only addresses are banned.
            raise ValueError(
                "action='ban' needs group_by='ip' or 'network': no user is ever banned"
            )
        if self.distinct in _ONE_OF[self.group_by]:
            raise ValueError(
                f"one {self.group_by} has one {self.distinct}: distinct={self.distinct!r} counts to 1"
            )
        if self.each and self.distinct != "ip":
            raise ValueError("each counts the events of one address: it needs distinct='ip'")
        known = {*self.kinds, *(kind for rule in BUILT_IN.values() for kind in rule["kinds"])}
        for kind in [key.partition(":")[0] for key in self.each]:
            if kind not in known:
                hint = did_you_mean(kind, known)
                raise ValueError(f"each has {kind}, which this rule does not count{hint}")
        if self.consecutive and (self.distinct != "none" or self.then):
            raise ValueError(
                "consecutive counts windows: it can't be combined with distinct or then"
            )
        return self

    @property
    def kept(self) -> int:
        """Return the seconds a count is kept: its window, or all windows in a row, each with a pause behind it."""
        return self.window * (2 * self.threshold + 1 if self.consecutive else 1)

    @property
    def most(self) -> int:
        """Return how many members a count keeps."""
        return self.threshold * MEMBERS_PER_THRESHOLD

    def counts(self, event: Event) -> bool:
        """Return whether this rule counts the event."""
        if event.kind not in self.kinds or event.n < self.n:
            return False
        return not any(fnmatchcase(event.route, glob) for glob in self.exempt)

    def needs(self, event: Event) -> int:
        """Return how many events like this one its address needs of its own: see `each`."""
        return self.each.get(f"{event.kind}:{event.limit}", self.each.get(event.kind, 1))

    def group_of(self, event: Event) -> str:
        """Return the event's user, address or /48, by `group_by`. It is empty if the event has none."""
        if self.group_by == "user":
            return event.user
        if self.group_by == "ip":
            return event.ip
        return site_of(event.ip) or ""


_ONE_OF: Mapping[str, tuple[str, ...]] = {
    "ip": ("ip", "network"),
    "user": ("user",),
    "network": ("network",),
}

BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "hammer": {
        "why": "goes on although it is denied",
        "kinds": ["denied"],
        "group_by": "ip",
        "n": 64,
        "threshold": 1,
        "window": 600,
        "action": "ban",
    },
    "credential_stuffing": {
        "why": "one address fails to log in as many users",
        "kinds": ["auth_fail"],
        "group_by": "ip",
        "distinct": "user",
        "threshold": 10,
        "window": 600,
        "action": "ban",
    },
    "password_spraying": {
        "why": "many addresses fail to log in as one user: ask that user for a second factor",
        "kinds": ["auth_fail"],
        "group_by": "user",
        "distinct": "ip",
        "threshold": 10,
        "window": 600,
    },
    "guessed_password": {
        "why": "a user logged in after many failures: compromised?",
        "kinds": ["auth_fail"],
        "group_by": "user",
        "threshold": 10,
        "window": 600,
        "then": "auth_ok",
    },
    "stuffed_credentials": {
        "why": "an address logged in after it failed as several users: compromised?",
        "kinds": ["auth_fail"],
        "group_by": "ip",
        "distinct": "user",
        "threshold": 5,
        "window": 600,
        "then": "auth_ok",
    },
    "scanner": {
        "why": "asks for many pages that do not exist",
        "kinds": ["not_found"],
        "group_by": "ip",
        "distinct": "route",
        "exempt": ASKED_FOR_BY_ITSELF,
        "threshold": 20,
        "window": 60,
        "action": "ban",
    },
    "session_guessing": {
        "why": "shows many tokens of sessions that do not exist",
        "kinds": ["session_unknown"],
        "group_by": "ip",
        "distinct": "token",
        "threshold": 20,
        "window": 60,
        "action": "ban",
    },
    "token_replay": {
        "why": "a token was used after it had been replaced: stolen?",
        "kinds": ["session_replay"],
        "group_by": "user",
        "threshold": 1,
        "window": 600,
    },
    # A /48 may be one customer's or a mobile carrier's with 65,536 of them. So each address in it has to have done
    # enough by itself: one mistyped password, one icon that is missing, is nobody's attack.
    "ipv6_rotation": {
        "why": "many clients of one /48 go on being refused: one client with many addresses?",
        "kinds": ["denied", "auth_fail", "not_found", "session_unknown"],
        "group_by": "network",
        "distinct": "ip",
        "each": {
            "denied": 16,
            "denied:auth": 1,  # a client without logins left has tried often enough
            "denied:login": 1,
            "auth_fail": 5,
            "not_found": 10,
            "session_unknown": 5,
        },
        "exempt": ASKED_FOR_BY_ITSELF,
        "threshold": 16,
        "window": 600,
        "action": "ban",
    },
    "creeping_scraper": {
        "why": "has used nearly all of its quota, minute after minute",
        "kinds": ["near"],
        "group_by": "ip",
        "consecutive": True,
        "threshold": 30,
        "window": 60,
    },
}


def read_rules(path: Path | None) -> tuple[Rule, ...]:
    """Return the built-in rules with the changes and additions of the operator's file.

    Raises SettingsError, which names each mistake.
    """
    tables: dict[str, dict[str, Any]] = {name: dict(rule) for name, rule in BUILT_IN.items()}
    for name, changes in (_tables_in(path) if path else {}).items():
        tables[name] = tables.get(name, {}) | changes
    mistakes: list[str] = []
    rules = [rule for name, fields in tables.items() if (rule := _rule(name, fields, mistakes))]
    if mistakes:
        raise SettingsError("\n".join(f"STILLROOM_ABUSE_RULES={path}: {one}" for one in mistakes))
    return tuple(rules)


def kinds_of(rules: Iterable[Rule]) -> frozenset[str]:
    """Return all kinds of event that some rule looks at."""
    return frozenset(kind for rule in rules for kind in (*rule.kinds, rule.then) if kind)


def _tables_in(path: Path) -> Mapping[str, dict[str, Any]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"STILLROOM_ABUSE_RULES={path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"STILLROOM_ABUSE_RULES={path}: not TOML: {error}") from None
    rules = content.pop("rules", {})
    if (
        content
        or not isinstance(rules, dict)
        or not all(isinstance(r, dict) for r in rules.values())
    ):
        raise SettingsError(
            f"STILLROOM_ABUSE_RULES={path}: it may hold tables named [rules.<name>] only"
        )
    return rules


def _rule(name: str, fields: Mapping[str, Any], mistakes: list[str]) -> Rule | None:
    """Return the rule, or None and a line for each mistake in it."""
    try:
        return Rule.model_validate({**fields, "name": name})
    except ValidationError as error:
        hint = "" if name in BUILT_IN else did_you_mean(name, BUILT_IN)
        what = [_explained(detail, hint) for detail in error.errors()]
        mistakes.extend(f"rule {ascii(name)[1:-1]}: {one}" for one in what)
        return None


def _explained(detail: Any, hint: str) -> str:
    field = ".".join(map(str, detail["loc"]))
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{field} is not a field{did_you_mean(field, Rule.model_fields)}"
    if detail["type"] == "missing":
        return f"{field} is missing, and no built-in rule has this name{hint}"
    if detail["type"] == "literal_error":
        allowed = get_args(Rule.model_fields[field].annotation)
        return f"{field}={detail['input']!r}: {message}{did_you_mean(detail['input'], allowed)}"
    return f"{field}={detail['input']!r}: {message}" if field else message
