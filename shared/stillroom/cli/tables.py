"""What the commands that look into Redis share: a room, a table, a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from stillroom.room import Stillroom


@contextmanager
def open_room() -> Iterator[Stillroom]:
    """A room that is connected."""
    with Stillroom() as room:
        room.connect()
        yield room


def when(moment: float) -> str:
    """UTC, to the second; with the day if it is another."""
    at, today = datetime.fromtimestamp(moment, UTC), datetime.fromtimestamp(time.time(), UTC)
    return at.strftime("%H:%M:%S" if at.date() == today.date() else "%Y-%m-%d %H:%M")


def print_table(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # in a pipe nobody wants a handle cut off
    console.print(table)
