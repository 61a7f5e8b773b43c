"""Beat for a container: it keeps no file, and gives a sign of life for the health check."""

from __future__ import annotations

from typing import Any

from celery import beat

from stillroom_workers.lifecycle import touch

# celery's types differ with and without stubs; as Any they look the same to mypy.
_StockScheduler: Any = beat.Scheduler


class Scheduler(_StockScheduler):  # type: ignore[misc]
    """Celery's scheduler in memory.

    Its other one remembers on disk when each task was last sent. A tick of ours comes every minute or oftener,
    may be late and may be doubled: after a restart the schedule begins anew, and there is no volume to mount, to
    lock or to find corrupt.
    """

    def tick(self, *args: Any, **kwargs: Any) -> Any:
        """Send what is due; returns the seconds until the next is."""
        if heartbeat := self.app.settings.heartbeat_file:
            touch(heartbeat)
        return super().tick(*args, **kwargs)
