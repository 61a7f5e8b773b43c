"""Where the cache is a Redis Cluster, health adds its shards up and one node speaks for the servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stillroom import NoDispatch, Settings
from stillroom.cache import shard_keys
from stillroom.embedded import EmbeddedServer
from tests.support.cluster import RedisCluster
from tests.support.crowd import PATIENT
from tests.support.faces import open_room


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture(params=["sync", "async"])
def room(
    request: pytest.FixtureRequest, cluster: RedisCluster, server: EmbeddedServer
) -> Iterator[Any]:
    cluster.flush()
    own = {"redis_url": server.url, "cache_url": cluster.url, "cluster": True, "shards": 4}
    settings = Settings(**own | PATIENT)
    with open_room(request.param, settings, NoDispatch()) as room:
        yield room


def test_shards_are_added_up(room: Any, cluster: RedisCluster) -> None:
    """The report adds up the counts and the waiting work of all shards, and shows two servers by their roles."""
    for n in range(20):
        room.cache.get(f"missing:{n}")
    room.cache.invalidate_by_tag("t")
    room.stats.due = 0.0
    room.health.check()
    report = room.health.check()
    assert [server.name for server in report.servers] == ["redis.cache", "redis.state"]
    assert all(server.connection.is_up for server in report.servers), report.servers
    assert report.totals["misses"] == 20
    todo = [keys.todo for keys in shard_keys(room.settings)]
    waiting = [cluster.client(cluster.owner(key)).zcard(key) for key in todo]
    assert min(waiting) > 0
    assert report.tasks.todo == sum(waiting)
    assert report.cache.misses == 0
    assert report.servers[0].redis.memory.used > 0
    room.health.seen("celery@one")
    assert room.health.snapshot().error is None
