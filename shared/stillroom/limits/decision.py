"""Holds the decision about a request, and writes its headers (see fields.py) and problem details. Pure.

Problems: RFC 9457, of the types that draft-ietf-httpapi-ratelimit-headers-11 registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stillroom.limits.fields import Row, policy_field, state_field
from stillroom.limits.limit import Limit

OK, TOO_MANY, UNAVAILABLE = 200, 429, 503
NEVER = -1
UNTOLD = (-1, 0, 0, 0)  # of a limit that could not be looked at
PARTS = len(UNTOLD)
_TYPES = "https://iana.org/assignments/http-problem-types#"
_US = 1_000_000
_FOREVER = 1 << 60


class Standing(NamedTuple):
    """Describe how a subject stands with one limit. Times are seconds from the decision.

    `reset`: until more of the quota comes back; 0: all of it is there. `full`: until all of it has come back.
    `retry_after`: until this request would fit; 0: it does; None: never.
    """

    limit: Limit
    remaining: int
    reset: float
    full: float
    retry_after: float | None


class Decision(NamedTuple):
    """Tell whether a request may go on; the decision is true where it may. Its details are made when asked for.

    `status` is 200, 429, or 503 where it can't be decided without Redis. `degraded` is why Redis could not be asked
    ("timeout", "breaker" …); it is empty where Redis was asked.
    """

    limits: tuple[Limit, ...]
    status: int
    cost: int
    now_us: int  # the server's clock, since 1970
    # For each limit: hits used, and the µs until some are back, until the request fits, until all are back.
    said: Sequence[int] = ()
    age_us: int = 0  # since it was said: it is a denial that this process remembers
    wait_us: int = 0  # of a ban, or until Redis may be back
    degraded: str = ""

    def __bool__(self) -> bool:
        return self.status == OK

    @property
    def allowed(self) -> bool:
        """Return whether the request may go on, as the decision's truth does."""
        return self.status == OK

    @property
    def banned(self) -> bool:
        """Return whether the client is denied because it is banned, not because of this request."""
        return self.status == TOO_MANY and not self.said

    @property
    def standings(self) -> tuple[Standing, ...]:
        """Return the standing of each limit that was evaluated, the tightest first."""
        return tuple([self._standing(*row) for row in self.rows()])

    @property
    def violated(self) -> tuple[Limit, ...]:
        """Return the limits that deny this request."""
        return tuple(one.limit for one in self.standings if one.retry_after != 0)

    @property
    def remaining(self) -> int | None:
        """Return the least that is left of any quota. None: no limit was evaluated."""
        return min((one.remaining for one in self.standings), default=None)

    @property
    def retry_after(self) -> float | None:
        """Return seconds until this request would be admitted. 0: it is. None: never, its cost is over a whole
        quota.
        """
        if self.status == OK:
            return 0.0
        if self.wait_us:
            return max(0, self.wait_us - self.age_us) / _US
        waits = [one.retry_after for one in self.standings]
        return None if None in waits else max((wait for wait in waits if wait), default=0.0)

    def headers(self) -> dict[str, str]:
        """Return the rate-limit headers for any response. Limits that could not be evaluated are left out."""
        limits, headers = self.limits, {}
        if limits and (policy := policy_field(limits)):
            headers["RateLimit-Policy"] = policy
        if rows := self.rows():
            headers["RateLimit"] = state_field(rows)
            self._write_older(headers, rows[0])
        return headers if self.status == OK else headers | self._refusal()

    def problem(self) -> dict[str, Any]:
        """Return the problem details of a denial, for a body of application/problem+json. Empty if it is none."""
        if self.status == OK:
            return {}
        kind, title, detail = self._explanation()
        return {
            "type": _TYPES + kind,
            "title": title,
            "status": self.status,
            "detail": detail,
            "violated-policies": [limit.name for limit in self.violated],
        }

    @property
    def would_deny(self) -> tuple[Limit, ...]:
        """Return the limits in shadow that would have denied this request."""
        said = self.said
        return tuple(
            [
                limit
                for number, limit in enumerate(self.limits if said else ())
                if limit.shadow and said[PARTS * number] >= 0 and said[PARTS * number + 2] != 0
            ]
        )

    def rows(self) -> list[Row]:
        """Return how the subject stands with each limit, the tightest first.

        A limit in shadow has no row. A request in flight may be over at any moment.
        """
        age, parts = self.age_us, iter(self.said)
        rows: list[Row] = []
        stands = zip(self.limits, parts, parts, parts, parts, strict=False)  # nothing may be said
        for number, (limit, used, some, fits, _) in enumerate(stands):
            if used < 0 or limit.shadow:
                continue
            wait = fits and (_FOREVER if fits == NEVER else max(1, fits - age))
            left, back = limit.quota - used, age - some
            if limit.in_flight:
                wait, back = min(wait, _US) if wait != _FOREVER else wait, 0
            rows.append((-wait, left if left > 0 else 0, back if back < 0 else 0, number, limit))
        rows.sort()
        return rows

    def _standing(self, wait: int, left: int, some: int, number: int, limit: Limit) -> Standing:
        full = max(0, self.said[PARTS * number + PARTS - 1] - self.age_us)
        retry_after = None if wait == -_FOREVER else -wait / _US
        return Standing(limit, left, -some / _US, full / _US, retry_after)

    def _write_older(self, headers: dict[str, str], row: Row) -> None:
        """Write the state of one limit in headers for clients without structured fields."""
        _, left, some, _, limit = row
        headers["X-RateLimit-Limit"] = str(limit.quota)
        headers["X-RateLimit-Remaining"] = str(left)
        headers["X-RateLimit-Reset"] = str(-((some - self.now_us - self.age_us) // _US))

    def _refusal(self) -> dict[str, str]:
        wait = self.retry_after
        told = {} if wait is None else {"Retry-After": str(max(1, _ceil(wait)))}
        return told | {"Cache-Control": "no-store"}

    def _explanation(self) -> tuple[str, str, str]:
        wait = self.retry_after
        if self.status == UNAVAILABLE:
            return (
                "temporary-reduced-capacity",
                "Temporarily out of capacity",
                "Whether this request is within its limits can't be told right now.",
            )
        if self.banned:
            return (
                "abnormal-usage-detected",
                "Abnormal usage detected",
                "Requests of this client are refused for a while.",
            )
        if wait is None:
            detail = f"This request costs {self.cost}: more than the whole quota. It will not be admitted later."
        else:
            detail = f"It may be sent again in {max(1, _ceil(wait))} s."
        return "quota-exceeded", "Quota exceeded", detail


def headers_of(decisions: Sequence[Decision]) -> dict[str, str]:
    """Return the headers of a response to a request about which all this was decided; the last decision may be a
    denial.

    A name that two of them share is told once, as it binds most.
    """
    if len(decisions) < 2:
        return decisions[0].headers() if decisions else {}
    found = sorted(
        [(row, n) for n, one in enumerate(decisions) for row in one.rows()],
        key=lambda one: (one[0][:4], one[1]),
    )
    named: dict[str, Row] = {}
    for row, _ in found:
        named.setdefault(row[-1].name, row)
    limits = {limit.name: limit for one in decisions for limit in one.limits}
    policy = policy_field(tuple(limits.values()))
    headers = {"RateLimit-Policy": policy} if policy else {}
    if found:
        (row, n), headers["RateLimit"] = found[0], state_field(named.values())
        decisions[n]._write_older(headers, row)
    return headers if decisions[-1].status == OK else headers | decisions[-1]._refusal()


def _ceil(seconds: float) -> int:
    return -(-round(seconds * _US) // _US)
