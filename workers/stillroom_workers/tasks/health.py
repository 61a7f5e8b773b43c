"""Keep a snapshot of how everything is, for charts and for whoever asks what happened last night; tell of it."""

from __future__ import annotations

from typing import Any

from stillroom.health import SNAPSHOT_TASK, WEBHOOK_TASK
from stillroom_workers.tasks.checked import NoArguments, register_task
from stillroom_workers.tasks.worker_app import WorkerApp


def register(app: WorkerApp) -> None:
    """Register `stillroom.snapshot_health` and `stillroom.tell_webhook`, which take no arguments.

    The first returns the snapshot's status, findings and error; the second how many events it told. It is sent
    behind each snapshot, and behind each scan that found a pattern, where there is a webhook.
    """

    def snapshot_health() -> dict[str, Any]:
        snapshot = app.room.upkeep.snapshot()
        ask_to_tell(app)
        return snapshot.model_dump(include={"status", "findings", "error"})

    register_task(app, SNAPSHOT_TASK, NoArguments, lambda _: snapshot_health())
    register_task(app, WEBHOOK_TASK, NoArguments, lambda _: app.room.upkeep.tell_webhook())


def ask_to_tell(app: WorkerApp) -> None:
    """Have what happened told outside, by a task of its own: an address that hangs holds up no other work."""
    if app.room.settings.webhook_url is not None:
        app.send_task(WEBHOOK_TASK)
