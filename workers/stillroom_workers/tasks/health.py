"""Keep a snapshot of how everything is, for charts and for whoever asks what happened last night."""

from __future__ import annotations

from typing import Any

from stillroom.health import SNAPSHOT_TASK
from stillroom_workers.tasks.checked import NoArguments, register_task
from stillroom_workers.tasks.room import WorkerApp


def register(app: WorkerApp) -> None:
    """`stillroom.snapshot_health`: no arguments. Returns its status, findings and error."""

    def snapshot_health() -> dict[str, Any]:
        return app.room.health.snapshot().model_dump(include={"status", "findings", "error"})

    register_task(app, SNAPSHOT_TASK, NoArguments, lambda _: snapshot_health())
