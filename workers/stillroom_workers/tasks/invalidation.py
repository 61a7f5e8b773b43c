"""Invalidate in the background, and free the memory of what was invalidated."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import current_task

from stillroom.cache import Progress
from stillroom.cache.orders import InvalidateKeys, InvalidatePattern, InvalidateTags
from stillroom.dispatch import RECLAIM_TASK
from stillroom_workers.tasks.checked import NoArguments, Report, register_task
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

    def task(name: str, model: Any, work: Any) -> None:
        register_task(app, name, model, work, ignore_result=False)

    task("stillroom.invalidate_keys", InvalidateKeys, invalidate_keys)
    task("stillroom.invalidate_tags", InvalidateTags, invalidate_tags)
    task("stillroom.invalidate_pattern", InvalidatePattern, invalidate_pattern)
    task("stillroom.trim_indexes", NoArguments, lambda _: trim_indexes())
    task(RECLAIM_TASK, NoArguments, lambda _: reclaim())


def tell(task: Any, progress: Progress) -> None:
    """Celery's PROGRESS: kept where there is a result backend, and shown by whoever listens to events."""
    counts = progress.model_dump(include={"seen", "deleted", "refreshed", "total"})
    task.update_state(state="PROGRESS", meta=counts)
    task.send_event("task-progress", **counts)
