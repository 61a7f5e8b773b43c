"""Gives commands what they share: a room, a table, times, and JSON. Visitors' text is shown as text."""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich import table
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.text import Text

from stillroom.errors import InvalidLimit
from stillroom.limits.changes import LONGEST_S, read_time
from stillroom.room import Stillroom
from stillroom.shown import shown

WIDEST = 10_000  # characters of a line in a pipe

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@contextmanager
def open_room() -> Iterator[Stillroom]:
    """Open a room, and connect it with the Redis that holds the state. The cache's may be away meanwhile."""
    with Stillroom() as room:
        room.connect_state()
        yield room


class Table(table.Table):
    """A table whose cells are text, whatever is in them: neither Rich's markup nor a terminal's sequences.

    No cell is cut off: an id that ends in `…` can't be typed.
    """

    def add_column(self, *given: Any, **options: Any) -> None:
        super().add_column(*given, **{"overflow": "fold"} | options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(_cell(cell) for cell in cells), **options)

    def one_below_the_other(self) -> Table:
        """Return the same with a line for each cell, for a terminal that is too narrow for a row."""
        lines = Table("", "", box=None, pad_edge=False, show_header=False)
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            for column, cell in zip(self.columns, cells, strict=True):
                lines.add_row(column.header, cell)
            lines.add_row()
        return lines


def _cell(cell: RenderableType | None) -> RenderableType | None:
    return Text(shown(cell)) if isinstance(cell, str) else cell


def when(moment: float) -> str:
    """Return a time in UTC: to the second today, with the date and to the minute on another day.

    A time that no calendar has is shown as its number.
    """
    try:
        at = datetime.fromtimestamp(moment, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{moment:g}"
    today = datetime.fromtimestamp(time.time(), UTC)
    return at.strftime("%H:%M:%S" if at.date() == today.date() else "%Y-%m-%d %H:%M")


def lasting(text: str, most: int = LONGEST_S) -> int:
    """Return the seconds that a `--for` says. Raises BadParameter, also for more than `most`."""
    with given_as("--for"):
        return read_time(text, most)


@contextmanager
def given_as(option: str) -> Iterator[None]:
    """Raise BadParameter, which names the option, where what it was given is no rate, and no time of a limit."""
    try:
        yield
    except InvalidLimit as wrong:
        raise typer.BadParameter(str(wrong), param_hint=option) from None


def operator() -> str:
    """Return who gives the command: a login name, or the number of a user who has none, as in many a container.

    The environment names him, in whatever encoding.
    """
    try:
        return shown(getpass.getuser())
    except (KeyError, OSError):  # from Python 3.13 on it is the second
        return f"uid {os.getuid()}"


def print_json(found: Any) -> None:
    """Print one JSON document in ASCII, which every terminal shows. What JSON does not know becomes text.

    So do NaN and Infinity, which Python writes and other programs can't read.
    """
    known = json.loads(json.dumps(found, default=str), parse_constant=str)
    typer.echo(json.dumps(known, indent=2))


def print_table(table: Table) -> None:
    """Print a table: a row to a line in a pipe, and on a terminal that is wide enough; else a cell to a line."""
    console = Console(highlight=False)
    needed = Measurement.get(console, console.options.update(width=WIDEST), table).maximum
    if not console.is_terminal:
        console.width = max(200, needed)
    elif needed > console.width and table.show_header:
        table = table.one_below_the_other()
    console.print(table)
