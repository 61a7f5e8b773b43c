"""Patterns mean exactly what Redis' MATCH means, compared with a real server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stillroom.cache.glob import compile_glob
from stillroom.keys import KEY_LIMIT
from tests.support.steps import steps_of

SIGNS = st.sampled_from(
    [b"*", b"?", b"[", b"]", b"^", b"-", b"\\", b"a", b"b", b"z", b"\x80", b"\xff", b"\n"]
)
PATTERNS = st.lists(SIGNS, max_size=9).map(b"".join)
KEYS = st.lists(
    st.sampled_from([b"a", b"b", b"z", b"]", b"-", b"\\", b"\x80", b"\xff", b"\n", b"^"]),
    max_size=6,
)


@settings(
    max_examples=1_500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(PATTERNS, KEYS.map(b"".join))
@example(b"[a-]", b"b")
@example(b"[z-a]", b"b")
@example(b"[a-\xff]", b"\x80")
@example(b"[^", b"a")
@example(b"[", b"a")
@example(b"a\\", b"a\\")
@example(b"[]", b"a")
@example(b"*a*b*", b"zazbz")
def test_a_pattern_means_what_the_server_says(client: Any, pattern: bytes, key: bytes) -> None:
    """A pattern matches a key here if and only if KEYS on a real server matches it."""
    if not key or not pattern:
        return
    client.flushall()
    client.set(key, 1)
    assert bool(compile_glob(pattern)(key)) == (client.keys(pattern) == [key])


@pytest.mark.parametrize("stars", [20, 200])
def test_many_stars_are_no_trap(stars: int) -> None:
    """A pattern of stars against a long key that nearly matches comes to an end."""
    assert not compile_glob(b"a*" * stars + b"b")(b"a" * 1_000)


@pytest.mark.parametrize("part", [b"[^a]", b"[!-~]", b"*[^a-y]"])
def test_a_pattern_of_many_classes_is_compiled_at_once(part: bytes) -> None:
    """The longest pattern of classes is compiled in a few steps for each byte: each process does that."""
    pattern = part * (KEY_LIMIT // len(part))
    assert steps_of(lambda: compile_glob(pattern)) < 600 * KEY_LIMIT
