"""What pages of other origins may read, and what is remembered of preflights, by headers and times alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from stillroom.limits.fields import NAMES
from stillroom.web.cors import LEARNED, LEARNED_S, OPEN, Learned, Unanswered, kept, with_exposed
from stillroom.web.headers import Header

SPA = "https://spa.example"
ALLOWED = ("Access-Control-Allow-Origin", SPA)
CREDENTIALS = ("access-control-allow-credentials", "true")
OURS = ", ".join(NAMES)


def exposes(names: str) -> Header:
    return ("Access-Control-Expose-Headers", names)


@pytest.mark.parametrize(
    ("given", "exposed"),
    [
        ([ALLOWED], OURS),
        ([ALLOWED, exposes("X-Mine")], f"X-Mine, {OURS}"),
        ([ALLOWED, exposes("x-one"), exposes("x-two")], f"x-one, x-two, {OURS}"),
        ([ALLOWED, exposes(OURS.upper())], OURS.upper()),
        ([ALLOWED, exposes("*")], "*"),
        ([ALLOWED, CREDENTIALS, exposes("*")], f"*, {OURS}"),
    ],
)
def test_a_page_may_read_how_its_client_stands(given: Sequence[Header], exposed: str) -> None:
    """Our names are added to those that the app exposes. With credentials `*` is a name like any other."""
    names = [value for name, value in with_exposed(given) if name.lower() == exposes("")[0].lower()]
    assert ", ".join(names) == exposed
    assert with_exposed([]) == []


@pytest.mark.parametrize("vary", ["Origin", "Accept, origin"])
def test_only_headers_about_the_origin_go_out_in_place_of_the_apps(vary: str) -> None:
    """A refusal has the app's headers about an allowed origin, and says where the app varies by it."""
    for_preflights = ("Access-Control-Allow-Methods", "POST")
    about = [ALLOWED, CREDENTIALS, exposes("X-Mine")]
    assert kept([*about, for_preflights, ("Vary", "Accept")]) == about
    assert kept([*about, ("Vary", vary)]) == [*about, ("Vary", "Origin")]
    assert kept([CREDENTIALS, ("Vary", vary)]) == []


def test_preflights_of_a_client_are_free_again_after_a_minute() -> None:
    """A client that sends many preflights without an answer is charged for a minute, and others are not."""
    unanswered = Unanswered()
    assert [unanswered.charges("192.0.2.1", "/x", 1.0) for _ in range(OPEN + 1)] == [
        *([False] * OPEN),
        True,
    ]
    assert not unanswered.charges("192.0.2.1", "/y", 1.0)
    assert not unanswered.charges("192.0.2.2", "/x", 1.0)
    assert unanswered.charges("192.0.2.1", "/x", LEARNED_S)
    assert [unanswered.charges("192.0.2.1", "/x", 1.0 + LEARNED_S) for _ in range(OPEN)] == [
        False
    ] * OPEN
    unanswered.learn("192.0.2.1", "/x", 70.0, [ALLOWED])
    assert not unanswered.charges("192.0.2.1", "/x", 70.0)
    unanswered.learn("192.0.2.1", "/x", 70.0, [])
    assert unanswered.charges("192.0.2.1", "/x", 70.0)


def test_what_is_learned_of_preflights_has_a_bound() -> None:
    """Of more origins than are remembered the newest are, and a key of any length is not kept."""
    learned = Learned()
    for n in range(LEARNED + 1):
        learned.add((f"https://{n}.example", "GET", "/"), "192.0.2.1", 0.0, [ALLOWED])
    known = [f"https://{n}.example" for n in (0, 1, LEARNED)]
    found = [learned.get((origin, "GET", "/"), "192.0.2.2", 1.0) for origin in known]
    assert found == [None, [ALLOWED], [ALLOWED]]
    long = (SPA, "GET", "/" + "x" * 400)
    assert learned.add(long, "192.0.2.1", 0.0, [ALLOWED]) == [ALLOWED]
    assert learned.get(long, "192.0.2.3", 1.0) is None
