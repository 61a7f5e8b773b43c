"""What does a session cost, beside redis-py reading the same record and beside other session stores?

    python tests/bench/sessions.py

CPU time of the calling thread, in rounds that take turns, medians; the promises at the end are ratios of one round.
Then the sweep: sessions a second, and its longest script as the server saw it; and the bytes of a session.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import redis.asyncio
from harness import Table, apart_from, quiet_gc

import redis
from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer

ROUNDS, CALLS, WARM_UP = 60, 40, 3
SWEPT, SWEEPS = 10_000, 3  # sessions, and how often
WEIGHED = 10_000
DATA = {
    "user": "u1",
    "roles": ["admin", "shop"],
    "cart": [1, 2, 3],
    "theme": "dark",
    "csrf": "x" * 32,
}
TIMES_HGETALL = {"get": 0.8, "create": 1.2, "update": 1.2, "touch": 1.2, "destroy": 1.2}  # at most
PEER_OVER_OURS = 1.5  # at least
SWEEP_RATE, SCRIPT_MS = 15_000, 5.0

Hit = Callable[[], object]


def main() -> None:
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        apart_from(server.pid)
        settings = Settings(
            redis_url=server.url, session_peppers="p" * 32, command_timeout=5, call_timeout=30
        )
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            room.stats.due = 1 << 62  # what rides along every 5 s is not what is measured
            with asyncio.Runner() as runner:
                reads, peers = contestants(room, client, server.url, settings, runner)
                with quiet_gc():
                    samples = measure(reads, room)
            report(samples, peers)
            sweep(room, client)
            weigh(room, client)


def contestants(
    room: Stillroom, client: Any, url: str, settings: Settings, runner: asyncio.Runner
) -> tuple[dict[str, Hit], dict[str, list[str]]]:
    """Name → one read; and whose peers they are."""
    session = room.sessions.create("u1", DATA, tags=["mobile"])
    token, key = session.token, client.keys("*:s:*")[0]
    reads: dict[str, Hit] = {
        "redis-py hgetall": lambda: client.hgetall(key),
        "get": lambda: room.sessions.get(token),
        "update": lambda: room.sessions.update(token, {"theme": "light"}),
        "touch": lambda: room.sessions.touch(token),
    }
    peers: dict[str, list[str]] = {"get": [], "get, async": []}
    for name, make in {
        "Flask-Session": flask_session,
        "Django cache sessions": django_sessions,
    }.items():
        with entering(name):
            reads[name] = make(client, url)
            peers["get"].append(name)
    async_room = AsyncStillroom(settings, dispatch=NoDispatch())
    async_room.stats.due = 1 << 62
    reads["get, async"] = lambda: runner.run(many(lambda: async_room.sessions.get(token)))
    with entering("starsessions"):
        reads["starsessions, async"] = starsessions(url, runner)
        peers["get, async"].append("starsessions, async")
    return reads, peers


@contextmanager
def entering(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        print(f"{name} is skipped: {error}")


async def many(read: Callable[[], Any]) -> None:
    """As many as the sync ones make in a round: starting the loop is nobody's cost."""
    for _ in range(CALLS):
        await read()


def flask_session(client: Any, url: str) -> Hit:
    from flask import Flask
    from flask_session.redis import RedisSessionInterface

    store = RedisSessionInterface(Flask("bench"), client=client)
    store.client.set("session:bench", store.serializer.encode(DATA), ex=86_400)
    assert store._retrieve_session_data("session:bench") == DATA
    return lambda: store._retrieve_session_data("session:bench")


def django_sessions(client: Any, url: str) -> Hit:
    from django.conf import settings

    backend = "django.core.cache.backends.redis.RedisCache"
    settings.configure(CACHES={"default": {"BACKEND": backend, "LOCATION": url}}, SECRET_KEY="x")
    from django.contrib.sessions.backends.cache import SessionStore

    store = SessionStore()
    store.update(DATA)
    store.create()
    assert SessionStore(store.session_key).load() == DATA
    return lambda: SessionStore(store.session_key).load()


def starsessions(url: str, runner: asyncio.Runner) -> Hit:
    from starsessions import JsonSerializer
    from starsessions.stores.redis import RedisStore

    store, serializer = RedisStore(connection=redis.asyncio.Redis.from_url(url)), JsonSerializer()

    async def read() -> Any:
        return serializer.deserialize(await store.read("bench", 86_400))

    runner.run(store.write("bench", serializer.serialize(DATA), 86_400, 86_400))
    assert runner.run(read()) == DATA
    return lambda: runner.run(many(read))


def measure(reads: dict[str, Hit], room: Stillroom) -> dict[str, list[float]]:
    """CPU µs of one call, round by round."""
    samples: dict[str, list[float]] = {name: [] for name in [*reads, "create", "destroy"]}
    names = list(reads)
    for number in range(WARM_UP + ROUNDS):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            calls = 1 if name.endswith("async") else CALLS
            samples[name].append(timed(reads[name], calls) * calls / CALLS)
        made: list[Any] = []
        samples["create"].append(
            timed(lambda made=made: made.append(room.sessions.create("u1", DATA)), CALLS)
        )
        samples["destroy"].append(timed(lambda made=made: room.sessions.destroy(made.pop()), CALLS))
    return {name: values[WARM_UP:] for name, values in samples.items()}


def timed(act: Hit, calls: int) -> float:
    start = time.thread_time_ns()
    for _ in range(calls):
        act()
    return (time.thread_time_ns() - start) / 1_000 / calls


def report(samples: dict[str, list[float]], peers: dict[str, list[str]]) -> None:
    table = Table("operation", "CPU µs", "× hgetall")
    for name, values in samples.items():
        table.add(
            name, f"{median(values):.1f}", f"{ratio(values, samples['redis-py hgetall']):.2f}"
        )
    print(table)
    for name, most in TIMES_HGETALL.items():
        figure = ratio(samples[name], samples["redis-py hgetall"])
        say(figure <= most, f"{name} ≤ {most} × hgetall: {figure:.2f}")
    for name, others in peers.items():
        if others:
            fastest = min(others, key=lambda other: median(samples[other]))
            figure = ratio(samples[fastest], samples[name])
            say(figure >= PEER_OVER_OURS, f"{fastest} ≥ {PEER_OVER_OURS} × {name}: {figure:.2f}")


def ratio(one: list[float], other: list[float]) -> float:
    return median(a / b for a, b in zip(one, other, strict=True))


def sweep(room: Stillroom, client: Any) -> None:
    """The best of three: a server that was pushed aside looks slow once, a script that is long is so each time."""
    runs = [sweep_once(room, client) for _ in range(SWEEPS)]
    rate, longest = max(rate for rate, _ in runs), min(max(scripts) for _, scripts in runs)
    say(rate >= SWEEP_RATE, f"sweep ≥ {SWEEP_RATE:,} sessions/s: {rate:,.0f}")
    usual = median(one for _, scripts in runs for one in scripts)
    say(
        longest <= SCRIPT_MS,
        f"no script of it over {SCRIPT_MS} ms: {longest:.2f}, median {usual:.2f}",
    )


def sweep_once(room: Stillroom, client: Any) -> tuple[float, list[float]]:
    """Sessions a second, and how long each script took that took more than half a millisecond, ms."""
    client.flushall()
    create_many(room, SWEPT)
    pipe = client.pipeline(transaction=False)
    for key in client.keys("*:s:*"):
        pipe.hset(key, "_l", 1)
    for shard in range(room.settings.session_shards):
        due = room.keys.due_sessions(shard)
        pipe.zadd(due, dict.fromkeys(client.zrange(due, 0, -1), 1))
    pipe.execute()
    client.config_set("slowlog-log-slower-than", 500)
    client.config_set("slowlog-max-len", 1_000)
    client.slowlog_reset()
    began = time.perf_counter()
    done = room.sessions.sweep()
    rate = done["expired"] / (time.perf_counter() - began)
    scripts = [
        one["duration"] / 1_000
        for one in client.slowlog_get(1_000)
        if one["command"].startswith(b"EVALSHA")
    ]
    assert done["expired"] == SWEPT
    return rate, scripts or [0.5]


def weigh(room: Stillroom, client: Any) -> None:
    client.flushall()
    before = client.info("memory")["used_memory"]
    create_many(room, WEIGHED)
    size = (client.info("memory")["used_memory"] - before) / WEIGHED
    client.set("session:" + "x" * 43, repr(DATA), ex=86_400)
    plain = client.memory_usage("session:" + "x" * 43)
    print(
        f"a session of {len(DATA)} keys, a tag and all indexes: {size:,.0f} bytes; plain SETEX: {plain:,.0f}"
    )


def create_many(room: Stillroom, count: int) -> None:
    for n in range(count):
        room.sessions.create(f"user:{n % (count // 2)}", DATA, tags=["mobile"])


def say(kept: bool, claim: str) -> None:
    print(f"{'kept  ' if kept else 'BROKEN'}  {claim}")


if __name__ == "__main__":
    os.environ.pop("REDIS_URL", None)
    main()
