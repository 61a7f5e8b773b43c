"""Abuse: events come in, patterns and bans come out, on real servers and with both faces."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from stillroom import BanRefused, EventRefused, Settings, Stillroom
from stillroom.abuse import body, scan
from stillroom.operation import Once
from stillroom.web.status.numbers import iso
from tests.support.abuse import (
    CLIENT,
    abandon,
    aside,
    assert_bounded,
    ban_of,
    counts,
    end_ban,
    forget_what_was_said,
    leave_behind,
    lines,
    patterns,
    pending,
    put,
    read,
    rules_found,
)
from tests.support.crowd import PATIENT
from tests.support.sessions import end_grace
from tests.support.stepper import Stepper

PROXY = "198.51.100.7"
ALLOWED = "192.0.2.0/24"


@pytest.fixture
def settings(places: dict[str, Any], rules: Path) -> Settings:
    given = {"abuse_rules": rules, "abuse_allow": ALLOWED, "trusted_proxies": f"{PROXY}, unix"}
    return Settings(**places | PATIENT | given)


@pytest.fixture(autouse=True)
def bounded(client: Any) -> Iterator[None]:
    """Check after every test that each remaining key has a TTL."""
    yield
    assert_bounded(client)


def hammer(client: Any, room: Any, ip: str = CLIENT, ago: float = 0.0) -> bytes:
    """Record one event that is enough for a ban: 64 denials."""
    return put(client, room, "denied", ago, ip=ip, n="64", limit="default")


# Events


def test_an_event_is_written_down(room: Any, client: Any) -> None:
    """An event holds only the known facts; the user is an HMAC, however the name was typed."""
    assert room.abuse.report("auth_fail", ip="2001:db8:1:2::7", user="Ann ", route="/login?a=b")
    assert room.abuse.report("auth_ok", user="ann")
    assert room.abuse.report("csrf_fail", ip="no address")
    (one, two, three) = [fields for _, fields in client.xrange(room.keys.abuse)]
    user = one.pop(b"user")
    assert one == {
        b"kind": b"auth_fail",
        b"n": b"1",
        b"ip": b"2001:db8:1:2::/64",
        b"route": b"/login",
    }
    assert two == {b"kind": b"auth_ok", b"n": b"1", b"user": user}
    assert three == {b"kind": b"csrf_fail", b"n": b"1", b"ip": b"unknown"}
    assert room.state_stats.counts["abuse_events"] == 3


def test_a_report_is_one_round_trip(room: Any, client: Any) -> None:
    """A report is one XADD, which also trims the stream."""
    room.abuse.report("auth_fail", ip=CLIENT)
    with client.monitor() as monitor:
        room.abuse.report("auth_fail", ip=CLIENT)
        client.echo("done")
        seen = [
            c["command"] for c in takewhile(lambda c: "ECHO" not in c["command"], monitor.listen())
        ]
    assert [text for text in seen if "abuse" in text] == [
        f"XADD stillroom:abuse MAXLEN ~ 100000 * kind auth_fail n 1 ip {CLIENT}"
    ]


def test_an_event_is_never_sent_twice(make_room: Any) -> None:
    """An event is never sent again when its connection breaks, because a second copy would count twice."""
    room = make_room()
    room._abuse_body.hold("auth_ok", user="ann")
    for operation in (
        room._abuse_body.report("auth_fail", ip=CLIENT),
        room._abuse_body.deliver(),
    ):
        room._abuse_body.hold("auth_ok", user="ann")
        assert type(next(operation)) is Once
        operation.close()


def test_a_report_of_nothing_is_refused(room: Any, client: Any) -> None:
    """A report with a kind no rule can know, or without a subject, raises an error in the app."""
    with pytest.raises(EventRefused, match="did you mean auth_fail"):
        room.abuse.report("auth_fial", ip=CLIENT)
    with pytest.raises(EventRefused, match="needs a subject"):
        room.abuse.report("auth_fail", route="/login")
    assert not client.exists(room.keys.abuse)


def test_a_rule_may_name_a_kind_of_the_apps_own(room: Any, client: Any) -> None:
    """A rule may count an app's own kind of event: five declined cards are a pattern."""
    for _ in range(5):
        assert room.abuse.report("card_declined", ip=CLIENT)
    room.abuse.scan()
    assert rules_found(client, room) == ["card_testing"]


def test_a_flood_of_reports_is_cut_short(room: Any, client: Any, monkeypatch: Any) -> None:
    """A process sends a bounded number of reports of one kind. Further ones return False and are counted."""
    inner = getattr(room, "inner", room)._abuse_body
    monkeypatch.setattr(inner, "_allowance", body.Allowance(rate=0.001, burst=20))
    told = [room.abuse.report("not_found", ip=CLIENT, route=f"/{n}") for n in range(1_000)]
    assert told == [True] * 20 + [False] * 980
    assert room.abuse.report("auth_fail", ip=CLIENT)
    assert client.xlen(room.keys.abuse) == 21
    assert room.state_stats.counts["abuse_dropped"] == 980


def test_the_stream_is_cut(room: Any, client: Any, monkeypatch: Any) -> None:
    """Without a worker the stream keeps its newest events and never grows past its length."""
    monkeypatch.setattr(getattr(room, "inner", room)._abuse_body._keys, "events_kept", 100)
    for _ in range(450):
        room.abuse.report("auth_fail", ip=CLIENT)
    assert 100 <= client.xlen(room.keys.abuse) <= 200


def test_a_replayed_token_is_told_by_itself(room: Any, client: Any) -> None:
    """The replay of a session token is an event of abuse. It is sent with a later batch and is a pattern."""
    first = room.sessions.create("ann")
    room.sessions.rotate(first)
    end_grace(client, room, first.handle)
    assert room.sessions.get(first) is None
    assert not client.exists(room.keys.abuse)
    room.state_stats.due = 0.0
    room.sessions.count()
    room.abuse.scan()
    (pattern,) = patterns(client, room)
    assert (pattern["rule"], pattern["group_by"]) == ("token_replay", "user")
    room.abuse.report("auth_ok", user="ann")
    assert client.xrevrange(room.keys.abuse)[0][1][b"user"].decode() == pattern["subject"]


def test_what_waits_to_ride_is_sent_with_a_report_and_at_the_end(room: Any, client: Any) -> None:
    """Queued events are bounded, are sent with the next report, and are not lost when the room is closed."""
    inner = getattr(room, "inner", room)._abuse_body
    inner.hold("session_replay", user="ann")
    inner.hold("session_replay", user=None)
    room.abuse.report("auth_fail", ip=CLIENT)
    assert [f[b"kind"] for _, f in client.xrange(room.keys.abuse)] == [
        b"session_replay",
        b"auth_fail",
    ]
    for _ in range(2_000):
        inner.hold("session_replay", user="ann")
    assert room.abuse.deliver() == 0
    assert 400 < client.xlen(room.keys.abuse) < 1_000
    inner.hold("auth_ok", user="ann")
    room.close()
    assert client.xrevrange(room.keys.abuse)[0][1][b"kind"] == b"auth_ok"


@pytest.mark.parametrize("flood", [["not_found"], ["not_found", "session_unknown", "csrf_fail"]])
def test_a_flood_of_one_kind_drowns_no_other(room: Any, client: Any, flood: list[str]) -> None:
    """A flood of one kind fills only its own queue. The alarm of a stolen token is written, and written first."""
    inner = getattr(room, "inner", room)._abuse_body
    room.state_stats.due = 1 << 62
    for n in range(1_200):
        for kind in flood:
            inner.hold(kind, ip=CLIENT, route=f"/{n}")
    first = room.sessions.create("ann")
    room.sessions.rotate(first)
    end_grace(client, room, first.handle)
    assert room.sessions.get(first) is None
    room.abuse.report("auth_fail", ip=CLIENT)
    kinds = [f[b"kind"].decode() for _, f in client.xrange(room.keys.abuse)]
    assert kinds[0] == "session_replay"
    assert room.abuse.deliver() == 0
    kinds = [f[b"kind"].decode() for _, f in client.xrange(room.keys.abuse)]
    assert all(490 <= kinds.count(kind) <= 700 for kind in flood)


def test_events_that_waited_out_an_outage_are_of_when_they_happened(
    room: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that were held for minutes are judged by when they happened: two pages a minute are no scan."""
    inner = getattr(room, "inner", room)._abuse_body
    for ip, seconds in ((CLIENT, 30.0), ("203.0.113.10", 1.0)):
        for n in range(25):
            with monkeypatch.context() as patch:
                then = time.monotonic() - seconds * (25 - n)
                patch.setattr("stillroom.abuse.body.time.monotonic", lambda then=then: then)
                inner.hold("not_found", ip=ip, route=f"/{n}")
    assert room.abuse.deliver() == 0
    room.abuse.scan()
    (found,) = patterns(client, room)
    assert (found["rule"], found["subject"]) == ("scanner", "203.0.113.10")
    assert float(found["last"]) - float(found["first"]) == pytest.approx(24, abs=6)


# Rules


def fail(n: int) -> dict[str, str]:
    return {"kind": "auth_fail", "ip": CLIENT, "user": f"u{n}"}


RULES: list[tuple[str, Callable[[int], dict[str, str]], int]] = [
    ("hammer", lambda n: {"kind": "denied", "ip": CLIENT, "n": str(2**n)}, 7),
    ("credential_stuffing", fail, 10),
    ("password_spraying", lambda n: fail(0) | {"ip": f"203.0.113.{n}"}, 10),
    ("scanner", lambda n: {"kind": "not_found", "ip": CLIENT, "route": f"/{n}"}, 20),
    (
        "session_guessing",
        lambda n: {"kind": "session_unknown", "ip": CLIENT, "token": f"t{n}"},
        20,
    ),
    ("token_replay", lambda n: {"kind": "session_replay", "user": "u"}, 1),
    (
        "ipv6_rotation",
        lambda n: {"kind": "denied", "ip": f"2001:db8:1:{n:x}::/64", "n": "16"},
        16,
    ),
    ("creeping_scraper", lambda n: {"kind": "near", "ip": CLIENT, "ago": str(3_400 - n * 61)}, 30),
    (
        "guessed_password",
        lambda n: {"kind": "auth_fail" if n < 10 else "auth_ok", "user": "u"},
        11,
    ),
    (
        "stuffed_credentials",
        lambda n: {"kind": "auth_fail" if n < 5 else "auth_ok", "ip": CLIENT, "user": f"u{n}"},
        6,
    ),
]


@pytest.mark.parametrize(("rule", "event", "count"), RULES, ids=[rule[0] for rule in RULES])
def test_a_rule_sees_its_pattern_and_nothing_less(
    room: Any, client: Any, rule: str, event: Callable[[int], dict[str, str]], count: int
) -> None:
    """A rule finds nothing one event below its threshold. The next event makes one pattern, however many follow."""
    events = [event(n) for n in range(count)] + [event(count - 1)] * 3
    for fields in events[: count - 1]:
        put(client, room, ago=float(fields.pop("ago", "0")), **fields)
    room.abuse.scan()
    assert rule not in rules_found(client, room)
    for fields in events[count - 1 :]:
        put(client, room, ago=float(fields.pop("ago", "0")), **fields)
        room.abuse.scan()
    assert rules_found(client, room).count(rule) == 1


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "not_found", "ip": CLIENT, "route": "/same"},
        {"kind": "auth_fail", "ip": CLIENT, "user": "same"},
        {"kind": "denied", "ip": CLIENT, "n": "16"},
        {"kind": "near", "ip": CLIENT},
        {"kind": "denied", "ip": "2001:db8:1:2::/64"},
        {"kind": "session_unknown", "ip": CLIENT, "token": "same"},
    ],
    ids=lambda event: event["kind"],
)
def test_the_same_a_hundred_times_is_none_of_these(room: Any, client: Any, event: Any) -> None:
    """A rule that counts different pages, users or clients counts a repeated one once."""
    for _ in range(100):
        put(client, room, **event)
    room.abuse.scan()
    assert rules_found(client, room) == []


def test_what_is_older_than_the_window_does_not_count(room: Any, client: Any) -> None:
    """Events older than the window do not count: nineteen pages a minute ago and nineteen now are no scanner."""
    for n in range(19):
        put(client, room, "not_found", ago=70, ip=CLIENT, route=f"/a{n}")
    for n in range(19):
        put(client, room, "not_found", ip=CLIENT, route=f"/b{n}")
    room.abuse.scan()
    assert rules_found(client, room) == []
    put(client, room, "not_found", ip=CLIENT, route="/b19")
    room.abuse.scan()
    assert rules_found(client, room) == ["scanner"]


def test_a_pause_ends_a_row_of_windows(room: Any, client: Any) -> None:
    """A pause ends a row of windows: fifteen minutes near the quota, five without and fifteen more are
    not thirty.
    """
    for minute in range(36):
        if not 15 <= minute < 20:
            put(client, room, "near", ago=60.0 * (36 - minute), ip=CLIENT, limit="api")
    room.abuse.scan()
    assert rules_found(client, room) == []
    assert list(counts(client).values()) == [31]


def test_an_attack_that_goes_on_is_said_again_in_each_window(room: Any, client: Any) -> None:
    """An attack that goes on is reported once in ten minutes, not once for each denial."""
    for ago in (1_500, 1_400, 1_000, 650, 300, 0):
        hammer(client, room, ago=ago)
        room.abuse.scan()
    assert rules_found(client, room) == ["hammer"] * 3


def test_a_success_after_failures_is_told_for_each_account(
    room: Any, client: Any, caplog: Any
) -> None:
    """Each account's success after failures is reported with the user's HMAC, also within one attack."""
    for n in range(6):
        room.abuse.report("auth_fail", ip=CLIENT, user=f"user{n}")
    for name in ("ann", "bob", "ann"):
        room.abuse.report("auth_ok", ip=CLIENT, user=name)
    room.abuse.scan()
    said = [line for line in lines(caplog) if line["rule"] == "stuffed_credentials"]
    assert len({line["user"] for line in said}) == len(said) == 2
    assert all("compromised?" in line["why"] and line["subject"] == CLIENT for line in said)
    assert client.keys("*!ban") == []


def test_spraying_does_not_lock_its_victim_out(room: Any, client: Any) -> None:
    """When two hundred addresses guess one user's password, the pattern is found and nobody is banned for it."""
    for n in range(200):
        room.abuse.report("auth_fail", ip=f"203.0.113.{n}", user="victim", route="/login")
    room.abuse.scan()
    (pattern,) = patterns(client, room)
    assert (pattern["rule"], pattern["action"], pattern["shadow"]) == (
        "password_spraying",
        "log",
        "false",
    )
    assert client.keys("*{rl:*") == []


# What is said


def test_a_pattern_is_a_line_and_an_entry(room: Any, client: Any, caplog: Any) -> None:
    """A pattern's log line and its entry hold the same: rule, subject, count, time, examples, action and last
    event.
    """
    names = [
        put(client, room, "not_found", ago=1 - n / 100, ip=CLIENT, route=f"/{n}") for n in range(25)
    ]
    report = room.abuse.scan()
    counted = {"events": 25, "patterns": 1, "bans": 1, "aside": 0, "late": 0, "done": True}
    assert report == counted
    (line,), (entry,) = lines(caplog), patterns(client, room)
    expected = {
        "rule": "scanner",
        "group_by": "ip",
        "subject": CLIENT,
        "count": 25,
        "threshold": 20,
        "distinct": "route",
        "window": 60,
        "user": "",
        "route": "/19",
        "examples": ["/24", "/23", "/22", "/21", "/20"],
        "action": "ban",
        "shadow": False,
        "level": 0,
        "event": names[19].decode(),
    }
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["last"] - line["first"] < 60
    assert 300 <= line["ban_seconds"] <= 330
    assert line["why"]
    said = {
        name: value if isinstance(value, str) else str(value) for name, value in expected.items()
    }
    del said["examples"]
    assert {name: entry[name] for name in said} == said | {"shadow": "false"}
    assert [r.name for r in caplog.records if "abuse.pattern" in r.message] == ["stillroom.abuse"]


def test_no_line_and_no_key_holds_a_name_or_a_token(room: Any, client: Any, caplog: Any) -> None:
    """Users are stored as HMACs and queries and tokens are cut out of commands, keys, values and logs."""
    caplog.set_level(logging.DEBUG)
    token = "07.Zx8Jx0fQ2LkT7uVw5yZa1bZx8Jx0fQ2LkT7uVw5yZa1"
    with client.monitor() as monitor:
        for n in range(25):
            room.abuse.report("auth_fail", ip=CLIENT, user=f"canary{n}", route=f"/login?t={token}")
            room.abuse.report("not_found", ip=CLIENT, route=f"/{n}/{token}?q=canary")
        room.abuse.scan()
        client.echo("done")
        seen = [
            c["command"] for c in takewhile(lambda c: "ECHO" not in c["command"], monitor.listen())
        ]
    assert set(rules_found(client, room)) == {"credential_stuffing", "scanner"}
    shown = seen + [record.getMessage() for record in caplog.records]
    shown += [repr((key, client.dump(key))) for key in client.keys("*")]
    assert not [text for text in shown if "canary" in text or token[3:] in text]


@pytest.mark.parametrize("text", ["/a\nERROR: x", "/\x1b[2J", '/", "rule": "x', "/\ud800é"])
def test_a_line_can_not_be_forged(room: Any, client: Any, caplog: Any, text: str) -> None:
    """A pattern is logged as one line of printable ASCII, whatever a request or another writer put into it."""
    for n in range(10):
        room.abuse.report("not_found", ip=CLIENT, route=f"{text}{n}")
        raw = f"{text}x{n}".encode("utf-8", "surrogatepass")
        client.xadd(room.keys.abuse, {"kind": "not_found", "ip": CLIENT, "route": raw})
    room.abuse.scan()
    (line,) = [r.getMessage() for r in caplog.records if r.name == "stillroom.abuse"]
    assert line.isprintable()
    assert line.isascii()
    assert lines(caplog)[0]["count"] == 20


# Bans


def test_a_rule_in_shadow_bans_nobody(make_room: Any, client: Any, caplog: Any) -> None:
    """The default rules report what they would ban and leave no ban, no level and no index."""
    room = make_room()
    hammer(client, room)
    report = room.abuse.scan()
    assert (report["patterns"], report["bans"]) == (1, 0)
    (line,) = lines(caplog)
    assert (line["action"], line["shadow"], line["ban_seconds"]) == ("ban", True, 0)
    assert client.keys("*{rl:*") == client.keys("*:bans*") == []


def test_a_ban_is_a_key_that_says_why(room: Any, client: Any) -> None:
    """A ban's TTL is its length: five minutes plus up to a tenth, so that not all clients return at once."""
    hammer(client, room)
    room.abuse.scan()
    assert 295_000 < client.pttl(room.keys.ban(CLIENT)) <= 330_000
    about = ban_of(client, room)
    assert (about["rule"], about["level"], about["by"]) == ("hammer", 0, "rule")
    (found,) = room.abuse.bans()
    assert (found.subject, found.rule, found.level, found.by) == (CLIENT, "hammer", 0, "rule")
    assert 300 <= found.until - found.since <= 330
    assert room.state_stats.counts["bans"] == 0  # written down at the end of the scan
    assert 0 < client.ttl(room.keys.ban_level(CLIENT)) <= 7 * 86_400


def test_bans_grow_longer_and_a_quiet_week_forgets(room: Any, client: Any) -> None:
    """Bans last 5 minutes, then 20, then 80, and a day at most.

    They begin at 5 again once the level has expired.
    """
    for level, seconds in enumerate([300, 1_200, 4_800, 19_200, 76_800, 86_400, 86_400]):
        hammer(client, room)
        room.abuse.scan()
        assert ban_of(client, room)["level"] == level
        assert seconds * 990 < client.pttl(room.keys.ban(CLIENT)) <= seconds * 1_100
        end_ban(client, room)
        forget_what_was_said(client)
    client.delete(room.keys.ban_level(CLIENT))
    hammer(client, room)
    room.abuse.scan()
    assert ban_of(client, room)["level"] == 0


def test_two_rules_that_see_one_attack_are_one_ban(room: Any, client: Any) -> None:
    """A second rule that sees the same attack says `already`; the ban gets no longer and the level stays."""
    hammer(client, room)
    for n in range(20):
        put(client, room, "not_found", ip=CLIENT, route=f"/{n}")
    assert room.abuse.scan()["bans"] == 1
    assert sorted(p["action"] for p in patterns(client, room)) == ["already", "ban"]
    assert client.get(room.keys.ban_level(CLIENT)) == b"1"


def test_bans_have_a_cap(make_room: Any, client: Any, rules: Path) -> None:
    """Past the cap of bans in a minute patterns are only logged, so that one bad rule cannot lock everybody out."""
    room = make_room(abuse_rules=rules, ban_cap=3)
    for n in range(10):
        hammer(client, room, f"203.0.113.{n}")
    assert room.abuse.scan()["bans"] == 3
    assert [p["action"] for p in patterns(client, room)] == ["ban"] * 3 + ["capped"] * 7
    assert len(client.keys("*!ban")) == len(client.keys("*!level")) == 3
    for index in range(3):  # a minute later
        client.lset(room.keys.ban_times, index, int(client.time()[0] - 61) * 1_000)
    forget_what_was_said(client)
    hammer(client, room, "203.0.113.200")
    assert room.abuse.scan()["bans"] == 1
    assert make_room(abuse_rules=rules, ban_cap=0).abuse.scan()["bans"] == 0


def test_a_cap_of_none_bans_nobody(make_room: Any, client: Any, rules: Path) -> None:
    """`ban_cap=0` switches all bans off."""
    room = make_room(abuse_rules=rules, ban_cap=0)
    hammer(client, room)
    room.abuse.scan()
    assert [p["action"] for p in patterns(client, room)] == ["capped"]


@pytest.mark.parametrize(
    "ip", ["127.0.0.1", "10.0.0.5", PROXY, "192.0.2.44", "fd00:1:2:3::/64", "unknown"]
)
def test_some_are_never_banned(room: Any, client: Any, ip: str) -> None:
    """Private ranges, proxies, the allowlist and the bucket of unknown clients are reported and never banned."""
    hammer(client, room, ip)
    room.abuse.scan()
    assert [(p["subject"], p["action"]) for p in patterns(client, room)] == [(ip, "exempt")]
    assert client.keys("*{rl:*") == []


def test_rotating_addresses_are_banned_as_one_site(room: Any, client: Any) -> None:
    """When sixteen /64 of one /48 hammer, the /48 is banned under the key that the limiter reads."""
    for n in range(16):
        put(client, room, "denied", ip=f"2001:db8:1:{n:x}::/64", n="16")
    room.abuse.scan()
    assert [found.subject for found in room.abuse.bans()] == ["2001:db8:1::/48"]
    assert client.exists(room.keys.ban("2001:db8:1::/48"))


EACH = [
    ("denied", 16, lambda n: {"n": str(n + 1), "limit": "page"}),
    ("denied", 1, lambda n: {"n": str(n + 1), "limit": "auth"}),
    ("auth_fail", 5, lambda n: {"user": "u"}),
    ("not_found", 10, lambda n: {"route": f"/{n}"}),
    ("session_unknown", 5, lambda n: {"token": f"t{n}"}),
]


@pytest.mark.parametrize(("kind", "least", "about"), EACH)
def test_a_site_is_banned_only_for_addresses_that_did_enough_by_themselves(
    room: Any, client: Any, kind: str, least: int, about: Callable[[int], dict[str, str]]
) -> None:
    """A site is banned for sixteen clients with enough events each, not for a hundred with one too few."""
    for customer in range(100):
        for n in range(least - 1):
            put(client, room, kind, ip=f"2001:db8:1:{customer:x}::/64", **about(n))
    room.abuse.scan()
    assert "ipv6_rotation" not in rules_found(client, room)
    for customer in range(16):
        put(client, room, kind, ip=f"2001:db8:1:{customer:x}::/64", **about(least - 1))
    room.abuse.scan()
    assert "ipv6_rotation" in rules_found(client, room)


@pytest.mark.parametrize(
    "path", ["/apple-touch-icon-120x120.png", "/favicon.ico", "/.well-known/x"]
)
def test_what_browsers_ask_for_by_themselves_is_no_attack(
    room: Any, client: Any, path: str
) -> None:
    """Files that browsers request by themselves are no attack, however many one address or a whole
    site requests.
    """
    for n in range(100):
        folder = "" if path.startswith("/.") else f"/folder{n}"
        put(client, room, "not_found", ip=CLIENT, route=folder + path)
        put(client, room, "not_found", ip=f"2001:db8:1:{n:x}::/64", route=path)
    room.abuse.scan()
    assert rules_found(client, room) == []


def test_one_token_shown_again_and_again_is_one_guess(room: Any, client: Any) -> None:
    """A page that polls with the cookie of an ended session makes one guess; another token is another guess."""
    for n in range(20):
        for _ in range(50):
            put(client, room, "session_unknown", ip=CLIENT, token="stale" if n < 19 else f"t{n}")
    room.abuse.scan()
    assert rules_found(client, room) == []
    for n in range(18):
        room.abuse.report("session_unknown", ip=CLIENT, token=f"07.{n:043}")
    room.abuse.scan()
    assert rules_found(client, room) == ["session_guessing"]
    assert not [
        1 for _, fields in client.xrange(room.keys.abuse) if b"07." in repr(fields).encode()
    ]


@pytest.mark.parametrize("subject", [None, 5, b"203.0.113.7", "", "junk"])
def test_what_is_no_address_is_not_banned(room: Any, subject: Any) -> None:
    """A subject that is no address is refused in a sentence, and has no ban to lift."""
    with pytest.raises(BanRefused, match="neither an address nor a network"):
        room.abuse.ban(subject, 60)
    assert room.abuse.lift(subject) is False


def test_an_operator_bans_and_lifts(room: Any, client: Any) -> None:
    """An operator bans for any time up to 30 days and lifts bans. The list begins with the ban that ends last, and
    shows each reason in its language, on one line.
    """
    one = room.abuse.ban("203.0.113.7", 60, reason="vu à\nParis")
    room.abuse.ban("2001:db8:1:2::99", 600)
    room.abuse.ban("2001:DB8:2::/48", 86_400)
    listed = room.abuse.bans()
    names = ["2001:db8:2::/48", "2001:db8:1:2::/64", "203.0.113.7"]
    assert [found.subject for found in listed] == names
    assert listed[2] == one
    assert (one.by, one.rule, one.reason) == ("operator", "", "vu à\\nParis")
    assert one.until - one.since == pytest.approx(60)
    assert client.ttl(room.keys.ban("203.0.113.7")) == pytest.approx(60, abs=2)
    room.abuse.ban("203.0.113.7", 120)
    assert len(room.abuse.bans()) == 3
    assert len(room.abuse.bans(limit=2)) == 2
    for name in ("2001:db8:2::1/48", "2001:db8:1:2::", "::ffff:203.0.113.7/128"):
        assert room.abuse.lift(name) is True
        assert room.abuse.lift(name) is False
    assert room.abuse.bans() == []
    assert room.abuse.lift("nobody") is False


@pytest.mark.parametrize(
    ("subject", "seconds", "why"),
    [
        ("10.0.0.1", 60, "10.0.0.0/8 is private"),
        (PROXY, 60, "STILLROOM_TRUSTED_PROXIES"),
        ("192.0.2.1", 60, "STILLROOM_ABUSE_ALLOW"),
        ("ann", 60, "neither an address nor a network"),
        ("2001:db8:1:2:3::/80", 60, "its /64; did you mean 2001:db8:1:2::/64"),
        ("192.0.0.0/16", 60, "STILLROOM_ABUSE_ALLOW"),
        ("203.0.113.1", 0, "a ban is for 1 second to 30 days"),
        ("203.0.113.1", 1e9, "a ban is for 1 second to 30 days"),
    ],
)
def test_an_operator_is_told_what_can_not_be_banned(
    room: Any, client: Any, subject: str, seconds: float, why: str
) -> None:
    """An operator who bans an exempt address is told which range it is in and where that range was set."""
    with pytest.raises(BanRefused, match=why):
        room.abuse.ban(subject, seconds)
    assert client.keys("*") == []


def test_a_ban_that_was_lifted_does_not_come_back(room: Any, client: Any) -> None:
    """For ten minutes after a lift, earlier and new events are reported and do not ban again."""
    hammer(client, room)
    for n in range(19):
        put(client, room, "not_found", ip=CLIENT, route=f"/{n}")
    room.abuse.scan()
    hammer(client, room)
    assert room.abuse.lift(CLIENT)
    assert counts(client) == {}
    forget_what_was_said(client)
    assert room.abuse.scan()["bans"] == 0
    assert patterns(client, room)[-1]["action"] == "lifted"
    client.set(room.keys.ban_lifted(CLIENT), int(client.time()[0] - 601) * 1_000, ex=60)
    forget_what_was_said(client)
    hammer(client, room)
    assert room.abuse.scan()["bans"] == 1
    assert ban_of(client, room)["level"] == 0


def test_bans_that_ran_out_leave_the_index(room: Any, client: Any) -> None:
    """A scan drops expired bans from the index even where nobody is banned any more. The list never shows them."""
    for n in range(5):
        room.abuse.ban(f"203.0.113.{n}", 60)
    client.delete(room.keys.ban("203.0.113.0"))
    assert len(room.abuse.bans()) == 4
    for member in client.zrange(room.keys.bans, 0, 2):
        client.zadd(room.keys.bans, {member: 1})
    assert len(room.abuse.bans()) == 2
    room.abuse.scan()
    assert client.zcard(room.keys.bans) == 2


def test_a_ban_written_by_another_hand_is_a_ban(room: Any, client: Any) -> None:
    """A ban key that another program wrote bans its subject, whatever its value."""
    room.abuse.ban(CLIENT, 60)
    client.set(room.keys.ban(CLIENT), "because", ex=60)
    assert [(found.subject, found.by) for found in room.abuse.bans()] == [(CLIENT, "unknown")]


@pytest.mark.parametrize("record", ['{"until": 1e300}', '{"since": NaN}', "because"])
def test_a_ban_that_does_not_say_its_end_ends_as_it_is_listed(
    room: Any, client: Any, record: str
) -> None:
    """A ban whose record says no moment of any calendar is listed with the end that the index knows."""
    until = room.abuse.ban(CLIENT, 60).until
    client.set(room.keys.ban(CLIENT), record, ex=60)
    (found,) = room.abuse.bans()
    assert (found.by, found.until) == ("unknown", until)
    client.zadd(room.keys.bans, {CLIENT: float("inf")})
    (found,) = room.abuse.bans()
    assert iso(found.until) == "9999-12-31T23:59:59Z"


# Reading again


def killed_before_its_ack(room: Stillroom) -> None:
    """Run a scan and stop before it acknowledges its events."""
    scanning = Stepper(room, room._abuse_body.scan())
    while not (scanning.at and isinstance(scanning.at, list) and scanning.at[0][0] == b"XACK"):
        assert not scanning.done, scanning.error
        scanning.step()


def test_an_event_that_is_read_again_bans_once(
    make_room: Any, client: Any, caplog: Any, rules: Path
) -> None:
    """An event read again after a worker was killed between ban and acknowledgement is reported, and
    bans no more.
    """
    room = make_room(abuse_rules=rules)
    for n in range(25):
        put(client, room, "not_found", ip=CLIENT, route=f"/{n}")
    hammer(client, room, "203.0.113.10")
    killed_before_its_ack(room)
    before = [
        ban_of(client, room),
        patterns(client, room),
        counts(client),
        client.zcard(room.keys.bans),
    ]
    assert pending(client, room) == 26
    abandon(client, room, [name for name, _ in client.xrange(room.keys.abuse)])
    said = lines(caplog)
    assert room.abuse.scan()["events"] == 26
    after = [
        ban_of(client, room),
        patterns(client, room),
        counts(client),
        client.zcard(room.keys.bans),
    ]
    assert before == after
    assert pending(client, room) == 0
    assert [client.get(room.keys.ban_level(ip)) for ip in (CLIENT, "203.0.113.10")] == [b"1"] * 2
    assert lines(caplog)[len(said) :] == said


def test_an_event_that_is_read_again_after_its_ban_ran_out_bans_once(
    room: Any, client: Any
) -> None:
    """An event that is read again after its ban expired makes no second ban and no step up."""
    name = hammer(client, room, ago=900)
    room.abuse.scan()
    (said,) = client.keys("*:abuse:seen:*")
    assert client.pttl(said) > scan.EVENT_LIFE_MS
    end_ban(client, room)
    abandon(client, room, [name])
    assert room.abuse.scan()["events"] == 1
    assert ban_of(client, room) is None
    assert client.get(room.keys.ban_level(CLIENT)) == b"1"


def test_events_that_are_read_twice_count_once(room: Any, client: Any) -> None:
    """Events that are read several times count once: fifteen unknown tokens stay fifteen."""
    for _ in range(15):
        put(client, room, "session_unknown", ip=CLIENT)
    for _ in range(4):
        names = [name for name, _ in client.xrange(room.keys.abuse)]
        room.abuse.scan()
        abandon(client, room, names)
    assert list(counts(client).values()) == [15]
    assert rules_found(client, room) == []


def test_what_a_dead_worker_left_is_taken_over(room: Any, client: Any) -> None:
    """A worker takes over a dead worker's events after a minute, and leaves events that were just read."""
    for n in range(10):
        put(client, room, "auth_fail", ip=CLIENT, user=f"u{n}")
    leave_behind(client, room, count=7)
    read(client, room, count=1)
    assert room.abuse.scan()["events"] == 9
    assert pending(client, room) == 1
    assert rules_found(client, room) == []


def test_entries_that_the_stream_lost_are_not_pending_for_ever(room: Any, client: Any) -> None:
    """Entries that the stream dropped under their reader do not stay pending, on any server version."""
    for n in range(10):
        put(client, room, "auth_fail", ip=CLIENT, user=f"u{n}")
    names = leave_behind(client, room)
    client.xdel(room.keys.abuse, *names[:4])
    client.xtrim(room.keys.abuse, maxlen=3, approximate=False)
    assert room.abuse.scan()["events"] == 3
    assert pending(client, room) == 0


def test_an_event_that_nobody_finishes_is_set_aside(room: Any, client: Any, caplog: Any) -> None:
    """An event that was read five times and never finished becomes a dead letter. The others go on."""
    poison = hammer(client, room)
    leave_behind(client, room, deliveries=5)
    good = hammer(client, room, "203.0.113.10")
    leave_behind(client, room, deliveries=4)
    report = room.abuse.scan()
    assert (report["aside"], report["events"]) == (1, 1)
    (entry,) = aside(client, room)
    assert entry["id"] == poison.decode()
    assert entry["reason"] == "read 5 times, never finished"
    assert '"denied"' in entry["event"]
    assert [p["event"] for p in patterns(client, room)] == [good.decode()]
    assert pending(client, room) == 0
    assert "is now a dead letter" in caplog.text


def test_an_event_that_can_not_be_read_is_set_aside(room: Any, client: Any, caplog: Any) -> None:
    """An unreadable event becomes a dead letter at once, with a cleaned and shortened reason; its
    neighbours count.
    """
    for n in range(20):
        put(client, room, "not_found", ip=CLIENT, route=f"/{n}")
        client.xadd(room.keys.abuse, {"kind": "Not\nFound", "x": b"\xff" * 5_000})
    report = room.abuse.scan()
    assert (report["aside"], report["events"], report["patterns"]) == (20, 40, 1)
    assert pending(client, room) == 0
    one = aside(client, room)[0]
    assert one["reason"] == r"no kind of event: 'Not\\x0aFound'"
    assert len(one["event"]) < 1_000
    assert all(r.getMessage().isprintable() for r in caplog.records)


@pytest.mark.parametrize("place", ["value", "type"])
def test_counts_that_can_not_be_added_to_end_no_scan(
    make_room: Any, client: Any, place: str
) -> None:
    """Where something else is in the place of the counts, a scan bans, and lifts the bans of who became exempt."""
    before = make_room()
    before.abuse.ban(CLIENT, 86_400)
    room = make_room(abuse_allow=CLIENT)
    if place == "value":
        client.hset(room.keys.counts, "abuse_events", "many")
    else:
        client.set(room.keys.counts, "x", ex=60)
    room.state_stats.counts["abuse_events"] += 1
    room.abuse.scan()
    assert room.abuse.bans() == []


def test_an_event_from_long_ago_is_not_judged(room: Any, client: Any) -> None:
    """After a day without a worker, old events ban nobody: the address may be another client's by now."""
    hammer(client, room, ago=86_400)
    hammer(client, room, ago=3_700)
    hammer(client, room, "203.0.113.10", ago=3_500)
    report = room.abuse.scan()
    assert (report["late"], report["bans"]) == (2, 1)
    assert ban_of(client, room) is None


def test_an_error_in_judging_leaves_the_events(
    room: Any, client: Any, caplog: Any, monkeypatch: Any
) -> None:
    """When one event makes judging fail, the other events are read again one by one, a minute later."""
    poison = put(client, room, "auth_fail", ip="203.0.113.66")
    hammer(client, room)
    real = scan.samples_of

    def samples_of(rules: Any, entry: Any) -> Any:
        if entry.event.ip.endswith("66"):
            raise ZeroDivisionError
        return real(rules, entry)

    monkeypatch.setattr(scan, "samples_of", samples_of)
    assert room.abuse.scan()["events"] == 0
    assert "2 events could not be judged" in caplog.text
    abandon(client, room, [name for name, _ in client.xrange(room.keys.abuse)])
    report = room.abuse.scan()
    assert (report["events"], report["bans"]) == (1, 1)
    assert [
        p["message_id"] for p in client.xpending_range(room.keys.abuse, "workers", "-", "+", 9)
    ] == [poison]


def test_a_group_that_got_lost_is_made_again(room: Any, client: Any) -> None:
    """A lost consumer group is made again at the start, after a flush and after a deletion, also by two workers."""
    assert room.abuse.scan()["events"] == 0
    client.flushall()
    hammer(client, room)
    assert room.abuse.scan()["bans"] == 1
    client.xgroup_destroy(room.keys.abuse, "workers")
    assert room.abuse.scan()["bans"] == 0
    assert client.get(room.keys.ban_level(CLIENT)) == b"1"


def test_a_scan_ends_in_time_and_the_next_goes_on(room: Any, client: Any) -> None:
    """A scan ends when its seconds are over. It has done one bite and says that there is more."""
    for _ in range(30):
        put(client, room, "auth_fail", ip=CLIENT)
    report = room.abuse.scan(limit=10, seconds=0)
    assert (report["events"], report["done"]) == (10, False)
    assert room.abuse.scan(limit=10)["events"] == 20
    assert room.abuse.scan()["done"] is True


# Bounds


def test_counts_have_a_limit(room: Any, client: Any, monkeypatch: Any) -> None:
    """A flood of addresses pushes out the counts that grew longest ago. An active attacker stays counted."""
    monkeypatch.setattr(scan, "GROUPS_LIMIT", 20)
    for n in range(200):
        put(client, room, "session_unknown", ip=f"203.0.113.{n}")
        if n % 10 == 0:
            put(client, room, "session_unknown", ip=CLIENT)
            room.abuse.scan()
    assert len(counts(client)) == client.zcard(room.keys.abuse_groups) == 20
    assert rules_found(client, room) == ["session_guessing"]


def test_a_count_has_a_limit(room: Any, client: Any) -> None:
    """A thousand pages are kept as eighty, which is enough for every rule."""
    for n in range(1_000):
        put(client, room, "not_found", ip=CLIENT, route=f"/{n}")
    room.abuse.scan()
    assert list(counts(client).values()) == [80]


def test_twenty_thousand_events_keep_little(room: Any, client: Any) -> None:
    """Twenty thousand events from as many addresses are judged at full speed and leave few keys, each
    with a TTL.
    """
    pipe = client.pipeline(transaction=False)
    for n in range(20_000):
        ip = f"203.{n // 65_536}.{n // 256 % 256}.{n % 256}"
        pipe.xadd(room.keys.abuse, {"kind": "denied", "n": "1", "ip": ip})
    pipe.execute()
    report = room.abuse.scan(seconds=60)
    assert (report["events"], report["patterns"]) == (20_000, 0)
    assert counts(client) == {}  # a single denial is nobody's pattern, and costs nothing


def test_events_that_are_counted_together_count_as_one_by_one(
    make_room: Any, client: Any, monkeypatch: Any
) -> None:
    """Counts, patterns and bans are the same whether one script counts one event or many."""
    monkeypatch.setattr(
        scan, "MEMBERS_AT_ONCE", 300
    )  # some scripts are full by this, some by number
    found = []
    for together in (1, 3, 50):
        monkeypatch.setattr(scan, "AT_ONCE", together)
        room = make_room(namespace=f"by-{together}")
        chance = random.Random(7)
        for _ in range(300):
            ip, user = f"203.0.113.{chance.randrange(6)}", f"user-{chance.randrange(20)}"
            kind = chance.choice(["auth_fail", "auth_fail", "auth_ok", "denied"])
            extra = {"n": "16", "limit": "default"} if kind == "denied" else {"user": user}
            put(client, room, kind, ip=ip, **extra)
        assert room.abuse.scan()["events"] == 300
        sizes = {
            key.split(b":", 1)[1]: client.zcard(key)
            for key in client.keys(f"by-{together}:abuse:c:*")
        }
        bans = sorted(key.split(b":", 1)[1] for key in client.keys(f"by-{together}:*!ban"))
        said = sorted((one["rule"], one["subject"]) for one in patterns(client, room))
        found.append((sizes, bans, said))
    assert found[0][0]
    assert found[0] == found[1] == found[2]
