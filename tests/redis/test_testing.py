"""An app's tests get a room of their own, inline work and a clock that they move by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import (
    AUTH,
    AsyncStillroom,
    Freshness,
    InvalidArgument,
    Limit,
    SessionEnded,
    SessionStoreUnavailable,
    Settings,
    Stillroom,
)
from stillroom.dispatch import InlineDispatch
from stillroom.embedded import EmbeddedServer
from stillroom.testing import Clock, TestServer, overridden
from tests.support.guide import run_pytest
from tests.support.lag import Stopwatch

APP = """
import pytest
pytest_plugins = ["stillroom.testing"]

@pytest.fixture
def stillroom_options():
    return {"ttl": 7}
"""
TEST = """
import redis

def test_the_price_is_cached(stillroom, stillroom_clock):
    assert stillroom.settings.ttl == 7
    stillroom.cache.set("price", 1)
    stillroom_clock.advance(6)
    assert stillroom.cache.get("price") == 1
    stillroom_clock.advance(2)
    assert stillroom.cache.get("price") is None

def test_another_test_s_cache_is_empty(stillroom):
    assert stillroom.cache.get("price") is None
    stillroom.sessions.create("ann")

def test_nothing_is_left_behind(stillroom_server):
    with redis.Redis.from_url(stillroom_server.url) as client:
        assert client.keys("*") == []
"""


def test_an_app_s_suite_runs_with_one_line_in_its_conftest(tmp_path: Path) -> None:
    """The pytest plugin gives each test of an app an empty room and leaves no keys."""
    (tmp_path / "conftest.py").write_text(APP)
    (tmp_path / "test_app.py").write_text(TEST)
    assert "3 passed" in run_pytest(tmp_path)


def test_servers_of_the_environment_are_not_those_of_a_test(
    tmp_path: Path, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an app's own container its tests use their server, and write nothing into the app's."""
    (tmp_path / "password").write_text("of another server")
    for name, value in {
        "REDIS_URL": "redis+sentinel://one:26379,two:26379/primary",
        "STILLROOM_SENTINEL_USER": "app",
        "STILLROOM_SENTINEL_PASSWORD_FILE": str(tmp_path / "password"),
        "STILLROOM_CACHE_URL": own_server.url,
        "STILLROOM_BROKER_URL": own_server.url,
        "STILLROOM_RESULT_BACKEND": own_server.url,
        "STILLROOM_CLUSTER": "1",
        "STILLROOM_STATE_CLUSTER": "1",
        "STILLROOM_REPLICAS": "1",
        "STILLROOM_CACHE_REPLICAS": "1",
        "REDIS_PASSWORD_FILE": str(tmp_path / "password"),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "conftest.py").write_text(APP)
    (tmp_path / "test_app.py").write_text(TEST)
    assert "3 passed" in run_pytest(tmp_path)
    with redis.Redis.from_url(own_server.url) as client:
        assert client.keys("*") == []


def test_a_stale_value_is_refreshed_by_the_read_that_finds_it(
    stillroom: Stillroom, stillroom_clock: Clock
) -> None:
    """After ttl passed by hand, the read that finds a stale value refreshes it at once, without a worker."""
    loads: list[int] = []

    @stillroom.cache.cached("price:{id}", ttl=60, swr=600, tags=["prices"])
    def price(id: int) -> int:
        loads.append(id)
        return len(loads)

    assert price(7) == 1
    stillroom_clock.advance(59)
    assert price(7) == 1
    stillroom_clock.advance(2)
    assert price(7) == 1  # stale: served, and loaded again
    assert price(7) == 2
    stillroom_clock.advance(661)
    assert price(7) == 3
    entry = stillroom.cache.get_entry("price:7")
    assert entry is not None
    assert entry.freshness is Freshness.FRESH
    stillroom.cache.invalidate_by_tag("prices")
    stillroom_clock.advance(1)
    assert stillroom.cache.get("price:7") is None


def test_orders_are_carried_out_at_once(
    stillroom: Stillroom, async_stillroom: AsyncStillroom
) -> None:
    """What an app orders from workers is done when the call returns: invalidations, loads and warm-ups."""
    loads: list[int] = []

    @stillroom.cache.cached("price:{id}", tags=["prices"], warm_every=60, warm_with=[1, 2])
    def price(id: int) -> int:
        loads.append(id)
        stillroom.tasks.load(price, id)  # which a load must not wait for
        return len(loads)

    stillroom.cache.set_many({"a": 1, "b": 1, "c:1": 1}, tags=["letters"])
    stillroom.tasks.invalidate_keys("a")
    assert stillroom.cache.get_many(["a", "b"]) == {"b": 1}
    stillroom.tasks.invalidate_pattern("c:*")
    assert stillroom.cache.get("c:1") is None
    stillroom.tasks.invalidate_tags("letters")
    assert stillroom.cache.get("b") is None
    stillroom.tasks.load(price, 7)
    assert stillroom.cache.get("price:7") == 1
    stillroom.upkeep.warm()
    assert {1, 2} <= {*loads}

    async def order() -> object:
        async with async_stillroom as room:
            await room.cache.set("d", 1)
            await room.tasks.invalidate_keys("d")
            return await room.cache.get("d")

    assert asyncio.run(order()) is None


def test_an_order_that_fails_is_not_the_callers_error(stillroom: Stillroom) -> None:
    """An order whose loader fails is tried again, as in a worker: its caller hears nothing of it."""

    @stillroom.cache.cached("broken")
    def broken() -> int:
        raise ZeroDivisionError

    stillroom.tasks.load(broken)
    assert stillroom.upkeep.reclaim()["left"] == 1


@pytest.mark.parametrize("options", [{}, {"memo": True}, {"near": True}, {"near": 60}], ids=str)
@pytest.mark.parametrize("is_in_request", [True, False])
def test_what_this_process_keeps_gets_older_too(
    stillroom: Stillroom, stillroom_clock: Clock, options: dict[str, Any], is_in_request: bool
) -> None:
    """What a request remembers and what the process keeps near end with the moved clock, as the entries do."""
    loads: list[int] = []

    @stillroom.cache.cached("price:{id}", ttl=60, swr=0, **options)
    def price(id: int) -> int:
        loads.append(id)
        return len(loads)

    with stillroom.request() if is_in_request else nullcontext():
        for after in (1, 2, 3):
            assert [price(7), price(7), *price.many([7])] == [after] * 3
            assert stillroom.cache.get("price:7", int, near=True) == after
            stillroom_clock.advance(61)
            assert stillroom.cache.get("price:7", int, near=True) is None


def test_a_failed_refresh_backs_off_and_comes_again(
    stillroom: Stillroom, stillroom_clock: Clock
) -> None:
    """A failed refresh is tried again after its backoff has passed by hand."""
    calls: list[bool] = []

    @stillroom.cache.cached("k", ttl=60, swr=6_000)
    def load() -> int:
        calls.append(True)
        if len(calls) == 2:
            raise ZeroDivisionError
        return len(calls)

    load()
    stillroom_clock.advance(61)
    load()
    load()
    assert len(calls) == 2
    stillroom_clock.advance(5)
    load()
    assert load() == 3


def test_sessions_idle_away(stillroom: Stillroom, stillroom_clock: Clock) -> None:
    """A session lives within its idle time, and has ended a day later and after a week in any case."""
    session = stillroom.sessions.create("ann")
    for _ in range(6):
        stillroom_clock.advance(86_000)
        assert stillroom.sessions.get(session) is not None
    stillroom_clock.advance(86_000)
    stillroom_clock.advance(3_000)
    assert stillroom.sessions.get(session) is None
    idle = stillroom.sessions.create("ann")
    rotated = stillroom.sessions.rotate(idle, grace=10)
    assert stillroom.sessions.get(idle) is not None
    stillroom_clock.advance(11)
    with pytest.raises(SessionEnded, match="replayed"):
        stillroom.sessions.update(idle, {"a": 1})
    stillroom_clock.advance(86_401)
    assert stillroom.sessions.get(rotated) is None
    assert stillroom.sessions.count("ann") == 0
    stillroom.sessions.sweep()
    assert stillroom.sessions.count() == 0


def test_quotas_come_back(stillroom: Stillroom, stillroom_clock: Clock) -> None:
    """A denied client is admitted once the time has passed, also where the denial was remembered."""
    client = "192.0.2.1"
    decisions = [stillroom.limits.check(client, [AUTH]).allowed for _ in range(7)]
    assert decisions == [True] * 5 + [False] * 2
    stillroom_clock.advance(299)
    assert not stillroom.limits.check(client, [AUTH])
    stillroom_clock.advance(2)
    assert stillroom.limits.check(client, [AUTH])


def test_a_confirmed_session_gets_old(stillroom: Stillroom, stillroom_clock: Clock) -> None:
    """A session that was confirmed stops being fresh when the time for that has passed, as one that has begun."""
    begun = stillroom.sessions.create("ann")
    stillroom_clock.advance(61)
    assert not stillroom.sessions.get(begun).is_fresh(60)
    confirmed = stillroom.sessions.confirm(begun)
    assert confirmed.is_fresh(60)
    stillroom_clock.advance(59)
    assert stillroom.sessions.get(confirmed).is_fresh(60)
    stillroom_clock.advance(2)
    assert not stillroom.sessions.get(confirmed).is_fresh(60)


def test_changes_of_limits_end(stillroom: Stillroom, stillroom_clock: Clock) -> None:
    """A change of a limit ends when its time has passed, and one that was made for longer goes on."""
    login, search = Limit("login", 1, 300), Limit("search", 1, 300)
    stillroom.limits.change("login", 5, 300, 60)
    stillroom.limits.change("search", 7, 300, 600)

    def quotas() -> list[int]:
        return [one.quota for one in stillroom.limits.check("192.0.2.1", [login, search]).limits]

    quotas()  # a check has the changes read, and the next one applies them
    assert quotas() == [5, 7]
    for _ in range(10):
        stillroom_clock.advance(5.8)
    assert quotas() == [5, 7]
    stillroom_clock.advance(3)
    assert quotas() == [1, 7]
    assert [one.name for one in stillroom.limits.changes()] == ["search"]
    stillroom_clock.advance(540)
    assert quotas() == [1, 1]
    assert stillroom.limits.changes() == []


RULES = """
[rules.cards]
kinds = ["card_declined"]
group_by = "ip"
threshold = 3
window = 600
action = "ban"
ban = 300
shadow = false

[rules.minutes]
kinds = ["card_tried"]
group_by = "ip"
consecutive = true
threshold = 3
window = 60
"""
CLIENT = "203.0.113.7"


@pytest.fixture
def ruled(stillroom_settings: Settings, tmp_path: Path) -> Iterator[Stillroom]:
    """Yield a room with rules of abuse, in the same namespace."""
    (tmp_path / "rules.toml").write_text(RULES)
    changed = stillroom_settings.model_copy(
        update={"abuse_rules": tmp_path / "rules.toml", "ban_cap": 2}
    )
    with Stillroom(changed, dispatch=InlineDispatch()) as room:
        yield room


def reported(room: Stillroom, kind: str, times: int = 1, client: str = CLIENT) -> int:
    """Report so many events, and return how many patterns they completed."""
    for _ in range(times):
        assert room.abuse.report(kind, ip=client)
    return room.upkeep.scan_abuse()["patterns"]


def test_what_a_rule_has_counted_gets_old(ruled: Stillroom, stillroom_clock: Clock) -> None:
    """Events leave a rule's window, a pattern is told again in the next one, and peace after a lift ends."""
    for seconds in (400, 201, 1):
        assert reported(ruled, "card_declined") == 0, "three, and the first of them too long ago"
        stillroom_clock.advance(seconds)
    assert reported(ruled, "card_declined") == 1
    ruled.abuse.lift(CLIENT)
    stillroom_clock.advance(599)
    assert reported(ruled, "card_declined", 3) == 0, "it was told less than ten minutes ago"
    stillroom_clock.advance(602)
    assert reported(ruled, "card_declined", 3) == 1
    assert [ban.subject for ban in ruled.abuse.bans()] == [CLIENT]


def test_bans_of_a_minute_ago_are_not_in_the_cap(ruled: Stillroom, stillroom_clock: Clock) -> None:
    """A rule bans again when the bans of the last minute are fewer than the cap."""
    for client, seconds in (("203.0.113.1", 40), ("203.0.113.2", 21), ("203.0.113.3", 1)):
        assert reported(ruled, "card_declined", 3, client) == 1
        stillroom_clock.advance(seconds)
    assert reported(ruled, "card_declined", 3) == 1
    banned = {ban.subject for ban in ruled.abuse.bans()}
    assert banned == {f"203.0.113.{n}" for n in (1, 2, 3)}, "two in the last minute"


def test_windows_in_a_row_are_those_of_the_clock(ruled: Stillroom, stillroom_clock: Clock) -> None:
    """A rule that counts windows in a row finds an event in each of them, and none where some lie between."""
    assert reported(ruled, "card_tried", 3) == 0
    for _ in range(3):
        stillroom_clock.advance(300)
        assert reported(ruled, "card_tried") == 0
    assert [reported(ruled, "card_tried") for _ in range(2) if not stillroom_clock.advance(60)] == [
        0,
        1,
    ]


def test_bans_are_served(stillroom: Stillroom, stillroom_clock: Clock) -> None:
    """What is left of a ban gets less, of a network as well, and it ends when it is over."""
    for subject in (CLIENT, "198.51.100.0/24"):
        stillroom.abuse.ban(subject, 600)
    stillroom_clock.advance(400)
    left = [ban.until - time.time() for ban in stillroom.abuse.bans()]
    assert left == [pytest.approx(200, abs=20)] * 2
    for address in (CLIENT, "198.51.100.7"):
        denied = stillroom.limits.check(address, [AUTH])
        assert denied.banned
        assert denied.retry_after == pytest.approx(200, abs=20)
    stillroom.abuse.ban("203.0.113.8", 300)
    assert stillroom.abuse.bans(1)[0].subject == "203.0.113.8", "it ends last"
    stillroom_clock.advance(201)
    assert [ban.subject for ban in stillroom.abuse.bans()] == ["203.0.113.8"]
    assert all(stillroom.limits.check(one, [AUTH]) for one in (CLIENT, "198.51.100.7"))


def test_a_ban_that_was_served_is_over_while_the_server_is_away_too(
    stillroom: Stillroom, stillroom_clock: Clock, stillroom_server: TestServer
) -> None:
    """A ban that this process remembers ends when the clock has moved past it, also while the server is frozen."""
    for subject, seconds in ((CLIENT, 600), ("203.0.113.8", 6_000)):
        stillroom.abuse.ban(subject, seconds)
        assert stillroom.limits.check(subject, [AUTH]).banned
    stillroom_clock.advance(601)
    stillroom_server.freeze()
    assert stillroom.limits.check(CLIENT, [AUTH])
    assert stillroom.limits.check("203.0.113.8", [AUTH]).banned


def test_devices_are_forgotten_and_warm_ups_are_due(
    stillroom: Stillroom, stillroom_clock: Clock
) -> None:
    """A device is new when nobody has used it for too long, and a warm-up is due again in the next period."""
    told = []
    stillroom.sessions.on_event.append(told.append)
    stillroom.cache.cached("hot:{n}", name="hot", warm_every=300, warm_with=[1, 2])(lambda n: n)
    half = stillroom.settings.session_device_memory / 2
    for device in ("phone", "laptop"):
        stillroom.sessions.create("ann", device=device)
    for _ in range(3):
        assert stillroom.upkeep.warm() == {"loaders": 1, "values": 2}
        assert stillroom.upkeep.warm() == {"loaders": 0, "values": 0}
        stillroom_clock.advance(301)
    for _ in range(3):
        stillroom.sessions.create("ann", device="laptop")
        stillroom_clock.advance(half)
    stillroom.sessions.create("ann", device="phone")
    assert [event.kind for event in told] == ["new_device"] * 2


def test_a_lift_and_a_pause_end(stillroom: Stillroom, stillroom_clock: Clock) -> None:
    """Ten minutes after a lift a subject may be banned again, and a pause of refreshes ends when it is over."""
    stillroom.abuse.ban("192.0.2.1", 60)
    stillroom.abuse.lift("192.0.2.1")
    stillroom.upkeep.pause("refresh", 300)
    assert stillroom.upkeep.refreshes_are_paused()
    stillroom_clock.advance(301)
    assert not stillroom.upkeep.refreshes_are_paused()
    with redis.Redis.from_url(stillroom.settings.redis_url) as client:
        lifted = int(client.get(stillroom.keys.ban_lifted("192.0.2.1")) or 0)
        assert client.time()[0] - lifted / 1_000 == pytest.approx(301, abs=5)


@pytest.mark.parametrize("wrong", [None, "shop.room", Settings()])
def test_a_clock_is_a_rooms(wrong: Any) -> None:
    """A clock of what is no room is refused where it is made."""
    with pytest.raises(InvalidArgument, match="a Stillroom or AsyncStillroom"):
        Clock(wrong)


def test_both_rooms_share_the_namespace(
    stillroom: Stillroom, async_stillroom: AsyncStillroom
) -> None:
    """The sync and the async room share a namespace, so that a test reads an async app with blocking calls."""

    async def app() -> None:
        async with async_stillroom as room:
            await room.cache.set("k", 1)

    asyncio.run(app())
    assert stillroom.cache.get("k") == 1


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_clock_is_not_moved_back(stillroom_clock: Clock, seconds: float) -> None:
    """Moving the clock back raises an error with the given value."""
    with pytest.raises(ValueError, match="a clock is moved forward"):
        stillroom_clock.advance(seconds)


# An app's own room

APP_SETTINGS: dict[str, Any] = {"redis_url": "redis://127.0.0.1:1", "session_peppers": "p" * 40}


@pytest.mark.parametrize("shards", [1, 4])
def test_an_app_s_room_works_on_the_test_s_server(
    stillroom: Stillroom, stillroom_settings: Settings, stillroom_clock: Clock, shards: int
) -> None:
    """Every part of an app's room works on the test's server during an override and on its own afterwards."""
    room = Stillroom(Settings(**APP_SETTINGS, shards=shards, away_ttl=0))
    loads: list[int] = []
    replayed: list[Any] = []
    room.sessions.on_event.append(replayed.append)

    @room.cache.cached("price:{id}", ttl=60, swr=60)
    def price(id: int) -> int:
        loads.append(id)
        return len(loads)

    cache, limits, sessions = room.cache, room.limits, room.sessions
    assert [price(7), price(7)] == [1, 2]  # Redis is away
    for first in (3, 6):
        with overridden(room, stillroom_settings) as same:
            assert same is room
            assert [price(7), price(7)] == [first, first]
            stillroom_clock.advance(61)
            assert [price(7), price(7)] == [first, first + 1]
            cache.set("k", first)
            assert stillroom.cache.get("k") == room.cache.get("k") == first
            session = sessions.create("ann")
            assert stillroom.sessions.get(session.token) is not None
            assert [bool(limits.check("192.0.2.1", [AUTH])) for _ in range(6)] == [True] * 5 + [
                False
            ]
            stillroom_clock.advance(301)
            sessions.rotate(session, grace=0)
            assert sessions.get(session.token) is None
            assert [event.kind for event in replayed][-1] == "replayed"
            assert room.settings.namespace == stillroom_settings.namespace
            stillroom.cache.clear()
            stillroom_clock.advance(400)
        assert price(7) == first + 2
        assert cache.get("k") is None
        assert room.settings.redis_url == "redis://127.0.0.1:1"
    room.close()


@pytest.mark.parametrize("kind", [Stillroom, AsyncStillroom])
def test_who_listens_to_an_app_s_room_hears_of_the_test_s_calls(
    stillroom_settings: Settings, kind: Any
) -> None:
    """A hook of a room is told of its calls before, during and after an override."""
    room = kind(Settings(**APP_SETTINGS))
    heard: list[str] = []
    room.on_event(lambda event: heard.append(f"{event.operation} {event.outcome}"))

    def get() -> list[str]:
        heard.clear()
        found = room.cache.get("k")
        if asyncio.iscoroutine(found):
            asyncio.run(found)
        return heard[:1]

    before = get()
    for _ in range(2):
        with overridden(room, stillroom_settings):
            assert get() == ["get miss"]
    assert get() == before


def test_parts_that_are_taken_during_an_override_are_led_back_too(
    stillroom_settings: Settings,
) -> None:
    """A part that was taken during an override works on the app's own server afterwards."""
    room = Stillroom(Settings(**APP_SETTINGS))
    taken: list[Any] = []
    for _ in range(2):
        with overridden(room, stillroom_settings):
            taken.append((room.cache, room._limits_body, room.state, room.wire))
    assert taken[0] == taken[1] == (room.cache, room._limits_body, room.state, room.wire)
    room.close()


def test_a_room_is_led_back_also_where_the_test_s_room_can_t_be_closed(
    stillroom_settings: Settings,
) -> None:
    """An app's room is on its own server again after a test whose room could not be closed."""

    class Unclosable(InlineDispatch):
        def close(self) -> None:
            raise OSError("it can't be closed")

    room = Stillroom(redis_url="redis://127.0.0.1:1")
    with pytest.raises(OSError, match="it can't be closed"):
        with overridden(room, stillroom_settings, dispatch=Unclosable()):
            assert room.cache.set("price", 1)
    assert room.settings.redis_url == "redis://127.0.0.1:1"


@pytest.mark.parametrize("wrong", [None, {"namespace": "test"}, "redis://127.0.0.1:1"])
def test_a_room_is_overridden_by_settings_alone(wrong: Any) -> None:
    """What are no settings is refused: without any, a test would work on the servers that the environment names."""
    room = Stillroom(Settings(**APP_SETTINGS))
    with pytest.raises(InvalidArgument, match="settings="), overridden(room, wrong):
        pass


def test_an_async_app_s_room_works_on_the_test_s_server(
    stillroom: Stillroom, stillroom_override: Any, stillroom_clock: Clock
) -> None:
    """An async app's room works on the test's server, also in event loops that begin and end within the test."""
    room = AsyncStillroom(Settings(**APP_SETTINGS))

    @room.cache.cached("price:{id}", ttl=60)
    async def price(id: int) -> int:
        return id

    assert stillroom_override(room) is room

    async def app(quota: int) -> None:
        async with room:
            assert await price(7) == 7
            decisions = [bool(await room.limits.check("192.0.2.1", [AUTH])) for _ in range(6)]
            assert decisions == [True] * quota + [False] * (6 - quota)

    asyncio.run(app(5))
    assert stillroom.cache.get("price:7") == 7
    asyncio.run(app(0))
    stillroom_clock.advance(301)
    assert stillroom.cache.get("price:7") is None
    asyncio.run(app(5))


def test_a_frozen_server_is_given_up_as_fast_as_in_production(
    stillroom: Stillroom,
    async_stillroom: AsyncStillroom,
    stillroom_server: TestServer,
    stillroom_override: Any,
) -> None:
    """Four calls to a frozen server end within a second; the generous deadlines are for one that answers."""
    stillroom.cache.set("k", 1)
    app = stillroom_override(Stillroom(Settings(**APP_SETTINGS)))
    app.cache.set("k", 1)

    async def read() -> None:
        async with async_stillroom as room:
            await room.cache.set("k", 1)
            stillroom_server.freeze()
            with awaited:
                assert await room.cache.get("k") is None

    awaited, called = Stopwatch(), Stopwatch()
    asyncio.run(read())  # closing the room asks the server as well: no call of the app's
    with called:
        assert stillroom.cache.get("k") is None
        assert app.cache.get_or_set("k", lambda: 2) == 2
        with pytest.raises(SessionStoreUnavailable):
            stillroom.sessions.create("ann")
    assert awaited.seconds + called.seconds < 1
    stillroom_server.thaw()
    assert stillroom.cache.get("k") in (None, 1)  # the breaker may take a moment


def test_a_server_that_a_test_left_frozen_or_dead_is_there_for_the_next(tmp_path: Path) -> None:
    """A server that a test left frozen or dead serves the next test."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["stillroom.testing"]\n')
    (tmp_path / "test_app.py").write_text(
        "def test_a(stillroom, stillroom_server): stillroom_server.freeze()\n"
        "def test_b(stillroom, stillroom_server):\n"
        "    assert stillroom.cache.set('k', 1)\n"
        "    stillroom_server.kill()\n"
        "def test_c(stillroom): assert stillroom.cache.set('k', 1)\n"
    )
    assert "3 passed" in run_pytest(tmp_path)


def test_a_test_in_a_fork_uses_the_server_that_was_there_before(tmp_path: Path) -> None:
    """A test that runs in a fork, as with pytest-forked, uses the server of the tests before it and leaves it."""
    (tmp_path / "conftest.py").write_text(
        "import os\n"
        "from _pytest.runner import runtestprotocol\n"
        "pytest_plugins = ['stillroom.testing']\n"
        "def pytest_runtest_protocol(item):\n"
        "    if item.name != 'test_b':\n"
        "        return None\n"
        "    fork = os.fork()\n"
        "    if not fork:\n"
        "        reports = runtestprotocol(item, nextitem=None, log=False)\n"
        "        os._exit(any(report.failed for report in reports))\n"
        "    assert os.waitpid(fork, 0)[1] == 0\n"
        "    return True\n"
    )
    test = "def test_{}(stillroom): assert stillroom.cache.set('k', 1)\n"
    (tmp_path / "test_app.py").write_text("".join(map(test.format, "abc")))
    assert "2 passed" in run_pytest(tmp_path)
