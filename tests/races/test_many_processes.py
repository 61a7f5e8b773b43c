"""In a crowd of 200 callers and four processes each key has one load, and a killed loader has one successor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from stillroom.embedded import EmbeddedServer
from tests.support.crowd import Crowd, ToRedis, patient_room, stale_loader
from tests.support.entries import age
from tests.support.processes import Program

PROCESSES = 4
EACH = 50
TOTAL = PROCESSES * EACH


@pytest.fixture
def crowd(server: EmbeddedServer) -> Iterator[Crowd]:
    crowd = Crowd(server.url)
    yield crowd
    crowd.close()


class Act:
    """Run the same act in several processes."""

    def __init__(self, stack: ExitStack, call: str, processes: int = PROCESSES) -> None:
        source = f"from tests.support.crowd import *; {call}"
        self.programs = [stack.enter_context(Program(source)) for _ in range(processes)]

    def values(self) -> list[Any]:
        """Return the values that all processes report at the end."""
        told = [json.loads(program.read_word("values ")) for program in self.programs]
        return [value for values in told for value in values]


@pytest.mark.parametrize(("act", "voices"), [("miss_in_threads", EACH), ("miss_in_tasks", 1)])
def test_200_concurrent_misses_are_one_load(
    server: EmbeddedServer, crowd: Crowd, act: str, voices: int
) -> None:
    """Of 200 callers in four processes one loads, and all get its value."""
    with ExitStack() as stack:
        crowd_of_four = Act(stack, f"{act}({server.url!r}, {EACH}, {TOTAL})")
        crowd.await_ready(PROCESSES * voices)
        crowd.give("go", PROCESSES * voices)
        values = crowd_of_four.values()
    assert len(values) == TOTAL
    assert len(set(values)) == 1
    assert crowd.counted("loads") == 1


def test_200_concurrent_stale_readers_are_one_order(
    server: EmbeddedServer, client: Any, crowd: Crowd
) -> None:
    """Each stale period is one refresh for 200 concurrent readers, who are all served at once."""
    rounds = 5
    orders = ToRedis(server.url)
    with ExitStack() as stack, patient_room(server.url, orders) as room:
        readers = Act(stack, f"read_stale({server.url!r}, {EACH}, {rounds})")
        load = stale_loader(room, "from here")
        load()
        for turn in range(rounds):
            crowd.await_ready(TOTAL, f"round {turn}")
            if turn:
                (order,) = orders.take()
                assert room.cache.refresh(order)["outcome"] == "refreshed"
            age(client, room.keys.entry(b"k"), 61)
            crowd.give(f"round {turn}", TOTAL)
        seen = readers.values()
        assert len(orders.take()) == 1
    assert seen == [["from here"] * rounds] * TOTAL


def test_a_killed_loader_has_one_successor(
    server: EmbeddedServer, client: Any, crowd: Crowd
) -> None:
    """When SIGKILL ends a loader its lease runs out, one waiter loads, and all get the value."""
    with ExitStack() as stack, patient_room(server.url) as room:
        doomed = Act(stack, f"load_forever({server.url!r}, lease=0.5)", processes=1)
        heirs = Act(stack, f"outlive({server.url!r}, {EACH // 2})", processes=2)
        crowd.await_ready(EACH)
        crowd.await_ready(1, "load")
        crowd.give("load")
        crowd.wait_for("loading")
        lease = room.keys.lease(b"k")
        runs_out = crowd.now_ms() + client.pttl(lease)
        crowd.give("go", EACH)
        doomed.programs[0].kill()
        values = heirs.values()
        assert len(values) == EACH
        assert set(values) == {room.cache.get("k")}
        assert crowd.counted("loads") == 1
        assert int(values[0].removeprefix("successor 1 at ")) >= runs_out
        assert client.exists(lease) == 0
