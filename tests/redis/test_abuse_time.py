"""Abuse and time: windows slide both ways, and a step of the server's clock is over within one period."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import redis
from stillroom import DEFAULT, Limit, NoDispatch, Settings, Stillroom
from stillroom.abuse import scan
from stillroom.scripts import abuse_count
from tests.support.abuse import (
    CLIENT,
    abandon,
    ban_of,
    lines,
    patterns,
    put,
    read,
    rules_found,
)
from tests.support.clocked import ClockedServer
from tests.support.crowd import PATIENT
from tests.support.limits import forget_denials

Make = Callable[..., Stillroom]
HOUR = 3_600


# Windows slide both ways


def test_what_a_dead_worker_left_makes_no_fuller_window(
    make_room: Make, client: Any, rules: Path
) -> None:
    """Events that a dead worker left and that are read late do not fill a window:

    18 of 20 in any minute ban nobody.
    """
    room = make_room(abuse_rules=rules)
    for n in range(17):
        put(client, room, "not_found", 125 - n * 3.5, ip=CLIENT, route=f"/old{n}")
    left = read(client, room)
    for n in range(17, 35):
        put(client, room, "not_found", 125 - n * 3.5, ip=CLIENT, route=f"/new{n}")
    assert room.abuse.scan()["events"] == 18
    abandon(client, room, left)
    assert room.abuse.scan()["events"] == 17
    assert rules_found(client, room) == []
    client.xgroup_destroy(room.keys.abuse, "workers")  # and all of them once more
    assert room.abuse.scan()["events"] == 35
    assert rules_found(client, room) == []


def test_a_burst_that_is_read_late_is_found(make_room: Make, client: Any, rules: Path) -> None:
    """A burst of twenty pages in one minute is a pattern, even when newer events were counted before it."""
    room = make_room(abuse_rules=rules)
    for n in range(20):
        put(client, room, "not_found", 100 - n, ip=CLIENT, route=f"/old{n}")
    left = read(client, room)
    put(client, room, "not_found", 30, ip=CLIENT, route="/new")
    room.abuse.scan()
    assert rules_found(client, room) == []
    abandon(client, room, left)
    room.abuse.scan()
    (found,) = patterns(client, room)
    assert (found["rule"], found["count"]) == ("scanner", "20")
    assert float(found["last"]) - float(found["first"]) < 60


def test_a_login_completes_only_what_came_before_it(
    make_room: Make, client: Any, rules: Path
) -> None:
    """A login completes only failures that came before it, in whatever order the events are read."""
    room = make_room(abuse_rules=rules)
    put(client, room, "auth_ok", 20, user="ann")
    left = read(client, room)
    for n in range(12):
        put(client, room, "auth_fail", 10, user="ann", ip=f"203.0.113.{n}")
    room.abuse.scan()
    abandon(client, room, left)
    room.abuse.scan()
    assert "guessed_password" not in rules_found(client, room)


WINDOW, THRESHOLD = 1_000, 4


def counted_by(run: Any, member: str, at: int, most: int) -> Any:
    """Return what the script abuse_count says of one event, counted by a rule whose threshold is 1."""
    rule = (WINDOW, WINDOW, most, 0, 1, 0)
    return run(["groups", "c"], [100, 1, *rule, 1, member, at])[0]


EVENTS = st.lists(st.tuples(st.integers(0, 3_500), st.integers(0, 5)), min_size=1, max_size=24)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(events=EVENTS, order=st.randoms(use_true_random=False), distinct=st.booleans())
def test_no_order_of_reading_makes_a_fuller_window_than_there_was(
    shared_server: Any, events: Any, order: Any, distinct: bool
) -> None:
    """A count is never above the fullest true window that holds its event, however late, repeated or reordered."""
    with redis.Redis.from_url(shared_server.url) as client:
        client.delete("c", "groups")
        run = client.register_script(abuse_count.plain.source)
        seconds, us = client.time()
        start = seconds * 1_000 + us // 1_000 - 10_000
        named = [
            (start + at, f"m{member if distinct else n}") for n, (at, member) in enumerate(events)
        ]
        readings = named + [one for one in named if order.random() < 0.3]
        order.shuffle(readings)
        for at, member in readings:
            count, *_ = counted_by(run, member, at, THRESHOLD * 4)
            ends = [end for end, _ in named if at <= end < at + WINDOW]
            true = max(len({m for t, m in named if end - WINDOW < t <= end}) for end in ends)
            assert int(count) <= true


def test_in_order_the_count_is_exact(client: Any) -> None:
    """Events that are read in order count exactly what their window holds, and report its first and last."""
    run = client.register_script(abuse_count.plain.source)
    seconds, us = client.time()
    start = seconds * 1_000 + us // 1_000 - 10_000
    times = [start + n * 150 for n in range(30)]
    for n, at in enumerate(times):
        counted = counted_by(run, f"m{n}", at, 100)
        expected = [t for t in times[: n + 1] if t > at - WINDOW]
        assert counted[0] == len(expected)
        assert [float(number) for number in counted[1:3]] == [expected[0], at]
        assert counted[3].decode() == f"m{n}"


# The server's clock


@pytest.fixture
def clocked() -> Iterator[ClockedServer]:
    with ClockedServer() as server:
        yield server


@pytest.fixture
def db(clocked: ClockedServer) -> Iterator[Any]:
    with redis.Redis.from_url(clocked.url) as client:
        yield client


@pytest.fixture
def clocked_room(clocked: ClockedServer, rules: Path) -> Iterator[Callable[..., Stillroom]]:
    rooms: list[Stillroom] = []

    def make(**changes: Any) -> Stillroom:
        given = {**PATIENT, "redis_url": clocked.url, "abuse_rules": rules} | changes
        rooms.append(Stillroom(Settings(**given), dispatch=NoDispatch()))
        rooms[-1]._abuse_body._allowance.take = lambda kind, now: True  # type: ignore[method-assign]
        return rooms[-1]

    yield make
    for room in rooms:
        room.close()


def scans(room: Stillroom, count: int, ip: str = CLIENT, word: str = "") -> dict[str, Any]:
    """Record that many missing pages and run a scan."""
    for n in range(count):
        assert room.abuse.report("not_found", ip=ip, route=f"/{word}{n}")
    return room.abuse.scan()


@pytest.mark.parametrize("step", [HOUR, -HOUR, 2 * HOUR, -2 * HOUR])
def test_a_worker_sees_after_a_step_of_the_clock(
    clocked: ClockedServer, db: Any, clocked_room: Make, step: int
) -> None:
    """A worker that connected before a clock step drops no event as late, lists the bans and bans an attack."""
    clocked.set_clock(10 * HOUR)
    room = clocked_room()
    room.abuse.ban("203.0.113.77", 3 * HOUR)
    scans(room, 5, "203.0.113.1")
    clocked.set_clock(10 * HOUR + step)
    report = scans(room, 25)
    assert (report["late"], report["bans"]) == (0, 1)
    listed = [ban.subject for ban in room.abuse.bans()]
    assert CLIENT in listed
    assert ("203.0.113.77" in listed) == (step < 3 * HOUR)
    room.abuse.scan()
    assert [ban.subject for ban in room.abuse.bans()] == listed


def test_a_minute_is_no_hour_after_the_clock_stepped_back(
    clocked: ClockedServer, db: Any, clocked_room: Make
) -> None:
    """After the clock stepped back an hour the stream's ids stand still, and the rules' windows still move."""
    room = clocked_room()
    clocked.set_clock(HOUR)
    room.abuse.report("not_found", ip="198.51.100.1", route="/x")
    for n in range(25):
        clocked.set_clock(n * 50)
        scans(room, 1, word=f"slow{n}-")
        assert ban_of(db, room) is None
    assert scans(room, 25, word="fast")["bans"] == 1


def test_an_attack_is_said_again_after_the_clock_stepped_back(
    clocked: ClockedServer, db: Any, clocked_room: Make
) -> None:
    """After the clock stepped back an hour the next window reports the attack again."""
    room = clocked_room()
    clocked.set_clock(HOUR)
    assert scans(room, 25)["patterns"] == 1
    clocked.set_clock(0)
    assert scans(room, 25, word="a")["patterns"] == 0
    clocked.set_clock(70)
    assert scans(room, 25, word="b")["patterns"] == 1


def test_a_ban_and_a_lift_last_no_longer_after_the_clock_stepped_back(
    clocked: ClockedServer, db: Any, clocked_room: Make
) -> None:
    """After the clock stepped back a ban of five minutes ends in five minutes, and a lift's peace in ten."""
    room = clocked_room()
    clocked.set_clock(HOUR)
    assert scans(room, 25)["bans"] == 1
    clocked.set_clock(0)
    denied = room.limits.check(CLIENT, [DEFAULT])
    assert denied.banned
    assert denied.retry_after < 340, "the first answer says so too"
    clocked.set_clock(340)
    forget_denials(room)
    assert room.limits.check(CLIENT, [DEFAULT])
    clocked.set_clock(2 * HOUR)
    assert scans(room, 25, word="a")["bans"] == 1
    room.abuse.lift(CLIENT)
    clocked.set_clock(HOUR)
    assert scans(room, 25, word="b")["bans"] == 0
    clocked.set_clock(HOUR + 700)
    assert scans(room, 25, word="c")["bans"] == 1


def test_denials_are_of_ten_minutes_after_the_clock_stepped_back(
    clocked: ClockedServer, db: Any, clocked_room: Make
) -> None:
    """One denial a minute never counts as many in ten minutes, also where the clock stepped back an hour."""
    room = clocked_room()
    limit = Limit("search", 1, 50)
    clocked.set_clock(2 * HOUR)
    for minute in range(70):
        if minute:
            clocked.set_clock(HOUR + minute * 60)
        for _ in range(2):
            room.limits.check(CLIENT, [limit])
            forget_denials(room)
    told = [int(fields[b"n"]) for _, fields in db.xrange(room.keys.abuse)]
    assert 2 <= max(told) <= 16
    room.abuse.scan()
    assert ban_of(db, room) is None


def test_a_quota_that_is_nearly_used_is_told_again_after_the_clock_stepped_back(
    clocked: ClockedServer, db: Any, clocked_room: Make
) -> None:
    """A subject near its quota is an event in each window, also after the clock stepped back an hour."""
    room = clocked_room()

    def use_up() -> int:
        for _ in range(9):
            room.limits.check(CLIENT, [Limit("search", 10, 60)])
            forget_denials(room)
        return sum(fields[b"kind"] == b"near" for _, fields in db.xrange(room.keys.abuse))

    clocked.set_clock(HOUR)
    assert use_up() == 1
    told = []
    for n in range(1, 5):
        clocked.set_clock(n * 62)
        told.append(use_up())
    assert told[-2:] == [told[1] + 1, told[1] + 2]


def test_the_cap_is_a_minutes_after_the_clock_stepped_back(
    clocked: ClockedServer, db: Any, clocked_room: Make
) -> None:
    """Bans from before a clock step do not fill the cap until the clock has caught up."""
    room = clocked_room(ban_cap=1)
    clocked.set_clock(HOUR)
    assert scans(room, 25)["bans"] == 1
    assert scans(room, 25, "203.0.113.10")["bans"] == 0
    clocked.set_clock(0)
    assert scans(room, 25, "203.0.113.11")["bans"] == 1


# The cap is no immunity


@pytest.mark.parametrize("why", ["capped", "already"])
def test_a_ban_that_could_not_be_is_made_as_soon_as_it_can(
    clocked: ClockedServer, db: Any, clocked_room: Make, caplog: Any, why: str
) -> None:
    """A ban that the cap or a short ban prevented is made by the next events, without a second line of
    the pattern.
    """
    room = clocked_room(ban_cap=1)
    if why == "capped":
        scans(room, 25, "198.51.100.1")
    else:
        room.abuse.ban(CLIENT, 1)
    for n in range(20):
        room.abuse.report("auth_fail", ip=CLIENT, user=f"u{n}")
    assert room.abuse.scan()["bans"] == 0
    clocked.set_clock(61)
    room.abuse.report("auth_fail", ip=CLIENT, user="one more")
    assert room.abuse.scan()["bans"] == 1
    assert ban_of(db, room)["rule"] == "credential_stuffing"
    said = [line for line in lines(caplog) if line["rule"] == "credential_stuffing"]
    assert [line["action"] for line in said] == [why]
    assert len([p for p in patterns(db, room) if p["rule"] == "credential_stuffing"]) == 1
    assert f"{CLIENT} is banned for" in caplog.text
    # Read again, the event that banned is the same event: no second ban, no step up.
    db.delete(room.keys.ban(CLIENT))
    abandon(db, room, [db.xrevrange(room.keys.abuse, count=1)[0][0]])
    assert room.abuse.scan()["events"] == 1
    assert ban_of(db, room) is None
    assert db.get(room.keys.ban_level(CLIENT)) == b"1"


def test_what_happened_during_a_ban_does_not_ban_after_it(
    make_room: Make, client: Any, rules: Path
) -> None:
    """When two rules see one attack and the worker is late, events from before the end of a ban make
    no second one.
    """
    room = make_room(abuse_rules=rules)
    put(client, room, "denied", 400, ip=CLIENT, n="64")
    room.abuse.scan()
    for n in range(12):
        put(client, room, "auth_fail", 390, ip=CLIENT, user=f"u{n}")
    room.abuse.scan()
    assert [p["action"] for p in patterns(client, room)] == ["ban", "already"]
    client.delete(room.keys.ban(CLIENT))
    put(client, room, "auth_fail", 380, ip=CLIENT, user="late")
    assert room.abuse.scan()["bans"] == 0


# Records of other types


@pytest.mark.parametrize(
    "key",
    [
        "abuse:c:scanner:203.0.113.9",
        "abuse:seen:scanner:203.0.113.9",
        "abuse:groups",
        "abuse:log",
        "bans",
        "bans:times",
        "{rl:ip:203.0.113.9}:!level",
        "{rl:ip:203.0.113.9}:!lifted",
    ],
)
def test_a_key_of_another_type_does_not_blind_the_rules(
    make_room: Make, client: Any, rules: Path, key: str
) -> None:
    """A key of another type, from an older version or another writer, is replaced, and the current attack is
    banned.
    """
    room = make_room(abuse_rules=rules)
    wrong = client.hset if key != "bans:times" else client.sadd
    wrong(f"stillroom:{key}", *(("a", "b") if key != "bans:times" else ("a",)))
    client.expire(f"stillroom:{key}", 100)
    for n in range(25):
        put(client, room, "not_found", ip=CLIENT, route=f"/{n}")
    hits = room.abuse.scan()
    assert (hits["events"], hits["bans"]) == (25, 1)
    assert ban_of(client, room)["rule"] == "scanner"


def test_an_event_that_redis_refuses_to_judge_stops_no_others(
    make_room: Make, client: Any, rules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event that Redis refuses to judge is left and read again by itself; later events are judged in the same
    scan.
    """
    room = make_room(abuse_rules=rules)
    real = scan.Scan._counting

    def counting(self: Any, samples: Any) -> Any:
        command = real(self, samples)
        is_bad = any(sample.group.endswith("66") for sample in samples)
        return (b"LPUSH", self._keys.abuse_groups, b"x") if is_bad else command

    monkeypatch.setattr(scan.Scan, "_counting", counting)
    put(client, room, "not_found", ip="203.0.113.66", route="/x")
    client.zadd(room.keys.abuse_groups, {"x": 1})
    client.expire(room.keys.abuse_groups, 100)
    for n in range(25):
        put(client, room, "not_found", ip=CLIENT, route=f"/{n}")
    report = room.abuse.scan(limit=1)
    assert (report["events"], report["bans"]) == (25, 1)
