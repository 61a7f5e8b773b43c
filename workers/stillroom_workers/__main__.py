"""`python -m stillroom_workers`, which is `stillroom worker`: worker and beat in one process.

Both queues, the schedule, one log, one heartbeat. A second such process is harmless: each tick may come twice.
What stands behind it goes to `celery worker`.
"""

from __future__ import annotations

import sys
from typing import Any

import celery

# celery's types differ with and without stubs; as Any they look the same to mypy.
_celery: Any = celery


def main(arguments: list[str]) -> None:
    """Run until SIGTERM or Ctrl-C. Raises SystemExit with the exit code, which Celery's own way in loses."""
    # For greenlets, before anything imports what it patches.
    _celery.maybe_patch_concurrency(arguments)
    from celery.bin.celery import celery as command

    from stillroom_workers.app import make_app
    from stillroom_workers.lifecycle import ending_the_process

    with ending_the_process():
        app = make_app()
    for option in command.params:
        option.envvar = None  # APP and BROKER_URL are what many environments have
    command.params[0].default = app
    # It would start `celery` with what stands behind this module's name, which runs nothing, and exit with 0.
    worker = command.commands["worker"]
    worker.params = [option for option in worker.params if option.name != "detach"]
    command.main(args=["worker", "--beat", "--loglevel", "INFO", *arguments], prog_name="stillroom")


if __name__ == "__main__":
    main(sys.argv[1:])
