"""What a process remembers of denials: who was denied will be denied again, and need not ask Redis for it. Pure.

While the oldest hits that count have not left their window nothing can change that but a refund, a reset or a
lifted ban; this process' own are noticed at once, others' after 5 s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from stillroom.limits.decision import Decision
from stillroom.limits.limit import Limit

REMEMBERED_S = 5.0


class Denial:
    """One that is remembered, under the log or the ban that it came from."""

    __slots__ = ("at", "decision", "keys", "limit", "unseen", "until")

    def __init__(
        self,
        decision: Decision,
        keys: Sequence[bytes],
        limit: Limit | None,
        at: float,
        until: float,
    ) -> None:
        self.decision = decision
        self.keys = keys
        self.limit = limit  # None: it is a ban
        self.at = at
        self.until = until
        self.unseen = 0  # denials that Redis has not heard of; two threads may count one too few

    def answers(self, limit: Limit, cost: int, now: float) -> bool:
        """Whether a request that costs this much is denied too."""
        same = self.limit is limit or self.limit == limit
        return same and now < self.until and cost >= self.decision.cost


class Denials:
    """A bounded number of them. Time is `time.monotonic()`, given."""

    def __init__(self, most: int) -> None:
        self._most = most
        # How often some were. A denial that was asked for before that must not be remembered after it.
        self.forgotten = 0
        self.found: OrderedDict[bytes, Denial] = OrderedDict()

    def add(self, key: bytes, denial: Denial) -> None:
        self.found[key] = denial
        if len(self.found) > self._most:
            self.found.popitem(last=False)

    def find(
        self,
        bans: Iterable[bytes],
        keys: Sequence[bytes],
        limits: Sequence[Limit],
        cost: int,
        now: float,
    ) -> Denial | None:
        """The denial that answers this request too."""
        found = self.found  # other threads take some out meanwhile
        for ban in bans:
            if (denial := found.get(ban)) is not None and now < denial.until:
                return denial
        for number, key in enumerate(keys):
            denial = found.get(key)
            if denial is not None and denial.answers(limits[number], cost, now):
                return denial
        return None

    def take_unseen(self, keys: Iterable[bytes]) -> int:
        """How many denials of these logs Redis has not heard of; it is about to. They are forgotten."""
        unseen = 0
        for key in keys:
            if (denial := self.found.pop(key, None)) is not None:
                unseen += denial.unseen
        return unseen

    def forget(self, keys: Iterable[bytes]) -> None:
        self.forgotten += 1
        for key in keys:
            self.found.pop(key, None)

    def reset(self) -> None:
        """None: a forked process has denied nobody yet."""
        self.found.clear()
