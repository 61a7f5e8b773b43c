"""Keeps results where a place for them is named. No work waits for that place, or depends on it."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

from stillroom import Settings
from stillroom.broker import broker_tls, sentinel_options
from stillroom.shown import shown

log = logging.getLogger("stillroom.workers")

RESULT_TTL_S = 3_600
TRIED_AGAIN_AFTER_S = 5.0  # until then no thread waits for a place that has just failed


def results_configuration(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings for results.

    None are kept unless a place for them is named: what a task did is in Redis, in the log, and in Flower's events.
    Redis forgets them by itself: on a server that evicts nothing they would fill it.
    """
    place = settings.result_backend
    patience = {"max_retries": 2, "interval_start": 0.5, "interval_step": 0.5, "interval_max": 1}
    return {
        "task_ignore_result": True,
        "result_backend": settings.results,
        "result_expires": RESULT_TTL_S if settings.results else None,
        "result_backend_transport_options": {
            "retry_policy": patience,
            **sentinel_options(settings, place),
        },
        "redis_backend_use_ssl": broker_tls(settings, place),
        "redis_socket_timeout": 2.0,  # stock waits for two minutes, and that twenty times
        "redis_socket_connect_timeout": 1.0,
    }


def sparing(backend: Any) -> Any:
    """Return the backend as one that logs a result it can't keep.

    Stock raises. Celery stores the state STARTED *before* it calls a task, so the task fails without having run,
    and its message is acknowledged: an invalidation is lost because another server is full.
    """
    backend.__class__ = _that_spares(type(backend))
    return backend


def _that_spares(stock: Any) -> Any:
    class Sparing(stock):  # type: ignore[misc]
        def store_result(self, task_id: Any, result: Any, *args: Any, **options: Any) -> Any:
            if monotonic() < getattr(self.app, "results_fail_until", 0.0):
                return result
            try:
                return super().store_result(task_id, result, *args, **options)
            except Exception as error:
                self.app.results_fail_until = monotonic() + TRIED_AGAIN_AFTER_S
                why = shown(repr(error), 200)
                log.error(
                    "the result of task %s could not be kept (%s); the work goes on, and no result is kept "
                    "for %g s: look at STILLROOM_RESULT_BACKEND",
                    task_id,
                    why,
                    TRIED_AGAIN_AFTER_S,
                )
            return result

    return Sparing
