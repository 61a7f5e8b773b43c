"""Invalidate in the background, and free the memory of what was invalidated."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from celery import current_task
from celery.exceptions import Reject

from stillroom import RedisUnavailable
from stillroom.cache import Progress
from stillroom.cache.orders import InvalidateKeys, InvalidatePattern, InvalidateTags, Order
from stillroom.dispatch import RECLAIM_TASK
from stillroom.errors import REFUSED_FOR_GOOD
from stillroom_workers.tasks.checked import NoArguments, Report, register_task
from stillroom_workers.tasks.worker_app import WorkerApp

log = logging.getLogger("stillroom.workers")

# What a process of the pool was doing when it was killed is sent again: what else is lost is found by its schedule.
# Not for ever: it may have killed that process.
IF_LOST = {"retry_on_worker_lost": True, "default_retry_delay": 1, "max_retries": 3}
SENT_AGAIN_AFTER_S = 1.0  # an order that can't be written down holds a thread for this long


def register(app: WorkerApp) -> None:
    """`stillroom.invalidate_keys`, `…_tags`, `…_pattern` take these orders; `stillroom.reclaim` takes nothing.

    All return counts, or that half of the threads are at it. Where more is left than fits the time budget, the task
    sends itself again. An order that finds the cache's Redis away is written down, and a later reclaim carries it
    out: its message is gone by then. Where it can't be written down either, its task is sent again, once a second.
    """

    def invalidate_keys(order: InvalidateKeys) -> Report:
        with written_down_if_away(order) as report:
            report["deleted"] = app.room.cache.invalidate(*order.keys)
        return report

    def invalidate_tags(order: InvalidateTags) -> Report:
        with written_down_if_away(order) as report:
            app.room.cache.invalidate_by_tag(*order.tags, soft=order.soft)
        return report or reclaim(app)

    def invalidate_pattern(order: InvalidatePattern) -> Report:
        with written_down_if_away(order) as report:
            app.room.cache.invalidate_by_pattern(order.pattern)
        return report or reclaim(app)

    @contextmanager
    def written_down_if_away(order: Order) -> Iterator[Report]:
        """Give the task its report, which tells that the order is left if it had to be written down."""
        report: Report = {}
        try:
            yield report
        except RedisUnavailable as error:
            log.warning("%s waits until the cache's Redis is back: %s", order.kind, error)
            keep(app, order)
            report |= {"deleted": 0, "left": 1}

    def task(name: str, model: Any, work: Any, **options: Any) -> None:
        register_task(app, name, model, work, ignore_result=False, **options)

    task("stillroom.invalidate_keys", InvalidateKeys, invalidate_keys, **IF_LOST)
    task("stillroom.invalidate_tags", InvalidateTags, invalidate_tags, **IF_LOST)
    task("stillroom.invalidate_pattern", InvalidatePattern, invalidate_pattern, **IF_LOST)
    task("stillroom.trim_indexes", NoArguments, lambda _: app.room.upkeep.trim_indexes())
    task(RECLAIM_TASK, NoArguments, lambda _: reclaim(app))


def reclaim(app: WorkerApp) -> Report:
    """Do what is due, and send the task again if more is. Where half of the threads are at that, end at once.

    Those may have looked for orders already, so the first of them to end sends the task for this one.
    """
    places = app.places_to_reclaim
    if not places.acquire(blocking=False):
        app.asked_to_reclaim.set()
        # The last of them may have ended between these two lines, and have seen that nobody asked.
        if not places.acquire(blocking=False):
            return {"outcome": "others are at it"}
    try:
        report: Report = app.room.upkeep.reclaim(progress=partial(tell, current_task))
    finally:
        places.release()
    if app.asked_to_reclaim.is_set() or report["due"]:
        app.asked_to_reclaim.clear()
        app.send_task(RECLAIM_TASK)
    return report


def keep(app: WorkerApp, order: Order) -> None:
    """Write the order down, or send it again where the state's Redis is away, too."""
    try:
        app.room.upkeep.order(order)
    except RedisUnavailable as error:
        if error.reason in REFUSED_FOR_GOOD:
            raise
        time.sleep(SENT_AGAIN_AFTER_S)
        _send_again(app, order)


def _send_again(app: WorkerApp, order: Order) -> None:
    try:
        app.send_task(f"stillroom.{order.kind}", kwargs=order.model_dump())
    except Exception as error:  # kombu's, redis-py's and the socket's: the broker is away, too
        raise Reject(error, requeue=True) from error


def tell(task: Any, progress: Progress) -> None:
    """Tell Celery's PROGRESS, which a result backend keeps, and whoever listens to events shows."""
    counts = progress.model_dump(include={"seen", "deleted", "refreshed", "total"})
    task.update_state(state="PROGRESS", meta=counts)
    task.send_event("task-progress", **counts)
