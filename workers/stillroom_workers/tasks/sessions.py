"""Delete the sessions that have ended."""

from __future__ import annotations

from typing import Any

from stillroom.sessions import SWEEP_TASK
from stillroom_workers.tasks.checked import NoArguments, register_task
from stillroom_workers.tasks.room import WorkerApp


def register(app: WorkerApp) -> None:
    """`stillroom.sweep_sessions`: no arguments. Returns its report: expired, deleted, lag_s, done."""

    def sweep_sessions() -> dict[str, Any]:
        return app.room.upkeep.sweep_sessions()

    register_task(app, SWEEP_TASK, NoArguments, lambda _: sweep_sessions())
