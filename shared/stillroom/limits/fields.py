"""This module writes limits into the headers of a response. It is the only place that knows the letters. Pure.

Source: draft-ietf-httpapi-ratelimit-headers-11 (structured fields, RFC 9651). `q` is the quota of a policy and `w`
its window; `r` is what may still be used, and `t` within how many seconds: then some of the quota comes back.
The X-RateLimit-* are what clients knew before; their reset is seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from stillroom.limits.limit import Limit

DRAFT = 11
# The headers that a page of another origin may read once the response names them.
NAMES = (
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
)
_US = 1_000_000


class Letters(NamedTuple):
    """The names of the parameters in one version of the draft."""

    quota: str
    window: str
    left: str
    within: str
    unit: str


LETTERS: Mapping[int, Letters] = {11: Letters("q", "w", "r", "t", "qu")}


@lru_cache(1_024)
def policy_field(limits: tuple[Limit, ...], draft: int = DRAFT) -> str:
    """Return the header RateLimit-Policy. Limits in shadow are nobody's business.

    >>> policy_field((Limit("auth", 5, 300), Limit("exports", 3, 60, in_flight=True)))
    '"auth";q=5;w=300, "exports";q=3;qu="concurrent-requests"'
    """
    return ", ".join([_policy(limit, LETTERS[draft]) for limit in limits if not limit.shadow])


def _policy(limit: Limit, letters: Letters) -> str:
    q, w, _, _, qu = letters
    if limit.in_flight:
        return f'"{limit.name}";{q}={limit.quota};{qu}="concurrent-requests"'
    return f'"{limit.name}";{q}={limit.quota};{w}={limit.window}'


def state_field(rows: Iterable[tuple[str, int, int]], draft: int = DRAFT) -> str:
    """RateLimit, of each limit's name, what is left, and the µs until more comes back (0: all of it is there).

    >>> state_field([("auth", 3, 41_000_001), ("api", 1000, 0)])
    '"auth";r=3;t=42, "api";r=1000'
    """
    _, _, r, t, _ = LETTERS[draft]
    return ", ".join(
        [
            f'"{name}";{r}={left};{t}={-(-back // _US)}' if back else f'"{name}";{r}={left}'
            for name, left, back in rows
        ]
    )
