"""`stillroom health` shows the report as a table with advice or as JSON, and ends with an exit code for scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from stillroom.cli.tables import Table
from stillroom.dispatch import NoDispatch
from stillroom.health import Advice, Report
from stillroom.health.report import Server, each_server
from stillroom.room import Stillroom
from stillroom.shown import shown as plain

EVERY_S = 2.0
COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
UNKNOWN = "?"

AsJson = Annotated[bool, typer.Option("--json", help="The whole report, as one JSON document.")]
Watch = Annotated[bool, typer.Option(help="Repeat every two seconds, until Ctrl-C.")]
Strict = Annotated[bool, typer.Option(help="Treat a warning as a failure.")]


def health(as_json: AsJson = False, watch: Watch = False, strict: Strict = False) -> None:
    """Show how Redis, the services and the workers are, and what to do about it.

    Exit code: 0 pass or warn, 1 fail (with --strict: or warn), 2 a mistake in the settings.
    """
    with Stillroom(dispatch=NoDispatch()) as room:
        report = room.health.check()
        if watch:
            report = _watched(room, report, as_json)
        elif as_json:
            typer.echo(_json(report, indent=2))
        else:
            console().print(shown(report))
    if report.status == "fail" or (strict and report.status == "warn"):
        raise typer.Exit(1)


def _watched(room: Stillroom, report: Report, as_json: bool) -> Report:
    """Watch, and return the last report once the person has seen enough."""
    printer = console()
    try:
        # In a pipe Live would write the last report alone.
        if as_json or not printer.is_terminal:
            while True:
                if as_json:
                    typer.echo(_json(report))
                else:
                    printer.print(shown(report))
                time.sleep(EVERY_S)
                report = room.health.check()
        with Live(shown(report), console=printer, auto_refresh=False) as live:
            while True:
                live.update(shown(report), refresh=True)
                time.sleep(EVERY_S)
                report = room.health.check()
    except KeyboardInterrupt:
        return report


def console() -> Console:
    """Return a console that is wide in a pipe, so that no sentence is cut off."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = 160
    return made


def _json(report: Report, indent: int | None = None) -> str:
    """Return ASCII JSON, which every terminal and pipe can show."""
    return json.dumps(report.model_dump(mode="json"), indent=indent)


def shown(report: Report) -> RenderableType:
    """Return the report for a person: the status, the servers, the services, the advice."""
    at = datetime.fromtimestamp(report.time, UTC).strftime("%H:%M:%S")
    status = Text(report.status.upper(), style=f"bold {COLOURS[report.status]}")
    return Group(
        Text.assemble(status, f"  at {at} UTC, in {report.took_ms or 0:.0f} ms"),
        _servers(list(each_server(report.servers))),
        _services(report),
        *_advice(report.advice),
    )


def _servers(servers: Sequence[Server]) -> Table:
    columns = ("server", "answers", "version", "role", "memory", "clients", "ops/s", "evicted/s")
    table = Table(*columns, box=None, pad_edge=False)
    for server in servers:
        table.add_row(server.name, _answers(server), *_figures(server))
    return table


def _answers(server: Server) -> Text:
    connection = server.connection
    if connection.is_up:
        return Text(f"in {connection.latency_ms:.1f} ms")
    since = (
        "" if connection.down_since is None else f" for {time.time() - connection.down_since:.0f} s"
    )
    return Text(f"no ({plain(connection.error or 'unknown')}){since}", "red")


def _figures(server: Server) -> Iterator[str]:
    info = server.redis
    if info is None:
        yield from [UNKNOWN] * 6
        return
    limit = "no limit" if info.memory.limit is None else size(info.memory.limit)
    yield f"{info.product or ''} {info.version or UNKNOWN}".strip()
    yield info.role or UNKNOWN
    yield f"{size(info.memory.used)} of {limit}"
    yield number(info.clients.connected)
    yield number(info.operations.per_s)
    yield number(info.operations.evicted_per_s)


def _services(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, facts in _facts(report):
        known = [f"{what} {value}" for what, value in facts if value != UNKNOWN]
        table.add_row(name, ", ".join(known) or "unknown")
    return table


def _facts(report: Report) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Return the most important facts of each service, per minute where counted."""
    cache, sessions, limits, tasks = report.cache, report.sessions, report.limits, report.tasks
    if cache is not None:
        facts = [("hits", cache.hits), ("stale", cache.stale), ("misses", cache.misses)]
        hits = [("hit ratio", percent(cache.hit_ratio))]
        lag = [("seconds of refresh lag", number(cache.refresh_lag_s))]
        yield "cache", hits + [(what, number(count)) for what, count in facts] + lag
    if sessions is not None:
        due = ("due for the sweep", number(sessions.expired_pending))
        yield "sessions", [("active", number(sessions.active)), due]
    if limits is not None:
        facts = [("checks", limits.checks), ("denials", limits.denials), ("banned", limits.banned)]
        yield "limits", [(what, number(count)) for what, count in facts]
    if tasks is not None:
        waiting = [(f"{queue.name} waiting", number(queue.depth)) for queue in tasks.queues or ()]
        rest = [("todo", number(tasks.todo)), ("workers", number(tasks.workers))]
        yield "tasks", [*waiting, *rest, ("seconds since beat's last tick", number(tasks.beat_s))]
    if report.system is not None:
        system = report.system
        shares = [("cpu", system.cpu), ("memory", system.memory), ("disk", system.disk)]
        yield "system", [(what, percent(share)) for what, share in shares]


def _advice(advice: tuple[Advice, ...]) -> Iterator[RenderableType]:
    for found in advice:
        colour = COLOURS[found.severity]
        yield Text.assemble(
            ("\n" + found.severity, colour),
            f" {plain(found.component)}: {plain(found.what)}\n"
            f"     good: {plain(found.good)}\n     to do: {plain(found.todo)}",
        )


def number(value: float | None) -> str:
    """Return a figure as text.

    >>> number(None), number(1234567), number(0.25), number(0)
    ('?', '1,234,567', '0.25', '0')
    """
    return UNKNOWN if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def size(count: int | None) -> str:
    """Return a number of bytes as text.

    >>> size(None), size(900), size(1536 * 1024)
    ('?', '900 B', '1.5 MiB')
    """
    if count is None:
        return UNKNOWN
    if count < 1024:
        return f"{count} B"
    scaled = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if scaled < 1024:
            return f"{scaled:.1f} {unit}"
        scaled /= 1024
    return f"{scaled:.1f} TiB"
