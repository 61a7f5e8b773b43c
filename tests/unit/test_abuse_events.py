"""Events of abuse take what a client sent and make safe lines and entries of it, without a server."""

from __future__ import annotations

import json
from time import process_time
from timeit import repeat

import pytest

from stillroom import EventRefused
from stillroom.abuse.allowance import Allowance
from stillroom.abuse.event import (
    KINDS,
    BadEvent,
    Entry,
    Event,
    check_kind,
    cleaned,
    cleaned_route,
    kinds_of_apps,
    read_event,
)
from stillroom.abuse.patterns import Tally, findings, pattern_of, samples_of
from stillroom.abuse.rules import Rule, read_rules
from stillroom.exempt import Exempt

NASTY = [
    "a\nERROR root: all is well",
    "a\r\nb",
    "\x1b[2J\x1b[31mred",
    'a", "rule": "forged',
    "\\",
    "x" * 10_000,
    "\ud800",
    "\x00\x7f\x9b",
    "é\u2028\u202e",
]


@pytest.mark.parametrize("text", NASTY)
def test_nothing_that_a_client_sends_breaks_a_line(text: str) -> None:
    """No client text breaks a line: the line is printable ASCII and the JSON says the same."""
    event = Event("not_found", ip="203.0.113.9", user=cleaned(text), route=cleaned_route(text))
    (sample,) = [
        s
        for s in samples_of(read_rules(None), Entry(b"1-0", event))
        if s.rule.name == "scanner" and s.member
    ]
    tally = Tally.read([20, b"0", b"1", sample.member])
    line = pattern_of(findings([sample], [tally])[0], "ban").line()
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 2_000
    said = json.loads(line)
    assert (said["rule"], said["user"], said["route"]) == ("scanner", event.user, event.route)


@pytest.mark.parametrize("text", NASTY)
def test_an_event_is_read_as_it_was_written(text: str) -> None:
    """An event is read from the stream as it was written, and clean text stays as it is."""
    told = {"ip": cleaned(text), "route": cleaned_route(text), "user": "u", "limit": "a"}
    event = Event("denied", **told, n=8, ago=60_000)
    assert read_event(event.fields()) == event
    assert read_event(Event("denied", **told, ago=900).fields()) == Event("denied", **told)


@pytest.mark.parametrize(
    ("route", "kept"),
    [
        ("/product/{id}", "/product/{id}"),
        ("/a?token=secret", "/a"),
        ("/a#secret", "/a"),
        ("/reset/07.AbCdEfGhIjKlMnOpQrStUvWxYz0123456789-_AbCdE/x", "/reset/*463a/x"),
        ("/u/550e8400-e29b-41d4-a716-446655440000", "/u/*00f1"),
        ("/a-page-with-a-rather-long-name", "/a-page-with-a-rather-long-name"),
    ],
)
def test_a_route_keeps_no_secrets(route: str, kept: str) -> None:
    """A route is kept without its query and without parts that could be a token."""
    assert cleaned_route(route) == kept


@pytest.mark.parametrize("path", ["/{}", "/{}7", "/7{}", "/{}/", "/x/{}#"])
def test_a_long_path_costs_its_length(path: str) -> None:
    """A path that is not found costs its length: ten times as long a path costs no hundred times as much."""

    def cost(length: int) -> float:
        route = path.format("a" * length)
        return min(repeat(lambda: cleaned_route(route), number=5, repeat=7, timer=process_time))

    assert cost(1_900) < 40 * cost(190)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "no kind of event: ''"),
        ([b"kind"], "no kind of event"),
        ([b"kind", b"Bad\n"], r"no kind of event: 'Bad\\\\x0a'"),
        ([b"kind", b"denied\n"], "no kind of event"),
        ([b"kind", b"\xff"], "no kind of event"),
        ([b"kind", b"a" * 33], "no kind of event"),
        ([b"kind", b"denied", b"n", b"many"], "n is no number: 'many'"),
        ([b"kind", b"denied", b"n", b"0"], "n is no number"),
        ([b"kind", b"denied", b"n", b"-1"], "n is no number"),
        ([b"kind", b"denied", b"n", b"9" * 9_999], "n is no number"),
        ([b"kind", b"denied", b"n", b"0" * 19 + b"1" + b"9" * 9_999], "n is no number"),
        ([b"kind", b"denied", b"n", "٣".encode()], "n is no number"),
        ([b"kind", b"denied", b"ago", b"-1"], "ago is no number"),
    ],
)
def test_what_is_no_event_says_why(fields: list[bytes], message: str) -> None:
    """An entry that is no event is refused with the reason, and what the reason quotes is clean."""
    with pytest.raises(BadEvent, match=message):
        read_event(fields)


def test_fields_nobody_knows_are_passed_over() -> None:
    """Fields that a newer limiter added are ignored."""
    assert read_event([b"kind", b"near", b"more", b"\xff", b"ip", b"unknown"]) == Event(
        "near", ip="unknown"
    )


def test_kinds_are_known() -> None:
    """A misspelt kind is answered with the probable one, and an app cannot use the limiter's own kinds."""
    allowed = kinds_of_apps([*KINDS, "card_declined"])
    for kind in ("auth_fail", "csrf_fail", "card_declined"):
        check_kind(kind, allowed)
    with pytest.raises(EventRefused, match=r"'auth_fial' is no kind .*; did you mean auth_fail\?"):
        check_kind("auth_fial", allowed)
    for kind in ("denied", "near", "a\nb", ""):
        with pytest.raises(EventRefused):
            check_kind(kind, allowed)


def test_an_allowance_is_per_kind_and_comes_back() -> None:
    """A flood of one kind is cut to the burst and then to the rate; another kind is not touched."""
    allowance = Allowance(rate=10, burst=100)
    assert sum(allowance.take("not_found", now=5.0) for _ in range(1_000)) == 100
    assert allowance.take("auth_fail", now=5.0)
    assert sum(allowance.take("not_found", now=5.5) for _ in range(1_000)) == 5
    assert sum(allowance.take("not_found", now=9_999.0) for _ in range(1_000)) == 100


def test_a_million_events_are_a_bounded_number() -> None:
    """Over a minute of flood no more events leave the process than burst and rate allow."""
    allowance = Allowance(rate=50, burst=500)
    sent = sum(allowance.take("not_found", now=n * 60 / 1_000_000) for n in range(1_000_000))
    assert 3_490 <= sent <= 3_500


@pytest.mark.parametrize(
    "subject",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.31.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "::/64",
        "::/48",
        "fc00::/64",
        "fd12:3456:789a::/48",
        "fe80::/64",
        "198.51.100.7",  # the proxy
        "192.0.2.77",  # allowed
        "2001:db8:a:1::/64",
        "2001:db8:a::/48",  # it has allowed addresses in it
        "unknown",
        "",
        "192.0.0.0/8",
        "0.0.0.0/0",
        "2001:db8::/32",
        "2001:db8:1:2::/65",
        "203.0.113.0/33",
        "user",
    ],
)
def test_some_are_never_banned(subject: str) -> None:
    """Private ranges, this machine, proxies, the allowlist and wider networks around them are never banned."""
    exempt = Exempt(["192.0.2.64/26", "2001:db8:a:1::/64"], ["198.51.100.7"])
    assert exempt.why(subject)


@pytest.mark.parametrize(
    "subject",
    [
        *("203.0.113.9", "192.0.2.1", "2001:db8:1:2::/64", "2001:db8:1::/48"),
        *("203.0.113.0/24", "203.0.112.0/21", "2001:db8::/32", "2001:db8:1:2::/63"),
    ],
)
def test_others_may_be(subject: str) -> None:
    """Clients of the open internet and their networks may be banned."""
    assert Exempt(["192.0.2.64/26"], ["198.51.100.7"]).why(subject) == ""


def test_a_rule_counts_what_it_says() -> None:
    """A rule counts event ids, values or numbers of windows, and ignores events that have none of its field."""

    def members(rule: dict[str, object], event: Event) -> list[tuple[str, bytes]]:
        made = Rule.model_validate(
            {"name": "r", "kinds": ["auth_fail"], "group_by": "ip", "threshold": 2, "window": 60}
            | rule
        )
        return [(s.group, s.member) for s in samples_of([made], Entry(b"180000-7", event))]

    fail = Event("auth_fail", ip="2001:db8:1:2::/64", user="u", route="/login")
    assert members({}, fail) == [("2001:db8:1:2::/64", b"180000-7")]
    assert members({"distinct": "user"}, fail) == [("2001:db8:1:2::/64", b"u")]
    assert members({"distinct": "route"}, fail) == [("2001:db8:1:2::/64", b"/login")]
    assert members({"group_by": "user", "distinct": "ip"}, fail) == [("u", b"2001:db8:1:2::/64")]
    assert members({"group_by": "user", "distinct": "network"}, fail) == [("u", b"2001:db8:1::/48")]
    assert members({"group_by": "network", "distinct": "ip"}, fail) == [
        ("2001:db8:1::/48", b"2001:db8:1:2::/64")
    ]
    assert members({"consecutive": True}, fail) == [("2001:db8:1:2::/64", b"3")]
    assert members({"n": 2}, fail) == []
    assert members({"kinds": ["denied"]}, fail) == []
    assert members({"distinct": "user"}, Event("auth_fail", ip="203.0.113.9")) == []
    assert members({"group_by": "user"}, Event("auth_fail", ip="203.0.113.9")) == []
    assert members({"group_by": "network"}, Event("auth_fail", ip="203.0.113.9")) == []
    assert members({"then": "auth_ok"}, Event("auth_ok", ip="203.0.113.9")) == [
        ("203.0.113.9", b"")
    ]


def test_a_scanner_does_not_hide_behind_long_names() -> None:
    """A scanner with long names is found: each token is cut out, and two of them still count as two."""
    routes = {cleaned_route(f"/backup-of-the-database-{n}.sql") for n in range(100)}
    assert len(routes) > 95
    assert all(len(route) == 6 for route in routes)
