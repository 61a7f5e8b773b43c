"""Runs models in a World: many short runs, each from a seed, and the story of the first that breaks a promise."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from stillroom import NoDispatch, Settings, Stillroom
from stillroom.dispatch import Dispatch
from tests.explorer.watch import Watch
from tests.explorer.world import SOCKET, Actor, Fate, World
from tests.support.clocked import ClockedServer

SERVERS = 3
COLLECTED_EVERY = 100  # runs

# How a run is meant to hurt: the fates of its batches, by weight. Half of the runs have a network that works.
CALM: dict[Fate, float] = {Fate.ARRIVES: 1.0}
ROUGH: dict[Fate, float] = {
    Fate.ARRIVES: 10.0,
    Fate.UNSENT: 0.5,
    Fate.HELD: 3.0,
    Fate.UNANSWERED: 1.0,
    Fate.CUT: 1.0,
    Fate.SLOW: 1.0,
}

# Where a broken variant showed itself last time, if that was not soon. A change to a model or a service may make
# another run show it: then it is searched for among all seeds, and the seed found belongs here.
SHOWN_BY_SEED: dict[str, tuple[int, ...]] = {
    "an end has no age": (460,),
    "a doubt is not cleared": (460,),
    "a refused login ends what it would have replaced": (1580,),
    "a name ends its session for ever": (809,),
    "what was charged is forgotten here": (505,),
    "a check does not wait for what is owed": (399,),
    "a refund of what was decided here stays here": (146,),
    "a refund takes from one entry only": (1427,),
    "what is given back of hits that count here is taken off twice": (542,),
    "a batch that died is not waited out": (156,),
    "a late put is taken": (245,),
    "a deadline is made too late": (321,),
    "any server is trusted": (110,),
    "a load is stored without its lease": (111,),
    "a fence is the time": (1487,),
    "names are known up to an own change": (178,),
    "of two looks the last stands": (101,),
    "a load is made of what is older": (70,),
}


class Broken(AssertionError):
    """A promise was broken."""


class Model:
    """Makes the calls of a run, and checks what must be true of them. Each run has a new one."""

    SETTINGS: ClassVar[dict[str, Any]] = {}
    WEIGHTS: ClassVar[dict[str, float]] = {}  # how often each kind of event happens
    dispatch: Dispatch = NoDispatch()

    def __init__(self, world: World, settings: Settings, weights: Mapping[str, float]) -> None:
        self.world = world
        self.watch = Watch(world)
        self._settings = settings
        self._weights = weights
        self._opened: list[Stillroom] = []

    def act(self) -> None:
        """Begin a call, or let something happen that only this model knows."""
        raise NotImplementedError

    def end(self) -> None:
        """Look at everything once more, when all calls have ended. Raises Broken."""
        raise NotImplementedError

    def close(self) -> None:
        """Clean up after the run, whatever came of it."""
        for room in self._opened:
            cache: Any = room._cache_body
            for shard in getattr(cache, "shards", [cache]):
                shard._invalidator._at_exit.disarm()
            room._at_exit.disarm()

    def _room(self) -> Stillroom:
        """Open a room, as a new process does."""
        self._opened.append(Stillroom(self._settings, dispatch=self.dispatch))
        return self._opened[-1]

    def _next(self) -> str:
        """Choose the kind of the next event."""
        (name,) = self.world.random.choices(list(self._weights), list(self._weights.values()))
        return name

    def _look(self) -> None:
        """Look for an accident that happened meanwhile."""
        self.watch.look()

    def _expect(self, call: Actor, errors: tuple[type[Exception], ...] = ()) -> None:
        """Check that the call raised no other errors than these."""
        self._look()
        if call.error is not None and not isinstance(call.error, errors):
            raise Broken(f"{call.name} raised {call.error!r}") from call.error


def maker(model: type[Model], **weights: float) -> Callable[[World], Model]:
    """Makes a model for each run, with other weights for what happens."""
    settings = Settings(**model.SETTINGS)
    return lambda world: model(world, settings, model.WEIGHTS | weights)


def run(world: World, seed: int, make: Callable[[World], Model], acts: int = 12) -> None:
    """Make one run. Raises Broken, or an error of a call that promises not to raise it."""
    world.begin(seed)
    with world.inside():
        world.fates = ROUGH if world.chance(0.5) else CALM
        is_stormy = world.chance(0.6)
        model = make(world)
        try:
            for _ in range(acts):
                model.act()
                world.go_on(world.random.randint(0, 12))
                if world.chance(0.5):
                    world.deliver_a_copy()
                if is_stormy and world.chance(0.25):
                    accident(world)
            world.fates = CALM
            world.finish()
            model.end()
        finally:
            model.close()


def accident(world: World) -> None:
    """One thing that no call has asked for."""
    chance = world.random
    match chance.choice(["time", "clock", "snapshot", "snapshot", "server"]):
        case "time":
            world.pass_time(chance.choice([0.01, 0.05, 0.2, 1.5, 12.0, 400.0]))
        case "clock":
            world.step_clock(chance.choice([-3600.0, -5.0, -0.3, 0.04, 0.3, 5.0, 3600.0]))
        case "snapshot":
            world.take_snapshot()
        case "server":
            world.change_server(chance.choice(["empty", "snapshot", "snapshot", "all"]))


def explore(world: World, seeds: Iterable[int], make: Callable[[World], Model]) -> int:
    """Run each seed; returns how many. The first that breaks is run again, and its story is told."""
    world.load_scripts()
    count = 0
    with _few_collections():
        for seed in seeds:
            try:
                run(world, seed, make)
            except Exception as error:
                raise Broken(told(world, seed, make, error)) from error
            count += 1
            if not count % COLLECTED_EVERY:
                gc.collect()
    return count


@contextmanager
def _few_collections() -> Iterator[None]:
    """Leave garbage alone: rooms are cycles, and to look for them all the time takes a sixth of a run."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def search(world: World, variant: str, within: int, make: Callable[[World], Model]) -> None:
    """Search for a run that breaks with this broken variant: that of last time, then all seeds up to `within`."""
    explore(world, [*SHOWN_BY_SEED.get(variant, ()), *range(within)], make)


def told(world: World, seed: int, make: Callable[[World], Model], error: BaseException) -> str:
    """The story of a run, step by step."""
    world.trace = []
    try:
        run(world, seed, make)
    except Exception as again:
        story = "\n".join(world.trace)
        return f"seed {seed}: {again!r}\n{story}"
    finally:
        world.trace = None
    return f"seed {seed}: {error!r}, but not when it was run again"


@contextmanager
def worlds(binary: str = "redis-server") -> Iterator[World]:
    """A world on real servers whose clocks can be set."""
    options = {"maxmemory": "0", "unixsocket": SOCKET}
    servers = [ClockedServer(binary, options=options) for _ in range(SERVERS)]
    started: list[Any] = []
    try:
        for server in servers:
            server.start()
            started.append(server)
        world = World(servers)
        yield world
        world.close()
    finally:
        for server in servers:
            server.stop()
