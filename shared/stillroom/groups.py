"""Take things some at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def groups(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the things in order, `size` of them at a time.

    >>> list(groups("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    rest = iter(things)
    while group := list(islice(rest, size)):
        yield group
