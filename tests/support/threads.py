"""Threads that act for as long as a `with` block runs, and no longer, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


class Threads:
    """Join what `start` was given, and close what was put on the stack before, at the end of a `with` block.

    An error of a thread fails it.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._stack = ExitStack()
        self.errors: list[BaseException] = []

    def start(self, act: Callable[[], None]) -> None:
        """Run this in a thread until `_stop` is set."""
        thread = threading.Thread(target=self._noted, args=(act,))
        thread.start()
        self._stack.callback(thread.join)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._stack.close()
        assert self.errors == []

    def _noted(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            self.errors.append(error)
            raise


@contextmanager
def repeated(act: Callable[[], object], threads: int = 1, *, pause: float = 0.0) -> Iterator[None]:
    """Run this again and again in so many threads while a `with` block runs. `pause`: seconds between two runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(pause):
            act()

    running = [threading.Thread(target=repeat) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in running:
            thread.join(30)
