"""Remembers denials: a denied subject will be denied again, and Redis need not be asked. Pure.

While the oldest hits that count have not left their window, only a refund, a reset or a lifted ban can change a
denial. Refunds and resets of this process are noticed at once, all else after 5 s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from stillroom.limits.decision import Decision
from stillroom.limits.limit import Limit
from stillroom.oldest import oldest

REMEMBERED_S = 5.0


class HasKeys(Protocol):
    """A request, as it was asked."""

    @property
    def keys(self) -> Sequence[bytes]: ...


class Denial:
    """One that is remembered, under the log or the ban that it came from."""

    __slots__ = ("at", "counted_as", "decision", "keys", "limit", "request", "unseen", "until")

    def __init__(
        self,
        decision: Decision,
        request: HasKeys,
        limit: Limit | None,
        at: float,
        until: float,
        counted_as: Sequence[str],
    ) -> None:
        self.decision = decision
        self.request = request
        self.keys = request.keys
        self.limit = limit  # None: it is a ban
        self.at = at
        self.until = until
        self.counted_as = counted_as  # each time it answers
        self.unseen = 0  # denials that Redis has not heard of; two threads may count one too few


class Denials:
    """Remember a bounded number of denials. Time is `time.monotonic()`, given."""

    def __init__(self, most: int) -> None:
        self._most = most
        # How often some were. A denial that was asked for before that must not be remembered after it.
        self.forgotten = 0
        self.found: OrderedDict[bytes, Denial] = OrderedDict()
        self.has_none_of = self.found.keys().isdisjoint  # whether none is under these bans and logs

    def add(self, key: bytes, denial: Denial) -> None:
        self.found[key] = denial
        if len(self.found) > self._most:
            for first in oldest(self.found, 1):
                self.found.pop(first, None)

    def find(
        self,
        bans: Iterable[bytes],
        keys: Sequence[bytes],
        limits: Sequence[Limit],
        cost: int,
        now: float,
    ) -> Denial | None:
        """Return the denial that answers this request too."""
        found = self.found  # other threads take some out meanwhile
        for denial in map(found.get, bans):
            if denial is not None and now < denial.until:
                return denial
        for denial, limit in zip(map(found.get, keys), limits, strict=True):
            if denial is None or now >= denial.until or cost < denial.decision.cost:
                continue
            if denial.limit is limit or denial.limit == limit:
                return denial
        return None

    def take_unseen(self, keys: Iterable[bytes]) -> bytes:
        """Return the denials of these logs that Redis has not heard of, and is about to: as limit_check takes them.

        They are forgotten. Each log has its own: those of one are not to be counted against another's subject.
        """
        popped = [(number, self.found.pop(key, None)) for number, key in enumerate(keys, 1)]
        return b" ".join([b"%d:%d" % (n, one.unseen) for n, one in popped if one and one.unseen])

    def take_over(self, now: float, most: int) -> list[tuple[Any, bytes, int]]:
        """Forget the denials that are over, and return (request, log, how many they were) for Redis to be told.

        At most `most` are returned; the others follow the next time. A client that was denied from memory may never
        come again, and then no check would tell Redis.
        """
        over = [(key, one) for key, one in list(self.found.items()) if one.until <= now]
        over.sort(key=lambda pair: pair[1].unseen, reverse=True)
        told: list[tuple[Any, bytes, int]] = []
        for key, one in over:
            if one.unseen and one.limit is not None:
                if len(told) == most:
                    continue  # the next time
                told.append((one.request, key, 1 + one.unseen))
            if self.found.get(key) is one:
                self.found.pop(key, None)  # another thread may take it just now
        return told

    def forget(self, keys: Iterable[bytes]) -> None:
        self.forgotten += 1
        for key in keys:
            self.found.pop(key, None)

    def reset(self) -> None:
        """Forget all denials after a fork."""
        self.found.clear()
