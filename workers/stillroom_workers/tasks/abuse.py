"""Log what looks like abuse, and ban for it."""

from __future__ import annotations

from stillroom.abuse import LOG_TASK
from stillroom_workers.tasks.checked import NoArguments, Report, register_task
from stillroom_workers.tasks.health import ask_to_tell
from stillroom_workers.tasks.worker_app import WorkerApp


def register(app: WorkerApp) -> None:
    """Register `stillroom.log_abuse`: no arguments. It returns events, patterns, bans, aside, late, done."""

    def log_abuse() -> Report:
        report: Report = app.room.upkeep.scan_abuse()
        if report["patterns"]:
            ask_to_tell(app)
        return report

    register_task(app, LOG_TASK, NoArguments, lambda _: log_abuse())
