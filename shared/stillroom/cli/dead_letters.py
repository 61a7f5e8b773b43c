"""`stillroom dead-letters`: what could not be done, why, and sending it again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from stillroom.acts import teach_messages
from stillroom.cli.tables import AsJson, Table, open_room, print_json, print_table, when
from stillroom.dead_letters import LETTERS_LIMIT, PAGE, DeadLetter
from stillroom.errors import DeadLetterRefused, NoDeadLetter
from stillroom.shown import plural, shown

app = typer.Typer(help="List dead letters, send them again, or drop them.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(help="As `list` shows it.")]
Ids = Annotated[list[str], typer.Argument(help="As `list` shows them.")]
IdsOrNone = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID]...", help="As `list` shows them.", show_default=False),
]
Everything = Annotated[bool, typer.Option("--all", help="All dead letters that there are now.")]
COLUMNS = ("id", "when", "kind", "what", "tries", "reason")
WHAT_LENGTH, REASON_LENGTH = 60, 120  # characters in the list


@app.command("list")
def show_all(
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many.")] = PAGE,
    after: Annotated[str, typer.Option(help="Show only those after this id.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the dead letters, the oldest first."""
    with open_room() as room:
        letters = room.state.run(room.dead_letters.list(limit, after=after))
        total = room.state.run(room.dead_letters.count())
    if as_json:
        print_json([_as_json(letter) for letter in letters])
        return
    table = Table(*COLUMNS)
    for letter in letters:
        what, why = shown(_what(letter), WHAT_LENGTH), shown(letter.reason, REASON_LENGTH)
        table.add_row(letter.id, when(letter.when), letter.kind, what, str(letter.tries), why)
    print_table(table)
    typer.echo(f"{len(letters):,} of {plural(total, 'dead letter')}")


@app.command()
def show(id: Id, as_json: AsJson = False) -> None:
    """Show one letter with all that was kept of it. It may hold what an app put into its arguments."""
    with open_room() as room:
        letter = room.state.run(room.dead_letters.show(id))
    if as_json:
        print_json(_as_json(letter))
        return
    table = Table("", "", show_header=False)
    facts = {
        "id": letter.id,
        "when": f"{when(letter.when)} UTC",
        "kind": letter.kind,
        "tries": str(letter.tries),
        "reason": letter.reason,
        "body": letter.body + (f" … {letter.cut:,} bytes were not kept" if letter.cut else ""),
    }
    for name, fact in facts.items():
        table.add_row(name, fact)
    print_table(table)


@app.command()
def retry(ids: IdsOrNone = None, everything: Everything = False, as_json: AsJson = False) -> None:
    """Send the work of these letters again, and drop them. It may end here once more, as a new letter.

    With --all a letter that can't be sent stays, with its reason on stderr, and the exit code is 1.
    """
    if everything == bool(ids):
        raise typer.BadParameter("say which: ID, or --all and nothing else")
    sent: list[str] = []
    refused: dict[str, str] = {}
    try:
        with open_room() as room:
            teach_messages(room)
            if everything:
                there = room.state.run(room.dead_letters.list(LETTERS_LIMIT))
                ids = [letter.id for letter in there]
            for one in ids or []:
                try:
                    room.state.run(room.dead_letters.retry(one))
                    sent.append(one)
                except (DeadLetterRefused, NoDeadLetter) as error:
                    if not everything:
                        raise
                    refused[one] = str(error)
    finally:
        # Not before all is sent: whoever reads stdout may go away, and the command ends with it.
        _tell(() if as_json else sent, refused.values())
    if everything and not (sent or refused or as_json):
        typer.echo("there are no dead letters")
    if as_json:
        told = {"retried": sent}
        print_json(told | {"refused": refused} if everything else told)
    if refused:
        raise typer.Exit(1)


def _tell(sent: Iterable[str], refused: Iterable[str]) -> None:
    for why in refused:
        typer.echo(shown(why), err=True)
    for one in sent:
        typer.echo(f"{shown(one)} is sent again")


@app.command()
def drop(ids: Ids, as_json: AsJson = False) -> None:
    """Delete these letters: what they asked for is not done."""
    with open_room() as room:
        dropped = room.state.run(room.dead_letters.drop(*ids))
    print_json({"dropped": dropped}) if as_json else typer.echo(f"{dropped} dropped")


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    fields = {name: getattr(letter, name) for name in ("id", "kind", "reason", "tries", "cut")}
    return fields | {"when": letter.when, "body": _body(letter)}


def _body(letter: DeadLetter) -> Any:
    """Return the body as it is where it is JSON that can be shown as JSON, else as text.

    A sender may have nested it too deep for Python, and Python reads NaN and 1e999, which JSON has not.
    """
    try:
        body = json.loads(letter.body)
        json.dumps([[[body]]], indent=2, allow_nan=False)  # as deep as it is in a list of letters
    except (ValueError, RecursionError):
        return letter.body
    return body


def _what(letter: DeadLetter) -> str:
    """Return the name of the task or order, and of the loader."""
    body = _body(letter)
    if not isinstance(body, dict):
        return letter.body
    given = body.get("fields" if "order" in body else "kwargs")
    loader = (given if isinstance(given, dict) else body).get("loader")
    named = [body.get("order") or body.get("task") or body.get("kind"), loader]
    return " ".join(str(name) for name in named if name) or f"no task in {body.get('queue')}"
