"""`python -m stillroom_workers`, which is `stillroom worker`: worker and beat in one process.

Both queues, the schedule, one log, one heartbeat. A second such process is harmless: each tick may come twice.
What stands behind it goes to `celery worker`.
"""

from __future__ import annotations

import sys
from typing import Any

from celery.bin import celery

from stillroom_workers.app import make_app
from stillroom_workers.beat import Beat
from stillroom_workers.lifecycle import ending_the_process

# celery's types differ with and without stubs; as Any they look the same to mypy.
_command: Any = celery.celery


def main(arguments: list[str]) -> None:
    """Run until SIGTERM or Ctrl-C. Raises SystemExit with the exit code, which Celery's own way in loses."""
    with ending_the_process():
        app = make_app()
    app.steps["worker"].add(Beat)
    app.signs.with_beat = True
    for option in _command.params:
        option.envvar = None  # APP and BROKER_URL are what many environments have
    _command.params[0].default = app
    _command.main(args=["worker", "--loglevel", "INFO", *arguments], prog_name="stillroom")


if __name__ == "__main__":
    main(sys.argv[1:])
