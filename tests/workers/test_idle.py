"""A worker and beat that have nothing to do ask little of Redis."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.celery_process import CeleryProcess

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

WATCHED_S = 30.0
# Commands a second, measured over minutes: 12.0. A half minute has some ticks of the schedule more or fewer.
MOST = 14.0


def test_idle_workers_and_beat_send_few_commands(
    db: Any,
    start: Callable[..., CeleryProcess],
    start_worker: Callable[..., CeleryProcess],
) -> None:
    """A worker and beat without work send about twelve commands a second together, scripts' own not counted."""
    start_worker()
    beat = start("beat", "--pidfile=")
    beat.await_line("Scheduler: Sending due task", 60)
    sent: Counter[str] = Counter()
    with db.monitor() as monitor:
        began = time.monotonic()
        for seen in monitor.listen():
            if time.monotonic() - began > WATCHED_S:
                break
            if seen["client_type"] != "lua":
                sent[seen["command"].split()[0].upper()] += 1
    assert sent["BRPOP"] > 10, sent  # it was listened to
    assert sum(sent.values()) / WATCHED_S < MOST, sent
