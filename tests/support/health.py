"""Move the time of health's stored data by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def age_stream(client: Any, stream: bytes, seconds: float) -> None:
    """Make a whole stream this much older: its entries are written again under earlier ids."""
    entries = client.xrange(stream)
    client.delete(stream)
    for name, fields in entries:
        ms, _, place = name.decode().partition("-")
        client.xadd(stream, fields, id=f"{int(ms) - int(seconds * 1000)}-{place}")


def count_in_last_minute(client: Any, room: Any, **counts: int) -> None:
    """Count as if all processes had done so in the minute before this one."""
    this_minute = int(time.time()) // 60
    for minute in (this_minute - 1, this_minute):  # the test may run into the next one
        client.hset(room.keys.stats(minute), mapping=counts)


def within_a_minute(client: Any, act: Callable[[], T]) -> T:
    """Act, and return its result. Act again where a minute of the server's clock began meanwhile."""
    while True:
        began = client.time()[0] // 60
        result = act()
        if client.time()[0] // 60 == began:
            return result
