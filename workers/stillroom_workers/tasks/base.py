"""Defines the class that all tasks of the workers are made from."""

from __future__ import annotations

from typing import Any

from celery.app import task

# celery's types differ with and without stubs; as Any they look the same to mypy.
_StockTask: Any = task.Task


class Task(_StockTask):  # type: ignore[misc]
    """A task whose events are small, and whose refusals are no surprise."""

    abstract = True
    Request = "stillroom_workers.request:Request"

    def __call__(self, /, *args: Any, **fields: Any) -> Any:
        """Run the task. A field called `self`, which no order has, is the task's to refuse, not Celery's."""
        if "self" in fields:
            return self.run(*args, **fields)
        return super().__call__(*args, **fields)
