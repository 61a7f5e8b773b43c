"""Sessions by their number and by those of one user; limits by the number of clients."""

from __future__ import annotations

import random
import time
from itertools import count
from statistics import median

from bench.growth.curve import Curve, ratio, used_memory
from bench.report import Section
from bench.sessions import DATA
from bench.stage import Effort, stage
from stillroom import Limit

LIMITS = [Limit("minute", 100_000, 60), Limit("hour", 1_000_000, 3_600)]


def sessions(effort: Effort, section: Section) -> None:
    sizes = effort.pick(
        smoke=[10, 30],
        quick=[100, 1_000, 10_000],
        usual=[100, 1_000, 10_000, 50_000],
        full=[100, 1_000, 10_000, 100_000, 500_000],
    )
    curve = Curve(
        "sessions",
        "Reading a session by number of sessions, × HGETALL",
        "sessions",
        {"get × HGETALL": "{:.2f}", "bytes each": "{:,.0f}"},
    )
    with stage() as here:
        room, client = here.room, here.client
        client.hset("plain", mapping={name: str(value) for name, value in DATA.items()})
        tokens = [room.sessions.create("first", DATA, tags=["mobile"]).token]
        for size in sizes:
            before, fewer = used_memory(client), len(tokens)
            while len(tokens) < size:
                made = room.sessions.create(f"user:{len(tokens) // 2}", DATA, tags=["mobile"])
                tokens.append(made.token)
            each = (used_memory(client) - before) / (size - fewer)
            times = ratio(
                lambda: room.sessions.get(random.choice(tokens)),
                lambda: client.hgetall("plain"),
                effort.rounds,
                effort.hits,
            )
            curve.add(size, times=times, bytes_each=each)
    curve.give(section, ["get × HGETALL"])


def sessions_of_a_user(effort: Effort, section: Section) -> None:
    """Measure a list by the number of the user's sessions, which are all in one shard."""
    sizes = effort.pick(
        smoke=[1, 3], quick=[1, 10, 100], usual=[1, 10, 100, 1_000], full=[1, 10, 100, 1_000]
    )
    curve = Curve(
        "devices",
        "list_for_user by sessions of the user: longest script, µs",
        "sessions of a user",
        {"longest script µs": "{:,.0f}", "list ms": "{:.1f}"},
    )
    with stage() as here:
        room, client, made = here.room, here.client, 0
        for size in sizes:
            for _ in range(made, size):
                room.sessions.create("u1", DATA, tags=["mobile"])
            made = size
            client.config_set("slowlog-log-slower-than", 0)
            longest, took = [], []
            for _ in range(effort.pick(smoke=2, quick=10, usual=20, full=40)):
                client.slowlog_reset()
                began = time.perf_counter()
                assert len(room.sessions.list_for_user("u1")) == size
                took.append(1_000 * (time.perf_counter() - began))
                longest.append(max(one["duration"] for one in client.slowlog_get(100)))
            client.config_set("slowlog-log-slower-than", -1)
            curve.add(size, us=median(longest), ms=median(took))
    curve.give(section, ["longest script µs"])


def clients(effort: Effort, section: Section) -> None:
    """Measure a check of a client that was seen before, and of one that is new."""
    sizes = effort.pick(
        smoke=[10, 30],
        quick=[100, 1_000, 10_000],
        usual=[100, 1_000, 10_000, 50_000],
        full=[100, 1_000, 10_000, 100_000, 300_000],
    )
    curve = Curve(
        "clients",
        "Two limits by number of clients, × INCR",
        "clients",
        {"a known one × INCR": "{:.2f}", "a new one × INCR": "{:.2f}", "bytes each": "{:,.0f}"},
    )
    with stage() as here:
        room, client = here.room, here.client
        fresh = count()
        room.limits.check("203.0.113.7", LIMITS)

        def new() -> object:
            return room.limits.check(_address(next(fresh)), LIMITS)

        for size in sizes:
            before, fewer = used_memory(client), next(fresh)
            for _ in range(fewer, size):
                new()
            seen = max(size, fewer)
            each = (used_memory(client) - before) / max(1, size - fewer)

            def known(seen: int = seen) -> object:
                return room.limits.check(_address(random.randrange(seen)), LIMITS)

            def incr() -> object:
                return client.incr("plain")

            old = ratio(known, incr, effort.rounds, effort.hits)
            another = ratio(new, incr, max(2, effort.rounds // 4), effort.hits)
            curve.add(size, known=old, new=another, bytes_each=each)
    curve.give(section, ["a known one × INCR", "a new one × INCR"])


def _address(n: int) -> str:
    return f"100.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"
