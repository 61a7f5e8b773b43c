"""A span for each task, inside the span of the read that asked for it: where OpenTelemetry is on."""

from __future__ import annotations

from contextlib import ExitStack
from threading import get_ident
from typing import Any

from celery import signals

from stillroom_workers.hygiene import CARRIED


def tell_of_tasks(app: Any) -> None:
    """Open a span when a task begins, and close it when it has ended."""
    if not app.settings.otel:
        return
    from stillroom import otel

    def begin(task_id: str, task: Any, **_: Any) -> None:
        if task.app is app:
            stack = ExitStack()
            given = {name: getattr(task.request, name, None) for name in CARRIED}
            stack.enter_context(otel.task(app.room.watch, task.name, given))
            running[task_id, get_ident()] = stack

    def end(task_id: str, **_: Any) -> None:
        stack = running.pop((task_id, get_ident()), None)
        if stack is not None:
            stack.close()

    # A message that is delivered again may run beside its first run, under one id.
    running: dict[tuple[str, int], ExitStack] = {}
    signals.task_prerun.connect(begin, weak=False)
    signals.task_postrun.connect(end, weak=False)
