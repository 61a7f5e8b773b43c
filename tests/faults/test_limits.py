"""While Redis is away, slow, read-only or full each class of limits does what it says."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import redis
from stillroom import (
    AUTH,
    DEFAULT,
    STATIC,
    AsyncStillroom,
    Limit,
    NoDispatch,
    RedisUnavailable,
    Settings,
    Stillroom,
)
from stillroom.embedded import EmbeddedServer
from stillroom.limits.request import Request
from stillroom.scripts import Script, limit_settle
from tests.support.bounded import assert_bounded
from tests.support.celery_process import until
from tests.support.clocked import misjudge
from tests.support.faces import opening_rooms
from tests.support.limits import forget_denials
from tests.support.proxy import Proxy

IP = "203.0.113.7"
# A busy machine is no reason to give up, but where giving up is what a test is about.
CALM = {
    "connect_timeout": 2.0,
    "command_timeout": 2.0,
    "call_timeout": 3.0,
    "session_peppers": "p" * 32,
}
BRISK = {"connect_timeout": 0.1, "command_timeout": 0.1, "call_timeout": 0.15}
Make = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest, own_server: EmbeddedServer) -> Iterator[Make]:
    """Return a function that makes rooms on a server of the test's own, with either face."""
    with opening_rooms(**{"redis_url": own_server.url} | CALM) as make:
        yield partial(make, request.param)


def admitted(room: Any, limit: Limit, tries: int, ip: str = IP) -> int:
    count = 0
    for _ in range(tries):
        forget_denials(room)
        count += bool(room.limits.check(ip, [limit]))
    return count


def remaining(server: EmbeddedServer, limit: Limit, ip: str = IP) -> int:
    """Return what another process, without memory of its own, sees remaining."""
    patient = {"connect_timeout": 5, "command_timeout": 5, "call_timeout": 5}
    with Stillroom(Settings(redis_url=server.url, **patient), dispatch=NoDispatch()) as room:
        seen = room.limits.peek(ip, [limit])
        assert (seen.degraded, seen.remaining is None) == ("", False)
        return seen.remaining or 0


def recovered(room: Any) -> None:
    until(lambda: not room.wire.breaker.is_open, "recovery")


def test_each_class_does_what_it_says(make: Make, own_server: EmbeddedServer) -> None:
    """While Redis is away STATIC admits, DEFAULT and AUTH count their share, and every decision is degraded."""
    room = make(processes=4)
    own_server.kill()
    assert admitted(room, STATIC, 1_100) == 1_100
    assert admitted(room, DEFAULT, 50) == 25
    assert admitted(room, AUTH, 5) == 1
    open_, denied = room.limits.check(IP, [STATIC]), room.limits.check(IP, [AUTH])
    assert open_.degraded in ("breaker", "refused")
    assert "RateLimit" not in open_.headers()
    assert (denied.status, denied.standings[0].remaining) == (429, 0)
    assert 0 < denied.retry_after <= 300
    assert room.state_stats.counts["limit_degraded"] > 1_000


def test_who_has_many_addresses_locks_nobody_out(make: Make, own_server: EmbeddedServer) -> None:
    """A client with many addresses fills a process's table and locks nobody out."""
    room = make(local_limits=1_000)
    own_server.kill()
    for n in range(2_000):
        room.limits.check(f"2001:db8:1:{n:x}::1", [AUTH])
    for ip in (IP, "2a02:8108:1:2::1", "198.51.100.7"):
        said = [room.limits.check(ip, [AUTH]).status for _ in range(6)]
        assert said == [200] * 5 + [429]


def test_strict_limits_may_answer_503(make: Make, own_server: EmbeddedServer) -> None:
    """A setting makes strict limits answer 503 while Redis is away; the other classes go on."""
    room = make(limits_strict_503=True)
    own_server.kill()
    denied = room.limits.check(IP, [DEFAULT, AUTH])
    assert (denied.status, denied.headers()["Retry-After"]) == (503, "1")
    assert denied.problem()["type"].endswith("#temporary-reduced-capacity")
    assert not room.limits.reserve(IP, [AUTH])
    assert room.limits.check(IP, [DEFAULT]).remaining == 99


def test_a_look_without_redis_is_no_decision(make: Make, own_server: EmbeddedServer) -> None:
    """A peek while Redis is away counts as no decision without it, and takes nothing."""
    room = make()
    own_server.kill()
    for _ in range(3):
        looked = room.limits.peek(IP, [AUTH])
        assert (looked.remaining, bool(looked.degraded)) == (5, True)
    assert not [name for name in room.state_stats.counts if "degraded" in name]
    room.limits.check(IP, [AUTH])
    assert room.state_stats.counts["limit_degraded"] == 1


def test_to_wait_without_redis_is_no_denial(make: Make, own_server: EmbeddedServer) -> None:
    """A wait in vain while Redis is away is no denial; a check that is refused then is one."""
    room = make()
    own_server.kill()
    once = [Limit("once", 1, 300)]
    assert room.limits.wait(IP, once, timeout=0)
    assert not room.limits.wait(IP, once, timeout=0)
    assert not [name for name in room.state_stats.counts if "denials" in name]
    assert not room.limits.check(IP, once)
    assert not room.limits.reserve(IP, once)
    assert room.state_stats.counts["limit_denials"] == 2
    assert room.state_stats.counts["limit:denials:once"] == 2


def test_strict_limits_answer_503_while_peppers_are_changed(
    make: Make, own_server: EmbeddedServer
) -> None:
    """A strict limit by user answers 503 without Redis, also while each user has a log under two peppers."""
    room = make(limits_strict_503=True, session_peppers=["n" * 32, "o" * 32])
    own_server.kill()
    strict = Limit("login", 5, 60, by="user", away="strict")
    subject = {"ip": IP, "user": "ann"}
    assert room.limits.check(subject, [strict]).status == 503
    assert room.limits.peek(subject, [strict]).status == 503
    assert not room.limits.reserve(subject, [strict])


def test_all_or_none_holds_without_redis(make: Make, own_server: EmbeddedServer) -> None:
    """A limit that denies takes nothing of the other limits, without Redis too."""
    room = make()
    own_server.kill()
    for _ in range(8):
        room.limits.check(IP, [DEFAULT, AUTH])
    assert room.limits.peek(IP, [DEFAULT]).remaining == 95


def test_an_outage_is_no_fresh_quota_nor_is_its_end(make: Make, own_server: EmbeddedServer) -> None:
    """After three hits before an outage and two in it nothing is left of five, for any process."""
    room = make()
    assert admitted(room, AUTH, 3) == 3
    own_server.kill()
    assert admitted(room, AUTH, 10) == 2
    until(lambda: room.wire.breaker.is_open or admitted(room, STATIC, 1) is None, "an open breaker")
    own_server.restart()
    until(lambda: remaining(own_server, AUTH) == 0, "the charge")
    recovered(room)
    assert admitted(room, AUTH, 3) == 0
    with redis.Redis.from_url(own_server.url) as client:
        assert_bounded(client)


def test_what_was_admitted_goes_in_front_of_the_next_check(
    make: Make, own_server: EmbeddedServer
) -> None:
    """Hits admitted by the process are charged before the subject's next check, when Redis is back."""
    room = make(command_timeout=0.05, call_timeout=0.05)
    assert admitted(room, AUTH, 1) == 1
    own_server.freeze()
    try:
        assert admitted(room, AUTH, 2) == 2
        assert room.limits.check("203.0.113.8", [AUTH]).degraded == "timeout"
    finally:
        own_server.thaw()
    assert not room.wire.breaker.is_open
    until(lambda: not room.limits.peek("203.0.113.9", [AUTH]).degraded, "an answer")
    # What timed out may have been counted by Redis as well: rather twice than never.
    assert admitted(room, AUTH, 5) in (0, 1, 2)
    assert remaining(own_server, AUTH) == 0
    assert remaining(own_server, AUTH, "203.0.113.8") in (3, 4)
    local = getattr(room, "inner", room)._limits_body._local
    until(lambda: room.limits.peek("203.0.113.9", [AUTH]) and not local.logs, "nothing owed")


def test_a_frozen_redis_costs_a_few_short_waits(make: Make, own_server: EmbeddedServer) -> None:
    """A frozen Redis costs a few calls their budget; then a decision takes microseconds."""
    room = make(**BRISK)
    room.limits.check(IP, [DEFAULT])
    own_server.freeze()
    try:
        waits = []
        for _ in range(200):
            began = time.perf_counter()
            room.limits.check(IP, [DEFAULT])
            waits.append(time.perf_counter() - began)
        assert room.wire.breaker.is_open
    finally:
        own_server.thaw()
    assert sum(wait > 0.05 for wait in waits) <= 20
    assert statistics.median(waits) < 0.001
    recovered(room)
    # 199 were decided here, of which 99 were admitted; what timed out may have been counted twice.
    until(lambda: remaining(own_server, DEFAULT) == 0, "the charge")


def test_a_slow_redis_is_given_up(own_server: EmbeddedServer) -> None:
    """A reply that drips is given up, and the process decides."""
    with Proxy(own_server.port) as proxy:
        settings = Settings(redis_url=proxy.url, session_peppers="p" * 32)
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            room.limits.check(IP, [AUTH])
            proxy.drip = 0.05
            began = time.perf_counter()
            decision = room.limits.check(IP, [AUTH])
            assert time.perf_counter() - began < 1.0
            assert (decision.allowed, decision.degraded) == (True, "timeout")
            assert decision.remaining == 3
            proxy.drip = None


def test_a_read_only_redis_is_one_that_is_away(make: Make, own_server: EmbeddedServer) -> None:
    """A read-only replica counts as away, and each class does what it says."""
    room = make()
    assert admitted(room, AUTH, 3) == 3
    with redis.Redis.from_url(own_server.url) as client:
        client.replicaof("127.0.0.1", "1")
        assert admitted(room, AUTH, 10) == 2
        assert room.limits.check(IP, [STATIC]).degraded in ("readonly", "masterdown", "breaker")
        client.replicaof("NO", "ONE")
    recovered(room)
    assert admitted(room, AUTH, 3) == 0
    # A thread may still be telling Redis what was admitted without it.
    until(lambda: remaining(own_server, AUTH) == 0, "the hits of the outage")


@pytest.mark.parametrize("flags", [True, False])
def test_a_full_redis_still_counts(
    make: Make, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, flags: bool
) -> None:
    """A full Redis still counts and denies, with script flags and without, and nothing is degraded."""
    monkeypatch.setattr(Script, "flags_are_known", flags)
    room = make()
    with redis.Redis.from_url(own_server.url) as client:
        room.limits.check(IP, [DEFAULT])
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("x", "y")
        decisions = [room.limits.check(IP, [AUTH, DEFAULT]) for _ in range(6)]
        forget_denials(room)
        decisions.append(room.limits.check(IP, [AUTH]))
        held = room.limits.reserve("203.0.113.8", [AUTH])
        assert room.limits.refund(held)
        assert [d.allowed for d in decisions] == [True] * 5 + [False] * 2
        assert {d.degraded for d in [*decisions, held.decision]} == {""}
        assert room.limits.check(IP, [Limit("ten", 10, 60)], cost=9)
        # A refund that overtakes its reservation is noted.
        words = ("stillroom:{rl:!held}:late", "stillroom:{rl:ip:x}:ten", 0, 1, 0, 60_000)
        script = limit_settle.text.source
        assert client.eval(script, 2, *words, 10, 60_000_000, 60_000_000) == 1
        assert_bounded(client)
        client.config_set("maxmemory", 0)


def test_counts_ride_along_and_a_full_redis_refuses_only_them(
    make: Make, own_server: EmbeddedServer
) -> None:
    """A full Redis refuses the counts sent with a check and decides the check."""
    room = make()
    room.limits.check(IP, [AUTH])
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("maxmemory", 1)
        room.state_stats.due = 0.0
        decision = room.limits.check(IP, [AUTH])
        assert (decision.remaining, decision.degraded) == (3, "")
        client.config_set("maxmemory", 0)
        room.state_stats.due = 0.0
        room.limits.check(IP, [AUTH])
        counted = sum(
            int(client.hget(key, "limit_checks") or 0) for key in client.keys("*:stats:*")
        )
        assert counted >= 2


def test_reservations_without_redis(make: Make, own_server: EmbeddedServer) -> None:
    """Without Redis a reservation is made and refunded here once; one that Redis holds comes back with it."""
    room = make()
    before = room.limits.reserve(IP, [AUTH])
    own_server.kill()
    held = room.limits.reserve(IP, [AUTH], cost=2)
    assert (held.allowed, held.local) == (True, True)
    assert room.limits.peek(IP, [AUTH]).remaining == 2
    assert (room.limits.refund(held), room.limits.refund(held)) == (True, False)
    assert room.limits.peek(IP, [AUTH]).remaining == 4
    other = room.limits.reserve(IP, [AUTH])
    assert (room.limits.commit(other), room.limits.refund(other)) == (True, False)
    assert (room.limits.commit(before), room.limits.refund(before)) == (False, None)
    assert room.limits.peek(IP, [AUTH]).remaining == 4
    with pytest.raises(RedisUnavailable):
        room.limits.reset(IP, [AUTH])
    own_server.restart()
    recovered(room)
    until(lambda: not room.limits.peek(IP, [AUTH]).degraded, "an answer")
    until(lambda: remaining(own_server, AUTH) == 4, "the charge, and the refund")
    assert room.limits.refund(before) is False


def test_what_is_settled_without_redis_is_charged_as_it_was_settled(
    make: Make, own_server: EmbeddedServer
) -> None:
    """A reservation made here is charged at its settled cost, and one in Redis is settled when it is back."""
    room, tokens = make(), Limit("tokens", 100, 300)
    before = room.limits.reserve(IP, [tokens], cost=10)
    own_server.kill()
    less, more = (room.limits.reserve(IP, [tokens], cost=10) for _ in range(2))
    assert (less.local, more.local) == (True, True)
    assert (room.limits.settle(less, 2), room.limits.settle(more, 25)) == (True, True)
    assert room.limits.settle(more, 1) is False
    assert room.limits.settle(before, 30) is None
    assert room.limits.peek(IP, [tokens]).remaining == 100 - 30 - 2 - 25
    own_server.restart()
    recovered(room)
    until(lambda: not room.limits.peek(IP, [tokens]).degraded, "an answer")
    until(lambda: remaining(own_server, tokens) == 100 - 30 - 2 - 25, "the charge")
    assert room.limits.settle(before, 3) is False


def test_places_are_held_without_redis(own_server: EmbeddedServer) -> None:
    """Without Redis a process admits its share of places and frees them, also after a block that raised."""
    settings = Settings(**{"redis_url": own_server.url, "processes": 2} | CALM)
    exports = Limit("exports", 4, 300, in_flight=True)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        own_server.kill()
        with room.limits.hold(IP, [exports]) as one, room.limits.hold(IP, [exports]) as two:
            assert (one.local, two.local) == (True, True)
            assert not room.limits.reserve(IP, [exports])
        assert room.limits.peek(IP, [exports]).remaining == 2
        with pytest.raises(RuntimeError, match="of the app"), room.limits.hold(IP, [exports]):
            raise RuntimeError("of the app's own")
        assert room.limits.peek(IP, [exports]).remaining == 2
        own_server.restart()
        recovered(room)
        until(lambda: not room.limits.peek(IP, [exports]).degraded, "an answer")
        until(lambda: remaining(own_server, exports) == 4, "no place that is taken")


def test_async_places_are_held_without_redis(own_server: EmbeddedServer) -> None:
    """Without Redis places are held and freed with the async face too."""
    settings = Settings(**{"redis_url": own_server.url, "processes": 2} | CALM)
    exports = Limit("exports", 2, 300, in_flight=True)

    async def story() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            own_server.kill()
            for _ in range(3):
                async with room.limits.hold(IP, [exports]) as held:
                    assert held.local
                    assert not await room.limits.reserve(IP, [exports])
            assert (await room.limits.peek(IP, [exports])).remaining == 1

    asyncio.run(story())


def test_a_place_whose_block_ends_in_an_outage_comes_back(own_server: EmbeddedServer) -> None:
    """A place that Redis holds is free here at once, and given back when Redis is there.

    That is noticed, and told, in a process that asks nothing of it any more.
    """
    exports = Limit("exports", 1, 3_600, in_flight=True)
    with Stillroom(Settings(redis_url=own_server.url, **CALM), dispatch=NoDispatch()) as room:
        with room.limits.hold(IP, [exports]) as held:
            assert not held.local
            own_server.kill()
        with room.limits.hold(IP, [exports]) as held:
            assert held.local
        own_server.restart()
        until(lambda: remaining(own_server, exports) == 1, "the place")


def test_what_was_given_back_before_an_outage_is_free_in_it(
    make: Make, own_server: EmbeddedServer
) -> None:
    """A process that has lost Redis counts what was given back, or cost more, after Redis spoke of it last."""
    room, exports = make(), Limit("exports", 1, 3_600, in_flight=True)
    tokens = Limit("tokens", 100, 3_600)
    assert room.limits.refund(room.limits.reserve(IP, [exports]))
    assert room.limits.settle(room.limits.reserve(IP, [tokens], cost=1), 90)
    own_server.kill()
    assert room.limits.reserve(IP, [exports])
    assert not room.limits.check(IP, [tokens], cost=11)
    assert room.limits.check(IP, [tokens], cost=10)


def test_what_is_reserved_at_no_cost_without_redis_is_settled(
    make: Make, own_server: EmbeddedServer
) -> None:
    """A reservation of nothing that this process made is charged what it cost."""
    room, tokens = make(), Limit("tokens", 100, 3_600)
    own_server.kill()
    here, later = (room.limits.reserve(IP, [tokens], cost=0) for _ in range(2))
    assert room.limits.settle(here, 30) is True
    own_server.restart()
    until(lambda: remaining(own_server, tokens) == 70, "the charge")
    assert room.limits.settle(later, 20) is True
    assert remaining(own_server, tokens) == 50


def test_nobody_is_denied_for_a_limit_in_shadow(make: Make, own_server: EmbeddedServer) -> None:
    """A limit in shadow denies nobody while Redis is away."""
    shadow = Limit("shadow", 1, 300, away="strict", shadow=True)
    room = make(limits_strict_503=True)
    own_server.kill()
    assert admitted(room, shadow, 20) == 20
    decision = room.limits.check(IP, [shadow])
    assert (decision.would_deny, decision.headers()) == ((), {})


def test_a_change_outlives_an_outage(make: Make, own_server: EmbeddedServer) -> None:
    """The last change holds during an outage, and a new change needs Redis."""
    room = make()
    room.limits.change("auth", 2, 300, 3_600)
    getattr(room, "inner", room)._limits_body._changes.due = 0.0
    room.limits.check("203.0.113.8", [AUTH])
    own_server.kill()
    assert admitted(room, AUTH, 5) == 2
    with pytest.raises(RedisUnavailable):
        room.limits.change("auth", 100, 300, 3_600)
    with pytest.raises(RedisUnavailable):
        room.limits.restore("auth")


def is_denied_by_a_change(room: Any) -> bool:
    """Change a limit for a second, and return whether the room met the change within it."""
    room.limits.change("auth", 0, 300, 1)
    room.limits.check("203.0.113.8", [AUTH])
    return not room.limits.check("203.0.113.8", [AUTH])


def test_a_change_ends_in_an_outage_too(make: Make, own_server: EmbeddedServer) -> None:
    """A change that is over holds no longer because nobody can tell this process so."""
    room = make()
    until(lambda: is_denied_by_a_change(room), "a change that this process knows")
    own_server.kill()
    until(lambda: room.limits.check("203.0.113.9", [AUTH]).allowed, "the end of the change")


def test_what_was_changed_is_told_though_the_clock_was_set_back(
    make: Make, own_server: EmbeddedServer
) -> None:
    """A process that thinks the server's clock is an hour ahead is told until when its change holds."""
    room = make()
    room.limits.check(IP, [AUTH])
    misjudge(getattr(room, "inner", room)._state_server, 3_600)
    change = room.limits.change("auth", 2, 300, 60)
    assert (change.quota, change.until - change.since) == (2, 60)


def test_an_end_of_a_change_whose_reply_is_lost_is_not_told_as_none(
    own_server: EmbeddedServer,
) -> None:
    """Nobody is told that a limit was not changed because the end of its change arrived twice."""
    with Proxy(own_server.port) as proxy:
        settings = Settings(redis_url=proxy.url, **CALM)
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            room.limits.check(IP, [AUTH])
            room.limits.change("auth", 2, 300, 60)
            proxy.cuts_next = True
            with pytest.raises(RedisUnavailable):
                room.limits.restore("auth")


def test_a_call_does_not_wait_for_redis(make: Make, own_server: EmbeddedServer) -> None:
    """Without Redis a call with a wait is decided by the process's share, within the given time."""
    room, slow = make(), Limit("slow", 1, 2)
    own_server.kill()
    began = time.monotonic()
    assert room.limits.wait(IP, [slow])
    assert room.limits.wait(IP, [slow], timeout=10)
    assert time.monotonic() - began >= 1.9
    assert not room.limits.wait(IP, [slow], timeout=0)


def test_a_dead_connection_does_not_count_twice(make: Make, own_server: EmbeddedServer) -> None:
    """A check whose idle connection died in a restart is counted once, by Redis or here."""
    room = make()
    assert room.limits.check(IP, [AUTH])
    own_server.restart()
    assert room.limits.check(IP, [AUTH])
    until(lambda: not room.limits.peek(IP, [AUTH]).degraded, "an answer")
    room.limits.check(IP, [AUTH])
    assert remaining(own_server, AUTH) == 2


def test_a_room_that_closes_tells_what_it_owes(own_server: EmbeddedServer) -> None:
    """A room that closes charges its own hits before it ends."""
    settings = Settings(**{"redis_url": own_server.url} | CALM)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.limits.check(IP, [AUTH])
        own_server.kill()
        assert admitted(room, AUTH, 2) == 2
        own_server.restart()
        room.wire.breaker.stop()
    assert remaining(own_server, AUTH) == 2


def test_a_decision_without_redis_costs_the_same_in_a_crowd(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that fail together look at no more logs each than a few do, and admit no more than the share."""
    looks = 0
    logs_of = Request.logs.__get__

    def counted(request: Request) -> Any:
        nonlocal looks
        looks += 1
        return logs_of(request)

    shared = Limit("shared", 10, 300, away="strict")
    settings = Settings(**{"redis_url": own_server.url} | BRISK)

    async def looks_of_each(crowd: int, ip: str) -> float:
        nonlocal looks
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            assert await room.limits.check("203.0.113.1", [DEFAULT])
            own_server.freeze()
            try:
                looks = 0
                checks = [room.limits.check(ip, [shared, DEFAULT]) for _ in range(crowd)]
                decisions = await asyncio.gather(*checks)
            finally:
                own_server.thaw()
        assert all(decision.degraded for decision in decisions)
        assert 0 < sum(decision.allowed for decision in decisions) <= 10
        return looks / crowd

    monkeypatch.setattr(Request, "logs", property(counted))
    few, many = (asyncio.run(looks_of_each(n, f"203.0.113.{n}")) for n in (20, 200))
    assert many <= few + 1


@pytest.mark.parametrize("act", ["check", "reserve", "wait"])
def test_what_redis_counted_by_any_call_is_known_without_it(
    make: Make, own_server: EmbeddedServer, act: str
) -> None:
    """A subject that has used up its quota gets nothing more when Redis goes away, whatever call used it."""
    room, limit = make(), Limit("few", 5, 3_600)
    for _ in range(5):
        assert getattr(room.limits, act)(IP, [limit])
    own_server.kill()
    assert admitted(room, limit, 5) == 0


@pytest.mark.parametrize("act", ["check", "reserve", "wait"])
def test_what_is_in_flight_by_any_call_counts(own_server: EmbeddedServer, act: str) -> None:
    """A decision without Redis counts the hits that Redis is being asked for, whatever call asks."""
    limit = Limit("few", 5, 3_600)
    settings = Settings(**{"redis_url": own_server.url} | CALM)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        asking = [getattr(room._limits_body, act)(IP, [limit]) for _ in range(5)]
        assert all(one.send(None) for one in asking)
        own_server.kill()
        assert admitted(room, limit, 5) == 0
        for one in asking:
            one.close()
