"""`stillroom show`, `explain` and `refresh` are about a key; `loaders` tells how each loader does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from stillroom.acts import after_a_pause, order_load
from stillroom.cache import Explanation
from stillroom.cli.application import open_room_with_loaders
from stillroom.cli.health import number, percent, size
from stillroom.cli.tables import AsJson, Table, print_json, print_table, when
from stillroom.health.report import Figures, LoaderStats
from stillroom.room import Stillroom
from stillroom.shown import shown

Key = Annotated[str, typer.Argument(help="As the app writes it: product:7")]
Value = Annotated[bool, typer.Option("--value", help="Show the value, too.")]
Minutes = Annotated[int, typer.Option(min=1, max=119, help="How many minutes to look back.")]
COLUMNS = (
    *("loader", "key", "hits", "stale", "misses", "ratio", "loads", "failed"),
    *("p50 ms", "p95 ms", "lag s", "not kept", "last error"),
)


def show(key: Key, value: Value = False, as_json: AsJson = False) -> None:
    """Show what is under a key: freshness, tags, loader, size, times. Exit code 1 if a reader would miss it.

    The keys of the loaders in STILLROOM_LOADERS are known. For such a key it also says how old the value is
    at the most.
    """
    with open_room_with_loaders() as room:
        found = room.upkeep.explain(key, value=value)
    if as_json:
        print_json(_fields(found, value))
    else:
        table = Table("", "", show_header=False)
        for name, fact in _facts(found, value):
            table.add_row(name, fact)
        print_table(table)
    if found.outcome == "miss":
        raise typer.Exit(1)


def explain(key: Key, as_json: AsJson = False) -> None:
    """Tell why a read of a key is a hit, stale or a miss: which mark, which epoch, which release, or gone."""
    with open_room_with_loaders() as room:
        found = room.upkeep.explain(key)
    if as_json:
        print_json(_fields(found, False))
        return
    at = f" It was at {when(found.invalidated_at)} UTC." if found.invalidated_at else ""
    under_way = f" Under way: {found.loading}." if found.loading else ""
    typer.echo(f"{found.outcome}: {shown(found.why)}{at}{under_way}")


def refresh(key: Key, as_json: AsJson = False) -> None:
    """Have a worker load a key now, whatever is there. The entry names its loader, or STILLROOM_LOADERS knows it.

    When it ends the order is written down. Readers are served what is there until the worker has stored a value.
    While refreshes are paused the order waits.
    """
    with open_room_with_loaders() as room:
        loader = order_load(room, key)
        later = after_a_pause(room)
    said = f"a worker was asked to load {shown(key)} by {shown(loader)}{later}"
    print_json({"key": key, "loader": loader}) if as_json else typer.echo(said)


def loaders(minutes: Minutes = 15, as_json: AsJson = False) -> None:
    """Show how each loader does: lookups, loads and how long they take, failures, lag, and its last error.

    It lists the loaders that were used lately and those in STILLROOM_LOADERS, which are named with their keys. Exit
    code 1 if Redis does not tell what was counted.
    """
    with open_room_with_loaders() as room:
        figures = room.health.figures(minutes)
        known = _known(room)
    if figures.cache is None or figures.cache.loaders is None:
        typer.echo("what was counted is not known: Redis did not tell it", err=True)
        raise typer.Exit(1)
    if as_json:
        print_json(_as_json(figures, known))
        return
    table = Table(*COLUMNS)
    for one in _each(figures, known):
        table.add_row(*_row(one, figures, known))
    print_table(table)
    typer.echo(f"in the last {minutes} min")


def _known(room: Stillroom) -> dict[str, str]:
    names = room.cache.loaders.names()
    return {name: room.cache.loaders[name].template for name in names}


def _each(figures: Figures, known: dict[str, str]) -> list[LoaderStats]:
    """Return the used loaders, then the others."""
    used = list((figures.cache and figures.cache.loaders) or ())
    names = {one.name for one in used}
    return [*used, *(LoaderStats(name=name) for name in known if name not in names)]


def _row(one: LoaderStats, figures: Figures, known: dict[str, str]) -> Iterator[str]:
    error = figures.cache.last_error(one.name) if figures.cache else None
    yield one.name
    yield known.get(one.name, "")
    yield from map(number, (one.hits, one.stale, one.misses))
    yield percent(one.hit_ratio)
    yield from map(number, (one.loads, one.load_errors, one.load_p50_ms, one.load_p95_ms))
    yield from map(number, (one.refresh_lag_s, one.not_kept))
    yield f"{error.kind} at {error.place}, {when(error.at)}" if error else ""


def _as_json(figures: Figures, known: dict[str, str]) -> list[dict[str, Any]]:
    found = []
    for one in _each(figures, known):
        error = figures.cache.last_error(one.name) if figures.cache else None
        said = None if error is None else error.model_dump(exclude={"name"})
        found.append({**one.model_dump(), "key": known.get(one.name), "last_error": said})
    return found


def _fields(found: Explanation, with_value: bool) -> dict[str, Any]:
    fields = dataclasses.asdict(found)
    left_out = ("args",) if with_value else ("args", "value")
    return {name: fact for name, fact in fields.items() if name not in left_out}


def _facts(found: Explanation, with_value: bool) -> Iterator[tuple[str, str]]:
    yield "key", found.key
    article = "" if found.outcome == "stale" else "a "
    yield "a read is", f"{article}{found.outcome}: {found.why}"
    if found.invalidated_at:
        yield "invalidated", f"{when(found.invalidated_at)} UTC"
    yield "loader", found.loader or "none is known"
    yield "tags", ", ".join(found.tags) or "none"
    yield "size", size(found.size) if found.size is not None else "nothing is stored"
    if found.age_s is not None:
        yield "age", f"up to {found.age_s:,.0f} s"
    if found.fresh_until is not None:
        yield "fresh until", f"{when(found.fresh_until)} UTC"
    if found.ends_at is not None:
        yield "ends", f"{when(found.ends_at)} UTC"
    yield "under way", found.loading or "nothing"
    if with_value:
        yield "value", json.dumps(found.value, default=str, ensure_ascii=False)
