"""`stillroom agree`: what all processes have alike, and how a person changes it."""

from __future__ import annotations

from typing import Annotated

import typer

from stillroom.agreed import Agreement
from stillroom.cache.terms import SHARDS
from stillroom.cli.tables import AsJson, Table, print_json, print_table
from stillroom.errors import SettingsError, did_you_mean
from stillroom.room import Stillroom

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SETTING]...",
        show_default=False,
        help="The settings whose value here becomes the agreed one.",
    ),
]


def agree(settings: Settings = None, as_json: AsJson = False) -> None:
    """Show the settings that all processes must have alike; or let this command's values be the agreed ones.

    Before a value is changed every process of the namespace must have ended. With another number of shards the
    cache begins empty.
    """
    with Stillroom() as room:
        _refuse_unknown(settings or [], room)
        room.wire.ping()
        room.state_wire.ping()
        found = dict(room.state.run(room.agreed.compare()))
        found |= room.state.run(room.agreed.change(*settings or []))
        if SHARDS in (settings or []):
            room.cache.clear()
    if as_json:
        print_json([one._asdict() for one in found.values()])
        return
    print_table(_table(list(found.values())))


def _refuse_unknown(settings: list[str], room: Stillroom) -> None:
    known = room.agreed.settings
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise SettingsError(f"{name} is no setting that processes agree on{hint}")


def _table(found: list[Agreement]) -> Table:
    table = Table("setting", "agreed", "here", "as said by", box=None, pad_edge=False)
    for one in found:
        table.add_row(one.setting, one.agreed, one.mine, one.who)
    return table
