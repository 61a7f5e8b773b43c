"""Run one shop for all stories: two processes with threads, a worker, Redis in its two roles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stillroom import Settings
from stillroom.embedded import EmbeddedServer
from tests.support.crowd import PATIENT
from tests.support.shop import Shop, open_shop

LFU = {"maxmemory": "64mb", "maxmemory-policy": "allkeys-lfu"}


@pytest.fixture(scope="session")
def two_roles() -> Iterator[Settings]:
    """Start one server that may evict and one that may not."""
    with EmbeddedServer(options=LFU) as cache, EmbeddedServer() as state:
        yield Settings(**{"redis_url": state.url, "cache_url": cache.url} | PATIENT)


@pytest.fixture(scope="session")
def shared_shop(two_roles: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    with open_shop("threads", two_roles, folder, STILLROOM_TTL="1") as shop:
        worker = shop.worker(folder)
        yield shop
        worker.kill()


@pytest.fixture
def shop(shared_shop: Shop) -> Iterator[Shop]:
    yield shared_shop
    shared_shop.close_browsers()
