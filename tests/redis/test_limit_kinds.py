"""Limits also count what is in flight, settle afterwards, run in shadow, change while apps run, and wait."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from stillroom import AUTH, DEFAULT, InvalidArgument, InvalidLimit, Limit
from stillroom.limits.changes import MOST, Changes, read_changes, read_rate, read_time, write_rate
from tests.support.bounded import assert_bounded
from tests.support.limits import age, events, forget_denials, logs, read_log
from tests.support.monitor import sent

IP, OTHER = "203.0.113.7", "203.0.113.8"
EXPORTS = Limit("exports", 3, 60, in_flight=True)
TOKENS = Limit("tokens", 1_000, 60)
SHADOW = Limit("shadow", 2, 60, shadow=True)
TEN = Limit("ten", 10, 60)


@pytest.fixture(autouse=True)
def bounded(client: Any) -> Iterator[None]:
    """Check after every test that each remaining key has a TTL."""
    yield
    assert_bounded(client)
    assert client.ttl("stillroom:limits:changes") != -1


# In flight


def test_so_many_are_in_flight_and_not_one_more(room: Any) -> None:
    """A limit of three in flight refuses the fourth until one of the three is over."""
    held = [room.limits.reserve(IP, [EXPORTS]) for _ in range(4)]
    assert [bool(one) for one in held] == [True, True, True, False]
    assert room.limits.reserve(OTHER, [EXPORTS]), "another client has places of its own"
    assert room.limits.refund(held[1])
    assert room.limits.reserve(IP, [EXPORTS])
    assert not room.limits.reserve(IP, [EXPORTS])


def test_a_place_whose_process_died_comes_back_when_the_lease_ends(room: Any, client: Any) -> None:
    """The place of a process that died is free again when its lease ends by the server's clock."""
    for _ in range(3):
        assert room.limits.reserve(IP, [EXPORTS])
    age(client, 59)
    assert not room.limits.reserve(IP, [EXPORTS])
    age(client, 2)
    assert room.limits.reserve(IP, [EXPORTS])


def test_a_place_is_given_back_at_the_end_of_a_block(make_room: Any) -> None:
    """A place is given back at the end of its block, also if the block raises.

    Without a place the block still runs.
    """
    room = make_room()
    with room.limits.hold(IP, [EXPORTS]) as first, room.limits.hold(IP, [EXPORTS]):
        assert first
        with pytest.raises(ZeroDivisionError):
            fail_in_flight(room)
        with room.limits.hold(IP, [EXPORTS]) as third:
            assert third
    assert room.limits.peek(IP, [EXPORTS]).remaining == 3


def fail_in_flight(room: Any) -> None:
    with room.limits.hold(IP, [EXPORTS]), room.limits.hold(IP, [EXPORTS]) as fourth:
        assert not fourth
        raise ZeroDivisionError


def test_a_block_gives_back_what_is_in_flight_and_nothing_else(make_room: Any) -> None:
    """What another limit of a block has counted stays consumed, and a block that holds nothing is refused."""
    room, hourly = make_room(), Limit("hourly", 3, 3_600)
    for turn in range(5):
        with room.limits.hold(IP, [EXPORTS, hourly]) as held:
            assert held.allowed is (turn < 3)
    left = {
        one.limit.name: one.remaining for one in room.limits.peek(IP, [EXPORTS, hourly]).standings
    }
    assert left == {"exports": 3, "hourly": 0}
    with pytest.raises(InvalidLimit, match="in_flight=True"), room.limits.hold(IP, [hourly]):
        pytest.fail("it holds nothing")


def test_a_place_is_given_back_though_its_request_has_no_time_left(make_room: Any) -> None:
    """A request whose time for Redis is used up gives its place back all the same."""
    room = make_room()
    with room.request() as budget, room.limits.hold(IP, [EXPORTS]):
        budget.left = 0.0
    assert room.limits.peek(IP, [EXPORTS]).remaining == 3


def test_an_async_block_gives_its_place_back(settings: Any, dispatch: Any) -> None:
    """`async with` gives its place back."""
    import asyncio

    from stillroom import AsyncStillroom

    async def story() -> None:
        async with AsyncStillroom(settings, dispatch=dispatch) as room:
            async with room.limits.hold(IP, [EXPORTS]) as held:
                assert held
                assert (await room.limits.peek(IP, [EXPORTS])).remaining == 2
            assert (await room.limits.peek(IP, [EXPORTS])).remaining == 3

    asyncio.run(story())


def test_a_refusal_of_what_is_in_flight_is_not_remembered(room: Any) -> None:
    """A denial of a limit in flight is not remembered, because a place may be free at any moment."""
    held = [room.limits.reserve(IP, [EXPORTS]) for _ in range(3)]
    denied = room.limits.reserve(IP, [EXPORTS])
    assert not denied
    headers = denied.decision.headers()
    assert headers["RateLimit-Policy"] == '"exports";q=3;qu="concurrent-requests"'
    assert headers["RateLimit"] == '"exports";r=0'
    assert headers["Retry-After"] == "1"
    assert not getattr(room, "inner", room)._limits_body._denials.found
    room.limits.refund(held[0])
    assert room.limits.reserve(IP, [EXPORTS])


def test_what_is_in_flight_is_reserved_with_all_other_limits_or_none(room: Any) -> None:
    """A limit in flight is reserved together with all other limits or not at all."""
    for _ in range(3):
        assert room.limits.reserve(IP, [EXPORTS, TEN])
    assert not room.limits.reserve(IP, [TEN, EXPORTS])
    assert room.limits.peek(IP, [TEN]).remaining == 7


def test_a_check_can_hold_nothing(room: Any) -> None:
    """A check does not hold places, because nobody would give them back."""
    for act in (room.limits.check, room.limits.wait):
        with pytest.raises(InvalidLimit, match="reserve and refund"):
            act(IP, [EXPORTS])


def test_parallel_requests_never_hold_more_than_there_are_places(make_room: Any) -> None:
    """Twenty threads of two processes that hold and give back never hold more than there are places."""
    rooms, most, now, lock = [make_room(), make_room()], [0], [0], threading.Lock()

    def work(number: int) -> None:
        for _ in range(10):
            with rooms[number % 2].limits.hold(IP, [EXPORTS]) as held:
                if held:
                    with lock:
                        now[0] += 1
                        most[0] = max(most[0], now[0])
                    time.sleep(0)
                    with lock:
                        now[0] -= 1

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(work, range(20)))
    assert 1 <= most[0] <= 3
    assert rooms[0].limits.peek(IP, [EXPORTS]).remaining == 3


# Settled afterwards


@pytest.mark.parametrize(
    ("cost", "used"), [(0, 0), (30, 30), (100, 100), (250, 250), (5_000, 5_000)]
)
def test_what_it_cost_is_said_afterwards(room: Any, client: Any, cost: int, used: int) -> None:
    """A request settles its true cost afterwards: less is given back, more is counted whatever the quota."""
    held = room.limits.reserve(IP, [TOKENS, DEFAULT], cost=100)
    assert held
    assert room.limits.settle(held, cost)
    assert room.limits.peek(IP, [TOKENS]).remaining == max(0, 1_000 - used)
    assert (
        sum(n for key in logs(client) if b"tokens" in key for _, n in read_log(client, key)) == used
    )


def test_what_was_reserved_at_no_cost_is_settled(room: Any) -> None:
    """A price that nobody knows before the work is reserved as nothing, and charged afterwards."""
    held = room.limits.reserve(IP, [TOKENS], cost=0)
    assert room.limits.peek(IP, [TOKENS]).remaining == 1_000
    assert room.limits.settle(held, 60) is True
    assert room.limits.settle(held, 60) is False
    assert room.limits.peek(IP, [TOKENS]).remaining == 940


def test_it_is_settled_once(room: Any) -> None:
    """A reservation is settled once and is not refunded, committed or settled afterwards."""
    held = room.limits.reserve(IP, [TOKENS], cost=100)
    assert room.limits.settle(held, 40) is True
    assert room.limits.settle(held, 0) is False
    assert room.limits.refund(held) is False
    assert room.limits.commit(held) is False
    for act in (room.limits.refund, room.limits.commit):
        held = room.limits.reserve(IP, [TOKENS], cost=100)
        act(held)
        assert room.limits.settle(held, 900) is False
    assert room.limits.peek(IP, [TOKENS]).remaining == 1_000 - 40 - 100


def test_what_it_cost_more_is_counted_from_now_on(room: Any, client: Any) -> None:
    """The additional cost of a settled request counts from now on, and the reservation's own hits leave first."""
    held = room.limits.reserve(IP, [TOKENS], cost=100)
    age(client, 50)
    held = __import__("dataclasses").replace(held, at_us=held.at_us - 50_000_000)
    assert room.limits.settle(held, 300)
    assert room.limits.peek(IP, [TOKENS]).remaining == 700
    age(client, 11)
    assert room.limits.peek(IP, [TOKENS]).remaining == 800


def test_what_no_request_can_cost_is_refused(room: Any) -> None:
    """A cost that no request can have is refused before anything is sent."""
    held = room.limits.reserve(IP, [TOKENS])
    for cost in (-1, 1.5, 10**7, None):
        with pytest.raises(InvalidLimit, match="cost is a whole number"):
            room.limits.settle(held, cost)
    assert room.limits.settle(held, 1)


# In shadow


def test_a_limit_in_shadow_denies_nothing_and_says_what_it_would_have(
    room: Any, client: Any
) -> None:
    """A limit in shadow denies nothing and counts what it would have denied, without headers or events."""
    decisions = [room.limits.check(IP, [SHADOW, TEN]) for _ in range(4)]
    assert all(decisions)
    assert [d.would_deny for d in decisions] == [(), (), (SHADOW,), (SHADOW,)]
    assert all(d.violated == () for d in decisions)
    headers = decisions[-1].headers()
    assert headers["RateLimit-Policy"] == '"ten";q=10;w=60'
    assert headers["RateLimit"].startswith('"ten";r=6')
    assert room.limits.check(IP, [SHADOW]).headers() == {}
    (log,) = [key for key in logs(client) if b"shadow" in key]
    assert sum(n for _, n in read_log(client, log)) == 2
    assert not [e for e in events(client, room) if e["kind"] == "denied"]
    assert room.state_stats.counts["limit_would_deny:shadow"] == 3


def test_a_limit_in_shadow_takes_nothing_of_what_another_denies(room: Any) -> None:
    """A limit in shadow takes no hit of a request that another limit denies."""
    one = Limit("one", 1, 60)
    assert room.limits.check(IP, [one, SHADOW])
    forget_denials(room)
    denied = room.limits.check(IP, [SHADOW, one])
    assert (denied.allowed, denied.violated, denied.would_deny) == (False, (one,), ())
    assert denied.problem()["violated-policies"] == ["one"]
    assert room.limits.peek(IP, [Limit("shadow", 2, 60)]).remaining == 1


@pytest.mark.parametrize("by", ["ip", "user"])
def test_a_limit_in_shadow_may_be_reserved(room: Any, by: str) -> None:
    """A limit in shadow may be reserved, and gives back only what it counted, of another subject too."""
    shadow, asked = replace(SHADOW, by=by), {"ip": IP, "user": "ann"}
    held = [room.limits.reserve(asked, [shadow, TEN]) for _ in range(4)]
    assert all(held)
    for one in held:
        assert room.limits.refund(one)
        assert not room.limits.refund(one)
    assert room.limits.peek(asked, [replace(shadow, shadow=False)]).remaining == 2
    assert room.limits.peek(IP, [TEN]).remaining == 10


# Changed while apps run


def read_now(room: Any) -> None:
    """Let a second pass, so that the next check reads the changed limits."""
    getattr(room, "inner", room)._limits_body._changes.due = 0.0


@pytest.mark.parametrize("wrong", [[None], [[Limit("ten", 10, 60)]]])
def test_what_is_no_limit_is_named_while_limits_are_changed(room: Any, wrong: Any) -> None:
    """A check with what is no limit in its list raises InvalidLimit, also while an operator's change holds."""
    room.limits.check(IP, [Limit("ten", 10, 60)])
    room.limits.change("ten", 5, 60, 3_600)
    read_now(room)
    room.limits.check(IP, [Limit("ten", 10, 60)])
    with pytest.raises(InvalidLimit):
        room.limits.check(IP, wrong)


def test_a_change_is_seen_by_every_process(room: Any, make_room: Any) -> None:
    """Every process sees a change behind a check, without a round trip of its own, and earlier hits still count."""
    other = make_room()
    ten = Limit("ten", 10, 60)
    for _ in range(4):
        room.limits.check(IP, [ten])
    change = other.limits.change("ten", 5, 60, 3_600, by="ann")
    assert (change.quota, change.by) == (5, "ann")
    read_now(room)
    room.limits.check(IP, [ten])
    denied = room.limits.check(IP, [ten])
    assert not denied
    assert denied.headers()["RateLimit-Policy"] == '"ten";q=5;w=60'
    other.limits.change("ten", 20, 60, 3_600)
    read_now(room)
    room.limits.check(IP, [ten])
    assert room.limits.check(IP, [ten]).remaining >= 13, "denials of before are forgotten"
    assert other.limits.restore("ten")
    assert not other.limits.restore("ten")
    with pytest.raises(InvalidLimit):
        other.limits.restore("\udcff")  # as an argument that is no UTF-8
    assert other.limits.change("ten", 20, 60, 3_600, by="j\udcfcrgen").by == "j?rgen"
    assert other.limits.restore("ten")
    read_now(room)
    room.limits.check(IP, [ten])
    assert room.limits.check(IP, [ten]).limits == (ten,)


def test_changes_are_read_once_a_second_and_with_a_check(room: Any, client: Any) -> None:
    """Changes are read once a second with a check, and alone only where every check is denied from memory."""
    room.limits.check(IP, [DEFAULT])
    with client.monitor() as monitor:
        read_now(room)
        for _ in range(5):
            room.limits.check(IP, [DEFAULT])
        client.echo("done")
        seen = []
        for command in monitor.listen():
            if command["command"] == "ECHO done":
                break
            seen.append(command["command"])
    assert len([said for said in seen if said.startswith("HGETALL stillroom:limits:changes")]) == 1
    one = Limit("one", 1, 60)
    for _ in range(2):
        room.limits.check(IP, [one])
    assert sent(client, lambda: room.limits.check(IP, [one])) == []


def test_who_is_denied_from_memory_sees_a_change_too(room: Any, make_room: Any) -> None:
    """A client that is denied from memory sees a change a second later, before the denial is forgotten."""
    one = Limit("one", 1, 3_600)
    for _ in range(3):
        room.limits.check(IP, [one])
    make_room().limits.change("one", 50, 3_600, 60)
    assert not room.limits.check(IP, [one])
    read_now(room)
    room.limits.check(IP, [one])
    assert room.limits.check(IP, [one])


def test_a_change_ends_by_itself(room: Any, client: Any) -> None:
    """A change ends by itself by the server's clock, and the next change removes the ended one."""
    room.limits.check(IP, [TEN])
    room.limits.check(IP, [TEN])
    room.limits.change("ten", 5, 60, 100)
    key = room.keys.limit_changes
    record = json.loads(client.hget(key, "ten"))
    assert record["until"] == record["since"] + 100
    assert 0 < client.ttl(key) <= 101
    client.hset(key, "ten", json.dumps(record | {"until": record["since"] - 1}))
    assert room.limits.changes() == []
    client.hset(key, "junk", "no change")
    client.hset(key, "x y", json.dumps(record))
    assert room.limits.changes() == []


def test_a_name_that_nobody_has_is_refused(room: Any) -> None:
    """The name of an unknown limit is refused with the nearest name.

    Any name is taken where no process has told its own.
    """
    assert room.limits.change("anything", 5, 60, 100)
    room.limits.check(IP, [TEN, DEFAULT])
    room.limits.check(IP, [TEN, DEFAULT])
    assert room.limits.names() == ["default", "ten"]
    with pytest.raises(
        InvalidLimit, match=r"no process has a limit of this name; did you mean default\?"
    ):
        room.limits.change("defualt", 5, 60, 100)
    for quota, window, seconds in ((-1, 60, 10), (5, 0, 10), (5, 60, 0), (5, 60, 10**9)):
        with pytest.raises((InvalidLimit, InvalidArgument)):
            room.limits.change("ten", quota, window, seconds)


def test_no_more_than_so_many_limits_are_changed(make_room: Any, client: Any) -> None:
    """The hash of changed limits has a bound."""
    room = make_room()
    for number in range(MOST):
        room.limits.change(f"l{number}", 5, 60, 100)
    with pytest.raises(InvalidLimit, match="restore one of them"):
        room.limits.change("one-more", 5, 60, 100)
    assert room.limits.change("l0", 6, 60, 100).quota == 6
    assert client.hlen(room.keys.limit_changes) == MOST


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("2000/1h", (2_000, 3_600)),
        ("2,000/1h", (2_000, 3_600)),
        ("5/300", (5, 300)),
        ("5/300s", (5, 300)),
        ("0/m", (0, 60)),
        ("1_000/2d", (1_000, 172_800)),
    ],
)
def test_a_rate_is_read_as_people_write_it(text: str, rate: tuple[int, int]) -> None:
    """A rate is read in the forms people write, and is written so that it can be read again."""
    assert read_rate(text) == rate
    assert read_rate(write_rate(*rate)) == rate


@pytest.mark.parametrize(
    "text", ["", "5", "5/", "/1h", "5/1w", "5 per hour", "5/0s", "-5/1h", "9999999999/1h"]
)
def test_what_is_no_rate_is_said(text: str) -> None:
    """A text that is no rate is refused with an example of one."""
    with pytest.raises(InvalidLimit, match=r"2000/1h|at most"):
        read_rate(text)


@pytest.mark.parametrize("text", ["", "2", "h", "2w", "31d", "0s"])
def test_what_is_no_time_is_said(text: str) -> None:
    """A text that is no time is refused with an example of one."""
    with pytest.raises(InvalidLimit, match="90s, 30m, 2h or 7d"):
        read_time(text)
    assert read_time("2h") == 7_200
    with pytest.raises(InvalidLimit, match="1d at most"):
        read_time("25h", 86_400)


def test_what_is_kept_of_changed_limits_has_a_bound() -> None:
    """The memory for changed limits has a bound, also where each tenant has a quota of its own."""
    changes = Changes()
    changes.learn([b"a", b'{"quota": 1, "window": 1, "until": 9}'], 5.0, 0.0)
    for quota in range(3 * MOST):
        assert changes.applied((Limit("a", quota, 9), TEN), 1.0) == (Limit("a", 1, 1), TEN)
    assert len(changes._applied) <= MOST
    assert read_changes(None) == []


@pytest.mark.parametrize("knows", [True, False])
def test_a_change_lasts_no_longer_because_the_clock_steps_back(knows: bool) -> None:
    """A change of 60 s ends after 60 s at the most, in processes that knew it before the step and in others."""
    reply = [b"a", b'{"quota": 1, "window": 1, "since": 7200, "until": 7260}']
    changes = Changes()
    if knows:
        assert changes.learn(reply, 7_200.0, 0.0)
    for steady, holds in ((0, True), (59, True), (61, False)):
        changes.learn(reply, 3_600.0 + steady, float(steady))
        assert bool(changes.found) is holds


def test_a_change_goes_on_when_a_clock_that_was_ahead_is_right_again() -> None:
    """A change that a clock two hours ahead has ended holds for the rest of its time afterwards."""
    reply = [b"a", b'{"quota": 1, "window": 1, "since": 0, "until": 3600}']
    changes = Changes()
    for now, steady, holds in (
        (10, 0, True),
        (7_210, 1, False),
        (12, 2, True),
        (3_601, 3_591, False),
    ):
        changes.learn(reply, float(now), float(steady))
        assert bool(changes.found) is holds


# Waiting for room


def test_a_call_waits_until_there_is_room(room: Any, client: Any) -> None:
    """A call with a wait is consumed once there is room, and nobody is denied."""
    slow = Limit("slow", 1, 1)
    api = {"ip": IP}
    assert room.limits.wait(api, [slow])
    began = time.monotonic()
    assert room.limits.wait(api, [slow])
    assert 0.9 < time.monotonic() - began < 5
    assert not [e for e in events(client, room) if e["kind"] == "denied"]
    assert room.state_stats.counts["limit_denials"] == 0


def test_who_would_wait_for_too_long_does_not_wait(room: Any) -> None:
    """A call whose wait would be too long, or in vain, is denied at once."""
    assert room.limits.wait(IP, [AUTH], cost=5)
    began = time.monotonic()
    denied = room.limits.wait(IP, [AUTH], timeout=20)
    assert not denied
    assert denied.retry_after > 290
    assert not room.limits.wait(IP, [AUTH], cost=6, timeout=3_600), "more than a whole quota"
    room.abuse.ban(OTHER, 20)
    assert room.limits.wait(OTHER, [DEFAULT], timeout=60).banned
    assert time.monotonic() - began < 10  # not even for the shortest of these times


def test_calls_that_wait_never_make_more_than_the_quota(make_room: Any) -> None:
    """Ten waiting calls for two places a second are never more than two in any second."""
    room, pair = make_room(), Limit("pair", 2, 1)
    moments: list[float] = []

    def call(_: int) -> bool:
        decision = room.limits.wait(IP, [pair], timeout=20)
        moments.append(decision.now_us / 1e6)
        return bool(decision)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(6)))
    moments.sort()
    assert all(later - earlier >= 1 for earlier, later in zip(moments, moments[2:], strict=False))


@pytest.mark.parametrize("timeout", [-1, 4_000, float("nan")])
def test_a_wait_has_a_bound(room: Any, timeout: float) -> None:
    """A wait is one hour at most; a longer one is refused."""
    with pytest.raises(InvalidArgument, match=r"timeout=.*: a number of seconds from 0 to 3,600"):
        room.limits.wait(IP, [DEFAULT], timeout=timeout)
