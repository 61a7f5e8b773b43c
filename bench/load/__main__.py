"""A load test of the example shop: `make load`. Bounded in time and in requests, on this machine alone.

Locust sends the same traffic to the shop without Stillroom, where each page asks the database (SQLite, and 20 ms
for what a busy one takes), and to the shop with it: undisturbed, while everything is invalidated, while Redis is
frozen, and while the worker is started again. All in one run, so that one machine's moods are in all lines.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from shop.demo.browser import Browser
from shop.demo.stage import environment_of_shop, shop_service
from stillroom import NoDispatch, Settings, Stillroom
from stillroom.cli.stack import services
from stillroom.cli.supervisor import Supervisor
from stillroom.embedded import EmbeddedServer, free_port
from stillroom.leash import until

VISITORS = 20
EACH = 25  # requests a second that a visitor makes at most: 500 in all, so a run has its bound
SECONDS = 12
EVENT_AFTER = 4.0  # seconds from Locust's start, which takes one or two
FREEZE_S = 5.0
QUERY_MS = 20
FRESH_S = 2  # shorter than a run, so that workers have something to do
HERE = Path(__file__).parent


class Shop(NamedTuple):
    """Holds the parts of the running shop, which can be disturbed."""

    port: int
    redis: EmbeddedServer
    room: Stillroom
    worker: Supervisor


class Line(NamedTuple):
    """Holds a row of the table. Times are in ms."""

    requests_s: float
    p50: float
    p95: float
    p99: float
    longest: float
    errors: int
    requests: int


def main() -> None:
    print(
        f"{VISITORS} visitors, {VISITORS * EACH} requests a second at most, {SECONDS} s a run; "
        f"a query takes {QUERY_MS} ms, a page is fresh for {FRESH_S} s; {os.cpu_count()} processors\n"
    )
    print(f"{'':36}" + "".join(f"{name:>10}" for name in ("req/s", *Line._fields[1:])))
    with open_shop("without:app") as shop:
        show("without Stillroom", run(shop, nothing))
    with open_shop("shop.app:app") as shop:
        show("with Stillroom", run(shop, nothing))
        show("… everything invalidated, 20 times", run(shop, invalidate))
        show(f"… Redis frozen for {FREEZE_S:g} s", run(shop, freeze))
        show("… the worker started again", run(shop, restart))


def show(name: str, line: Line) -> None:
    print(f"{name:36}" + "".join(f"{value:>10.0f}" for value in line), flush=True)


# Events during the load


def nothing(shop: Shop) -> None:
    pass


def invalidate(shop: Shop) -> None:
    for _ in range(20):
        shop.room.cache.invalidate_by_tag("products", "listings")
        time.sleep(0.25)


def freeze(shop: Shop) -> None:
    shop.redis.freeze()
    time.sleep(FREEZE_S)
    shop.redis.thaw()


def restart(shop: Shop) -> None:
    shop.worker.stop()
    shop.worker.start()


# A run


def run(shop: Shop, disturb: Callable[[Shop], None]) -> Line:
    """Send traffic for some seconds, and do something in the middle of it."""
    with tempfile.TemporaryDirectory(prefix="stillroom-") as folder:
        locust = subprocess.Popen(
            [*_locust(shop.port), "--csv", f"{folder}/run"],
            env={**os.environ, "LOAD_EACH": str(EACH)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(EVENT_AFTER)
            disturb(shop)
            locust.wait(SECONDS + 30)
        finally:
            locust.kill()
            locust.wait()
        return _read(Path(folder) / "run_stats.csv")


def _locust(port: int) -> list[str]:
    words = [sys.executable, "-m", "locust", "-f", str(HERE / "visitors.py"), "--headless"]
    words += ["--host", f"http://127.0.0.1:{port}", "-t", f"{SECONDS}s", "--stop-timeout", "5"]
    return [*words, "-u", str(VISITORS), "-r", str(VISITORS)]


def _read(path: Path) -> Line:
    with path.open() as file:
        total = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    times = [float(total[name]) for name in ("50%", "95%", "99%", "Max Response Time")]
    errors, requests = int(total["Failure Count"]), int(total["Request Count"])
    return Line(float(total["Requests/s"]), *times, errors, requests)


@contextmanager
def open_shop(app: str) -> Iterator[Shop]:
    """Open the shop in two processes, with a worker and Redis."""
    with tempfile.TemporaryDirectory(prefix="stillroom-") as folder, EmbeddedServer() as redis:
        environment = environment_of_shop(redis.url, Path(folder)) | {
            "STILLROOM_TTL": str(FRESH_S),
            "STILLROOM_TRUSTED_PROXIES": "127.0.0.0/8",
            "SHOP_QUERY_MS": str(QUERY_MS),
        }
        environment["PYTHONPATH"] += os.pathsep + str(HERE)
        port, log = free_port(), StringIO()
        worker, *_ = services(environment, flower_port=None)
        settings = Settings(redis_url=redis.url, namespace=environment["STILLROOM_NAMESPACE"])
        with Supervisor([worker], out=log) as workers:
            with Supervisor([shop_service(environment, port, app)], out=log):
                assert until(lambda: _is_open(port) and "ready." in log.getvalue(), 60), (
                    log.getvalue()
                )
                with Stillroom(settings, dispatch=NoDispatch()) as room:
                    yield Shop(port, redis, room, workers)


def _is_open(port: int) -> bool:
    with Browser(port) as browser:
        return browser.finds("/")


if __name__ == "__main__":
    main()
