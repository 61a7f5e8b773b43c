"""Names what a task may use of the workers' app: its room, the place for dead letters, and how to send a task."""

from __future__ import annotations

from threading import Event, Semaphore
from typing import Any, Protocol

from stillroom import Stillroom


class WorkerApp(Protocol):
    """The Celery app, as the tasks see it."""

    @property
    def room(self) -> Stillroom: ...

    @property
    def letters(self) -> Any: ...

    @property
    def threads(self) -> int: ...

    @property
    def places_to_reclaim(self) -> Semaphore: ...

    @property
    def asked_to_reclaim(self) -> Event: ...

    def task(self, body: Any, **options: Any) -> Any: ...

    def send_task(self, name: str, **options: Any) -> Any: ...
