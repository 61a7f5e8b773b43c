"""Measures what a rate limit costs, beside INCR by redis-py and beside other limiters, and how exact it is.

All limiters check the same two limits and return what headers need. It also measures the bytes per client, and
how much of the same traffic each algorithm admits.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import redis.asyncio

from bench.chart import Bar, bars
from bench.harness import AsyncHit, Contestant, Hit, Results, Spread, compete, ready
from bench.raw import floors
from bench.report import Promise, Section, Table, contest_figures, contest_notes, contest_table
from bench.stage import NEVER, Effort, Stage, stage
from stillroom import AsyncStillroom, Limit, NoDispatch, Settings, Stillroom
from stillroom.limits.local import LocalLimits

IP = "203.0.113.7"
QUOTAS = [(100_000, 60), (1_000_000, 3_600)]
LIMITS = [Limit("minute", *QUOTAS[0]), Limit("hour", *QUOTAS[1])]
NONE_LEFT = [Limit("minute", *QUOTAS[0]), Limit("closed", 1, 3_600)]
TIMES_INCR, TIMES_INCR_DENIED, PEERS = 0.91, 0.3, 3.0
BARE, CHECK, DENIED = "INCR", "check, two limits, headers", "denied from memory"
ASYNC_BARE, ASYNC_CHECK = "async INCR", "async check, two limits, headers"


def run(effort: Effort) -> Section:
    with stage() as here:
        results = compete(contestants(here), rounds=effort.rounds, hits=effort.hits)
        weight = weigh(here)
    admitted, promise = accuracy()
    return Section(
        name="limits",
        title="Rate limits",
        tables=[contest_table(results, "limits"), admitted],
        promises=[*promises(results), promise],
        notes=[*contest_notes(results), weight],
        charts={"limits.svg": chart(results)},
        figures=contest_figures(results),
    )


def contestants(here: Stage) -> list[Contestant]:
    room, client = here.room, here.client
    for _ in range(2):
        room.limits.check(IP, NONE_LEFT)
    return [
        *floors(here.url),
        Contestant(BARE, "bare", ready(lambda: client.incr("bare")), package="redis"),
        _ours(CHECK, lambda: room.limits.check(IP, LIMITS).headers()),
        _ours("check, no headers", lambda: room.limits.check(IP, LIMITS)),
        _ours("reserve and refund", lambda: room.limits.refund(room.limits.reserve(IP, LIMITS))),
        _ours(DENIED, lambda: room.limits.check(IP, NONE_LEFT)),
        Contestant("check while Redis is away", "ours", away),
        Contestant("limits, moving window", "peer", partial(moving_window, here), package="limits"),
        Contestant("throttled-py", "peer", partial(throttled, here), package="throttled-py"),
        Contestant(ASYNC_BARE, "bare", partial(async_incr, here), "async", package="redis"),
        Contestant(ASYNC_CHECK, "ours", partial(async_check, here), "async"),
    ]


def _ours(name: str, hit: Hit) -> Contestant:
    return Contestant(name, "ours", ready(hit))


@contextmanager
def away() -> Iterator[Hit]:
    with Stillroom(Settings(redis_url="redis://127.0.0.1:1"), dispatch=NoDispatch()) as room:
        while not room.wire.breaker.is_open:
            room.limits.check(IP, LIMITS)
        yield lambda: room.limits.check(IP, LIMITS)


@contextmanager
def moving_window(here: Stage) -> Iterator[Hit]:
    from limits import RateLimitItemPerSecond
    from limits.storage import RedisStorage
    from limits.strategies import MovingWindowRateLimiter

    limiter = MovingWindowRateLimiter(RedisStorage(here.url))
    items = [RateLimitItemPerSecond(quota, window) for quota, window in QUOTAS]

    def act() -> object:
        admitted = [limiter.hit(item, IP) for item in items]
        return admitted, [limiter.get_window_stats(item, IP) for item in items]

    yield act


@contextmanager
def throttled(here: Stage) -> Iterator[Hit]:
    from datetime import timedelta

    from throttled import RateLimiterType, RedisStore, Throttled, per_duration

    store = RedisStore(server=here.url)
    kind = RateLimiterType.SLIDING_WINDOW.value
    limiters = [
        Throttled(using=kind, quota=per_duration(timedelta(seconds=window), quota), store=store)
        for quota, window in QUOTAS
    ]
    yield lambda: [limiter.limit(f"{IP}:{n}") for n, limiter in enumerate(limiters)]


@asynccontextmanager
async def async_incr(here: Stage) -> AsyncIterator[AsyncHit]:
    async with redis.asyncio.Redis.from_url(here.url) as client:
        yield lambda: client.incr("bare")


@asynccontextmanager
async def async_check(here: Stage) -> AsyncIterator[AsyncHit]:
    async with AsyncStillroom(here.settings, dispatch=NoDispatch()) as room:
        room.stats.due = NEVER

        async def check() -> object:
            return (await room.limits.check(IP, LIMITS)).headers()

        yield check


def promises(results: Results) -> Iterator[Promise]:
    """Yield the promises, in steps, which do not move with the machine. See bench/README.md."""
    claim, figure = f"{CHECK}: takes, × INCR by redis-py", results.steps_ratio(CHECK, BARE)
    yield Promise(claim, figure, TIMES_INCR, by="steps")
    denied = results.steps[DENIED] / results.steps[BARE]
    yield Promise(f"{DENIED}: takes, × INCR by redis-py", denied, TIMES_INCR_DENIED, by="steps")
    for peer in results.find("sync", "peer"):
        figure = results.steps_ratio(peer.name, CHECK)
        yield Promise(f"{peer.name} takes, × ours", figure, PEERS, at_most=False, by="steps")


def chart(results: Results) -> str:
    shown = [BARE, CHECK, "limits, moving window", "throttled-py", ASYNC_BARE, ASYNC_CHECK]
    rows = [
        Bar(name, Spread.of(results.added(name)).p50, "ours" if "check" in name else "")
        for name in shown
        if name in results.by_name
    ]
    return bars("CPU that two limits with headers add to the raw round trip, µs", rows)


def weigh(here: Stage) -> str:
    """Return a note on the bytes of a client that has used all of 100 a minute, evenly.

    Beside them those of a counter and of a list of all hits.
    """
    client, room = here.client, here.room
    client.flushall()
    minute, key = Limit("minute", 100, 60), room.keys.limits("ip", IP) + b"minute"
    for _ in range(25):
        room.limits.check(IP, [minute], cost=4)
        raw, step = client.get(key), 60_000_000 // 24
        moved = [
            (int.from_bytes(raw[n : n + 7], "big") - step).to_bytes(7, "big") + raw[n + 7 : n + 11]
            for n in range(0, len(raw), 11)
        ]
        client.set(key, b"".join(moved), keepttl=True)
    client.incr("counter of such a name of a client")
    client.rpush("list of such a name of a client", *[1.7e9 + n / 7 for n in range(100)])
    names = (key, "counter of such a name of a client", "list of such a name of a client")
    ours, counter, all_hits = map(client.memory_usage, names)
    return (
        f"bytes per client at 100/min: {ours}; a counter {counter}, a list of all hits {all_hits}"
    )


# --- accuracy: the same traffic through each algorithm, in simulated time (whole µs) ---------------

QUOTA, WINDOW = 100, 60_000_000
Admit = Callable[[int], bool]


def exact_log() -> Admit:
    hits: deque[int] = deque()

    def admit(now: int) -> bool:
        while hits and hits[0] <= now - WINDOW:
            hits.popleft()
        if len(hits) < QUOTA:
            hits.append(now)
            return True
        return False

    return admit


def coalesced_log() -> Admit:
    """Return ours: the stand-in, which tests compare with the script number by number."""
    limits, limit = LocalLimits(1, 10, 10), Limit("x", QUOTA, WINDOW // 1_000_000)
    return lambda now: limits.decide([b"x"], [limit], 1, now, take=True)[0] == 200


def fixed_window() -> Admit:
    counts: dict[int, int] = {}

    def admit(now: int) -> bool:
        window = now // WINDOW
        counts[window] = counts.get(window, 0) + 1
        return counts[window] <= QUOTA

    return admit


def two_counters() -> Admit:
    counts: dict[int, int] = {}

    def admit(now: int) -> bool:
        window, passed = now // WINDOW, now % WINDOW / WINDOW
        if counts.get(window - 1, 0) * (1 - passed) + counts.get(window, 0) >= QUOTA:
            return False
        counts[window] = counts.get(window, 0) + 1
        return True

    return admit


def gcra() -> Admit:
    arrival = 0

    def admit(now: int) -> bool:
        nonlocal arrival
        theirs = max(arrival, now) + WINDOW // QUOTA
        if theirs - now > WINDOW:
            return False
        arrival = theirs
        return True

    return admit


def traffic(seed: int) -> dict[str, list[int]]:
    """Return the times of requests over twenty minutes, in µs, by the kind of traffic."""
    chance, second, end = random.Random(seed), 1_000_000, 20 * WINDOW

    def poisson(share: float) -> Iterator[int]:
        now = 0
        while now < end:
            now += round(chance.expovariate(share * QUOTA / WINDOW))
            yield now

    def bursts() -> Iterator[int]:
        for minute in range(0, 20, 2):
            begins = minute * WINDOW + round(chance.random() * 90 * second)
            yield from (begins + n * second // 100 for n in range(150))

    return {
        "hammering": list(range(0, end, second // 20)),
        "0.9 × the quota": list(poisson(0.9)),
        "1.2 × the quota": list(poisson(1.2)),
        "bursts": sorted(bursts()),
        "around the edges": [
            n * WINDOW - second + k * second // 100 for n in range(1, 20, 2) for k in range(200)
        ],
    }


def accuracy() -> tuple[Table, Promise]:
    """Return a table and a promise: what each algorithm admits in its worst minute, as a share of an exact log."""
    algorithms = {
        "exact log": exact_log,
        "ours": coalesced_log,
        "fixed window": fixed_window,
        "two counters": two_counters,
        "GCRA": gcra,
    }
    table = Table(["worst 60 s at 100/min, share of the exact log", *algorithms])
    worst_of_ours = 0
    for name, times in traffic(7).items():
        admitted = {a: list(filter(make(), times)) for a, make in algorithms.items()}
        exact = len(admitted["exact log"])
        worst_of_ours = max(worst_of_ours, worst_window(admitted["ours"]))
        cells = [f"{worst_window(hits)} ({len(hits) / exact:.0%})" for hits in admitted.values()]
        table.add(name, *cells)
    promise = Promise("admitted in any window at 100/min", worst_of_ours, QUOTA, by="count")
    return table, promise


def worst_window(hits: list[int]) -> int:
    """Return the most hits in any half-open window."""
    worst, first = 0, 0
    for last, now in enumerate(hits):
        while hits[first] <= now - WINDOW:
            first += 1
        worst = max(worst, last - first + 1)
    return worst
