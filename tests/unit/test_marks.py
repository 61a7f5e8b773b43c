"""An entry is dead if a later mark names it: a pure rule, tested as a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.entry import Entry
from stillroom.cache.marks import Marks, Verdict, extended, read_clock

EPOCH = b"e1"


def entry(stamp: int, *tags: bytes, epoch: bytes = EPOCH) -> Entry:
    return Entry(epoch, stamp, 0, b"j", b"", b"k", list(tags), b"1")


def rows(*pairs: tuple[bytes, int]) -> list[bytes]:
    """Return rows as Redis sends them, newest first."""
    return [
        x
        for member, seq in sorted(pairs, key=lambda p: (-p[1], p[0] != b"~e1"))
        for x in (member, b"%d" % seq)
    ]


@pytest.fixture
def marks() -> Marks:
    """Return marks with a hard one on `a` at 10, a soft one on `b` at 20, and the clock at 30."""
    known = rows((b"t:a", 10), (b"s:b", 20), (b"t:z", 30), (b"~e1", 30))
    return extended(Marks(EPOCH), known, [], b"e1.30", 100)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (entry(9, b"a"), Verdict.DEAD),
        (entry(10, b"a"), Verdict.ALIVE),
        (entry(11, b"a"), Verdict.ALIVE),
        (entry(19, b"b"), Verdict.SOFT),
        (entry(20, b"b"), Verdict.ALIVE),
        (entry(5, b"a", b"b"), Verdict.DEAD),
        (entry(15, b"a", b"b"), Verdict.SOFT),
        (entry(5), Verdict.ALIVE),
        (entry(30, b"a", b"b", b"z"), Verdict.ALIVE),
        (entry(31), Verdict.DEAD),
        (entry(30, epoch=b"e2"), Verdict.DEAD),
    ],
)
def test_the_rule(marks: Marks, given: Entry, verdict: Verdict) -> None:
    """Later marks end an entry, and another epoch or a stamp ahead of the clock ends it too."""
    assert marks.verdict(given) is verdict


def test_marks_that_do_not_reach_the_clock_were_lost(marks: Marks) -> None:
    """Where marks do not reach the clock, older entries are dead and an entry at the clock lives."""
    lost = extended(marks, [], [], b"e1.40", 100)
    assert lost.verdict(entry(30)) is Verdict.DEAD
    assert lost.verdict(entry(40)) is Verdict.ALIVE
    assert lost.clock == b"e1.40"


def test_a_cut_list_asks_for_what_was_left_out() -> None:
    """With as many rows as were asked for, an entry older than the last row is not decided but asked for."""
    marks = extended(Marks(EPOCH), rows((b"t:x", 28), (b"t:y", 29), (b"~e1", 30)), [], b"e1.30", 3)
    assert marks.verdict(entry(28, b"a")) is Verdict.ALIVE
    assert marks.verdict(entry(27, b"a")) is Verdict.ASK
    assert marks.answer([b"a"], [None, b"30", b"10", None], 30)
    assert marks.verdict(entry(27, b"a")) is Verdict.ALIVE
    assert marks.verdict(entry(9, b"a")) is Verdict.DEAD
    assert marks.verdict(entry(9, b"a", b"b")) is Verdict.ASK


def test_what_was_answered_stays_true_when_marks_follow() -> None:
    """A later mark on a tag that was asked for still ends its entries."""
    marks = extended(Marks(EPOCH), rows((b"t:x", 29), (b"~e1", 30)), [], b"e1.30", 2)
    assert marks.answer([b"a"], [None, b"30", None, None], 30)
    marks = extended(marks, rows((b"t:a", 31), (b"~e1", 31)), [], b"e1.31", 2)
    assert marks.verdict(entry(20, b"a")) in (Verdict.DEAD, Verdict.ASK)


def test_a_pruned_table_decides_the_same_or_asks() -> None:
    """A pruned table decides the same or asks, and never turns a dead entry alive."""
    pairs = [(b"t:%d" % n, n + 1) for n in range(1000)]
    full = extended(Marks(EPOCH), rows(*pairs, (b"~e1", 1000)), [], b"e1.1000", 10_000)
    young = full.pruned(100)
    assert len(young.hard) <= 500
    for stamp in range(0, 1000, 7):
        for tag in (b"0", b"499", b"500", b"999", b"none"):
            by_young = young.verdict(entry(stamp, tag))
            assert by_young is full.verdict(entry(stamp, tag)) or by_young is Verdict.ASK


def test_a_pruned_table_still_knows_the_tags_that_were_asked_for() -> None:
    """Pruning forgets only asked tags whose marks it drops, so that a tag is asked for once."""
    pairs = [(b"t:%d" % n, n + 1_001) for n in range(50)]
    marks = extended(Marks(EPOCH), rows(*pairs, (b"~e1", 1_100)), [], b"e1.1100", 51)
    tags = [b"quiet", b"hard", b"soft", b"both"]
    scores = [None, b"1100", *(None, None), *(b"10", None), *(None, b"10"), *(b"1090", b"10")]
    assert marks.answer(tags, scores, 1_100)
    young = marks.pruned(40)
    assert young.asked == {b"quiet"}
    for stamp in (5, 15, 1_040, 1_095):
        for tag in (*tags, b"49"):
            by_young = young.verdict(entry(stamp, tag))
            assert by_young is marks.verdict(entry(stamp, tag)) or by_young is Verdict.ASK


def test_the_tags_that_were_asked_for_are_bounded() -> None:
    """The asked tags are bounded: a process with too many forgets them and asks again."""
    marks = extended(Marks(EPOCH), rows((b"t:x", 29), (b"~e1", 30)), [], b"e1.30", 2)
    tags = [b"%d" % n for n in range(11)]
    assert marks.answer(tags, [None, b"30", *[None] * 22], 30)
    young = marks.pruned(10)
    assert not young.asked
    assert young.verdict(entry(5, b"1")) is Verdict.ASK
    assert young.pruned(10) is young


def test_a_glob_names_every_key_it_matches() -> None:
    """A glob names every key that it matches, also in a process that learned the globs apart from the marks."""
    entries = [entry(5), entry(15)]
    told = extended(Marks(EPOCH), rows((b"p:k*", 10), (b"~e1", 30)), [], b"e1.30", 100)
    cut = extended(Marks(EPOCH), rows((b"t:x", 29), (b"~e1", 30)), [b"k*", b"10"], b"e1.30", 2)
    assert [told.verdict(e) for e in entries] == [Verdict.DEAD, Verdict.ALIVE]
    assert [cut.verdict(e) for e in entries] == [Verdict.DEAD, Verdict.ALIVE]
    assert told.pruned(0).verdict(entries[0]) is Verdict.DEAD


def test_marks_of_another_epoch_prove_nothing() -> None:
    """Marks of another epoch than the clock's prove nothing, and a dead entry stays dead."""
    marks = extended(Marks(EPOCH), rows((b"~e1", 10)), [], b"e1.10", 100)
    after = extended(marks, rows((b"~e2", 40)), [], b"e1.30", 100)
    assert after.verdict(entry(5, b"a")) is Verdict.DEAD
    forgetful = extended(Marks(EPOCH), rows((b"t:x", 29), (b"~e1", 30)), [], b"e1.30", 2)
    assert not forgetful.answer([b"a"], [None, None, None, None], 30)
    assert forgetful.verdict(entry(5, b"a")) is Verdict.ASK


def test_what_is_known_is_never_unlearned() -> None:
    """Older rows from a slower thread do not remove newer marks."""
    marks = extended(Marks(EPOCH), rows((b"~e1", 10)), [], b"e1.10", 100)
    marks = extended(marks, rows((b"t:a", 20), (b"~e1", 20)), [], b"e1.20", 100)
    marks = extended(marks, rows((b"t:z", 15), (b"~e1", 15)), [], b"e1.15", 100)
    assert (marks.synced, marks.clock) == (20, b"e1.20")
    assert marks.verdict(entry(15, b"a")) is Verdict.DEAD


KINDS = [b"t:a", b"s:a", b"p:k*", b"K", b"?", b"!", b"*"]
LEARNT = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 9)), max_size=3)


@given(st.lists(LEARNT, max_size=6), st.integers(5, 10))
def test_an_entry_that_was_alive_is_alive_while_the_turn_stands(
    learnt: list[list[tuple[bytes, int]]], stamp: int
) -> None:
    """Whatever marks follow: those of changed keys alone are no turn, and without a turn no verdict changes."""
    one, marks, newest = entry(stamp, b"a"), Marks(EPOCH), 0
    before, turn, dropped = Verdict.DEAD, marks.turn, 0
    for some in learnt:
        newest += 10
        told = rows(*((kind, newest - age) for kind, age in some), (b"~e1", newest))
        marks = extended(marks, told, [], b"e1.%d" % newest, 1_000)
        after = marks.verdict(one)
        if before is Verdict.ALIVE and turn is marks.turn:
            assert (after, marks.dropped) == (Verdict.ALIVE, dropped)
        if {kind for kind, _ in some} <= {b"K", b"?"} and newest > 10:
            assert turn is marks.turn
        before, turn, dropped = after, marks.turn, marks.dropped


@pytest.mark.parametrize("raw", [b"", b"x", b"e1.", b"e1.x", b"1.2.3"])
def test_only_a_clock_is_a_clock(raw: bytes) -> None:
    """A text that is no clock raises ValueError."""
    with pytest.raises(ValueError, match="invalid literal"):
        read_clock(raw)
