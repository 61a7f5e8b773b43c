"""The `stillroom` command."""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.markup import escape

from stillroom.cli import limits, sessions
from stillroom.cli.abuse import abuse, bans
from stillroom.cli.agree import agree
from stillroom.cli.check import check
from stillroom.cli.credentials import write_secrets
from stillroom.cli.doctor import doctor
from stillroom.cli.health import health
from stillroom.cli.invalidate import invalidate
from stillroom.cli.look import explain, loaders, show
from stillroom.cli.pause import pause, resume
from stillroom.cli.routes import routes
from stillroom.cli.settings import settings
from stillroom.cli.up import up
from stillroom.cli.version import version
from stillroom.errors import StillroomError

app = typer.Typer(
    help="The Redis services a web app shares, and the workers that keep them fresh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback(invoke_without_command=True)(version)
app.command()(up)
app.command()(invalidate)
app.command()(show)
app.command()(explain)
app.command()(loaders)
app.command()(routes)
app.command()(pause)
app.command()(resume)
app.command()(health)
app.command()(doctor)
app.command()(agree)
app.command()(check)
app.command()(settings)
app.command("secrets")(write_secrets)
app.add_typer(sessions.app, name="sessions")
app.add_typer(limits.app, name="limits")
app.add_typer(bans, name="bans")
app.add_typer(abuse, name="abuse")


def main() -> None:
    """Run the command. A mistake is a sentence on stderr and exit code 2, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except StillroomError as error:
        console = Console(stderr=True, highlight=False)
        console.print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}")
        sys.exit(2)
