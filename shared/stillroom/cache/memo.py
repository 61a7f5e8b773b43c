"""Remember what one request has read, for loaders with `memo=True`: reading a key twice takes one round trip.

Their promise is a little weaker than the cache's: **a read in a request that began after an invalidation returned
never shows what was loaded before it.** What another process invalidates while the request runs is seen by the next
request, or five seconds later. What this process invalidates or sets is seen at once: it puts a new object in
`changes`, and an entry that was remembered under another one is forgotten. A loader sees nothing that was read
before it was called: what it makes of it is stored for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stillroom.cache.entry import Entry, Freshness
from stillroom.oldest import oldest
from stillroom.operation import Operation
from stillroom.replicas import kept
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Budget, Command, loading_since, time_left

LIMIT = 1_000  # entries that one request remembers
KEPT_S = 5.0  # a request may be a stream that goes on for hours


class Remembered(NamedTuple):
    """An entry as this request has read it. It is decoded anew each time, so nobody shares a list with anybody."""

    entry: Entry
    freshness: Freshness
    changes: object  # before it was asked for
    asked: float  # when that was, time.monotonic()


class Memo:
    """Remember what requests have read of one cache.

    Each change of this process makes a new object `changes`, and one that names more than keys a new `sweeps` too.
    """

    drop_copies: Callable[[Sequence[bytes]], None]  # of these keys: see near.py

    def __init__(self, settings: Settings, stats: Stats) -> None:
        # No number: of two threads that add one to it, the slower could set it back to one that was proved.
        self.changes = object()
        self.sweeps = object()
        self._settings = settings
        self._stats = stats

    def changing(
        self, batch: list[Command], names: Sequence[bytes] | None, kept_as: str = ""
    ) -> Operation[list[Any]]:
        """Send a batch that changes something: these keys, or None where it is more than keys. Return the replies.

        `kept_as`: what it is called where it is to be on replicas when this returns.
        """
        try:
            if kept_as:
                return (
                    yield from kept(batch, self._settings.replicas_of_cache, self._stats, kept_as)
                )
            replies: list[Any] = yield batch
            return replies
        finally:
            self.changed(names)

    def changed(self, names: Sequence[bytes] | None = None) -> None:
        """Forget what was remembered: this process has changed something.

        What was proved is void, or, where only the keys of these names were changed, their copies are gone.
        """
        if names is None:
            self.sweeps = object()
        else:
            self.drop_copies(names)
        # Last: what another thread has read until now is remembered under the former object, so it is not recalled.
        self.changes = object()

    def recall(self, name: bytes, release: bytes) -> Remembered | None:
        """Return what this request has read under a key, unless this process has changed something since."""
        request = time_left()
        return None if request is None else self.read_in(request, name, release, time.monotonic())

    def read_in(
        self, request: Budget, name: bytes, release: bytes, now: float
    ) -> Remembered | None:
        """Return what `recall` returns, in this request at this time.monotonic()."""
        found: Remembered | None = request.memo.get((self, name))
        if found is None:
            return None
        if found.changes is not self.changes or now - found.asked >= KEPT_S:
            # Read anew, it stands behind what is older: see has_room.
            request.memo.pop((self, name), None)
            return None
        if found.asked < loading_since():
            return None
        return found if not release or found.entry.release in (release, b"") else None

    def remember(self, name: bytes, known: Remembered) -> None:
        """Remember it until the request ends. A load replaces nothing that the request has read before it."""
        request = time_left()
        if request is not None and has_room(request.memo, time.monotonic()):
            request.memo.setdefault((self, name), known)

    def forget(self, name: bytes) -> None:
        """Forget it in this request, or in this load of the request: it has been loaded anew."""
        request = time_left()
        found = None if request is None else request.memo.get((self, name))
        if request is not None and found is not None and found.asked >= loading_since():
            request.memo.pop((self, name), None)


def has_room(seen: dict[Any, Any], now: float) -> bool:
    """Return whether a request may remember one more. The first that it will not read again make room."""
    while len(seen) >= LIMIT:
        first = oldest(seen.items(), 1)
        if not first:
            return False
        ((memo, name), known), *_ = first
        if known.changes is memo.changes and now - known.asked < KEPT_S:
            return False
        seen.pop((memo, name), None)
    return True
