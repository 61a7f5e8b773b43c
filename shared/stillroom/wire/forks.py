"""Reset what a forked child must not share with its parent: locks another thread held, connections, probers."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Resettable(Protocol):
    """Has state that belongs to one process."""

    def reset(self) -> None: ...


_all: weakref.WeakSet[Resettable] = weakref.WeakSet()


def reset_after_fork(thing: Resettable) -> None:
    """Call `thing.reset()` in every child, for as long as the thing lives."""
    _all.add(thing)


def _after_fork() -> None:
    for thing in list(_all):
        thing.reset()


os.register_at_fork(after_in_child=_after_fork)
