"""What one request has read, for loaders that say `memo=True`: the same key twice is one round trip.

Their promise is a little weaker than the cache's: **a read in a request that began after an invalidation returned
never shows what was loaded before it.** What another process invalidates while the request runs is seen by the next
request, or five seconds later. What this process invalidates or writes is seen at once: it bumps the cache's
`changes`, and an entry that was remembered under another number is forgotten.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from stillroom.cache.entry import Entry, Freshness
from stillroom.wire import time_left

LIMIT = 1_000  # entries that one request remembers
KEPT_S = 5.0  # a request may be a stream that goes on for hours


class Remembered(NamedTuple):
    """An entry as this request has read it. It is decoded anew each time, so nobody shares a list with anybody."""

    entry: Entry
    freshness: Freshness
    changes: int
    until: float  # time.monotonic()


def recall(cache: Any, name: bytes) -> Remembered | None:
    """Return what this request has read under a key, unless this process has changed something since."""
    request = time_left()
    found: Remembered | None = None if request is None else request.memo.get((id(cache), name))
    if found is None or found.changes != cache.changes or time.monotonic() > found.until:
        return None
    return found


def remember(cache: Any, name: bytes, entry: Entry, freshness: Freshness, changes: int) -> None:
    """Remember it until the request ends. `changes`: the cache's number before the entry was asked for."""
    request = time_left()
    if request is not None and len(request.memo) < LIMIT:
        until = time.monotonic() + KEPT_S
        request.memo[id(cache), name] = Remembered(entry, freshness, changes, until)
