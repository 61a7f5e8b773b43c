"""A story of sessions or limits goes alike on one server, on one that loses its scripts, on a cluster, and with
two rings of peppers. There is no model here: of two places that answer differently one is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from random import Random
from typing import Any

import pytest

import redis
from stillroom import Limit, NoDispatch, Settings, Stillroom, StillroomError
from stillroom.embedded import EmbeddedServer
from stillroom.scripts import BY_SHA
from tests.support.cluster import RedisCluster
from tests.support.crowd import PATIENT
from tests.support.limits import forget_denials

A, B = "a-pepper-that-is-long-enough-to-be-one", "another-pepper-that-is-long-enough"
STEPS, RUNS = 40, {True: 400, False: 14}  # in full, and in the gate
LONG = {"session_grace": 600.0}  # of a story's time only its order counts
LIMITS = (
    Limit("few", 4, 60),
    Limit("many", 30, 600),
    Limit("user", 4, 60, by="user"),
    Limit("both", 3, 60, by="ip&user"),
    Limit("shadow", 2, 60, by="user", shadow=True),
    Limit("places", 2, 60, in_flight=True),
)
Step = Callable[["Side"], Any]


class Side:
    """One place, with two processes that take turns as the story says."""

    def __init__(self, name: str, places: dict[str, Any], rings: Any = ([A], [A])) -> None:
        self.name = name
        known = [Settings(**PATIENT | LONG | places | {"session_peppers": one}) for one in rings]
        self._url = known[0].redis_url
        self.rooms = [Stillroom(one, dispatch=NoDispatch()) for one in known]
        self.told: list[tuple[str, str | None]] = []
        for room in self.rooms:
            room.sessions.on_event.append(self._tell)
        self.made: list[Any] = []  # sessions, or reservations; None for one that was refused

    def _tell(self, event: Any) -> None:
        if event.kind != "expired":  # each login clears some of its own shard away
            self.told.append((event.kind, event.user_id))

    def make(self, make: Callable[[], Any]) -> Any:
        self.made.append(None)
        self.made[-1] = make()
        return self.made[-1]

    def one(self, number: int) -> Any:
        made = self.made[number % len(self.made)] if self.made else None
        return "nothing" if made is None else made

    def lose_scripts(self, seed: int) -> None:
        chance = Random(seed)
        with redis.Redis.from_url(self._url) as client, client.pipeline(transaction=False) as pipe:
            pipe.script_flush()
            for script in BY_SHA.values():
                if chance.random() < 0.6:
                    pipe.script_load(script.source)
            pipe.execute()

    def close(self) -> None:
        for room in self.rooms:
            room.close()


def step_of_sessions(chance: Random) -> tuple[str, Step]:
    process, number, user = chance.randrange(2), chance.randrange(8), chance.choice(["ann", "bob"])
    tags = chance.choice([[], ["red"], ["red", "blue"]])
    cap: dict[str, Any] = chance.choice([{}, {}, {"max_per_user": 1}, {"max_per_user": 2}])
    cap = cap and cap | {"on_cap": chance.choice(["reject", "evict_oldest"])}
    options = {"tags": tags, "device": chance.choice([None, "phone", "laptop"])} | cap
    replaces, grace = chance.random() < 0.5, chance.choice([None, 0])

    def create(side: Side) -> Any:
        before = side.one(number) if replaces and side.made else None
        sessions = side.rooms[process].sessions
        return about(side.make(lambda: sessions.create(user, {"n": 0}, replaces=before, **options)))

    def visit(side: Side) -> Any:
        return about(side.make(lambda: side.rooms[process].sessions.create(None, {"n": 0})))

    def rotate(side: Side) -> Any:
        sessions = side.rooms[process].sessions
        return about(side.make(lambda: sessions.rotate(side.one(number), grace=grace)))

    def end(side: Side) -> Any:
        handle = getattr(side.one(number), "handle", "")
        return side.rooms[process].sessions.end(user, handle)

    def end_user(side: Side) -> Any:
        kept = side.one(number) if replaces else None
        return side.rooms[process].sessions.destroy_for_user(user, keep=kept) >= 0

    plain: dict[str, Step] = {
        "get": lambda side: about(side.rooms[process].sessions.get(side.one(number))),
        "touch": lambda side: side.rooms[process].sessions.touch(side.one(number)),
        "destroy": lambda side: side.rooms[process].sessions.destroy(side.one(number)),
        "mutate": lambda side: about(side.rooms[process].sessions.mutate(side.one(number), add)),
        "tag": lambda side: side.rooms[process].sessions.destroy_by_tag(*tags or ["red"]) >= 0,
        "count": lambda side: side.rooms[process].sessions.count(user),
    }
    acts = {"create": create, "visit": visit, "rotate": rotate, "end": end, "end user": end_user}
    acts |= plain
    name = chance.choices(list(acts), [8, 3, 4, 1, 1, 4, 1, 2, 4, 1, 3])[0]
    given = options if name == "create" else grace if name == "rotate" else ""
    return f"{process}: {name} {number} {user} {replaces} {given}", acts[name]


def about(session: Any) -> Any:
    return session and (session.user_id, session.data, session.version, sorted(session.tags))


def add(data: dict[str, Any]) -> None:
    data["n"] += 1


def step_of_limits(chance: Random) -> tuple[str, Step]:
    process, number, cost = chance.randrange(2), chance.randrange(8), chance.choice([1, 1, 2, 3])
    addresses = ["203.0.113.7", "2001:db8:1:2::5"]
    who = {"ip": chance.choice(addresses), "user": chance.choice(["ann", "bob"])}
    limits = chance.sample(LIMITS, chance.randint(1, 4))

    def reserve(side: Side) -> Any:
        limiter = side.rooms[process].limits
        return side.make(lambda: limiter.reserve(who, limits, cost) or None) is not None

    def ending(name: str, *given: int) -> Step:
        def act(side: Side) -> Any:
            held = side.one(number)
            return (
                None
                if held == "nothing"
                else getattr(side.rooms[process].limits, name)(held, *given)
            )

        return act

    acts: dict[str, Step] = {
        "check": lambda side: side.rooms[process].limits.check(who, limits, cost).allowed,
        "peek": lambda side: side.rooms[process].limits.peek(who, limits, cost).allowed,
        "reserve": reserve,
        "refund": ending("refund"),
        "commit": ending("commit"),
        "settle": ending("settle", chance.randint(0, 5)),
        "reset": lambda side: side.rooms[process].limits.reset(who, limits),
    }
    name = chance.choices(list(acts), [6, 2, 8, 4, 1, 3, 1])[0]
    return f"{process}: {name} {number} {who} {[one.name for one in limits]} {cost}", acts[name]


def outcome(side: Side, act: Step) -> Any:
    for room in side.rooms:
        forget_denials(room)
    try:
        return act(side)
    except StillroomError as error:
        return type(error).__name__, getattr(error, "reason", "")


@pytest.fixture
def sides(
    places: dict[str, Any], single_server: EmbeddedServer, cluster: RedisCluster
) -> Iterator[Callable[[], list[Side]]]:
    """Return what makes the places of one story. Each story has a namespace of its own."""
    numbers = count()
    alone = {"redis_url": single_server.url}
    with ExitStack() as stack, EmbeddedServer() as lossy:

        def make() -> list[Side]:
            stack.pop_all().close()
            space = {"namespace": f"story-{next(numbers)}"}
            sides = [
                Side("one server", alone | space),
                Side(
                    "two rings",
                    alone | {"namespace": f"{space['namespace']}-rings"},
                    ([A, B], [B, A]),
                ),
                Side("lost scripts", {"redis_url": lossy.url} | space),
                Side("a cluster", places | space),
            ]
            for side in sides:
                stack.callback(side.close)
            return sides

        yield make


@pytest.mark.long
@pytest.mark.parametrize("step", [step_of_sessions, step_of_limits])
def test_a_story_goes_alike_everywhere(
    sides: Callable[[], list[Side]], step: Callable[[Random], tuple[str, Step]], is_full: bool
) -> None:
    """Each call answers the same and tells of the same events everywhere, whatever scripts a server has lost."""
    for seed in range(RUNS[is_full]):
        chance, story, everywhere = Random(seed), [], sides()
        for _ in range(STEPS):
            told, act = step(chance)
            story.append(told)
            everywhere[2].lose_scripts(chance.randrange(1_000_000))
            seen = {side.name: (outcome(side, act), side.told) for side in everywhere}
            first = seen["one server"]
            assert all(one == first for one in seen.values()), (seed, story, seen)
