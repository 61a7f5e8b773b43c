"""Redis' own glob patterns, as SCAN MATCH and KEYS read them. Pure.

`*` any text, `?` any byte, `[abc]`, `[a-z]`, `[^a]` one byte, `\\x` the byte x. The corners are Redis' too
(util.c, stringmatchlen): a range may be written backwards, `[a-]` is a range up to `]`, a class that is not
closed ends with the pattern, and bytes above 127 count as negative in ranges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

ANY = re.compile(rb"(?s:.*)\Z")


def compile_glob(pattern: bytes) -> Callable[[bytes], object]:
    """Return a function that is truthy for the keys the pattern matches. Linear in the key for each `*`."""
    segments = list(_segments(pattern))
    if segments == ["", ""]:
        return ANY.match
    first, *others = segments
    if not others:
        return re.compile(f"(?s:{first})\\Z".encode("latin-1")).match
    *middle, last = others
    # Where a middle segment matches first is as good as anywhere: once found it is not given up (?>…).
    found = "".join(f"(?>.*?{segment})" for segment in middle if segment)
    return re.compile(f"(?s:{first}{found}.*{last})\\Z".encode("latin-1")).match


def _segments(pattern: bytes) -> Iterator[str]:
    """Return the regular expressions between the stars."""
    segment: list[str] = []
    position = 0
    while position < len(pattern):
        byte = pattern[position : position + 1]
        if byte == b"*":
            yield "".join(segment)
            segment = []
            while pattern[position + 1 : position + 2] == b"*":
                position += 1
        elif byte == b"?":
            segment.append(".")
        elif byte == b"[":
            allowed, position = _read_class(pattern, position + 1)
            segment.append(_one_of(allowed))
        else:
            if byte == b"\\" and position + 1 < len(pattern):
                position += 1
            segment.append(_one_of({pattern[position]}))
        position += 1
    yield "".join(segment)


def _read_class(pattern: bytes, position: int) -> tuple[set[int], int]:
    """Return (the allowed bytes, where the class ends: at its `]` or at the pattern's last byte)."""
    negated = pattern[position : position + 1] == b"^"
    position += negated
    allowed: set[int] = set()
    while position < len(pattern) and pattern[position] != ord("]"):
        rest = len(pattern) - position
        if pattern[position] == ord("\\") and rest >= 2:
            position += 1
            allowed.add(pattern[position])
        elif rest >= 3 and pattern[position + 1] == ord("-"):
            allowed |= _between(pattern[position], pattern[position + 2])
            position += 2
        else:
            allowed.add(pattern[position])
        position += 1
    return (set(range(256)) - allowed if negated else allowed), min(position, len(pattern) - 1)


def _between(one: int, other: int) -> set[int]:
    low, high = sorted((_signed(one), _signed(other)))
    return {number % 256 for number in range(low, high + 1)}


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _one_of(allowed: set[int]) -> str:
    """Return the class of these bytes by its runs, which is compiled many times sooner than a list of 255."""
    if len(allowed) == 1:
        return f"\\x{min(allowed):02x}"
    is_short = len(allowed) < 128
    runs = "".join(map(_written, _runs(allowed if is_short else set(range(256)) - allowed)))
    if not runs:
        return "(?!)" if is_short else "."
    return f"[{runs}]" if is_short else f"[^{runs}]"


def _runs(numbers: set[int]) -> list[tuple[int, int]]:
    """Return the first and last number of each run."""
    firsts = sorted(one for one in numbers if one - 1 not in numbers)
    lasts = sorted(one for one in numbers if one + 1 not in numbers)
    return list(zip(firsts, lasts, strict=True))


def _written(run: tuple[int, int]) -> str:
    return "-".join(f"\\x{byte:02x}" for byte in dict.fromkeys(run))
