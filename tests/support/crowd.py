"""Run one process of a crowd, and let a test give it the word. The crowd talks through Redis lists.

Run in a process of its own, by tests/support/processes.py: `from tests.support.crowd import …`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis
from stillroom import AsyncStillroom, Limit, NoDispatch, Settings, Stillroom
from stillroom.dispatch import RefreshOrder

# Patience is not what these tests are about, and a hundred threads on two cores need some.
PATIENT: dict[str, Any] = {
    "jitter": 0.0,
    "connect_timeout": 10.0,
    "command_timeout": 10.0,
    "call_timeout": 30.0,
    "request_timeout": 30.0,
    "pool_timeout": 10.0,
    "health_timeout": 30.0,
    "pool_size": 256,
    "lease": 30.0,
    "wait": 30.0,
    "session_peppers": "a-pepper-for-tests-long-enough-to-be-one",
}
# The same patience for programs, and for rooms that read the environment.
PATIENCE = {
    f"STILLROOM_{name.upper()}": str(seconds)
    for name, seconds in PATIENT.items()
    if name.endswith("_timeout")
}
WITHIN = 30  # seconds


class Crowd:
    """The lists and counters through which the processes of one test meet."""

    def __init__(self, url: str) -> None:
        self._client: Any = redis.Redis.from_url(url, socket_timeout=None)

    def ready(self, word: str = "go") -> None:
        """Report that one more is ready, and wait for the start."""
        self._client.rpush(f"crowd:ready for {word}", os.getpid())
        self.wait_for(word)

    def await_ready(self, count: int, word: str = "go") -> None:
        for _ in range(count):
            self.wait_for(f"ready for {word}")

    def give(self, word: str, count: int = 1) -> None:
        self._client.rpush(f"crowd:{word}", *["now"] * count)

    def wait_for(self, word: str) -> None:
        assert self._client.blpop(f"crowd:{word}", WITHIN), f"nobody said {word!r}"

    def count(self, what: str) -> int:
        """Count one more; return how many there are now."""
        return int(self._client.incr(f"crowd:count of {what}"))

    def counted(self, what: str) -> int:
        return int(self._client.get(f"crowd:count of {what}") or 0)

    def now_ms(self) -> int:
        """Return the server's clock in ms."""
        seconds, us = self._client.time()
        return int(seconds) * 1_000 + int(us) // 1_000

    def begin(self, total: int) -> None:
        """Begin, and wait until all have begun; the last one starts the others."""
        if self.count("begun") == total:
            self.give("all have begun")

    def load(self) -> str:
        """Load, and return when all have begun."""
        number = self.count("loads")
        self.wait_for("all have begun")
        return f"load {number} by process {os.getpid()}"

    def close(self) -> None:
        self._client.close()


class ToRedis:
    """A dispatch that puts the orders in a Redis list, for the test to count and to take."""

    inline = False
    ready = True
    key = "crowd:orders"

    def __init__(self, url: str) -> None:
        self._client: Any = redis.Redis.from_url(url)

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        self._client.rpush(self.key, *[order.model_dump_json() for order in orders])

    def wake(self, task: str) -> None:
        """Do nothing, because the tests count only the orders in Redis."""

    def take(self) -> list[RefreshOrder]:
        raw = self._client.lpop(self.key, 1_000) or []
        return [RefreshOrder.model_validate_json(one) for one in raw]

    def close(self) -> None:
        self._client.close()


def patient_room(url: str, dispatch: Any = None, **changes: Any) -> Stillroom:
    settings = Settings(**{"redis_url": url} | PATIENT | changes)
    return Stillroom(settings, dispatch=dispatch or NoDispatch())


def tell(values: list[Any]) -> None:
    print("values", json.dumps(values), flush=True)


def miss_in_threads(url: str, count: int, total: int) -> None:
    """`count` threads miss the same key at the same time, with `total` in all processes."""
    crowd, room = Crowd(url), patient_room(url)

    def miss(_: int) -> Any:
        crowd.ready()
        crowd.begin(total)
        return room.cache.get_or_set("k", crowd.load)

    with ThreadPoolExecutor(count) as threads:
        tell(list(threads.map(miss, range(count))))


def miss_in_tasks(url: str, count: int, total: int) -> None:
    """Let `count` tasks of one event loop miss the same key at the same time."""
    crowd = Crowd(url)

    async def main() -> list[Any]:
        settings = Settings(**{"redis_url": url} | PATIENT)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            for _ in range(count):
                crowd.begin(total)
            return await asyncio.gather(
                *[room.cache.get_or_set("k", crowd.load) for _ in range(count)]
            )

    crowd.ready()
    tell(asyncio.run(main()))


def read_stale(url: str, count: int, rounds: int) -> None:
    """`count` threads read the same stale entry at the same time, in each round."""
    crowd, room = Crowd(url), patient_room(url, ToRedis(url))
    load = stale_loader(room, "from elsewhere")

    def read(number: int) -> list[str | None]:
        seen: list[str | None] = []
        for turn in range(rounds):
            crowd.ready(f"round {turn}")
            seen.append(load() if number % 2 else room.cache.get("k", str))
        return seen

    with ThreadPoolExecutor(count) as threads:
        tell(list(threads.map(read, range(count))))


def stale_loader(room: Stillroom, value: str) -> Callable[[], str]:
    @room.cache.cached("k", ttl=60, swr=600)
    def load() -> str:
        return value

    return load


def load_forever(url: str, lease: float) -> None:
    """Load forever, in a process that is killed in the middle."""
    crowd, room = Crowd(url), patient_room(url, lease=lease)

    def load() -> str:
        crowd.give("loading")
        crowd.wait_for("something that never comes")
        return "never"

    crowd.ready("load")
    room.cache.get_or_set("k", load)


def outlive(url: str, count: int) -> None:
    """`count` threads wait for the load of somebody who dies."""
    crowd, room = Crowd(url), patient_room(url)

    def load() -> str:
        return f"successor {crowd.count('loads')} at {crowd.now_ms()}"

    def wait(_: int) -> Any:
        crowd.ready()
        return room.cache.get_or_set("k", load)

    with ThreadPoolExecutor(count) as threads:
        tell(list(threads.map(wait, range(count))))


def hit_in_threads(url: str, count: int, hits: int, quota: int) -> None:
    """`count` threads of this process want `hits` each, of a quota that all processes share."""
    crowd, room = Crowd(url), patient_room(url)
    limit = Limit("crowd", quota, 3_600)

    def hit(_: int) -> int:
        crowd.ready()
        return sum(bool(room.limits.check("203.0.113.7", [limit])) for _ in range(hits))

    with ThreadPoolExecutor(count) as threads:
        print("admitted", sum(threads.map(hit, range(count))), flush=True)


def hit_by_two_kinds(
    url: str, places: dict[str, Any], count: int, hits: int, quotas: Sequence[int]
) -> None:
    """`count` threads want `hits` each, of quotas by address and by user that all processes share."""
    crowd = Crowd(url)
    room = Stillroom(Settings(**PATIENT | places), dispatch=NoDispatch())
    limits = [Limit("crowd", quotas[0], 3_600), Limit("by-user", quotas[1], 3_600, by="user")]

    def hit(_: int) -> int:
        crowd.ready()
        subject = {"ip": "203.0.113.7", "user": "ann"}
        return sum(_asks(room, subject, limits) for _ in range(hits))

    with ThreadPoolExecutor(count) as threads:
        print("admitted", sum(threads.map(hit, range(count))), flush=True)


def _asks(room: Stillroom, subject: dict[str, str | None], limits: list[Limit]) -> bool:
    room._limits_body._denials.reset()  # so that a denial is asked for again
    decision = room.limits.check(subject, limits)
    assert not decision.degraded, decision.degraded
    return bool(decision)
