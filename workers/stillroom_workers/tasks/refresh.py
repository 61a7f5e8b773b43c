"""Load a stale value again."""

from __future__ import annotations

from stillroom.dispatch import REFRESH_TASK, RefreshOrder
from stillroom_workers.tasks.checked import Report, checked
from stillroom_workers.tasks.room import WorkerApp


def register(app: WorkerApp) -> None:
    """`stillroom.refresh`: one RefreshOrder. An error of the loader is the task's failure, seen in Flower."""

    def refresh(order: RefreshOrder) -> Report:
        return app.room.cache.refresh(order)

    app.task(checked(RefreshOrder, refresh), name=REFRESH_TASK)
