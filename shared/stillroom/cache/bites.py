"""Large batches in bites: each has its own deadline, and others get their turn in between. Pure but for the pause.

One batch of 20,000 values takes longer than one batch may, so all of them would be given up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from stillroom.operation import Operation, Pause

T = TypeVar("T")

SCRIPTS_AT_ONCE = 100  # 6 ms of the server, or 25 on a bad day
SMALLEST = 10  # so many, when there was no time for more
KEYS_AT_ONCE = 500  # to read, or to delete
BYTES_AT_ONCE = 512 * 1024  # to send


def bites(things: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """These things in order, at most so many at once."""
    for start in range(0, len(things), most):
        yield things[start : start + most]


def bite_of(batch: Sequence[Any], start: int, most: int) -> list[Any]:
    """The commands from `start` on, at most so many, and no more bytes than one batch may have."""
    bite: list[Any] = []
    size = 0
    for command in batch[start : start + most]:
        size += sum(map(len, command))
        if bite and size > BYTES_AT_ONCE:
            break
        bite.append(command)
    return bite


def in_bites(batch: list[Any]) -> Operation[list[Any]]:
    """The replies to commands that stand for themselves. The first bite that fails raises."""
    replies: list[Any] = []
    while len(replies) < len(batch):
        if len(batch) > SCRIPTS_AT_ONCE:
            yield Pause(0)
        replies += yield type(batch)(bite_of(batch, len(replies), SCRIPTS_AT_ONCE))
    return replies
