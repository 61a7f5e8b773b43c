"""Two processes on one server, in any order of steps, against a model with one rule.

The rule: a read that began after an invalidation had returned never yields a value whose load was called
before that invalidation began; after a soft one it may, and then the entry says that it is stale.

The operations are generators, so the machine runs them by hand: any of them may be left standing between
two of its commands, or between a reply and its arrival, while everything else goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import redis
from stillroom import Freshness, LoadFailed, Stillroom
from stillroom.cache.calls import Asked, Unread
from stillroom.dispatch import RefreshOrder
from stillroom.embedded import EmbeddedServer
from stillroom.operation import Operation
from stillroom.scripts import trim_marks
from tests.support.crowd import patient_room
from tests.support.entries import Recording, age
from tests.support.stepper import Stepper

NEVER = 1 << 62  # seconds
LONG = 1_000.0  # seconds; time moves by hand only
EVERYTHING = "*"
KEYS = 2
MARKS_LIMITS = (20_000, 3)  # the second process remembers next to nothing, and has to ask
FLOOD = 5  # more marks than that

rooms = st.integers(0, len(MARKS_LIMITS) - 1)
numbers = st.integers(0, KEYS - 1)
picks = st.integers(0, 7)  # one of however many there are
tags = st.sampled_from(["all", "n:0", "n:1", "half:0", "half:1", "unknown"])
globs = st.sampled_from(["*", "k:0", "k:[^0]", "?:0", "x*"])
how_to_read = st.sampled_from(
    ["get", "get_entry", "loader", "calls", "get_or_set", "get_many", "get_or_set_many"]
)
how_to_load = st.sampled_from(["loader", "get_or_set", "get_or_set_many"])
few = st.sampled_from([0, 1, 2, 3, 5, 8])  # steps of an operation that is then left standing
most = st.sampled_from([0, 1, 9, 9, 9])  # the same, and often to its end


class LoaderFailed(Exception):
    """The error of a failing loader."""


@dataclass
class Made:
    """A value: the key it belongs to and when it was made."""

    key: str
    tags: tuple[str, ...]
    born: int
    aged: int | None = None


@dataclass
class Invalidation:
    """An invalidation: the key, tag or glob it names, and its time."""

    what: str
    soft: bool
    began: int
    returned: int | None = None

    def forbids(self, made: Made, began: int) -> bool:
        """Return whether a read that began at that time may not see this value as fresh."""
        in_order = self.returned is not None and made.born < self.began and self.returned <= began
        return in_order and (
            self.what in (made.key, *made.tags)
            or fnmatchcase(made.key, self.what.replace("^", "!"))
        )


class Seen(NamedTuple):
    """A value that was read, and its freshness if that was returned."""

    key: str
    value: int
    freshness: Freshness | None = None


@dataclass
class Running:
    """An operation that has begun and not ended."""

    room: int
    stepper: Stepper
    began: int
    reads: Callable[[Any], list[Seen]] | None = None  # what it saw, by its result
    invalidation: Invalidation | None = None


def one_of(key: str) -> Callable[[Any], list[Seen]]:
    return lambda value: [] if value is None else [Seen(key, value)]


def entry_of(key: str) -> Callable[[Any], list[Seen]]:
    return lambda entry: [] if entry is None else [Seen(key, entry.value, entry.freshness)]


def many_of(values: dict[str, int]) -> list[Seen]:
    return [Seen(key, value) for key, value in values.items()]


def calls_of(keys: list[str]) -> Callable[[list[Any]], list[Seen]]:
    """What calls of these keys have seen; those that saw nothing are to be made by themselves."""
    return lambda values: [
        Seen(key, value)
        for key, value in zip(keys, values, strict=True)
        if not isinstance(value, Unread)
    ]


def key_of(n: int) -> str:
    return f"k:{n}"


def tags_of(n: int, value: int) -> tuple[str, ...]:
    return ("all", f"n:{n}", f"half:{value % 2}")


class CacheMachine(RuleBasedStateMachine):
    """A state machine whose rules are everything that can happen; each rule moves the time on."""

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__()
        self.now = 0
        self.made: list[Made] = []  # a value is its place in this list
        self.invalidations: list[Invalidation] = []
        self.running: list[Running] = []
        self.buried: list[Running] = []
        self.failing = False
        self.has_lost_marks = False
        # Nothing was lost or trimmed that some process may remember, and another not.
        self.is_whole = True
        self.is_clean = True  # no process was killed, and no connection died
        self.dispatch = Recording()
        self.client: Any = redis.Redis.from_url(server.url)
        self.client.flushall()
        self.rooms = [self._make_room(server) for _ in MARKS_LIMITS]
        self.keys = self.rooms[0].keys
        for index in range(len(self.rooms)):
            self._forget_marks(index)
        self.loaders = [self._register(room) for room in self.rooms]

    def _make_room(self, server: EmbeddedServer) -> Stillroom:
        room = patient_room(
            server.url, self.dispatch, lease=LONG, wait=LONG, refresh_lease=LONG, lease_limit=LONG
        )
        room.stats.due = NEVER
        return room

    def _forget_marks(self, room: int) -> None:
        body = self.rooms[room]._cache_body
        body._judges = body._judge_of(MARKS_LIMITS[room])

    def _register(self, room: Stillroom) -> Callable[..., Any]:
        @room.cache.cached(
            "k:{n}",
            ttl=LONG,
            swr=LONG,
            tags=["all", "n:{n}", lambda value: [f"half:{value % 2}"]],
        )
        def load(n: int) -> int:
            return self._load(n)

        return load

    def _load(self, n: int) -> int:
        if self.failing:
            self.failing = False
            raise LoaderFailed
        return self._make(n)

    def _make(self, n: int) -> int:
        self.made.append(Made(key_of(n), tags_of(n, len(self.made)), self.now))
        return len(self.made) - 1

    # Reading and loading

    def _reading(self, room: int, n: int, how: str) -> Running:
        body: Any = self.rooms[room]._cache_body
        key, all_keys = key_of(n), [key_of(n), key_of(1 - n)]
        kept = {"type": int, "ttl": LONG, "swr": LONG}
        begin: dict[str, Callable[[], tuple[Operation[Any], Callable[[Any], list[Seen]]]]] = {
            "get": lambda: (body.get(key, int), one_of(key)),
            "get_entry": lambda: (body.get_entry(key, int), entry_of(key)),
            "loader": lambda: (body.call(body.loaders["load"], (n,), {}), one_of(key)),
            "calls": lambda: (
                body.call_many([Asked(body.loaders["load"], (one,), {}) for one in (n, 1 - n)]),
                calls_of(all_keys),
            ),
            "get_or_set": lambda: (
                body.get_or_set(
                    key, functools.partial(self._load, n), tags=[lambda v: tags_of(n, v)], **kept
                ),
                one_of(key),
            ),
            "get_many": lambda: (body.get_many(all_keys, int), many_of),
            "get_or_set_many": lambda: (
                body.get_or_set_many(all_keys, self._load_many, tags=[self._tags_of], **kept),
                many_of,
            ),
        }
        operation, seen = begin[how]()
        return Running(room, Stepper(self.rooms[room], operation), self.now, seen)

    def _load_many(self, keys: list[str]) -> dict[str, int]:
        return {key: self._load(int(key.removeprefix("k:"))) for key in keys}

    def _tags_of(self, value: int) -> tuple[str, ...]:
        return self.made[value].tags

    @rule(room=rooms, n=numbers, how=how_to_read)
    def read(self, room: int, n: int, how: str) -> None:
        quiet = self._is_quiet()
        reading = self._reading(room, n, how)
        self._finish(reading)
        loads = how in ("loader", "get_or_set") and reading.stepper.error is None
        if quiet and loads and self.is_whole:
            for index in range(len(self.rooms)):
                assert self._there(index, n) == reading.stepper.result, "two processes disagree"

    @rule(room=rooms)
    def look_at_all(self, room: int) -> None:
        for n in range(KEYS):
            self._look(room, n)

    @rule(room=rooms, n=numbers)
    def look_at_one(self, room: int, n: int) -> None:
        self._look(room, n)

    @rule(room=rooms, n=numbers, how=how_to_read, steps=few)
    def begin_a_read(self, room: int, n: int, how: str, steps: int) -> None:
        self._advance(self._reading(room, n, how), steps)

    @rule(room=rooms, n=numbers, how=how_to_load)
    def begin_a_load(self, room: int, n: int, how: str) -> None:
        """Begin a load and run it up to the loader's call, if it gets there."""
        reading = self._reading(room, n, how)
        while not (reading.stepper.done or reading.stepper.is_waiting):
            if reading.stepper.is_loading:
                break
            self._step(reading)
        self._keep(reading)

    @precondition(lambda self: self.running)
    @rule(pick=picks, steps=few, twice=st.booleans())
    def go_on(self, pick: int, steps: int, twice: bool) -> None:
        """Run the operation on.

        With `twice` its connection dies before the replies and its commands are sent again.
        """
        running = self._taken(pick)
        running.stepper.twice = twice
        self.is_clean = self.is_clean and not twice
        self._advance(running, steps)
        running.stepper.twice = False

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def finish(self, pick: int) -> None:
        self._finish(self._taken(pick))

    # Writing

    @rule(room=rooms, n=numbers, many=st.booleans())
    def set(self, room: int, n: int, many: bool) -> None:
        """Set a value, which forgets earlier loads and is seen by every process."""
        forgets = Invalidation(key_of(n), False, self._tick())
        key, value = key_of(n), self._make(n)
        cache: Any = self.rooms[room].cache
        kept = {"type": int, "ttl": LONG, "swr": LONG, "tags": tags_of(n, value)}

        def store() -> None:
            if many:
                assert cache.set_many({key: value}, **kept) == {key: True}
            else:
                assert cache.set(key, value, **kept)

        store()
        forgets.returned = self._tick()
        self.invalidations.append(forgets)
        for index in range(len(self.rooms)):
            if self._there(index, n) != value:
                assert self.has_lost_marks, "a value that was set is not there"
                self.has_lost_marks = False  # whoever sees that first begins a new epoch
                store()
                assert self._there(index, n) == value

    @rule(room=rooms, n=numbers, many=st.booleans(), steps=most)
    def invalidate_key(self, room: int, n: int, many: bool, steps: int) -> None:
        body = self.rooms[room]._cache_body
        operation: Any = body.invalidate_many([key_of(n)]) if many else body.invalidate(key_of(n))
        self._invalidate(room, key_of(n), False, operation, steps)

    @rule(room=rooms, tag=tags, soft=st.booleans(), steps=most)
    def invalidate_tag(self, room: int, tag: str, soft: bool, steps: int) -> None:
        operation = self.rooms[room]._cache_body.invalidate_by_tag(tag, soft=soft)
        self._invalidate(room, tag, soft, operation, steps)

    @rule(room=rooms, glob=globs, steps=most)
    def invalidate_pattern(self, room: int, glob: str, steps: int) -> None:
        operation = self.rooms[room]._cache_body.invalidate_by_pattern(glob)
        self._invalidate(room, glob, False, operation, steps)

    def _invalidate(
        self, room: int, what: str, soft: bool, operation: Operation[Any], steps: int
    ) -> None:
        began = self._tick()
        named = Invalidation(what, soft, began)
        self.invalidations.append(named)
        self._advance(
            Running(room, Stepper(self.rooms[room], operation), began, invalidation=named), steps
        )

    @rule(room=rooms, times=st.integers(1, 2))
    def flood(self, room: int, times: int) -> None:
        """Invalidate more than one of the two processes remembers."""
        for _ in range(times):
            self.rooms[room].cache.invalidate_by_tag(*[f"flood:{n}" for n in range(FLOOD)])

    # Background work

    @precondition(lambda self: self.dispatch.orders)
    @rule(pick=picks, room=rooms, again=st.booleans(), steps=few)
    def work(self, pick: int, room: int, again: bool, steps: int) -> None:
        """Let a worker take an order; with `again` it is delivered twice."""
        order = self._order(pick)
        if again:
            self.dispatch.orders.append(order)
        operation = self.rooms[room]._cache_body.refresh(order)
        self._advance(Running(room, Stepper(self.rooms[room], operation), self._tick()), steps)

    def _order(self, pick: int) -> RefreshOrder:
        return self.dispatch.orders.pop(pick % len(self.dispatch.orders))

    # Time, loss and other accidents

    @rule(n=numbers, what=st.sampled_from(["stale", "stale", "expired", "lease"]))
    def let_time_pass(self, n: int, what: str) -> None:
        entry, lease = (of(key_of(n).encode()) for of in (self.keys.entry, self.keys.lease))
        if what == "stale":
            self._age(entry)
        else:
            self.client.delete(entry if what == "expired" else lease)

    def _age(self, key: bytes) -> None:
        raw = self.client.get(key)
        if raw is not None and (made := self.made[int(raw.partition(b"\n")[2])]).aged is None:
            age(self.client, key, LONG)
            made.aged = self._tick()

    @rule(room=rooms, moving=st.booleans())
    def let_a_second_pass(self, room: int, moving: bool) -> None:
        """Let a second pass, because a process asks for a refresh and for marks once a second at most."""
        self.rooms[room]._cache_body._asked.clear()
        judges = self.rooms[room]._cache_body._judges
        judges._riding, judges.counts = (NEVER if moving else 0), True

    @rule(
        what=st.sampled_from(
            ["marks", "marks", "globs", "trim", "scripts", "clock", "all", "clear"]
        ),
        room=st.none() | rooms,
    )
    def lose(self, what: str, room: int | None) -> None:
        """Evicted, trimmed, flushed or cleared; and then somebody looks.

        Who remembers the marks may go by them, for all others everything is dead without. With the clock all
        that was stored before is dead for everyone, also what is being loaded.
        """
        self.has_lost_marks = self.has_lost_marks or what == "marks"
        self.is_whole = what in ("all", "clear") or (what == "scripts" and self.is_whole)
        if what in ("clock", "all", "clear"):
            self._lose_everything(what)
        elif what == "trim":  # as if all entries had outlived their longest life
            clock_keys = [self.keys.clock, self.keys.marks, self.keys.globs]
            self.client.eval(trim_marks.plain.source, *trim_marks(clock_keys, 0, 10_000)[2:])
        elif what == "scripts":
            self.client.script_flush()
        else:
            self.client.delete(self.keys.marks if what == "marks" else self.keys.globs)
        if room is not None:
            self.look_at_all(room)

    def _lose_everything(self, what: str) -> None:
        lost = Invalidation(EVERYTHING, False, self._tick())
        if what == "clock":
            self.client.delete(self.keys.clock)
        elif what == "all":
            self.client.flushall()
        else:
            self.rooms[0].cache.clear()
        lost.returned = self._tick()
        self.invalidations.append(lost)

    @rule(what=st.sampled_from(["load", "process", "order", "room"]), pick=picks, room=rooms)
    def fail(self, what: str, pick: int, room: int) -> None:
        """The next load raises, a process is killed in the middle, an order is lost, a process begins anew.

        Whatever a killed process held in Redis stays there.
        """
        if what == "load":
            self.failing = True
        elif what == "process" and self.running:
            self.is_clean = False
            self.buried.append(self._taken(pick))
        elif what == "order" and self.dispatch.orders:
            self._order(pick)
        elif what == "room":
            self.is_clean = False
            self.buried += [r for r in self.running if r.room == room]
            self.running = [r for r in self.running if r.room != room]
            self._forget_marks(room)

    # What must hold

    @invariant()
    def every_key_ends_by_itself(self) -> None:
        found: Sequence[bytes] = self.client.keys("*")
        endless = {key for key in found if self.client.pttl(key) == -1}
        assert endless <= {self.keys.clock, self.keys.marks, self.keys.globs, self.keys.agreed}

    @invariant()
    def whoever_has_ended_holds_no_lease(self) -> None:
        if not self.running and self.is_clean:
            for n in range(KEYS):
                lease = self.client.get(self.keys.lease(key_of(n).encode())) or b""
                assert not lease.startswith((b"load.", b"working.")), lease

    def teardown(self) -> None:
        try:
            while ready := [r for r in self.running if not r.stepper.is_waiting]:
                self.running.remove(ready[0])
                self._finish(ready[0])
            for n in range(KEYS):
                for index in range(len(self.rooms)):
                    self._look(index, n)
        finally:
            for room in self.rooms:
                room.close()
            self.client.close()

    # Running operations

    def _tick(self) -> int:
        self.now += 1
        return self.now

    def _taken(self, pick: int) -> Running:
        return self.running.pop(pick % len(self.running))

    def _advance(self, running: Running, steps: int) -> None:
        for _ in range(steps):
            if not running.stepper.done:
                self._step(running)
        self._keep(running)

    def _finish(self, running: Running) -> None:
        """Run the operation to its end, or to where it waits for another's load."""
        self._step(running)
        while not (running.stepper.done or running.stepper.is_waiting):
            self._step(running)
        self._keep(running)

    def _step(self, running: Running) -> None:
        self._tick()
        running.stepper.step()
        if running.stepper.done:
            self._ended(running)

    def _keep(self, running: Running) -> None:
        if not running.stepper.done:
            self.running.append(running)

    def _ended(self, running: Running) -> None:
        stepper = running.stepper
        if stepper.error is not None:
            # Its own load has failed, or one of the other process that it waited for.
            assert isinstance(stepper.error, LoaderFailed | LoadFailed), repr(stepper.error)
        elif running.invalidation is not None:
            running.invalidation.returned = self._tick()
        elif running.reads is not None:
            for seen in running.reads(stepper.result):
                self._check(seen, running.began)

    def _look(self, room: int, n: int) -> int | None:
        looking = self._reading(room, n, "get_entry")
        self._finish(looking)
        seen = looking.stepper.result
        return None if seen is None else int(seen.value)

    def _there(self, room: int, n: int) -> int | None:
        """Return what this process finds; a forgetful one may have to begin anew and look once more."""
        seen = self._look(room, n)
        return self._look(room, n) if seen is None else seen

    def _check(self, seen: Seen, began: int) -> None:
        made = self.made[seen.value]
        assert made.key == seen.key, f"the value of {made.key} under {seen.key}"
        named = [one for one in self.invalidations if one.forbids(made, began)]
        hard = [one for one in named if not one.soft]
        assert not hard, f"a read from {began} on saw {seen}, {made}, in spite of {hard}"
        if seen.freshness is Freshness.FRESH:
            assert not named, f"fresh in spite of {named}"
            assert made.aged is None or made.aged > began, "fresh past its time"

    def _is_quiet(self) -> bool:
        leases = self.client.keys(self.keys.lease(b"*"))
        return not self.running and not leases


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_no_order_of_steps_shows_what_was_invalidated(
    server: EmbeddedServer, is_full: bool
) -> None:
    """No order of steps of two processes, with every known accident, shows an invalidated value."""
    run_state_machine_as_test(
        functools.partial(CacheMachine, server),  # type: ignore[arg-type]  # a factory is as good
        settings=settings(
            max_examples=150 if is_full else 50,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
