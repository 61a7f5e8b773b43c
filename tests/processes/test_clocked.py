"""The server for tests of time has a clock that moves."""

from __future__ import annotations

import time

import redis
from tests.support.clocked import ClockedServer


def test_the_clock_of_a_running_server_moves_both_ways() -> None:
    """A moved clock is what TIME, scripts and stream ids say, as soon as set_clock returns."""
    with ClockedServer() as server, redis.Redis.from_url(server.url) as client:
        for seconds in (3_600, -3_600, 0):
            server.set_clock(seconds)
            there = time.time() + seconds
            assert abs(client.time()[0] - there) < 5
            assert abs(int(client.eval("return redis.call('TIME')[1]", 0)) - there) < 5
            client.delete("s")
            entry = client.xadd("s", {"a": "b"})
            assert abs(int(entry.split(b"-")[0]) / 1000 - there) < 5
