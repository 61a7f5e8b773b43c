"""A worker that stops for good after reporting a pattern: bans are written, nothing is acknowledged."""

from __future__ import annotations

import logging
import threading

import redis
from stillroom_workers.app import make_app

app = make_app()


class Stuck(logging.Handler):
    """Tells the test, and never returns."""

    def emit(self, record: logging.LogRecord) -> None:
        redis.Redis.from_url(app.settings.redis_url).rpush("db:stuck", record.getMessage())
        threading.Event().wait()


logging.getLogger("stillroom.abuse").addHandler(Stuck())
