"""`stillroom invalidate`: what an operator does when the data was changed behind the app's back."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from stillroom.cache import Progress as Done
from stillroom.cache.reclaim import SOFT, SWEEP, TAG
from stillroom.cli.tables import AsJson, print_json
from stillroom.errors import RedisUnavailable
from stillroom.keys import sanitized
from stillroom.room import Stillroom
from stillroom.shown import plural, shown

LOOK_EVERY_S = 0.2
WORKER_WITHIN_S = 5.0  # after that the work is done here
GOES_ON_WITHIN_S = 60.0  # or after this, if a worker has begun it: one that died holds it no longer

Keys = Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", show_default=False)]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="Entries with this tag.")]
Patterns = Annotated[list[str] | None, typer.Option("--pattern", help="Keys this glob matches.")]
Everything = Annotated[bool, typer.Option("--all", help="Every entry of the namespace.")]
Soft = Annotated[bool, typer.Option(help="For tags: serve the entries stale, and refresh them.")]
Wait = Annotated[bool, typer.Option(help="Wait until the memory is freed, with a progress bar.")]


def invalidate(
    keys: Keys = None,
    tags: Tags = None,
    patterns: Patterns = None,
    everything: Everything = False,
    soft: Soft = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Forget keys, tags, patterns or all there is. True for every reader when it ends; workers free the memory.

    Exit code 0: it is invalidated, whether the memory could be freed within --wait or not.
    """
    if not (keys or tags or patterns or everything):
        raise typer.BadParameter("say what: KEY, --tag, --pattern or --all")
    if soft and not tags:
        raise typer.BadParameter("--soft goes with --tag")
    # With --json what is said meanwhile is no output.
    console = Console(highlight=False, stderr=as_json)
    is_freed = None
    with Stillroom() as room:
        room.connect_cache()
        held = room.cache.invalidate(*keys) if keys else None
        room.cache.invalidate_by_tag(*tags or [], soft=soft)
        for pattern in patterns or []:
            room.cache.invalidate_by_pattern(pattern)
        if everything:
            room.cache.clear()
        works = [(SOFT if soft else TAG) + sanitized(tag) for tag in tags or []]
        if patterns or everything:
            works.append(SWEEP)
        # Not before all is invalidated: whoever reads this may go away, and the command ends with it.
        if keys:
            console.print(f"{held:,} of {plural(len(keys), 'key')} held a value")
        if works:
            console.print("invalidated: no reader sees the old values any more")
        if works and wait:
            is_freed = _await(room, works, console)
    if as_json:
        told = {"tags": tags or [], "patterns": patterns or [], "all": everything, "soft": soft}
        print_json({"keys": keys or [], "held_a_value": held, **told, "freed": is_freed})


def _await(room: Stillroom, works: list[bytes], console: Console) -> bool:
    """Watch workers reclaim. When none has begun after five seconds, reclaim here. Return whether all is freed.

    A pause may last for a day: it is not waited for. This process has no loaders: what was invalidated softly is
    left to the workers, and so are orders.
    """
    text, bar_column = TextColumn("{task.description}"), BarColumn()
    columns = (text, bar_column, TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("reclaiming", total=None)
        patience = time.monotonic() + WORKER_WITHIN_S
        last: dict[bytes, Done | None] = {}
        while pending := _under_way(room, works):
            _show(bars, bar, list(pending.values()))
            if (
                any(work.startswith(SOFT) for work in pending)
                and room.upkeep.refreshes_are_paused()
            ):
                bars.console.print("refreshes are paused: workers load these values after that")
                return False
            if any(pending.values()) and pending != last:
                patience = time.monotonic() + GOES_ON_WITHIN_S
            last = pending
            if time.monotonic() > patience:
                if all(work.startswith(SOFT) for work in pending):
                    bars.console.print(
                        "no worker takes it: the next one that starts loads the values"
                    )
                    return False
                if not _reclaim_here(room, bars, bar):
                    return False
            time.sleep(LOOK_EVERY_S)
        bars.update(bar, total=1, completed=1, description="reclaimed")
    return True


def _reclaim_here(room: Stillroom, bars: Progress, bar: TaskID) -> bool:
    """Reclaim here if this process may. An app's Redis user scans no keys, so the work then stays written down."""
    bars.console.print("no worker takes it: reclaiming here")
    try:
        room.upkeep.reclaim(progress=lambda done: _show(bars, bar, [done]), loads=False)
    except RedisUnavailable as error:
        if not error.lacks_right:
            raise
        bars.console.print("not allowed here: " + shown(error.detail), markup=False)
        bars.console.print("the next worker that starts frees the memory")
        return False
    return True


def _under_way(room: Stillroom, works: list[bytes]) -> dict[bytes, Done | None]:
    """Return the work that is not done. A sweep that only waits to drop its patterns counts as done."""
    pending = room.upkeep.pending(*works)
    return {work: done for work, done in pending.items() if not (done and done.done)}


def _show(bars: Progress, bar: TaskID, states: list[Done | None]) -> None:
    begun = [state for state in states if state]
    totals = [state.total for state in begun]
    known = [total for total in totals if total is not None]
    bars.update(
        bar,
        total=sum(known) if begun and len(known) == len(totals) else None,
        completed=sum(state.seen for state in begun),
        description=f"{sum(state.deleted for state in begun):,} deleted",
    )
