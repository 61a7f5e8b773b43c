"""Calls a function at the end of this process, also where the process is a child of another one's program.

A child of `multiprocessing`, and a process in which Celery runs a project's tasks, leaves by `os._exit`: Python
calls no function of `atexit` there. multiprocessing calls finalizers of its own, and Celery sends a signal.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

FIRST = 10  # above 0: multiprocessing calls it before it ends the processes that this one started


class AtExit:
    """Calls a function once this process ends, from `arm` to `disarm`."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._finalizer: Any = None
        self._armed_in = 0  # which process: a child forgets the finalizers of its parent

    def arm(self) -> None:
        """Have the function called. Only the libraries that this process has imported are asked."""
        if self._armed_in == os.getpid():
            return
        self.disarm()
        self._armed_in = os.getpid()
        atexit.register(self._function)
        if finalize := _imported("multiprocessing.util", "Finalize"):
            self._finalizer = finalize(None, self._function, exitpriority=FIRST)
        if shutdown := _imported("celery.signals", "worker_process_shutdown"):
            shutdown.connect(self._on_shutdown)

    def disarm(self) -> None:
        """Have the function not called."""
        self._armed_in = 0
        atexit.unregister(self._function)
        if self._finalizer is not None:
            self._finalizer.cancel()
            self._finalizer = None
        if shutdown := _imported("celery.signals", "worker_process_shutdown"):
            shutdown.disconnect(self._on_shutdown)

    def _on_shutdown(self, **_: Any) -> None:
        self._function()


def _imported(module: str, name: str) -> Any:
    """Return what a module has under this name, or None: another thread may be about to import the module."""
    return getattr(sys.modules.get(module), name, None)
