"""Beat for a container, or in a thread of a worker: it keeps no file."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from datetime import timedelta
from typing import Any

from celery import beat, bootsteps
from celery.worker import state
from kombu.exceptions import OperationalError

import redis
from stillroom.shown import shown
from stillroom_workers import rabbit

log = logging.getLogger("stillroom.workers")

STOPS_WITHIN_S = 5.0
LOOKS_EVERY_S = 1.0  # in a worker, which does not want to wait longer for it to stop
STEP_S = 1.0  # what a clock goes back by at least when it is set, and not only slowed down

# What a broker's trouble is raised as.
AWAY = (OperationalError, redis.RedisError, OSError, *rabbit.ERRORS)

# celery's types differ with and without stubs; as Any they look the same to mypy.
_StockScheduler: Any = beat.Scheduler
_StockStep: Any = bootsteps.StartStopStep
_StockService: Any = beat.Service
_worker_state: Any = state


class Scheduler(_StockScheduler):  # type: ignore[misc]
    """Celery's scheduler in memory.

    Its other one remembers on disk when each task was last sent. A tick of ours comes every minute or oftener,
    may be late and may be doubled: after a restart the schedule begins anew, and there is no volume to mount, to
    lock or to find corrupt.
    """

    _offset = -math.inf  # from the monotonic clock to the machine's at the last tick, seconds

    def tick(self, *args: Any, **kwargs: Any) -> Any:
        """Send what is due; returns the seconds until the next is.

        Where RabbitMQ refuses the login, beat tries again later, as with Redis. Stock ends with a traceback.
        """
        self._follow_clock()
        try:
            return super().tick(*args, **kwargs)
        except rabbit.ERRORS as error:
            why = shown(repr(error), 200)
            log.error("beat: the broker refuses the connection (%s); it is tried again", why)
            return self.max_interval

    def apply_async(self, entry: Any, **options: Any) -> Any:
        """Send a tick. One line tells that the broker took none; stock writes out two stacks, for each tick."""
        try:
            return super().apply_async(entry, **options)
        except beat.SchedulingError as error:
            if not isinstance(error.__context__, AWAY):
                raise
            why = shown(repr(error.__context__), 200)
            log.error(
                "the tick %s could not be sent (%s); the next is sent when it is due",
                entry.name,
                why,
            )
            return None

    def _follow_clock(self) -> None:
        """Set the schedule back with the machine's clock. Stock sends nothing until the clock has caught up."""
        offset = self.app.now().timestamp() - time.monotonic()
        step, self._offset = offset - self._offset, offset
        if step < -STEP_S:
            for entry in self.schedule.values():
                entry.last_run_at += timedelta(seconds=step)
            self._heap = None  # it is made anew from the entries


class Beat(_StockStep):  # type: ignore[misc]
    """Beat in a thread of the worker, as `celery worker -B` asks. If it ends, the worker does: half a system that
    looks alive helps nobody. Stock starts a process, whose signs of life would pass for the worker's.
    """

    requires = ("celery.worker.components:Pool",)
    conditional = True

    def __init__(self, worker: Any, beat: bool = False, **options: Any) -> None:
        super().__init__(worker, beat=beat, **options)
        self.enabled = worker.app.signs.with_beat = beat
        self._service: Any = None
        self._thread: threading.Thread | None = None

    def start(self, worker: Any) -> None:
        app = worker.app
        self._service = _StockService(
            app,
            max_interval=LOOKS_EVERY_S,
            scheduler_cls=worker.scheduler,
            remote_control=False,  # the worker's own answers for this process
        )
        self._thread = threading.Thread(target=self._run, name="stillroom beat", daemon=True)
        self._thread.start()

    def stop(self, worker: Any) -> None:
        if self._service is not None:
            self._service.stop()
        if self._thread is not None:
            self._thread.join(STOPS_WITHIN_S)

    terminate = stop

    def _run(self) -> None:
        try:
            self._service.start()
        except BaseException as error:
            log.critical("beat ended, and the worker ends with it: %s", shown(repr(error), 200))
            _worker_state.should_stop = os.EX_SOFTWARE
