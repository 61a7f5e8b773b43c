"""Limits do what each operation promises, on real servers and with both faces."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from stillroom import (
    API,
    AUTH,
    DEFAULT,
    STATIC,
    InvalidArgument,
    InvalidLimit,
    Limit,
    SettingsError,
)
from stillroom.limits.log import Charge, Reserved
from stillroom.operation import Driver
from tests.support.limits import (
    age,
    age_us,
    events,
    expire_denials,
    forget_denials,
    logs,
    read_log,
    write_log,
)
from tests.support.monitor import sent

pytestmark = pytest.mark.usefixtures("bounded")
IP = "203.0.113.7"
USER = Limit("auth-user", 20, 300, by="user", away="strict")
WEEK = Limit("week", 1_000, 7 * 86_400)
PAIR = Limit("auth-pair", 3, 300, by="ip&user", away="strict")


# One request


def test_a_quota_is_admitted_and_not_one_more(room: Any) -> None:
    """AUTH admits its five, denies the sixth and says when the client may come again."""
    decisions = [room.limits.check(IP, [AUTH]) for _ in range(6)]
    assert [d.allowed for d in decisions] == [True] * 5 + [False]
    assert [d.remaining for d in decisions] == [4, 3, 2, 1, 0, 0]
    assert 299 < decisions[5].retry_after <= 300
    assert decisions[5].violated == (AUTH,)
    assert not decisions[5]
    assert decisions[4]


def test_a_check_is_one_round_trip(room: Any, client: Any) -> None:
    """A check is one round trip with any number of limits, and so are peek, reserve, commit and refund."""
    limits, subject = [DEFAULT, API, USER, PAIR], {"ip": IP, "user": "ann"}
    for act in (room.limits.check, room.limits.peek):
        act(subject, limits)  # loads the script
    held = [room.limits.reserve(subject, limits) for _ in range(2)]
    room.limits.refund(held[0])
    room.state_stats.due = 1 << 62
    assert sent(client, lambda: room.limits.check(subject, limits)) == ["EVALSHA"]
    assert sent(client, lambda: room.limits.peek(subject, limits)) == ["EVALSHA"]
    assert sent(client, lambda: room.limits.refund(held[1])) == ["EVALSHA"]
    assert sent(client, lambda: room.limits.commit(held[1])) == ["UNLINK"]
    assert sent(client, lambda: room.limits.reset(subject, limits)) == ["UNLINK"]


def test_all_limits_are_consumed_or_none(room: Any) -> None:
    """A request that one limit denies takes nothing of the other limits, whatever their order."""
    small, large = Limit("small", 2, 60), Limit("large", 100, 3600)
    for order in ([small, large], [large, small]):
        for _ in range(5):
            room.limits.check(IP, order)
            forget_denials(room)
    stands = {one.limit: one for one in room.limits.peek(IP, [large, small]).standings}
    assert (stands[small].remaining, stands[large].remaining) == (0, 98)


def test_subjects_of_different_kinds_are_counted_together(room: Any) -> None:
    """AUTH consumes its limits by address, user and pair together or not at all."""
    limits = [AUTH, USER, PAIR]
    for _ in range(3):
        assert room.limits.check({"ip": IP, "user": "ann"}, limits)
    denied = room.limits.check({"ip": IP, "user": "ann"}, limits)
    assert denied.violated == (PAIR,)
    assert room.limits.check({"ip": IP, "user": "bob"}, limits)
    stands = {
        one.limit: one for one in room.limits.peek({"ip": IP, "user": "ann"}, limits).standings
    }
    assert [stands[limit].remaining for limit in limits] == [1, 17, 0]


def test_users_are_stored_as_an_hmac_only(room: Any, client: Any) -> None:
    """A user's name is in no key, value or event; its HMAC is the same however the name is typed."""
    for name in (
        "Annabella@Example.org",
        " annabella@example.org",
        "ANNABELLA@EXAMPLE.ORG",
        "ａnnabella@example.org",
    ):
        room.limits.check({"ip": IP, "user": name, "key": name}, [USER, Limit("k", 1, 9, by="key")])
    left = room.limits.peek({"user": "annabella@example.org"}, [USER])
    assert left.remaining == 19  # the other three were denied by their key
    everything = (
        b"".join(
            key + (client.get(key) if client.type(key) == b"string" else b"")
            for key in client.keys("*")
        )
        + repr(events(client, room)).encode()
    )
    assert not any(part in everything.lower() for part in (b"annabella", b"example"))
    assert "user" in events(client, room)[0]


@pytest.mark.parametrize("nobody", [None, "", "  ", "\u3000\t"])
def test_who_has_no_name_is_counted_by_address(room: Any, nobody: str | None) -> None:
    """Visitors without a name are counted by address, and do not share one bucket."""
    once = Limit("once", 1, 60, by="user")
    first, second = {"ip": IP, "user": nobody}, {"ip": "203.0.113.8", "user": nobody}
    assert [bool(room.limits.check(who, [once])) for who in (first, second, first)] == [
        *(True, True, False)
    ]
    assert room.limits.check({"ip": IP, "user": "ann"}, [once])
    assert not room.limits.check(IP, [Limit("once", 1, 60)]), "the address has one bucket"
    pair = Limit("pair", 1, 60, by="ip&user")
    assert [bool(room.limits.check(first, [pair])) for _ in range(2)] == [True, False]


def test_nobody_without_an_address_is_refused(room: Any) -> None:
    """A check without a name and without an address is refused, because all such visitors would share
    one bucket.
    """
    for who in ({"user": None}, {"user": ""}, {"user": " ", "ip": None}, {"user": None, "ip": ""}):
        with pytest.raises(InvalidLimit, match="give its address too"):
            room.limits.check(who, [USER])
    with pytest.raises(InvalidLimit, match="give its address too"):
        room.limits.check({"ip": None}, [AUTH])
    with pytest.raises(InvalidLimit, match="give its address too"):
        room.limits.check("", [AUTH])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("user:4711", "'user'"),
        ("tenant:acme", "'tenant'"),
        ("ann", "'user'"),
        ("testclient", "'user'"),
        ("x" * 10_000, "'user'"),
        ("1.2.3", "'user'"),
    ],
)
def test_a_text_that_is_no_address_is_refused(room: Any, given: str, meant: str) -> None:
    """A text that is no address is refused with what was meant, and the message does not repeat a name."""
    for who in (given, {"ip": given}):
        with pytest.raises(InvalidLimit, match=f"did you mean {{{meant}: …}}") as caught:
            room.limits.check(who, [DEFAULT])
        assert given.rpartition(":")[2] not in str(caught.value)
    assert room.limits.check("unknown", [DEFAULT]), "what limits.client says of junk"


def test_addresses_that_are_one_client_share_a_bucket(room: Any) -> None:
    """All addresses of one IPv6 network share a bucket, and so do an address and its IPv4-mapped form."""
    two = Limit("two", 2, 60)
    for same in (
        ["2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "[2001:DB8:0:1::3]:443"],
        [IP, f"::ffff:{IP}", f"{IP}:8080"],
    ):
        assert [bool(room.limits.check(address, [two])) for address in same] == [True, True, False]


@pytest.mark.parametrize("setting", ["limit_exempt", "abuse_allow"])
def test_a_network_may_be_exempt(make_room: Any, client: Any, setting: str) -> None:
    """A client in an exempt network is admitted without asking Redis by check, reserve, peek and refund."""
    room = make_room(**{setting: "203.0.113.0/24 2001:db8:7::/48"})
    for who in (IP, {"ip": IP, "user": "ann"}, "2001:db8:7:1::9", f"::ffff:{IP}"):

        def act(who: Any = who) -> None:
            assert all(room.limits.check(who, [Limit("x", 0, 60), AUTH]) for _ in range(3))
            held = room.limits.reserve(who, [AUTH])
            assert held
            assert not room.limits.refund(held)
            assert not room.limits.commit(held)
            assert room.limits.peek(who, [AUTH])
            assert room.limits.check(who, [AUTH]).headers() == {}

        assert sent(client, act) == []
    assert not room.limits.check("203.0.114.1", [Limit("x", 0, 60)])
    assert not room.limits.check("2001:db8:8::1", [Limit("x", 0, 60)])


def test_who_may_not_be_banned_may_be_limited(make_room: Any) -> None:
    """The setting limit_exempt, when it is given, says who is exempt from limits, apart from who is
    never banned.
    """
    room = make_room(abuse_allow="203.0.113.0/24", limit_exempt="198.51.100.7")
    assert not room.limits.check(IP, [Limit("x", 0, 60)])
    assert room.limits.check("198.51.100.7", [Limit("x", 0, 60)])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["api"], "a limit is a Limit"),
        ([[DEFAULT]], "a limit is a Limit"),
        (DEFAULT, r"did you mean \[Limit"),
    ],
)
def test_what_is_no_list_of_limits_is_said(room: Any, given: Any, reason: str) -> None:
    """A value that is no list of limits is refused with what was meant."""
    with pytest.raises(InvalidLimit, match=reason):
        room.limits.check(IP, given)


def test_a_limit_needs_its_subject(room: Any) -> None:
    """A limit whose subject is not given raises an error that names the kind, and counts nothing."""
    with pytest.raises(
        InvalidLimit, match="'auth-pair': it counts by ip&user; the subject has no user"
    ):
        room.limits.check(IP, [PAIR])
    with pytest.raises(InvalidLimit, match="no ip"):
        room.limits.check({"user": "ann"}, [DEFAULT])
    with pytest.raises(InvalidLimit, match="the user of a subject is a str"):
        room.limits.check({"user": 7}, [USER])
    with pytest.raises(InvalidLimit, match="a subject is the text of an address, or a mapping"):
        room.limits.check(None, [DEFAULT])
    with pytest.raises(InvalidLimit, match="the ip of a subject is a str"):
        room.limits.check({"ip": 7}, [DEFAULT])
    with pytest.raises(InvalidLimit, match="two limits of one request have this name"):
        room.limits.check(IP, [AUTH, AUTH])


def test_without_limits_only_bans_are_looked_at(room: Any, client: Any) -> None:
    """A check without limits admits everybody but a banned client."""
    assert room.limits.check(IP, []).headers() == {}
    assert room.limits.check({}, [])
    assert room.limits.reserve(IP, [])
    client.set(room.keys.ban(IP), "{}", px=90_000)
    assert room.limits.check(IP, []).banned
    room.limits.reset(IP, [])


# Costs


def test_a_request_may_cost_more(room: Any) -> None:
    """A request with a cost is admitted only where all of its cost fits."""
    ten = Limit("ten", 10, 60)
    assert room.limits.check(IP, [ten], cost=7).remaining == 3
    denied = room.limits.check(IP, [ten], cost=4)
    assert (denied.allowed, denied.remaining) == (False, 3)
    assert room.limits.check(IP, [ten], cost=3)


def test_a_cost_over_the_quota_is_never_admitted_and_says_so(room: Any) -> None:
    """A cost above the quota is denied without Retry-After, because trying again is in vain."""
    denied = room.limits.check(IP, [Limit("ten", 10, 60), AUTH], cost=11)
    assert (denied.status, denied.retry_after) == (429, None)
    assert "Retry-After" not in denied.headers()
    assert "costs 11: more than the whole quota" in denied.problem()["detail"]


def test_a_quota_of_nothing_admits_nothing(room: Any) -> None:
    """A limit with quota 0 admits nothing."""
    denied = room.limits.check(IP, [Limit("closed", 0, 60)])
    assert (denied.status, denied.retry_after, denied.remaining) == (429, None, 0)


def test_a_cost_of_nothing_takes_nothing(room: Any, client: Any) -> None:
    """A request of cost 0 is admitted up to the quota and leaves no key behind."""
    assert room.limits.check(IP, [AUTH], cost=0).remaining == 5
    assert not logs(client)
    for _ in range(5):
        room.limits.check(IP, [AUTH])
    assert room.limits.check(IP, [AUTH], cost=0)
    assert not room.limits.check(IP, [dataclasses.replace(AUTH, quota=3)], cost=0)


@pytest.mark.parametrize("cost", [-1, 1.5, "1", None, 10**9])
def test_a_cost_is_a_whole_number(room: Any, cost: Any) -> None:
    """A cost that is not a whole number, or that no request can have, raises an error."""
    with pytest.raises(InvalidLimit, match="cost is a whole number, 0 to 1,000,000 hits"):
        room.limits.check(IP, [AUTH], cost=cost)


# Time


def wait_almost(client: Any, room: Any, denied: Any, cost: int, us: int) -> tuple[int, bool]:
    """Wait `us` after a denial; return how many µs truly passed and whether the request was admitted."""
    (key,) = logs(client)
    before = read_log(client, key)
    seconds, now = client.time()
    passed = seconds * 1_000_000 + now - denied.now_us
    write_log(client, key, [(at - us + passed, n) for at, n in before])
    looked = room.limits.peek(IP, [AUTH], cost=cost)
    write_log(client, key, before)
    return looked.now_us - denied.now_us + us - passed, looked.allowed


@pytest.mark.parametrize("cost", [1, 3])
def test_waiting_as_told_is_admitted_and_a_millisecond_less_is_not(
    room: Any, client: Any, cost: int
) -> None:
    """Retry-After is exact to the microsecond, for one hit and for several."""
    for gap in (7, 11, 13, 17, 19):
        assert room.limits.check(IP, [AUTH])
        age(client, gap)
    denied = room.limits.check(IP, [AUTH], cost=cost)
    wait = round(denied.retry_after * 1e6)
    seen: dict[bool, int] = {}
    while len(seen) < 2:  # a machine that is busy for a millisecond has to be asked again
        for us in (wait - 1_000, wait):
            after, admitted = wait_almost(client, room, denied, cost, us)
            assert admitted is (after >= wait)
            seen[admitted] = after
    assert wait - 1_000 <= seen[False] < wait


def test_quota_comes_back_hit_by_hit(room: Any, client: Any) -> None:
    """Each hit leaves when its own window has passed."""
    for _ in range(5):
        assert room.limits.check(IP, [AUTH])
        age(client, 30)
    age(client, 300 - 150 + 0.5)
    assert room.limits.peek(IP, [AUTH]).remaining == 1
    age(client, 30)
    assert room.limits.peek(IP, [AUTH]).remaining == 2


def test_a_clock_that_steps_back_gives_no_fresh_quota_and_no_endless_wait(
    room: Any, client: Any
) -> None:
    """After the clock stepped back an hour the hits are as old as possible and leave within one window."""
    for _ in range(5):
        room.limits.check(IP, [AUTH])
    age(client, -3_600)
    forget_denials(room)
    denied = room.limits.check(IP, [AUTH])
    assert not denied
    assert 299 < denied.retry_after <= 300
    age(client, 300)
    forget_denials(room)
    assert room.limits.check(IP, [AUTH])


def test_limits_change_while_they_are_in_use(room: Any, client: Any) -> None:
    """When quota or window are changed, earlier hits count against the new ones."""
    for _ in range(10):
        room.limits.check(IP, [DEFAULT])
    assert room.limits.check(IP, [dataclasses.replace(DEFAULT, quota=11)]).remaining == 0
    assert not room.limits.check(IP, [dataclasses.replace(DEFAULT, quota=5)])
    assert room.limits.check(IP, [dataclasses.replace(DEFAULT, quota=20)]).remaining == 8
    age(client, 30)
    assert room.limits.check(IP, [dataclasses.replace(DEFAULT, quota=1, window=20)])


def test_the_log_of_a_busy_client_stays_small(room: Any, client: Any) -> None:
    """A client with a hundred hits a minute has 25 entries at most in its log, and no hit is forgotten."""
    for _ in range(48):
        for _ in range(4):
            assert room.limits.check(IP, [DEFAULT])
        (key,) = logs(client)
        log = read_log(client, key)
        assert len(log) <= 25
        age(client, 60 / 24)
    assert sum(n for _, n in log) == 96


def test_what_many_processes_admitted_stays_small_too(make_room: Any, client: Any) -> None:
    """When forty processes report one client after an outage, the log has one entry a slice and forgets none."""
    room = make_room()
    key = room.keys.limits("ip", IP) + b"default"
    for age_ms in range(40):
        charge = Charge(key, DEFAULT, 1, age_ms * 1_000, log=f"process {age_ms}", total=1)
        Driver(room.state_wire).run(room._limits_body._settling.charge([charge]))
    log = read_log(client, key)
    assert sum(n for _, n in log) == 40
    assert len(log) <= 3  # they took well under two slices of 2.5 s


def test_what_many_processes_reserved_of_a_small_quota_stays_small_too(
    make_room: Any, client: Any
) -> None:
    """When sixty processes report reservations of one client, no log is so long that it is taken for none."""
    room = make_room()
    key = room.keys.limits("ip", IP) + AUTH.name.encode()
    for process in range(60):
        held = tuple(Reserved(f"{process}-{number}", 1, number * 1_000) for number in range(20))
        charge = Charge(key, AUTH, 0, log=f"process {process}", reserved=held)
        Driver(room.state_wire).run(room._limits_body._settling.charge([charge]))
    log = read_log(client, key)
    assert sum(n for _, n in log) == 1_200
    assert len(log) < 100
    assert not room.limits.check(IP, [AUTH])


def test_what_is_told_of_late_shares_the_entry_of_its_slice(make_room: Any, client: Any) -> None:
    """A hit that is reported late shares the entry of its slice, with the later time, and none is lost."""
    room = make_room()
    assert room.limits.check(IP, [WEEK])
    (key,), slice_us = logs(client), WEEK.window * 1_000_000 // 24
    seconds, us = client.time()
    now = seconds * 1_000_000 + us
    middle = now // slice_us * slice_us - slice_us // 2  # of a slice that is over
    write_log(client, key, [(middle, 1)])
    for number, earlier in enumerate((3, 1, 2)):
        age_us = now - middle + earlier * 1_000_000
        charge = Charge(key, WEEK, 5, age_us, log=f"process {number}", total=5)
        Driver(room.state_wire).run(room._limits_body._settling.charge([charge]))
    assert read_log(client, key) == [(middle, 16)]


# Peek and reset


def test_peek_consumes_and_tells_nothing(room: Any, client: Any) -> None:
    """peek consumes nothing and makes no event, even where it denies."""
    for _ in range(5):
        room.limits.check(IP, [AUTH])
    before = room.limits.peek(IP, [AUTH])
    assert (before.allowed, before.remaining) == (False, 0)
    assert events(client, room) == []
    assert not client.keys("*!denied")
    assert room.limits.peek("203.0.113.8", [AUTH]).remaining == 5
    assert len(logs(client)) == 1


def test_peek_makes_no_limit_known(room: Any) -> None:
    """A process that only looks tells no other one of a limit's name and window."""
    assert room.limits.peek(IP, [Limit("guessed", 5, 366 * 86_400)]).remaining == 5
    assert room.limits.names() == []


def test_reset_forgets(room: Any, client: Any) -> None:
    """reset forgets hits, denials and markers of its subject, and leaves other limits and subjects."""
    near = Limit("near", 10, 60)
    for _ in range(6):
        room.limits.check(IP, [AUTH])
    room.limits.check(IP, [near], cost=9)
    room.limits.check(IP, [DEFAULT])
    room.limits.reset(IP, [AUTH, near])
    assert room.limits.check(IP, [AUTH]).remaining == 4
    assert room.limits.peek(IP, [DEFAULT]).remaining == 99
    assert not client.keys("*!*")


# Reservations


def test_a_refund_gives_back_what_was_consumed_once(room: Any) -> None:
    """A refund gives back exactly what was consumed from all limits; a second one does nothing."""
    limits = [AUTH, USER, PAIR]
    subject = {"ip": IP, "user": "ann"}
    room.limits.check(subject, limits)
    held = room.limits.reserve(subject, limits, cost=2)
    assert held.allowed
    assert [s.remaining for s in room.limits.peek(subject, limits).standings] == [0, 2, 17]
    assert room.limits.refund(held) is True
    assert [s.remaining for s in room.limits.peek(subject, limits).standings] == [2, 4, 19]
    assert room.limits.refund(held) is False
    assert [s.remaining for s in room.limits.peek(subject, limits).standings] == [2, 4, 19]


def test_a_refund_comes_out_of_the_place_it_went_into(room: Any, client: Any) -> None:
    """A refund takes its hits from their own entry, also a shared one, and nothing once their window has passed."""
    held = []
    for _ in range(3):
        held.append(room.limits.reserve(IP, [AUTH]))
        age(client, 10)
    # The reservation remembers when it was made; as much time has passed for it as for the log.
    middle = dataclasses.replace(held[1], at_us=held[1].at_us - 20_000_000)
    before = read_log(client, logs(client)[0])
    assert room.limits.refund(middle)
    assert read_log(client, logs(client)[0]) == [before[0], before[2]]
    age(client, 300)
    late = dataclasses.replace(held[2], at_us=held[2].at_us - 310_000_000)
    assert room.limits.check(IP, [AUTH]).remaining == 4
    assert room.limits.refund(late)
    assert room.limits.peek(IP, [AUTH]).remaining == 4


def test_a_shared_entry_gives_back_only_what_is_its(room: Any) -> None:
    """A refund of hits that were merged with others subtracts only its own hits from the shared entry."""
    held = room.limits.reserve(IP, [API], cost=3)
    room.limits.check(IP, [API], cost=4)
    assert room.limits.refund(held)
    assert room.limits.peek(IP, [API]).remaining == 996


def test_a_refund_after_a_denial_admits_at_once(room: Any) -> None:
    """After a refund the process forgets its denial and admits at once."""
    held = [room.limits.reserve(IP, [AUTH]) for _ in range(5)]
    assert not room.limits.check(IP, [AUTH])
    assert not room.limits.check(IP, [AUTH])
    assert room.limits.refund(held[0])
    assert room.limits.check(IP, [AUTH])


def test_what_is_committed_is_not_refunded(room: Any) -> None:
    """A committed reservation is not refunded, and a denied one held nothing."""
    held = room.limits.reserve(IP, [AUTH])
    assert room.limits.commit(held) is True
    assert room.limits.commit(held) is False
    assert room.limits.refund(held) is False
    assert room.limits.peek(IP, [AUTH]).remaining == 4
    for _ in range(4):
        room.limits.check(IP, [AUTH])
    for _ in range(2):  # the second is denied from memory
        denied = room.limits.reserve(IP, [AUTH])
        assert not denied
        assert (room.limits.refund(denied), room.limits.commit(denied)) == (False, False)


def test_a_refund_where_the_clock_has_stepped_back(room: Any, client: Any) -> None:
    """A refund after the clock has stepped back gives one hit back, though the hits have moved."""
    held = [room.limits.reserve(IP, [AUTH]) for _ in range(2)]
    age_us(client, 60_000_000)
    assert room.limits.refund(held[0])
    assert room.limits.peek(IP, [AUTH]).remaining == 4


@pytest.mark.parametrize("quota", [5, 24, 25, 1_000])
def test_what_a_reset_forgot_is_not_given_back(room: Any, quota: int) -> None:
    """A reservation from before a reset gives back none of the hits consumed since."""
    limit = Limit("login", quota, 3_600)
    held = [room.limits.reserve(IP, [limit]) for _ in range(5)]
    room.limits.reset(IP, [limit])
    since = [room.limits.reserve(IP, [limit]) for _ in range(5)]
    for reservation in held:
        room.limits.refund(reservation)
    assert room.limits.peek(IP, [limit]).remaining == quota - 5
    assert [room.limits.refund(one) for one in since] == [True] * 5
    assert room.limits.peek(IP, [limit]).remaining == quota


@pytest.mark.parametrize("quota", [20, 1_000])
def test_hits_of_the_very_same_time_are_given_back_whole(
    room: Any, client: Any, quota: int
) -> None:
    """Each refund takes as many hits as were consumed, though two reservations and a hit share a microsecond."""
    limit = Limit("ties", quota, 3_600)
    held = [room.limits.reserve(IP, [limit], cost=cost) for cost in (1, 3, 2)]
    (key,) = logs(client)
    at = held[1].at_us
    if quota == 20:
        write_log(client, key, [(at, 1), (at, 3), (at, 2)])
    else:
        write_log(client, key, [(at, 6)])
    tied = [dataclasses.replace(one, at_us=at) for one in held]
    assert room.limits.refund(tied[1])
    assert room.limits.peek(IP, [limit]).remaining == quota - 3
    assert room.limits.refund(tied[2])
    assert room.limits.refund(tied[0])
    assert room.limits.peek(IP, [limit]).remaining == quota
    assert logs(client) == []


# Bans, denials, events


def test_a_ban_comes_first(room: Any, client: Any) -> None:
    """A banned client is denied before anything is consumed, for as long as the ban's key lives."""
    client.set(room.keys.ban(IP), "{}", px=90_000)
    denied = room.limits.check(IP, [DEFAULT])
    assert (denied.status, denied.banned, denied.standings) == (429, True, ())
    assert 80 < denied.retry_after <= 90
    assert denied.problem()["type"].endswith("#abnormal-usage-detected")
    assert "RateLimit" not in denied.headers()
    again = room.limits.check({"ip": IP, "user": "ann"}, [USER], cost=0)
    assert again.banned
    assert not logs(client)
    assert events(client, room) == []
    client.delete(room.keys.ban(IP))
    assert room.limits.peek(IP, [DEFAULT])


def test_a_site_of_ipv6_may_be_banned_whole(room: Any, client: Any) -> None:
    """A ban on the client's /64, or on the /48 around it, denies the client."""
    client.set(room.keys.ban("2001:db8:1::/48"), "{}", px=90_000)
    assert room.limits.check("2001:db8:1:2::3", [DEFAULT]).banned
    assert room.limits.check("2001:db8:2:2::3", [DEFAULT])
    client.set(room.keys.ban("2001:db8:2:2::/64"), "{}", px=90_000)
    forget_denials(room)
    assert room.limits.check("2001:db8:2:2::4", [DEFAULT]).banned
    assert room.limits.check("2001:db8:2:3::4", [DEFAULT])


def test_denials_tell_at_powers_of_two(room: Any, client: Any) -> None:
    """A hundred denials make seven events, at powers of two, and each says who, what and where."""
    for _ in range(5 + 100):
        room.limits.check({"ip": IP, "user": "ann"}, [AUTH], route="/login")
        forget_denials(room)
    told = events(client, room)
    assert [event["n"] for event in told] == ["1", "2", "4", "8", "16", "32", "64"]
    assert {event["kind"] for event in told} == {"denied"}
    assert {(e["limit"], e["ip"], e["route"], len(e["user"])) for e in told} == {
        ("auth", IP, "/login", 22)
    }


def test_denials_from_memory_are_told_with_the_next_one(room: Any, client: Any) -> None:
    """Redis is not asked again for a while after a denial, and later counts the denials from memory."""
    for _ in range(6):
        room.limits.check(IP, [AUTH])
    room.state_stats.due = 1 << 62
    assert sent(client, lambda: [room.limits.check(IP, [AUTH]) for _ in range(100)]) == []
    assert client.get(client.keys("*!denied")[0]) == b"1"
    expire_denials(room)
    room.limits.check(IP, [AUTH])
    assert client.get(client.keys("*!denied")[0]) == b"102"
    assert [event["n"] for event in events(client, room)] == ["1", "102"]
    assert room.state_stats.counts["limit_cached"] == 100
    assert room.state_stats.counts["limit_denials"] == 102


def test_a_denial_from_memory_says_what_redis_would(room: Any) -> None:
    """A denial from memory has the headers that Redis would give, and says nothing of limits that count others."""
    limits = [DEFAULT, AUTH]
    for _ in range(6):
        first = room.limits.check(IP, limits)
    again = room.limits.check(IP, limits)
    assert again.headers() == first.headers()
    assert 0 < first.retry_after - again.retry_after < 2
    pair = [USER, PAIR]
    for _ in range(4):
        room.limits.check({"ip": IP, "user": "ann"}, pair)
    other = room.limits.check({"ip": IP, "user": "ann"}, [DEFAULT, PAIR])
    assert [one.limit for one in other.standings] == [PAIR]
    assert other.headers()["RateLimit-Policy"].startswith('"default"')


def test_cheaper_requests_are_not_denied_from_memory(room: Any) -> None:
    """A denial from memory does not hold for a cheaper request or for another quota."""
    ten = Limit("ten", 10, 60)
    room.limits.check(IP, [ten], cost=7)
    assert not room.limits.check(IP, [ten], cost=5)
    assert room.limits.check(IP, [ten], cost=2)
    assert not room.limits.check(IP, [ten], cost=2)
    assert room.limits.check(IP, [dataclasses.replace(ten, quota=20)], cost=2)


def test_use_near_the_quota_is_told_once_a_window(room: Any, client: Any) -> None:
    """Use at 80 % of a quota of 10 or more makes one event a window."""
    ten = Limit("ten", 10, 60)
    for _ in range(10):
        room.limits.check(IP, [ten, AUTH, STATIC], cost=0)
        room.limits.check(IP, [ten], route="/x")
    (told,) = events(client, room)
    assert told == {"kind": "near", "n": "8", "limit": "ten", "ip": IP, "route": "/x"}


def test_a_check_is_answered_though_its_event_is_refused(room: Any, client: Any) -> None:
    """A check is answered and counted though the server refuses its event, near the quota and at a denial."""
    client.set(room.keys.abuse, "no stream", ex=60)
    decisions = [room.limits.check(IP, [Limit("ten", 10, 60)]) for _ in range(11)]
    assert [one.allowed for one in decisions] == [True] * 10 + [False]
    assert {one.degraded for one in decisions} == {""}
    assert client.get(client.keys("*!denied")[0]) == b"1"


def test_a_log_that_somebody_else_wrote_is_none(room: Any, client: Any) -> None:
    """A log of another type or form is written anew and has a TTL again."""
    room.limits.check(IP, [AUTH])
    (key,) = logs(client)
    for spoil in (
        lambda: client.set(key, "no log", ex=60),
        lambda: client.set(key, b"\x06" * 11 * 5_000, ex=60),  # more than Lua can unpack
        lambda: (client.delete(key), client.lpush(key, "x"), client.expire(key, 60)),
    ):
        spoil()
        assert room.limits.check(IP, [AUTH]).remaining == 4


def test_a_ban_that_somebody_else_wrote_is_one(room: Any, client: Any) -> None:
    """A ban is one, for as long as its key says, whatever is written in it."""
    client.set(room.keys.ban(IP), '{"since":1.2.3,"until":4}', ex=60)
    denied = room.limits.check(IP, [AUTH])
    assert (denied.banned, denied.degraded) == (True, "")
    assert 50 < denied.retry_after <= 60


@pytest.mark.parametrize("address", ["10.0.0.2", IP, "2001:db8:1:2::/64"])
def test_a_proxy_that_nobody_named_is_noticed(room: Any, caplog: Any, address: str) -> None:
    """A thousand requests from one address make one warning that names the setting for proxies."""
    for _ in range(2_100):
        room.limits.check(address, [Limit("x", 0, 60)])
    (said,) = [r.getMessage() for r in caplog.records if "TRUSTED_PROXIES" in r.getMessage()]
    assert address in said
    assert ("mode: host" in said) == (address == "10.0.0.2")


def test_the_edges_of_a_public_proxy_are_noticed(room: Any, caplog: Any) -> None:
    """Many edges of one public proxy make the same warning, because their networks are known."""
    for number in range(100):
        room.limits.check(f"172.68.{number}.1", [DEFAULT])
    said = [r.getMessage() for r in caplog.records if "TRUSTED_PROXIES" in r.getMessage()]
    assert len(said) == 1
    assert "STILLROOM_TRUSTED_PROXIES=cloudflare" in said[0]


def test_this_machine_is_no_proxy(room: Any, caplog: Any) -> None:
    """This machine's own address makes no warning, because development happens there."""
    for _ in range(2_100):
        room.limits.check("127.0.0.1", [DEFAULT])
        room.limits.check("::1", [DEFAULT])
    assert not [r for r in caplog.records if "TRUSTED_PROXIES" in r.getMessage()]


def test_a_client_is_whom_the_proxies_speak_for(make_room: Any) -> None:
    """`client` returns the client's address in the form that `check` takes."""
    room = make_room(trusted_proxies="10.0.0.0/8")
    client = room.limits.client("10.0.0.2", [("X-Forwarded-For", f"6.6.6.6, {IP}")])
    assert client == IP
    assert room.limits.check(client, [AUTH])
    assert room.limits.peek(IP, [AUTH]).remaining == 4


def test_a_client_is_found_in_headers_as_a_server_has_them(make_room: Any) -> None:
    """The headers may be a mapping, as aiohttp, Sanic and Tornado have them; a peer is no (host, port)."""
    room = make_room(trusted_proxies="10.0.0.0/8")
    assert room.limits.client("10.0.0.2", {"X-Forwarded-For": IP}) == IP
    with pytest.raises(InvalidArgument, match="give the host"):
        room.limits.client(("10.0.0.2", 80))


def test_a_household_may_be_larger(make_room: Any) -> None:
    """The bits of a client's network are a setting, which `client` and `check` share."""
    room = make_room(limit_v6_prefix=56)
    assert room.limits.client("2001:db8:1:2ff::1") == "2001:db8:1:200::/56"
    room.limits.check("2001:db8:1:2ff::1", [AUTH])
    assert room.limits.peek("2001:db8:1:201::1", [AUTH]).remaining == 4


def test_production_needs_a_pepper_for_names_only(make_room: Any) -> None:
    """Production needs a pepper for the names of users, and none for addresses."""
    room = make_room(session_peppers=(), production=True)
    assert room.limits.check(IP, [AUTH])
    with pytest.raises(SettingsError, match="STILLROOM_SESSION_PEPPERS"):
        room.limits.check({"user": "ann"}, [USER])


def test_counts_are_kept(room: Any) -> None:
    """Each minute counts its checks and denials for health and graphs."""
    counts = room.state_stats.counts
    room.state_stats.due = 1 << 62
    before = dict(counts)
    for _ in range(7):
        room.limits.check(IP, [AUTH])
    room.limits.peek(IP, [AUTH])
    room.limits.reserve(IP, [AUTH])
    names = ("limit_checks", "limit_denials", "limit_cached")
    assert [counts[name] - before.get(name, 0) for name in names] == [8, 3, 2]
    assert "limit_degraded" not in counts


def test_the_stream_of_events_keeps_as_many_as_python_says(
    room: Any, client: Any, monkeypatch: Any
) -> None:
    """An event of a limit goes into a stream that is as long as the process says, whatever its key is called."""
    keys = getattr(room, "inner", room)._limits_body._requests._keys
    monkeypatch.setattr(keys, "events_kept", 100)
    for n in range(250):
        room.limits.check(IP, [Limit(f"nearly-{n}", 10, 60)], cost=9)
    assert 100 <= client.xlen(room.keys.abuse) <= 200
