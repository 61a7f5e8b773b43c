"""Delete the sessions that have ended."""

from __future__ import annotations

from stillroom.sessions import SWEEP_TASK
from stillroom_workers.tasks.checked import NoArguments, register_task
from stillroom_workers.tasks.worker_app import WorkerApp


def register(app: WorkerApp) -> None:
    """Register `stillroom.sweep_sessions`: no arguments. It returns expired, deleted, lag_s, done."""
    register_task(app, SWEEP_TASK, NoArguments, lambda _: app.room.upkeep.sweep_sessions())
