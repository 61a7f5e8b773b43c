"""Measures what a session costs, beside redis-py reading the same record and beside other session stores.

It then measures the sweep (sessions a second, and its longest script as the server saw it) and a session's bytes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from statistics import median
from typing import Any

import redis.asyncio

from bench.chart import Bar, bars
from bench.harness import AsyncHit, Contestant, Hit, Results, Spread, compete, ready
from bench.raw import floors
from bench.report import Promise, Section, Table, contest_figures, contest_notes, contest_table
from bench.stage import NEVER, Effort, Stage, stage
from stillroom import AsyncStillroom, NoDispatch

DATA = {
    "user": "u1",
    "roles": ["admin", "shop"],
    "cart": [1, 2, 3],
    "theme": "dark",
    "csrf": "x" * 32,
}
# At most. `get` puts the record together by itself, so that the server need not: see docs/decisions/0095.
TIMES_HGETALL = {"get": 0.7, "update": 0.7, "touch": 0.5, "create": 1.2, "destroy": 0.65}
PEER_OVER_OURS = 1.5  # at least
SWEEP_RATE, SCRIPT_MS = 15_000, 5.0
SWEEPS = 3


def run(effort: Effort) -> Section:
    with stage() as here:
        results = compete(contestants(here), rounds=effort.rounds, hits=effort.hits)
        counts = effort.pick(smoke=50, quick=3_000, usual=10_000, full=10_000)
        swept, sweep_promises = sweep(here, counts)
        weight = weigh(here, counts)
    return Section(
        name="sessions",
        title="Sessions",
        tables=[contest_table(results, "sessions"), swept],
        promises=[*promises(results), *sweep_promises],
        notes=[*contest_notes(results), weight],
        charts={"sessions.svg": chart(results)},
        figures=contest_figures(results),
    )


def contestants(here: Stage) -> list[Contestant]:
    room, client = here.room, here.client
    session = room.sessions.create("u1", DATA, tags=["mobile"])
    token, key = session.token, client.keys("*:s:*")[0]
    made: list[Any] = []

    def create() -> None:
        made.append(room.sessions.create("u1", DATA))

    def stock(hits: int) -> None:
        """Make sessions to destroy, and keep no more than that."""
        while len(made) > hits:
            room.sessions.destroy(made.pop())
        while len(made) < hits:
            create()

    return [
        *floors(here.url),
        Contestant("HGETALL", "bare", ready(lambda: client.hgetall(key)), package="redis"),
        _ours("get", lambda: room.sessions.get(token)),
        _ours("update", lambda: room.sessions.update(token, {"theme": "light"})),
        _ours("touch", lambda: room.sessions.touch(token)),
        _ours("create", create),
        Contestant(
            "destroy", "ours", ready(lambda: room.sessions.destroy(made.pop())), stock=stock
        ),
        Contestant("Flask-Session", "peer", partial(flask_session, here), package="flask-session"),
        Contestant(
            "Django cache sessions", "peer", partial(django_sessions, here), package="django"
        ),
        Contestant(
            "async HGETALL", "bare", partial(async_hgetall, here, key), "async", package="redis"
        ),
        Contestant("async get", "ours", partial(async_get, here, token), "async"),
        Contestant(
            "starsessions", "peer", partial(starsessions, here), "async", package="starsessions"
        ),
    ]


def _ours(name: str, hit: Hit) -> Contestant:
    return Contestant(name, "ours", ready(hit))


@contextmanager
def flask_session(here: Stage) -> Iterator[Hit]:
    from flask import Flask
    from flask_session.redis import RedisSessionInterface

    store: Any = RedisSessionInterface(Flask("bench"), client=here.client)
    store.client.set("session:bench", store.serializer.encode(DATA), ex=86_400)
    assert store._retrieve_session_data("session:bench") == DATA
    yield lambda: store._retrieve_session_data("session:bench")


@contextmanager
def django_sessions(here: Stage) -> Iterator[Hit]:
    from django.conf import settings

    backend = "django.core.cache.backends.redis.RedisCache"
    caches = {"default": {"BACKEND": backend, "LOCATION": here.url}}
    settings.configure(CACHES=caches, SECRET_KEY="x")
    from django.contrib.sessions.backends.cache import SessionStore

    store: Any = SessionStore()
    store.update(DATA)
    store.create()
    assert SessionStore(store.session_key).load() == DATA
    yield lambda: SessionStore(store.session_key).load()


@asynccontextmanager
async def async_hgetall(here: Stage, key: bytes) -> AsyncIterator[AsyncHit]:
    async with redis.asyncio.Redis.from_url(here.url) as client:
        yield lambda: client.hgetall(key)


@asynccontextmanager
async def async_get(here: Stage, token: str) -> AsyncIterator[AsyncHit]:
    async with AsyncStillroom(here.settings, dispatch=NoDispatch()) as room:
        room.stats.due = NEVER
        yield lambda: room.sessions.get(token)


@asynccontextmanager
async def starsessions(here: Stage) -> AsyncIterator[AsyncHit]:
    from starsessions import JsonSerializer
    from starsessions.stores.redis import RedisStore

    serializer = JsonSerializer()
    async with redis.asyncio.Redis.from_url(here.url) as client:
        store = RedisStore(connection=client)

        async def read() -> Any:
            return serializer.deserialize(await store.read("bench", 86_400))

        await store.write("bench", serializer.serialize(DATA), 86_400, 86_400)
        assert await read() == DATA
        yield read


def promises(results: Results) -> Iterator[Promise]:
    """Yield the promises, the blocking ones in steps, which do not move with the machine. See bench/README.md."""
    for name, most in TIMES_HGETALL.items():
        claim = f"sessions.{name} takes, × HGETALL by redis-py"
        yield Promise(claim, results.steps_ratio(name, "HGETALL"), most, by="steps")
    if "Flask-Session" in results.by_name:
        figure = results.steps_ratio("Flask-Session", "get")
        yield Promise(
            "Flask-Session takes, × ours", figure, PEER_OVER_OURS, at_most=False, by="steps"
        )
    if "starsessions" in results.by_name:
        spread = results.ratio("starsessions", "async get")
        yield Promise("starsessions adds, × ours", spread, PEER_OVER_OURS, at_most=False)


def chart(results: Results) -> str:
    shown = ["HGETALL", "get", "Flask-Session", "Django cache sessions"]
    shown += ["async HGETALL", "async get", "starsessions"]
    rows = [
        Bar(name, Spread.of(results.added(name)).p50, "ours" if name.endswith("get") else "")
        for name in shown
        if name in results.by_name
    ]
    return bars("CPU that reading a session adds to the raw round trip, µs", rows)


# --- the sweep, and the weight --------------------------------------------------------------------


def sweep(here: Stage, count: int) -> tuple[Table, list[Promise]]:
    """Measure the best of three sweeps.

    A server that was pushed aside looks slow once; a script that is long is so each time.
    """
    runs = [sweep_once(here, count) for _ in range(SWEEPS)]
    rate, longest = max(rate for rate, _ in runs), min(max(scripts) for _, scripts in runs)
    usual = median(one for _, scripts in runs for one in scripts)
    table = Table(["the sweep of sessions that ended", "a second", "script ms", "longest ms"])
    table.add(f"{count:,}", f"{rate:,.0f}", f"{usual:.2f}", f"{longest:.2f}")
    return table, [
        Promise("sessions swept a second", rate, SWEEP_RATE, at_most=False, by="wall time"),
        Promise("longest script of the sweep, ms", longest, SCRIPT_MS, by="the server's slow log"),
    ]


def sweep_once(here: Stage, count: int) -> tuple[float, list[float]]:
    """Return the sessions a second, and the ms of each script that took more than half a millisecond."""
    client, room = here.client, here.room
    client.flushall()
    create_many(here, count)
    pipe = client.pipeline(transaction=False)
    for key in client.keys("*:s:*"):
        pipe.hset(key, "_l", 1)
    for shard in range(room.settings.session_shards):
        due = room.keys.due_sessions(shard)
        if members := client.zrange(due, 0, -1):
            pipe.zadd(due, dict.fromkeys(members, 1))
    pipe.execute()
    client.config_set("slowlog-log-slower-than", 500)
    client.config_set("slowlog-max-len", 1_000)
    client.slowlog_reset()
    began = time.perf_counter()
    done = room.sessions.sweep()
    rate = done["expired"] / (time.perf_counter() - began)
    log = client.slowlog_get(1_000)
    client.config_set("slowlog-log-slower-than", -1)
    scripts = [one["duration"] / 1_000 for one in log if one["command"].startswith(b"EVALSHA")]
    assert done["expired"] == count
    return rate, scripts or [0.5]


def weigh(here: Stage, count: int) -> str:
    client = here.client
    client.flushall()
    before = client.info("memory")["used_memory"]
    create_many(here, count)
    size = (client.info("memory")["used_memory"] - before) / count
    client.set("session:" + "x" * 43, repr(DATA), ex=86_400)
    plain = client.memory_usage("session:" + "x" * 43)
    what = f"a session of {len(DATA)} keys, a tag and all indexes"
    return f"{what}: {size:,.0f} bytes; a plain SETEX of it: {plain:,.0f}"


def create_many(here: Stage, count: int) -> None:
    for n in range(count):
        here.room.sessions.create(f"user:{n % (count // 2)}", DATA, tags=["mobile"])
