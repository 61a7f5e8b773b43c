"""Count the batches that a room sends."""

from __future__ import annotations

from typing import Any

import pytest


class Trips:
    """Counts the batches that a room has sent."""

    def __init__(self, room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        inner = getattr(room, "inner", room)
        inner.stats.due = float("inf")  # counts ride along at their own times
        self.count = 0
        execute = inner.wire.execute

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return execute(*args, **kwargs)

        monkeypatch.setattr(inner.wire, "execute", counting)

    def taken(self) -> int:
        """Return how many batches were sent since the last call of this method."""
        count, self.count = self.count, 0
        return count
