"""Locks and semaphores agree with a model of a few lines, in any order of asking, giving back, dying and time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import redis
from stillroom import Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.locks.body import TAKEN
from tests.support.crowd import patient_room

STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "again", "try", "free", "die", "leave"]), st.integers(0, 4)),
    max_size=40,
)


class Model:
    """The holders, and the waiters in the order in which they came."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.holders: list[str] = []
        self.queue: list[str] = []

    def ask(self, who: str, *, waits: bool) -> bool:
        """Ask for a slot; return whether it is taken now."""
        if waits and who not in self.queue and who not in self.holders:
            self.queue.append(who)
        ahead = self.queue.index(who) if who in self.queue else len(self.queue)
        if who not in self.holders and len(self.holders) + ahead >= self.slots:
            return False
        self.leave(who)
        self.holders.append(who)
        return True

    def leave(self, who: str) -> None:
        self.holders = [one for one in self.holders if one != who]
        self.queue = [one for one in self.queue if one != who]


@pytest.fixture(scope="module")
def room(stillroom_server: EmbeddedServer) -> Iterator[Stillroom]:
    with patient_room(stillroom_server.url, namespace="locks") as room:
        yield room


@pytest.fixture(scope="module")
def client(stillroom_server: EmbeddedServer) -> Iterator[Any]:
    with redis.Redis.from_url(stillroom_server.url) as client:
        yield client


@given(steps=STEPS, slots=st.integers(1, 3))
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_slots_are_given_as_the_model_gives_them(
    room: Stillroom, client: Any, steps: list[tuple[str, int]], slots: int
) -> None:
    """There are never more holders than slots, nobody overtakes, and every fence is larger than all before it."""
    client.flushall()
    model, fences = Model(slots), [0]
    for step, number in steps:
        who = f"w{number}"
        if step in ("ask", "again", "try"):
            waits = step != "try"
            reply = room.state.run(
                room._locks_body._try("k", who.encode(), slots, 60.0, waits=waits)
            )
            taken = reply[0] == TAKEN
            assert taken == model.ask(who, waits=waits)
            if taken:
                assert int(reply[1]) > fences[-1]
                fences.append(int(reply[1]))
        elif step == "die":
            outlive(client, room, who)
            model.leave(who)
        else:
            room.state.run(room._locks_body.free("k", who.encode()))
            model.leave(who)
        held = client.zcard(room.keys.slots(b"k")[0])
        assert held <= slots


def outlive(client: Any, room: Stillroom, who: str) -> None:
    """Let the lease, or the place in the queue, run out."""
    slots, _, waiters, _ = room.keys.slots(b"k")
    for key in (slots, waiters):
        client.zadd(key, {who: 1}, xx=True)
