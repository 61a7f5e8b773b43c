"""Keep the record of invalidations short."""

from __future__ import annotations

from stillroom_workers.tasks.checked import NoArguments, register_task
from stillroom_workers.tasks.worker_app import WorkerApp


def register(app: WorkerApp) -> None:
    """Register `stillroom.trim_marks`: no arguments. It returns how many marks were dropped, and are left."""
    register_task(app, "stillroom.trim_marks", NoArguments, lambda _: app.room.upkeep.trim_marks())
