"""`stillroom bans`: who is banned, and ending it; `stillroom abuse rules`: what it is that bans."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from stillroom.abuse import Ban, Rule
from stillroom.abuse.rules import read_rules
from stillroom.acts import bans_around, still_banned
from stillroom.cli.tables import AsJson, Table, lasting, open_room, print_json, print_table, when
from stillroom.settings import Settings
from stillroom.shown import plural, shown

bans = typer.Typer(help="List bans, add them, and lift them.", no_args_is_help=True)
abuse = typer.Typer(help="Show the rules that look for abuse.", no_args_is_help=True)

Subject = Annotated[
    str, typer.Argument(help="An address (of IPv6: its client's /64), or a network.")
]
BAN_COLUMNS = ("subject", "ends", "since", "by", "level", "reason")
RULE_COLUMNS = ("rule", "what", "does", "why")


@bans.command("list")
def show(
    limit: Annotated[int, typer.Option(help="Show at most this many.")] = 1_000,
    as_json: AsJson = False,
) -> None:
    """Show the bans in force, the one that ends last first."""
    with open_room() as room:
        found = room.abuse.bans(limit)
    if as_json:
        print_json([dataclasses.asdict(ban) for ban in found])
        return
    print_table(_ban_table(found))
    more = "; there may be more: --limit" if len(found) == limit else ""
    typer.echo(f"{plural(len(found), 'ban')}{more}")


@bans.command()
def add(
    subject: Subject,
    for_: Annotated[str, typer.Option("--for", help="90s, 10m, 6h, 30d.")],
    reason: Annotated[str, typer.Option(help="The reason, which `bans list` shows.")] = "",
    as_json: AsJson = False,
) -> None:
    """Ban somebody. Private ranges, trusted proxies and the allowlist can't be banned."""
    seconds = lasting(for_)
    with open_room() as room:
        ban = room.abuse.ban(subject, seconds, reason)
    said = f"{shown(ban.subject)} is banned until {when(ban.until)} UTC"
    print_json(dataclasses.asdict(ban)) if as_json else typer.echo(said)


@bans.command()
def lift(subject: Subject, as_json: AsJson = False) -> None:
    """End a ban, and forget what led to it. For ten minutes no rule bans the subject again."""
    with open_room() as room:
        lifted = room.abuse.lift(subject)
        others = bans_around(room, subject)
    said = f"the ban of {subject} is lifted" if lifted else f"{subject} was not banned"
    if as_json:
        print_json({"subject": subject, "was_banned": lifted, "banned_with": others})
    else:
        typer.echo(shown(said + still_banned(others)))


@abuse.command()
def rules(as_json: AsJson = False) -> None:
    """Show the rules in force: the built-in ones, changed and extended by STILLROOM_ABUSE_RULES."""
    found = read_rules(Settings().abuse_rules)
    if as_json:
        print_json([rule.model_dump(mode="json") for rule in found])
        return
    print_table(_rule_table(found))


def _ban_table(found: list[Ban]) -> Table:
    table = Table(*BAN_COLUMNS)
    for ban in found:
        about = (when(ban.until), when(ban.since), ban.rule or ban.by, str(ban.level))
        table.add_row(ban.subject, *about, ban.reason)
    return table


def _rule_table(found: tuple[Rule, ...]) -> Table:
    table = Table(*RULE_COLUMNS)
    for rule in found:
        table.add_row(rule.name, _what(rule), _does(rule), rule.why)
    return table


def _what(rule: Rule) -> str:
    kinds = " or ".join(rule.kinds) + (f" at {rule.n} or more" if rule.n > 1 else "")
    counted = "" if rule.distinct == "none" else f", each of another {rule.distinct}"
    own = [f"{kind} × {count}" for kind, count in rule.each.items()]
    counted += f" that has {' or '.join(own)} of its own" if own else ""
    windows = " windows in a row with" if rule.consecutive else " ×"
    then = f", then {rule.then}" if rule.then else ""
    return (
        f"{rule.threshold}{windows} {kinds}{counted}{then}; by {rule.group_by}, in {rule.window} s"
    )


def _does(rule: Rule) -> str:
    if rule.action == "log":
        return "log"
    return f"would ban {rule.ban} s (shadow)" if rule.shadow else f"ban {rule.ban} s"
