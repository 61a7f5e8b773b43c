"""`stillroom pause` and `stillroom resume`: workers leave refreshes alone for a while."""

from __future__ import annotations

from typing import Annotated

import typer

from stillroom.cli.tables import AsJson, lasting, open_room, operator, print_json
from stillroom.pauses import LONGEST_S
from stillroom.shown import shown

What = Annotated[str, typer.Argument(help="refresh")]


def pause(
    what: What,
    for_: Annotated[str, typer.Option("--for", help="90s, 10m, 2h; up to 1d.")] = "10m",
    as_json: AsJson = False,
) -> None:
    """Let workers leave refreshes alone for a while, for a database that is being repaired.

    Stale values are served until their swr ends; what is missing is still loaded, by readers. It ends by itself.
    """
    seconds = lasting(for_, LONGEST_S)
    with open_room() as room:
        room.upkeep.pause(what, seconds, by=operator())
    said = f"{shown(what)} is paused for {for_}"
    print_json({"paused": what, "seconds": seconds}) if as_json else typer.echo(said)


def resume(what: What, as_json: AsJson = False) -> None:
    """End a pause before its time."""
    with open_room() as room:
        ended = room.upkeep.resume(what)
    said = f"{shown(what)} goes on" if ended else f"{shown(what)} was not paused"
    print_json({"resumed": what, "was_paused": ended}) if as_json else typer.echo(said)
