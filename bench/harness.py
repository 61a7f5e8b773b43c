"""Measures callables side by side, in rounds that take turns.

The figure is the CPU time of the calling thread: what a call takes away from the other requests of its process.
The floor is a raw round trip (a plain socket and hiredis). What a contestant *adds* is its figure minus the
floor of its kind. The speed of a machine drifts. So nothing is compared across rounds: in every round each
contestant makes the same number of calls, ratios are taken inside the round, and their median is printed with
the quartiles.

CPU time still moves with the machine: what a system call costs beside Python, and whether the server shares the
CPU and its caches. So the *steps* of a call are counted too: the instructions of Python's bytecode that the
calling thread executes. They are the same on every machine with the same versions of Python and of the
packages.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles
from types import FrameType
from typing import Any, Literal, Self

Kind = Literal["sync", "async"]
Role = Literal["floor", "bare", "ours", "peer"]
Hit = Callable[[], object]
AsyncHit = Callable[[], Awaitable[object]]
Prepared = AbstractContextManager[Hit] | AbstractAsyncContextManager[AsyncHit]

# Hits before each turn's clocks start. Without them, whoever follows a contestant built on the same library finds
# its code still in the CPU's caches: of two identical ones it looked 5 % cheaper.
LEAD_IN = 20
WARM_UP = 3  # rounds
COUNTED = 10  # hits whose steps are counted
ANYTHING: Any = object()


@dataclass(frozen=True)
class Contestant:
    """One way to make a call: what it is, and how to get it ready."""

    name: str
    role: Role
    make: Callable[[], Prepared]  # may raise ImportError: then it is skipped
    kind: Kind = "sync"
    package: str = ""  # the distribution whose version is printed
    setup: str = ""  # one line: how it is set up
    expected: object = ANYTHING  # what each call returns
    stock: Callable[[int], object] | None = None  # makes, off the clock, what so many calls use up

    @property
    def version(self) -> str:
        try:
            return version(self.package) if self.package else ""
        except PackageNotFoundError:
            return "-"


def ready(hit: Hit) -> Callable[[], Prepared]:
    """Return what makes a contestant of a call that needs no preparation."""
    return lambda: nullcontext(hit)


# --- one turn -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """The three clocks at one moment, in nanoseconds."""

    wall: int
    process: int
    thread: int

    @classmethod
    def now(cls) -> Self:
        return cls(time.perf_counter_ns(), time.process_time_ns(), time.thread_time_ns())


@dataclass(frozen=True)
class Sample:
    """One contestant's turn, in microseconds per hit."""

    cpu: float  # CPU time of the calling thread
    elsewhere: float  # CPU time of this process's other threads
    wall: float

    @classmethod
    def between(cls, start: Reading, end: Reading, hits: int) -> Self:
        scale = 1000 * hits
        cpu = (end.thread - start.thread) / scale
        process = (end.process - start.process) / scale
        return cls(cpu, max(0.0, process - cpu), (end.wall - start.wall) / scale)


class Turn:
    """Makes hits, between two readings of the clocks, or while the steps are counted."""

    def __init__(self, hit: Hit) -> None:
        self._hit = hit

    def timed(self, hits: int) -> tuple[Sample, object]:
        value: object = None
        start = Reading.now()
        for _ in range(hits):
            value = self._hit()
        return Sample.between(start, Reading.now(), hits), value

    def steps(self, hits: int) -> list[int]:
        return [self._steps() for _ in range(hits)]

    def _steps(self) -> int:
        with counting() as counter:
            self._hit()
        return counter.steps


class AsyncTurn(Turn):
    """The clocks are read inside the coroutine: starting the loop is nobody's cost."""

    def __init__(self, hit: AsyncHit, loop: asyncio.AbstractEventLoop) -> None:
        self._async_hit = hit
        self._loop = loop

    def timed(self, hits: int) -> tuple[Sample, object]:
        return self._loop.run_until_complete(self._timed(hits))

    async def _timed(self, hits: int) -> tuple[Sample, object]:
        value: object = None
        start = Reading.now()
        for _ in range(hits):
            value = await self._async_hit()
        return Sample.between(start, Reading.now(), hits), value

    def _steps(self) -> int:
        return self._loop.run_until_complete(self._counted())

    async def _counted(self) -> int:
        with counting() as counter:
            await self._async_hit()
        return counter.steps


class Counter:
    """Counts the bytecode instructions of every function that is called while it is set as the trace function."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._count

    def _count(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.steps += 1
        return self._count


@contextmanager
def counting() -> Iterator[Counter]:
    counter = Counter()
    sys.settrace(counter)
    try:
        yield counter
    finally:
        sys.settrace(None)


# --- the rounds -----------------------------------------------------------------------------------


@dataclass
class Field:
    """The contestants that could be made ready, all alive at once, and why the others could not."""

    turns: dict[str, Turn] = field(default_factory=dict)
    entered: list[Contestant] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.loop = asyncio.new_event_loop()
        self._stack = ExitStack()
        self._async_stack = AsyncExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        with closing(self.loop), self._stack:
            self.loop.run_until_complete(self._async_stack.aclose())

    def enter(self, contestant: Contestant) -> None:
        """Make it ready and check its first value; a missing package skips it."""
        try:
            turn = self._ready(contestant.make())
        except ImportError as error:
            self.skipped[contestant.name] = str(error)
            return
        self.turns[contestant.name] = turn
        self.entered.append(contestant)
        self.measure(contestant, hits=1)

    def measure(self, contestant: Contestant, hits: int) -> Sample:
        """Measure one turn of `hits` hits, and check the last value."""
        turn = self.turns[contestant.name]
        if contestant.stock:
            contestant.stock(LEAD_IN + hits)
        turn.timed(LEAD_IN)
        sample, value = turn.timed(hits)
        if contestant.expected not in (ANYTHING, value):
            wrong = f"{contestant.name} returned {value!r}, not {contestant.expected!r}"
            raise AssertionError(wrong)
        return sample

    def count(self, contestant: Contestant) -> float:
        """Return the steps of one hit. It is a median: some hits of an event loop wake it once more than others."""
        if contestant.stock:
            contestant.stock(COUNTED)
        return median(self.turns[contestant.name].steps(COUNTED))

    def _ready(self, prepared: Prepared) -> Turn:
        if isinstance(prepared, AbstractContextManager):
            return Turn(self._stack.enter_context(prepared))
        entering = self._async_stack.enter_async_context(prepared)
        return AsyncTurn(self.loop.run_until_complete(entering), self.loop)


def compete(contestants: Sequence[Contestant], *, rounds: int, hits: int) -> Results:
    """Measure these in rounds that take turns, then count their steps."""
    with Field() as ground:
        for contestant in contestants:
            ground.enter(contestant)
        return interleave(ground, rounds=rounds, hits=hits)


def interleave(ground: Field, *, rounds: int, hits: int) -> Results:
    """Run the rounds, the order moved on by one each time; warm-up rounds are not counted."""
    samples: dict[str, list[Sample]] = {c.name: [] for c in ground.entered}
    for order in _orders(ground.entered, WARM_UP):
        _round(ground, order, hits)
    with quiet_gc():
        for order in _orders(ground.entered, rounds):
            for name, sample in _round(ground, order, hits):
                samples[name].append(sample)
    steps = {contestant.name: ground.count(contestant) for contestant in ground.entered}
    return Results(ground.entered, samples, steps, ground.skipped)


def _orders(contestants: list[Contestant], rounds: int) -> Iterator[list[Contestant]]:
    for number in range(rounds):
        first = number % len(contestants)
        yield contestants[first:] + contestants[:first]


def _round(ground: Field, order: list[Contestant], hits: int) -> list[tuple[str, Sample]]:
    return [(contestant.name, ground.measure(contestant, hits)) for contestant in order]


@contextmanager
def quiet_gc() -> Iterator[None]:
    """Collect no garbage while it is measured: that would fall on whoever's turn it is."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


# --- what came out --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles around it."""

    p25: float
    p50: float
    p75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.p50:.2f} ({self.p25:.2f}–{self.p75:.2f})"


@dataclass(frozen=True)
class Results:
    """Every counted sample: the n-th of each contestant comes from the same round."""

    contestants: list[Contestant]
    samples: dict[str, list[Sample]]
    steps: dict[str, float]
    skipped: dict[str, str]

    @cached_property
    def by_name(self) -> dict[str, Contestant]:
        return {contestant.name: contestant for contestant in self.contestants}

    def find(self, kind: Kind, role: Role) -> list[Contestant]:
        return [c for c in self.contestants if (c.kind, c.role) == (kind, role)]

    def cpu(self, name: str) -> list[float]:
        return [sample.cpu for sample in self.samples[name]]

    def wall(self, name: str) -> list[float]:
        return [sample.wall for sample in self.samples[name]]

    def elsewhere(self, name: str) -> list[float]:
        return [sample.elsewhere for sample in self.samples[name]]

    def added(self, name: str) -> list[float]:
        """Return, round by round, what the contestant costs beyond the floor of its kind."""
        pairs = zip(self.cpu(name), self.cpu(self._floor(name)), strict=True)
        return [cpu - least for cpu, least in pairs]

    def ratio(self, one: str, other: str) -> Spread:
        """Return how many times as much `one` adds as `other`."""
        pairs = zip(self.added(one), self.added(other), strict=True)
        return Spread.of([above / below for above, below in pairs])

    def added_steps(self, name: str) -> float:
        return self.steps[name] - self.steps[self._floor(name)]

    def steps_ratio(self, one: str, other: str) -> float:
        """Return the ratio in steps, which is the same on every machine."""
        return self.added_steps(one) / self.added_steps(other)

    def bare(self, name: str) -> str:
        [bare] = self.find(self.by_name[name].kind, "bare")
        return bare.name

    def cheapest_peer(self, kind: Kind) -> str | None:
        peers = [peer.name for peer in self.find(kind, "peer")]
        return min(peers, key=lambda peer: median(self.added(peer)), default=None)

    def _floor(self, name: str) -> str:
        [floor] = self.find(self.by_name[name].kind, "floor")
        return floor.name
