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
from typing import Any

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
from stillroom import Freshness, Settings, Stillroom
from stillroom.cache.judge import Judge
from stillroom.dispatch import RefreshOrder
from stillroom.embedded import EmbeddedServer
from stillroom.operation import Operation
from stillroom.scripts import trim_marks
from tests.support.entries import Recording, age
from tests.support.stepper import Stepper

NEVER = 1 << 62  # ms
LONG = 1_000.0  # seconds; time moves by hand only
EVERYTHING = "*"
KEYS = 2
MARKS_LIMITS = (20_000, 100)  # the second process remembers little, and has to ask
FLOOD = 120  # more marks than that

rooms = st.integers(0, len(MARKS_LIMITS) - 1)
numbers = st.integers(0, KEYS - 1)
picks = st.integers(0, 7)  # one of however many there are
tags = st.sampled_from(["all", "n:0", "n:1", "third:0", "third:1", "third:2", "unknown"])


class LoaderFailed(Exception):
    """What a failing loader raises."""


@dataclass
class Made:
    """A value: where it belongs, and when it was made."""

    key: str
    tags: tuple[str, ...]
    born: int
    aged: int | None = None


@dataclass
class Invalidation:
    """What it names (a key, a tag or everything), and its time."""

    what: str
    soft: bool
    began: int
    returned: int | None = None

    def forbids(self, made: Made, began: int) -> bool:
        """Whether a read that began then may not be told that this value is fresh."""
        in_order = self.returned is not None and made.born < self.began and self.returned <= began
        return in_order and self.what in (EVERYTHING, made.key, *made.tags)


@dataclass
class Running:
    """An operation that has begun and not ended."""

    room: int
    stepper: Stepper
    began: int
    key: str | None = None  # a read is checked when it ends
    detailed: bool = False  # it tells the freshness
    invalidation: Invalidation | None = None


def key_of(n: int) -> str:
    return f"k:{n}"


def tags_of(n: int, value: int) -> tuple[str, ...]:
    return ("all", f"n:{n}", f"third:{value % 3}")


class CacheMachine(RuleBasedStateMachine):
    """Rules are what can happen; every one of them moves the time on."""

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__()
        self.now = 0
        self.made: list[Made] = []  # a value is its place in this list
        self.invalidations: list[Invalidation] = []
        self.running: list[Running] = []
        self.buried: list[Running] = []
        self.failing = False
        self.dispatch = Recording()
        self.client: Any = redis.Redis.from_url(server.url)
        self.client.flushall()
        self.rooms = [self._make_room(server, limit) for limit in MARKS_LIMITS]
        self.keys = self.rooms[0].keys
        self.loaders = [self._register(room) for room in self.rooms]

    def _make_room(self, server: EmbeddedServer, marks_limit: int) -> Stillroom:
        patient: dict[str, Any] = dict.fromkeys(("lease", "wait", "refresh_lease"), LONG)
        patient |= dict.fromkeys(("call_timeout", "command_timeout", "connect_timeout"), 10.0)
        chosen = Settings(redis_url=server.url, marks_limit=marks_limit, **patient)
        room = Stillroom(chosen, dispatch=self.dispatch)
        room.stats.due = NEVER
        return room

    def _register(self, room: Stillroom) -> Callable[..., Any]:
        @room.cache.cached(
            "k:{n}",
            ttl=LONG,
            swr=LONG,
            tags=["all", "n:{n}", lambda value: [f"third:{value % 3}"]],
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
        operations: dict[str, Callable[[], Operation[Any]]] = {
            "get": lambda: body.get(key_of(n), int),
            "get_entry": lambda: body.get_entry(key_of(n), int),
            "loader": lambda: body.call(body.loaders["load"], (n,), {}),
            "get_or_set": lambda: body.get_or_set(
                key_of(n),
                functools.partial(self._load, n),
                type=int,
                ttl=LONG,
                swr=LONG,
                tags=["all", f"n:{n}", lambda value: [f"third:{value % 3}"]],
            ),
        }
        stepper = Stepper(self.rooms[room], operations[how]())
        return Running(room, stepper, self.now, key_of(n), how == "get_entry")

    @rule(room=rooms, n=numbers, how=st.sampled_from(["get", "get_entry", "loader", "get_or_set"]))
    def read(self, room: int, n: int, how: str) -> None:
        quiet = self._is_quiet()
        reading = self._reading(room, n, how)
        self._finish(reading)
        loads = how in ("loader", "get_or_set") and reading.stepper.error is None
        if quiet and loads and self._is_whole():
            for index in range(len(self.rooms)):
                assert self._look(index, n) == reading.stepper.result, "two processes disagree"

    @rule(
        room=rooms,
        n=numbers,
        how=st.sampled_from(["get", "get_entry", "loader", "get_or_set"]),
        steps=st.integers(0, 6),
    )
    def begin_a_read(self, room: int, n: int, how: str, steps: int) -> None:
        self._advance(self._reading(room, n, how), steps)

    @rule(room=rooms, n=numbers, how=st.sampled_from(["loader", "get_or_set"]))
    def begin_a_load(self, room: int, n: int, how: str) -> None:
        """Up to the loader's call, if it comes to that."""
        reading = self._reading(room, n, how)
        while not (reading.stepper.done or reading.stepper.is_waiting):
            if reading.stepper.is_loading:
                break
            self._step(reading)
        self._keep(reading)

    @precondition(lambda self: self.running)
    @rule(pick=picks, steps=st.integers(1, 6))
    def go_on(self, pick: int, steps: int) -> None:
        self._advance(self._taken(pick), steps)

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def finish(self, pick: int) -> None:
        self._finish(self._taken(pick))

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def kill(self, pick: int) -> None:
        """Its process is gone in the middle; whatever it held in Redis stays."""
        self.buried.append(self._taken(pick))

    @rule()
    def let_the_next_load_fail(self) -> None:
        self.failing = True

    # Writing

    @rule(room=rooms, n=numbers)
    def set(self, room: int, n: int) -> None:
        """It also forgets what was loaded before, and what it stored is there for everybody."""
        forgets = Invalidation(key_of(n), False, self._tick())
        value = self._make(n)
        cache = self.rooms[room].cache
        assert cache.set(key_of(n), value, type=int, ttl=LONG, swr=LONG, tags=tags_of(n, value))
        forgets.returned = self._tick()
        self.invalidations.append(forgets)
        for index in range(len(self.rooms)):
            assert self._look(index, n) == value, "a value that was set is not there"

    @rule(room=rooms, n=numbers, steps=st.integers(0, 4))
    def invalidate_key(self, room: int, n: int, steps: int) -> None:
        operation = self.rooms[room]._cache_body.invalidate(key_of(n))
        self._invalidate(room, key_of(n), False, operation, steps)

    @rule(room=rooms, tag=tags, soft=st.booleans(), steps=st.integers(0, 2))
    def invalidate_tag(self, room: int, tag: str, soft: bool, steps: int) -> None:
        operation = self.rooms[room]._cache_body.invalidate_by_tag(tag, soft=soft)
        self._invalidate(room, tag, soft, operation, steps)

    def _invalidate(
        self, room: int, what: str, soft: bool, operation: Operation[Any], steps: int
    ) -> None:
        began = self._tick()
        named = Invalidation(what, soft, began)
        self.invalidations.append(named)
        self._advance(
            Running(room, Stepper(self.rooms[room], operation), began, invalidation=named), steps
        )

    @rule(room=rooms)
    def flood(self, room: int) -> None:
        """More invalidations than one of the two remembers."""
        self.rooms[room].cache.invalidate_by_tag(*[f"flood:{n}" for n in range(FLOOD)])

    # Background work

    @precondition(lambda self: self.dispatch.orders)
    @rule(pick=picks, room=rooms, again=st.booleans(), steps=st.integers(0, 12))
    def work(self, pick: int, room: int, again: bool, steps: int) -> None:
        """A worker takes an order; `again`: it will be delivered twice."""
        order = self._order(pick)
        if again:
            self.dispatch.orders.append(order)
        operation = self.rooms[room]._cache_body.refresh(order)
        self._advance(Running(room, Stepper(self.rooms[room], operation), self._tick()), steps)

    @precondition(lambda self: self.dispatch.orders)
    @rule(pick=picks)
    def lose_an_order(self, pick: int) -> None:
        self._order(pick)

    def _order(self, pick: int) -> RefreshOrder:
        return self.dispatch.orders.pop(pick % len(self.dispatch.orders))

    # Time, loss and other accidents

    @rule(n=numbers)
    def let_an_entry_expire(self, n: int) -> None:
        self.client.delete(self.keys.entry(key_of(n).encode()))

    @rule(n=numbers)
    def let_a_lease_expire(self, n: int) -> None:
        self.client.delete(self.keys.lease(key_of(n).encode()))

    @rule(n=numbers)
    def age_to_stale(self, n: int) -> None:
        key = self.keys.entry(key_of(n).encode())
        raw = self.client.get(key)
        if raw is not None:
            made = self.made[int(raw.partition(b"\n")[2])]
            if made.aged is None:
                age(self.client, key, LONG)
                made.aged = self._tick()

    @rule(room=rooms)
    def let_a_second_pass(self, room: int) -> None:
        """A process asks for a refresh once a second at most."""
        self.rooms[room]._cache_body._asked.clear()

    @rule(room=rooms, moving=st.booleans())
    def notice_that_the_clock_moves(self, room: int, moving: bool) -> None:
        """While it does, the marks ride along with each read."""
        self._judge(room)._moving_until = NEVER if moving else 0

    def _judge(self, room: int) -> Judge:
        return self.rooms[room]._cache_body._judges

    @rule(room=rooms)
    def restart(self, room: int) -> None:
        """A new process knows no marks, and nothing of what the old one was doing."""
        self.buried += [r for r in self.running if r.room == room]
        self.running = [r for r in self.running if r.room != room]
        body = self.rooms[room]._cache_body
        body._judges = Judge(self.keys, body.now_ms, MARKS_LIMITS[room])

    @rule()
    def evict_the_clock(self) -> None:
        self._lose_everything(functools.partial(self.client.delete, self.keys.clock))

    @rule()
    def flush_everything(self) -> None:
        self._lose_everything(self.client.flushall)

    def _lose_everything(self, lose: Callable[[], object]) -> None:
        """What was stored before is dead for everyone, also what is being loaded."""
        lost = Invalidation(EVERYTHING, False, self._tick())
        lose()
        lost.returned = self._tick()
        self.invalidations.append(lost)

    @rule()
    def evict_the_marks(self) -> None:
        """Who remembers them may go by them, for all others everything is dead."""
        self.client.delete(self.keys.marks)

    @rule()
    def trim_all_marks(self) -> None:
        """As if all entries had outlived their longest life."""
        script = trim_marks([self.keys.clock, self.keys.marks], 0, 10_000)
        self.client.eval(trim_marks.source, *(text for text in script[2:]))

    @rule()
    def flush_scripts(self) -> None:
        self.client.script_flush()

    # What must hold

    @invariant()
    def every_key_ends_by_itself(self) -> None:
        found: Sequence[bytes] = self.client.keys("*")
        endless = {key for key in found if self.client.pttl(key) == -1}
        assert endless <= {self.keys.clock, self.keys.marks}

    @invariant()
    def whoever_has_ended_holds_no_lease(self) -> None:
        if not self.running and not self.buried:
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
        """To its end, or to where it waits for another's load."""
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
            assert isinstance(stepper.error, LoaderFailed), repr(stepper.error)
        elif running.invalidation is not None:
            running.invalidation.returned = self._tick()
        elif running.key is not None:
            self._check(running)

    def _look(self, room: int, n: int) -> int | None:
        looking = self._reading(room, n, "get_entry")
        self._finish(looking)
        seen = looking.stepper.result
        return None if seen is None else int(seen.value)

    def _check(self, read: Running) -> None:
        seen = read.stepper.result
        if seen is None:
            return
        value, freshness = (seen.value, seen.freshness) if read.detailed else (seen, None)
        made = self.made[value]
        assert made.key == read.key, f"the value of {made.key} under {read.key}"
        named = [one for one in self.invalidations if one.forbids(made, read.began)]
        hard = [one for one in named if not one.soft]
        assert not hard, f"a read from {read.began} on saw {value}, {made}, in spite of {hard}"
        if freshness is Freshness.FRESH:
            assert not named, f"fresh in spite of {named}"
            assert made.aged is None or made.aged > read.began, "fresh past its time"

    def _is_quiet(self) -> bool:
        leases = self.client.keys(self.keys.lease(b"*"))
        return not self.running and not leases

    def _is_whole(self) -> bool:
        """Whether nothing was lost or trimmed: a value that was loaded is there for everybody."""
        clock, newest, trimmed = (
            self.client.get(self.keys.clock),
            self.client.zscore(self.keys.marks, "~"),
            self.client.zscore(self.keys.marks, "!"),
        )
        return clock is not None and newest is not None and trimmed is None


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_no_order_of_steps_shows_what_was_invalidated(server: EmbeddedServer) -> None:
    """Two processes, operations interleaved command by command, and every accident that we know of."""
    run_state_machine_as_test(
        functools.partial(CacheMachine, server),  # type: ignore[arg-type]  # a factory is as good
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
