"""Single steps of two operations run in one exact order, which luck or a bad day would need to produce."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom import Freshness, Stillroom
from stillroom.cache.judge import READS_A_MOVE
from stillroom.operation import Ahead, Operation
from stillroom.together import together
from stillroom.wire.server import name_of
from tests.support.clocked import misjudge
from tests.support.entries import age
from tests.support.stepper import Stepper
from tests.support.trips import NEVER, quiet

LITTLE = 3  # marks a forgetful process remembers: the setting has no use for so few, a test has


@pytest.fixture
def writer(make_room: Any) -> Stillroom:
    """Open the process that invalidates."""
    return quiet(make_room())


@pytest.fixture
def reader(make_room: Any) -> Stillroom:
    """Open another process, whose reads are taken apart."""
    return quiet(make_room())


@pytest.fixture
def forgetful(make_room: Any) -> Stillroom:
    """Open a process that remembers few marks and asks for the others."""
    room = quiet(make_room())
    body = room._cache_body
    body._judges = body._judge_of(LITTLE)
    return room


def ride(room: Stillroom, riding: bool) -> None:
    """Set whether marks are sent with reads, as they are while the clock moves."""
    judges = room._cache_body._judges
    judges._riding, judges.counts = (NEVER if riding else 0), True


def begin_get(room: Stillroom, key: str) -> Stepper:
    return Stepper(room, room._cache_body.get(key))


def run_to(stepper: Stepper, command: bytes) -> Stepper:
    """Run on until this command has been answered and its reply has not arrived."""
    while not (isinstance(stepper.at, list) and name_of(stepper.at[0]) == command):
        assert not stepper.done, f"it ended without {command!r}"
        stepper.step()
    stepper.step()
    return stepper


def flood(room: Stillroom) -> None:
    """Invalidate more than a forgetful process remembers."""
    for n in range(2 * LITTLE):
        room.cache.invalidate_by_tag(f"flood:{n}")


def make_it_forget(forgetful: Stillroom, writer: Stillroom) -> None:
    """Let the process catch up with everything so far and keep the newest marks only."""
    flood(writer)
    writer.cache.set("new", 1)
    for _ in range(
        2
    ):  # one that is far behind begins anew, and knows the newest after the next look
        forgetful.cache.get("new")
    assert forgetful._cache_body._judges.marks.floor > 0


# Marks that arrive late


def test_marks_that_arrive_late_take_back_no_newer_ones(
    reader: Stillroom, writer: Stillroom
) -> None:
    """An older answer with marks that arrives last removes no newer marks."""
    writer.cache.set("k", "old", tags=["t"])
    writer.cache.invalidate_by_tag("first")
    assert reader.cache.get("k") == "old"
    writer.cache.set("k", "old", tags=["t"])  # stamped with the clock the late answer knows
    writer.cache.set("other", 1)
    writer.cache.invalidate_by_tag("second")
    ride(reader, False)
    late = run_to(begin_get(reader, "other"), b"ZRANGE")
    writer.cache.invalidate_by_tag("t")
    assert reader.cache.get("k") is None
    assert late.value() == 1
    assert reader.cache.get("k") is None


def test_reads_that_meet_one_invalidation_count_it_once(
    reader: Stillroom, writer: Stillroom
) -> None:
    """Two reads that ask for the same marks are no sign that invalidations are frequent."""
    writer.cache.set("k", 1, tags=["t"])
    assert [reader.cache.get("k") for _ in range(2 * READS_A_MOVE)] == [1] * 2 * READS_A_MOVE
    writer.cache.invalidate_by_tag("x")
    reads = [run_to(begin_get(reader, "k"), b"ZRANGE") for _ in range(2)]
    assert [read.value() for read in reads] == [1, 1]
    assert not reader._cache_body._judges.rides()


@pytest.mark.parametrize("how", ["tag", "pattern"])
def test_a_read_under_way_is_not_misled_by_marks_that_arrive_late(
    forgetful: Stillroom, writer: Stillroom, how: str
) -> None:
    """A read that asks for an old tag is not misled by an older answer that arrives meanwhile."""

    def invalidate() -> None:
        if how == "tag":
            writer.cache.invalidate_by_tag("t")
        else:
            writer.cache.invalidate_by_pattern("k*")

    writer.cache.set("other", 1)
    if how == "pattern":
        invalidate()
    writer.cache.invalidate_by_tag("first")
    assert forgetful.cache.get("other") == 1
    invalidate()
    writer.cache.set("k", "old", tags=["t"])
    ride(forgetful, False)
    late = run_to(begin_get(forgetful, "other"), b"ZRANGE")
    invalidate()
    make_it_forget(forgetful, writer)
    ride(forgetful, False)
    read = begin_get(forgetful, "k")
    while not (read.done or read.at[0][0] == b"ZMSCORE"):
        read.step()
    late.value()
    assert read.value() is None
    assert forgetful.cache.get("k") is None


def test_a_pattern_that_arrives_late_takes_back_no_newer_one(
    reader: Stillroom, writer: Stillroom
) -> None:
    """An older answer about a pattern that arrives last removes no newer mark of it."""
    writer.cache.set("other", 1)
    writer.cache.invalidate_by_tag("first")
    assert reader.cache.get("other") == 1
    writer.cache.invalidate_by_pattern("k*")
    ride(reader, False)
    late = run_to(begin_get(reader, "other"), b"ZRANGE")
    writer.cache.set("k", "old")
    writer.cache.invalidate_by_tag("between")  # so that its stamp is not the newest clock
    writer.cache.invalidate_by_pattern("k*")
    assert reader.cache.get("k") is None
    assert late.value() == 1
    for _ in range(2):
        assert reader.cache.get("k") is None
        writer.cache.invalidate_by_tag("after")


# A new epoch between the look at an entry and the look at the marks


@pytest.mark.parametrize("how", ["clear", "FLUSHALL", "eviction"])
@pytest.mark.parametrize("riding", [False, True])
def test_the_marks_of_a_new_epoch_say_nothing_of_an_older_entry(
    reader: Stillroom, writer: Stillroom, client: Any, how: str, riding: bool
) -> None:
    """Marks of a new epoch prove nothing about an older entry whose marks were lost."""
    writer.cache.set("k", "old", tags=["t"])
    writer.cache.invalidate_by_tag("first")
    assert reader.cache.get("k") == "old"
    writer.cache.invalidate_by_tag("t")
    ride(reader, riding)
    read = run_to(begin_get(reader, "k"), b"MGET")
    if how == "clear":
        writer.cache.clear()
    else:
        client.flushall() if how == "FLUSHALL" else client.delete(writer.keys.marks)
        writer.cache.invalidate_by_tag("another")
    assert read.value() is None


def test_a_new_process_does_not_mix_two_epochs(
    reader: Stillroom, writer: Stillroom, client: Any
) -> None:
    """A new process does not mix two epochs, between any two of its commands."""
    for steps in range(1, 5):
        body = reader._cache_body
        body._judges = body._judge_of(20_000)
        writer.cache.set("k", "old", tags=["t"])
        writer.cache.invalidate_by_pattern("k*")
        read = begin_get(reader, "k")
        for _ in range(steps):
            read.step()
        client.delete(writer.keys.marks, writer.keys.globs)
        writer.cache.invalidate_by_tag("another")
        assert read.value() is None


def test_a_pattern_that_comes_in_while_a_process_learns_kills_only_what_it_matches(
    reader: Stillroom, writer: Stillroom
) -> None:
    """A pattern that comes while a new process fetches all marks ends only the entries it matches."""
    for steps in range(1, 6):
        body = reader._cache_body
        body._judges = body._judge_of(20_000)
        writer.cache.set("k", "fine")
        writer.cache.invalidate_by_tag("another")
        read = begin_get(reader, "k")
        for _ in range(steps):
            read.step()
        writer.cache.invalidate_by_pattern("x*")
        assert read.value() == "fine"
        assert reader.cache.get("k") == "fine"


# Loss


def test_silence_about_an_old_tag_is_not_consent(
    forgetful: Stillroom, writer: Stillroom, client: Any
) -> None:
    """When the marks are lost, an entry that a process has to ask about is dead."""
    writer.cache.set("k", "old", tags=["t"])
    writer.cache.invalidate_by_tag("t")
    make_it_forget(forgetful, writer)
    client.delete(writer.keys.marks)
    assert forgetful.cache.get("k") is None


def test_silence_about_an_old_tag_is_not_consent_with_the_limit_of_the_settings(
    make_room: Any, client: Any
) -> None:
    """The same holds with the settings alone: a hundred remembered marks and a hundred and fifty invalidations."""
    writer, forgetful = make_room(), make_room(marks_limit=100)
    writer.cache.set("k", "old", tags=["t"])
    writer.cache.invalidate_by_tag("t")
    writer.cache.invalidate_by_tag(*[f"other:{n}" for n in range(150)])
    writer.cache.set("new", 1)
    assert forgetful.cache.get("new") == 1
    client.delete(writer.keys.marks)
    assert forgetful.cache.get("k") is None


def test_marks_lost_between_the_question_and_its_answer(
    forgetful: Stillroom, writer: Stillroom
) -> None:
    """A read is a miss when a new epoch begins just before it asks for an old tag."""
    writer.cache.set("k", "old", tags=["t"])
    writer.cache.invalidate_by_tag("t")
    make_it_forget(forgetful, writer)
    read = run_to(begin_get(forgetful, "k"), b"MGET")
    writer.cache.clear()
    writer.cache.invalidate_by_tag("another")
    assert read.value() is None


@pytest.mark.parametrize("another", [False, True])
def test_lost_patterns_are_a_miss(
    forgetful: Stillroom, writer: Stillroom, client: Any, another: bool
) -> None:
    """When the patterns' key is evicted or begun anew, every entry that a lost pattern may have matched is dead."""
    writer.cache.set("k", "old")
    writer.cache.invalidate_by_pattern("k*")
    flood(writer)
    client.delete(writer.keys.globs)
    if another:
        writer.cache.invalidate_by_pattern("another*")
        flood(writer)
    writer.cache.set("new", 1)
    for _ in range(2):
        assert forgetful.cache.get("k") is None


def test_a_reader_that_refreshes_survives_a_process_that_begins_anew(
    reader: Stillroom, writer: Stillroom, client: Any
) -> None:
    """When a reader's marks are thrown away between lease and load, all values are served and no lease is left."""
    reader.cache.get_or_set("k", lambda: "old", ttl=60, swr=600)
    age(client, reader.keys.entry(b"k"), 61)
    body = reader._cache_body
    operation = body.get_or_set_many(
        ["k", "missing"], lambda keys: dict.fromkeys(keys, "new"), ttl=60, swr=600
    )
    read = Stepper(reader, operation)
    while not (isinstance(read.at, list) and read.at[0][0] == b"EVALSHA"):
        read.step()
    body._judges = body._judge_of(20_000)
    values = read.value()
    assert values["missing"] == "new"
    assert values["k"] in ("old", "new")
    assert client.keys("*:l:*") == []


# Many keys


def test_many_keys_are_loaded_though_the_servers_clock_has_stepped(
    make_room: Any, client: Any
) -> None:
    """A lease refused because the server's clock stepped is asked for again by the new clock, for many keys."""
    room = make_room()
    room.cache.get("warm")
    misjudge(room.wire.server, -3_600)
    assert room.cache.get_or_set_many(["a", "b"], lambda keys: dict.fromkeys(keys, 1)) == {
        "a": 1,
        "b": 1,
    }
    assert client.keys("*:l:*") == []


@pytest.mark.parametrize("tags", [lambda value: [value["no such field"]], lambda value: None])
def test_a_load_of_many_that_cannot_be_stored_leaves_no_lease(
    room: Any, client: Any, tags: Any
) -> None:
    """A load of many keys that cannot be stored returns its values and leaves no lease."""
    values = room.cache.get_or_set_many(
        ["a", "b"], lambda keys: {key: {} for key in keys}, tags=[tags]
    )
    assert values == {"a": {}, "b": {}}
    assert client.keys("*:l:*") == client.keys("*:e:*") == []


def test_a_load_of_many_that_is_no_mapping_leaves_no_lease(room: Any, client: Any) -> None:
    """A load of many keys that returns no mapping fails and leaves no lease."""
    with pytest.raises(TypeError):
        room.cache.get_or_set_many(["a", "b"], lambda keys: None)
    assert client.keys("*:l:*") == []


def test_a_load_of_many_overtaken_is_not_seen_afterwards(
    reader: Stillroom, writer: Stillroom
) -> None:
    """Of a load of many keys each overtaken key is not seen afterwards, and an untouched key is stored."""
    operation = reader._cache_body.get_or_set_many(
        ["a", "b", "c", "d"],
        lambda keys: {key: f"old {key}" for key in keys},
        tags=[lambda value: [value]],
    )
    load = Stepper(reader, operation).run_to_the_load()
    writer.cache.invalidate_many(["a"])
    writer.cache.invalidate_by_tag("old b")
    writer.cache.invalidate_by_pattern("[xc]")
    assert load.value() == {key: f"old {key}" for key in "abcd"}
    for room in (reader, writer):
        assert room.cache.get_many(["a", "b", "c", "d"]) == {"d": "old d"}


def test_whoever_waits_for_many_is_not_served_an_older_load(
    reader: Stillroom, writer: Stillroom
) -> None:
    """A caller that came after an invalidation waits, loads the dead keys and takes over the others."""
    load = Stepper(
        reader,
        reader._cache_body.get_or_set_many(
            ["a", "b"], lambda keys: dict.fromkeys(keys, "old"), tags=[lambda value: [value]]
        ),
    ).run_to_the_load()
    writer.cache.invalidate_by_pattern("a")
    body = writer._cache_body
    waiter = Stepper(
        writer, body.get_or_set_many(["a", "b", "c"], lambda keys: dict.fromkeys(keys, "new"))
    ).run()
    assert waiter.is_waiting
    load.value()
    waiter.step()
    assert waiter.value() == {"a": "new", "b": "old", "c": "new"}


# Patterns


@pytest.mark.parametrize(("key", "glob"), [("a%b", "a?b"), ("a\nb", "a[^x]b"), ("a%b", "a*b")])
def test_a_pattern_sees_the_key_as_it_was_given(reader: Stillroom, key: str, glob: str) -> None:
    """A pattern matches a key as given, where Redis stores a character as %XX."""
    reader.cache.set(key, 1)
    reader.cache.invalidate_by_pattern(glob)
    assert reader.cache.get(key) is None


def test_a_soft_mark_after_a_pattern_does_not_revive(reader: Stillroom, writer: Stillroom) -> None:
    """A soft mark after a pattern revives nothing: hard wins in any kind and order."""
    for order in (0, 1):
        writer.cache.set("k", "old", tags=["t"])
        for step in (order, 1 - order):
            if step:
                writer.cache.invalidate_by_pattern("k")
            else:
                writer.cache.invalidate_by_tag("t", soft=True)
        assert reader.cache.get("k") is None
        assert reader.cache.get_entry("k") is None
    writer.cache.set("k", "new", tags=["t"])
    assert reader.cache.get_entry("k").freshness is Freshness.FRESH  # type: ignore[union-attr]


@pytest.mark.parametrize("riding", [False, True])
def test_a_clock_that_another_look_has_overtaken_did_not_go_back(
    reader: Stillroom, writer: Stillroom, riding: bool
) -> None:
    """A reply that arrives behind a newer one of the same process is judged at once, and asks nothing more."""
    writer.cache.set("k", 1)
    writer.cache.set("else", 2)
    assert reader.cache.get("k") == 1
    ride(reader, riding)
    look = begin_get(reader, "k")
    while not look._is_answered():
        look.step()
    writer.cache.invalidate_by_tag("another")
    assert reader.cache.get("else") == 2  # and learns of it
    look.step()
    assert (look.done, look.result) == (True, 1)


def test_a_read_that_is_asked_for_ahead_is_an_operation_among_others(
    reader: Stillroom,
) -> None:
    """Whoever runs the operations of a cache side by side, or in one of his own, has their values."""
    reader.cache.set("k", 1)
    assert reader.cache.get("k") == 1
    cache = reader._cache_body
    assert isinstance(cache.get("k"), Ahead)
    sides = together(cache.get("k"), cache.get("none"), cache.get_or_set("new", lambda: 2))
    assert reader.cache._driver.run(sides) == [1, None, 2]

    def both() -> Operation[Any]:
        return (yield from cache.get("k")), (yield from cache.get("none", default=0))

    assert reader.cache._driver.run(both()) == (1, 0)
