"""The example shop goes on with a frozen Redis, a killed worker, and a Redis that is started again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shop.demo.story import read_page
from stillroom import Settings
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.shop import Shop, counts, open_shop

pytestmark = pytest.mark.long

FROZEN_S = 3.0
# A page's Redis calls have 250 ms together; the rest is for a database, a template, and a machine that is busy.
PAGE_WITHIN_S = 1.5
TRIES = 5  # a shop whose pages wait for Redis is slow in each; a busy machine is not
PAGES_OF_ONE = 200  # then another visitor comes: the quota is a thousand pages a minute
BUDGETS = {
    "STILLROOM_CONNECT_TIMEOUT": "0.1",
    "STILLROOM_COMMAND_TIMEOUT": "0.1",
    "STILLROOM_CALL_TIMEOUT": "0.15",
    "STILLROOM_REQUEST_TIMEOUT": "0.25",
}


@pytest.fixture
def budgets() -> dict[str, str]:
    """Return what makes the shop impatient: nothing, where Redis is refused or there."""
    return {}


@pytest.fixture
def own_shop(own_server: EmbeddedServer, tmp_path: Path, budgets: dict[str, str]) -> Iterator[Shop]:
    """Open a shop on a Redis that can be taken from it."""
    settings = Settings(redis_url=own_server.url, session_peppers=PATIENT["session_peppers"])
    with open_shop("threads", settings, tmp_path, STILLROOM_TTL="1", **budgets) as shop:
        until(lambda: shop.visitor().get("/health/live").status == 200, "the shop to open", 60)
        yield shop


@pytest.mark.parametrize("budgets", [BUDGETS], ids=["production budgets"])
def test_a_frozen_redis_is_a_shop_without_logins(
    own_shop: Shop, own_server: EmbeddedServer
) -> None:
    """With a frozen Redis pages come from the database without a wait, logins are refused in words,
    and all recovers.
    """
    ann = own_shop.logged_in("ann")
    ann.post("/cart/7")
    cookie = dict(ann.cookies)
    for is_last in [False] * (TRIES - 1) + [True]:
        own_server.freeze()
        try:
            times = reload_for(own_shop, FROZEN_S)
            login = own_shop.visitor().post("/login", name="ben", password="blackcurrant")
            account = ann.get("/account")
        finally:
            own_server.thaw()
        if len(times) > 20 and max(times) < PAGE_WITHIN_S:
            break
        assert not is_last, times
        until(lambda: ann.get("/account").status == 200, "the login to be known again")
    for reply in (login, account):
        assert reply.status == 503
        assert "try this again in a moment" in reply.text
        assert reply.headers["retry-after"] == "2"
        assert "set-cookie" not in reply.headers
    assert ann.cookies == cookie
    until(lambda: ann.get("/account").status == 200, "the login to be known again")
    assert counts(ann.get("/cart")) == {"7": 1}
    until(lambda: own_shop.page().how in ("fresh", "stale"), "a page from the cache")


def reload_for(shop: Shop, seconds: float) -> list[float]:
    """Let visitors, four at a time, reload a page that must be there each time; return how long each load took."""
    times: list[float] = []
    end = time.monotonic() + seconds

    def reload() -> None:
        while True:
            with shop.visitor() as browser:
                for _ in range(PAGES_OF_ONE):
                    if (began := time.monotonic()) >= end:
                        return
                    assert read_page(browser.get("/product/7")).cents == 350
                    times.append(time.monotonic() - began)

    threads = [threading.Thread(target=reload) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return times


def test_a_worker_that_is_killed_is_missed_by_nobody(own_shop: Shop, tmp_path: Path) -> None:
    """After its worker was killed the shop serves stale pages, which the next worker refreshes and reclaims."""
    worker = own_shop.worker(tmp_path)
    worker.kill()
    admin = own_shop.logged_in("admin")
    for percent in ("10", "20"):
        assert own_shop.page().cents > 0
        assert admin.post("/admin/sale", brand="acme", percent=percent).status == 303
    assert own_shop.page().cents == 252
    own_shop.sql("UPDATE products SET cents = 111 WHERE id = 7")
    until(lambda: own_shop.page().how == "stale", "a stale page")
    assert own_shop.page().cents == 252
    again = own_shop.worker(tmp_path)
    try:
        until(lambda: own_shop.page().cents == 111, "the refresh", within=60)
    finally:
        again.kill()


def test_sessions_outlive_a_redis_that_is_started_again(
    own_shop: Shop, own_server: EmbeddedServer
) -> None:
    """After Redis is killed and started on its file, logged in visitors keep their carts and logged
    out ones stay so.
    """
    ann, ben = own_shop.logged_in("ann"), own_shop.logged_in("ben")
    ann.post("/cart/3")
    stolen = dict(ben.cookies)
    ben.post("/logout")
    own_server.kill()
    assert own_shop.page(3).cents == 510
    assert ann.get("/account").status == 503
    own_server.restart()
    until(lambda: ann.get("/account").status == 200, "the login to be known again")
    assert counts(ann.get("/cart")) == {"3": 1}
    thief = own_shop.visitor()
    thief.cookies |= stolen
    assert thief.get("/account").headers["location"] == "/login"
