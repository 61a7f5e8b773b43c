"""Defines the events that the app and the limiter report, as they stand in the stream. Pure.

Whatever a client sent is printable ASCII of a bounded length from here on: no line of a log can be forged with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

from stillroom.errors import EventRefused, did_you_mean

# `denied` and `near` are the limiter's words; the others the app's, through `report`.
LIMITER_KINDS = ("denied", "near")
APP_KINDS = (
    "auth_fail",
    "auth_ok",
    "not_found",
    "session_unknown",
    "session_replay",
    "csrf_fail",
)
KINDS = LIMITER_KINDS + APP_KINDS
KIND_GRAMMAR = r"[a-z][a-z0-9_]{0,31}"
TEXT_LIMIT = 200  # characters
ROUTE_LIMIT = 2_000  # of which the first 200 are kept once possible tokens are out
N_LIMIT = 10**12
TOLD_AGO_MS = 1_000  # an event that was held for less is told without its age

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# A part of a path that could be a token is so long, and has a digit in it.
SECRET_LENGTH = 20
_DIGIT = re.compile(r"[0-9]")
# Long names with sizes in them that are nobody's secret: rules know them (ASKED_FOR_BY_ITSELF).
_ICON = re.compile(
    r"(apple-touch-icon|apple-app-site|favicon|mstile|android-chrome)[a-z0-9._-]{0,40}"
)


class BadEvent(ValueError):
    """An entry of the stream is not an event; the message says why."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event. What is not known is empty; `user`, `token`: HMACs; `n` is how often it has happened so far.

    `ago`: how long it had been held when it was written, ms.
    """

    kind: str
    ip: str = ""
    user: str = ""
    route: str = ""
    limit: str = ""
    n: int = 1
    token: str = ""
    ago: int = 0

    def fields(self) -> list[bytes]:
        """Return the event as XADD takes it: name, value, name, value …"""
        known = {
            "kind": self.kind,
            "n": str(self.n),
            "limit": self.limit,
            "ip": self.ip,
            "user": self.user,
            "route": self.route,
            "token": self.token,
            "ago": str(self.ago) if self.ago >= TOLD_AGO_MS else "",
        }
        return [part.encode() for item in known.items() if item[1] for part in item]


class Entry(NamedTuple):
    """An event and its id in the stream, which says when it was written, by the server's clock.

    It happened before that where it was held: see AbuseBody.hold.
    """

    id: bytes
    event: Event
    # In a cluster: from the clock of the stream's node to that of the node that counts.
    shift_ms: int = 0

    @property
    def ms(self) -> int:
        return int(self.id.partition(b"-")[0]) + self.shift_ms - self.event.ago


def read_event(fields: Sequence[bytes]) -> Event:
    """Return the event of a stream's entry. Unknown fields are ignored. Raises BadEvent."""
    texts = [field.decode("utf-8", "backslashreplace") for field in fields]
    given = dict(zip(texts[::2], texts[1::2], strict=False))
    kind = given.get("kind", "")
    if not re.fullmatch(KIND_GRAMMAR, kind):
        raise BadEvent(f"no kind of event: {cleaned(kind, 40)!r}")
    return Event(
        kind,
        ip=cleaned(given.get("ip", "")),
        user=cleaned(given.get("user", "")),
        route=cleaned_route(given.get("route", "")),
        limit=cleaned(given.get("limit", "")),
        token=cleaned(given.get("token", "")),
        n=_number("n", given.get("n", "1"), 1),
        ago=_number("ago", given.get("ago", "0"), 0),
    )


def kinds_of_apps(named: Iterable[str]) -> frozenset[str]:
    """Return the kinds an app may report: APP_KINDS and the kinds that rules name, without the limiter's own."""
    return frozenset({*APP_KINDS, *named}.difference(LIMITER_KINDS))


def check_kind(kind: str, allowed: frozenset[str]) -> None:
    """Raise EventRefused for a kind that is not allowed."""
    if not isinstance(kind, str) or kind not in allowed:
        known = sorted(allowed)
        raise EventRefused(
            f"{ascii(kind)[:80]} is no kind of event (known: {', '.join(known)}; "
            f"rules in STILLROOM_ABUSE_RULES may name others){did_you_mean(kind, known)}"
        )


def cleaned(text: str, limit: int = TEXT_LIMIT) -> str:
    """Return printable ASCII, with everything else as an escape, cut to `limit` characters.

    >>> cleaned("a\\nb\\x1b[31mé")
    'a\\\\x0ab\\\\x1b[31m\\\\xe9'
    """
    plain = text[:limit].encode("ascii", "backslashreplace").decode()
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", plain)[:limit]


def cleaned_route(route: str) -> str:
    """Return a path, or its template, without its query and without parts that could be a token.

    >>> cleaned_route("/reset/8Jx0fQ2LkT7uVw5yZa1b?next=/")
    '/reset/*9356'
    """
    path = re.split(r"[?#]", route, maxsplit=1)[0]
    parts = cleaned(path, ROUTE_LIMIT).split("/")
    return "/".join([_cut_out(part) for part in parts])[:TEXT_LIMIT]


def _cut_out(part: str) -> str:
    """Replace what could be a token by sixteen bits of its hash: two texts stay different, and nothing is given
    away.
    """
    if len(part) < SECRET_LENGTH or not _DIGIT.search(part) or _ICON.fullmatch(part):
        return part
    return f"*{crc32(part.encode()) & 0xFFFF:04x}"


def _number(name: str, text: str, least: int) -> int:
    is_short = text.isascii() and text.isdigit() and len(text) <= len(str(N_LIMIT))
    if not (is_short and least <= int(text) <= N_LIMIT):
        raise BadEvent(f"{name} is no number: {cleaned(text, 40)!r}")
    return int(text)
