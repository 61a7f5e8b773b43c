"""Keeps forked children apart from their parents: they share no connections, and no lock that a thread held."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Resettable(Protocol):
    """Has state that belongs to one process."""

    def reset(self) -> None: ...


_all: weakref.WeakSet[Resettable] = weakref.WeakSet()
_forking = threading.RLock()


def reset_after_fork(thing: Resettable) -> None:
    """Call `thing.reset()` in every child, for as long as the thing lives."""
    _all.add(thing)


@contextmanager
def no_fork() -> Iterator[None]:
    """Let other threads wait with a fork until the block has ended: it imports modules in a thread of its own.

    A child would find the lock of the module that is being imported taken for ever, and hang at its own import.
    """
    with _forking:
        yield


def _after_fork() -> None:
    for thing in list(_all):
        thing.reset()


os.register_at_fork(after_in_child=_after_fork)
os.register_at_fork(
    before=_forking.acquire,
    after_in_parent=_forking.release,
    after_in_child=_forking.release,
)
