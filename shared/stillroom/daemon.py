"""Threads of the library's own, which end with the process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from stillroom.errors import Misplaced


class Daemon(threading.Thread):
    """Run a function in a daemon thread. `start` raises a RuntimeError where no thread can be started."""

    def __init__(
        self, target: Callable[..., object], name: str, args: tuple[Any, ...] = ()
    ) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)

    def start(self) -> None:
        """Start the thread.

        Once Python has stopped all other threads, as for the `__del__` of what lives until the end, it would wait
        for the new thread to begin, and before 3.12 it did so for ever.
        """
        refuse_at_the_end()
        super().start()


def refuse_at_the_end() -> None:
    """Raise Misplaced where Python has stopped all threads but this one: none would answer it."""
    if sys.is_finalizing():
        raise Misplaced("no other thread runs at the end of the interpreter")
