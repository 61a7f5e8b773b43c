"""Reports, with a worker's signs of life, its queues, its threads and the tasks it has done."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from celery import signals
from celery.worker import state

from stillroom.health import WorkerStats

RATE_OVER_S = 60.0
SAMPLES_MOST = 60  # signs of life come every few seconds


class Working:
    """Counts the tasks of this process; knows its queues and threads from when it is ready."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._began = time.monotonic()
        self._pool: Any = None
        self._ended: deque[tuple[float, int]] = deque(maxlen=SAMPLES_MOST)  # (when, how many)
        signals.worker_ready.connect(self._meet, weak=False)

    def about(self) -> WorkerStats:
        """Return the figures of this worker as they are now."""
        now, busy = time.monotonic(), len(state.active_requests)
        done = max(0, state.all_total_count[0] - busy)
        queues = getattr(self._app.amqp.queues, "consume_from", {})
        return WorkerStats(
            queues=tuple(sorted(queues)),
            threads=getattr(self._pool, "num_processes", None),
            busy=busy,
            up_s=round(now - self._began, 1),
            done=done,
            failed=self._app.failed,
            per_min=self._per_minute(now, done),
        )

    def _per_minute(self, now: float, done: int) -> float | None:
        """Return the rate of the last minute, or since the first sign of life if that is shorter."""
        self._ended.append((now, done))
        while now - self._ended[0][0] > RATE_OVER_S and len(self._ended) > 2:
            self._ended.popleft()
        since, before = self._ended[0]
        return round((done - before) * 60 / (now - since), 1) if now > since else None

    def _meet(self, sender: Any, **_: Any) -> None:
        if sender.app is self._app:
            self._pool = sender.pool
