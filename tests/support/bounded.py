"""Look for keys that would stay in Redis for ever."""

from __future__ import annotations

from typing import Any

PATTERNS = ("*:{s*", "*{rl:*")  # of sessions and of limits


def assert_bounded(client: Any) -> None:
    """Check that each key of sessions and limits has a TTL. One that has just ended (-2) had one."""
    keys = [key for pattern in PATTERNS for key in client.keys(pattern)]
    endless = [(key, client.type(key)) for key in keys if client.ttl(key) == -1]
    assert not endless, endless
