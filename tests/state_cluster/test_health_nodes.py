"""Health describes each node of a cluster, and one that is away costs the others nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from redis.exceptions import ResponseError
from typer.testing import CliRunner

from stillroom import AUTH, Limit, NoDispatch, Settings
from stillroom.cli import app
from stillroom.embedded import EmbeddedServer
from stillroom.health import rfc
from stillroom.health.advice import advise
from stillroom.health.findings import SLOTS
from stillroom.health.metrics import exposition
from stillroom.health.report import each_server
from stillroom.keys import HOUSE, Keys
from stillroom.web.status.tiles import tiles
from tests.support.cluster import RedisCluster
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room


@pytest.fixture
def cluster() -> Iterator[RedisCluster]:
    """Return a cluster of this test's own, which serves what it has left when a node is gone."""
    with RedisCluster() as cluster:
        for node in cluster.nodes:
            cluster.client(node).config_set("cluster-require-full-coverage", "no")
        yield cluster


@pytest.fixture(params=FACES)
def room(request: pytest.FixtureRequest, places: dict[str, Any]) -> Iterator[Any]:
    settings = Settings(**PATIENT | places | {"health_timeout": 2})
    with open_room(request.param, settings, dispatch=NoDispatch()) as room:
        yield room


def addresses(cluster: RedisCluster) -> set[str]:
    return {f"redis.state@127.0.0.1:{node.port}" for node in cluster.nodes}


def state_of(report: Any) -> Any:
    return next(server for server in report.servers if server.name == "redis.state")


def test_each_node_is_described(room: Any, cluster: RedisCluster) -> None:
    """The report names each node, with its memory, clients, operations, slots and clock."""
    report = room.health.check()
    state = state_of(report)
    assert {node.name for node in state.nodes} == addresses(cluster)
    for node in state.nodes:
        assert node.connection.is_up
        assert node.connection.latency_ms is not None
        assert node.redis.role == "master"
        assert node.redis.memory.used > 0
        assert node.redis.clients.connected > 0
        assert node.redis.operations.per_s is not None
        assert abs(node.ahead_s) < 1
    assert state.slots == sum(node.slots for node in state.nodes) == SLOTS
    assert len(list(each_server(report.servers))) == 1 + len(cluster.nodes)
    details = rfc.details_json(report, 0.0).decode()
    told = exposition(report, 0.0).decode()
    others = [node.name for node in state.nodes if node.redis.run_id != state.redis.run_id]
    assert len(others) == 2
    for name in others:
        assert f'"{name}:memory"' in details
        assert f'stillroom_redis_up{{server="{name}"}} 1' in told
    assert '"redis.state:slots"' in details


def test_a_node_that_is_away_is_a_finding_and_no_more(room: Any, cluster: RedisCluster) -> None:
    """With a node lost the report has a finding that names it, describes the others, and the snapshot is kept."""
    room.health.check()
    home = cluster.owner(HOUSE)
    lost = next(node for node in cluster.nodes if node is not home)
    lost.kill()
    report = room.health.check()
    state = state_of(report)
    name = f"redis.state@127.0.0.1:{lost.port}"
    assert state.connection.is_up
    assert state.redis is not None
    assert [node.name for node in state.nodes if not node.connection.is_up] == [name]
    assert [found.name for found in report.advice if found.severity == "fail"] == [
        f"{name}:connection away"
    ]
    assert report.status == "fail"
    assert "state: 2 of 3 nodes answer" in [line for tile in tiles(report) for line in tile.facts]
    snapshot = room.health.snapshot()
    assert snapshot.error is None
    assert f"{name}:connection away" in snapshot.findings
    (kept,) = room.health.history()
    assert kept.findings == snapshot.findings
    assert all(server.nodes == () for server in kept.servers)


def test_the_node_that_stands_for_all_may_be_away(room: Any, cluster: RedisCluster) -> None:
    """With the node of what there is one of lost, the report says so and describes the others."""
    room.health.check()
    cluster.owner(HOUSE).kill()
    report = room.health.check()
    state = state_of(report)
    assert not state.connection.is_up
    assert sum(node.connection.is_up for node in state.nodes) == 2
    assert report.status == "fail"


def test_a_frozen_node_costs_a_bounded_time(room: Any, cluster: RedisCluster) -> None:
    """A check takes no longer than its timeout with a frozen node, and describes the others."""
    room.health.check()
    home = cluster.owner(HOUSE)
    frozen = next(node for node in cluster.nodes if node is not home)
    frozen.freeze()
    try:
        report = room.health.check()
    finally:
        frozen.thaw()
    assert report.took_ms < 2_500
    away = [node for node in state_of(report).nodes if not node.connection.is_up]
    assert [node.name for node in away] == [f"redis.state@127.0.0.1:{frozen.port}"]
    assert away[0].connection.error == "timeout"


@pytest.mark.parametrize("face", FACES)
def test_a_frozen_node_leaves_the_other_servers_their_time(
    places: dict[str, Any], cluster: RedisCluster, face: str
) -> None:
    """A node of the state that takes all the time of a command keeps no check from asking the cache's server."""
    times = {"health_timeout": 2, "command_timeout": 1, "connect_timeout": 1, "call_timeout": 1.5}
    frozen = next(node for node in cluster.nodes if node is not cluster.owner(HOUSE))
    with open_room(face, Settings(**PATIENT | places | times), dispatch=NoDispatch()) as room:
        room.sessions.create(user_id="ann")  # so that it knows where the slots are
        frozen.freeze()
        try:
            report = room.health.check()
        finally:
            frozen.thaw()
    (cache,) = [server for server in report.servers if server.name == "redis.cache"]
    assert cache.connection.is_up
    failures = [found.component for found in report.advice if found.severity == "fail"]
    assert failures == [f"redis.state@127.0.0.1:{frozen.port}:connection"]
    assert report.took_ms < 2_500


def test_a_policy_of_any_node_is_a_finding(room: Any, cluster: RedisCluster) -> None:
    """A node that may throw sessions away is a finding of that node, whichever it is."""
    for node in cluster.nodes:
        cluster.client(node).config_set("maxmemory-policy", "allkeys-lru")
    found = [one.component for one in room.health.check().advice if one.code == "policy"]
    home = cluster.owner(HOUSE)
    others = addresses(cluster) - {f"redis.state@127.0.0.1:{home.port}"}
    assert set(found) == {"redis.state:memory", *(f"{name}:memory" for name in others)}


def test_what_any_node_throws_away_is_a_finding(room: Any, cluster: RedisCluster) -> None:
    """Keys that a node throws away for want of memory are a failure, whichever node it is."""
    room.upkeep.snapshot()
    home = cluster.owner(HOUSE)
    node = next(node for node in cluster.nodes if node is not home)
    names = (b"{k%d}" % number for number in range(10_000))
    mine = [name for name in names if cluster.owner(name) is node][:200]
    client = cluster.client(node)
    client.config_set("maxmemory-policy", "volatile-lru")
    for name in mine:
        client.set(name, b"x" * 5_000, ex=1_000)
    client.config_set("maxmemory", "1mb")
    with contextlib.suppress(ResponseError):
        client.set(mine[0], b"y", ex=1_000)
    client.config_set("maxmemory", "0")
    found = {
        one.component: one.code for one in room.health.check().advice if one.severity == "fail"
    }
    assert found == {f"redis.state@127.0.0.1:{node.port}:memory": "evictions"}
    (kept,) = room.health.history()
    assert all(server.nodes == () for server in kept.servers)


def test_slots_without_a_node_and_clocks_apart_are_findings(
    room: Any, cluster: RedisCluster
) -> None:
    """Slots that no node has, and clocks that are a second apart, are findings."""
    report = room.health.check()
    state = state_of(report)
    first, *rest = state.nodes
    apart = (first.model_copy(update={"ahead_s": 1.5}), *rest)
    worse = state.model_copy(update={"slots": SLOTS - 3, "nodes": apart})
    found = {one.code: one for one in advise(report.model_copy(update={"servers": (worse,)}))}
    assert found["slots"].severity == "fail"
    assert "3 of 16,384" in found["slots"].what
    assert found["clocks"].severity == "warn"
    assert first.name.partition("@")[2] in found["clocks"].what
    assert not {"slots", "clocks"} & {one.code for one in report.advice}


@pytest.mark.parametrize("command", ["doctor", "health"])
def test_commands_show_each_node(
    command: str, cluster: RedisCluster, server: EmbeddedServer
) -> None:
    """`stillroom doctor` and `stillroom health` name each node."""
    told = {"REDIS_URL": cluster.url, "STILLROOM_STATE_CLUSTER": "1"}
    told |= {"STILLROOM_CACHE_URL": server.url, "STILLROOM_BROKER_URL": server.url}
    said = CliRunner().invoke(app, [command], env=told).output
    home = cluster.owner(HOUSE)
    for node in cluster.nodes:
        assert node is home or f"redis.state@127.0.0.1:{node.port}" in said, said


def test_one_node_with_the_wrong_rights_admits_no_login(room: Any, cluster: RedisCluster) -> None:
    """A node that refuses its scripts is a mistake: strict limits there answer 503, and health says so at once."""
    keys = Keys("stillroom", state_in_cluster=True)
    home = cluster.owner(HOUSE)
    wrong = next(node for node in cluster.nodes if node is not home)
    by_user = Limit("by-user", 5, 300, by="user", away="strict")
    ips = [f"198.51.100.{n}" for n in range(64)]
    there = [ip for ip in ips if cluster.owner(keys.home("ip", ip)) is wrong]
    elsewhere = [ip for ip in ips if ip not in there]
    assert room.limits.check(elsewhere[0], [AUTH])
    assert "degraded" not in {one.code for one in room.health.check().advice}
    cluster.client(wrong).execute_command("ACL", "SETUSER", "default", "-evalsha")
    statuses = [room.limits.check(there[0], [AUTH]).status for _ in range(10)]
    assert statuses == [503] * 10
    found = {one.code: one for one in room.health.check().advice}
    assert "noperm" in found["degraded"].what
    both = [
        room.limits.check({"ip": there[1], "user": f"u{n}"}, [AUTH, by_user]) for n in range(10)
    ]
    assert not any(both)
    assert room.limits.check(elsewhere[1], [AUTH])
