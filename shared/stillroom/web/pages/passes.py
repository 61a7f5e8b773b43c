"""The pages that can't be kept: for a while nobody asks the cache for them, or waits for somebody who does."""

from __future__ import annotations

import time
from collections.abc import Hashable

from stillroom.errors import LoadFailed
from stillroom.stats import Stats
from stillroom.web.pages.stored import NotKept, OfOneRequest

PASS_S = 10.0  # a page that can't be kept is rendered without asking for so long
PASSES = 10_000  # such pages that a process remembers


class Passes:
    """Remembers which pages a process has just found to be such that they can't be kept."""

    def __init__(self) -> None:
        self._until: dict[Hashable, float] = {}

    def __contains__(self, page: Hashable) -> bool:
        until = self._until.get(page)
        return until is not None and time.monotonic() < until

    def add(self, page: Hashable, name: str, reason: NotKept | LoadFailed, stats: Stats) -> None:
        """Remember this page of an endpoint, and log why it is not kept.

        A LoadFailed tells why another process did not keep it. Its view may have failed: that is remembered by
        nobody, and the next request tries again. So does it where one request's headers were the reason.
        """
        if isinstance(reason, OfOneRequest):
            return
        if isinstance(reason, LoadFailed) and reason.kind != NotKept.__name__:
            return
        why = reason.detail if isinstance(reason, LoadFailed) else reason
        stats.say("a page is not cached", name, f"{name}: {why}")
        if len(self._until) >= PASSES:
            self._until.clear()
        self._until[page] = time.monotonic() + PASS_S
