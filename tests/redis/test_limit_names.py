"""Nobody gets a second quota by one name with two windows, two peppers, or two widths of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stillroom import DEFAULT, Limit, Stillroom
from tests.support.limits import age, events, forget_denials, logs, read_log

pytestmark = pytest.mark.usefixtures("bounded")
IP = "203.0.113.7"
LONG, SHORT = Limit("login", 5, 3_600), Limit("login", 100, 1)
Make = Callable[..., Stillroom]


def takes(room: Any, limit: Limit, times: int = 1, subject: Any = IP) -> int:
    admitted = 0
    for _ in range(times):
        forget_denials(room)
        admitted += bool(room.limits.check(subject, [limit]))
    return admitted


# Windows


@pytest.mark.parametrize("who", ["one process", "two processes", "the shorter one first"])
def test_a_shorter_window_drops_nothing_of_a_longer_one(
    make_room: Make, client: Any, who: str
) -> None:
    """Where two plans, routes or deploys give one limit two windows, each counts all hits of its own window."""
    one = make_room()
    other = one if who == "one process" else make_room()
    if who == "the shorter one first":
        takes(other, SHORT, subject="203.0.113.8")
        takes(one, LONG, subject="203.0.113.8")
        other._limits_body._settling.remind()  # as with the counts, every five seconds
    admitted = 0
    for _ in range(6):
        admitted += takes(one, LONG, 10)
        age(client, 2)
        takes(other, SHORT, 1)
        age(client, 2)
    assert admitted <= 5
    assert takes(other, SHORT, 99) == 99  # of its own second nothing is used
    (key,) = [key for key in logs(client) if b"203.0.113.7" in key]
    assert client.ttl(key) > 3_590


def test_a_log_that_two_windows_share_stays_small(room: Any, client: Any) -> None:
    """A log that two windows share has as few entries as the longer window needs, also after a thousand hits."""
    long, short = Limit("api", 10_000, 3_600), Limit("api", 100, 1)
    assert room.limits.check(IP, [long])
    for _ in range(300):
        assert takes(room, short, 3) == 3
        age(client, 11)
    (key,) = logs(client)
    log = read_log(client, key)
    assert len(log) <= 76
    used = 10_000 - room.limits.peek(IP, [long]).remaining
    assert used == sum(n for _, n in log)
    assert 900 <= used <= 901


def test_a_window_that_nobody_has_any_more_is_forgotten(make_room: Make, client: Any) -> None:
    """A longer window that nobody uses any more is forgotten once it is over, and logs get shorter again."""
    takes(make_room(), LONG)
    room = make_room()
    takes(room, SHORT)
    (key,) = logs(client)
    assert client.ttl(key) > 3_590
    window, seen = client.hget(room.keys.limit_windows, "login").split()
    client.hset(
        room.keys.limit_windows, "login", b"%d %d" % (int(window), int(seen) - 3_601 * 10**6)
    )
    room._limits_body._settling.remind()
    client.delete(key)
    takes(room, SHORT)
    assert client.ttl(key) <= 2


def test_windows_are_compared_once_and_then_now_and_then(room: Any, client: Any) -> None:
    """The first check of a name reads its windows.

    A user without the right to read them is limited all the same.
    """
    from tests.support.monitor import sent

    room.state_stats.due = 1 << 62
    takes(room, LONG)
    assert sent(client, lambda: takes(room, LONG)) == ["EVALSHA"]
    client.delete(room.keys.limit_windows)
    client.set(room.keys.limit_windows, "x", ex=100)
    assert takes(room, Limit("other", 5, 60), 6) == 5


# Peppers


OLD, NEW = "o" * 40, "n" * 40
RINGS = {"old": OLD, "old and new": f"{OLD} {NEW}", "new and old": f"{NEW} {OLD}", "new": NEW}
PAIRS = [
    ("old", "old and new"),
    ("old and new", "new and old"),
    ("new and old", "new"),
    ("old", "new and old"),
]
PIN = Limit("pin", 5, 3_600, by="user")
BOTH = Limit("both", 5, 3_600, by="ip&user")
ANN = {"ip": IP, "user": "ann"}


@pytest.fixture(params=PAIRS, ids=" | ".join)
def pair(request: pytest.FixtureRequest, make_room: Make) -> tuple[Stillroom, Stillroom]:
    """Open two processes that run at the same time while peppers are changed."""
    one, other = (make_room(session_peppers=RINGS[name]) for name in request.param)
    return one, other


@pytest.mark.parametrize("limit", [PIN, BOTH], ids=lambda limit: limit.name)
@pytest.mark.parametrize("first", [0, 1])
def test_a_user_has_one_quota_while_peppers_are_changed(
    pair: tuple[Stillroom, Stillroom], limit: Limit, first: int
) -> None:
    """While peppers are changed a user has one quota, whichever process asks and in whatever order."""
    here, there = pair if first == 0 else pair[::-1]
    admitted = takes(here, limit, 2, ANN) + takes(there, limit, 2, ANN) + takes(here, limit, 9, ANN)
    admitted += takes(there, limit, 9, ANN)
    assert admitted == 5
    for room in pair:
        forget_denials(room)
        denied = room.limits.check(ANN, [limit, DEFAULT])
        assert (denied.allowed, denied.violated) == (False, (limit,))
        assert 3_590 < denied.retry_after <= 3_600
        assert len(denied.standings) == 2
        assert denied.headers()["RateLimit"].count("pin" if limit is PIN else "both") == 1


def test_a_refund_is_one_for_all_names(pair: tuple[Stillroom, Stillroom]) -> None:
    """A reservation of one process is refunded by another one for all names of the user."""
    here, there = pair
    held = [here.limits.reserve(ANN, [PIN]) for _ in range(5)]
    assert not there.limits.check(ANN, [PIN])
    assert here.limits.refund(held[0]) is True
    assert here.limits.peek(ANN, [PIN]).remaining == 1
    assert takes(there, PIN, 3, ANN) == 1
    here.limits.reset(ANN, [PIN])
    assert here.limits.peek(ANN, [PIN]).remaining == 5


def test_an_event_is_told_once_for_all_names(make_room: Make, client: Any) -> None:
    """A user with two logs makes one event when near the quota or denied."""
    room = make_room(session_peppers=RINGS["new and old"])
    limit = Limit("ten", 10, 60, by="user")
    assert takes(room, limit, 12, ANN) == 10
    assert [event["kind"] for event in events(client, room)] == ["near", "denied", "denied"]
    assert {event["user"] for event in events(client, room)} == {
        event["user"] for event in events(client, room)[:1]
    }


# Networks


def test_a_ban_is_seen_by_processes_with_another_prefix(make_room: Make) -> None:
    """While the width of a client's network is changed, each process reads and lifts the bans of both widths."""
    address = "2001:db8:1:2::5"
    rooms = {width: make_room(limit_v6_prefix=width) for width in (64, 60, 56)}
    for banning in rooms.values():
        for looking in rooms.values():
            banning.abuse.ban(address, 3_600)
            assert looking.limits.check(address, [DEFAULT]).banned
            forget_denials(looking)
            assert looking.abuse.lift(address) is True
            assert looking.limits.check(address, [DEFAULT])
            forget_denials(looking)
    rooms[64].abuse.ban(address, 3_600)
    assert rooms[56].limits.check("2001:db8:1:3::5", [DEFAULT])
    rooms[56].abuse.ban(address, 3_600)
    assert rooms[64].limits.check("2001:db8:1:3::5", [DEFAULT]).banned
