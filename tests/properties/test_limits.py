"""Random and edge-seeking traffic against a list of all that was admitted: never more than the quota in any window.

Time is moved by hand; a hit's true time is the server's clock plus all that it was moved on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom import Limit, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.limits.local import LocalLimits
from tests.support.crowd import PATIENT
from tests.support.limits import forget_denials, read_log, write_log

IP = "203.0.113.7"
S = 1_000_000
QUOTAS = st.one_of(st.integers(1, 30), st.integers(1, 1_000))
MOVES = st.one_of(
    st.sampled_from(["edge", "before the edge", "as told", "slice", "nudge", "nudge", "nothing"]),
    st.floats(0, 1.2),
)
STEPS = st.lists(st.tuples(MOVES, st.integers(0, 8), st.booleans()), min_size=5, max_size=50)


@pytest.fixture
def one_room(shared_server: EmbeddedServer) -> Iterator[Stillroom]:
    room_settings = Settings(**{**PATIENT, "redis_url": shared_server.url})
    with Stillroom(room_settings, dispatch=NoDispatch()) as room:
        yield room


class Traffic:
    """One client and its admitted hits, in true time."""

    def __init__(self, room: Stillroom, client: Any, limit: Limit) -> None:
        self.room, self.client, self.limit = room, client, limit
        self.moved = 0
        self.admitted: list[tuple[int, int]] = []
        self.last: Any = None
        self.key = room.keys.limits("ip", IP) + limit.name.encode()
        room.limits.reset(IP, [limit])

    def move(self, how: Any) -> None:
        us = self._us(how)
        self.moved += us
        log = read_log(self.client, self.key)
        if us and log:
            write_log(self.client, self.key, [(at - us, n) for at, n in log])

    def _us(self, how: Any) -> int:
        if isinstance(how, float):
            return round(how * self.limit.window * S)
        (standing,) = self.last.standings if self.last else (None,)
        if standing is None or how == "nothing":
            return 0
        return {
            "edge": round(standing.reset * S),
            "before the edge": max(0, round(standing.reset * S) - 1_000),
            "as told": round((standing.retry_after or 0) * S),
            "slice": self.limit.window * S // 24,
            "nudge": self.limit.window * S // 100,
        }[how]

    def hit(self, cost: int) -> None:
        forget_denials(self.room)
        self.last = self.room.limits.check(IP, [self.limit], cost)
        if self.last:
            at = self.last.now_us + self.moved
            self.admitted.append((at, cost))
            recent = sum(n for then, n in self.admitted if then > at - self.limit.window * S)
            assert recent <= self.limit.quota


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(quota=QUOTAS, window=st.sampled_from([1, 60, 3_600]), steps=STEPS, share=st.integers(1, 60))
def test_never_more_than_the_quota_in_any_window(
    one_room: Stillroom, client: Any, quota: int, window: int, steps: Any, share: int
) -> None:
    """Admitted hits are never above the quota in any window, with costs, bursts at edges and changed limits."""
    traffic = Traffic(one_room, client, Limit("x", quota, window))
    for how, cost, changes in steps:
        traffic.move(how)
        if changes:  # an operator turns the quota up and down, and the window down
            limit = traffic.limit
            other = quota if limit.quota != quota else max(1, quota * cost // 4)
            traffic.limit = replace(
                limit, quota=min(other, 1_000), window=max(1, limit.window - cost)
            )
        for _ in range(3):
            traffic.hit(cost)
        traffic.hit(max(1, quota // share))


def test_the_stand_in_decides_as_the_script_does(
    one_room: Stillroom, server: EmbeddedServer
) -> None:
    """The Python stand-in decides as the Lua script does, over more than a window of dense traffic."""
    random = Random(7)
    limits = [Limit("few", 20, 1), Limit("many", 300, 1)]
    keys = [one_room.keys.limits("ip", IP) + limit.name.encode() for limit in limits]
    stand_in = LocalLimits(1, 100, 100)
    began = now = 0
    outcomes = set()
    while now - began < 1.5 * S:
        forget_denials(one_room)
        asked = random.choice([limits[:1], limits[1:], limits])
        cost = random.choice([1, 1, 1, 2, 5])
        decision = one_room.limits.check(IP, asked, cost)
        now = decision.now_us
        began = began or now
        logs = [keys[limits.index(limit)] for limit in asked]
        status, said = stand_in.decide(logs, asked, cost, now, take=True)
        assert (status, list(said)) == (decision.status, list(decision.said))
        outcomes.add((len(asked), status))
    assert len(outcomes) == 4
