"""The `stillroom` command."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import TextIO

import typer
from rich.console import Console
from rich.text import Text

from stillroom.cli import dead_letters, limits, sessions
from stillroom.cli.abuse import abuse, bans
from stillroom.cli.agree import agree
from stillroom.cli.check import check
from stillroom.cli.credentials import write_secrets
from stillroom.cli.doctor import doctor
from stillroom.cli.health import health
from stillroom.cli.invalidate import invalidate
from stillroom.cli.look import explain, loaders, refresh, show
from stillroom.cli.move_state import move_state
from stillroom.cli.pages import docs
from stillroom.cli.pause import pause, resume
from stillroom.cli.routes import routes
from stillroom.cli.settings import settings
from stillroom.cli.up import up
from stillroom.cli.version import version
from stillroom.cli.worker import worker
from stillroom.errors import WHO_MAY, RedisUnavailable, StillroomError
from stillroom.shown import shown

app = typer.Typer(
    help="The Redis services a web app shares, and the workers that keep them fresh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback(invoke_without_command=True)(version)
app.command()(up)
app.command()(worker)
app.command()(invalidate)
app.command()(show)
app.command()(explain)
app.command()(refresh)
app.command()(loaders)
app.command()(routes)
app.command()(pause)
app.command()(resume)
app.command()(health)
app.command()(doctor)
app.command()(agree)
app.command("move-state")(move_state)
app.command()(check)
app.command()(settings)
app.command()(docs)
app.command("secrets")(write_secrets)
app.add_typer(sessions.app, name="sessions")
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(limits.app, name="limits")
app.add_typer(bans, name="bans")
app.add_typer(abuse, name="abuse")


def main() -> None:
    """Run the command. A mistake is a sentence on stderr and exit code 2, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        _write_anything(stream)
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # `>&-`: it is None
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has seen enough
        code = _close_output()
    except OSError as error:
        _tell("can't write the output", error.strerror or str(error))
        code = _close_output() or 1
    sys.exit(code)


def _run() -> int:
    try:
        app()
    except StillroomError as error:
        if isinstance(error, RedisUnavailable) and error.lacks_right:
            _tell("not allowed", f"{error.detail}; {WHO_MAY}")
        else:
            _tell(type(error).__name__, str(error))
        return 2
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # to Click and Rich that is a failure
            raise end.__context__ from None
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _tell(what: str, sentence: str) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(Text(what, "red") + Text(f": {shown(sentence)}"), soft_wrap=True)


def _write_anything(stream: TextIO) -> None:
    r"""Let a terminal or pipe that is not UTF-8 print other characters as `\u2713` without an error."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _close_output() -> int:
    """Close stdout, because Python would flush it once more at the end and report the same error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
