"""Limits and pages of other origins: preflights, and what such a page may read of an answer. Pure.

Source: the Fetch standard. A browser asks before an unsafe request (OPTIONS with Origin and
Access-Control-Request-Method, never with a cookie, credentials or a body), and hides an answer from the page unless
it names the page's origin.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from stillroom.limits.fields import NAMES
from stillroom.web.headers import Header

K = TypeVar("K")
V = TypeVar("V")

LEARNED_S = 60.0
LEARNED = 1_024  # origins and paths, and clients
ASKS = 8  # of one client, in LEARNED_S
# Preflights of one client to one route that are free while none of them has been answered.
OPEN = 16
KEY_LENGTH = 400  # characters of those
ORIGIN = "access-control-allow-origin"
EXPOSE_HEADERS = "Access-Control-Expose-Headers"
EXPOSE = EXPOSE_HEADERS.lower()
# The headers of an app's CORS layer about an origin. Its others are for preflights only.
_KEPT = (ORIGIN, "access-control-allow-credentials", EXPOSE)
_NEVER_IN_A_PREFLIGHT = ("cookie", "authorization", "transfer-encoding")

_NEVER: tuple[float, list[Header]] = (-math.inf, [])


def is_preflight(method: str, header: Callable[[str], str | None]) -> bool:
    """Return whether this is a preflight. A request that only looks like one is an ordinary request.

    `header` gives the value of a header by its name in small letters, None where there is none.
    """
    return (
        method == "OPTIONS"
        and header("origin") is not None
        and header("access-control-request-method") is not None
        and header("content-length") in (None, "", "0")
        and not any(header(name) for name in _NEVER_IN_A_PREFLIGHT)
    )


def asking_for(method: str, origin: str) -> list[Header]:
    """Return the headers of a preflight for such a request."""
    return [("Origin", origin), ("Access-Control-Request-Method", method)]


def kept(headers: Sequence[Header]) -> list[Header]:
    """Return the app's CORS headers, for an answer that goes out in place of the app's."""
    found = [pair for pair in headers if pair[0].lower() in _KEPT]
    if not any(name.lower() == ORIGIN for name, _ in found):
        return []
    varies = any(name.lower() == "vary" and _names_origin(value) for name, value in headers)
    return [*found, *([("Vary", "Origin")] if varies else [])]


def exposing(headers: Sequence[Header]) -> str | None:
    """Return Access-Control-Expose-Headers, by which a page of another origin may read how its client stands.

    With what the app exposes already. None: the app's own is enough.
    """
    before = [value for name, value in headers if name.lower() == EXPOSE]
    known = {name.strip().lower() for value in before for name in value.split(",")}
    missing = [name for name in NAMES if name.lower() not in known]
    if not missing or ("*" in known and not _has_credentials(headers)):
        return None
    return ", ".join([*before, *missing])


def with_exposed(cors: Sequence[Header]) -> list[Header]:
    """Return the headers of an app's CORS layer, which also let the page read how its client stands."""
    exposed = exposing(cors) if cors else None
    if exposed is None:
        return list(cors)
    others = [pair for pair in cors if pair[0].lower() != EXPOSE]
    return [*others, (EXPOSE_HEADERS, exposed)]


class Learned:
    """Keep for some time what the app's CORS layer says of an origin. `now`: of a clock that never goes back.

    An app may do work for a preflight, so a client has it asked a few times only; once, where no CORS layer
    answers. After that the answer is what the app said of the origin last, whatever the path.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, str, str], tuple[float, list[Header]]] = OrderedDict()
        self._origins: OrderedDict[str, tuple[float, list[Header]]] = OrderedDict()
        self._asked: OrderedDict[str, tuple[float, int]] = OrderedDict()  # by client: since, times

    def get(self, key: tuple[str, str, str], client: str, now: float) -> list[Header] | None:
        """Return the headers that the app gave to such a preflight, or None: ask the app.

        `key`: origin, method and path. To ask is counted here, before the app has answered.
        """
        at, headers = self._found.get(key, _NEVER)
        if now - at < LEARNED_S:
            return headers
        since, times = self._since(client, now)
        if times < ASKS:
            _keep(self._asked, client, (since, times + 1))
            return None
        at, headers = self._origins.get(key[0], _NEVER)
        return headers if now - at < LEARNED_S else []

    def _since(self, client: str, now: float) -> tuple[float, int]:
        since, times = self._asked.get(client, (now, 0))
        return (since, times) if now - since < LEARNED_S else (now, 0)

    def add(
        self, key: tuple[str, str, str], client: str, now: float, headers: list[Header]
    ) -> list[Header]:
        if not headers:
            _keep(self._asked, client, (self._since(client, now)[0], ASKS))
        if sum(map(len, key)) <= KEY_LENGTH:
            _keep(self._found, key, (now, headers))
            if headers:
                _keep(self._origins, key[0], (now, headers))
        return headers


class Unanswered:
    """Know for some time the clients whose preflights no CORS layer has answered: their next ones are charged.

    So are the preflights of a client that has sent many without having had an answer.
    """

    def __init__(self) -> None:
        # By client and name: since, and how many preflights. All that may be, where the app itself has answered.
        self._known: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def charges(self, client: str, name: str, now: float) -> bool:
        """Count a preflight, and return whether it is charged. `name`: of what the client is charged for."""
        since, times = self._known.get((client, name), (now, 0))
        if now - since >= LEARNED_S:
            since, times = now, 0
        if times >= OPEN:
            return True
        _keep(self._known, (client, name), (since, times + 1))
        return False

    def learn(self, client: str, name: str, now: float, headers: Sequence[Header]) -> None:
        """Learn from the headers of the answer to a preflight, also to one that was charged."""
        if any(name.lower() == ORIGIN for name, _ in headers):
            self._known.pop((client, name), None)
        else:
            _keep(self._known, (client, name), (now, OPEN))


def _keep(kept: OrderedDict[K, V], key: K, value: V) -> None:
    """Keep a value, and no more than the newest. Another thread may drop any key at any time."""
    kept.pop(key, None)
    kept[key] = value
    if len(kept) > LEARNED:
        kept.popitem(last=False)


def _names_origin(value: str) -> bool:
    return any(name.strip().lower() == "origin" for name in value.split(","))


def _has_credentials(headers: Sequence[Header]) -> bool:
    """Return whether credentials are allowed, with which a `*` is a name like any other."""
    return any(name.lower() == "access-control-allow-credentials" for name, _ in headers)
