"""`python -m stillroom_workers`, which is `stillroom worker`: worker and beat in one process.

Both queues, the schedule, one log, one heartbeat. A second such process is harmless: each tick may come twice.
What stands behind it goes to `celery worker`.
"""

from __future__ import annotations

import sys

from stillroom_workers.app import make_app
from stillroom_workers.beat import Beat
from stillroom_workers.lifecycle import ending_the_process


def main(arguments: list[str]) -> int:
    """Run until SIGTERM or Ctrl-C; returns the exit code."""
    with ending_the_process():
        app = make_app()
    app.steps["worker"].add(Beat)
    app.signs.with_beat = True
    return app.worker_main(["worker", "--loglevel", "INFO", *arguments]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
