"""Order what is to be loaded again at set times."""

from __future__ import annotations

from stillroom.cache.warm import WARM_TASK
from stillroom_workers.tasks.checked import NoArguments, Report, register_task
from stillroom_workers.tasks.worker_app import WorkerApp


def register(app: WorkerApp) -> None:
    """Register `stillroom.warm`: no arguments. It returns how many loaders were due, and values ordered."""

    def warm() -> Report:
        upkeep = app.room.upkeep
        return {"outcome": "paused"} if upkeep.refreshes_are_paused() else upkeep.warm()

    register_task(app, WARM_TASK, NoArguments, lambda _: warm())
