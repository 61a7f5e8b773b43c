"""Decides which threads load the orders of one message.

A message holds many orders, because a task costs more than a quick load.

Slow loads are another matter: twenty-five of them one after the other take as long as one of them by twenty-five
threads, twenty-five times. So a message that takes long is shared.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, Protocol, TypeVar

log = logging.getLogger("stillroom.workers")

T = TypeVar("T")
R = TypeVar("R")

ALONE_S = 0.01  # a message whose loads have taken longer than this is shared


class Hands(Protocol[T]):
    """Works on the items of a message."""

    def one(self, work: Callable[[T], R], item: T) -> R:
        """Do the work for the only item, in this thread."""

    def each(self, work: Callable[[T], object], items: Iterable[T]) -> None:
        """Do the work for each item, or have it done. `work` raises nothing."""


class Alone(Generic[T]):
    """A process with one thread. What would take long it passes on, so that other processes take part."""

    def __init__(self, pass_on: Callable[[T], object]) -> None:
        self._pass_on = pass_on

    def one(self, work: Callable[[T], R], item: T) -> R:
        return work(item)

    def each(self, work: Callable[[T], object], items: Iterable[T]) -> None:
        began = time.monotonic()
        for item in items:
            if time.monotonic() - began < ALONE_S or not self._passed_on(item):
                work(item)

    def _passed_on(self, item: T) -> bool:
        try:
            self._pass_on(item)
        except Exception as error:  # the broker is away: then it is done here
            log.warning("an order could not be passed on (%s)", type(error).__name__)
            return False
        return True


class Crew(Generic[T]):
    """A process with threads, which help one another. They work on `size` items at the same time, not more."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._slots = threading.BoundedSemaphore(size)
        self._helpers = ThreadPoolExecutor(size, thread_name_prefix="stillroom helper")

    def one(self, work: Callable[[T], R], item: T) -> R:
        with self._slots:
            return work(item)

    def each(self, work: Callable[[T], object], items: Iterable[T]) -> None:
        """Returns when all of them are done. Items behind one that takes long do not wait for it."""
        waiting, finished = deque(items), threading.Event()
        called: list[Future[None]] = []
        looking = list(
            self._called(len(waiting) > 1, self._look_out, work, waiting, finished, called)
        )
        while waiting:
            with self._slots:
                _do_next(work, waiting)
        finished.set()
        wait(looking)
        wait(called)

    def _called(self, wanted: int, function: Any, *args: Any) -> Iterator[Future[None]]:
        """Call other threads to help. Where none can be started, those that work go on without."""
        for _ in range(wanted):
            try:
                yield self._helpers.submit(function, *args)
            except RuntimeError:
                return

    def _look_out(
        self,
        work: Callable[[T], object],
        waiting: deque[T],
        finished: threading.Event,
        called: list[Future[None]],
    ) -> None:
        """Call for help, and help, until the message is finished: its own thread may be kept by one item."""
        while not finished.wait(ALONE_S) and waiting:
            if self._is_slot_free():  # otherwise each look would call threads that can do nothing
                wanted = min(len(waiting), self._size - 1) - 1
                called += self._called(wanted, self._help, work, waiting)
                self._help(work, waiting)

    def _is_slot_free(self) -> bool:
        if is_free := self._slots.acquire(blocking=False):
            self._slots.release()
        return is_free

    def _help(self, work: Callable[[T], object], waiting: deque[T]) -> None:
        """Take items as long as there are any and a slot is free."""
        while waiting and self._slots.acquire(blocking=False):
            try:
                _do_next(work, waiting)
            finally:
                self._slots.release()


def _do_next(work: Callable[[T], object], waiting: deque[T]) -> None:
    try:
        item = waiting.popleft()
    except IndexError:  # another thread was faster
        return
    work(item)
