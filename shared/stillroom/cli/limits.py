"""`stillroom limits`: which limits are changed for now, changing one, and forgetting what somebody has used."""

from __future__ import annotations

import dataclasses
import getpass
import json
from typing import Annotated

import typer

from stillroom.cli.tables import Table, open_room, print_table, when
from stillroom.errors import SettingsError
from stillroom.limits import Limit
from stillroom.limits.changes import Change, read_rate, read_time, write_rate
from stillroom.shown import shown

app = typer.Typer(help="Which limits are changed, and changing one.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The limit's name, such as api.")]
AsJson = Annotated[bool, typer.Option("--json", help="As one JSON document.")]
COLUMNS = ("limit", "is now", "until", "since", "by")


@app.command("show")
def show(as_json: AsJson = False) -> None:
    """Show the limits that processes use, and those that are changed for now, the one that ends first first."""
    with open_room() as room:
        changes, names = room.limits.changes(), room.limits.names()
    if as_json:
        told = {
            "names": sorted(names),
            "changes": [dataclasses.asdict(change) for change in changes],
        }
        typer.echo(json.dumps(told, indent=2))
        return
    print_table(_table(changes))
    unchanged = sorted(set(names) - {change.name for change in changes})
    typer.echo(f"as the app says: {shown(', '.join(unchanged)) or 'none is known'}")


@app.command("set")
def set_(
    name: Name,
    rate: Annotated[str, typer.Argument(help="2000/1h, 5/300s: quota/window.")],
    for_: Annotated[str, typer.Option("--for", help="90s, 10m, 2h, 30d.")] = "1h",
) -> None:
    """Let a limit be another one for some time, in all processes, within a second."""
    (quota, window), seconds = read_rate(rate), read_time(for_)
    with open_room() as room:
        change = room.limits.change(name, quota, window, seconds, by=getpass.getuser())
    typer.echo(f"{name} is {_rate(change)} until {when(change.until)} UTC")


@app.command("unset")
def unset(name: Name) -> None:
    """Let a limit be what the app says again."""
    with open_room() as room:
        was_changed = room.limits.restore(name)
    typer.echo(f"{name} is what the app says" if was_changed else f"{name} was not changed")


@app.command("reset")
def reset(
    subject: Annotated[str, typer.Argument(help="An address, or a user's name with --by user.")],
    name: Name,
    by: Annotated[str, typer.Option(help="What the limit counts by.")] = "ip",
    as_json: AsJson = False,
) -> None:
    """Forget what somebody has used of a limit. A process that has just denied him may do so for 5 s more."""
    with open_room() as room:
        if by != "ip" and not room.settings.session_peppers:
            # Redis knows him by a hash: without the app's pepper that of somebody else would be forgotten.
            raise SettingsError(
                f"to reset a limit by {by} needs the app's STILLROOM_SESSION_PEPPERS"
            )
        room.limits.reset({by: subject}, [Limit(name, 1, 1, by=by)])
    said = f"{name}: what this {by} has used is forgotten"
    typer.echo(json.dumps({"reset": name, "by": by}) if as_json else said)


def _table(changes: list[Change]) -> Table:
    table = Table(*COLUMNS)
    for change in changes:
        times = (when(change.until), when(change.since))
        table.add_row(change.name, _rate(change), *times, change.by)
    return table


def _rate(change: Change) -> str:
    return write_rate(change.quota, change.window)
