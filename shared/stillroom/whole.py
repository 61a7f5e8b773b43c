"""Read whole numbers as an app gives them, and as a text has them. Pure."""

from __future__ import annotations

from typing import Any, TypeGuard

DIGITS = 19  # of the largest number that Redis counts to


def is_whole(given: Any, least: int = 1, most: float = float("inf")) -> TypeGuard[int]:
    """Return whether this is an int in the range. A float, a bool and text are not.

    >>> is_whole(3), is_whole(3.0), is_whole(True), is_whole("3"), is_whole(0)
    (True, False, False, False, False)
    """
    return isinstance(given, int) and not isinstance(given, bool) and least <= given <= most


def number_in(text: bytes | str) -> int | None:
    """Return the number that a text in Redis is, or None if it is none, or none of Redis'.

    Python raises an error for a number of more than 4,300 digits.

    >>> number_in(b"12"), number_in("9" * 5_000), number_in(b"-1"), number_in("\u00b2")
    (12, None, None, None)
    """
    is_number = len(text) <= DIGITS and text.isascii() and text.isdigit()
    return int(text) if is_number else None
