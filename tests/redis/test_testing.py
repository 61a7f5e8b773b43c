"""What an app gets for its own tests: a room of its own, inline work, and a clock moved by hand."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom import AUTH, AsyncStillroom, Freshness, SessionEnded, Stillroom
from stillroom.testing import Clock

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
    """As a plugin, in a pytest of its own; no test sees another's keys, and none are left."""
    (tmp_path / "conftest.py").write_text(APP)
    (tmp_path / "test_app.py").write_text(TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:valkey",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_a_stale_value_is_refreshed_by_the_read_that_finds_it(
    stillroom: Stillroom, stillroom_clock: Clock
) -> None:
    """ttl and swr pass by hand; what a worker would do is done at once."""
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


def test_a_failed_refresh_backs_off_and_comes_again(
    stillroom: Stillroom, stillroom_clock: Clock
) -> None:
    """The backoff passes by hand, too."""
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
    """Seen within the day they live, a day later they have ended, a week later in any case."""
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
    """Denied, also from memory, until the time has passed."""
    client = "192.0.2.1"
    decisions = [stillroom.limits.check(client, [AUTH]).allowed for _ in range(7)]
    assert decisions == [True] * 5 + [False] * 2
    stillroom_clock.advance(299)
    assert not stillroom.limits.check(client, [AUTH])
    stillroom_clock.advance(2)
    assert stillroom.limits.check(client, [AUTH])


def test_both_rooms_share_the_namespace(
    stillroom: Stillroom, async_stillroom: AsyncStillroom
) -> None:
    """An async app is looked at with blocking calls."""

    async def app() -> None:
        async with async_stillroom as room:
            await room.cache.set("k", 1)

    asyncio.run(app())
    assert stillroom.cache.get("k") == 1


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_clock_is_not_moved_back(stillroom_clock: Clock, seconds: float) -> None:
    """It says what it was given."""
    with pytest.raises(ValueError, match="a clock is moved forward"):
        stillroom_clock.advance(seconds)
