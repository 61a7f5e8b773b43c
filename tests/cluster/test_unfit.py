"""A server that can't do what Stillroom asks of it is an error at the start, and never a silent admission."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from stillroom import AUTH, DEFAULT, Limit, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.cli.check import _online
from stillroom.cli.check_limits import InApp
from stillroom.cli.doctor import examined
from stillroom.embedded import EmbeddedServer
from stillroom.errors import FINAL
from tests.support.cluster import RedisCluster
from tests.support.crowd import PATIENT
from tests.support.entries import Recording
from tests.support.faces import FACES, open_room
from tests.support.proxy import Proxy

IP = "203.0.113.7"
BY_USER = Limit("by-user", 5, 300, by="user", away="strict")


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings_for(**places: Any) -> Settings:
    return Settings(**PATIENT | {"connect_attempts": 2, "connect_delay": 0.01} | places)


def blind(client: Any, *rights: str) -> str:
    """The name of a user who may not ask a server what it is."""
    client.execute_command(
        "ACL", "SETUSER", "blind", "on", "nopass", "~*", "&*", "+@all", "-info", *rights
    )
    return "blind:x"


def as_user(url: str, user: str) -> str:
    return url.replace("redis://", f"redis://{user}@")


@pytest.fixture
def blind_cluster(cluster: RedisCluster) -> Iterator[str]:
    """The URL of a cluster whose nodes do not say that they are in one."""
    for node in cluster.nodes:
        blind(cluster.client(node))
    yield as_user(cluster.url, "blind:x")
    for node in cluster.nodes:
        cluster.client(node).execute_command("ACL", "DELUSER", "blind")


# At the start


def test_a_cluster_for_the_state_is_refused_at_the_start(cluster: RedisCluster, face: str) -> None:
    """At the first attempt, with the setting, what was found there, and what to do."""
    with open_room(face, settings_for(redis_url=cluster.url), Recording()) as room:
        with pytest.raises(RedisUnavailable, match="node of a Redis Cluster") as error:
            room.connect()
    assert error.value.reason == "cluster"
    for word in ("REDIS_URL", "STILLROOM_CACHE_URL", "STILLROOM_CLUSTER=1"):
        assert word in str(error.value)


def test_a_cluster_for_the_cache_wants_its_setting(
    cluster: RedisCluster, state_server: EmbeddedServer, face: str
) -> None:
    """Without STILLROOM_CLUSTER the start says which setting is missing."""
    places = {"redis_url": state_server.url, "cache_url": cluster.url}
    with open_room(face, settings_for(**places), Recording()) as room:
        with pytest.raises(RedisUnavailable, match=r"STILLROOM_CACHE_URL.*STILLROOM_CLUSTER=1"):
            room.connect()


def test_a_cluster_that_does_not_say_so_is_found_out(
    blind_cluster: str, state_server: EmbeddedServer, face: str
) -> None:
    """Where the user may not ask for INFO, a script that does nothing is refused its keys."""
    for places in (
        {"redis_url": blind_cluster},
        {"redis_url": state_server.url, "cache_url": blind_cluster},
    ):
        with open_room(face, settings_for(**places), Recording()) as room:
            with pytest.raises(RedisUnavailable, match=r"slots|another node") as error:
                room.connect()
        assert error.value.reason in ("crossslot", "moved")
        assert "STILLROOM_CLUSTER=1" in str(error.value)


def test_a_cluster_with_its_setting_is_let_in(settings: Settings, face: str) -> None:
    """The cache on a cluster, and the state on a server of its own, start as before."""
    with open_room(face, settings, Recording()) as room:
        room.connect()
        assert room.cache.set("k", 1)
        assert room.limits.check({"ip": IP, "user": "ann"}, [DEFAULT, BY_USER]).degraded == ""


@pytest.mark.parametrize("gone", ["EVALSHA", "SCRIPT"])
def test_a_server_without_scripts_is_refused_at_the_start(gone: str, face: str) -> None:
    """A server without EVALSHA or SCRIPT LOAD, as behind some proxies, is refused at the start."""
    with EmbeddedServer(options={"rename-command": f'{gone} ""'}) as one:
        with open_room(face, settings_for(redis_url=one.url), Recording()) as room:
            with pytest.raises(RedisUnavailable, match=r"REDIS_URL.*EVALSHA") as error:
                room.connect()
            assert error.value.reason == "unsupported"
            assert refusals(room) == {"unsupported"}


@pytest.mark.parametrize("lacking", ["-evalsha", "-script", "resetkeys"])
def test_a_right_that_scripts_need_is_missed_at_the_start(
    state_server: EmbeddedServer, state_client: Any, lacking: str, face: str
) -> None:
    """A user without a right that scripts need is refused before the first request."""
    url = as_user(state_server.url, blind(state_client, lacking))
    try:
        with open_room(face, settings_for(redis_url=url), Recording()) as room:
            with pytest.raises(RedisUnavailable, match=r"REDIS_URL lacks a right") as error:
                room.connect()
            assert error.value.reason == "noperm"
    finally:
        state_client.execute_command("ACL", "DELUSER", "blind")


@pytest.mark.parametrize("version", [b"6.0.9", b"5.0.4", b"2.8.9"])
def test_an_old_server_is_refused(state_server: EmbeddedServer, version: bytes, face: str) -> None:
    """An old server is refused by its version, which each connection asks for, at the start and at every call."""
    with Proxy(state_server.port) as proxy:
        proxy.says = b"redis_version:7.2.4", b"redis_version:" + version
        with open_room(face, settings_for(redis_url=proxy.url), Recording()) as room:
            with pytest.raises(
                RedisUnavailable, match=r"older than Redis 6\.2.*Update it"
            ) as error:
                room.connect()
            assert error.value.reason == "old"
            assert version.decode() in str(error.value)
            assert refusals(room) == {"old"}


def test_doctor_and_check_say_what_to_do(cluster: RedisCluster, blind_cluster: str) -> None:
    """Both fail, and name the setting that would do."""
    for url in (cluster.url, blind_cluster):
        with Stillroom(settings_for(redis_url=url), dispatch=NoDispatch()) as room:
            for lines in (list(examined(room)), list(_online(room, InApp({}, [])))):
                said = [line.sentence for line in lines if line.status == "fail"]
                assert any("REDIS_URL leads to one server" in sentence for sentence in said)


# While it runs


def refusals(room: Any) -> set[str]:
    """Why AUTH was refused to twenty clients, each of whom tried once, none of whom was let in."""
    decisions = [room.limits.check(f"203.0.113.{n}", [AUTH]) for n in range(20)]
    assert not any(decisions)
    assert {one.status for one in decisions} == {503}
    return {one.degraded for one in decisions} - {"breaker"}


@pytest.mark.parametrize("is_blind", [False, True])
def test_no_mistake_admits_more_than_a_quota(
    cluster: RedisCluster, blind_cluster: str, face: str, *, is_blind: bool
) -> None:
    """A strict limit that a cluster can't count is refused, in each process, however many there are."""
    url = blind_cluster if is_blind else cluster.url
    with open_room(face, settings_for(redis_url=url), Recording()) as room:
        for _ in range(3):
            assert not room.limits.check({"ip": IP, "user": "ann"}, [AUTH, BY_USER])
        held = room.limits.reserve({"ip": IP, "user": "ann"}, [AUTH, BY_USER])
        assert not held.decision
        (degraded,) = [one for one in room.health.check().advice if one.code == "degraded"]
        assert "REDIS_URL leads to one server" in degraded.todo


def test_what_is_not_strict_is_counted_here(blind_cluster: str, face: str) -> None:
    """DEFAULT admits this process's share, and no more, and each decision says why."""
    limits = [DEFAULT, Limit("u", 100, 60, by="user")]
    with open_room(face, settings_for(redis_url=blind_cluster), Recording()) as room:
        decisions = [room.limits.check({"ip": IP, "user": "ann"}, limits) for _ in range(120)]
    assert sum(map(bool, decisions)) == 100
    assert {one.degraded for one in decisions} <= {"crossslot", "moved"}


@pytest.mark.parametrize("right", ["evalsha", "set"], ids=["the script", "inside of it"])
def test_a_right_that_is_taken_away_is_a_finding_at_once(
    state_server: EmbeddedServer,
    state_client: Any,
    face: str,
    right: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The finding comes at once, before the minute's counts. It ends a minute after the last such decision."""
    url = as_user(state_server.url, blind(state_client))
    try:
        with open_room(face, settings_for(redis_url=url), Recording()) as room:
            room.connect()
            assert room.limits.check(IP, [AUTH])
            assert codes(room).isdisjoint({"degraded"})
            blind(state_client, f"-{right}")
            assert not room.limits.check(IP, [AUTH])
            assert "degraded" in codes(room)
            blind(state_client, f"+{right}")
            assert room.limits.check(IP, [AUTH])
            now = time.monotonic
            monkeypatch.setattr(time, "monotonic", lambda: now() + 61)
            assert room.state_stats.mistake is None
    finally:
        state_client.execute_command("ACL", "DELUSER", "blind")


def codes(room: Any) -> set[str]:
    return {one.code for one in room.health.check().advice}


def test_a_flushed_script_is_no_mistake(
    state_server: EmbeddedServer, state_client: Any, face: str
) -> None:
    """Scripts that a restart has lost are loaded again: a strict limit goes on, and nothing is found."""
    with open_room(face, settings_for(redis_url=state_server.url), Recording()) as room:
        for _ in range(3):
            state_client.script_flush()
            assert room.limits.check(IP, [AUTH]).degraded == ""
        assert codes(room).isdisjoint({"degraded"})


def test_what_may_pass_is_deferred() -> None:
    """A slot on its way, and a script that is loaded for the next call, do not make an invalidation impossible."""
    assert not {"moved", "ask", "noscript", "tryagain", "clusterdown", "readonly"} & FINAL
