"""Load stale values again."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from celery import signals
from celery.concurrency.thread import TaskPool

from stillroom.dispatch import (
    REFRESH_MANY_TASK,
    REFRESH_TASK,
    RefreshOrder,
    RefreshOrders,
)
from stillroom_workers.crew import Alone, Crew, Hands
from stillroom_workers.tasks.checked import Report, checked
from stillroom_workers.tasks.room import WorkerApp

log = logging.getLogger("stillroom.workers")


def register(app: WorkerApp) -> None:
    """`stillroom.refresh` takes one RefreshOrder, `stillroom.refresh_many` up to a hundred.

    An error of a loader is the single task's failure, seen in Flower; among many it is logged and counted, and the
    others are loaded all the same.
    """
    refreshing = Refreshing(app)
    signals.worker_ready.connect(refreshing.meet, weak=False)
    app.task(checked(RefreshOrder, refreshing.one), name=REFRESH_TASK)
    app.task(checked(RefreshOrders, refreshing.many), name=REFRESH_MANY_TASK)


class Refreshing:
    """The work of both tasks."""

    def __init__(self, app: WorkerApp) -> None:
        self._app = app
        self._hands: Hands[RefreshOrder] = Alone(self._pass_on)

    def meet(self, sender: Any, **_: Any) -> None:
        """The worker is ready: now it is known whether it has threads. A child of prefork has none."""
        pool = sender.pool
        if sender.app is self._app and (isinstance(pool, TaskPool) or pool.is_green):
            self._hands = Crew(pool.limit)

    def one(self, order: RefreshOrder) -> Report:
        """Returns its report: outcome, loader, key."""
        return self._hands.one(self._app.room.cache.refresh, order)

    def many(self, message: RefreshOrders) -> Report:
        """Returns how many orders had which outcome. One that was passed on is another task's."""
        outcomes: list[str] = []
        self._hands.each(lambda order: outcomes.append(self._outcome(order)), message.orders)
        passed_on = len(message.orders) - len(outcomes)
        counts = Counter(outcomes) + Counter({"passed on": passed_on})
        return {"outcomes": dict(counts)}

    def _outcome(self, order: RefreshOrder) -> str:
        try:
            return str(self._app.room.cache.refresh(order)["outcome"])
        except Exception as error:
            log.error("refresh of %.100r by %r failed: %r", order.key, order.loader, error)
            return "failed"

    def _pass_on(self, order: RefreshOrder) -> None:
        self._app.send_task(REFRESH_TASK, kwargs=order.model_dump(), retry=False)
