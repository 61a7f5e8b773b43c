"""Run the cache's suite on a real cluster of three nodes with the same fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom.embedded import EmbeddedServer
from stillroom.keys import Keys
from tests.support import cluster_fixtures
from tests.support.cluster import RedisCluster

shared_cluster, cluster = cluster_fixtures.shared_cluster, cluster_fixtures.cluster
shared_single_server = cluster_fixtures.shared_single_server
single_server = cluster_fixtures.single_server


HERE = Path(__file__).parent
OWN = {"test_shards.py", "test_unfit.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the suites of one server on one kind of cluster: without a cluster both kinds run them."""
    for item in items:
        if item.path.parent == HERE and item.path.name not in OWN:
            item.add_marker(pytest.mark.any_server)


@pytest.fixture
def state_server(single_server: EmbeddedServer) -> EmbeddedServer:
    return single_server


@pytest.fixture
def state_client(state_server: EmbeddedServer) -> Iterator[Any]:
    with redis.Redis.from_url(state_server.url) as client:
        yield client


@pytest.fixture
def server(cluster: RedisCluster) -> EmbeddedServer:
    """Return the node that has the cache's only shard."""
    return cluster.owner(Keys("stillroom", in_cluster=True).clock)


@pytest.fixture
def places(cluster: RedisCluster, state_server: EmbeddedServer) -> dict[str, Any]:
    return {"redis_url": state_server.url, "cache_url": cluster.url, "cluster": True}
