"""Measures what our commands cost the server beside plain ones, as the server counts the time in a command.

Alone, a command finds the caches of the CPU cold: the server has slept since the one before. On a busy server they
come in a row. That is how the limits of the promises were measured, so by that they are judged. Of the turns the
middle one is told, or in a row the quickest: what else the machine does only adds to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

from bench.limits import IP, LIMITS
from bench.report import Promise, Section, Table
from bench.sessions import DATA
from bench.stage import NEVER, Effort, Stage, stage
from stillroom.wire import Command
from tests.support.monitor import sent

SESSION_US, CHECK_US = 5.0, 12.0  # at most, on the machine of the issue; they move with the machine
TURNS, ROW_TURNS = 5, 20
SESSION, CHECK = "sessions.get", "limits.check, two limits"
REPEATED = ["cache.get", SESSION, CHECK]  # their commands do the same whenever they come
IN_A_ROW = 200


def run(effort: Effort) -> Section:
    calls = effort.pick(smoke=5, quick=300, usual=1_000, full=3_000)
    with stage() as here:
        all_acts = acts(here)
        taken = {name: cost(here, act, calls) for name, act in all_acts.items()}
        busy = {name: cost_in_a_row(here, all_acts[name], calls) for name in REPEATED}
    table = Table(["the server's time in", "alone, µs", "× GET", "in a row, µs"])
    for name, us in taken.items():
        row = f"{busy[name]:.1f}" if name in busy else "–"
        table.add(name, f"{us:.1f}", f"{us / taken['GET']:.1f}", row)
    return Section(
        name="server",
        title="The server's time",
        tables=[table],
        promises=[
            Promise(f"{name}: µs of the server", busy[name], most, by="commandstats, in a row")
            for name, most in ((SESSION, SESSION_US), (CHECK, CHECK_US))
        ],
        figures=taken | {f"{name}, in a row": us for name, us in busy.items()},
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
    return median(turns(here, act, calls, TURNS))


def cost_in_a_row(here: Stage, act: Callable[[], object], calls: int) -> float:
    """Return the same where the commands of many calls come at once."""
    rows = max(1, calls // IN_A_ROW)
    return min(turns(here, in_a_row(here, act), rows, ROW_TURNS)) / IN_A_ROW


def turns(here: Stage, act: Callable[[], object], calls: int, count: int) -> list[float]:
    act()
    names = {name.lower() for name in sent(here.client, act)} - {"info", "config|resetstat"}
    return [_cost_once(here, act, names, calls) for _ in range(count)]


def in_a_row(here: Stage, act: Callable[[], object]) -> Callable[[], object]:
    """Return what sends the commands of one call IN_A_ROW times at once."""
    wire, batches = here.room.wire, []
    execute = wire.execute

    def noting(batch: Sequence[Command], *args: Any, **options: Any) -> list[Any]:
        batches.append(batch)
        return execute(batch, *args, **options)

    act()
    with patch.object(wire, "execute", noting):
        act()
    [batch] = batches
    row = [*batch] * IN_A_ROW
    return lambda: execute(row, NEVER)


def _cost_once(here: Stage, act: Callable[[], object], names: set[str], calls: int) -> float:
    here.client.config_resetstat()
    for _ in range(calls):
        act()
    stats = here.client.info("commandstats")
    return sum(float(stats[f"cmdstat_{name}"]["usec"]) for name in names) / calls
