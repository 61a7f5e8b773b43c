"""Measures what each call answers while Redis is away, and how long that takes.

A server is killed, or frozen; then it is back. The table has, for each call, the longest time until the breaker
opens and the median after that. Then twenty threads ask for one value that takes 50 ms to load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from bench.report import Promise, Section, Table
from bench.stage import Effort
from stillroom import (
    API,
    AUTH,
    STATIC,
    NoDispatch,
    RedisUnavailable,
    SessionStoreUnavailable,
    Settings,
    Stillroom,
)
from stillroom.embedded import EmbeddedServer

CALL_MS = 150.0
OPEN_US = 300.0
HEALTH, HEALTH_US = "health.check", 1_000.0  # no call of a request, and it looks at the machine
RECOVERY_S = 1.5
LOADS = 5  # of a hot key, in three seconds
LOAD_S = 0.05
CALLERS = 20
FAULTS = {
    "killed": (EmbeddedServer.kill, EmbeddedServer.restart),
    "frozen": (EmbeddedServer.freeze, EmbeddedServer.thaw),
}


class Answer(NamedTuple):
    """Holds what a call answered, and how long it took, in ms."""

    words: str
    took: float


def run(effort: Effort) -> Section:
    times = effort.pick(smoke=20, quick=200, usual=1_000, full=5_000)
    away_s = effort.pick(smoke=0.3, quick=3.0, usual=3.0, full=10.0)
    table = Table(["Redis is", "call", "answers", "until the breaker opens", "after that"], left=3)
    longest: list[float] = []
    usual: dict[str, float] = {}
    recoveries: list[float] = []
    for fault in FAULTS:
        for name in CALLS:
            before, after, recovery = measured(fault, name, times)
            longest.append(max(one.took for one in before))
            took_us = median(one.took for one in after) * 1000
            usual[name] = max(took_us, usual.get(name, 0.0))
            recoveries.append(recovery)
            first, then = f"≤ {longest[-1]:.0f} ms", f"{took_us:.0f} µs"
            table.add(fault, name, after[-1].words, first, then)
    health = usual.pop(HEALTH)
    loads, calls, p99 = herd(away_s)
    per_three = loads * 3.0 / away_s if away_s > 3 else loads
    return Section(
        name="away",
        title="When Redis is away",
        tables=[table],
        promises=[
            Promise("the longest call, ms", max(longest), CALL_MS * 1.2, by="wall"),
            Promise(
                "a call of a request while the breaker is open, µs",
                max(usual.values()),
                OPEN_US,
                by="wall, median",
            ),
            Promise(f"{HEALTH} then, µs", health, HEALTH_US, by="wall, median"),
            Promise("recovery, s", max(recoveries), RECOVERY_S, by="wall"),
            Promise("loads of a hot key in 3 s", per_three, LOADS, by="count"),
        ],
        notes=[
            f"a hot key, {CALLERS} threads, {away_s:g} s: {calls:,} calls, {loads} loads, p99 {p99:.2f} ms",
        ],
    )


def measured(fault: str, name: str, times: int) -> tuple[list[Answer], list[Answer], float]:
    """Return (answers until the breaker opened, answers after that, seconds until Redis was used again)."""
    begin, end = FAULTS[fault]
    call = CALLS[name]
    with EmbeddedServer() as server:
        settings = Settings(redis_url=server.url, session_peppers="p" * 32)
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            call(room)
            begin(server)
            before = [timed(room, call)]
            while not room.wire.breaker.is_open:
                before.append(timed(room, call))
            after = [timed(room, call) for _ in range(times)]
            end(server)
            back = time.monotonic()
            while room.wire.breaker.is_open and time.monotonic() < back + 10:
                time.sleep(0.005)
            return before, after, time.monotonic() - back


def timed(room: Stillroom, call: Callable[[Stillroom], Any]) -> Answer:
    began = time.perf_counter()
    words = call(room)
    return Answer(words, (time.perf_counter() - began) * 1000)


def said(act: Callable[[], object]) -> str:
    """Return the answer of a call in a word or two."""
    try:
        return f"{act()!r:.24}"
    except SessionStoreUnavailable:
        return "SessionStoreUnavailable"
    except RedisUnavailable:
        return "RedisUnavailable"


def admits(decision: Any) -> str:
    return f"{'admits' if decision else 'denies'}{' alone' if decision.degraded else ''}"


CALLS: dict[str, Callable[[Stillroom], str]] = {
    "cache.get": lambda room: said(lambda: room.cache.get("k", default="default")),
    "cache.get_or_set": lambda room: said(lambda: room.cache.get_or_set("k", lambda: "loaded")),
    "cache.set": lambda room: said(lambda: room.cache.set("k", 1)),
    "cache.invalidate": lambda room: said(lambda: room.cache.invalidate("k")),
    "… defer=True": lambda room: said(lambda: room.cache.invalidate("k", defer=True)),
    "cache.invalidate_by_tag": lambda room: said(lambda: room.cache.invalidate_by_tag("t")),
    "sessions.create": lambda room: said(lambda: room.sessions.create("u1") and "made"),
    "limits.check STATIC": lambda room: admits(room.limits.check("192.0.2.1", [STATIC])),
    "limits.check API": lambda room: admits(room.limits.check("192.0.2.1", [API])),
    "limits.check AUTH": lambda room: admits(room.limits.check("192.0.2.1", [AUTH])),
    HEALTH: lambda room: str(room.health.check().status),
}


def herd(seconds: float) -> tuple[int, int, float]:
    """Return (loads, calls, p99 in ms) of a hot key, while a server is frozen."""
    took: list[float] = []
    loads: list[None] = []

    def load() -> int:
        loads.append(None)
        time.sleep(LOAD_S)
        return 1

    with EmbeddedServer() as server:
        with Stillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:
            room.cache.get("k")
            server.freeze()
            ends = time.monotonic() + seconds

            def ask() -> None:
                while (began := time.monotonic()) < ends:
                    room.cache.get_or_set("k", load)
                    took.append(time.monotonic() - began)

            threads = [threading.Thread(target=ask) for _ in range(CALLERS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            server.thaw()
    return len(loads), len(took), sorted(took)[len(took) * 99 // 100] * 1000
