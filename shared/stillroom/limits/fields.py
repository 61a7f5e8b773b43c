"""Writes limits into the headers of a response. It is the only place that knows the letters. Pure.

Source: draft-ietf-httpapi-ratelimit-headers-11 (structured fields, RFC 9651). `q` is the quota of a policy and `w`
its window; `r` is what may still be used, and `t` within how many seconds: then some of the quota comes back.
The X-RateLimit-* are what clients knew before; their reset is seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

from stillroom.limits.limit import Limit

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
# How a subject stands with a limit: -µs until its request fits, hits left, -µs until more are back, the limit's
# number in its decision, the limit. The least is the tightest.
Row: TypeAlias = tuple[int, int, int, int, Limit]


@lru_cache(1_024)
def policy_field(limits: tuple[Limit, ...]) -> str:
    """Return the header RateLimit-Policy. Limits in shadow are nobody's business.

    >>> policy_field((Limit("auth", 5, 300), Limit("exports", 3, 60, in_flight=True)))
    '"auth";q=5;w=300, "exports";q=3;qu="concurrent-requests"'
    """
    return ", ".join([_policy(limit) for limit in limits if not limit.shadow])


def _policy(limit: Limit) -> str:
    if limit.in_flight:
        return f'"{limit.name}";q={limit.quota};qu="concurrent-requests"'
    return f'"{limit.name}";q={limit.quota};w={limit.window}'


def state_field(rows: Iterable[Row]) -> str:
    """Return the header RateLimit: what is left of each limit, and in how many seconds more of it comes back.

    >>> state_field([(0, 3, -41_000_001, 0, Limit("auth", 5, 300)), (0, 1000, 0, 1, Limit("api", 1000, 3600))])
    '"auth";r=3;t=42, "api";r=1000'
    """
    return ", ".join(
        [
            f'"{limit.name}";r={left};t={-(some // _US)}' if some else f'"{limit.name}";r={left}'
            for _, left, some, _, limit in rows
        ]
    )
