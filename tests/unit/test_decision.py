"""Decisions make correct headers and problem details, read by an independent parser of structured fields."""

from __future__ import annotations

import math
from typing import Any

import http_sfv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom import API, AUTH, DEFAULT, Decision, Limit
from stillroom.limits.decision import NEVER, OK, TOO_MANY, UNAVAILABLE, UNTOLD, headers_of

NOW = 1_800_000_000_250_000
S = 1_000_000


def parsed(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the members of a structured list: a string and its parameters."""
    found = http_sfv.List()
    found.parse(text.encode())
    return [(item.value, dict(item.params)) for item in found]


def test_what_is_left_is_said_exactly() -> None:
    """The headers say exactly what is left, as in the draft's examples, and in the form of older clients."""
    decision = Decision(
        (DEFAULT, API), OK, 1, NOW, [13, 41 * S + 1, 0, 59 * S, 1, 3600 * S, 0, 3600 * S]
    )
    assert decision.headers() == {
        "RateLimit-Policy": '"default";q=100;w=60, "api";q=1000;w=3600',
        "RateLimit": '"default";r=87;t=42, "api";r=999;t=3600',
        "X-RateLimit-Limit": "100",
        "X-RateLimit-Remaining": "87",
        "X-RateLimit-Reset": "1800000042",
    }
    assert decision.problem() == {}
    assert (decision.retry_after, decision.remaining, decision.violated) == (0.0, 87, ())


def test_a_denial_says_when_and_why() -> None:
    """A denial is 429 with the time rounded up, and the limit that denied comes first."""
    decision = Decision(
        (API, AUTH), TOO_MANY, 1, NOW, [10, 99 * S, 0, 99 * S, 5, 10 * S, 10 * S + 1, 300 * S]
    )
    headers = decision.headers()
    assert headers["Retry-After"] == "11"
    assert headers["Cache-Control"] == "no-store"
    assert headers["RateLimit"] == '"auth";r=0;t=10, "api";r=990;t=99'
    assert headers["X-RateLimit-Limit"] == "5"
    assert decision.problem() == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Quota exceeded",
        "status": 429,
        "detail": "It may be sent again in 11 s.",
        "violated-policies": ["auth"],
    }


def test_a_ban_is_not_a_quota() -> None:
    """A ban reports no quota."""
    decision = Decision((AUTH,), TOO_MANY, 1, NOW, wait_us=90_000_001)
    assert decision.banned
    assert decision.headers() == {
        "RateLimit-Policy": '"auth";q=5;w=300',
        "Retry-After": "91",
        "Cache-Control": "no-store",
    }
    assert decision.problem()["type"].endswith("#abnormal-usage-detected")


def test_what_cannot_be_decided_is_503() -> None:
    """A decision that cannot be made is 503: temporary, and not the client's fault."""
    decision = Decision((AUTH,), UNAVAILABLE, 1, NOW, wait_us=S, degraded="breaker")
    assert (decision.allowed, decision.banned, decision.status) == (False, False, 503)
    assert decision.headers()["Retry-After"] == "1"
    assert decision.problem()["type"].endswith("#temporary-reduced-capacity")


def test_of_what_nobody_looked_at_nothing_is_said() -> None:
    """A limit that nobody could look at, open while Redis is away, reports its policy and no state."""
    decision = Decision(
        (AUTH, DEFAULT), OK, 1, NOW, [*UNTOLD, 1, 60 * S, 0, 60 * S], degraded="timeout"
    )
    assert parsed(decision.headers()["RateLimit"]) == [("default", {"r": 99, "t": 60})]
    nothing = Decision((AUTH,), OK, 1, NOW, UNTOLD, degraded="timeout")
    assert set(nothing.headers()) == {"RateLimit-Policy"}
    assert nothing.remaining is None
    assert Decision((), OK, 1, NOW).headers() == {}


def test_a_quota_that_is_all_there_has_no_reset() -> None:
    """A full quota has no reset, and for older clients the reset is now."""
    headers = Decision((AUTH,), OK, 0, NOW, (0, 0, 0, 0)).headers()
    assert headers["RateLimit"] == '"auth";r=5'
    assert headers["X-RateLimit-Reset"] == "1800000001"


def test_a_remembered_denial_grows_old() -> None:
    """A remembered denial's times count from when it is reported, not from when it was made."""
    decision = Decision((AUTH,), TOO_MANY, 1, NOW, (5, 10 * S, 10 * S, 99 * S), age_us=4 * S)
    assert decision.retry_after == 6.0
    assert decision.headers()["Retry-After"] == "6"
    assert decision.headers()["X-RateLimit-Reset"] == "1800000011"


def test_several_decisions_are_told_as_one() -> None:
    """Several decisions are reported as one: tightest first, a shared name once, and a denial with its time."""
    first = Decision((DEFAULT, API), OK, 1, NOW, [13, S, 0, S, 990, 9 * S, 0, 9 * S])
    by_user = Decision((API,), OK, 1, NOW, [1, 60 * S, 0, 60 * S])
    assert headers_of([first, by_user]) == {
        "RateLimit-Policy": '"default";q=100;w=60, "api";q=1000;w=3600',
        "RateLimit": '"api";r=10;t=9, "default";r=87;t=1',
        "X-RateLimit-Limit": "1000",
        "X-RateLimit-Remaining": "10",
        "X-RateLimit-Reset": "1800000010",
    }
    denied = Decision((AUTH,), TOO_MANY, 1, NOW, [5, 10 * S, 10 * S, 99 * S])
    told = headers_of([first, denied])
    assert told["RateLimit"].startswith('"auth";r=0;t=10, ')
    assert (told["Retry-After"], told["X-RateLimit-Limit"]) == ("10", "5")
    assert headers_of([first]) == first.headers()
    assert headers_of([]) == {}


limits = st.builds(
    Limit,
    st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    st.integers(0, 1_000_000),
    st.integers(1, 31_622_400),
)
times = st.integers(0, 31_622_400 * S)
waits = st.one_of(st.just(0), st.just(NEVER), st.integers(1, 31_622_400 * S))


@given(
    st.lists(
        st.tuples(limits, st.integers(0, 2_000_000), times, waits, times), min_size=1, max_size=4
    ),
    st.integers(0, 5 * S),
)
def test_whatever_was_decided_the_headers_are_well_formed(rows: Any, age_us: int) -> None:
    """For every decision the headers are well-formed: integers from 0, names as strings, Retry-After
    never early.
    """
    denied = any(wait for _, _, _, wait, _ in rows)
    said = [number for _, *numbers in rows for number in numbers]
    decision = Decision(
        tuple(row[0] for row in rows), TOO_MANY if denied else OK, 1, NOW, said, age_us
    )
    headers = decision.headers()
    policies = parsed(headers["RateLimit-Policy"])
    assert policies == [(one.name, {"q": one.quota, "w": one.window}) for one, *_ in rows]
    states = parsed(headers["RateLimit"])
    assert sorted(name for name, _ in states) == sorted(one.name for one, *_ in rows)
    for _, params in states:
        assert all(type(value) is int and value >= 0 for value in params.values())
        assert set(params) <= {"r", "t"}
    never = any(wait == NEVER for *_, wait, _ in rows)
    assert ("Retry-After" in headers) is (denied and not never)
    if denied and not never:
        longest = max(wait for *_, wait, _ in rows) - age_us
        assert int(headers["Retry-After"]) == max(1, math.ceil(longest / S))
    assert all(text.isascii() and text.isprintable() for text in headers.values())


@pytest.mark.parametrize("status", [OK, TOO_MANY, UNAVAILABLE])
def test_a_decision_is_true_where_the_request_may_go_on(status: int) -> None:
    """A decision is true where the request may go on, so that `if room.limits.check(…)` is right."""
    decision = Decision((AUTH,), status, 1, NOW, (5, S, S, S))
    assert bool(decision) is decision.allowed is (status == OK)


@given(
    st.integers(-1, 200),
    st.integers(0, 90 * S),
    st.integers(0, 90 * S),
    st.booleans(),
    st.sampled_from([OK, TOO_MANY]),
)
def test_a_limit_in_shadow_changes_no_header(
    used: int, some: int, age: int, in_flight: bool, status: int
) -> None:
    """A decision by one limit has the same headers as one by that limit and another in shadow."""
    limit = Limit("one", 100, 60, in_flight=in_flight)
    said = [used, some, 0 if status == OK else 2 * S, 60 * S]
    alone = Decision((limit,), status, 1, NOW, said, age)
    shadow = Limit("unseen", 5, 60, shadow=True)
    both = Decision((limit, shadow), status, 1, NOW, [*said, 5, S, S, S], age)
    assert alone.headers() == both.headers()
