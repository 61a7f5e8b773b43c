"""`stillroom sessions`: who is logged in, and ending it. Handles are shown, tokens never."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stillroom.room import Stillroom
from stillroom.sessions import Device

app = typer.Typer(help="Who is logged in, and ending it.", no_args_is_help=True)

User = Annotated[str, typer.Argument(help="The user's id, as the app gave it to `create`.")]
COLUMNS = ("handle", "last seen", "created", "ends", "tags", "meta")


@app.command("list")
def show(user: User) -> None:
    """The living sessions of a user, the one seen last first."""
    with _room() as room:
        devices = room.sessions.list_for_user(user)
    _print(_table(devices))
    typer.echo(f"{len(devices)} sessions")


@app.command()
def end(
    user: User,
    handle: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    keep: Annotated[str | None, typer.Option(help="All but the one with this handle.")] = None,
) -> None:
    """End the sessions of a user: all of them, one, or all but one. True everywhere when it returns."""
    if handle and keep:
        raise typer.BadParameter("--handle and --keep are two different things; give one")
    with _room() as room:
        sessions = room.sessions
        ended = sessions.end(user, handle) if handle else sessions.destroy_for_user(user, keep)
    typer.echo(f"{int(ended)} sessions ended")


@app.command()
def count() -> None:
    """How many sessions there are, with those not swept since they ended."""
    with _room() as room:
        typer.echo(f"{room.sessions.count()} sessions")


@contextmanager
def _room() -> Iterator[Stillroom]:
    with Stillroom() as room:
        room.connect()
        yield room


def _table(devices: list[Device]) -> Table:
    table = Table(*COLUMNS)
    for device in devices:
        table.add_row(
            device.handle,
            *map(_when, (device.last_seen, device.created, device.expires_at)),
            escape(", ".join(device.tags)),
            escape(", ".join(f"{name}={value}" for name, value in device.meta.items())),
        )
    return table


def _when(moment: float) -> str:
    """UTC, to the second; with the day if it is another."""
    at, today = datetime.fromtimestamp(moment, UTC), datetime.fromtimestamp(time.time(), UTC)
    return at.strftime("%H:%M:%S" if at.date() == today.date() else "%Y-%m-%d %H:%M")


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # in a pipe nobody wants a handle cut off
    console.print(table)
