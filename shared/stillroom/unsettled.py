"""Know which changes of this thread or task its database has not committed yet: no load stores what they show.

A load inside such a transaction reads its own uncommitted rows. If the transaction is rolled back, nothing is
invalidated, and a stored value would show rows that never existed.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Protocol


class Work(Protocol):
    """A database session or connection that may hold uncommitted changes."""

    def is_settled(self) -> bool:
        """Return whether everything it changed is committed or rolled back."""

    def is_over(self) -> bool:
        """Return whether it is settled, and will be watched anew before it changes anything."""


_current: ContextVar[tuple[weakref.ReferenceType[Work], ...]] = ContextVar(
    "stillroom_unsettled", default=()
)


def watch(work: Work) -> None:
    """Remember that this thread or task uses `work`. Only a weak reference is kept."""
    known = _current.get()
    if any(ref() is work for ref in known):
        return
    others = tuple(ref for ref in known if (other := ref()) is not None and not other.is_over())
    _current.set((*others, weakref.ref(work)))


def is_unsettled() -> bool:
    """Return whether this thread or task has uncommitted changes, as far as the integrations can see."""
    known = _current.get()
    return bool(known) and any(
        (work := ref()) is not None and not work.is_settled() for ref in known
    )
