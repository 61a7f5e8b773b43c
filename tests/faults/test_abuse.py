"""While Redis is away, frozen or full no request fails because of abuse, and no ban is lost or doubled."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.abuse import CLIENT, abandon, ban_of, make_group, pending, put
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.faces import open_room
from tests.support.proxy import Proxy

PEPPER = "a-pepper-for-tests-long-enough-to-be-one"


@pytest.fixture(params=["sync", "async"])
def own_room(
    request: pytest.FixtureRequest, own_server: EmbeddedServer, rules: Path
) -> Iterator[Any]:
    settings = Settings(redis_url=own_server.url, session_peppers=PEPPER, abuse_rules=rules)
    with open_room(request.param, settings, NoDispatch()) as room:
        yield room


@pytest.fixture(params=["sync", "async"])
def patient_room(
    request: pytest.FixtureRequest, own_server: EmbeddedServer, rules: Path
) -> Iterator[Any]:
    """Return a room for what is not about deadlines."""
    settings = Settings(**PATIENT | {"redis_url": own_server.url, "abuse_rules": rules})
    with open_room(request.param, settings, NoDispatch()) as room:
        yield room


@pytest.fixture
def db(own_server: EmbeddedServer) -> Iterator[Any]:
    with redis.Redis.from_url(own_server.url) as client:
        yield client


def test_a_report_never_fails_because_redis_is_away(
    own_room: Any, own_server: EmbeddedServer, caplog: Any
) -> None:
    """When Redis is away a report returns False, is counted and logged once; operators' and workers'
    calls raise.
    """
    assert own_room.abuse.report("auth_fail", ip=CLIENT) is True
    own_server.kill()
    started = time.monotonic()
    told = [own_room.abuse.report("auth_fail", ip=CLIENT) for _ in range(100)]
    assert time.monotonic() - started < 2
    assert not any(told)
    assert own_room.state_stats.counts["abuse_dropped"] == 100
    assert sum("events of abuse are lost" in r.getMessage() for r in caplog.records) <= 3
    for act in (
        own_room.abuse.scan,
        own_room.abuse.bans,
        lambda: own_room.abuse.ban(CLIENT, 60),
        lambda: own_room.abuse.lift(CLIENT),
    ):
        with pytest.raises(RedisUnavailable):
            act()
    assert own_room.abuse.deliver() == 0
    own_server.restart()
    until(lambda: own_room.abuse.report("auth_fail", ip=CLIENT), "recovery")


def test_a_frozen_redis_costs_a_report_its_deadline(
    own_room: Any, own_server: EmbeddedServer
) -> None:
    """A report to a frozen Redis ends after a tenth of a second without knowing whether it will be written."""
    own_room.abuse.report("auth_fail", ip=CLIENT)
    own_server.freeze()
    started = time.monotonic()
    assert own_room.abuse.report("auth_fail", ip=CLIENT) is None
    assert time.monotonic() - started < 1
    own_server.thaw()


def test_a_full_redis_drops_events_and_still_bans(patient_room: Any, db: Any, caplog: Any) -> None:
    """A full Redis drops new events, and the worker still judges the stream, bans and lifts."""
    caplog.set_level(logging.CRITICAL)
    for n in range(25):
        put(db, patient_room, "not_found", ip=CLIENT, route=f"/{n}")
        db.xadd(patient_room.keys.abuse, {"kind": "no kind"})
    make_group(db, patient_room)
    db.config_set("maxmemory", 1)
    try:
        assert patient_room.abuse.report("auth_fail", ip=CLIENT) is False
        assert patient_room.abuse.scan()["bans"] == 1
        assert ban_of(db, patient_room)["rule"] == "scanner"
        assert pending(db, patient_room) == 0
        assert patient_room.abuse.ban("203.0.113.77", 60).by == "operator"
        assert patient_room.abuse.lift(CLIENT) is True
    finally:
        db.config_set("maxmemory", 0)
    assert patient_room.abuse.report("auth_fail", ip=CLIENT) is True


def test_a_scan_that_redis_left_in_the_middle_is_finished(
    own_room: Any, own_server: EmbeddedServer
) -> None:
    """A scan that Redis' death interrupted is finished a minute after the restart."""
    with redis.Redis.from_url(own_server.url) as client:
        name = put(client, own_room, "denied", ip=CLIENT, n="64")
        client.xgroup_create(own_room.keys.abuse, "workers", "0")
        client.xreadgroup("workers", "worker", {own_room.keys.abuse: ">"})
    own_server.kill()
    with pytest.raises(RedisUnavailable):
        own_room.abuse.scan()
    own_server.restart()
    with redis.Redis.from_url(own_server.url) as client:
        until(lambda: not own_room.wire.breaker.is_open, "recovery")
        abandon(client, own_room, [name])
        assert own_room.abuse.scan()["bans"] == 1
        assert ban_of(client, own_room)["level"] == 0


def test_a_report_whose_answer_is_late_is_neither_written_nor_lost(
    proxy: Proxy, client: Any
) -> None:
    """A report with a late answer returns None: it will be written, and sending it again would count it twice."""
    brisk = {"command_timeout": 0.2, "call_timeout": 0.3, "session_peppers": PEPPER}
    with Stillroom(Settings(redis_url=proxy.url, **brisk), dispatch=NoDispatch()) as room:
        assert room.abuse.report("auth_fail", ip=CLIENT) is True
        proxy.hold_requests()
        assert room.abuse.report("auth_fail", ip=CLIENT) is None
        proxy.let_go()
        until(lambda: client.xlen(room.keys.abuse) == 2, "the event")
        room.wire.breaker.is_open = True
        assert room.abuse.report("auth_fail", ip=CLIENT) is False
        room.wire.breaker.is_open = False
