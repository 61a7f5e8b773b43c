"""Abuse and the limiter together: what one bans the other denies, and both know a user by the same name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom import AUTH, DEFAULT, Limit, Settings
from tests.support.abuse import ARMED, CLIENT, patterns
from tests.support.crowd import PATIENT
from tests.support.limits import age, events, expire_denials, forget_denials


@pytest.fixture
def settings(server: Any, tmp_path: Path) -> Settings:
    (path := tmp_path / "rules.toml").write_text(ARMED)
    return Settings(**{"redis_url": server.url} | PATIENT | {"abuse_rules": path})


@pytest.fixture
def other(make_room: Any) -> Iterator[Any]:
    """Another process of the app, which remembers no denial."""
    return make_room()


def test_a_ban_is_a_denial_of_every_limit(room: Any, other: Any) -> None:
    """For as long as the ban lasts; a limit that was never used is denied too."""
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
    """The client's /64, or the /48 around it; its neighbours are let through."""
    room.abuse.ban(subject, 60)
    assert room.limits.check("2001:db8:1:2::7", [DEFAULT]).banned
    assert room.limits.check("2001:db8:1:2:ffff::", [DEFAULT]).banned
    assert room.limits.check("2001:db8:9:2::7", [DEFAULT]).allowed


def test_both_know_a_user_by_the_same_name(room: Any, client: Any) -> None:
    """A rule may count denials and failures of one user together."""
    limit = Limit("login", 1, 60, by="user")
    for _ in range(2):
        room.limits.check({"ip": CLIENT, "user": "Ann"}, [limit])
    room.abuse.report("auth_fail", user=" ann")
    denied, failed = (fields for _, fields in client.xrange(room.keys.abuse))
    assert denied[b"kind"] == b"denied"
    assert denied[b"user"] == failed[b"user"]


LOGIN = Limit("login", 5, 60, by="user")


def test_nobody_is_banned_for_guesses_at_his_own_name(room: Any, client: Any) -> None:
    """Others are denied 63 times as this user. The 64th denial is the user's own, and makes him no hammer."""
    for n in range(5 + 63):
        room.limits.check({"ip": f"198.51.100.{n}", "user": "ann"}, [LOGIN])
        forget_denials(room)
    room.limits.check({"ip": CLIENT, "user": "ann"}, [LOGIN])
    assert events(client, room)[-1]["n"] == "64"
    assert events(client, room)[-1].keys() == {"kind", "n", "limit", "user"}
    report = room.abuse.scan()
    assert (report["events"], report["bans"]) == (7, 0)


def test_denials_from_memory_count_for_whom_they_were(room: Any, client: Any) -> None:
    """A process denies a hundred guesses at a user's name; he comes himself, and none of them is his."""
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
    """Sixteen /64 of one /48 that go on although they are denied: the next one is banned before it begins."""
    limit = Limit("login", 1, 60)
    for n in range(16):
        for _ in range(1 + 32):
            room.limits.check(f"2001:db8:1:{n:x}::1", [limit], route="/login")
            forget_denials(room)
    assert room.abuse.scan()["bans"] == 1
    assert patterns(client, room)[0]["subject"] == "2001:db8:1::/48"
    assert other.limits.check("2001:db8:1:ffff::1", [limit]).banned


def test_a_flood_of_denials_is_few_events(room: Any, client: Any) -> None:
    """Three hundred of one client, each asked of Redis, are nine; the hammer among them is seen once."""
    for n in range(300):
        room.limits.check(CLIENT, [Limit("login", 5, 3_600 + n)])
    events = [fields for _, fields in client.xrange(room.keys.abuse)]
    assert [int(fields[b"n"]) for fields in events] == [2**n for n in range(9)]
    report = room.abuse.scan()
    assert (report["events"], report["bans"]) == (9, 1)
