"""Limits hold under races of threads and processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from stillroom import AUTH, Limit, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from tests.support.bounded import assert_bounded
from tests.support.crowd import Crowd
from tests.support.limits import events, forget_denials
from tests.support.processes import Program
from tests.support.threads import at_once

IP = "203.0.113.7"


def test_many_processes_and_threads_admit_exactly_the_quota(server: EmbeddedServer) -> None:
    """Four processes with 16 threads each want 1,280 hits of 500, and together get exactly 500."""
    crowd = Crowd(server.url)
    source = f"""
        from tests.support.crowd import hit_in_threads
        hit_in_threads({server.url!r}, 16, 20, 500)
    """
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(source, within=60)) for _ in range(4)]
        crowd.await_ready(64)
        crowd.give("go", 64)
        admitted = [int(program.read_word("admitted ")) for program in programs]
    crowd.close()
    assert sum(admitted) == 500


def test_a_hundred_parallel_guesses_are_five(
    make_room: Callable[..., Stillroom], client: Any
) -> None:
    """Of a hundred parallel guesses five reach the checker, because quota is consumed before the
    password is checked.
    """
    rooms = [make_room(), make_room()]
    checked: list[int] = []

    def login(number: int) -> bool:
        held = rooms[number % 2].limits.reserve({"ip": IP, "user": "ann"}, [AUTH])
        if held:
            checked.append(number)  # a wrong password: it stays consumed
        return bool(held)

    assert sum(at_once(100, login)) == 5
    assert len(checked) == 5
    assert_bounded(client)


def test_logins_that_succeed_use_nothing_up(make_room: Callable[..., Stillroom]) -> None:
    """A hundred logins that succeed, eight at a time under a quota of five, leave all five places."""
    room = make_room()

    def login(_: int) -> int:
        passed = 0
        for _ in range(12):
            if held := room.limits.reserve(IP, [AUTH]):
                assert room.limits.refund(held)
                passed += 1
        return passed

    assert sum(at_once(8, login)) > 5
    assert room.limits.peek(IP, [AUTH]).remaining == 5


def test_a_reservation_is_refunded_by_one(make_room: Callable[..., Stillroom]) -> None:
    """Of sixteen refunds of one reservation, or of a refund and a commit, one wins."""
    room = make_room()
    for _ in range(20):
        held = room.limits.reserve(IP, [AUTH], cost=2)
        assert sum(at_once(16, lambda _, held=held: room.limits.refund(held))) == 1
        assert room.limits.peek(IP, [AUTH]).remaining == 5
    for _ in range(20):
        held = room.limits.reserve(IP, [AUTH])
        acts = [room.limits.refund, room.limits.commit]
        refunded, committed = at_once(2, lambda n, held=held, acts=acts: acts[n](held))
        assert refunded is not committed
        assert room.limits.peek(IP, [AUTH]).remaining == (5 if refunded else 4)
        room.limits.reset(IP, [AUTH])


def test_a_reservation_is_settled_by_one(make_room: Callable[..., Stillroom]) -> None:
    """Of settle, refund and commit on one reservation one wins, and it is settled at the first cost."""
    room, tokens = make_room(), Limit("tokens", 1_000, 300)
    for _ in range(10):
        held = room.limits.reserve(IP, [tokens], cost=100)
        done = at_once(16, lambda n, held=held: room.limits.settle(held, 50 * (n + 1)))
        assert room.limits.peek(IP, [tokens]).remaining == 1_000 - 50 * (done.index(True) + 1)
        assert done.count(True) == 1
        room.limits.reset(IP, [tokens])
    left = {"settle": 700, "refund": 1_000, "commit": 900}
    for _ in range(10):
        held = room.limits.reserve(IP, [tokens], cost=100)
        acts = {
            "settle": lambda held=held: room.limits.settle(held, 300),
            "refund": lambda held=held: room.limits.refund(held),
            "commit": lambda held=held: room.limits.commit(held),
        }
        done = at_once(3, lambda n, acts=acts: [*acts.values()][n]())
        (winner,) = [name for name, won in zip(acts, done, strict=True) if won]
        assert room.limits.peek(IP, [tokens]).remaining == left[winner]
        room.limits.reset(IP, [tokens])


def test_processes_that_change_a_limit_leave_one_of_their_changes(
    make_room: Callable[..., Stillroom], client: Any
) -> None:
    """Processes that change one limit leave one whole change with an end, which each process then uses."""
    rooms = [make_room(), make_room()]
    at_once(16, lambda n: rooms[n % 2].limits.change("auth", n + 1, n + 1, 60 + n))
    (change,) = rooms[0].limits.changes()
    assert change.quota == change.window
    assert_bounded(client)
    for room in rooms:
        room._limits_body._changes.due = 0.0
        room.limits.check("203.0.113.9", [AUTH])
        assert room.limits.peek(IP, [AUTH]).standings[0].limit.quota == change.quota


@pytest.mark.parametrize("how", ["refund", "reset"])
def test_a_denial_that_was_on_its_way_is_not_remembered(
    make_room: Callable[..., Stillroom], how: str
) -> None:
    """A denial overtaken by a refund is not remembered, and the next request is admitted."""
    room = make_room()
    held = [room.limits.reserve(IP, [AUTH]) for _ in range(5)]
    room.state_stats.due = 1 << 62
    check: Any = room._limits_body.check(IP, [AUTH])
    replies = room.state_wire.execute(check.send(None), 10.0)
    if how == "refund":
        room.limits.refund(held[0])
    else:
        room.limits.reset(IP, [AUTH])
    with pytest.raises(StopIteration) as ended:
        check.send(replies)
    assert not ended.value.value
    assert room.limits.check(IP, [AUTH])


def test_a_denial_that_is_over_when_it_arrives_is_not_remembered(
    make_room: Callable[..., Stillroom],
) -> None:
    """A process that stood still before it read a denial denies nobody for longer than Redis does."""
    room, other, limit = make_room(), make_room(), Limit("one", 1, 1)
    room.state_stats.due = 1 << 62
    assert room.limits.check(IP, [limit])
    check: Any = room._limits_body.check(IP, [limit])
    replies = room.state_wire.execute(check.send(None), 10.0)
    assert until(lambda: other.limits.peek(IP, [limit]).remaining == 1, 5.0)
    with pytest.raises(StopIteration) as ended:
        check.send(replies)
    assert not ended.value.value
    assert until(lambda: bool(room.limits.check(IP, [limit])), 0.5)


def test_a_denied_request_burns_nothing_under_load(make_room: Callable[..., Stillroom]) -> None:
    """Under load a denied request takes nothing: each limit counts exactly what was admitted."""
    rooms = [make_room(), make_room()]
    ip, user = Limit("ip", 400, 3600), Limit("user", 60, 3600, by="user")
    pair = Limit("pair", 25, 3600, by="ip&user")

    def act(number: int) -> list[str]:
        admitted = []
        for turn in range(30):
            name = f"user {(number + turn) % 5}"
            if rooms[number % 2].limits.check({"ip": IP, "user": name}, [ip, user, pair]):
                admitted.append(name)
        return admitted

    admitted = [name for names in at_once(32, act) for name in names]
    assert len(admitted) == 5 * 25
    for number in range(5):
        name = f"user {number}"
        stands = rooms[0].limits.peek({"ip": IP, "user": name}, [ip, user, pair]).standings
        left = {standing.limit.name: standing.remaining for standing in stands}
        assert left == {"ip": 400 - 125, "user": 60 - 25, "pair": 0}
        assert admitted.count(name) == 25


@pytest.mark.long
def test_a_million_denials_are_a_handful_of_events(
    make_room: Callable[..., Stillroom], client: Any, is_full: bool
) -> None:
    """A million denials (in short 200,000) take no more room than one and make a handful of events, in memory as
    in Redis.
    """
    room = make_room()
    for _ in range(6):
        room.limits.check(IP, [AUTH])
    before, keys = bytes_of_keys(client), client.dbsize()
    many = 1_000_000 if is_full else 200_000
    for turn in range(many):
        room.limits.check(IP, [AUTH])
        if turn % 1_000 == 0:  # as if what is remembered were a thousand seconds old
            for denial in room._limits_body._denials.found.values():
                denial.until = 0.0
    forget_denials(room)
    assert 0.9 * many < int(client.get(client.keys("*!denied")[0])) < many + 20
    assert len(events(client, room)) <= 20
    assert client.dbsize() <= keys + 1  # the counts of one more minute
    assert bytes_of_keys(client) - before < 10_000
    assert len(room._limits_body._denials.found) <= 1
    assert_bounded(client)


def bytes_of_keys(client: Any) -> int:
    return sum(client.memory_usage(key, samples=0) for key in client.scan_iter())


def test_a_flood_of_addresses_keeps_bounded_memory(make_room: Callable[..., Stillroom]) -> None:
    """A process remembers a bounded number of addresses, denied or not."""
    room = make_room(limits_memory=100)
    for number in range(1_000):
        for _ in range(2):
            room.limits.check(f"10.0.{number // 250}.{number % 250}", [Limit("one", 1, 60)])
    assert len(room._limits_body._denials.found) <= 100
    assert len(room._limits_body._local._known) <= 100
    assert len(room._limits_body._local.logs) == 0
