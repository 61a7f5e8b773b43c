"""Foreign text is made safe for a log or a terminal."""

from __future__ import annotations

import re
from pathlib import Path
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stillroom
from stillroom.shown import named, plural, shown, shown_lines, visible

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


def test_one_thing_is_named_in_the_singular() -> None:
    """One thing has the singular's name, and none, several and thousands of it have the plural's."""
    assert [plural(many, "ban") for many in (0, 1, 2, 12_431)] == [
        "0 bans",
        "1 ban",
        "2 bans",
        "12,431 bans",
    ]
    assert plural(2, "entry", "entries") == "2 entries"
    assert [named(many, "is", "are") for many in (0, 1, 2)] == ["are", "is", "are"]


# A count in a sentence, and behind it the name of several things. The number of all shards is never one.
COUNTED = re.compile(
    r"\{(?!len\(SHARDS\))[^{}]*\} (sessions|bans|dead letters|shards|events|keys)\b"
)


@pytest.mark.parametrize("told", ["acts.py", "cli", "web/django/management/commands"])
def test_what_an_operator_is_told_counts_by_plural(told: str) -> None:
    """Commands and acts name what they count by `plural`, so that none says "1 sessions"."""
    where = Path(stillroom.__file__).parent / told
    files = [where] if where.is_file() else list(where.rglob("*.py"))
    assert files
    assert not [found for path in files for found in COUNTED.findall(path.read_text())]
