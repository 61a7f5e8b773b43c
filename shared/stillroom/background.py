"""Lets a thread await, in one event loop of the process, and an event loop do what blocks, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

from stillroom.daemon import Daemon, refuse_at_the_end
from stillroom.errors import Misplaced

log = logging.getLogger("stillroom")

T = TypeVar("T")

_background: asyncio.AbstractEventLoop | None = None
_background_thread: threading.Thread | None = None
_background_lock = threading.RLock()


@lru_cache
def tell_of_threads() -> None:
    """Log once that this process is uWSGI's without threads: it lets Python run only while it answers a request."""
    if getattr(sys.modules.get("uwsgi"), "has_threads", True):
        return
    log.warning(
        "uWSGI runs a thread here only while it answers a request: refreshes, deferred invalidations and the end "
        "of an outage are late. Set enable-threads = true"
    )


def in_background_loop(awaitable: Awaitable[Any]) -> Any:
    """Await from a thread: all of a process' in one loop, so that they may share a database pool."""
    # Not by asyncio's running loop, which is the same for all greenlets of a thread.
    if threading.current_thread() is _background_thread:
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise Misplaced(
            "an async loader called a blocking room that has async loaders: use AsyncStillroom in it"
        )
    try:
        refuse_at_the_end()  # the loop's thread would finish nothing
        loop = _background_loop()
    except BaseException:
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise
    work, running = _finish(awaitable), None
    try:
        running = asyncio.run_coroutine_threadsafe(work, loop)
        outcome = running.result()
    except BaseException:
        # A signal, or a timeout of gevent's, may also come while the work is handed over.
        if running is None or not running.done():
            loop.call_soon_threadsafe(_give_up, work)
        raise
    if isinstance(outcome, _Exit):
        raise outcome.error
    return outcome


def _give_up(work: Coroutine[Any, Any, Any]) -> None:
    """Cancel, in its loop, what nobody waits for."""
    for task in asyncio.all_tasks():
        if task.get_coro() is work:
            task.cancel()
            return
    work.close()


def started(work: Callable[[], object], name: str) -> threading.Thread | None:
    """Start a daemon thread. Return None where none can be started: there may be one later."""
    thread = Daemon(work, name)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


async def aside(work: Callable[..., T], *args: Any) -> T:
    """Run work that may block in a thread, or here where no thread can be started. It may be run twice then."""
    run = partial(contextvars.copy_context().run, work, *args)
    try:
        running = asyncio.get_running_loop().run_in_executor(None, run)
    except RuntimeError:  # of the start: what the work itself raises is told
        return work(*args)
    return await running


def _background_loop() -> asyncio.AbstractEventLoop:
    """Return the loop and its thread. They are kept only once they run: else every later load would hang."""
    global _background, _background_thread
    with _background_lock:
        if _background is None or _background.is_closed():
            loop = asyncio.new_event_loop()
            thread = Daemon(_run, "stillroom async loaders", (loop,))
            try:
                thread.start()
            except BaseException:
                # No thread is free now; there may be one for the next load. Or the handler of a signal raised while
                # this thread waited for that one to start: then the next load has it.
                with contextlib.suppress(RuntimeError):
                    if not thread.is_alive():
                        loop.close()
                if not loop.is_closed():
                    _background, _background_thread = loop, thread
                raise
            _background, _background_thread = loop, thread
        return _background


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop for good. A task that a loader has left behind may exit: that ends no other load."""
    while not loop.is_closed():
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


class _Exit(NamedTuple):
    """Hold what ends a thread's event loop when it is raised there."""

    error: BaseException


async def _finish(awaitable: Awaitable[Any]) -> Any:
    """Return the result. An exit is told to the caller: here it would end the loop, and the caller would hang."""
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        return _Exit(error)


def _forget_background_loop() -> None:
    global _background, _background_thread, _background_lock
    # Its thread stayed in the parent.
    _background, _background_thread, _background_lock = None, None, threading.RLock()


os.register_at_fork(after_in_child=_forget_background_loop)
