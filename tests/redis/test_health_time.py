"""A step of the server's clock ends within one snapshot, and no worker's clock decides anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

import redis
from stillroom import NoDispatch, Settings, Stillroom
from stillroom.leash import until
from tests.conftest import SERVERS, binary_of
from tests.support.clocked import ClockedServer, misjudge
from tests.support.crowd import PATIENT

DAY = 86_400


@pytest.fixture(params=SERVERS)
def clocked(request: pytest.FixtureRequest) -> Iterator[ClockedServer]:
    binary_of(request)
    with ClockedServer("redis-server" if request.param == "redis" else None) as server:
        yield server


@pytest.fixture
def db(clocked: ClockedServer) -> Iterator[Any]:
    with redis.Redis.from_url(clocked.url) as client:
        yield client


@pytest.fixture
def room(clocked: ClockedServer, calm_machine: None) -> Iterator[Stillroom]:
    given = Settings(**{**PATIENT, "redis_url": clocked.url})
    with Stillroom(given, dispatch=NoDispatch()) as room:
        yield room


@pytest.mark.parametrize("ahead", [3_600, DAY, 7 * DAY])
@pytest.mark.parametrize("minutes", [1, 7])
def test_snapshots_go_on_after_the_clock_stood_ahead(
    clocked: ClockedServer, db: Any, room: Stillroom, ahead: int, minutes: int
) -> None:
    """After the clock stood ahead future snapshots are dropped and one a minute is kept, with all earlier ones."""
    for n in range(6):
        clocked.set_clock(n * 60)
        assert room.health.snapshot().error is None
    for n in range(minutes):
        clocked.set_clock(ahead + n * 60)
        room.health.snapshot()
    for n in range(6, 17):
        clocked.set_clock(n * 60)
        assert room.health.snapshot().error is None
    ids = [name for name, _ in db.xrange(room.keys.health)]
    assert len(ids) == 17
    assert ids == sorted(ids, key=lambda name: int(name.partition(b"-")[0]))
    assert 3 <= db.xlen(room.keys.health_week) <= 5
    assert len(room.health.history(1)) == 17


def test_a_small_step_back_keeps_the_minute_it_has(
    clocked: ClockedServer, db: Any, room: Stillroom
) -> None:
    """No snapshot is lost when the clock steps back half a minute."""
    for seconds in (0, 60, 120, 90, 95, 180):
        clocked.set_clock(seconds)
        room.health.snapshot()
    assert db.xlen(room.keys.health) == 4


def test_snapshots_of_a_minute_that_came_twice_expire(
    clocked: ClockedServer, db: Any, room: Stillroom
) -> None:
    """After the clock stood ahead for some seconds the snapshots that are left still expire."""
    for seconds in (0, 3_600, 0):
        clocked.set_clock(seconds)
        room.health.snapshot()
    assert db.ttl(room.keys.health) > 0


def test_workers_whose_clocks_differ_draw_one_history(
    clocked: ClockedServer, room: Stillroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots of workers on machines whose clocks differ by an hour follow each other as they were taken."""
    right = time.time
    for n in range(4):
        clocked.set_clock(n * 60)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda n=n: right() + 3_600 * (n % 2))
            assert room.health.snapshot().time == pytest.approx(right() + n * 60, abs=2)
    times = [one.time for one in room.health.history(1)]
    assert [round(b - a) for a, b in pairwise(times)] == [60, 60, 60]


def test_a_finding_that_began_in_the_future_began_now(
    clocked: ClockedServer, db: Any, room: Stillroom, caplog: Any
) -> None:
    """A finding that began in the future is logged once.

    Its age counts from the step, and its end says how long.
    """
    letters = room.keys.dead_letters
    clocked.set_clock(DAY)
    db.xadd(letters, {"kind": "x", "body": "x"})
    room.health.snapshot()
    (name,) = db.hkeys(room.keys.health_open)
    clocked.set_clock(0)
    room.health.snapshot()
    seconds, _ = db.time()
    assert int(db.hget(room.keys.health_open, name)) / 1_000 == pytest.approx(seconds, abs=5)
    clocked.set_clock(600)
    db.delete(letters)
    room.health.snapshot()
    said = [r.getMessage() for r in caplog.records if name.decode() in r.getMessage()]
    assert len(said) == 2
    assert said[1].endswith("over after 10 min")


def test_signs_of_life_are_of_the_server_s_clock(
    clocked: ClockedServer, db: Any, room: Stillroom
) -> None:
    """A worker's sign of life has the server's time, and one from before a clock step expires."""
    clocked.set_clock(7_200)
    room.health.seen("one")
    room.health.ticked("stillroom.snapshot_health")
    clocked.set_clock(0)
    misjudge(room.state_wire.server, 7_200)
    room.health.seen("two")
    room.health.ticked("a task")
    seconds, _ = db.time()
    assert db.zrange(room.keys.workers, 0, -1) == [b"two"]
    assert db.zscore(room.keys.workers, "two") / 1_000 == pytest.approx(seconds, abs=5)
    assert int(db.hget(room.keys.ticks, "a task")) / 1_000 == pytest.approx(seconds, abs=5)
    given = Settings(**{**PATIENT, "redis_url": clocked.url})
    with Stillroom(given, dispatch=NoDispatch()) as other:
        tasks = other.health.check().tasks
    assert tasks is not None
    assert (tasks.workers, tasks.beat_s) == (1, None)
    assert tasks.ticks is not None
    assert tasks.ticks["a task"] < 5


@pytest.mark.parametrize("seconds", [3_600, -3_600])
def test_a_refresh_that_was_just_ordered_has_not_waited_for_an_hour(
    clocked: ClockedServer, calm_machine: None, seconds: int
) -> None:
    """How long a refresh has waited is told by Redis' clock, whatever clock the machine has that ordered it."""
    clocked.set_clock(seconds)
    given = Settings(**{**PATIENT, "redis_url": clocked.url})
    with Stillroom(given) as app:

        @app.cache.cached("p:{id}", ttl=60, swr=600, tags=["t"])
        def load(id: int) -> int:
            return id

        load(7)
        app.cache.invalidate_by_tag("t", soft=True)
        load(7)
        assert until(lambda: _refreshes(app).depth == 1, 10.0)
        assert _refreshes(app).oldest_s == pytest.approx(0, abs=30)


def _refreshes(app: Stillroom) -> Any:
    tasks = app.health.check().tasks
    assert tasks is not None
    return next(queue for queue in tasks.queues or () if queue.name.endswith("refresh"))


def test_what_was_counted_ahead_is_told_once(clocked: ClockedServer, room: Stillroom) -> None:
    """Counts of minutes before the clock was set back are not told again when these minutes come."""

    def degraded() -> int | None:
        room.health.check()  # from now on this process knows the server's clock
        limits = room.health.check().limits
        return limits and limits.degraded

    clocked.set_clock(600)
    room.health.check()
    room.state_stats.counts["limit_degraded"] += 500
    room.state_stats.due = 0.0
    room.health.check()
    clocked.set_clock(660)
    assert degraded() == 500
    clocked.set_clock(0)
    room.health.check()
    room.health.snapshot()
    for seconds in (600, 660, 720):
        clocked.set_clock(seconds)
        assert degraded() == 0


def test_a_schedule_that_stopped_days_ago_is_a_finding(
    clocked: ClockedServer, room: Stillroom
) -> None:
    """A schedule that has stopped is a failure for as long as it stands still, also after a weekend."""
    room.health.ticked("stillroom.snapshot_health")
    for days in (1.1, 3, 20):
        clocked.set_clock(days * DAY)
        room.health.check()  # from now on this process knows the server's clock
        found = {one.code: one.severity for one in room.health.check().advice}
        assert found.get("beat") == "fail"
