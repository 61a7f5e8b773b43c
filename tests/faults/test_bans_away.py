"""While Redis is away the bans that a process of the machine knows hold for all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import AUTH, DEFAULT, STATIC, NoDispatch, Settings, Stillroom, known_bans
from stillroom.embedded import EmbeddedServer
from tests.support.abuse import CLIENT, put
from tests.support.celery_process import until
from tests.support.faces import opening_rooms
from tests.support.limits import forget_denials

OTHER = "203.0.114.1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each look read the file."""
    monkeypatch.setattr(known_bans, "LOOKS_EVERY_S", -1.0)


@pytest.fixture(params=["sync", "async"])
def make(
    request: pytest.FixtureRequest, own_server: EmbeddedServer, tmp_path: Path, rules: Path
) -> Iterator[Callable[..., Any]]:
    """Open processes of one machine, as far as bans know."""
    given: dict[str, Any] = {
        "redis_url": own_server.url,
        "session_peppers": "p" * 32,
        "abuse_rules": rules,
        "ban_file": tmp_path / "bans",
        "connect_timeout": 2.0,
        "command_timeout": 2.0,
        "call_timeout": 3.0,
    }
    with opening_rooms(**given) as make:
        yield partial(make, request.param)


def assert_banned(room: Any, address: str) -> None:
    """Check that every limit denies as banned and says for how long, also limits that admit everybody meanwhile."""
    for limits in ([DEFAULT], [AUTH], [STATIC], [STATIC, AUTH]):
        forget_denials(room)
        decision = room.limits.check(address, limits)
        assert (decision.allowed, decision.banned, decision.status) == (False, True, 429)
        assert 50 <= decision.retry_after <= 61
        assert decision.degraded
        assert room.limits.peek(address, limits).banned
        assert not room.limits.reserve(address, limits)


def test_a_ban_that_one_process_has_met_holds_in_all(
    make: Callable[..., Any], own_server: EmbeddedServer
) -> None:
    """A ban on an address, a /64 or a network that one process met holds in all, for each address of the network,
    and others are admitted.
    """
    operator, met, other = make(ban_file=os.devnull), make(), make()
    for subject, address in (
        (CLIENT, CLIENT),
        ("2001:db8:1:2::1", "2001:db8:1:2:3::4"),
        ("198.51.100.0/24", "198.51.100.7"),
        ("2001:db8:9::/48", "2001:db8:9:9::9"),
    ):
        operator.abuse.ban(subject, 60)
        assert met.limits.check(address, [DEFAULT]).banned
    assert other.limits.check(OTHER, [DEFAULT])
    own_server.kill()
    for room in (met, other):
        for address in (CLIENT, "2001:db8:1:2::", "198.51.100.7", "2001:db8:9:9::9"):
            assert_banned(room, address)
        for not_met in ("198.51.100.8", "2001:db8:9:8::1"):
            assert_banned(room, not_met)
        assert room.limits.check(OTHER, [DEFAULT])
        assert room.limits.check("2001:db8:1:3::", [DEFAULT])
    late = make()  # begun while Redis is away
    assert late.limits.check(CLIENT, [STATIC]).banned


def test_who_bans_knows_it(make: Callable[..., Any], own_server: EmbeddedServer) -> None:
    """The process that bans, an operator's or a worker's, makes the ban known before the client is met."""
    operator, worker, app = make(), make(), make()
    operator.abuse.ban(CLIENT, 60)
    with redis.Redis.from_url(own_server.url) as client:
        put(client, worker, "denied", ip="203.0.113.77", n="64")
    assert worker.abuse.scan()["bans"] == 1
    own_server.kill()
    assert_banned(app, CLIENT)
    assert app.limits.check("203.0.113.77", [STATIC]).banned


def test_a_ban_ends_when_its_time_is_over(
    make: Callable[..., Any], own_server: EmbeddedServer
) -> None:
    """A ban ends when its time is over, also while Redis is still away. Then its client has a whole quota."""
    room, other = make(), make()

    def is_met_in_time(seconds: int) -> bool:
        """Ban, and return whether the other process met it before and in the outage, within the ban's time."""
        began = time.monotonic()
        room.abuse.ban(CLIENT, seconds)
        is_met = other.limits.check(CLIENT, [DEFAULT, STATIC]).banned
        own_server.kill()
        is_met = other.limits.check(CLIENT, [STATIC]).banned and is_met
        assert is_met or time.monotonic() - began > seconds
        if is_met:
            ends.append(began + seconds)
        else:
            own_server.restart()
            until(lambda: not other.wire.breaker.is_open, "recovery")
            until(lambda: not room.wire.breaker.is_open, "recovery")
        return is_met

    ends: list[float] = []
    assert any(is_met_in_time(seconds) for seconds in (1, 3, 9))  # for a busy machine
    for one in (room, other):
        until(lambda one=one: is_let_in(one), "the end of the ban")
        assert time.monotonic() > ends[0] - 0.1
    assert other.limits.peek(CLIENT, [DEFAULT]).remaining == DEFAULT.quota


def is_let_in(room: Any) -> bool:
    forget_denials(room)
    return bool(room.limits.check(CLIENT, [STATIC]))


def test_what_was_lifted_does_not_hold(
    make: Callable[..., Any], own_server: EmbeddedServer
) -> None:
    """A ban that was lifted here, or whose client was seen or became exempt here since, does not hold."""
    room, elsewhere = make(), make(ban_file=os.devnull)
    for address in (CLIENT, OTHER, "192.0.2.1"):
        room.abuse.ban(address, 60)
    room.abuse.lift(CLIENT)
    elsewhere.abuse.lift(OTHER)
    assert room.limits.check(OTHER, [DEFAULT])
    own_server.kill()
    app = make(abuse_allow="192.0.2.0/24")
    for address in (CLIENT, OTHER, "192.0.2.1"):
        assert app.limits.check(address, [DEFAULT])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_knows_what_is_in_the_file(own_server: EmbeddedServer, tmp_path: Path) -> None:
    """A forked child of a prefork server knows a ban that is newer than its fork, from the file."""
    settings = Settings(
        redis_url=own_server.url, session_peppers="p" * 32, ban_file=tmp_path / "bans"
    )
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.limits.check(CLIENT, [DEFAULT])
        begin, child_begins = os.pipe()
        if (child := os.fork()) == 0:
            os.close(child_begins)  # it ends with its parent, if the test fails
            os.read(begin, 1)
            os._exit(17 if room.limits.check(CLIENT, [STATIC]).banned else 1)
        room.abuse.ban(CLIENT, 60)
        own_server.kill()
        os.write(child_begins, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
