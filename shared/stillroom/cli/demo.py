"""`stillroom demo`: the main job, told with real timings. Ends by itself; exit code 1 if a step did not happen."""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from stillroom.cli.recorder import Recorder
from stillroom.cli.stack import redis_url, services
from stillroom.cli.supervisor import Supervisor
from stillroom.settings import redact

THREADS = 20
HITS = 2_000
PATIENCE = 30.0  # seconds for anything to happen

console = Console(highlight=False, soft_wrap=True)


def demo() -> None:
    """Show the whole path: a miss, hits, a stale hit refreshed by a worker, an invalidation seen elsewhere."""
    with tempfile.TemporaryDirectory(prefix="stillroom-") as folder, redis_url() as (url, embedded):
        kind = "an embedded server" if embedded else "REDIS_URL"
        console.print(f"[bold]Stillroom demo[/bold] on {redact(url)} ({kind})")
        with _stage(url, Path(folder)) as story:
            steps = [story.miss, story.hits, story.stale, story.invalidation]
            happened = [story.tell(n, step) for n, step in enumerate(steps, 1)]
    done = sum(happened)
    console.print(f"\n{done} of {len(happened)} steps happened as told.")
    raise typer.Exit(0 if all(happened) else 1)


@contextmanager
def _stage(url: str, folder: Path) -> Iterator[Story]:
    """A database, a worker, and another process of the same app."""
    namespace = f"demo-{os.getpid()}"  # beside whatever else lives on that server
    environment = {
        "REDIS_URL": url,
        "STILLROOM_NAMESPACE": namespace,
        "STILLROOM_LOADERS": "stillroom.cli.shop",
        "DEMO_DATABASE": str(folder / "shop.db"),
    }
    os.environ.update(environment)
    from stillroom.cli import shop  # reads the settings just made

    shop.create_database(folder / "shop.db")
    worker, *_ = services(environment, flower_port=None)
    log = io.StringIO()
    with Supervisor([worker], out=log), _other_process() as other, Recorder(url) as recorder:
        with shop.room:
            yield Story(shop, other, recorder, log)


@contextmanager
def _other_process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "stillroom.cli.shop"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


class Story:
    """The steps. Each returns what it saw, or raises StepFailed."""

    def __init__(
        self, shop: Any, other: subprocess.Popen[str], recorder: Recorder, log: io.StringIO
    ) -> None:
        self._shop = shop
        self._other = other
        self._recorder = recorder
        self._log = log

    def tell(self, number: int, step: Callable[[], str]) -> bool:
        """Run a step and print what it saw and what it said to Redis. False if it did not happen."""
        title = (step.__doc__ or "").splitlines()[0]
        console.print(f"\n[bold]{number}. {title}[/bold]")
        self._recorder.commands()
        try:
            seen, ok = step(), True
        except StepFailed as failed:
            seen, ok = f"{failed}\nthe worker's log:\n{self._log.getvalue()[-2_000:]}", False
        console.print(f"   [{'green' if ok else 'red'}]{seen}[/]")
        for command in self._recorder.commands():
            console.print(f"   [dim]# => {command}[/dim]", markup=True)
        return ok

    def miss(self) -> str:
        """A miss: 20 threads ask at once, the database is asked once."""
        started = time.perf_counter()
        prices: list[int] = []
        threads = [
            threading.Thread(target=lambda: prices.append(self._price())) for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asked = len(self._shop.queries())
        expect(prices == [350] * THREADS, f"prices {prices}")
        expect(asked == 1, f"the database was asked {asked} times")
        return f"{THREADS} answers in {_ms(started)}, 1 query of {self._shop.SLOW * 1000:.0f} ms"

    def hits(self) -> str:
        """Hits: one round trip, and the value is checked by type."""
        self._await_fresh()
        self._recorder.commands()
        times = []
        for _ in range(HITS):
            began = time.perf_counter()
            product = self._shop.room.cache.get("product:7", self._shop.Product)
            times.append(time.perf_counter() - began)
            expect(product is not None, "a hit was a miss")
        return (
            f"{HITS:,} hits, median {statistics.median(times) * 1e6:.0f} µs, the last: {product!r}"
        )

    def stale(self) -> str:
        """A stale hit: the old value at once, and a worker brings the new one."""
        self._shop.set_price(399)
        self._await(lambda: self._freshness() == "stale", "the entry to become stale")
        self._recorder.commands()
        started = time.perf_counter()
        old = self._price()
        answered = _ms(started)
        expect(old == 350, f"the stale price was {old}")
        self._await(
            lambda: self._shop.room.cache.get("product:7")["price_cents"] == 399, "the refresh"
        )
        refreshed = _ms(started)
        mine = self._shop.queries().count(os.getpid())
        expect(mine == 1, f"this process asked the database {mine} times, not the worker")
        return f"3.50 in {answered}, and 3.99 after {refreshed}: the worker asked the database"

    def invalidation(self) -> str:
        """An invalidation: true for another process as soon as it returns."""
        expect(self._ask_other() == 399, "the other process did not have the price in its cache")
        self._shop.set_price(275)
        started = time.perf_counter()
        self._shop.room.cache.invalidate_by_tag("brand:acme")
        took = _ms(started)
        price = self._ask_other()
        expect(price == 275, f"the other process read {price}")
        return f"invalidate_by_tag took {took}; the other process reads 2.75"

    def _price(self) -> int:
        price: int = self._shop.load_product(7, brand="acme").price_cents
        return price

    def _freshness(self) -> str:
        entry = self._shop.room.cache.get_entry("product:7")
        return entry.freshness.value if entry else "missing"

    def _await_fresh(self) -> None:
        if self._freshness() != "fresh":
            self._shop.load_product.invalidate(7, brand="acme")
            self._price()

    def _ask_other(self) -> int:
        assert self._other.stdin is not None
        assert self._other.stdout is not None
        self._other.stdin.write("read\n")
        self._other.stdin.flush()
        return int(self._other.stdout.readline())

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            expect(time.monotonic() < deadline, f"waited {PATIENCE:g} s in vain for {what}")
            time.sleep(0.02)


class StepFailed(Exception):
    """A step did not happen as told."""


def expect(happened: bool, otherwise: str) -> None:
    if not happened:
        raise StepFailed(otherwise)


def _ms(started: float) -> str:
    return f"{(time.perf_counter() - started) * 1000:.1f} ms"
