"""The project's own Celery app, in the process of our worker.

A loader may call a task of the project. `@app.task` knows its app; `@shared_task` asks Celery which app is
current, and in a worker that is the app the worker was started with: ours, which has no such task. So the
project's app is made the current one where loaders run. Which one is it? The one that is current when the
loaders have been imported, as it is in the project's own processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import _state
from celery.app.registry import TaskRegistry
from celery.exceptions import NotRegistered

# The library has no types of its own. As Any they look the same to mypy with and without stubs.
_StockRegistry: Any = TaskRegistry
_NotRegistered: Any = NotRegistered
_celery: Any = _state


class Neighbour:
    """The Celery app that loaders find as the current one: the project's, if it has one."""

    def __init__(self, ours: Any) -> None:
        self._ours = ours
        self.app: Any = None

    def look(self) -> None:
        """Remember the app that is current in this thread, unless it is ours."""
        for candidate in (_celery._tls.current_app, _celery.default_app):
            if candidate is not None and candidate is not self._ours:
                self.app = candidate
                return

    def move_in(self, **_: Any) -> None:
        """Make it the one that new threads find. Celery has just made ours that, and does so again in a child.

        It has also forbidden tasks to wait for others, which might need this worker to run. Loaders wait for
        tasks of the project, which another worker runs.
        """
        _celery._set_task_join_will_block(False)
        if self.app is not None:
            self.app.set_default()

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Make it the current one in this thread, which may be Celery's main thread."""
        before = _celery._tls.current_app
        _celery._tls.current_app = self.app or before
        try:
            yield
        finally:
            _celery._tls.current_app = before


class Registry(_StockRegistry):  # type: ignore[misc]
    """The tasks of our app, which says what to do where a loader looks for one of its project's."""

    def __missing__(self, name: str) -> Any:
        raise _NotRegistered(
            f"{name!r} is no task of Stillroom's worker. A @shared_task needs the Celery app of its project: "
            f"import that app in a module that STILLROOM_LOADERS names, or call your_app.send_task({name!r}, …)."
        )
