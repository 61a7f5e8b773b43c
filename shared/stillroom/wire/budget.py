"""How much time the calls of one request may still spend on Redis, all together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Budget:
    """Seconds left for one request; the driver takes off what each batch took."""

    __slots__ = ("left", "memo")

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        self.memo: dict[Any, Any] = {}  # what the request has read: see cache/memo.py


_current: ContextVar[Budget | None] = ContextVar("stillroom_request_budget", default=None)
time_left = _current.get


@contextmanager
def request_budget(seconds: float) -> Iterator[Budget]:
    """All calls inside share this many seconds; a nested request has its own."""
    budget = Budget(seconds)
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)
