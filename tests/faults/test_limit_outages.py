"""An outage gives nobody a fresh quota, however often it happens and whatever reply is late or lost."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import Limit, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.limits.settling import AWAY
from stillroom.scripts import BY_SHA, limit_charge
from tests.support.celery_process import until
from tests.support.faces import opening_rooms
from tests.support.full_disk import REFUSALS, take_writes
from tests.support.limits import forget_denials, read_log
from tests.support.monitor import scripts_run
from tests.support.processes import Program
from tests.support.proxy import Proxy
from tests.support.stepper import Stepper
from tests.support.threads import repeated

IP = "203.0.113.7"
LOGIN = Limit("login", 10, 3_600)
CALM = {"connect_timeout": 2.0, "command_timeout": 2.0, "call_timeout": 3.0}
BRISK = {"connect_timeout": 0.15, "command_timeout": 0.15, "call_timeout": 0.2}


@pytest.fixture
def make(own_server: EmbeddedServer) -> Iterator[Callable[..., Stillroom]]:
    given = {"redis_url": own_server.url, "session_peppers": "p" * 32}
    with opening_rooms(**given | CALM) as make:
        yield make


def knock(room: Stillroom, limit: Limit, times: int, ip: str = IP) -> int:
    admitted = 0
    for _ in range(times):
        forget_denials(room)
        admitted += bool(room.limits.check(ip, [limit]))
    return admitted


def known(server: EmbeddedServer, room: Stillroom, limit: Limit, ip: str = IP) -> int:
    """Return how many hits Redis knows of."""
    with redis.Redis.from_url(server.url) as client:
        return sum(n for _, n in read_log(client, room.keys.limits("ip", ip) + limit.name.encode()))


def back(room: Stillroom) -> None:
    until(lambda: not room.state_wire.breaker.is_open, "recovery")
    until(lambda: not room.limits.peek("203.0.113.99", [LOGIN]).degraded, "an answer")


def quietly(room: Stillroom) -> None:
    """Let only the requests themselves tell Redis anything when it is back."""
    room.state_wire.breaker.recovered.clear()


# Once and again


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_flapping_ten_times_is_one_outage(
    own_server: EmbeddedServer, make: Callable[..., Stillroom], how: str
) -> None:
    """Redis that goes away ten times admits ten in all, together with the process."""
    room = make(**(BRISK if how == "frozen" else CALM))
    admitted = knock(room, LOGIN, 1)
    for _ in range(10):
        if how == "killed":
            own_server.kill()
        else:
            own_server.freeze()
        until(lambda: room.limits.peek("203.0.113.99", [LOGIN]).degraded == "breaker", "an outage")
        admitted += knock(room, LOGIN, 15)
        if how == "killed":
            own_server.restart()
        else:
            own_server.thaw()
        back(room)
        until(lambda: room.limits.deliver() == 0, "the charge")  # a brisk call may be late
        assert admitted <= 10
    assert admitted == 10
    assert known(own_server, room, LOGIN) >= 10


def test_flaps_of_two_processes_admit_their_shares(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """Two processes each admit half of the quota in one window, however often Redis goes away."""
    rooms = [make(processes=2), make(processes=2)]
    for room in rooms:
        room.limits.peek(IP, [LOGIN])
    admitted = 0
    for _ in range(4):
        own_server.kill()
        for room in rooms:
            until(
                lambda room=room: room.limits.peek(IP, [LOGIN]).degraded == "breaker", "an outage"
            )
            admitted += knock(room, LOGIN, 15)
        own_server.restart()
        for room in rooms:
            until(lambda room=room: not room.state_wire.breaker.is_open, "recovery")
            until(lambda room=room: not room._limits_body._local.logs, "the charge")
    assert admitted == 10
    assert known(own_server, rooms[0], LOGIN) == 10


@pytest.mark.parametrize("refusal", REFUSALS)
def test_processes_whose_hits_were_refused_admit_no_more_than_the_quota(
    own_server: EmbeddedServer, make: Callable[..., Stillroom], refusal: str
) -> None:
    """Once Redis takes writes again, a process waits until the others have told it what they admitted."""
    rooms = [make(processes=2), make(processes=2)]
    for room in rooms:
        room.limits.peek(IP, [LOGIN])
    REFUSALS[refusal](own_server)
    admitted = sum(knock(room, LOGIN, 15) for room in rooms)
    take_writes(own_server)
    admitted += knock(rooms[0], LOGIN, 15)
    for room in rooms:
        until(lambda room=room: not room._limits_body._local.logs, "the charge")
        admitted += knock(room, LOGIN, 15)
    assert admitted == 10
    until(lambda: not rooms[0].limits.check(IP, [LOGIN]).degraded, "a decision of Redis", 5)
    assert known(own_server, rooms[0], LOGIN) == 10


# Nothing overtakes a charge


def test_a_charge_waits_for_a_right_that_is_missing(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """Hits that Redis may not be told of for want of a right are told when the right is given back."""
    room = make()
    room.limits.check("203.0.113.1", [LOGIN])
    own_server.kill()
    assert knock(room, LOGIN, 7) == 7
    quietly(room)
    own_server.restart()
    until(lambda: not room.state_wire.breaker.is_open, "recovery")
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-evalsha")
        assert room.limits.deliver() == 1
        client.execute_command("ACL", "SETUSER", "default", "+evalsha")
    assert room.limits.deliver() == 0
    assert known(own_server, room, LOGIN) == 7


def test_a_refund_without_the_right_to_it_keeps_redis_deciding(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """A user who may take but not give back is told that nothing is given back, and Redis goes on deciding."""
    room = make()
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-unlink", "-hmget")
        held = room.limits.reserve(IP, [LOGIN])
        assert room.limits.refund(held) is False
    decision = room.limits.check(IP, [LOGIN])
    assert (decision.degraded, decision.remaining) == ("", 8)


def test_a_room_that_is_closed_delivers_nothing_afterwards(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """A room that is closed in an outage stays closed, though it was to deliver something a second later."""
    room = make(probe_limit=0.2, breaker_failures=2)
    room.limits.check(IP, [LOGIN])
    delivered: list[float] = []
    room.state_wire.breaker.recovered[:] = [lambda: delivered.append(time.monotonic())]
    own_server.kill()
    room.state_wire.breaker.remind()
    knock(room, LOGIN, 5)
    assert room.state_wire.breaker.is_open
    room.close()
    until(lambda: not reminders(), "the end of the reminder")
    assert not delivered


def reminders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("remind ")]


def test_a_check_does_not_overtake_its_charge(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """While one thread charges a subject to Redis, a check of that subject is decided here."""
    room = make()
    room.limits.check("203.0.113.1", [LOGIN])
    own_server.kill()
    assert knock(room, LOGIN, 40) == 10
    quietly(room)
    own_server.restart()
    until(lambda: not room.state_wire.breaker.is_open, "recovery")
    other = Stepper(room, room._limits_body.check("203.0.113.1", [LOGIN]))
    while other.at[0][1] != limit_charge.text.sha:
        other.step()
    for _ in range(2):  # the charge is on its way; it has arrived, and its reply has not
        forget_denials(room)
        decision = room.limits.check(IP, [LOGIN])
        assert (decision.allowed, decision.degraded) == (False, "charging")
        other.step()
    assert other.value().allowed
    assert known(own_server, room, LOGIN) == 10
    assert not room.limits.check(IP, [LOGIN]).degraded


def test_a_charge_goes_before_the_check_where_scripts_were_lost(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """After a restart the charge is sent before the check, though only the check's script is loaded."""
    room, other = make(), make()
    for one in (room, other):
        one.limits.check("203.0.113.1", [LOGIN])
    own_server.kill()
    assert knock(room, LOGIN, 20) == 10
    quietly(room)
    own_server.restart()
    for one in (room, other):
        until(lambda one=one: not one.state_wire.breaker.is_open, "recovery")
    back(other)
    assert knock(room, LOGIN, 3) == 0
    assert known(own_server, room, LOGIN) == 10


def test_a_check_that_redis_may_admit_counts_here(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """A hit that Redis may have admitted for one thread counts as used for the others."""
    room = make()
    room.limits.check("203.0.113.1", [LOGIN])
    for order in ("answered late", "never answered"):
        limit = Limit(f"login-{order[:5]}", 5, 3_600)
        room.limits.peek(IP, [limit])
        first = Stepper(room, room._limits_body.check(IP, [limit]))
        if order == "answered late":
            first.step()
        own_server.kill()
        assert knock(room, limit, 20) == 4
        if order == "answered late":
            assert first.value().allowed
            assert knock(room, limit, 5) == 0
        own_server.restart()
        back(room)


@pytest.mark.long
def test_threads_admit_no_more_than_the_quota_across_a_restart(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """Sixteen threads on three hundred addresses admit the quota across a kill of Redis.

    A check whose reply was lost may have taken of it, too.
    """
    room, limit = make(**BRISK), Limit("five", 5, 3_600)
    turns, lock = count(), threading.Lock()
    admitted: Counter[str] = Counter()
    unanswered: Counter[str] = Counter()
    refused_by_redis: set[str] = set()

    def work() -> None:
        turn = next(turns) * 7 % 300
        ip = f"203.0.{turn // 250}.{turn % 250}"
        decision = room.limits.check(ip, [limit])
        with lock:
            admitted[ip] += decision.allowed
            unanswered[ip] += decision.degraded in ("closed", "timeout")
            if not (decision.allowed or decision.degraded):
                refused_by_redis.add(ip)

    with repeated(work, threads=16, pause=0.0005):
        until(lambda: admitted.total() > 100, "traffic")
        own_server.kill()
        until(lambda: room.state_wire.breaker.is_open, "the outage")
        until(lambda: admitted.total() > 700, "traffic in the outage")
        own_server.restart()
        with lock:
            refused_by_redis.clear()
        until(lambda: len(refused_by_redis) == 300, "all quotas", within=60)
        until(lambda: not room.state_wire.breaker.is_open, "recovery")
        until(lambda: room.limits.deliver() == 0, "the charges")
    assert {
        ip: (admitted[ip], unanswered[ip])
        for ip in refused_by_redis
        if not 5 - unanswered[ip] <= admitted[ip] <= 5
    } == {}
    assert unanswered.total() < 300


CROWD = """
    import json, pathlib, threading, time
    from collections import Counter
    from itertools import count
    from stillroom import Limit, NoDispatch, Settings, Stillroom
    room = Stillroom(Settings(redis_url={url!r}, session_peppers="p" * 32, processes=3), dispatch=NoDispatch())
    limit, admitted, lock, stop = Limit("six", 6, 3600), Counter(), threading.Lock(), threading.Event()
    room.limits.check("198.51.100.1", [limit])
    def work(seed):
        for n in count(seed):
            if stop.wait(0.0005):
                return
            ip = f"203.0.113.{{n * 7 % 100}}"
            if room.limits.check(ip, [limit]):
                with lock:
                    admitted[ip] += 1
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    def await_word(word):
        while not pathlib.Path({folder!r}, word).exists():
            time.sleep(0.01)
    print("ready now", flush=True)
    await_word("go")
    for thread in threads:
        thread.start()
    await_word("stop")
    stop.set()
    for thread in threads:
        thread.join()
    room.close()
    print("admitted", json.dumps(admitted), flush=True)
"""


@pytest.mark.long
def test_processes_admit_no_more_than_the_quota_when_redis_is_back(
    own_server: EmbeddedServer, tmp_path: Path
) -> None:
    """Of three processes with shares of two Redis admits nobody before all have told it theirs."""
    total: Counter[str] = Counter()
    with ExitStack() as stack:
        source = CROWD.format(url=own_server.url, folder=str(tmp_path))
        programs = [stack.enter_context(Program(source, within=60)) for _ in range(3)]
        for program in programs:
            assert program.read_word("ready ") == "now"
        own_server.kill()
        (tmp_path / "go").touch()
        threading.Event().wait(1.5)  # they find out, and use up their shares
        own_server.restart()
        threading.Event().wait(5.0)  # and go on, each in its time
        (tmp_path / "stop").touch()
        for program in programs:
            total.update(json.loads(program.read_word("admitted ")))
    assert len(total) == 100
    assert max(total.values()) <= 6


# What is late or lost


@pytest.fixture
def brisk(proxy: Proxy) -> Iterator[Stillroom]:
    """Open a room behind the proxy that gives up soon and whose breaker opens late."""
    settings = Settings(
        redis_url=proxy.url,
        session_peppers="p" * 32,
        breaker_failures=1_000,
        **{"breaker_calls": 1_000, **BRISK},
    )
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.limits.refund(room.limits.reserve("203.0.113.1", [LOGIN]))
        yield room


def test_a_charge_whose_reply_was_lost_counts_once(
    brisk: Stillroom, proxy: Proxy, server: EmbeddedServer
) -> None:
    """A charge with a lost reply is sent until it is answered, and Redis counts each hit once."""
    limit = Limit("charged", 20, 3_600)
    brisk.limits.peek(IP, [limit])
    local = brisk._limits_body._local
    keys = (brisk.keys.limits("ip", IP) + b"charged",)
    local.decide((b"stillroom:{rl:ip:x}:y",), [limit], 1, time.monotonic_ns() // 1_000, take=True)
    assert brisk.limits.deliver() == 0  # the server has the script
    for hits in range(1, 4):  # each time one more, and its charge is done and not answered
        local.decide(keys, [limit], 1, time.monotonic_ns() // 1_000, take=True)
        brisk.sessions.count()  # a connection is open
        proxy.hold_replies()
        assert brisk.limits.deliver() == 1
        proxy.let_go()
        until(lambda hits=hits: known(server, brisk, limit) == hits, "the charge")
    assert brisk.limits.deliver() == 0
    assert known(server, brisk, limit) == 3


@pytest.mark.parametrize("told", ["at once", "with the next check", "after it was charged"])
def test_logins_that_succeed_over_a_slow_redis_use_nothing_up(
    brisk: Stillroom, proxy: Proxy, server: EmbeddedServer, told: str
) -> None:
    """A login over a slow Redis, decided here after a late reservation, is refunded in full by a
    refund that returns True.
    """
    auth = Limit("auth", 5, 3_600)
    brisk.limits.peek(IP, [auth])
    for _ in range(5):
        proxy.hold_replies()
        held = brisk.limits.reserve(IP, [auth])
        assert held.local
        if told != "with the next check":
            proxy.let_go()
        if told == "after it was charged":
            assert brisk.limits.deliver() == 0
        assert brisk.limits.refund(held) is True
        proxy.let_go()
    assert brisk.limits.peek(IP, [auth]).remaining == 5
    until(lambda: known(server, brisk, auth) == 0, "all of them")
    held = brisk.limits.reserve(IP, [auth])
    assert (held.allowed, held.local) == (True, False)


def test_a_reservation_that_arrives_after_its_refund_takes_nothing(
    brisk: Stillroom, proxy: Proxy, server: EmbeddedServer, client: Any
) -> None:
    """A reservation that arrives after its refund takes nothing."""
    auth = Limit("auth", 5, 3_600)
    brisk.limits.peek(IP, [auth])
    proxy.hold_requests()
    held = brisk.limits.reserve(IP, [auth])
    assert held.local
    refund = brisk._limits_body._settling._settlement(held, 0)
    assert client.execute_command("EVAL", BY_SHA[refund[1]].source, *refund[2:]) == 1
    run = scripts_run(client)
    proxy.let_go()
    until(lambda: scripts_run(client) > run, "its arrival")
    assert brisk.limits.refund(held) is True
    assert known(server, brisk, auth) == 0


def test_a_place_that_redis_gave_to_nobody_comes_back(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """A place that Redis gives while the process, which has waited in vain, has none to give is free again."""
    places = Limit("places", 2, 3_600, in_flight=True)
    with Proxy(own_server.port) as proxy:
        room = make(**BRISK, redis_url=proxy.url, processes=2)
        with room.limits.hold(IP, [places]) as held:
            assert held
            proxy.hold_replies()
            refused = room.limits.reserve(IP, [places])
            assert (refused.allowed, refused.decision.degraded) == (False, "timeout")
            proxy.let_go()
            until(lambda: make().limits.peek(IP, [places]).remaining == 1, "the other place")


@pytest.mark.parametrize("arrives", [False, True], ids=["never", "late"])
def test_what_it_cost_is_counted_though_the_charge_is_in_doubt(
    own_server: EmbeddedServer, make: Callable[..., Stillroom], arrives: bool
) -> None:
    """A reservation of an outage, whose charge may have come to Redis or not, costs what it was settled at."""
    tokens = Limit("tokens", 1_000, 3_600)
    with Proxy(own_server.port) as proxy:
        room = make(**BRISK, redis_url=proxy.url)
        knock(room, tokens, 1)
        quietly(room)
        own_server.kill()
        more, back = (room.limits.reserve(IP, [tokens], cost=10) for _ in range(2))
        own_server.restart()
        with redis.Redis.from_url(own_server.url) as client:
            client.script_load(limit_charge.text.source)
        proxy.hold_replies() if arrives else proxy.cut()
        assert room.limits.deliver() == 1
        assert (room.limits.settle(more, 70), room.limits.refund(back)) == (None, None)
        proxy.let_go() if arrives else proxy.heal()
        until(lambda: room.limits.deliver() == 0, "the charge")
    assert known(own_server, room, tokens) == 1 + 70


def test_a_refund_whose_reply_is_late_is_not_known(
    brisk: Stillroom, proxy: Proxy, server: EmbeddedServer
) -> None:
    """A refund with a late reply returns None and is repeated by itself."""
    auth = Limit("auth", 5, 3_600)
    held = [brisk.limits.reserve(IP, [auth]) for _ in range(3)]
    proxy.hold_replies()
    assert brisk.limits.refund(held[0]) is None
    assert brisk.limits.commit(held[1]) is None
    proxy.let_go()
    assert brisk.limits.peek(IP, [auth]).remaining == 3
    assert brisk.limits.refund(held[0]) is False
    assert brisk.limits.refund(held[2]) is True
    assert known(server, brisk, auth) == 1


def test_a_reservation_of_an_outage_is_refunded_after_it(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """A reservation of an outage, charged under its own name, is refunded in Redis once, and not after a commit."""
    room = make()
    room.limits.peek(IP, [LOGIN])
    own_server.kill()
    held = [room.limits.reserve(IP, [LOGIN], cost=2) for _ in range(3)]
    assert room.limits.commit(held[2]) is True
    own_server.restart()
    back(room)
    assert room.limits.deliver() == 0
    assert known(own_server, room, LOGIN) == 6
    assert [room.limits.refund(held[0]), room.limits.refund(held[0])] == [True, False]
    assert known(own_server, room, LOGIN) == 4
    assert room.limits.refund(held[2]) is False
    assert room.limits.peek(IP, [LOGIN]).remaining == 6


def test_what_was_given_back_does_not_count_in_the_next_outage(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """Logins that succeed in an outage, and are refunded after it, use nothing up in the next one."""
    room = make()
    room.limits.peek(IP, [LOGIN])
    own_server.kill()
    until(lambda: room.limits.peek(IP, [LOGIN]).degraded == "breaker", "an outage")
    held = [room.limits.reserve(IP, [LOGIN]) for _ in range(10)]
    assert all(held)
    own_server.restart()
    back(room)
    until(lambda: room.limits.deliver() == 0, "the charge")
    assert [room.limits.refund(one) for one in held] == [True] * 10
    own_server.kill()
    until(lambda: room.limits.peek(IP, [LOGIN]).degraded == "breaker", "an outage")
    assert knock(room, LOGIN, 15) == 10


@pytest.mark.parametrize("how", ["a reset", "a server without data"])
def test_what_redis_has_forgotten_is_not_given_back_without_it(
    own_server: EmbeddedServer, make: Callable[..., Stillroom], how: str
) -> None:
    """A refund of a reservation that Redis has forgotten admits nobody in the outage that follows."""
    room = make()
    held = [room.limits.reserve(IP, [LOGIN]) for _ in range(3)]
    if how == "a reset":
        make().limits.reset(IP, [LOGIN])
    else:
        with redis.Redis.from_url(own_server.url) as client:
            client.flushall()
    assert knock(room, LOGIN, 4) == 4
    assert [room.limits.refund(one) for one in held[:2]] == [how == "a reset"] * 2
    own_server.kill()
    assert room.limits.refund(held[2]) is None
    assert knock(room, LOGIN, 10) == 6


def test_a_charge_goes_by_the_longest_window_of_its_name(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """Hits of an outage count in the long window of their name though the short one was used last, and is over."""
    room, short, second = make(), Limit("login", 100, 1), Limit("second", 100, 1)
    room.limits.check("203.0.113.1", [LOGIN])
    own_server.kill()
    assert knock(room, LOGIN, 12) == 10
    assert room.limits.check(IP, [short])
    quietly(room)
    used = room.limits.check(IP, [second]).remaining
    until(lambda: room.limits.peek(IP, [second]).remaining > used, "the end of a second")
    own_server.restart()
    until(lambda: not room.state_wire.breaker.is_open, "recovery")
    assert room.limits.deliver() == 0
    assert room.limits.peek(IP, [short]).remaining == 100
    assert knock(make(), LOGIN, 12) == 0


def test_one_process_waits_for_no_others(
    own_server: EmbeddedServer, make: Callable[..., Stillroom]
) -> None:
    """A process alone asks Redis as soon as it is back; one of several decides by itself for a moment more."""
    alone, several = make(), make(processes=2)
    own_server.kill()
    for room in (alone, several):
        until(lambda room=room: room.limits.check(IP, [LOGIN]).degraded == "breaker", "an outage")
    own_server.restart()
    for room in (alone, several):
        until(lambda room=room: not room.state_wire.breaker.is_open, "recovery")
        until(lambda room=room: not room._limits_body._local.logs, "the charge")
    assert alone.limits.check("203.0.113.8", [LOGIN]).degraded == ""
    assert several.limits.check("203.0.113.8", [LOGIN]).degraded == "settling"
    assert known(own_server, several, LOGIN, "203.0.113.8") == 2  # it is told at once
    several._limits_body._settling.waits[AWAY] -= 60
    assert several.limits.check("203.0.113.8", [LOGIN]).degraded == ""
