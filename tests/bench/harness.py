"""Run callables side by side in interleaved rounds and compare what one call costs.

Machine speed drifts, so nothing is compared across rounds: in every round each contestant makes the
same number of hits, ratios are taken inside the round, and the figure printed is their median.
"""

import asyncio
import gc
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    contextmanager,
)
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import quantiles
from typing import Literal, Self

Kind = Literal["sync", "async"]
Role = Literal["floor", "bare", "ours", "peer"]
Hit = Callable[[], object]
AsyncHit = Callable[[], Awaitable[object]]
Prepared = AbstractContextManager[Hit] | AbstractAsyncContextManager[AsyncHit]

# Hits before each turn's clocks start. Without them, whoever follows a contestant built on the same
# library finds its code still in the CPU's caches: of two identical ones it looked 5 % cheaper.
LEAD_IN = 20
GC_POLICY = "collect and freeze before the rounds, off during them, back on after"


def apart_from(server_pid: int) -> None:
    """This process on one CPU, the server on the others, where there are any.

    As in real life, where Redis is on another machine: what a request needs is still in the caches of its CPU, and
    the server has not pushed it out. CPU time is counted, so waiting for another CPU to wake costs nothing.
    """
    cpus = os.sched_getaffinity(0)
    ours = {max(cpus)}
    os.sched_setaffinity(0, ours)
    os.sched_setaffinity(server_pid, cpus - ours or ours)


@dataclass(frozen=True)
class Contestant:
    """One way to make a hit: what it is, and how to get it ready."""

    name: str
    kind: Kind
    role: Role
    package: str  # the distribution whose version is printed
    setup: str  # one line: how it is set up, and how the value gets its type
    make: Callable[[], Prepared]  # may raise ImportError: then it is skipped

    @property
    def version(self) -> str:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "-"


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
    """One contestant's round, in microseconds per hit."""

    cpu: float  # CPU time of the calling thread
    elsewhere: float  # CPU time of this process's other threads
    wall: float

    @classmethod
    def between(cls, start: Reading, end: Reading, hits: int) -> Self:
        scale = 1000 * hits
        cpu = (end.thread - start.thread) / scale
        process = (end.process - start.process) / scale
        return cls(cpu, max(0.0, process - cpu), (end.wall - start.wall) / scale)


Runner = Callable[[int], tuple[Sample, object]]


@dataclass
class Field:
    """The contestants that could be made ready, all alive at once, and why the others could not."""

    expected: object
    runners: dict[str, Runner] = field(default_factory=dict)
    entered: list[Contestant] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._stack = ExitStack()
        self._async_stack = AsyncExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._loop.run_until_complete(self._async_stack.aclose())
            self._stack.close()
        finally:
            self._loop.close()

    def enter(self, contestant: Contestant) -> None:
        """Make it ready and check its first value; a missing package skips it."""
        try:
            runner = self._ready(contestant.make())
        except ImportError as error:
            self.skipped[contestant.name] = str(error)
            return
        self.runners[contestant.name] = runner
        self.entered.append(contestant)
        self.measure(contestant, hits=1)

    def measure(self, contestant: Contestant, hits: int) -> Sample:
        """Make `hits` hits between two readings of the clocks, then check the last value."""
        runner = self.runners[contestant.name]
        runner(LEAD_IN)
        sample, value = runner(hits)
        if value != self.expected:
            raise AssertionError(f"{contestant.name} returned {value!r}, not {self.expected!r}")
        return sample

    def _ready(self, prepared: Prepared) -> Runner:
        if isinstance(prepared, AbstractContextManager):
            hit = self._stack.enter_context(prepared)
            return lambda hits: _run(hit, hits)
        entering = self._async_stack.enter_async_context(prepared)
        async_hit = self._loop.run_until_complete(entering)
        return lambda hits: self._loop.run_until_complete(_run_async(async_hit, hits))


def _run(hit: Hit, hits: int) -> tuple[Sample, object]:
    value: object = None
    start = Reading.now()
    for _ in range(hits):
        value = hit()
    return Sample.between(start, Reading.now(), hits), value


async def _run_async(hit: AsyncHit, hits: int) -> tuple[Sample, object]:
    # The clocks are read inside the coroutine: starting the loop is nobody's cost.
    value: object = None
    start = Reading.now()
    for _ in range(hits):
        value = await hit()
    return Sample.between(start, Reading.now(), hits), value


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

    def find(self, kind: Kind, role: Role) -> list[Contestant]:
        return [c for c in self.contestants if (c.kind, c.role) == (kind, role)]

    def cpu(self, contestant: Contestant) -> list[float]:
        return [sample.cpu for sample in self.samples[contestant.name]]

    def wall(self, contestant: Contestant) -> list[float]:
        return [sample.wall for sample in self.samples[contestant.name]]

    def elsewhere(self, contestant: Contestant) -> list[float]:
        return [sample.elsewhere for sample in self.samples[contestant.name]]

    def added(self, contestant: Contestant) -> list[float]:
        """Round by round, what it costs beyond the floor of its kind."""
        [floor] = self.find(contestant.kind, "floor")
        pairs = zip(self.cpu(contestant), self.cpu(floor), strict=True)
        return [cpu - least for cpu, least in pairs]

    def added_ratio(self, one: Contestant, other: Contestant) -> list[float]:
        """Round by round, how many times what `other` adds does `one` add."""
        pairs = zip(self.added(one), self.added(other), strict=True)
        return [above / below for above, below in pairs]

    def times_bare(self, contestant: Contestant) -> list[float]:
        [bare] = self.find(contestant.kind, "bare")
        return self.added_ratio(contestant, bare)


def interleave(ground: Field, *, rounds: int, hits: int, warm_up: int) -> Results:
    """Run the rounds, the order moved on by one each time; warm-up rounds are not counted."""
    samples: dict[str, list[Sample]] = {c.name: [] for c in ground.entered}
    for order in _orders(ground.entered, warm_up):
        _round(ground, order, hits)
    with quiet_gc():
        for order in _orders(ground.entered, rounds):
            for name, sample in _round(ground, order, hits):
                samples[name].append(sample)
    return Results(ground.entered, samples)


def _orders(contestants: list[Contestant], rounds: int) -> Iterator[list[Contestant]]:
    for number in range(rounds):
        first = number % len(contestants)
        yield contestants[first:] + contestants[:first]


def _round(ground: Field, order: list[Contestant], hits: int) -> list[tuple[str, Sample]]:
    return [(contestant.name, ground.measure(contestant, hits)) for contestant in order]


@contextmanager
def quiet_gc() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Table:
    """Aligned plain text: the first columns to the left, figures to the right."""

    def __init__(self, *columns: str, left: int = 1) -> None:
        self._rows = [columns]
        self._left = left

    def add(self, *cells: str) -> None:
        self._rows.append(cells)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self._rows, strict=True)]
        head, *body = (self._line(row, widths) for row in self._rows)
        return "\n".join([head, "-" * len(head), *body])

    def _line(self, row: Iterable[str], widths: list[int]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(
            cell.ljust(width) if place < self._left else cell.rjust(width)
            for place, (cell, width) in enumerate(cells)
        ).rstrip()
