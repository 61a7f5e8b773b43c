"""The demo's story: four steps, each done by a browser and checked, each with the line of code that does it."""

from __future__ import annotations

import io
import re
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.markup import escape

from shop.demo.browser import Browser, Reply
from shop.demo.recorder import Recorder
from shop.demo.stage import EXAMPLES

T = TypeVar("T")

VISITORS = 20
HITS = 200
PATIENCE = 30.0  # seconds for anything to happen
PAUSE = 0.02  # seconds from one look to the next
PATH = "/product/7"


class StepFailed(Exception):
    """A step did not happen as told."""


class Page(NamedTuple):
    """Holds what the product's page says: the price, and at its foot how it was served."""

    cents: int
    how: str  # fresh, stale or loaded
    process: int
    read_by: int  # the process that asked the database
    read_at: float


class Story:
    """The steps. Each returns what it saw, or raises StepFailed."""

    def __init__(
        self,
        port: int,
        database: Path,
        recorder: Recorder,
        log: io.StringIO,
        console: Console,
        *,
        verbose: bool = False,
    ) -> None:
        self._port = port
        self._database = database
        self._recorder = recorder
        self._log = log
        self._console = console
        self._verbose = verbose
        self.steps = [self.miss, self.hits, self.stale, self.edit]

    def tell(self) -> int:
        """Run the steps up to the first that does not happen, each built on the last. Return how many did."""
        numbered = enumerate(self.steps, 1)
        return sum(1 for _ in takewhile(lambda pair: self._tell_step(*pair), numbered))

    def _tell_step(self, number: int, step: Callable[[], str]) -> bool:
        """Run a step, and print what it saw. Return False if it did not happen."""
        title, _, code = (step.__doc__ or "").partition("\n")
        self._console.print(f"\n[bold]{number}. {title}[/bold]")
        self._console.print(f"   [cyan]{escape(line_of_code(code.strip()))}[/cyan]")
        self._recorder.commands()
        try:
            seen, ok = step(), True
        except (StepFailed, OSError) as failed:
            seen, ok = f"{failed}\nthe log:\n{self._log.getvalue()[-2_000:]}", False
        self._console.print(f"   [{'green' if ok else 'red'}]{escape(seen)}[/]")
        commands = self._recorder.commands()
        if self._verbose:
            for command in commands:
                self._console.print(f"   [dim]# => {escape(command)}[/dim]")
        return ok

    def miss(self) -> str:
        """Twenty visitors open a page at the same time, and the database is asked once.

        shop/cache.py: @room.cache.cached("product:{id}"
        """
        self._await(self._is_open, "the shop to open")
        started = time.perf_counter()
        pages: list[Page] = []
        threads = [
            threading.Thread(target=lambda: pages.append(self._look())) for _ in range(VISITORS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = _ms(started)
        expect([page.cents for page in pages] == [350] * VISITORS, f"pages {pages}")
        reads = len({(page.read_by, page.read_at) for page in pages})
        expect(reads == 1, f"the database was asked {reads} times")
        return f"{VISITORS} pages in {took}, 1 query of 100 ms"

    def hits(self) -> str:
        """The next two hundred visitors get the value from Redis, and nobody waits for the database.

        shop/app.py: cache.load_product(id)
        """
        times = []
        with Browser(self._port) as browser:
            for _ in range(HITS):
                began = time.perf_counter()
                page = read_page(browser.get(PATH))
                times.append(time.perf_counter() - began)
                expect(page.how != "loaded", "a page asked the database")
        return f"{HITS} pages over HTTP, median {statistics.median(times) * 1e3:.1f} ms, no query"

    def stale(self) -> str:
        """After a second the value is stale: a visitor sees it at once, while a worker brings the new one.

        shop/cache.py: STALE = 3600
        """
        shop = self._processes()
        self._await(lambda: self._look().how != "stale", "a fresh page")
        self._set_price(399)  # nobody tells the cache
        old = self._await(
            lambda: page if (page := self._look()).how == "stale" else None, "a stale page"
        )
        started = time.perf_counter()
        expect(old.cents == 350, f"the stale price was {old.cents}")
        new = self._await(
            lambda: page if (page := self._look()).cents == 399 else None, "the new price"
        )
        expect(new.read_by not in shop, "the shop asked the database, not the worker")
        return f"3.50 from before, and 3.99 after {_ms(started)}: the worker, {new.read_by}, asked"

    def edit(self) -> str:
        """An admin saves an edit, and from then on no process shows the old price.

        shop/cache.py: room.cache.invalidate(load_product.key(id)
        """
        with Browser(self._port) as admin:
            self._submit(admin, "/login", name="admin", password="quince")
            started = time.perf_counter()
            self._submit(admin, "/admin/7", name="Plum jam", cents="275")
            took = _ms(started)
            here = read_page(admin.get(PATH)).process
        pages = [self._look()]
        deadline = time.monotonic() + PATIENCE
        while pages[-1].process == here and time.monotonic() < deadline:
            pages.append(self._look())
        expect(pages[-1].process != here, "no other process answered")
        expect({page.cents for page in pages} == {275}, f"pages {pages}")
        return f"saved in {took}; the next page of the other process shows 2.75"

    def _submit(self, browser: Browser, path: str, **form: str) -> None:
        reply = browser.post(path, **form)
        expect(reply.status == 303, f"{path} answered {reply.status}")

    def _look(self) -> Page:
        """Return the page as the next visitor sees it: on a new connection, which any process may take."""
        with Browser(self._port) as browser:
            return read_page(browser.get(PATH))

    def _is_open(self) -> bool:
        with Browser(self._port) as browser:
            return browser.finds("/health/live")

    def _processes(self) -> set[int]:
        """Return the process ids of the shop."""
        seen: set[int] = set()

        def both() -> bool:
            seen.add(self._look().process)
            return len(seen) == 2

        self._await(both, "both processes of the shop")
        return seen

    def _set_price(self, cents: int) -> None:
        with closing(sqlite3.connect(self._database, timeout=10)) as db, db:
            db.execute("UPDATE products SET cents = ? WHERE id = 7", [cents])

    def _await(self, look: Callable[[], T | None], what: str) -> T:
        deadline = time.monotonic() + PATIENCE
        while not (found := look()):
            expect(time.monotonic() < deadline, f"waited {PATIENCE:g} s in vain for {what}")
            time.sleep(PAUSE)
        return found


def line_of_code(where: str) -> str:
    """Return the line of the shop that a step is about, as it stands in its file.

    `where`: `<file>: <part of the line>`.
    """
    name, _, part = where.partition(": ")
    for number, line in enumerate((EXAMPLES / name).read_text(encoding="utf-8").splitlines(), 1):
        if part in line:
            return f"{line.partition('  # ')[0].strip()}    # {name}:{number}"
    raise StepFailed(f"{name} has no line with {part!r}")


def read_page(reply: Reply) -> Page:
    """Return what a product's page says. Raises StepFailed if the reply is no product's page."""
    expect(reply.status == 200, f"the page answered {reply.status}")
    found = dict(re.findall(r'data-([a-z-]+)="([^"]*)"', reply.text))
    price = re.search(r'<data value="(\d+)">', reply.text)
    expect(price is not None and "read-at" in found, f"no product's page:\n{reply.text}")
    assert price is not None
    process, read_by = int(found["process"]), int(found["read-by"])
    return Page(int(price[1]), found["how"], process, read_by, float(found["read-at"]))


def expect(happened: bool, otherwise: str) -> None:
    if not happened:
        raise StepFailed(otherwise)


def _ms(started: float) -> str:
    return f"{(time.perf_counter() - started) * 1000:.1f} ms"
