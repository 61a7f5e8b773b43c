"""Defines the class that all tasks of the workers are made from."""

from __future__ import annotations

from typing import Any

from celery.app import task

# celery's types differ with and without stubs; as Any they look the same to mypy.
_StockTask: Any = task.Task


class Task(_StockTask):  # type: ignore[misc]
    """A task whose events are small, and whose refusals are no surprise."""

    abstract = True
    Request = "stillroom_workers.guards:Request"
