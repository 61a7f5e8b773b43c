"""Requests that are held, settled and given back in any order, against a list of what each of them cost in the end.

Limits of every kind in one script: what is in flight, in shadow, settled afterwards. Time is moved by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom import Limit, NoDispatch, Reservation, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.crowd import PATIENT
from tests.support.limits import age_us, forget_denials

IP = "203.0.113.7"
S = 1_000_000
WINDOW = 60 * S
COUNTED = Limit("counted", 10, 60)
PLACE = Limit("place", 4, 60, in_flight=True)
SHADOW = Limit("shadow", 6, 60, shadow=True)
LIMITS = [COUNTED, PLACE, SHADOW]
SOONER_OR_LATER = 1.1  # hits of a 24th of a window may count as the last of them
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 5), st.integers(1, 7)),
        st.tuples(st.sampled_from(["refund", "commit"]), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("settle"), st.integers(0, 20), st.integers(0, 8)),
        st.tuples(st.just("over"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("move"), st.integers(0, 70), st.just(0)),
    ),
    min_size=5,
    max_size=40,
)


@pytest.fixture
def one_room(shared_server: EmbeddedServer) -> Iterator[Stillroom]:
    room_settings = Settings(**{**PATIENT, "redis_url": shared_server.url})
    with Stillroom(room_settings, dispatch=NoDispatch()) as room:
        yield room


@dataclass
class Held:
    """A reservation, its request, and its true-time cost in each limit."""

    made: Reservation
    at: int
    costs: dict[Limit, list[tuple[int, int]]]
    is_open: bool = True


@dataclass
class Story:
    """The story of all reservations and what became of them."""

    room: Stillroom
    client: Any
    now: int = 0
    moved: int = 0
    held: list[Held] = field(default_factory=list)

    def used(self, limit: Limit, window: float) -> int:
        hits = [hit for one in self.held for hit in one.costs.get(limit, [])]
        return sum(n for at, n in hits if at > self.now - window)

    def reserve(self, cost: int, which: int) -> None:
        asked = [limit for n, limit in enumerate(LIMITS) if which >> n & 1]
        forget_denials(self.room)
        made = self.room.limits.reserve(IP, asked, cost)
        self.now = made.decision.now_us + self.moved
        for limit in asked:
            fits = limit not in (*made.decision.violated, *made.decision.would_deny)
            if made and (fits or not limit.shadow):
                assert self.used(limit, WINDOW) + cost <= limit.quota
            if not fits:
                assert self.used(limit, WINDOW * SOONER_OR_LATER) + cost > limit.quota
        assert bool(made) == (not made.decision.violated)
        if made:
            took = [one for one in asked if one not in made.decision.would_deny]
            costs = {limit: [(self.now, cost)] for limit in took}
            self.held.append(Held(made, self.now, costs))

    def end(self, act: str, which: int, cost: int) -> None:
        if not self.held:
            return
        one = self.held[which % len(self.held)]
        made = replace(one.made, at_us=one.at - self.moved)
        before = made.decision.cost
        if act == "over":  # of a request: its places are free, and no more
            act, made, cost = "refund", made.of([PLACE]), 0
        if act == "settle":
            done = self.room.limits.settle(made, cost)
        else:
            done = getattr(self.room.limits, act)(made)
            cost = before if act == "commit" else 0
        if not one.costs or not made.counted:
            return  # nothing was consumed
        if not one.is_open:
            assert not done
        elif self.now - one.at < 0.8 * WINDOW:
            assert done
        if done:
            one.is_open = False
            for limit in [each for each in made.counted if each in one.costs]:
                hits = [(self.now, cost - before)] if cost > before else []
                one.costs[limit] = [(one.at, min(cost, before)), *hits]

    def move(self, seconds: int, _: int) -> None:
        self.moved += seconds * S
        self.now += seconds * S
        age_us(self.client, seconds * S)


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_limits_of_every_kind_admit_what_fits_and_nothing_else(
    one_room: Stillroom, client: Any, steps: Any
) -> None:
    """Limits of every kind admit exactly what fits, whatever was refunded, settled or ended in between."""
    one_room.limits.reset(IP, LIMITS)
    story = Story(one_room, client)
    for act, number, more in steps:
        if act in ("reserve", "move"):
            getattr(story, act)(number, more)
        else:
            story.end(act, number, more)
