"""Threads that begin at the same moment, and threads that act for as long as a `with` block runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

T = TypeVar("T")


def at_once(count: int, act: Callable[[int], T]) -> list[T]:
    """Call this with each number below `count`, in threads that begin at the same moment; return the results."""
    barrier = threading.Barrier(count)

    def run(number: int) -> T:
        barrier.wait(30)
        return act(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def together(*acts: Callable[[], T]) -> list[T]:
    """Begin all acts at the same moment, each in a thread of its own; return their results."""
    return at_once(len(acts), lambda number: acts[number]())


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
