"""What a task may use of its app: the room of its process."""

from __future__ import annotations

from typing import Any, Protocol

from stillroom import Stillroom


class WorkerApp(Protocol):
    """The Celery app, as the tasks see it."""

    @property
    def room(self) -> Stillroom: ...

    def task(self, body: Any, *, name: str, ignore_result: bool = True) -> Any: ...

    def send_task(self, name: str, **options: Any) -> Any: ...
