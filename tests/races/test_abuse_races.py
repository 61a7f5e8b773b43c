"""Abuse holds under races: several workers on one stream, a lift beside a scan, many threads that report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stillroom import Stillroom
from tests.support.abuse import (
    CLIENT,
    assert_bounded,
    ban_of,
    counts,
    patterns,
    pending,
    put,
)
from tests.support.threads import together


def test_four_workers_share_the_stream(
    make_room: Callable[..., Stillroom], client: Any, rules: Path
) -> None:
    """Four workers share a hundred attacks: one reads each event, and each attack is one pattern, ban
    and step up.
    """
    rooms = [make_room(abuse_rules=rules, ban_cap=10_000) for _ in range(4)]
    attackers = [f"203.0.113.{n}" for n in range(100)]
    for page in range(25):
        pipe = client.pipeline(transaction=False)
        for ip in attackers:
            pipe.xadd(rooms[0].keys.abuse, {"kind": "not_found", "ip": ip, "route": f"/{page}"})
        pipe.execute()
    reports = together(*[partial(room.abuse.scan, 20, 60) for room in rooms])
    assert sum(report["events"] for report in reports) == 2_500
    assert sum(report["bans"] for report in reports) == 100
    assert Counter(p["subject"] for p in patterns(client, rooms[0])) == Counter(attackers)
    assert {client.get(rooms[0].keys.ban_level(ip)) for ip in attackers} == {b"1"}
    assert pending(client, rooms[0]) == 0
    assert set(counts(client).values()) == {25}
    assert_bounded(client)


def test_the_cap_holds_between_workers(
    make_room: Callable[..., Stillroom], client: Any, rules: Path
) -> None:
    """Four workers that find two hundred attacks at once make no more bans a minute than the cap of seven."""
    rooms = [make_room(abuse_rules=rules, ban_cap=7) for _ in range(4)]
    for n in range(200):
        put(client, rooms[0], "denied", ip=f"203.0.113.{n}", n="64")
    reports = together(*[partial(room.abuse.scan, 5, 60) for room in rooms])
    assert sum(report["bans"] for report in reports) == len(client.keys("*!ban")) == 7
    assert Counter(p["action"] for p in patterns(client, rooms[0])) == {"ban": 7, "capped": 193}


def test_a_lift_beside_a_scan_is_final(
    make_room: Callable[..., Stillroom], client: Any, rules: Path
) -> None:
    """After a lift beside a scan there is no ban in either order, and earlier events do not bring it back."""
    scanner, operator = make_room(abuse_rules=rules), make_room(abuse_rules=rules)
    for turn in range(50):
        ip = f"203.0.113.{turn}"
        put(client, scanner, "denied", ip=ip, n="64")
        report, lifted = together(scanner.abuse.scan, partial(operator.abuse.lift, ip))
        assert report["bans"] == int(lifted)
        assert ban_of(client, scanner, ip) is None
        assert client.zscore(scanner.keys.bans, ip) is None
        assert not client.exists(scanner.keys.ban_level(ip))


def test_many_threads_report(make_room: Callable[..., Stillroom], client: Any) -> None:
    """Sixteen threads of one process report at once, and every event is written once."""
    room = make_room()

    def report() -> int:
        for n in range(10):
            room._abuse_body.hold("auth_ok", user="ann")
            assert room.abuse.report("auth_fail", ip=CLIENT, user=f"u{n}")
        return 20

    assert sum(together(*[report] * 16)) == 320
    room.abuse.deliver()
    kinds = Counter(fields[b"kind"] for _, fields in client.xrange(room.keys.abuse))
    assert kinds == {b"auth_fail": 160, b"auth_ok": 160}
