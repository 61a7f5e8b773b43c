"""Invalidate in the background, and free the memory of what was invalidated."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import current_task

from stillroom.cache import Progress
from stillroom.cache.orders import InvalidateKeys, InvalidatePattern, InvalidateTags
from stillroom.dispatch import RECLAIM_TASK
from stillroom_workers.tasks.checked import NoArguments, Report, checked
from stillroom_workers.tasks.room import WorkerApp


def register(app: WorkerApp) -> None:
    """`stillroom.invalidate_keys`, `…_tags`, `…_pattern` take these orders; `stillroom.reclaim` takes nothing.

    All return counts. Where more is left than fits the time budget, the task sends itself again.
    """

    def invalidate_keys(order: InvalidateKeys) -> Report:
        return {"deleted": app.room.cache.invalidate(*order.keys)}

    def invalidate_tags(order: InvalidateTags) -> Report:
        app.room.cache.invalidate_by_tag(*order.tags, soft=order.soft)
        return reclaim()

    def invalidate_pattern(order: InvalidatePattern) -> Report:
        app.room.cache.invalidate_by_pattern(order.pattern)
        return reclaim()

    def reclaim() -> Report:
        report: Report = app.room.upkeep.reclaim(progress=partial(tell, current_task))
        if report["due"]:
            app.send_task(RECLAIM_TASK)
        return report

    def trim_indexes() -> Report:
        return app.room.upkeep.trim_indexes()

    bodies = {
        "stillroom.invalidate_keys": checked(InvalidateKeys, invalidate_keys),
        "stillroom.invalidate_tags": checked(InvalidateTags, invalidate_tags),
        "stillroom.invalidate_pattern": checked(InvalidatePattern, invalidate_pattern),
        "stillroom.trim_indexes": checked(NoArguments, lambda _: trim_indexes()),
        RECLAIM_TASK: checked(NoArguments, lambda _: reclaim()),
    }
    for name, body in bodies.items():
        app.task(body, name=name, ignore_result=False)


def tell(task: Any, progress: Progress) -> None:
    """Celery's PROGRESS: kept where there is a result backend, and shown by whoever listens to events."""
    counts = progress.model_dump(include={"seen", "deleted", "refreshed", "total"})
    task.update_state(state="PROGRESS", meta=counts)
    task.send_event("task-progress", **counts)
