"""The example shop works over HTTP: a real server with two processes, a worker, beat and two Redis roles."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shop.demo.browser import Reply
from stillroom import Settings, Stillroom
from tests.support.celery_process import until
from tests.support.shop import HEALTH_TOKEN, SERVERS, Shop, counts, open_shop
from tests.support.threads import at_once


@contextmanager
def without_products(shop: Shop) -> Iterator[None]:
    """Break the database for a while."""
    shop.sql("ALTER TABLE products RENAME TO hidden")
    try:
        yield
    finally:
        shop.sql("ALTER TABLE hidden RENAME TO products")


# Every server


# What forks do to what processes share is shown in tests/processes too.
SELDOM = ("prefork", "preload")


@pytest.mark.parametrize(
    "server",
    [pytest.param(one, marks=pytest.mark.full) if one in SELDOM else one for one in SERVERS],
)
def test_every_server_serves_the_whole_shop(
    server: str, two_roles: Settings, tmp_path: Path
) -> None:
    """Every server serves the whole shop: a cart before the login, an order, an edit that all processes show."""
    with open_shop(server, two_roles, tmp_path, STILLROOM_NAMESPACE=f"shop-{server}") as shop:
        browser = shop.visitor()
        assert browser.post("/cart/7").status == 303
        assert browser.post("/login", name="admin", password="quince").status == 303
        assert counts(browser.get("/cart")) == {"7": 1}
        assert browser.post("/checkout").status == 303
        assert "1 pieces, 3.50" in browser.get("/account").text
        assert shop.page().cents == 350
        assert browser.post("/admin/7", name="Plum jam", cents="275").status == 303
        pages = shop.pages_of_all(2)
        assert {page.cents for page in pages} == {275}
        assert len({page.read_at for page in pages}) == 1  # one process asked, the others were told
        assert browser.post("/admin/sale", brand="acme", percent="20").status == 303
        assert {page.cents for page in shop.pages_of_all(2)} == {220}
        assert browser.get("/health").status == 200


# Pages


def test_a_stale_page_is_refreshed_by_a_worker(shop: Shop) -> None:
    """A stale page is served while a worker refreshes it, and no process of the shop asks the database."""
    processes = {page.process for page in shop.pages_of_all(2, id=1)}
    before = until(lambda: page if (page := shop.page(1)).how != "stale" else None, "a fresh page")
    shop.sql("UPDATE products SET cents = cents + 1 WHERE id = 1")
    pages = [before]

    def is_new() -> bool:
        pages.append(shop.page(1))
        return pages[-1].cents == before.cents + 1

    until(is_new, "the new page")
    assert {page.cents for page in pages[:-1]} == {before.cents}
    assert {page.how for page in pages} <= {"fresh", "stale"}
    assert pages[-1].read_by not in processes


def test_readers_during_an_edit_see_old_then_new_and_never_old_again(shop: Shop) -> None:
    """While an admin saves a page that twenty browsers reload, every read after the answer sees the new price."""
    admin = shop.logged_in("admin")
    saved = threading.Event()
    late: list[int] = []

    def read(number: int) -> None:
        for _ in range(10):
            was_saved = saved.is_set()
            page = shop.page(4)
            if was_saved:
                late.append(page.cents)

    def save(number: int) -> None:
        assert admin.post("/admin/4", name="Lemon curd", cents="499").status == 303
        saved.set()

    at_once(9, lambda number: save(number) if number == 0 else read(number))
    late.append(shop.page(4).cents)
    assert set(late) == {499}


def test_a_product_that_is_not_there_is_asked_for_once(shop: Shop) -> None:
    """A missing product is a 404 and asks the database once, because its absence is cached."""
    with shop.visitor() as browser:
        assert [browser.get("/product/4711").status for _ in range(3)] == [404] * 3
        assert browser.get("/product/99999999999999999999").status == 404


def test_images_are_told_by_their_content(shop: Shop) -> None:
    """An image's type, size in bytes and pixels, and hash come from its content."""
    page = shop.visitor().get("/images").text
    assert page.count("image/png") == 7
    assert "96 × 96" in page


def test_head_and_options_have_no_body(shop: Shop) -> None:
    """HEAD has GET's headers and OPTIONS the allowed methods, both without a body."""
    browser = shop.visitor()
    head = browser.ask("HEAD", "/product/7")
    assert (head.status, head.text) == (200, "")
    assert int(head.headers["content-length"]) > 0
    options = browser.ask("OPTIONS", "/product/7")
    assert options.status == 200
    assert set(options.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert browser.ask("DELETE", "/product/7").status == 405


def test_clients_that_go_away_in_the_middle_cost_nobody_else(shop: Shop) -> None:
    """Forty clients that close a streamed answer after one byte cost the next visitor nothing."""
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", shop.port), timeout=10) as connection:
            connection.sendall(
                b"GET /prices.csv HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n"
            )
            connection.recv(1)
    assert len(shop.visitor().get("/prices.csv").text.splitlines()) == 7


# Logins


def test_a_hundred_wrong_passwords_at_once_reach_the_check_five_times(shop: Shop) -> None:
    """Of a hundred wrong passwords at once five reach the check, because the quota is taken before."""
    address = "203.0.113.50"

    def guess(number: int) -> int:
        with shop.visitor(address) as browser:
            return browser.post("/login", name="nobody-5", password=f"guess {number}").status

    statuses = Counter(at_once(100, guess))
    assert statuses == {403: 5, 429: 95}
    assert shop.sql("SELECT count(*) FROM logins WHERE name = 'nobody-5'") == [(5,)]


def test_logins_that_succeed_take_no_quota(shop: Shop) -> None:
    """Ten logins in a row that succeed take no quota, and each gets a token of its own."""
    browser = shop.visitor()
    tokens = set()
    for _ in range(10):
        assert browser.post("/login", name="ann", password="apricot").status == 303
        tokens.add(browser.cookies["sid"])
    assert len(tokens) == 10


def test_a_forged_header_makes_no_new_client(shop: Shop) -> None:
    """A forwarding header that a client sends before its proxy's is not believed."""
    statuses = []
    for number in range(7):
        with shop.visitor(f"192.0.2.{number}, 203.0.113.60") as browser:
            statuses.append(browser.post("/login", name="nobody", password="x").status)
    assert statuses == [403] * 5 + [429] * 2


def test_logging_out_everywhere_leaves_this_device(shop: Shop) -> None:
    """Logging out everywhere ends the user's other browser, and neither this one nor another user's."""
    here, there, other = shop.logged_in("ben"), shop.logged_in("ben"), shop.logged_in("ann")
    assert here.post("/logout-everywhere").status == 303
    assert here.get("/account").text.count('class="device"') == 1
    assert there.get("/account").headers["location"] == "/login"
    assert other.get("/account").status == 200


def test_the_token_before_the_login_opens_nothing(shop: Shop) -> None:
    """The token from before the login opens an empty session."""
    browser = shop.visitor()
    browser.post("/cart/7")
    planted = browser.cookies["sid"]
    assert browser.post("/login", name="ann", password="apricot").status == 303
    attacker = shop.visitor()
    attacker.cookies["sid"] = planted
    assert attacker.get("/account").headers["location"] == "/login"
    assert counts(attacker.get("/cart")) == {}


# The session


def test_twenty_clicks_at_once_lose_nothing(shop: Shop) -> None:
    """Of twenty clicks at once each adds one to the cart."""
    first = shop.visitor()
    first.post("/cart/7")

    def click(number: int) -> int:
        with shop.visitor() as browser:
            browser.cookies |= first.cookies
            return browser.post(f"/cart/{1 + number % 2}").status

    assert at_once(20, click) == [303] * 20
    assert counts(first.get("/cart")) == {"7": 1, "1": 10, "2": 10}


def test_a_cart_is_ordered_once(shop: Shop) -> None:
    """Of ten clicks on the order button at once one places the order."""
    browser = shop.logged_in("ann")
    browser.post("/cart/6")
    before = shop.sql("SELECT count(*) FROM orders WHERE user = 'ann'")[0][0]

    def click(_: int) -> int:
        with shop.visitor() as other:
            other.cookies |= browser.cookies
            return other.post("/checkout").status

    assert at_once(10, click) == [303] * 10
    assert shop.sql("SELECT count(*) FROM orders WHERE user = 'ann'") == [(before + 1,)]


def test_a_request_that_fails_changes_nothing(shop: Shop) -> None:
    """A request during which the database breaks is a 500 and leaves cart and login as they were."""
    browser = shop.logged_in("ben")
    browser.post("/cart/5")
    with without_products(shop):
        assert browser.get("/product/4998").status == 500
        assert browser.post("/cart/4999").status == 500
        assert browser.post("/checkout").status == 500
    assert counts(browser.get("/cart")) == {"5": 1}


# What visitors send


@pytest.mark.parametrize(
    "cookie",
    [
        "sid=" + "x" * 7_000,
        "sid=",
        "sid",
        "sid=\xff\xfe",
        "sid=00.not-a-token; sid=07.neither",
        'sid="quoted; other=1',
        "; ; =; ==",
        "sid=0f." + "A" * 43,
        "other=1; " * 200 + "sid=zz",
    ],
)
def test_cookies_nobody_gave_out_are_nobody(shop: Shop, cookie: str) -> None:
    """A visitor with an oversized, malformed or unknown cookie is served like any other."""
    reply = shop.visitor().ask("GET", "/account", {"Cookie": cookie})
    assert (reply.status, reply.headers["location"]) == (303, "/login")
    assert shop.visitor().ask("GET", "/product/7", {"Cookie": cookie}).status == 200


def test_of_two_sessions_in_one_request_neither_counts(shop: Shop) -> None:
    """Of two session cookies in one request neither counts, because one was planted."""
    ann, ben = shop.logged_in("ann"), shop.logged_in("ben")
    both = f"sid={ann.cookies['sid']}; sid={ben.cookies['sid']}"
    reply = shop.visitor().ask("GET", "/account", {"Cookie": both})
    assert reply.headers["location"] == "/login"


def test_nothing_a_visitor_writes_becomes_a_header(shop: Shop) -> None:
    """Line breaks in paths, queries, forms and the User-Agent never become a header."""
    breaks = "%0d%0aX-Injected:%20yes"
    browser = shop.visitor()
    replies: list[Reply] = [
        browser.get(f"/?brand={breaks}"),
        browser.get(f"/product/7{breaks}"),
        browser.get(f"/images?{breaks}"),
        browser.post("/login", name="a\r\nX-Injected: yes", password="b\r\nX-Injected: yes"),
        browser.post("/cart/7", extra="\r\nX-Injected: yes"),
    ]
    assert all("x-injected" not in reply.headers for reply in replies)
    assert all(reply.status < 500 for reply in replies)


def test_no_text_is_a_mistake_of_the_shop(shop: Shop) -> None:
    """Empty, long or invalid text in any input never causes a 500."""
    browser, admin = shop.visitor(), shop.logged_in("admin")
    for text in [
        "",
        "%20",
        "x" * 5_000,
        "%00",
        "%ff%fe",
        "%F0%9F%8D%8E",
        "%0a",
        "{id}",
        "a:b*?[c]",
    ]:
        assert browser.get(f"/?brand={text}").status < 500
        assert browser.get(f"/product/7{text}").status < 500
    for text in ["", "x" * 5_000, "\0", "\ud800", "ä"]:
        raw = text.encode(errors="surrogatepass").decode("latin-1")
        with shop.visitor() as guest:
            assert guest.post("/login", name=raw, password=raw).status == 403
        assert admin.post("/admin/sale", brand=raw, percent="1").status < 500
    for number in ["", "-1", "1.5", "²", "9" * 5_000]:
        assert admin.post("/admin/sale", brand="acme", percent=number).status == 400


def test_what_a_visitor_writes_is_shown_as_text(shop: Shop) -> None:
    """Tags in a product's name are shown as text."""
    admin = shop.logged_in("admin")
    admin.post("/admin/3", name="<script>alert(1)</script>", cents="510")
    page = admin.get("/product/3").text
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_only_the_admin_edits(shop: Shop) -> None:
    """Only the admin edits; others are redirected, invalid numbers are refused, and nothing changes."""
    before = shop.sql("SELECT * FROM products WHERE id = 2")
    assert shop.visitor().post("/admin/2", name="x", cents="1").headers["location"] == "/login"
    assert shop.logged_in("ann").post("/admin/2", name="x", cents="1").status == 403
    admin = shop.logged_in("admin")
    for cents in ["", "-1", "1.5", "²", "9" * 30, "' OR 1"]:
        assert admin.post("/admin/2", name="x", cents=cents).status == 400
    assert admin.post("/admin/2").status == 400
    assert admin.post("/admin/2222", name="x", cents="1").status == 404
    assert shop.sql("SELECT * FROM products WHERE id = 2") == before


def test_a_form_on_another_site_does_nothing(shop: Shop) -> None:
    """A form on another site, which the browser names, does nothing."""
    browser = shop.logged_in("ann")
    reply = browser.ask("POST", "/logout", {"Sec-Fetch-Site": "cross-site"})
    assert reply.status == 403
    assert browser.get("/account").status == 200


# Health


def test_health_knows_the_worker_and_beat(shop: Shop, two_roles: Settings, tmp_path: Path) -> None:
    """Health reports the worker, beat's ticks and a snapshot to operators, and nothing of them to others."""
    beat = shop.beat(tmp_path)
    try:
        with Stillroom(two_roles) as room:
            until(room.health.history, "a snapshot", within=30)

            def sees_both() -> bool:
                tasks = room.health.check().tasks
                return tasks is not None and tasks.workers == 1 and tasks.beat_s is not None

            until(sees_both, "the worker and beat in the report", within=30)
    finally:
        beat.kill()
    visitor, operator = shop.visitor(), {"Authorization": f"Bearer {HEALTH_TOKEN}"}
    assert visitor.get("/status").status == 401
    assert "redis.cache" not in visitor.get("/health").text
    assert "redis.cache" in visitor.get("/health", **operator).text
    assert visitor.get("/status", **operator).status == 200
    assert visitor.get("/health/ready").status == 200
