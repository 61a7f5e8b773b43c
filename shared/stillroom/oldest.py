"""Look at the first members of a mapping that another thread, or a signal handler in this one, may change."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def oldest(members: Iterable[T], most: int) -> list[T]:
    """Return the first members, at most so many. `members`: a dict, or a view of one."""
    while True:
        try:
            return list(islice(members, most))
        except RuntimeError:  # it was changed between the two steps of this
            continue
