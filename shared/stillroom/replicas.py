"""Acts that are to outlive their server: with `STILLROOM_REPLICAS` they return when so many replicas have them."""

from __future__ import annotations

from typing import Any

from stillroom.operation import Kept, Operation, Replies
from stillroom.stats import Stats
from stillroom.wire import Command, time_left

UNCONFIRMED = "unconfirmed"  # the count of acts that too few replicas had in time


def kept(batch: list[Command], wanted: int, stats: Stats, what: str) -> Operation[list[Any]]:
    """Send a batch; return its replies when `wanted` replicas have what it did, or can't in time.

    Too few in time: it is counted, logged, and told to whoever asks the request (`Budget.unconfirmed`). Nothing is
    undone.
    """
    if not wanted:
        return (yield batch)  # type: ignore[no-any-return]
    replies: Replies = yield Kept(batch, wanted)
    if replies.replicas < wanted:
        _tell(replies, wanted, stats, what)
    return replies


def _tell(replies: Replies, wanted: int, stats: Stats, what: str) -> None:
    stats.counts[UNCONFIRMED] += 1
    request = time_left()
    if request is not None:
        request.unconfirmed += 1
    said = replies.trouble or f"{replies.replicas} of {wanted} replicas had it in time"
    stats.say(
        f"{what} is done, and may be lost if Redis fails over now", f"{replies.replicas}", said
    )
