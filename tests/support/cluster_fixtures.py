"""Fixtures of a cluster of three nodes, for the suites that run on one. Each of these has a cluster of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import redis
from stillroom.embedded import EmbeddedServer
from tests.conftest import SERVERS, binary_of
from tests.support.cluster import RedisCluster


@pytest.fixture(scope="session", params=SERVERS)
def shared_cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    """Start one cluster of each kind of server."""
    with RedisCluster(binary=binary_of(request)) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    """Return a cluster without data."""
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture(scope="session")
def shared_single_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def single_server(shared_single_server: EmbeddedServer) -> EmbeddedServer:
    """Return the server without data for what the cluster is not for."""
    with redis.Redis.from_url(shared_single_server.url) as client:
        client.flushall()
    return shared_single_server
