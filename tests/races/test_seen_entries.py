"""An entry that comes back as it was read before is not taken apart again, and is judged no less for that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom import Stillroom
from stillroom.cache import lookup
from stillroom.cache.cached import asked_of
from stillroom.cache.calls import Unread
from stillroom.cache.judge import Judge
from stillroom.operation import UNUSUAL
from tests.support.clocked import misjudge
from tests.support.entries import Recording, age
from tests.support.trips import quiet

KEY = "k:7"


def nothing(id: int) -> int:
    raise AssertionError("only a look is asked for")


def body_of(room: Stillroom) -> Any:
    return room._cache_body


@pytest.fixture
def room(make_room: Any) -> Stillroom:
    """Open the process that reads."""
    return quiet(make_room())


@pytest.fixture
def other(make_room: Any) -> Stillroom:
    """Open the process that changes what is read."""
    return quiet(make_room())


def moments(act: Callable[[], Any], at: int, meanwhile: Callable[[], object]) -> tuple[Any, bool]:
    """Return act()'s result, with something done before its step number `at`, and whether it has so many."""
    steps = iter(range(1 << 20))
    is_done = False

    def each(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal is_done
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and next(steps) == at:
            sys.settrace(None)
            is_done = True
            meanwhile()
        return each

    sys.settrace(each)
    try:
        return act(), is_done
    finally:
        sys.settrace(None)


class Killed:
    """A value that a process has read, and the marks of an invalidation that it does not have yet."""

    def __init__(self, room: Stillroom, other: Stillroom, client: Any, reads: int) -> None:
        assert other.cache.set(KEY, 1, tags=["t"])
        assert [room.cache.get(KEY) for _ in range(3)] == [1, 1, 1]
        self._body = body = body_of(room)
        body._seen.clear()
        self._places = body.keys.entry(KEY.encode()), body.keys.clock
        self.before = client.mget(*self._places)
        for _ in range(reads):
            assert self.read(self.before) == 1
        self._known = body._judges.marks.synced
        other.cache.invalidate_by_tag("t")
        self.after = client.mget(*self._places)
        assert self.after[0] == self.before[0]
        marks = body._judges.marks_since(self._known)
        self._rows = client.execute_command(*marks)

    def learn(self) -> None:
        """Take the marks in, as another thread does meanwhile."""
        assert self._body._judges.learn(self._known, _flat(self._rows), (), self.after[1])

    def begin(self, found: list[bytes]) -> Callable[[], Any]:
        """Begin a read that finds this. Return its end, which judges and answers."""
        self._body._judges.counts = False  # else it would ask for marks too, soon after a move
        return partial(self._body.get(KEY).usual, [found])

    def read(self, found: list[bytes]) -> Any:
        """Return what a read answers that finds this."""
        return self.begin(found)()


def _flat(rows: list[Any]) -> list[bytes]:
    if rows and isinstance(rows[0], list | tuple):
        return [word for member, score in rows for word in (member, b"%d" % int(score))]
    return rows


def lost(room: Stillroom, other: Stillroom, client: Any, reads: int) -> Iterator[int]:
    """Yield the steps of a read at which marks that come in meanwhile are lost on it, or on the next one."""
    at, is_step = 0, True
    while is_step:
        killed = Killed(room, other, client, reads)
        found = killed.after if reads else killed.before
        value, is_step = moments(killed.begin(found), at, killed.learn)
        if not is_step:
            killed.learn()
        if (found is killed.after and value is not UNUSUAL) or killed.read(killed.after) == 1:
            yield at
        at += 1


@pytest.mark.parametrize("reads", [0, 1], ids=["first", "again"])
def test_marks_that_come_at_any_step_of_a_read_are_not_lost(
    room: Stillroom, other: Stillroom, client: Any, reads: int
) -> None:
    """Whenever another thread learns the mark that ends an entry, no read with the clock behind it shows it."""
    assert list(lost(room, other, client, reads)) == []


def _turn_first(self: Judge, clock: bytes | None) -> object:
    marks = self.marks
    turn = marks.turn
    return turn if marks.clock == clock and self._run == self._clock.run else None


def _same_turn(self: Judge, clock: bytes | None) -> object:
    return vars(self).setdefault("first", self.marks.turn)


@pytest.mark.parametrize("wrong", [_turn_first, _same_turn])
def test_each_rule_left_out_loses_a_mark(
    room: Stillroom, other: Stillroom, client: Any, wrong: Any
) -> None:
    """The turn is looked at, and behind the clock: else a read shows what is dead."""
    with patch.object(Judge, "turn_at", wrong):
        assert next(lost(room, other, client, 1), None) is not None


# Whatever happens, a process that remembers entries answers as one that does not


def to_entry(client: Any, key: bytes, act: Callable[[], object]) -> None:
    """Do this to the key's entry, if there is one."""
    if (client.get(key) or b"").count(b"\t") > 3:
        act()


# What another process, or somebody else, does to a key.
ACTS: dict[str, Callable[[Stillroom, Any, str, bytes], object]] = {
    "set": lambda room, client, key, place: room.cache.set(key, 1, tags=["t"], swr=60),
    "set another": lambda room, client, key, place: room.cache.set(key, 2, tags=["t"], swr=60),
    "set without a tag": lambda room, client, key, place: room.cache.set(key, 3, swr=60),
    "invalidate": lambda room, client, key, place: room.cache.invalidate(key),
    "softly": lambda room, client, key, place: room.cache.invalidate_by_tag("t", soft=True),
    "by tag": lambda room, client, key, place: room.cache.invalidate_by_tag("t"),
    "by another tag": lambda room, client, key, place: room.cache.invalidate_by_tag("u"),
    "by pattern": lambda room, client, key, place: room.cache.invalidate_by_pattern(f"{key}*"),
    "by another pattern": lambda room, client, key, place: room.cache.invalidate_by_pattern("x*"),
    "touch": lambda room, client, key, place: room.cache.touch(key, ttl=600),
    "clear": lambda room, client, key, place: room.cache.clear(),
    "age": lambda room, client, key, place: to_entry(
        client, place, partial(age, client, place, 3_600)
    ),
    "flush": lambda room, client, key, place: client.flushall(),
    "evict": lambda room, client, key, place: client.unlink(place),
    "spoil": lambda room, client, key, place: to_entry(
        client, place, partial(client.setrange, place, 30, b"!")
    ),
    "take": lambda room, client, key, place: client.set(place, b"1\tmine"),
}
KEYS = [KEY, "k:8"]


def looked_up(room: Stillroom, load: Any) -> list[Any]:
    """Return what a look at two calls answers, and then get: each twice, as the second has seen the first."""
    body, answers = body_of(room), []
    for _ in range(2):
        body._judges.counts = False
        asked = asked_of(body, [partial(load, 7), partial(load, 8)])
        found = room.cache._driver.run(body.call_many(asked))
        answers += [None if type(one) is Unread else one for one in found]
    for _ in range(2):
        answers.append(room.cache.get(KEY))
    return answers


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(acts=st.lists(st.tuples(st.sampled_from(sorted(ACTS)), st.sampled_from(KEYS)), max_size=12))
def test_a_process_that_has_seen_an_entry_answers_as_one_that_has_not(
    make_room: Any, client: Any, acts: list[tuple[str, str]]
) -> None:
    """After each change both read the same values, with the same counts of hits, stale values and misses."""
    client.flushall()
    room, plain, other = (quiet(make_room()) for _ in range(3))
    body_of(plain)._goes_ahead = lambda: False
    loads = [one.cache.cached("k:{id}", ttl=60, swr=60)(nothing) for one in (room, plain)]
    for act, key in acts:
        ACTS[act](other, client, key, room.keys.entry(key.encode()))
        assert looked_up(room, loads[0]) == looked_up(plain, loads[1])
        for one in KEYS:
            other.cache.add(one, 0, swr=60, tags=["t"])
        assert looked_up(room, loads[0]) == looked_up(plain, loads[1])
    assert not body_of(plain)._seen
    names = "hits", "stale", "misses"
    counted = [{name: one.stats.counts[name] for name in names} for one in (room, plain)]
    assert counted[0] == counted[1]


def test_an_entry_that_was_seen_gets_stale_by_the_clock_alone(
    room: Stillroom, other: Stillroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes are a hit while they are fresh, and stale afterwards, in a look at one and at several."""
    server = room.cache._driver.wire.server
    load = room.cache.cached("k:{id}", ttl=60, swr=3_600)(nothing)
    for key in KEYS:
        other.cache.set(key, 1, ttl=60, swr=3_600)
    for kind in ("hits", "stale"):
        before = room.stats.counts[kind]
        assert looked_up(room, load) == [1] * 6
        assert room.stats.counts[kind] == before + 6
        monkeypatch.setattr(server, "learn_clock", lambda *reply: None)
        misjudge(server, 600)


@pytest.mark.parametrize("how", ["call", "gather"])
def test_the_refresh_of_a_stale_entry_that_was_seen_is_asked_for_again(
    room: Stillroom, client: Any, dispatch: Recording, how: str
) -> None:
    """A stale value is recognized as well, and its refresh is asked for as often as that of any other."""
    load = room.cache.cached("k:{id}", ttl=60, swr=86_400)(nothing)
    both, body, name = [partial(load, 7), partial(load, 8)], body_of(room), KEY.encode()
    calls: dict[str, Any] = {
        "call": lambda: load(7),
        "gather": lambda: room.cache.gather(both[0], both[1])[0],
    }
    for key in KEYS:
        room.cache.set(key, 1, ttl=60, swr=86_400)
    age(client, body.keys.entry(name), 3_600)
    for times in (1, 2):
        for _ in range(4):
            body._judges.counts = False
            assert calls[how]() == 1
        assert name in body._seen
        assert [order.key for order in dispatch.orders] == [KEY] * times
        body._asked.clear()  # a second is over
        client.delete(body.keys.lease(name))  # and the worker has died


@pytest.mark.parametrize("how", ["call", "gather"])
def test_an_entry_that_was_seen_is_no_value_of_another_type(room: Stillroom, how: str) -> None:
    """A loader that wants another type than a call before it has its own value, though it could read the other."""

    @room.cache.cached("k:{id}")
    def half(id: int) -> float:
        return id / 2

    room.cache.set("k:8", 8.0)
    for _ in range(4):
        assert room.cache.get_or_set(KEY, lambda: 7, type=int) == 7
    assert KEY.encode() in body_of(room)._seen
    if how == "call":
        assert half(7) == 3.5
    else:
        assert room.cache.gather(partial(half, 7), partial(half, 8)) == (3.5, 8.0)


def test_the_entries_that_are_remembered_are_few_and_small(
    room: Stillroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number and their size have bounds; larger entries are read as they were."""
    body = body_of(room)
    monkeypatch.setattr(body, "_seen_limit", 5)
    for n in range(20):
        room.cache.set(f"n:{n}", n)
        room.cache.get(f"n:{n}")
        assert len(body._seen) <= 5
    large = "x" * lookup.SEEN_BYTES
    room.cache.set("large", large)
    assert [room.cache.get("large"), room.cache.get("large")] == [large, large]
    assert b"large" not in body._seen
