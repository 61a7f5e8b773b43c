"""What is added to the headers of a response, and what they say already."""

from __future__ import annotations

import math

import pytest

from stillroom.web.headers import Header, lacking, length_of, private, vary


@pytest.mark.parametrize(
    ("said", "is_added"),
    [
        ([], True),
        (["Accept"], True),
        (["X-Cookie, Accept"], True),
        (["Cookie"], False),
        (["Accept,cookie"], False),
        (["Accept", " COOKIE "], False),
        (["*"], False),
    ],
)
def test_a_response_says_once_that_it_varies_by_the_cookie(said: list[str], is_added: bool) -> None:
    """Vary: Cookie is added unless the app says so itself, or says that the response varies by everything."""
    headers = [("Content-Type", "text/plain"), *[("vary", value) for value in said]]
    assert vary(headers) == ([("Vary", "Cookie")] if is_added else [])


@pytest.mark.parametrize(
    ("said", "added"),
    [
        ([], "private"),
        (["max-age=60"], "private, max-age=60"),
        (["no-cache", "max-age=0"], "private, no-cache, max-age=0"),
        (["public, max-age=60"], "private, max-age=60"),
        (["Private, S-MaxAge = 60, must-revalidate"], "private, must-revalidate"),
        (["no-store, public"], "private, no-store"),
        (["no-store, Must-Understand"], "private, no-store, Must-Understand"),
        (["private, no-store, must-understand"], None),
        (["Private, max-age=60"], None),
        (["max-age=60", "No-Store"], None),
    ],
)
def test_a_response_with_a_cookie_is_private(said: list[str], added: str | None) -> None:
    """What lets a shared cache keep the response is taken out, and the app's other rules stay.

    An app that says already that no shared cache may keep it has the last word.
    """
    headers = [("Set-Cookie", "sid=1"), *[("Cache-Control", value) for value in said]]
    expected = ([], frozenset()) if added is None else _instead(added)
    assert private(headers) == expected


def _instead(rules: str) -> tuple[list[Header], frozenset[str]]:
    return [("Cache-Control", rules)], frozenset({"cache-control"})


def test_an_apps_own_header_wins() -> None:
    """A header is added where the app has none of its name, in any case of letters."""
    more = {"RateLimit": "ours", "Retry-After": "7"}
    assert lacking(["Content-Type"], more) == [("RateLimit", "ours"), ("Retry-After", "7")]
    assert lacking(["retry-AFTER", "Content-Type"], more) == [("RateLimit", "ours")]


@pytest.mark.parametrize(
    ("said", "length"),
    [("12", 12), ("0", 0), ("-1", math.inf), ("", math.inf), ("9" * 5_000, math.inf)],
)
def test_a_length_that_is_no_number_is_no_end(said: str, length: float) -> None:
    """Nobody knows where a response ends whose Content-Length is none, or is no number."""
    assert length_of([("X-Length", "5"), ("content-length", said)]) == length
    assert length_of([]) == math.inf
