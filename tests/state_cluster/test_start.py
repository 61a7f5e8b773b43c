"""The setting for a cluster, and what is refused with it and without it."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from stillroom import (
    AUTH,
    DEFAULT,
    NoDispatch,
    RedisUnavailable,
    Settings,
    SettingsError,
    Stillroom,
)
from stillroom.cli.check import _online
from stillroom.cli.check_limits import InApp
from stillroom.cli.doctor import examined
from stillroom.embedded import EmbeddedServer
from stillroom.errors import InvalidArgument
from stillroom.keys import HOUSE
from stillroom.testing import Clock
from tests.support.cluster import HURRIED, RedisCluster
from tests.support.crowd import PATIENT
from tests.support.entries import Recording
from tests.support.faces import FACES, open_room

NODE, CACHE, BROKER = "redis://node:6379", "redis://cache:6379", "redis://broker:6379"


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"redis_url": NODE}, "set STILLROOM_CACHE_URL"),
        ({"redis_url": NODE, "cache_url": NODE, "broker_url": BROKER}, "STILLROOM_CLUSTER=1"),
        ({"redis_url": NODE, "cache_url": CACHE}, "needs STILLROOM_BROKER_URL"),
        ({"redis_url": f"{NODE}/1", "cache_url": CACHE, "broker_url": BROKER}, "no database but 0"),
        (
            {"redis_url": "redis+sentinel://a:1/m", "cache_url": CACHE, "broker_url": BROKER},
            "no Sentinels",
        ),
    ],
)
def test_what_a_cluster_needs_is_said_when_it_is_set(places: dict[str, str], said: str) -> None:
    """A setting that is missing beside STILLROOM_STATE_CLUSTER, or contradicts it, is an error that names it."""
    with pytest.raises((ValueError, SettingsError), match=said):
        Settings(**places, state_cluster=True)


def test_both_roles_may_be_on_one_cluster(cluster: RedisCluster, server: EmbeddedServer) -> None:
    """Cache and state work on the same cluster, each with its setting."""
    places = {"redis_url": cluster.url, "cache_url": cluster.url, "broker_url": server.url}
    settings = Settings(**PATIENT | places | {"cluster": True, "state_cluster": True, "shards": 3})
    with Stillroom(settings, dispatch=Recording()) as room:
        room.connect()
        assert room.cache.set("k", 1, tags=["t"])
        assert room.cache.get("k") == 1
        room.cache.invalidate_by_tag("t")
        assert room.cache.get("k") is None
        session = room.sessions.create("ann", {"n": 1})
        assert room.sessions.get(session.token).data == {"n": 1}
        assert room.limits.check({"ip": "203.0.113.7", "user": "ann"}, [AUTH, DEFAULT])
        assert all(server.connection.is_up for server in room.health.check().servers)


@pytest.mark.parametrize("face", FACES)
def test_a_server_in_no_cluster_is_refused(server: EmbeddedServer, face: str) -> None:
    """With the setting, a server that is in no cluster is an error at the first attempt, with what to do."""
    places = {"redis_url": server.url, "cache_url": server.url.replace("127.0.0.1", "localhost")}
    given = places | {"broker_url": server.url, "state_cluster": True, "connect_delay": 0.01}
    with open_room(face, Settings(**PATIENT | given), Recording()) as room:
        with pytest.raises(RedisUnavailable, match=r"REDIS_URL is in no Redis Cluster") as error:
            room.connect()
        assert error.value.reason == "nocluster"
        assert "STILLROOM_STATE_CLUSTER" in str(error.value)


@pytest.mark.parametrize("face", FACES)
def test_a_node_that_is_away_is_not_called_the_address_of_the_setting(
    settings: Settings, cluster: RedisCluster, face: str
) -> None:
    """Where a node other than that of the setting is away, the error says so, and the command that names it."""
    given = Settings(**settings.model_dump() | HURRIED | {"connect_attempts": 1})
    with cluster.frozen(cluster.nodes[1]), open_room(face, given, Recording()) as room:
        with pytest.raises(RedisUnavailable, match="a node of the cluster in REDIS_URL") as error:
            room.connect()
    assert "stillroom health" in str(error.value)


@pytest.mark.parametrize("face", FACES)
def test_connect_reaches_each_node(settings: Settings, cluster: RedisCluster, face: str) -> None:
    """connect() says so where one node does not answer."""
    given = settings.model_dump() | HURRIED | {"connect_attempts": 1}
    with open_room(face, Settings(**given), Recording()) as room:
        room.connect()
        with cluster.frozen(cluster.nodes[1]), pytest.raises(RedisUnavailable):
            room.connect()


def test_check_and_doctor_accept_the_setting(settings: Settings) -> None:
    """Neither finds anything that fails."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        lines = [*examined(room), *_online(room, InApp({}, []))]
    assert [line.sentence for line in lines if line.status == "fail"] == []
    assert {"rights to sessions", "rights to limits", "rights to abuse"} <= {
        line.about for line in lines
    }


def test_a_test_s_clock_says_that_it_can_not(settings: Settings) -> None:
    """Time that a test moves by hand is one server's."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        with pytest.raises(InvalidArgument, match="on a cluster"):
            Clock(room).advance(1)


def test_upkeep_runs_on_a_cluster(room: Any) -> None:
    """What the schedule asks of workers works: the sweep, the events, snapshots, orders and the signs of life."""
    room.connect()
    session = room.sessions.create("ann", {"n": 1}, tags=["t"])
    assert room.upkeep.sweep_sessions()["done"]
    assert room.upkeep.scan_abuse()["done"]
    assert room.upkeep.snapshot().error is None
    assert room.upkeep.reclaim()["done"] >= 0
    room.upkeep.record_tick("stillroom.log_abuse")
    room.upkeep.record_heartbeat("worker@here")
    room.upkeep.pause("refresh", 60, "ann")
    assert room.health.check().tasks.workers == 1
    assert room.health.history(1)
    assert room.sessions.destroy_by_tag("t") == 1
    assert room.sessions.get(session.token) is None


def test_a_command_begins_while_a_node_is_away(settings: Settings, cluster: RedisCluster) -> None:
    """A command begins though a node is away, and lists bans, which other nodes have; it does not where all are."""
    given = Settings(**settings.model_dump() | HURRIED | {"connect_attempts": 1})
    away = next(node for node in cluster.nodes[1:] if node is not cluster.owner(HOUSE))
    with Stillroom(given, dispatch=NoDispatch()) as room:
        room.abuse.ban("203.0.113.7", seconds=60)
    with Stillroom(given, dispatch=NoDispatch()) as room, cluster.frozen(away):
        room.connect_state()
        assert [ban.subject for ban in room.abuse.bans()] == ["203.0.113.7"]
    with Stillroom(given, dispatch=NoDispatch()) as room, cluster.frozen(*cluster.nodes):
        with pytest.raises(RedisUnavailable):
            room.connect_state()


@pytest.mark.parametrize("face", FACES)
def test_a_name_of_several_nodes_starts_a_process_while_one_is_away(
    settings: Settings, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch, face: str
) -> None:
    """Where the host in the setting is a name of several nodes, a process starts while one of them is away."""
    look_up, name = socket.getaddrinfo, "nodes.internal"
    port = urlsplit(settings.redis_url).port

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        if host not in (name, name.encode()):
            return look_up(host, *args, **options)
        found = [look_up(address, *args, **options) for address in ("127.0.0.9", "127.0.0.1")]
        return [one for answers in found for one in answers]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    given = settings.model_dump() | {"redis_url": f"redis://{name}:{port}", "connect_attempts": 1}
    with open_room(face, Settings(**given), Recording()) as room:
        room.connect()
        session = room.sessions.create("ann", {"n": 1})
        assert room.sessions.get(session.token).data == {"n": 1}
