"""Load stale values again."""

from __future__ import annotations

import logging
from collections import Counter

from stillroom.dispatch import (
    REFRESH_MANY_TASK,
    REFRESH_TASK,
    RefreshOrder,
    RefreshOrders,
)
from stillroom_workers.tasks.checked import Report, register_task
from stillroom_workers.tasks.room import WorkerApp

log = logging.getLogger("stillroom.workers")


def register(app: WorkerApp) -> None:
    """`stillroom.refresh` takes one RefreshOrder, `stillroom.refresh_many` up to a hundred.

    An error of a loader is the single task's failure, seen in Flower; among many it is logged and counted, and the
    others are loaded all the same.
    """

    def refresh(order: RefreshOrder) -> Report:
        return app.room.cache.refresh(order)

    def refresh_many(message: RefreshOrders) -> Report:
        return {"outcomes": dict(Counter(map(outcome, message.orders)))}

    def outcome(order: RefreshOrder) -> str:
        try:
            return str(refresh(order)["outcome"])
        except Exception as error:
            log.error("refresh of %.100r by %r failed: %r", order.key, order.loader, error)
            return "failed"

    register_task(app, REFRESH_TASK, RefreshOrder, refresh)
    register_task(app, REFRESH_MANY_TASK, RefreshOrders, refresh_many)
