"""Decides how one endpoint's responses are kept, and which requests may share one. Pure.

A page is rendered from a request that has nothing but what its key has: the address, the named query parameters and
the named headers. So a view can't see what would make its answer true for one visitor only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv6Address
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument
from stillroom.misuse import YES_OR_NO, refuse_other

# Query parameters that tell who sent the visitor, and change nothing on a page.
CAMPAIGNS = ("utm_*", "fbclid", "gclid", "msclkid", "mc_cid", "mc_eid")
# Cookies of analytics. Any other may be a session, under whatever name.
ANALYTICS = ("_ga", "_ga_*", "_gid", "_gat*", "_gcl_*", "_fbp", "_hj*", "__utm*", "_pk_*", "ajs_*")
IDENTITY_LIMIT = 700  # bytes of all that tells pages apart: longer requests are not cached
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?", re.ASCII)
_PATH_SAFE = "/:@!$&'()*+,;=-._~"


class Visit(NamedTuple):
    """A request, as far as the cache of pages needs it. Header names are lower case."""

    method: str
    site: str  # https://shop.example/mounted
    path: str  # below the site, decoded
    query: str
    headers: Mapping[str, str]


class Identity(NamedTuple):
    """Tell one page of an endpoint from another. `target` is the path and query, `vary` the named headers."""

    site: str
    target: str
    vary: str


@dataclass(frozen=True)
class Policy:
    """The options of Pages.page. Raises ValueError."""

    query: Sequence[str] = ()
    ignore: Sequence[str] = CAMPAIGNS
    vary: Sequence[str] = ()
    sessions: bool = False
    max_age: Duration = 0
    s_maxage: Duration | None = None
    stale_while_revalidate: Duration | None = None
    stale_if_error: Duration | None = None

    def __post_init__(self) -> None:
        for name in ("query", "ignore", "vary"):
            object.__setattr__(self, name, listed(name, getattr(self, name)))
        refuse_other("sessions", self.sessions, bool, YES_OR_NO)
        for header in self.vary:
            if not _HEADER.fullmatch(header) or header.lower() in ("cookie", "authorization"):
                raise InvalidArgument(f"vary={header!r}: the name of a header other than Cookie")
        for name in ("max_age", "s_maxage", "stale_while_revalidate", "stale_if_error"):
            given = getattr(self, name)
            if given is not None:
                given = int(seconds_of(name, given, least=0, most=31_622_400))
            object.__setattr__(self, name, given)

    @property
    def cache_control(self) -> str:
        """Return the Cache-Control for browsers and CDNs.

        Invalidations do not reach them, so by default they ask each time.
        """
        words = ["public", f"max-age={self.max_age}"]
        if self.s_maxage is not None:
            words.append(f"s-maxage={self.s_maxage}")
        if self.stale_while_revalidate is not None:
            words.append(f"stale-while-revalidate={self.stale_while_revalidate}")
        if self.stale_if_error is not None:
            words.append(f"stale-if-error={self.stale_if_error}")
        return ", ".join(words if len(words) > 2 or self.max_age else ["public", "no-cache"])

    @property
    def varies_by(self) -> list[str]:
        """Return the request headers that decide which response is the right one."""
        return [*self.vary, *([] if self.sessions else ["Cookie", "Authorization"])]


def listed(option: str, given: Any) -> tuple[str, ...]:
    """Return the names that an option was given, a set's in the order that they have in every process.

    Raises InvalidArgument for anything else, also for one text: it would be a list of its letters.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise InvalidArgument(f"{option}={given!r}: a list of names")
    names = tuple(sorted(given) if isinstance(given, AbstractSet) else given)
    if not all(isinstance(one, str) for one in names):
        raise InvalidArgument(f"{option}={list(names)!r}: a list of names")
    return names


def identify(visit: Visit, policy: Policy, harmless: Sequence[str]) -> Identity | str:
    """Return which page a request asks for, or in a word why it is not answered from the cache."""
    if visit.method not in ("GET", "HEAD"):
        return "method"
    if not _has_host(visit.headers):
        return "host"
    if not policy.sessions and _has_session(visit.headers, harmless):
        return "session"
    query = _shared_query(visit.query, policy)
    if query is None:
        return "query"
    target = quote(visit.path, safe=_PATH_SAFE) + (f"?{query}" if query else "")
    named = {name.lower(): visit.headers.get(name.lower()) for name in policy.vary}
    values = [(name, " ".join(value.split())) for name, value in named.items() if value is not None]
    identity = Identity(visit.site, target, urlencode(values))
    return "length" if sum(len(part) for part in identity) > IDENTITY_LIMIT else identity


def _has_host(headers: Mapping[str, str]) -> bool:
    """Return whether the request's Host is one, or not said. A client may send any text."""
    found = _HOST.fullmatch(headers.get("host", "localhost"))
    if found is None or int(found[2] or 0) > 65_535:
        return False
    return not found[1].startswith("[") or _is_ipv6(found[1][1:-1])


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _has_session(headers: Mapping[str, str], harmless: Sequence[str]) -> bool:
    if "authorization" in headers:
        return True
    names = [pair.partition("=")[0].strip() for pair in headers.get("cookie", "").split(";")]
    return any(name and not _fits(name, harmless) for name in names)


def _shared_query(query: str, policy: Policy) -> str | None:
    """Return the parameters that belong to the page, in one order; None if there are others.

    None also for bytes that are no ASCII, or no UTF-8: frameworks differ in what they make of them.
    """
    if not query:
        return ""
    try:
        query.encode("ascii")
        given = parse_qsl(query, keep_blank_values=True, errors="strict")
    except UnicodeError:
        return None
    kept = [(name, value) for name, value in given if not _fits(name, policy.ignore)]
    if any(name not in policy.query for name, _ in kept):
        return None
    return urlencode([pair for name in policy.query for pair in kept if pair[0] == name])


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
