"""Defines a limit, and contains the limits that most apps need. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from stillroom.durations import meant_seconds
from stillroom.errors import InvalidLimit
from stillroom.misuse import explained

Away = Literal["local", "open", "strict"]

QUOTA_LIMIT = 1_000_000  # hits
WINDOW_LIMIT = 366 * 86_400  # seconds
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_BY = re.compile(r"[a-z][a-z0-9_]{0,31}(&[a-z][a-z0-9_]{0,31}){0,3}", re.ASCII)


@explained
@dataclass(frozen=True, slots=True)
class Limit:
    """At most `quota` hits of one subject in any `window` seconds, wherever the window begins.

    `by` says which subject of a request is counted: "ip", "user", "ip&user", or any kinds an app names.
    `away` is what happens while Redis is away. "local": each process admits its share of the quota. "open":
    everybody is let through. "strict": the share, and if a process already counts as many subjects as it may, new
    subjects share one quota with their network (or all get 503: see the setting limits_strict_503). If a mistake in
    the configuration keeps Redis from deciding, "strict" is 503 for all. Redis stores hits and not the limit, so
    quota and window may change at any time.

    `in_flight`: at most `quota` at the same time. Each request is reserved, and refunded when it is over; `window`
    is the lease, after which the place of a process that died is free. `shadow`: the limit denies nothing. It
    counts what it would have admitted, and a decision says when it would have denied. Raises InvalidLimit.
    """

    name: str
    quota: int
    window: int
    by: str = "ip"
    away: Away = "local"
    in_flight: bool = False
    shadow: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidLimit(self.name, "a limit's name is 1 to 64 of A-Z a-z 0-9 . _ -")
        _check_number(self.quota, "quota", 0, QUOTA_LIMIT, "hits")
        _check_number(self.window, "window", 1, WINDOW_LIMIT, "seconds")
        if not isinstance(self.by, str) or not _BY.fullmatch(self.by):
            raise InvalidLimit(
                self.by, "a limit counts by kinds of subjects: ip, user, ip&user, or your own"
            )
        if self.away not in get_args(Away):
            raise InvalidLimit(self.away, f"away is {_one_of(self.away, get_args(Away))}")
        for name in ("name", "by", "away"):
            if type(text := getattr(self, name)) is not str:  # f"{…}" writes a (str, Enum) as `E.A`
                object.__setattr__(self, name, str.__str__(text))
        for name, given in (("in_flight", self.in_flight), ("shadow", self.shadow)):
            if not isinstance(given, bool):
                raise InvalidLimit(given, f"{name} is True or False")

    def __hash__(self) -> int:
        # Run on every request, so it reads only the fields in which many limits differ (a quota for each tenant).
        return hash(self.name) ^ self.quota

    @property
    def is_open_away(self) -> bool:
        """Return whether everybody is let through while Redis is away."""
        return self.away == "open" or self.shadow

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the parts of its subject: "ip" and "user" of `by="ip&user"`."""
        return tuple(self.by.split("&"))


def check_limits(limits: object) -> tuple[Limit, ...]:
    """Return the limits of one request. Raises InvalidLimit for what is no list of them."""
    if isinstance(limits, Limit):
        raise InvalidLimit(limits.name, "limits are a list; did you mean [Limit(…)]?")
    if isinstance(limits, str) or not isinstance(limits, Iterable):
        raise InvalidLimit(limits, "limits are a list of Limit(…)s, such as [DEFAULT, API]")
    found = tuple(limits)
    for one in found:
        if not isinstance(one, Limit):
            raise InvalidLimit(one, f"a limit is a Limit(…), not a {type(one).__name__}")
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidLimit(twice, "two limits of one request have this name")
    return found


def check_cost(cost: int) -> None:
    """Raise InvalidLimit for what no request can cost."""
    _check_number(cost, "cost", 0, QUOTA_LIMIT, "hits")


def _check_number(given: object, name: str, least: int, most: int, unit: str) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
        meant = meant_seconds(given) if unit == "seconds" else ""
        hint = f"; did you mean {meant}?" if meant else ""
        raise InvalidLimit(given, f"{name} is a whole number, {least} to {most:,} {unit}{hint}")


def _one_of(given: object, allowed: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(given), allowed, n=1)
    return " or ".join(allowed) + (f"; did you mean {near[0]}?" if near else "")


DEFAULT = Limit("default", 100, 60)
API = Limit("api", 1000, 3600)
AUTH = Limit("auth", 5, 300, away="strict")
STATIC = Limit("static", 1000, 60, away="open")
