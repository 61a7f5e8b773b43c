"""While Redis is away a process limits by its share, with time moved by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom import AUTH, DEFAULT, STATIC, Limit
from stillroom.keys import Keys
from stillroom.limits import neighbours
from stillroom.limits.decision import NEVER, OK, TOO_MANY, UNTOLD
from stillroom.limits.local import LocalLimits
from stillroom.limits.neighbours import TOGETHER

S = 1_000_000
KEY, OTHER = b"one", b"other"


def local(processes: int = 1, most: int = 1_000, known: int = 1_000) -> LocalLimits:
    return LocalLimits(processes, most, known)


def take(limits: LocalLimits, key: bytes, limit: Limit, now: int, cost: int = 1) -> int:
    return limits.decide([key], [limit], cost, now, take=True)[0]


def test_a_process_admits_its_share() -> None:
    """A process of four admits a quarter of the quota, at least one, and none of a quota of none."""
    four = local(processes=4)
    assert [take(four, KEY, DEFAULT, n) for n in range(26)] == [OK] * 25 + [TOO_MANY]
    assert [take(four, OTHER, Limit("two", 2, 60), n) for n in range(2)] == [OK, TOO_MANY]
    assert take(four, b"none", Limit("none", 0, 60), 0) == TOO_MANY


def test_its_window_slides() -> None:
    """The window slides: hits come back one by one when it was said."""
    one = local()
    for n in range(5):
        assert take(one, KEY, AUTH, n * 10 * S) == OK
    status, (used, some, fits, full) = one.decide([KEY], [AUTH], 1, 50 * S, take=True)
    assert (status, used, some, fits, full) == (TOO_MANY, 5, 250 * S, 250 * S, 290 * S)
    assert take(one, KEY, AUTH, 300 * S - 1) == TOO_MANY
    assert take(one, KEY, AUTH, 300 * S) == OK
    assert take(one, KEY, AUTH, 300 * S) == TOO_MANY


def test_all_limits_are_consumed_or_none() -> None:
    """All limits of a request are consumed or none, and an open limit takes no part."""
    one = local()
    small = Limit("small", 1, 60)
    for n in range(3):
        one.decide([KEY, OTHER, b"s"], [small, DEFAULT, STATIC], 1, n, take=True)
    status, said = one.decide([OTHER, b"s"], [DEFAULT, STATIC], 1, 3, take=False)
    assert (status, said[0], said[4:]) == (OK, 1, UNTOLD)
    assert len(one.logs) == 2


def test_an_outage_is_no_fresh_quota() -> None:
    """An outage is no fresh quota: each process has its share of what Redis said was left."""
    for processes, left in ((1, 20), (4, 5), (100, 0)):
        limits = local(processes)
        limits.remember([KEY], [80, 10 * S, 0, 55 * S], 0)
        outcomes = [take(limits, KEY, DEFAULT, S) for _ in range(30)]
        assert outcomes.count(OK) == left
        assert take(limits, KEY, DEFAULT, 55 * S) == OK  # all of that has left its window by now


def test_a_cost_over_the_share_waits_and_one_over_the_quota_never_fits() -> None:
    """A cost over the share has to wait for Redis, and a cost over the quota never fits."""
    four = local(processes=4)
    assert four.decide([KEY], [DEFAULT], 26, 0, take=True) == (TOO_MANY, (75, 0, 60 * S, 0))
    assert four.decide([KEY], [DEFAULT], 101, 0, take=True)[1][2] == NEVER


def test_memory_is_bounded() -> None:
    """Memory is bounded for any number of addresses. Strict limits count new clients together."""
    limits = local(most=100, known=100)
    for n in range(20_000):
        key = b"%d" % n
        assert take(limits, key, AUTH, n) in ((OK,) if n < 50 else (OK, TOO_MANY))
        assert take(limits, key + b"d", DEFAULT, n) == OK
        limits.remember([key, key + b"d"], [1, 1, 0, 1] * 2, n)
        assert len(limits.logs) <= 100
    assert len(limits._known) <= 100
    assert sum(map(len, limits._neighbours._together)) <= 3 * TOGETHER
    assert take(limits, b"1", AUTH, 20_000) == OK  # it is known, and not over its share


def test_what_is_over_makes_room() -> None:
    """Each new client looks at some of the oldest logs, and expired ones make room."""
    limits = local(most=10)
    for n in range(10):
        assert take(limits, b"%d" % n, AUTH, 0) == OK
    take(limits, b"new", AUTH, 299 * S)
    assert b"new" not in limits.logs
    take(limits, b"other", AUTH, 301 * S)
    assert b"other" in limits.logs


def key_of(ip: str, limit: Limit = AUTH, kind: str = "ip", more: str = "") -> bytes:
    return Keys("ns").limits(kind, ip + more) + limit.name.encode()


def crowd(name: str) -> list[str]:
    """Yield 8,192 clients of one attacker, by the addresses it has."""
    return {
        "a /48": [f"2001:db8:1:{n:x}::/64" for n in range(8_192)],
        "a /32": [f"2001:db8:{n:x}::/64" for n in range(8_192)],
        "a /16 of IPv4": [f"203.0.{n // 256}.{n % 256}" for n in range(8_192)],
        "a hundred /16": [f"203.{n % 100}.{n // 100}.1" for n in range(8_192)],
    }[name]


@pytest.mark.parametrize("name", ["a /48", "a /32", "a /16 of IPv4", "a hundred /16"])
@pytest.mark.parametrize("kind", ["ip", "ip&user"])
def test_nobody_fills_the_table_for_all_others(name: str, kind: str) -> None:
    """An attacker with any addresses does not fill the table: other clients still have their own five tries."""
    more = "&somebody" if kind == "ip&user" else ""
    limits = local(most=5_000)
    for n, ip in enumerate(crowd(name)):
        take(limits, key_of(ip, kind=kind, more=more), AUTH, n)
    assert len(limits.logs) <= 5_000
    for ip in ("198.51.100.7", "192.0.2.1", "2a02:8108:1:2::/64", "2003:db:1::/64"):
        tries = [take(limits, key_of(ip, kind=kind, more=more), AUTH, 10_000) for _ in range(7)]
        assert tries == [OK] * 5 + [TOO_MANY] * 2
    for ip in ("198.51.101.7", "2a02:8109:1:2::/64"):  # and nobody is admitted for nothing
        assert take(limits, key_of(ip), AUTH, 10_000, cost=6) == TOO_MANY


def test_who_finds_no_room_is_counted_with_his_neighbours() -> None:
    """A client without room shares a quota with its network and no other. A refund gives back to all of them."""
    limits = local(most=2_000)
    for n in range(2_000):
        take(limits, key_of(f"20.{n // 250}.{n % 250}.1"), AUTH, 0)
    tries = [take(limits, key_of(f"198.51.100.{n}"), AUTH, 1) for n in range(7)]
    assert tries == [OK] * 5 + [TOO_MANY] * 2
    assert limits.decide([key_of("198.51.100.9")], [AUTH], 1, 1, take=False)[0] == TOO_MANY
    assert take(limits, key_of("198.51.101.1"), AUTH, 1) == OK
    other = Limit("other", 1, 60, away="strict")
    assert take(limits, key_of("198.51.100.1", other), other, 1) == OK
    status, _ = limits.decide([key_of("192.0.2.1")], [AUTH], 5, 1, take=True, id="r")
    assert status == OK
    assert take(limits, key_of("192.0.2.2"), AUTH, 1) == TOO_MANY
    assert limits.refund("r") is True
    assert take(limits, key_of("192.0.2.2"), AUTH, 1) == OK
    users = [Keys("ns").limits("user", f"{n:022d}") + b"auth" for n in range(50)]
    assert [take(limits, user, AUTH, 1) for user in users].count(OK) > 40
    assert not any(charge.key in users for charge in limits.owed(2, users, 5_000))


def test_what_is_counted_together_is_bounded() -> None:
    """Shared counts are bounded too, by wider networks and at last by one count for everybody."""
    limits = local(most=1)
    for n in range(3 * TOGETHER):
        take(limits, key_of(f"{n // 250}.{n % 250}.1.1"), AUTH, n)
        limit = Limit(f"l{n}", 1, 60, away="strict")
        take(limits, key_of("192.0.2.1", limit), limit, n)
    sizes = list(map(len, limits._neighbours._together))
    assert max(sizes) <= TOGETHER
    assert (
        take(limits, key_of("250.1.1.1"), AUTH, 400 * S) == OK
    )  # what is over makes room here too


def test_a_network_has_room_again_when_its_logs_are_gone() -> None:
    """A network has room for its clients again when its logs are reported, expired or forgotten."""
    limits = local(most=2_000)
    keys = [key_of(f"2001:db8:1:{n:x}::/64") for n in range(300)]
    for key in keys:
        take(limits, key, AUTH, 0)
    assert len(limits.logs) == 256
    limits.forget(keys[:100])
    limits.settle(limits.owed(1, most=5_000), 1, told=True)
    assert not limits.logs
    assert not limits._neighbours._counts
    take(limits, key_of("2001:db8:1:ffff::/64"), AUTH, 2)
    assert len(limits.logs) == 1


@pytest.mark.parametrize(
    "key", [b"", b"x", b"ns:{rl:ip:unknown}:a", b"ns:{rl:ip:1:2}:a", b"ns:{rl:ip:\xff::}:a"]
)
def test_a_name_without_a_network_has_neighbours_too(key: bytes) -> None:
    """A subject without a network has neighbours too, whatever it looks like."""
    found = neighbours.Neighbours(10)
    assert found.have_room(key)
    found.count(key, 1)
    found.count(key, -1)
    assert found.log(key, AUTH, 0) is found.log(key, AUTH, 0)


def test_what_was_admitted_is_owed_once() -> None:
    """Admitted hits are owed to Redis once: not those it knew, not while on the way, again after a failure."""
    limits = local()
    limits.remember([KEY], [2, 10 * S, 0, 290 * S], 0)
    for n in (1, 2):
        take(limits, KEY, AUTH, n * S)
    (charge,) = limits.owed(5 * S)
    assert (charge.key, charge.hits, charge.age_us) == (KEY, 2, 3 * S)
    assert limits.owed(5 * S) == []
    assert take(limits, KEY, AUTH, 5 * S) == OK
    limits.settle([charge], 6 * S, told=False)
    (charge,) = limits.owed(6 * S, [KEY, OTHER])
    assert charge.hits == 3
    assert take(limits, KEY, AUTH, 6 * S) == TOO_MANY
    limits.settle([charge], 7 * S, told=True)
    assert (limits.owed(7 * S), len(limits.logs)) == ([], 0)


def test_what_is_admitted_while_a_charge_travels_is_owed_after_it() -> None:
    """A hit admitted while a charge travels is owed after it."""
    limits = local()
    take(limits, KEY, AUTH, 0, cost=2)
    charges = limits.owed(S)
    take(limits, KEY, AUTH, 2 * S)
    limits.settle(charges, 3 * S, told=True)
    assert [charge.hits for charge in limits.owed(4 * S)] == [1]


def test_what_has_left_its_window_is_not_owed() -> None:
    """A hit that has left its window is not owed, because it would count for nothing."""
    limits = local()
    take(limits, KEY, AUTH, 0)
    assert limits.owed(300 * S) == []
    assert len(limits.logs) == 0


def reserve(limits: LocalLimits, key: bytes, limit: Limit, now: int, id: str, cost: int = 1) -> int:
    return limits.decide([key], [limit], cost, now, take=True, id=id)[0]


def used(limits: LocalLimits, key: bytes, limit: Limit, now: int) -> int:
    return limits.decide([key], [limit], 1, now, take=False)[1][0]


def test_a_reservation_is_refunded_once() -> None:
    """A reservation is refunded once, with its own hits only, and a held place is given back once."""
    limits = local()
    take(limits, KEY, AUTH, 0)
    assert reserve(limits, KEY, AUTH, S, "r", cost=3) == OK
    assert reserve(limits, KEY, AUTH, S, "s") == OK
    assert limits.let_go("s") is True
    assert (limits.refund("s"), limits.let_go("s")) == (False, False)
    assert limits.refund("r") is True
    assert (limits.refund("r"), limits.let_go("r")) == (False, False)
    assert used(limits, KEY, AUTH, 2 * S) == 2


def test_what_redis_is_told_is_not_refunded_here() -> None:
    """A hit that is on its way to Redis, or arrived, has to be refunded by Redis too. Here it counts no more."""
    limits = local()
    reserve(limits, KEY, AUTH, 0, "on its way")
    charges = limits.owed(S)
    assert [one.id for one in charges[0].reserved] == ["on its way"]
    assert charges[0].hits == 0
    reserve(limits, KEY, AUTH, S, "later")
    assert limits.refund("on its way") is None
    limits.settle(charges, S, told=False)
    assert limits.refund("later") is True
    reserve(limits, KEY, AUTH, S, "arrived")
    charges = limits.owed(S)
    assert [one.id for one in charges[0].reserved] == ["arrived"]
    limits.settle(charges, S, told=True)
    assert (limits.owed(S), len(limits.logs)) == ([], 0)
    assert used(limits, KEY, AUTH, 2 * S) == 1
    assert limits.refund("arrived") is None
    assert used(limits, KEY, AUTH, 2 * S) == 0


@pytest.mark.parametrize(("cost", "left"), [(0, 0), (1, 1), (3, 3), (9, 9)])
def test_what_was_reserved_here_is_settled_here(cost: int, left: int) -> None:
    """A reservation made here is settled here once, whatever the share, and Redis is charged the final cost."""
    limits, limit = local(), Limit("tokens", 5, 60)
    assert reserve(limits, KEY, limit, 0, "r", cost=3) == OK
    assert limits.refund("r", cost) is True
    assert limits.refund("r", 1) is False
    assert used(limits, KEY, limit, S) == min(left, 5)
    (charge,) = limits.owed(2 * S) or [None]
    assert (charge is None) == (left == 0)
    if charge is not None:
        assert charge.hits + sum(one.hits for one in charge.reserved) == left


def test_places_are_given_back_and_the_other_limits_of_a_request_stay_consumed() -> None:
    """Refunding places leaves the other limits of the request consumed."""
    limits, place = local(), Limit("place", 1, 60, in_flight=True)
    both: dict[str, Any] = {"cost": 1, "take": True}
    assert limits.decide([KEY, OTHER], [place, AUTH], now=0, id="r", **both)[0] == OK
    assert limits.decide([KEY, OTHER], [place, AUTH], now=1, id="s", **both)[0] == TOO_MANY
    assert limits.refund("r", 0, {KEY}) is True
    assert (used(limits, KEY, place, S), used(limits, OTHER, AUTH, S)) == (0, 1)
    assert limits.decide([KEY, OTHER], [place, AUTH], now=S, id="t", **both)[0] == OK


def test_a_limit_in_shadow_is_open() -> None:
    """A limit in shadow counts, denies and owes nothing here."""
    limits, shadow = local(), Limit("shadow", 1, 60, shadow=True)
    for n in range(3):
        status, said = limits.decide([KEY, OTHER], [shadow, AUTH], 1, n, take=True)
        assert (status, said[:4]) == (OK, UNTOLD)
    assert [charge.key for charge in limits.owed(S)] == [OTHER]


def test_many_reservations_in_one_log_share_its_entries() -> None:
    """Reservations in one log share its entries after the first hundred, so the log stays small.

    All of them can be settled until Redis is told how many there were; then only what cost more is added.
    """
    limits, limit = local(), Limit("many", 1_000, 3_600)
    for n in range(1_000):
        assert reserve(limits, KEY, limit, n, str(n)) == OK
    assert reserve(limits, KEY, limit, 1_000, "over") == TOO_MANY
    assert limits.refund("7") is True
    assert (limits.refund("999"), limits.refund("998", 5)) == (True, True)
    (charge,) = limits.owed(1_000)
    assert len(charge.reserved) == 99
    assert (charge.hits, charge.total) == (900 - 1 + 4, 900 - 1 + 4)
    limits.settle([charge], 1_000, told=True)
    assert (limits.refund("997"), limits.refund("996", 3, now=1_001)) == (False, True)
    (charge,) = limits.owed(1_001)
    assert (charge.hits, charge.total, len(charge.reserved)) == (2, 905, 0)


# What was settled


@given(st.lists(st.sampled_from(["take", "outage ends", "charge fails", "later"]), max_size=60))
def test_flapping_admits_no_more_than_one_outage(acts: list[str]) -> None:
    """When Redis comes and goes in one window the share is admitted once, not once for each outage."""
    limits, now, admitted, charged = local(processes=2), 0, 0, 0
    limits.remember([KEY], [0, 0, 0, 0], now)
    for act in acts:
        now += 1_000
        if act == "take":
            admitted += take(limits, KEY, AUTH, now) == OK
        elif act == "later":
            now += S
        elif charges := limits.owed(now):
            charged += sum(charge.hits for charge in charges) if act == "outage ends" else 0
            limits.settle(charges, now, told=act == "outage ends")
    assert admitted <= 2
    assert charged <= admitted


def test_what_was_charged_counts_with_what_others_did() -> None:
    """After a charge the process admits no more than Redis says is left, or its own share."""
    limits, limit = local(processes=2), Limit("ten", 10, 60)
    for n in range(4):
        assert take(limits, KEY, limit, n) == OK
    limits.settle(limits.owed(4), 4, told=True)
    limits.remember([KEY], [8, 0, 0, 60 * S], 4, 1)
    assert take(limits, KEY, limit, 5) == OK
    assert (
        take(limits, KEY, limit, 5) == TOO_MANY
    )  # one is left of the own share, two are of the whole quota
    assert take(limits, KEY, limit, 61 * S) == OK


def test_a_reply_that_was_overtaken_is_not_believed() -> None:
    """An overtaken reply is not believed: the server's clock orders overlapping calls."""
    for sent, expected in ((5, 4), (15, 1)):
        limits = local()
        limits.remember([KEY], [4, 0, 0, 300 * S], 10, 5 * S, 0)
        limits.remember([KEY], [1, 0, 0, 300 * S], 20, 5 * S - 1, sent)
        assert used(limits, KEY, AUTH, 21) == expected


def test_what_redis_is_being_asked_for_counts() -> None:
    """A request that another thread is asking Redis for counts as used, and one's own does not."""
    limits = local()
    flying = {KEY: 4, OTHER: 6}
    outcomes = [limits.decide([KEY], [AUTH], 1, n, take=True, flying=flying)[0] for n in range(3)]
    assert outcomes == [OK, TOO_MANY, TOO_MANY]
    assert take(limits, KEY, AUTH, 3) == OK


def test_two_windows_of_one_name_keep_their_hits() -> None:
    """Two windows of one name keep their own hits, and a reply about one says nothing about the other."""
    limits = local()
    long, short = Limit("login", 5, 3_600), Limit("login", 100, 1)
    names = {long: KEY, short: KEY + b"@1"}

    def takes(limit: Limit, now: int) -> bool:
        known = [names[limit]]
        return limits.decide([KEY], [limit], 1, now, take=True, known=known)[0] == OK

    admitted = 0
    for n in range(20):
        admitted += takes(long, n * 10 * S)
        takes(short, n * 10 * S + 1)
    assert admitted == 3  # its own, and what the other one was admitted, are five
    limits = local()
    limits.remember([names[short]], [1, 0, 0, S], 0)
    limits.remember([names[long]], [4, 0, 0, 3_600 * S], 0)
    assert [takes(long, 1), takes(long, 2), takes(short, 3)] == [True, False, True]


def test_a_child_process_owes_nothing() -> None:
    """A forked child owes nothing: its parent reports what the parent admitted."""
    limits = local()
    take(limits, KEY, AUTH, 0)
    limits.reset()
    assert (limits.owed(1), len(limits.logs)) == ([], 0)


@given(
    st.lists(st.tuples(st.integers(0, 20 * S), st.integers(0, 40)), max_size=120),
    st.integers(1, 200),
    st.integers(1, 60),
)
def test_never_more_than_the_quota_in_any_window(hits: Any, quota: int, window: int) -> None:
    """Random traffic is never admitted above the quota in any window, and fits exactly when it was told to."""
    limits, limit = local(), Limit("x", quota, window)
    admitted: list[tuple[int, int]] = []
    now = 0
    for gap, cost in hits:
        now += gap
        status, (_, _, fits, _) = limits.decide([KEY], [limit], cost, now, take=True)
        if status == OK:
            admitted.append((now, cost))
            recent = sum(n for at, n in admitted if at > now - window * S)
            assert recent <= quota
        elif fits != NEVER:
            assert cost <= quota
            assert limits.decide([KEY], [limit], cost, now + fits - 1, take=False)[0] == TOO_MANY
            now += fits
            assert limits.decide([KEY], [limit], cost, now, take=False)[0] == OK
