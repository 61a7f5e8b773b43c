"""The explorer works: a run follows from its seed, and each accident does what it says."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom import NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.operation import Once, Operation
from stillroom.scripts import Text, clear, put
from stillroom.wire.server import pack
from tests.explorer.cache import CacheModel
from tests.explorer.explorer import Broken, Model, maker, run, told
from tests.explorer.world import Fate, World

KEY = b"counter"


def batch(kind: type[list[Any]]) -> Operation[Any]:
    return (yield kind([(b"INCR", KEY), (b"INCR", KEY)]))


def story(world: World, seed: int) -> list[str]:
    """Return what happened in a run, with how it ended."""
    world.trace = []
    try:
        run(world, seed, maker(CacheModel))
    except Broken as broken:
        world.trace.append(str(broken))
    told, world.trace = world.trace, None
    return told


def test_a_run_is_the_same_each_time(world: World) -> None:
    """A run with the same seed has the same steps."""
    for seed in range(20):
        assert story(world, seed) == story(world, seed)


def test_a_broken_promise_is_told_as_a_story(world: World) -> None:
    """A broken promise is printed as a story with the seed and the commands in order."""

    class Forgetful(Model):
        def act(self) -> None:
            self.world.run("set k", 0, lambda: self._room().cache.set("k", 1))

        def end(self) -> None:
            raise Broken("k is gone")

    text = told(world, 7, maker(Forgetful), AssertionError())
    assert text.startswith("seed 7: Broken('k is gone')")
    assert "set k: put.lua" in text


@pytest.mark.parametrize(
    ("fate", "kind", "at_once", "in_the_end"),
    [
        (Fate.ARRIVES, list, 2, 2),
        (Fate.UNSENT, list, 2, 2),  # a used connection died: sent again on another
        (Fate.UNSENT, Once, 0, 0),
        (Fate.HELD, list, 2, 4),  # the first copy comes after the second
        (Fate.HELD, Once, 0, 2),
        (Fate.UNANSWERED, list, 4, 4),
        (Fate.UNANSWERED, Once, 2, 2),
        (Fate.SLOW, list, 0, 2),
        (Fate.SLOW, Once, 0, 2),
    ],
)
def test_a_fate_is_what_it_says(
    world: World, fate: Fate, kind: type[list[Any]], at_once: int, in_the_end: int
) -> None:
    """Each fate of a batch acts as often as it says, before its caller gives up and after the copies arrive."""
    world.begin(1)
    with world.inside():
        room = Stillroom(Settings(**CacheModel.SETTINGS), dispatch=NoDispatch())
        world.run("connect", 0, lambda: room.state.run(batch(list)))
        world.ask("DEL", KEY)
        fates = iter([fate])
        choices = world.random.choices
        world.random.choices = (  # type: ignore[method-assign]  # the next batch's fate, and no other
            lambda population, weights: (
                [next(fates, Fate.ARRIVES)]
                if isinstance(population[0], Fate)
                else choices(population, weights)
            )
        )
        call = world.run("incr", 0, lambda: room.state.run(batch(kind)))
        acts = int(world.ask("GET", KEY) or 0)
        while world.copies:
            world.deliver_a_copy()
        assert (acts, int(world.ask("GET", KEY) or 0)) == (at_once, in_the_end)
        fails = fate is Fate.SLOW or (kind is Once and fate is not Fate.ARRIVES)
        assert isinstance(call.error, RedisUnavailable) == fails


@pytest.mark.parametrize(("how", "left"), [("empty", None), ("snapshot", b"old"), ("all", b"new")])
def test_another_server_has_what_it_is_said_to_have(
    world: World, how: str, left: bytes | None
) -> None:
    """Another server has nothing, a snapshot's data or all data, as said, and another run id."""
    world.begin(1)
    before = world.info
    world.ask("SET", "k", "old", "PX", "5000")
    world.take_snapshot()
    world.ask("SET", "k", "new", "PX", "5000")
    assert world.change_server(how)
    assert world.ask("GET", "k") == left
    if left:
        assert 0 < world.ask("PTTL", "k") <= 5_000
    assert world.info != before


def test_lost_scripts_are_missing_until_they_are_loaded(world: World) -> None:
    """A server that has lost its scripts says so to each of them, until that one is loaded again."""
    world.begin(1)
    scripts = [clear.text, put.text]

    def run(script: Text) -> str:
        return str(world.execute(0, [pack([(b"EVALSHA", script.sha, b"0")])])[0])

    assert not any("NOSCRIPT" in run(script) for script in scripts)
    world.lose_scripts()
    assert all("NOSCRIPT" in run(script) for script in scripts)
    world.execute(0, [pack([(b"SCRIPT", b"LOAD", scripts[0].source)])])
    assert ["NOSCRIPT" in run(script) for script in scripts] == [False, True]
    world.begin(1)
    assert not any("NOSCRIPT" in run(script) for script in scripts)


def test_time_is_the_worlds(world: World) -> None:
    """Keys expire by the world's time, and a step of the server's clock is no time for the processes."""
    world.begin(1)
    with world.inside():
        import time

        began = time.monotonic()
        world.ask("SET", "k", "v", "PX", "5000")
        world.pass_time(4.0)
        assert world.ask("GET", "k") == b"v"
        assert time.monotonic() == began + 4.0
        world.step_clock(2.0)
        assert world.ask("GET", "k") is None
        assert time.monotonic() == began + 4.0
