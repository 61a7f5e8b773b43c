"""Count the batches that a room sends."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom import Stillroom

NEVER = 1 << 62  # seconds


def quiet(room: Stillroom) -> Stillroom:
    """Keep counts from being sent with the reads."""
    room.stats.due = NEVER
    return room


class Trips:
    """Counts the batches that a room has sent."""

    def __init__(self, room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        inner = getattr(room, "inner", room)
        quiet(inner)
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
