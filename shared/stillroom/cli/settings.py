"""`stillroom settings`: what is in force, and where each of it comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from stillroom.cli.tables import AsJson, Table, print_json, print_table
from stillroom.in_force import in_force
from stillroom.settings import Settings

Changed = Annotated[bool, typer.Option(help="Leave out settings that have their defaults.")]


def settings(as_json: AsJson = False, changed: Changed = False) -> None:
    """Show the settings in force in this environment, and where each comes from. Secrets are shown as ***.

    What an app gives its room in code is known to that app alone: run this where it runs.
    """
    found = [one for one in in_force(Settings()) if not (changed and one.is_default)]
    if as_json:
        print_json([one._asdict() for one in found])
        return
    table = Table("setting", "value", "from")
    for one in found:
        table.add_row(one.name, one.value, one.source)
    print_table(table)
