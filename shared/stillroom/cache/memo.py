"""What one request has read, for loaders that say `memo=True`: the same key twice is one round trip.

Their promise is a little weaker than the cache's: **a read in a request that began after an invalidation returned
never shows what was loaded before it.** What another process invalidates while the request runs is seen by the next
request, or five seconds later. What this process invalidates or writes is seen at once: it adds to the number of
`changes`, and an entry that was remembered under another number is forgotten.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from stillroom.cache.entry import Entry, Freshness
from stillroom.operation import Operation
from stillroom.replicas import kept
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Command, time_left

LIMIT = 1_000  # entries that one request remembers
KEPT_S = 5.0  # a request may be a stream that goes on for hours


class Remembered(NamedTuple):
    """An entry as this request has read it. It is decoded anew each time, so nobody shares a list with anybody."""

    entry: Entry
    freshness: Freshness
    changes: int
    until: float  # time.monotonic()


class Memo:
    """What requests remember of one cache, and how often this process has changed something in it."""

    def __init__(self, settings: Settings, stats: Stats) -> None:
        self.changes = 0
        self._settings = settings
        self._stats = stats

    def changing(self, batch: list[Command], kept_as: str = "") -> Operation[list[Any]]:
        """Send a batch that changes something. → the replies.

        `kept_as`: what it is called where it is to be on replicas when this returns.
        """
        try:
            if kept_as:
                return (yield from kept(batch, self._settings, self._stats, kept_as))
            replies: list[Any] = yield batch
            return replies
        finally:
            self.changes += 1

    def recall(self, name: bytes, release: bytes) -> Remembered | None:
        """Return what this request has read under a key, unless this process has changed something since."""
        request = time_left()
        found: Remembered | None = None
        if request is not None:
            found = request.memo.get((id(self), name, release))
        if found is None or found.changes != self.changes or time.monotonic() > found.until:
            return None
        return found

    def remember(
        self, name: bytes, release: bytes, entry: Entry, freshness: Freshness, changes: int
    ) -> None:
        """Remember it until the request ends. `changes`: how many there were before the entry was asked for."""
        request = time_left()
        if request is not None and len(request.memo) < LIMIT:
            until = time.monotonic() + KEPT_S
            known = Remembered(entry, freshness, changes, until)
            request.memo[id(self), name, release] = known
