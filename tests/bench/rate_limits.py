"""What does a rate limit cost, beside INCR by redis-py and beside other limiters? And how exact is it?

    python tests/bench/rate_limits.py

CPU time of the calling thread, in rounds that take turns, medians; the promises at the end are ratios of one round.
Everybody checks the same two limits and gets what headers need. Then bytes per client, and a table of what each
algorithm admits of the same traffic. (Not called limits.py: that is the name of a peer.)
"""

import asyncio
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from harness import Table, apart_from, quiet_gc
from sessions import CALLS, ROUNDS, WARM_UP, Hit, entering, many, ratio, say, timed

import redis
from stillroom import AsyncStillroom, Limit, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.limits.local import LocalLimits

IP = "203.0.113.7"
QUOTAS = [(100_000, 60), (1_000_000, 3_600)]
LIMITS = [Limit("minute", *QUOTAS[0]), Limit("hour", *QUOTAS[1])]
NONE_LEFT = [Limit("minute", *QUOTAS[0]), Limit("closed", 1, 3_600)]
TIMES_INCR, PEERS, MEMORY_US = 0.9, 3.0, 5.0
CHECK, DENIED, BARE = "check, two limits, headers", "denied from memory", "redis-py incr"
ONE_AWAY = "check while Redis is away"


def main() -> None:
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        apart_from(server.pid)
        settings = Settings(
            redis_url=server.url, session_peppers="p" * 32, command_timeout=5, call_timeout=30
        )
        with Stillroom(settings, dispatch=NoDispatch()) as room, asyncio.Runner() as runner:
            room.stats.due = 1 << 62  # what rides along every 5 s is not what is measured
            acts, peers = contestants(room, client, server.url, settings, runner)
            with quiet_gc():
                samples = measure(acts)
            report(samples, peers)
            weigh(room, client)
    print()
    compare_accuracy()


def contestants(
    room: Stillroom, client: Any, url: str, settings: Settings, runner: asyncio.Runner
) -> tuple[dict[str, Hit], list[str]]:
    """Name → one act; and who are the peers."""
    for _ in range(2):
        room.limits.check(IP, NONE_LEFT)
    away = Stillroom(Settings(redis_url="redis://127.0.0.1:1"), dispatch=NoDispatch())
    while not away.wire.breaker.is_open:
        away.limits.check(IP, LIMITS)
    async_room = AsyncStillroom(settings, dispatch=NoDispatch())
    async_room.stats.due = 1 << 62

    async def check() -> object:
        return (await async_room.limits.check(IP, LIMITS)).headers()

    acts: dict[str, Hit] = {
        BARE: lambda: client.incr("bare"),
        CHECK: lambda: room.limits.check(IP, LIMITS).headers(),
        "check, no headers": lambda: room.limits.check(IP, LIMITS),
        "reserve and refund": lambda: room.limits.refund(room.limits.reserve(IP, LIMITS)),
        DENIED: lambda: room.limits.check(IP, NONE_LEFT),
        ONE_AWAY: lambda: away.limits.check(IP, LIMITS),
        "check, async": lambda: runner.run(many(check)),
    }
    peers = []
    for name, make in {"limits, moving window": moving_window, "throttled-py": throttled}.items():
        with entering(name):
            acts[name] = make(url)
            peers.append(name)
    return acts, peers


def moving_window(url: str) -> Hit:
    from limits import RateLimitItemPerSecond
    from limits.storage import RedisStorage
    from limits.strategies import MovingWindowRateLimiter

    limiter = MovingWindowRateLimiter(RedisStorage(url))
    items = [RateLimitItemPerSecond(quota, window) for quota, window in QUOTAS]

    def act() -> object:
        admitted = [limiter.hit(item, IP) for item in items]
        return admitted, [limiter.get_window_stats(item, IP) for item in items]

    return act


def throttled(url: str) -> Hit:
    from datetime import timedelta

    from throttled import RateLimiterType, RedisStore, Throttled, per_duration

    store = RedisStore(server=url)
    kind = RateLimiterType.SLIDING_WINDOW.value
    limiters = [
        Throttled(using=kind, quota=per_duration(timedelta(seconds=window), quota), store=store)
        for quota, window in QUOTAS
    ]
    return lambda: [limiter.limit(f"{IP}:{n}") for n, limiter in enumerate(limiters)]


def measure(acts: dict[str, Hit]) -> dict[str, list[float]]:
    """CPU µs of one call, round by round."""
    samples: dict[str, list[float]] = {name: [] for name in acts}
    names = list(acts)
    for number in range(WARM_UP + ROUNDS):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            calls = 1 if name.endswith("async") else CALLS
            samples[name].append(timed(acts[name], calls) * calls / CALLS)
    return {name: values[WARM_UP:] for name, values in samples.items()}


def report(samples: dict[str, list[float]], peers: list[str]) -> None:
    table = Table("act", "CPU µs", "× incr")
    for name, values in samples.items():
        table.add(name, f"{median(values):.1f}", f"{ratio(values, samples[BARE]):.2f}")
    print(table)
    figure = ratio(samples[CHECK], samples[BARE])
    say(figure <= TIMES_INCR, f"{CHECK} ≤ {TIMES_INCR} × incr: {figure:.2f}")
    for peer in peers:
        figure = ratio(samples[peer], samples[CHECK])
        say(figure >= PEERS, f"{peer} ≥ {PEERS} × ours: {figure:.1f}")
    figure = median(samples[DENIED])
    say(figure <= MEMORY_US, f"{DENIED} ≤ {MEMORY_US} µs: {figure:.1f}")


def weigh(room: Stillroom, client: Any) -> None:
    """Bytes of a client that has used all of 100 a minute, evenly; beside a counter and a list of all hits."""
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
    ours, counter, all_hits = (
        client.memory_usage(name)
        for name in (key, "counter of such a name of a client", "list of such a name of a client")
    )
    print(
        f"bytes per client at 100/min: {ours}; a counter {counter}, a list of all hits {all_hits}"
    )


# Accuracy: the same traffic through each algorithm, in simulated time (whole µs)

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
    """Ours: the stand-in, which tests hold against the script number by number."""
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
    """When requests come, for twenty minutes."""
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


def compare_accuracy() -> None:
    algorithms = {
        "exact log": exact_log,
        "ours": coalesced_log,
        "fixed window": fixed_window,
        "two counters": two_counters,
        "GCRA": gcra,
    }
    table = Table("worst 60 s at 100/min, share of the exact log", *algorithms)
    worst_of_ours = 0
    for name, times in traffic(7).items():
        admitted = {a: list(filter(make(), times)) for a, make in algorithms.items()}
        exact = len(admitted["exact log"])
        worst_of_ours = max(worst_of_ours, worst_window(admitted["ours"]))
        cells = [f"{worst_window(hits)}  {len(hits) / exact:4.0%}" for hits in admitted.values()]
        table.add(name, *cells)
    print(table)
    say(worst_of_ours <= QUOTA, f"never more than {QUOTA} in any window: {worst_of_ours}")


def worst_window(hits: list[int]) -> int:
    """The most hits in any half-open window."""
    worst, first = 0, 0
    for last, now in enumerate(hits):
        while hits[first] <= now - WINDOW:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


if __name__ == "__main__":
    os.environ.pop("REDIS_URL", None)
    main()
