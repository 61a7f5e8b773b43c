"""The headers of a response: what they say, and what is added to them. Pure.

They are text everywhere but in the messages of ASGI, where they are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter, methodcaller
from typing import TypeAlias

from stillroom.whole import number_in

Header: TypeAlias = tuple[str, str]

# Headers that overrule Cache-Control in shared caches: RFC 9213 (…-Cache-Control), and its predecessors.
FOR_CACHES = ("surrogate-control", "edge-control", "x-accel-expires")

_name_of, _value_of = itemgetter(0), itemgetter(1)
_in_latin_1 = methodcaller("encode", "latin-1")


def decoded(headers: Iterable[tuple[bytes, bytes]]) -> list[Header]:
    """Return the headers of a message as text. In Latin-1, so that `encoded` gives the same bytes back."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def encoded(headers: Sequence[Header]) -> list[tuple[bytes, bytes]]:
    """Return the headers as a message has them."""
    names, values = map(_name_of, headers), map(_value_of, headers)
    return list(zip(map(_encoded_name, names), map(_in_latin_1, values), strict=True))


@lru_cache(256)  # the names that we and the apps' CORS layers use
def _encoded_name(name: str) -> bytes:
    return name.lower().encode("latin-1")


def names_of(headers: Iterable[Header]) -> Iterable[str]:
    return map(_name_of, headers)


def length_of(headers: Iterable[Header]) -> float:
    """Return the length of a body as its headers say it, or infinity. Who has so much has the whole response."""
    said = next((value for name, value in headers if name.lower() == "content-length"), "")
    length = number_in(said)
    return math.inf if length is None else length


def lacking(names: Iterable[str], more: Mapping[str, str]) -> list[Header]:
    """Return those of `more` that are not among the app's headers, of which these are the names: they win."""
    names = {*map(str.lower, names)}
    if names.isdisjoint(map(str.lower, more)):  # as nearly always
        return list(more.items())
    return [header for header in more.items() if header[0].lower() not in names]


def vary(headers: Iterable[Header]) -> list[Header]:
    """Add Vary: Cookie, unless the app says so itself."""
    if varies(headers):
        for value in _values(headers, "vary"):
            if value.strip().lower() in ("cookie", "*"):
                return []
    return [("Vary", "Cookie")]


def varies(headers: Iterable[Header]) -> bool:
    """Return whether there is a Vary among the headers."""
    return "vary" in map(str.lower, names_of(headers))


def private(headers: Iterable[Header]) -> tuple[list[Header], frozenset[str]]:
    """Return the headers to add, and the names of those to take away, so that no shared cache keeps the response.

    The response has a visitor's cookie in it: whoever got it from a cache would be that visitor. So this overrules
    a `public` of the app's.
    """
    headers = list(headers)
    rules = [rule.strip() for rule in _values(headers, "cache-control") if rule.strip()]
    without = frozenset(name.lower() for name, _ in headers if _is_for_caches(name.lower()))
    names = {rule.lower() for rule in rules}
    # A cache that knows must-understand ignores a no-store beside it (RFC 9111, section 5.2.2.3).
    closing = {"private"} if "must-understand" in names else {"private", "no-store"}
    if names & closing and not any(map(_opens, names)):
        return [], without
    kept = [rule for rule in rules if not _opens(rule.lower()) and rule.lower() != "private"]
    return [("Cache-Control", ", ".join(["private", *kept]))], without | {"cache-control"}


def _opens(rule: str) -> bool:
    """Return whether this rule lets a shared cache keep the response."""
    return rule == "public" or rule.partition("=")[0].strip() == "s-maxage"


def _is_for_caches(name: str) -> bool:
    return name in FOR_CACHES or name.endswith("-cache-control")


def _values(headers: Iterable[Header], wanted: str) -> list[str]:
    found = [value for name, value in headers if name.lower() == wanted]
    return [part for value in found for part in value.split(",")]
