"""What does it cost to ask for health: a check beside the INFO in it, an endpoint beside one that knows nothing?

    python tests/bench/health.py

CPU time of the calling thread, in rounds that take turns, medians. A check asks seventy questions in one batch;
what makes `/health` cheap is that one check serves everybody for two seconds.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from harness import Table, apart_from, quiet_gc

import redis
from stillroom import NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.web import HealthWSGI

ROUNDS, CALLS, WARM_UP = 40, 10, 3
OPERATOR = {"REQUEST_METHOD": "GET", "REMOTE_ADDR": "127.0.0.1"}
PUBLIC = OPERATOR | {"HTTP_VIA": "a proxy"}
CHECK_TIMES_INFO = 4.0  # at most
HELD_TIMES_LIVE = 2.0

Hit = Callable[[], object]


def main() -> None:
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        apart_from(server.pid)
        settings = Settings(
            redis_url=server.url, health_timeout=5, call_timeout=5, command_timeout=5
        )
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            with quiet_gc():
                report(measure(contestants(room, client)))


def contestants(room: Stillroom, client: Any) -> dict[str, Hit]:
    app = HealthWSGI(room)

    def get(path: str, environ: dict[str, str]) -> object:
        return app(environ | {"PATH_INFO": path}, lambda *_: None)

    return {
        "redis-py INFO": client.info,
        "room.health.check()": room.health.check,
        "GET /health/live": lambda: get("/health/live", PUBLIC),
        "GET /health, public": lambda: get("/health", PUBLIC),
        "GET /health, details": lambda: get("/health", OPERATOR),
        "GET /metrics": lambda: get("/metrics", OPERATOR),
    }


def measure(hits: dict[str, Hit]) -> dict[str, list[float]]:
    """µs of CPU a call, of each round but the first."""
    samples: dict[str, list[float]] = {name: [] for name in hits}
    names = list(hits)
    for n in range(ROUNDS + WARM_UP):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            began = time.thread_time_ns()
            for _ in range(CALLS):
                hits[name]()
            if n >= WARM_UP:
                samples[name].append((time.thread_time_ns() - began) / CALLS / 1000)
    return samples


def report(samples: dict[str, list[float]]) -> None:
    table = Table("what", "µs CPU")
    for name, rounds in samples.items():
        table.add(name, f"{median(rounds):,.0f}")
    print(table)
    promise(
        "a check, times INFO", samples, "room.health.check()", "redis-py INFO", CHECK_TIMES_INFO
    )
    promise(
        "/health while held, times /health/live",
        samples,
        "GET /health, public",
        "GET /health/live",
        HELD_TIMES_LIVE,
    )


def promise(what: str, samples: dict[str, list[float]], ours: str, other: str, most: float) -> None:
    ratio = median(a / b for a, b in zip(samples[ours], samples[other], strict=True))
    print(f"{what}: {ratio:.2f} (at most {most:g}) {'holds' if ratio <= most else 'DOES NOT HOLD'}")


if __name__ == "__main__":
    main()
