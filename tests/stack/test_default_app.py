"""The app that the stack serves until yours takes its place, as a process: pages, and what operators look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shop.demo.browser import Browser
from stillroom.embedded import EmbeddedServer, free_port
from stillroom.leash import Leashed
from tests.support.celery_process import until

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
TOKEN = "a-token-for-operators"
BEARER = {"Authorization": f"Bearer {TOKEN}", "X-Forwarded-For": "192.0.2.1"}


@pytest.fixture
def shop(own_server: EmbeddedServer) -> Iterator[Callable[..., Any]]:
    """A visitor of the app."""
    port = free_port()
    environment = os.environ | {
        "REDIS_URL": own_server.url,
        "STILLROOM_HEALTH_TOKEN": TOKEN,
        "PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(DEPLOY), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-m", "shop"]
    served = Leashed(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        with Browser(port) as browser:
            until(lambda: browser.finds("/health/live"), "the app")
            yield browser.ask
    finally:
        served.kill()


def test_operators_see_how_it_is(shop: Callable[..., Any]) -> None:
    """The token opens the page, the metrics and the details, through a proxy too; nobody else sees them."""
    assert shop("GET", "/product/7").status == 200
    assert "stillroom_health" in shop("GET", "/metrics", BEARER).text
    assert '"checks"' in shop("GET", "/health", BEARER).text
    page = shop("GET", "/status?for=1h", BEARER)
    assert page.status == 200
    assert "<h1" in page.text
    stranger = {"X-Forwarded-For": "192.0.2.1"}
    assert shop("GET", "/status", stranger).status == 401
    assert shop("GET", "/metrics", stranger).status == 401
    assert '"checks"' not in shop("GET", "/health", stranger).text


def test_pages_are_served_over_one_connection(shop: Callable[..., Any]) -> None:
    """Each answer has its length, whatever the path and the body of the request are."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    token = shop("POST", "/login", form, "a=1&b=2")
    assert token.status == 201
    assert shop("GET", "/me", {"X-Session": token.text.strip('"')}).text == '"u1"'
    assert shop("GET", "/me", {"X-Session": "nobody's"}).status == 401
    assert shop("POST", "/product/7").status == 202
    for path in ("/", "/product", "/product/x", "/product/7/8", "/%00%ff", "/product/%37"):
        assert shop("GET", path).status == (200 if path == "/product/%37" else 404)
    assert shop("HEAD", "/health/live").status == 200


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Length": "70000"}, "x" * 70_000),
        ({"Content-Length": "-1"}, ""),
        ({"Content-Length": "\u00b2"}, ""),
        ({"Transfer-Encoding": "chunked"}, "0\r\n\r\n"),
    ],
)
def test_a_body_that_is_not_read_is_no_next_request(
    shop: Callable[..., Any], headers: dict[str, str], body: str
) -> None:
    """The connection ends where a body is not read to its end: a proxy sends other visitors' requests on it."""
    reply = shop("POST", "/product/7", headers, body)
    assert (reply.status, reply.headers["connection"]) == (413, "close")


def test_no_path_takes_all_memory(shop: Callable[..., Any]) -> None:
    """A number that no product has is no page, and an order of very many is one of a hundred."""
    for path in ("/order/-7", "/order/7-", f"/order/{'9' * 5_000}", f"/product/{'9' * 5_000}"):
        assert shop("POST", path).status == 404
    assert shop("POST", "/order/0-999999999").status == 202
    assert shop("HEAD", "/product/7").status == 200
    assert shop("GET", "/product/7").status == 200
