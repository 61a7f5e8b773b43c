"""The body of the refresh tasks works in this process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stillroom import RedisUnavailable, Settings
from stillroom.dispatch import RefreshOrder, RefreshOrders
from stillroom.embedded import EmbeddedServer
from stillroom_workers.app import make_app
from stillroom_workers.crew import Crew
from stillroom_workers.tasks import refresh


@pytest.fixture
def app(own_server: EmbeddedServer) -> Any:
    made = make_app(Settings(redis_url=own_server.url))

    @made.room.cache.cached("product:{id}", ttl=60)
    def product(id: int) -> int:
        return id

    yield made
    made.room.close()


def order(n: int) -> RefreshOrder:
    return RefreshOrder(loader="product", args={"id": n}, key=f"product:{n}", token="0" * 16)


@pytest.fixture
def refreshing(app: Any) -> refresh.Refreshing:
    """Return the body as in a worker with threads."""
    made = refresh.Refreshing(app)
    made._hands = Crew(4)
    return made


def open_breaker(app: Any) -> None:
    """Make Redis unreachable, and let the room know it."""
    for _ in range(10):
        with pytest.raises(RedisUnavailable):
            app.room.cache.invalidate("k")


def test_orders_wait_while_redis_is_away(
    app: Any, refreshing: refresh.Refreshing, own_server: EmbeddedServer
) -> None:
    """A worker keeps its orders while Redis is away and carries them out when it is back."""
    app.room.cache.get("k")
    own_server.kill()
    open_breaker(app)
    with ThreadPoolExecutor(2) as tasks:
        many = tasks.submit(refreshing.many, RefreshOrders(orders=[order(n) for n in range(25)]))
        one = tasks.submit(refreshing.one, order(30))
        time.sleep(2 * refresh.LOOK_AGAIN_S)
        assert not many.done()
        assert not one.done()
        own_server.restart()
        assert many.result(10) == {"outcomes": {"superseded": 25}}
        assert one.result(10)["outcome"] == "superseded"


def test_orders_do_not_wait_for_ever(
    app: Any,
    refreshing: refresh.Refreshing,
    own_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All orders of a message share one patience; then they fail, and a stale read orders again."""
    monkeypatch.setattr(refresh, "AWAY_S", 0.05)
    app.room.cache.get("k")
    own_server.kill()
    open_breaker(app)
    began = time.monotonic()
    message = RefreshOrders(orders=[order(n) for n in range(25)])
    assert refreshing.many(message) == {"outcomes": {"failed": 25}}
    assert time.monotonic() - began < 2
    with pytest.raises(RedisUnavailable):
        refreshing.one(order(30))
    own_server.restart()
