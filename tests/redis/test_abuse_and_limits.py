"""Abuse and limits agree: a ban is a denial of every limit, and both know a user by the same name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom import AUTH, DEFAULT, BanRefused, Limit, Settings
from tests.support.abuse import CLIENT, patterns
from tests.support.bounded import assert_bounded
from tests.support.crowd import PATIENT
from tests.support.limits import age, events, expire_denials, forget_denials


@pytest.fixture
def settings(places: dict[str, Any], rules: Path) -> Settings:
    return Settings(**places | PATIENT | {"abuse_rules": rules})


@pytest.fixture
def other(make_room: Any) -> Iterator[Any]:
    """Open another process of the app, which remembers no denial."""
    return make_room()


def test_a_ban_is_a_denial_of_every_limit(room: Any, other: Any) -> None:
    """A ban denies every limit for as long as it lasts, also one that was never used."""
    room.abuse.ban(CLIENT, 60)
    for limit in (DEFAULT, AUTH, Limit("another", 1_000, 1)):
        decision = room.limits.check({"ip": CLIENT, "user": "ann"}, [limit])
        assert decision.banned
        assert not decision.allowed
        assert 58 <= decision.retry_after <= 61
    room.abuse.lift(CLIENT)
    assert other.limits.check(CLIENT, [DEFAULT]).allowed


@pytest.mark.parametrize("subject", ["2001:db8:1:2::/64", "2001:db8:1::/48"])
def test_a_banned_prefix_is_all_its_addresses(room: Any, subject: str) -> None:
    """A ban on the client's /64 or on its /48 denies all addresses in it and no neighbour."""
    room.abuse.ban(subject, 60)
    assert room.limits.check("2001:db8:1:2::7", [DEFAULT]).banned
    assert room.limits.check("2001:db8:1:2:ffff::", [DEFAULT]).banned
    assert room.limits.check("2001:db8:9:2::7", [DEFAULT]).allowed


def test_both_know_a_user_by_the_same_name(room: Any, client: Any) -> None:
    """A rule may count a user's denials and failures together, because both use the same HMAC."""
    limit = Limit("login", 1, 60, by="user")
    for _ in range(2):
        room.limits.check({"ip": CLIENT, "user": "Ann"}, [limit])
    room.abuse.report("auth_fail", user=" ann")
    denied, failed = (fields for _, fields in client.xrange(room.keys.abuse))
    assert denied[b"kind"] == b"denied"
    assert denied[b"user"] == failed[b"user"]


LOGIN = Limit("login", 5, 60, by="user")


def test_nobody_is_banned_for_guesses_at_his_own_name(room: Any, client: Any) -> None:
    """A user is not banned for guesses at their name: after 63 denials of others, their own 64th bans nobody."""
    for n in range(5 + 63):
        room.limits.check({"ip": f"198.51.100.{n}", "user": "ann"}, [LOGIN])
        forget_denials(room)
    room.limits.check({"ip": CLIENT, "user": "ann"}, [LOGIN])
    assert events(client, room)[-1]["n"] == "64"
    assert events(client, room)[-1].keys() == {"kind", "n", "limit", "user"}
    report = room.abuse.scan()
    assert (report["events"], report["bans"]) == (7, 0)


def test_denials_from_memory_count_for_whom_they_were(room: Any, client: Any) -> None:
    """A process counts denials from memory for the client that was denied, not for the user whose name
    was guessed.
    """
    limits = [DEFAULT, LOGIN]
    for n in range(5 + 100):
        room.limits.check({"ip": f"198.51.100.{n}", "user": "ann"}, limits)
    age(client, 61)
    expire_denials(room)
    assert room.limits.check({"ip": CLIENT, "user": "ann"}, limits)
    assert [event["n"] for event in events(client, room)] == ["1", "100"]
    assert client.keys(f"*{CLIENT}*!denied") == []
    assert room.abuse.scan()["bans"] == 0


def test_who_rotates_through_a_site_is_banned_with_it(room: Any, other: Any, client: Any) -> None:
    """After sixteen /64 of one /48 were denied a login, the next address of the site is banned at its first
    request.
    """
    limit = Limit("login", 1, 60)
    for n in range(16):
        for _ in range(2):
            room.limits.check(f"2001:db8:1:{n:x}::1", [limit], route="/login")
    assert room.abuse.scan()["bans"] == 1
    assert patterns(client, room)[0]["subject"] == "2001:db8:1::/48"
    assert other.limits.check("2001:db8:1:ffff::1", [limit]).banned


def test_a_flood_of_denials_is_few_events(room: Any, client: Any) -> None:
    """Three hundred denials of one client by Redis make nine events, and the hammer among them is found once."""
    for n in range(300):
        room.limits.check(CLIENT, [Limit("login", 5, 3_600 + n)])
    events = [fields for _, fields in client.xrange(room.keys.abuse)]
    assert [int(fields[b"n"]) for fields in events] == [2**n for n in range(9)]
    report = room.abuse.scan()
    assert (report["events"], report["bans"]) == (9, 1)


def test_who_is_denied_from_memory_and_moves_on_is_seen(room: Any, client: Any) -> None:
    """A client that leaves each /64 after a burst is found, because the process reports its denials from memory."""
    page = Limit("page", 1, 60)
    for n in range(16):
        for _ in range(1 + 16):
            room.limits.check(f"2001:db8:1:{n:x}::1", [page])
    assert room.abuse.scan()["bans"] == 0
    expire_denials(room)
    room.abuse.scan()  # which writes down what rides along …
    assert room.abuse.scan()["bans"] == 1
    assert patterns(client, room)[-1]["subject"] == "2001:db8:1::/48"
    told = [event["n"] for event in events(client, room)]
    assert sorted(told) == ["1"] * 16 + ["16"] * 16
    assert all(event["ip"] and event["limit"] == "page" for event in events(client, room))
    room.abuse.scan()
    assert len(events(client, room)) == 32
    assert_bounded(client)


def test_denials_from_memory_are_told_a_hundred_at_a_time(room: Any, client: Any) -> None:
    """Denials from memory are reported a hundred at a time, the largest counts first, and each exactly once."""
    page = Limit("page", 1, 60)
    for n in range(150):
        for _ in range(2 + (3 if n >= 140 else 1)):
            room.limits.check(f"203.0.113.{n}", [page])
    expire_denials(room)
    first = {event["ip"] for event in events(client, room)[150:]}
    assert not first
    for least in (100, 150):
        room.abuse.scan()
        told = events(client, room)[150:]
        assert len(told) == least
    assert {event["ip"] for event in told[:100]} >= {f"203.0.113.{n}" for n in range(140, 150)}
    assert not getattr(room, "inner", room)._limits_body._denials.found


# Networks

NETWORKS = [
    ("203.0.113.0/24", "203.0.113.77", "203.0.114.1"),
    ("203.0.112.0/21", "203.0.119.255", "203.0.120.0"),
    ("198.51.100.8/30", "::ffff:198.51.100.11", "198.51.100.12"),
    ("64.0.0.0/6", "66.1.2.3", "12.1.2.3"),
    ("::ffff:203.0.113.0/120", "203.0.113.7", "203.0.112.7"),
    ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::1"),
    ("2001:db8:1200::/40", "2001:db8:12ff:7::1", "2001:db8:1300::1"),
    ("2001:db8:1:2::/62", "2001:db8:1:3::1", "2001:db8:1:4::1"),
]


@pytest.mark.parametrize(("network", "inside", "outside"), NETWORKS)
def test_any_network_can_be_banned(
    room: Any, other: Any, client: Any, network: str, inside: str, outside: str
) -> None:
    """A network of any width can be banned for every process at once, and a lift leaves nothing behind."""
    for address in (inside, outside):
        assert other.limits.check(address, [DEFAULT])
    ban = room.abuse.ban(network, 60)
    for asked in (room, other):
        assert asked.limits.check(inside, [DEFAULT]).banned
        assert asked.limits.check({"ip": inside, "user": "ann"}, [LOGIN]).banned
        assert asked.limits.peek(inside, [DEFAULT]).banned
        assert asked.limits.reserve(inside, [DEFAULT]).decision.banned
        assert asked.limits.check(outside, [DEFAULT])
        assert asked.limits.check({"user": "ann"}, [Limit("quiz", 9, 60, by="user")])
    assert [found.subject for found in other.abuse.bans()] == [ban.subject]
    assert_bounded(client)
    assert other.abuse.lift(network) is True
    for asked in (room, other):
        forget_denials(asked)
        assert asked.limits.check(inside, [DEFAULT])
    assert room.abuse.bans() == []


def test_a_check_looks_for_few_widths(room: Any, other: Any, client: Any) -> None:
    """A check looks for the usual widths and at most eight others, and forgets a width whose bans have ended."""
    for width in range(24, 32):
        room.abuse.ban(f"203.0.113.0/{width}", 60)
    room.abuse.ban("203.0.113.128/25", 120)
    room.abuse.ban("2001:db8:1::/48", 60)
    with pytest.raises(BanRefused, match="8 other widths"):
        room.abuse.ban("2001:db8::/32", 60)
    assert client.ttl(room.keys.ban_widths) == pytest.approx(120, abs=2)
    client.set(room.keys.ban_widths, b"4/24 1,4/25 99999999999999", ex=60)
    room.abuse.ban("2001:db8::/32", 60)  # those that are over make room
    assert client.get(room.keys.ban_widths).startswith(b"4/25 99999999999999,6/32 ")
    client.delete(room.keys.ban_widths)
    assert other.limits.check("203.0.113.200", [DEFAULT])
    assert getattr(other, "inner", other)._limits_body._requests.make(
        "203.0.113.200", [DEFAULT], 1, ""
    ).bans == (room.keys.ban_at(room.keys.home("ip", "203.0.113.200"), "203.0.113.200"),)


def test_lifted_bans_leave_their_widths_to_others(room: Any, other: Any, client: Any) -> None:
    """A lifted ban takes its width along unless another ban has it: checks are cheaper, others may be banned."""
    for width in range(16, 24):
        room.abuse.ban(f"203.0.0.0/{width}", 86_400)
    room.abuse.ban("198.51.0.0/16", 60)
    for width in range(16, 24):
        assert other.abuse.lift(f"203.0.0.0/{width}")
    widths = client.get(room.keys.ban_widths)
    assert widths.startswith(b"4/16 ")
    assert b"," not in widths
    assert 50 < client.ttl(room.keys.ban_widths) <= 60
    for width in range(24, 31):
        room.abuse.ban(f"203.0.113.0/{width}", 60)
    assert other.limits.check(CLIENT, [DEFAULT]).banned
    assert room.abuse.lift("198.51.0.0/16")
    for width in range(24, 31):
        assert room.abuse.lift(f"203.0.113.0/{width}")
    assert not client.exists(room.keys.ban_widths)
    forget_denials(other)
    assert other.limits.check(CLIENT, [DEFAULT])


@pytest.mark.parametrize("junk", [b"", b"x", b"4/99 1", b"6/200 9,4/ 3,", b"4/24", b"\xff" * 99])
def test_junk_in_the_widths_stops_nobody(room: Any, client: Any, junk: bytes) -> None:
    """A check ignores foreign values among the ban widths."""
    client.set(room.keys.ban_widths, junk, ex=60)
    for address in (CLIENT, "2001:db8::1"):
        assert room.limits.check(address, [DEFAULT])
    room.abuse.ban("203.0.113.0/24", 60)
    assert room.limits.check(CLIENT, [DEFAULT]).banned


def test_denials_from_memory_are_told_though_widths_have_changed(
    room: Any, other: Any, client: Any
) -> None:
    """When the ban widths changed, a request is sent a second time and its denials from memory are counted once."""
    limit = Limit("login", 1, 60)
    for _ in range(1 + 10):
        room.limits.check(CLIENT, [limit])
    other.abuse.ban("198.51.100.0/24", 60)
    expire_denials(room)
    room.limits.check(CLIENT, [limit])
    assert [event["n"] for event in events(client, room)] == ["1", "11"]


# Whose denial is no sign of abuse


def test_what_nobody_meant_is_no_hammer(room: Any, client: Any) -> None:
    """A page whose hundred images are denied makes no event of abuse."""
    limit = Limit("page", 10, 60)
    for n in range(300):
        room.limits.check(CLIENT, [limit], meant=False)
        if n % 3:
            forget_denials(room)
    for _ in range(100):
        assert not room.limits.reserve(CLIENT, [limit], meant=False)
        assert not room.limits.check({"ip": CLIENT, "user": "ann"}, [limit, LOGIN], meant=False)
    assert events(client, room) == []
    assert client.keys("*!denied") == []
    forget_denials(room)
    for _ in range(3):
        room.limits.check(CLIENT, [limit])
        forget_denials(room)
    assert [event["n"] for event in events(client, room)] == ["1", "2"]
