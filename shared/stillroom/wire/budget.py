"""Keep the time that the calls of one request may still spend on Redis, all together, and when a load began."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextvars import Context, ContextVar, copy_context
from typing import Any, Self


class Budget:
    """Seconds left for one request; the driver takes off what each batch took.

    All calls inside a `with` of it share them; a nested request has its own. A task or thread that was begun in it,
    with its context, may outlive it, and is not short of time from then on.
    `unconfirmed`: how many of its acts fewer than `STILLROOM_REPLICAS` replicas had in time.
    """

    __slots__ = ("_token", "began", "left", "memo", "reads_near", "unconfirmed")

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        self.began = time.monotonic()
        self.unconfirmed = 0
        self.memo: dict[Any, Any] = {}  # the values that the request has read: see cache/memo.py
        # Whether it has looked at what this process keeps: see cache/near.py.
        self.reads_near = False

    def __enter__(self) -> Self:
        outer = _current.get()
        try:
            self._token = _current.set(self)
        except (
            BaseException
        ):  # a signal's handler raised: no __exit__ follows, and the thread goes on
            _current.set(outer)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.left = math.inf
        try:
            _current.reset(self._token)
        except ValueError:  # ended in another context, where this request was never current
            return


_current: ContextVar[Budget | None] = ContextVar("stillroom_request_budget", default=None)
time_left = _current.get
_loading: ContextVar[float] = ContextVar("stillroom_loading_since", default=0.0)
loading_since = _loading.get  # time.monotonic(); 0.0 outside of a load
_leases: ContextVar[tuple[bytes, ...]] = ContextVar("stillroom_leases_of_loads", default=())
leases_of_loads = _leases.get  # those of the loads that this code runs in


def beside_all() -> Context:
    """Return a copy of the context that belongs to no request and no load, for a task that goes on beside them."""
    context = copy_context()
    context.run(_current.set, None)
    context.run(_loading.set, 0.0)
    context.run(_leases.set, ())
    return context


class load_begun:  # noqa: N801 - called as the function that it was made for
    """Inside this `with` a loader runs. It reads nothing that is older than the clock of its own value.

    `leases`: those it runs under. It does not wait for them.
    """

    __slots__ = ("_leases", "_outer")

    def __init__(self, leases: Sequence[bytes] = ()) -> None:
        self._leases = tuple(leases)

    def __enter__(self) -> None:
        self._outer = _loading.get(), _leases.get()
        try:
            _loading.set(time.monotonic())
            _leases.set(self._outer[1] + self._leases)
        except BaseException:  # see Budget
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        since, leases = self._outer
        try:
            _loading.set(since)
        finally:
            _leases.set(leases)
