"""Makes the failure of one task of what would end its thread, or its process.

Celery foresees an Exception. `sys.exit`, asyncio's CancelledError and gevent's Timeout are none. Where a loader
raises one in the threads pool, its message is never acknowledged and holds one place of the prefetch: after as many
as there are threads the worker takes no other. In the solo pool the worker exits and gives the message to the next
one, which exits too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from billiard import common
from celery.exceptions import TaskPredicate, WorkerShutdown, WorkerTerminate

from stillroom.misuse import is_awaited
from stillroom.shown import message_of

# Neither library has types of its own. As Any they look the same to mypy with and without stubs.
_billiard: Any = common
_OF_THE_WORKER: tuple[type[BaseException], ...] = (WorkerShutdown, WorkerTerminate)
# What Celery takes for a task's word about its message: "give it back" would load for ever.
_OF_A_TASK: type[BaseException] = TaskPredicate


class WouldEnd(RuntimeError):
    """Stands for what would have ended more than its task."""


class contained:  # noqa: N801  # named as contextlib's are
    """Raise WouldEnd for what is raised inside and is no Exception, unless this process is told to end.

    This is no generator: contextlib assigns to an error that it lets pass, which a frozen dataclass refuses.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is not None and self._would_end(error):
            raise _failure(error) from error

    def _would_end(self, error: BaseException) -> bool:
        return not isinstance(error, Exception) and not _ends_the_process(error)


class loading(contained):  # noqa: N801
    """Raise WouldEnd also for what is Celery's and comes from a task of the project that the loader calls."""

    def _would_end(self, error: BaseException) -> bool:
        return isinstance(error, _OF_A_TASK) or super()._would_end(error)


class each_load(loading):  # noqa: N801
    """Contain one call of a loader, or of the function that lists its warm-ups: work that calls several goes on.

    Whoever waits for a task of asyncio cancels it, and is told of the cancellation.
    """

    def _would_end(self, error: BaseException) -> bool:
        if isinstance(error, asyncio.CancelledError) and _is_in_a_loop():
            return False
        return super()._would_end(error)


def contained_call(function: Callable[..., object]) -> Callable[..., object]:
    """Return an app's listener that raises nothing but an Exception, so that the next listeners are called too."""
    if is_awaited(function):  # which is refused where it would be called
        return function

    @wraps(function)
    def call(*args: Any) -> object:
        with contained():
            return function(*args)

    return call


def _is_in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _ends_the_process(error: BaseException) -> bool:
    """Return whether a signal has raised it, which happens in the main thread: where solo and prefork run tasks."""
    of_a_signal = isinstance(error, _OF_THE_WORKER) or _billiard._should_have_exited[0]
    return of_a_signal and threading.current_thread() is threading.main_thread()


def _failure(error: BaseException) -> WouldEnd:
    return WouldEnd(f"{type(error).__name__} was raised: {message_of(error)}")
