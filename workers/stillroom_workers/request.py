"""What a worker knows of a task that it runs, and what it tells of it."""

from __future__ import annotations

import logging
from math import inf
from typing import Any

from celery.worker import request

_StockRequest: Any = request.Request  # Celery has no types of its own

_logger = logging.getLogger(__name__)

EVENT_LIMITS = {"traceback": 4_000, "exception": 500, "result": 500}  # characters


class Request(_StockRequest):  # type: ignore[misc]
    """A request whose events are small: whoever watches the workers keeps thousands of them.

    It counts the failures, because a process of the prefork pool tells its own of them only to this one.
    """

    # By time.monotonic(), in the worker: the machine's clock may be set while the task runs.
    began = inf

    def __init__(
        self, message: Any, *, body: Any = None, decoded: bool = False, **given: Any
    ) -> None:
        """Take what was looked at. Stock has the pool decode the message once more, as kombu's registry says."""
        if not decoded:
            body, decoded = message.payload, True
        super().__init__(message, body=body, decoded=decoded, **given)

    def on_accepted(self, pid: Any, time_accepted: float) -> None:
        self.began = time_accepted
        super().on_accepted(pid, time_accepted)

    def cancel(self, pool: Any, *args: Any, **options: Any) -> None:
        """End the task with its process. A thread has none: its task goes on, and the worker ends after it.

        Stock raises in the handler of SIGQUIT or of the second Ctrl-C, and ends with a traceback of its own.
        """
        try:
            super().cancel(pool, *args, **options)
        except NotImplementedError:
            _logger.warning(
                "Task %s[%s] can't be cut off in a thread: it is waited for", self.name, self.id
            )

    def info(self, safe: bool = True) -> Any:
        """Return what `inspect` tells of a task: how much it was given, not what, as its events do."""
        return super().info(safe=True)

    def send_event(self, type: str, **fields: Any) -> None:
        self.app.failed += type == "task-failed"
        super().send_event(
            type, **{name: _shortened(name, value) for name, value in fields.items()}
        )


def _shortened(name: str, value: Any) -> Any:
    """Return the beginning of the error, where it started, and its end, where it was raised."""
    limit = EVENT_LIMITS.get(name)
    if limit is None or not isinstance(value, str):
        return value
    # Of half a surrogate pair no page is made.
    value = value.encode(errors="backslashreplace").decode()
    if len(value) <= limit:
        return value
    half = limit // 2
    return f"{value[:half]}\n… {len(value) - 2 * half:,} characters …\n{value[-half:]}"
