"""Foreign text is made safe for a log or a terminal."""

from __future__ import annotations

from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.shown import shown, shown_lines, visible

HOSTILE = [
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x9b31m",  # the one-byte form of the same
    "a\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h",
    "user\u202egnp.exe",  # turns what follows around
    "\u2066\u2069\u200b\ufeff",
    "\x00\x7f",
    "\ud800",  # half of a pair: can't be written as UTF-8 at all
    "\U000e0041",  # a tag character: seen by nobody
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_not_printable_is_written_out(text: str) -> None:
    """A character that is not printable is written out, on one line that can be encoded."""
    plain = shown(text)
    assert plain.isprintable()
    assert plain.encode()
    assert visible(text).encode()
    assert not {category(character) for character in visible(text)} & {"Cc", "Cf", "Cs"}
    assert all(ascii(c)[1:-1] in plain for c in text if not c.isprintable())


@given(st.text(alphabet=st.characters()), st.integers(min_value=1, max_value=40))
def test_any_text_is_shown_within_its_limit(text: str, limit: int) -> None:
    """Printable text stays as it is, and any text fits its limit, cut off with an ellipsis."""
    assert shown(text).isprintable()
    assert shown(text) == text or not text.isprintable()
    if text.isprintable():
        assert len(shown(text, limit)) <= limit
        assert shown(text, limit) == text or shown(text, limit).endswith("…")


@given(st.text(alphabet=st.characters()))
def test_a_traceback_can_not_look_like_a_new_entry(text: str) -> None:
    """A traceback has every line but the first indented and nothing that a terminal obeys."""
    first, *rest = shown_lines(text).split("\n")
    assert first.isprintable()
    assert all(line.isprintable() and line.startswith("  ") for line in rest)
