"""A cluster grows under load: nothing stale is read, no session comes back or is lost, and no quota is exceeded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stillroom import RedisUnavailable, Settings
from stillroom.embedded import EmbeddedServer
from stillroom.keys import HOUSE
from stillroom.wire import slot_of
from tests.conftest import SERVERS, binary_of
from tests.support.celery_process import until
from tests.support.cluster import NODES, RedisCluster
from tests.support.crowd import PATIENT
from tests.support.entries import Recording
from tests.support.faces import FACES, open_room
from tests.support.failing_over import History
from tests.support.growing import ENDED, Logins, Quotas
from tests.support.history import stale_reads

QUOTA = {True: 400, False: 150}  # in full, and in short
PAUSE_S = {True: 0.001, False: 0.01}  # of each thread between two calls
SLOTS_MOVED = {
    True: 1_000,
    False: 18,
}  # in full: each slot that has keys, for the half of the nodes


@pytest.fixture(params=SERVERS)
def shared_cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    """Start a cluster for one test, which will change it."""
    with RedisCluster(binary=binary_of(request)) as cluster:
        yield cluster


@pytest.fixture
def settings(cluster: RedisCluster, server: EmbeddedServer) -> Settings:
    """Return the settings of a process that has cache and state on the one cluster."""
    places: dict[str, Any] = {"redis_url": cluster.url, "cache_url": cluster.url}
    places |= {"broker_url": server.url, "cluster": True, "state_cluster": True, "shards": 4}
    return Settings(**PATIENT | places | {"session_shards": 8, "limits_strict_503": True})


def ours(cluster: RedisCluster, node: EmbeddedServer) -> list[int]:
    """Return the slots of a node that have keys, those of the counts first."""
    slots = {slot_of(key) for key in cluster.client(node).keys("*")}
    return sorted(slots, key=lambda slot: (slot != slot_of(HOUSE), slot))


def grow(cluster: RedisCluster, most: int) -> int:
    """Join as many nodes as there are, and give each of them half of an old one's used slots.

    Return how many slots were moved.
    """
    olds = list(cluster.nodes)
    moved = 0
    for old, new in zip(olds, cluster.join(len(olds)), strict=True):
        for slot in ours(cluster, old)[: most // len(olds)][::2]:
            cluster.reshard(slot, new)
            moved += 1
    return moved


@pytest.mark.parametrize(
    "full",
    [
        False,
        pytest.param(True, marks=[pytest.mark.full, pytest.mark.long, pytest.mark.timeout(300)]),
    ],
)
def test_three_nodes_become_six_under_load(
    cluster: RedisCluster, settings: Settings, capsys: pytest.CaptureFixture[str], *, full: bool
) -> None:
    """While slots of cache and state move to three new nodes all three histories hold."""
    places = settings.model_dump(exclude_defaults=True) | {"away_ttl": 0}
    pause_s = PAUSE_S[full]
    cache = History(settings.redis_url, pause_s=pause_s, **places)
    logins = Logins([settings] * 2, pause_s=pause_s)
    quotas = Quotas([settings] * 2, QUOTA[full], pause_s=pause_s)
    with cache, logins, quotas:
        cache.await_writes(10, 30)
        moved = grow(cluster, SLOTS_MOVED[full])
        cache.await_writes(10, 30)
        logins.read_again()
        quotas.spend_the_rest()
    with capsys.disabled():
        print(
            f"\n{moved} slots; cache: {len(cache.reads):,} reads, {cache.done:,} writes, {cache.refused} refused;"
            f" sessions: {len(logins.reads):,} reads, {logins.ends} ends, {logins.refused} refused; quotas:"
            f" {sum(quotas.admitted.values()):,} admitted, {dict(quotas.degraded)} refused"
        )
    assert stale_reads(cache.reads, cache.floors) == []
    assert stale_reads(logins.reads, logins.floors) == []
    assert logins.lost == []
    assert logins.ends > 0
    assert all(read.version < ENDED for read in logins.reads)
    assert max(quotas.admitted.values()) <= QUOTA[full]
    assert quotas.admitted_degraded == 0


@pytest.mark.parametrize("face", FACES)
def test_a_node_that_has_left_is_forgotten(
    cluster: RedisCluster, settings: Settings, face: str
) -> None:
    """A node gives its slots back and ends: calls go on, its outage is over, what waited is delivered."""
    with open_room(face, settings, Recording()) as room:
        names = [f"k:{number}" for number in range(24)]
        assert all(room.cache.set_many(dict.fromkeys(names, 1)).values())
        room.sessions.create("ann", {})
        (fresh,) = cluster.join(1)
        homes = {slot: node for node in cluster.nodes[:NODES] for slot in ours(cluster, node)}
        for slot in homes:
            cluster.reshard(slot, fresh)
        assert all(room.cache.set_many(dict.fromkeys(names, 2)).values())
        room.sessions.create("ann", {})
        for slot, home in homes.items():
            cluster.reshard(slot, home)
        cluster.leave(fresh)
        wires = (room.wire, getattr(room, "inner", room).state_wire)
        for wire in wires:
            breaker = wire.at(("127.0.0.1", fresh.port)).breaker
            while not breaker.is_open:
                breaker.failed(RedisUnavailable("refused", "it has ended"))
        room.cache.invalidate(names[0], defer=True)
        until(lambda: sessions_of(room, "ann") == 2, "the sessions to be found")
        until(lambda: room.cache.set(names[1], 3), "the cache to be written")
        for wire in wires:
            assert not wire.breaker.is_open
            assert len(wire.wires) == NODES
        until(lambda: breaker.down_since is None, "the outage to be over")
        assert room.cache.get_many(names).get(names[0]) is None


def sessions_of(room: Any, user: str) -> int:
    """Return how many sessions are found; -1 while a node does not answer."""
    try:
        return len(room.sessions.list_for_user(user))
    except RedisUnavailable:
        return -1
