"""Measures what our commands cost the server beside plain ones, as the server counts the time in a command."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from bench.limits import IP, LIMITS
from bench.report import Promise, Section, Table
from bench.sessions import DATA
from bench.stage import Effort, Stage, stage
from tests.support.monitor import sent

SESSION_US, CHECK_US = 5.0, 12.0  # at most, on the machine of the issue; they move with the machine
TURNS = 5
SESSION, CHECK = "sessions.get", "limits.check, two limits"


def run(effort: Effort) -> Section:
    calls = effort.pick(smoke=5, quick=300, usual=1_000, full=3_000)
    with stage() as here:
        taken = {name: cost(here, act, calls) for name, act in acts(here).items()}
    table = Table(["the server's time in", "µs", "× GET"])
    for name, us in taken.items():
        table.add(name, f"{us:.1f}", f"{us / taken['GET']:.1f}")
    return Section(
        name="server",
        title="The server's time",
        tables=[table],
        promises=[
            Promise(f"{SESSION}: µs of the server", taken[SESSION], SESSION_US, by="commandstats"),
            Promise(f"{CHECK}: µs of the server", taken[CHECK], CHECK_US, by="commandstats"),
        ],
        figures=taken,
    )


def acts(here: Stage) -> dict[str, Callable[[], object]]:
    room, client = here.room, here.client
    token = room.sessions.create("u1", DATA, tags=["mobile"]).token
    [key] = client.keys("*:s:*")
    client.set("plain", "x" * 250)
    room.cache.set("k", "x" * 250, tags=["a", "b"])
    return {
        "GET": lambda: client.get("plain"),
        "INCR": lambda: client.incr("counter"),
        "HGETALL of a session": lambda: client.hgetall(key),
        "cache.get": lambda: room.cache.get("k"),
        "cache.set, two tags": lambda: room.cache.set("k", "x" * 250, tags=["a", "b"]),
        "cache.invalidate": lambda: room.cache.invalidate("other"),
        "cache.invalidate_by_tag": lambda: room.cache.invalidate_by_tag("other"),
        SESSION: lambda: room.sessions.get(token),
        "sessions.create": lambda: room.sessions.create(None, DATA),
        "sessions.update": lambda: room.sessions.update(token, {"theme": "light"}),
        CHECK: lambda: room.limits.check(IP, LIMITS),
    }


def cost(here: Stage, act: Callable[[], object], calls: int) -> float:
    """Return the µs of the server in the commands of one call. What a script calls is in its own time."""
    act()
    names = {name.lower() for name in sent(here.client, act)} - {"info", "config|resetstat"}
    return median(_cost_once(here, act, names, calls) for _ in range(TURNS))


def _cost_once(here: Stage, act: Callable[[], object], names: set[str], calls: int) -> float:
    here.client.config_resetstat()
    for _ in range(calls):
        act()
    stats = here.client.info("commandstats")
    return sum(float(stats[f"cmdstat_{name}"]["usec"]) for name in names) / calls
