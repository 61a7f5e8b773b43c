"""Whole numbers as an app gives them. Pure."""

from __future__ import annotations

from typing import Any, TypeGuard


def is_whole(given: Any, least: int = 1, most: float = float("inf")) -> TypeGuard[int]:
    """Return whether this is an int in the range. A float, a bool and text are not.

    >>> is_whole(3), is_whole(3.0), is_whole(True), is_whole("3"), is_whole(0)
    (True, False, False, False, False)
    """
    return isinstance(given, int) and not isinstance(given, bool) and least <= given <= most
