"""`stillroom worker`: all background work in one process."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from stillroom.cli.stack import MODULE, WORKERS


def worker(
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000, help="How many threads load. Default: STILLROOM_WORKER_THREADS."
        ),
    ] = None,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Do all background work in one process: take tasks from both queues, and send the ticks of the schedule.

    For places where one process is enough; a second one does no harm. SIGTERM or Ctrl-C lets running tasks end.
    """
    options = ["--loglevel", log_level, *(["--concurrency", str(threads)] if threads else [])]
    command = [*MODULE, WORKERS, *options]
    sys.stdout.flush()
    # Signals reach the worker itself, and no parent waits beside it.
    os.execv(sys.executable, command)
