"""Servers that are formed once for many tests, and healed before each."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

_lost: WeakSet[object] = WeakSet()


def heal_once(formed: object, heal: Callable[[], None]) -> None:
    """Wait until they are well. If that took too long once, later tests fail without waiting for it again."""
    assert formed not in _lost, "what an earlier test broke did not heal"
    _lost.add(formed)
    heal()
    _lost.remove(formed)
