"""`stillroom sessions` lists the sessions of users and ends them. It shows handles, never tokens."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from stillroom.cli.tables import AsJson, Table, open_room, print_json, print_table, when
from stillroom.sessions import Device, Sessions
from stillroom.shown import plural

app = typer.Typer(help="List sessions, count them, and end them.", no_args_is_help=True)

User = Annotated[str, typer.Argument(help="The user's id, as the app gave it to `create`.")]
COLUMNS = ("handle", "last seen", "created", "ends", "tags", "meta")


@app.command("list")
def show(user: User, as_json: AsJson = False) -> None:
    """List the living sessions of a user, the one seen last first."""
    with open_room() as room:
        devices = room.sessions.list_for_user(user)
    if as_json:
        print_json([dataclasses.asdict(device) for device in devices])
        return
    print_table(_table(devices))
    typer.echo(plural(len(devices), "session"))


@app.command()
def end(
    user: Annotated[str | None, typer.Argument(help="The user's id.")] = None,
    handle: Annotated[
        str | None, typer.Option(help="End only the session with this handle.")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Keep the session with this handle.")] = None,
    everybody: Annotated[
        bool, typer.Option("--all", help="End the sessions of all users, and all anonymous ones.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """End the sessions of a user: all of them, one, or all but one; or, with --all, everybody's.

    True everywhere when it returns. Workers give the memory back.
    """
    if handle and keep:
        raise typer.BadParameter("--handle and --keep are two different things; give one")
    if everybody == (user is not None) or (everybody and (handle or keep)):
        raise typer.BadParameter("say whose: USER, or --all and nothing else")
    with open_room() as room:
        ended = _end(room.sessions, user, handle, keep)
    print_json({"ended": ended}) if as_json else typer.echo(f"{plural(ended, 'session')} ended")


def _end(sessions: Sessions, user: str | None, handle: str | None, keep: str | None) -> int:
    if user is None:
        return sessions.destroy_all()
    return int(sessions.end(user, handle) if handle else sessions.destroy_for_user(user, keep))


@app.command()
def count(as_json: AsJson = False) -> None:
    """Count all sessions, with those not swept since they ended."""
    with open_room() as room:
        found = room.sessions.count()
    print_json({"sessions": found}) if as_json else typer.echo(plural(found, "session"))


def _table(devices: list[Device]) -> Table:
    table = Table(*COLUMNS)
    for device in devices:
        table.add_row(
            device.handle,
            *map(when, (device.last_seen, device.created, device.expires_at)),
            ", ".join(device.tags),
            ", ".join(f"{name}={value}" for name, value in device.meta.items()),
        )
    return table
