"""`stillroom limits`: which limits are changed for now, changing one, and forgetting what somebody has used."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from stillroom.acts import forget_used
from stillroom.cli.application import apps_of
from stillroom.cli.check_limits import in_app
from stillroom.cli.tables import (
    AsJson,
    Table,
    given_as,
    lasting,
    open_room,
    operator,
    print_json,
    print_table,
    when,
)
from stillroom.errors import SettingsError, did_you_mean
from stillroom.limits import Limit
from stillroom.limits.changes import Change, read_rate, write_rate
from stillroom.limits.decision import Standing
from stillroom.room import Stillroom
from stillroom.shown import shown
from stillroom.subject import UNKNOWN, subject_of

app = typer.Typer(help="Show limits and what was used, and change them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The limit's name, such as api.")]
By = Annotated[
    str,
    typer.Option(help="What the limit counts by: ip, user, a header, or as `routes` shows it."),
]
USUAL = {"ip", "user"}  # kinds that every request has
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
        print_json(told)
        return
    print_table(_table(changes))
    unchanged = sorted(set(names) - {change.name for change in changes})
    typer.echo(f"as the app says: {shown(', '.join(unchanged)) or 'none is known'}")


@app.command("peek")
def peek(
    subject: Annotated[str, typer.Argument(help="An address, or a user's name with --by user.")],
    name: Annotated[
        str | None, typer.Argument(help="The limit's name. Without it: all limits of the app.")
    ] = None,
    by: By = "ip",
    rate: Annotated[
        str | None, typer.Option(help="What the limit admits, such as 5/300s, if no module has it.")
    ] = None,
    app: Annotated[
        list[str] | None,
        typer.Option(
            "--app", help="Where the limits are: shop.web:app. Default: STILLROOM_LOADERS."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how much somebody has used of a limit, and when it comes back. Nothing is counted.

    What a limit admits stands in the app: its modules are imported for it, or `--rate` says it.
    """
    by = _kind(by)
    with open_room() as room:
        _check_subject(room, by, subject)
        limits = _named(name, by, rate, app or list(room.settings.loaders))
        changed = {one.name: one for one in room.limits.changes()}
        now = [changed[one.name].onto(one) if one.name in changed else one for one in limits]
        found = room.limits.peek({by: subject}, now)
    rows = [_standing(one) for one in found.standings]
    if as_json:
        print_json({"banned": found.banned, "degraded": found.degraded, "limits": rows})
        return
    table = Table("limit", "is", "used", "left", "all back in")
    for row in rows:
        times = f"{row['full_s']:,.0f} s"
        table.add_row(row["name"], row["rate"], str(row["used"]), str(row["left"]), times)
    print_table(table)
    if found.banned:
        typer.echo("banned: see stillroom bans list")


@app.command("set")
def set_(
    name: Name,
    rate: Annotated[str, typer.Argument(help="2000/1h, 5/300s: quota/window.")],
    for_: Annotated[str, typer.Option("--for", help="90s, 10m, 2h, 30d.")] = "1h",
    as_json: AsJson = False,
) -> None:
    """Let a limit be another one for some time, in all processes, within a second."""
    (quota, window), seconds = _admitted(rate, "RATE"), lasting(for_)
    with open_room() as room:
        change = room.limits.change(name, quota, window, seconds, by=operator())
    if as_json:
        print_json(dataclasses.asdict(change))
        return
    typer.echo(f"{name} is {_rate(change)} until {when(change.until)} UTC")


@app.command("unset")
def unset(name: Name, as_json: AsJson = False) -> None:
    """Let a limit be what the app says again."""
    with open_room() as room:
        was_changed = room.limits.restore(name)
    said = f"{name} is what the app says" if was_changed else f"{name} was not changed"
    print_json({"unset": name, "was_changed": was_changed}) if as_json else typer.echo(said)


@app.command("reset")
def reset(
    subject: Annotated[str, typer.Argument(help="An address, or a user's name with --by user.")],
    name: Name,
    by: By = "ip",
    as_json: AsJson = False,
) -> None:
    """Forget what somebody has used of a limit. A process that has just denied them may do so for 5 s more."""
    by = _kind(by)
    with open_room() as room:
        _check_subject(room, by, subject)
        had_used = forget_used(room, by, subject, name)
    if as_json:
        print_json({"reset": name, "by": by, "had_used": had_used})
        return
    said = f"what this {by} has used is forgotten" if had_used else f"this {by} has used nothing"
    is_usual = USUAL.issuperset(by.split("&"))
    hint = "" if had_used or is_usual else f". By what {name} counts, `stillroom routes` shows"
    typer.echo(f"{name}: {said}{hint}")


def _kind(by: str) -> str:
    """Return the kind that this names: x_api_key for the header X-API-Key."""
    return by.lower().replace("-", "_")


def _check_subject(room: Stillroom, by: str, subject: str) -> None:
    if by == "ip" and subject != UNKNOWN and subject_of(subject) == UNKNOWN:
        raise typer.BadParameter(
            f"{shown(subject)!r} is no address: say --by user, or by what else"
        )
    _need_pepper(room, by)


def _need_pepper(room: Stillroom, by: str) -> None:
    """Refuse without the app's pepper. Redis knows a user by a hash, which would be that of somebody else."""
    if by != "ip" and not room.settings.session_peppers:
        raise SettingsError(f"a limit by {by} needs the app's STILLROOM_SESSION_PEPPERS")


def _named(name: str | None, by: str, rate: str | None, specs: list[str]) -> list[Limit]:
    """Return the limit of this name as the app has it, or as `rate` says; without a name all that count so."""
    if rate is not None:
        if name is None:
            raise typer.BadParameter(
                "this is what one limit admits: say its name, too", param_hint="--rate"
            )
        return [Limit(name, *_admitted(rate, "--rate"), by=by)]
    seen = [limit for _, limit in in_app(apps_of(specs)).limits()]
    there = [limit for limit in seen if limit.by == by]
    found = {limit.name: limit for limit in there if name in (None, limit.name)}
    if not found:
        others = sorted({limit.by for limit in seen if name in (None, limit.name)})
        whose = "it counts" if name else "those there count"
        hint = (
            f"; {whose} by {', '.join(others)}"
            if others
            else did_you_mean(name, {limit.name for limit in there})
        )
        what = f"limit {name}" if name else "limit"
        where = ", ".join(specs) or "STILLROOM_LOADERS"
        raise SettingsError(
            f"no {what} by {by} is in {where}{hint}; --app says where the limits are, --rate 5/300s "
            "what one admits"
        )
    return list(found.values())


def _admitted(rate: str, option: str) -> tuple[int, int]:
    """Return the quota and window that a rate says. Raises BadParameter, which names the option."""
    with given_as(option):
        return read_rate(rate)


def _standing(one: Standing) -> dict[str, Any]:
    limit = one.limit
    return {
        "name": limit.name,
        "rate": write_rate(limit.quota, limit.window),
        "used": limit.quota - one.remaining,
        "left": one.remaining,
        "reset_s": one.reset,
        "full_s": one.full,
    }


def _table(changes: list[Change]) -> Table:
    table = Table(*COLUMNS)
    for change in changes:
        times = (when(change.until), when(change.since))
        table.add_row(change.name, _rate(change), *times, change.by)
    return table


def _rate(change: Change) -> str:
    return write_rate(change.quota, change.window)
