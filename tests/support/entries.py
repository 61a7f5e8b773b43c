"""Read entries and move their time by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillroom import RedisUnavailable
from stillroom.dispatch import RefreshOrder


def age(client: Any, key: bytes, seconds: float) -> None:
    """Make the entry this much older, without touching anything else of it."""
    fields = client.get(key).split(b"\t", 4)
    fields[3] = b"%d" % (int(fields[3]) - int(seconds * 1000))
    client.set(key, b"\t".join(fields), keepttl=True)


class Recording:
    """A dispatch that keeps the orders, for the test to run, drop, repeat or delay."""

    inline = False

    def __init__(self) -> None:
        self.orders: list[RefreshOrder] = []
        self.messages = 0
        self.ready = True
        self.broken = False
        self.woken: list[str] = []

    def send(self, orders: Sequence[RefreshOrder], undelivered: Any) -> None:
        if self.broken:
            undelivered()
        else:
            self.messages += 1
            self.orders.extend(orders)

    def wake(self, task: str) -> None:
        self.woken.append(task)

    def run_all(self, room: Any) -> list[Any]:
        """Do a worker's work in order; a failure is returned in its place."""
        orders, self.orders = self.orders, []
        return [self._outcome(room, order) for order in orders]

    @staticmethod
    def _outcome(room: Any, order: RefreshOrder) -> Any:
        try:
            return room.cache.refresh(order)["outcome"]
        except RedisUnavailable:
            raise
        except Exception as error:
            return error

    def close(self) -> None:
        pass
