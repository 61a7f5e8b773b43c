"""Decides which threads load the orders of one message.

A message holds many orders, because a task costs more than a quick load.

Slow loads are another matter: twenty-five of them one after the other take as long as one of them by twenty-five
threads, twenty-five times. So a message that takes long is shared.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, Protocol, TypeVar

log = logging.getLogger("stillroom.workers")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")

ALONE_S = 0.01  # a message whose loads have taken longer than this is shared


class Items(Protocol[T_co]):
    """What waits of a message, such as a deque. Work on one item may add others."""

    def __len__(self) -> int:
        """Return how many wait."""

    def popleft(self) -> T_co:
        """Take the next one. Raises IndexError where none waits."""


class Hands(Protocol[T]):
    """Works on the items of a message."""

    def one(self, work: Callable[[], R]) -> R:
        """Do a message that is one piece of work, in this thread."""

    def each(self, work: Callable[[T], object], items: Items[T]) -> None:
        """Do the work for each item, or have it done. Raises what `work` raises, in whatever thread."""


class Alone(Generic[T]):
    """A process with one thread. What would take long it passes on, so that other processes take part.

    `pass_on` returns whether an item could be passed on.
    """

    def __init__(self, pass_on: Callable[[T], bool]) -> None:
        self._pass_on = pass_on

    def one(self, work: Callable[[], R]) -> R:
        return work()

    def each(self, work: Callable[[T], object], items: Items[T]) -> None:
        began = time.monotonic()
        while items:
            item = items.popleft()
            if time.monotonic() - began < ALONE_S or not self._passed_on(item):
                work(item)

    def _passed_on(self, item: T) -> bool:
        try:
            return self._pass_on(item)
        except Exception as error:  # the broker is away: then it is done here
            log.warning("an order could not be passed on (%s)", type(error).__name__)
            return False


class Crew(Generic[T]):
    """A process with threads, which help one another. They work on `size` items at the same time, not more."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._slots = threading.BoundedSemaphore(size)
        self._helpers = ThreadPoolExecutor(size, thread_name_prefix="stillroom helper")

    def one(self, work: Callable[[], R]) -> R:
        with self._slots:
            return work()

    def each(self, work: Callable[[T], object], items: Items[T]) -> None:
        """Returns, or raises, when no thread works on them. Items behind one that takes long do not wait for it."""
        finished, called = threading.Event(), list[Future[None]]()
        looking = list(self._called(len(items) > 1, self._look_out, work, items, finished, called))
        try:
            self._work_off(work, items)
        finally:
            finished.set()
            wait(looking)
            wait(called)
        self._work_off(work, items)  # a helper that found no slot has left what it added
        for one in (*looking, *called):
            one.result()

    def _work_off(self, work: Callable[[T], object], items: Items[T]) -> None:
        while items:
            with self._slots:
                _do_next(work, items)

    def _called(self, wanted: int, function: Any, *args: Any) -> Iterator[Future[None]]:
        """Call other threads to help. Where none can be started, those that work go on without."""
        for _ in range(wanted):
            call: Future[None] = Future()
            try:
                self._helpers.submit(_answer, call, function, *args)
            except RuntimeError:
                # The pool keeps what it was given. A helper who found it later would be waited for by nobody.
                if not call.cancel():
                    yield call
                return
            yield call

    def _look_out(
        self,
        work: Callable[[T], object],
        items: Items[T],
        finished: threading.Event,
        called: list[Future[None]],
    ) -> None:
        """Call for help, and help, until the message is finished: its own thread may be kept by one item."""
        while not finished.wait(ALONE_S) and items:
            if self._is_slot_free():  # otherwise each look would call threads that can do nothing
                wanted = min(len(items), self._size - 1) - 1
                called += self._called(wanted, self._help, work, items)
                self._help(work, items)

    def _is_slot_free(self) -> bool:
        if is_free := self._slots.acquire(blocking=False):
            self._slots.release()
        return is_free

    def _help(self, work: Callable[[T], object], items: Items[T]) -> None:
        """Take items as long as there are any and a slot is free."""
        while items and self._slots.acquire(blocking=False):
            try:
                _do_next(work, items)
            finally:
                self._slots.release()


def _answer(call: Future[None], function: Callable[..., None], *args: Any) -> None:
    """Help, unless the call was taken back."""
    if not call.set_running_or_notify_cancel():
        return
    try:
        function(*args)
    except BaseException as error:
        call.set_exception(error)
    else:
        call.set_result(None)


def _do_next(work: Callable[[T], object], items: Items[T]) -> None:
    try:
        item = items.popleft()
    except IndexError:  # another thread was faster
        return
    work(item)
