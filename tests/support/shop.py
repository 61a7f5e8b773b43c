"""The example shop as it is run: a real server with processes of its own, a database, Redis, workers."""

from __future__ import annotations

import itertools
import os
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from shop.demo.browser import Browser, Reply
from shop.demo.story import Page, read_page
from stillroom import Settings
from tests.support.celery_process import CeleryProcess, until
from tests.support.web import GUNICORN, environment_of, serving_process

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
UVICORN = ("uvicorn", "--fd", "{fd}", "--log-level", "error", "--no-proxy-headers")
SERVERS: Mapping[str, tuple[str, ...]] = {
    "prefork": (*GUNICORN, "--workers", "2", "shop.app:app"),
    "preload": (*GUNICORN, "--workers", "2", "--preload", "shop.app:app"),
    "threads": (*GUNICORN, "--workers", "2", "--threads", "8", "shop.app:app"),
    "gevent": (*GUNICORN, "--workers", "2", "--worker-class", "gevent", "shop.app:app"),
    "uvicorn": (*UVICORN, "--workers", "2", "--interface", "wsgi", "shop.app:app"),
}
HEALTH_TOKEN = "a-token-for-tests-of-health"
USERS = {"ann": "apricot", "ben": "blackcurrant", "admin": "quince"}
ADDRESSES = itertools.count(1)


class Shop:
    """A running shop, seen from outside."""

    def __init__(self, port: int, database: Path, environment: Mapping[str, str]) -> None:
        self.port = port
        self.environment = dict(environment)
        self._database = database
        self._browsers: list[Browser] = []

    def visitor(self, address: str | None = None) -> Browser:
        """Return a new visitor with an address, and so with limits, of their own, as behind a proxy."""
        given = address or "198.51.{}.{}".format(*divmod(next(ADDRESSES), 256))
        self._browsers.append(Browser(self.port, headers={"X-Forwarded-For": given}))
        return self._browsers[-1]

    def close_browsers(self) -> None:
        while self._browsers:
            self._browsers.pop().close()

    def logged_in(self, user: str) -> Browser:
        browser = self.visitor()
        reply = browser.post("/login", name=user, password=USERS[user])
        assert reply.status == 303, reply
        return browser

    def page(self, id: int = 7) -> Page:
        """Return a product's page as the next visitor sees it."""
        with self.visitor() as browser:
            return read_page(browser.get(f"/product/{id}"))

    def pages_of_all(self, count: int, id: int = 7) -> list[Page]:
        """Return pages until each of `count` processes has served one."""
        pages: list[Page] = []

        def everybody() -> bool:
            pages.append(self.page(id))
            return len({page.process for page in pages}) == count

        until(everybody, f"pages of {count} processes", within=60)
        return pages

    def sql(self, statement: str, *values: Any) -> list[Any]:
        """Change the database without the shop."""
        with closing(sqlite3.connect(self._database, timeout=10)) as db, db:
            return db.execute(statement, values).fetchall()

    def celery(self, log: Path, *arguments: str, app: str = "stillroom_workers") -> CeleryProcess:
        return CeleryProcess(log, self.environment, *arguments, app=app)

    def worker(self, folder: Path) -> CeleryProcess:
        quick = ("--without-gossip", "--without-mingle", "-l", "INFO")
        process = self.celery(folder / "worker.log", "worker", *quick)
        process.await_line("ready.", within=60)
        return process

    def beat(self, folder: Path) -> CeleryProcess:
        """Run beat with every tick five times a second; its times are kept in memory."""
        words = ("beat", "-S", "celery.beat:Scheduler", "--pidfile=")
        return self.celery(folder / "beat.log", *words, app="tests.support.quick_beat")


def environment_of_shop(settings: Settings, folder: Path, **changes: str) -> dict[str, str]:
    """Return the environment of the shop and its workers."""
    two_roles = {"STILLROOM_CACHE_URL": settings.cache_url} if settings.cache_url else {}
    return {
        **environment_of(settings),
        **two_roles,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)]),
        "SHOP_DATABASE": str(folder / "shop.db"),
        "STILLROOM_LOADERS": "shop.cache",
        "STILLROOM_TRUSTED_PROXIES": "127.0.0.0/8",
        "STILLROOM_HEALTH_TOKEN": HEALTH_TOKEN,
        **changes,
    }


@contextmanager
def open_shop(server: str, settings: Settings, folder: Path, **changes: str) -> Iterator[Shop]:
    """Open the shop behind one of SERVERS; `changes` are of its environment."""
    environment = environment_of_shop(settings, folder, **changes)
    with serving_process(SERVERS[server], folder, environment) as port:
        shop = Shop(port, folder / "shop.db", environment)
        try:
            yield shop
        finally:
            shop.close_browsers()


def counts(reply: Reply) -> dict[str, int]:
    """Return the cart's page: a product's id → how many."""

    return {item: int(count) for item, count in re.findall(r'data-id="(\d+)">(\d+)', reply.text)}
