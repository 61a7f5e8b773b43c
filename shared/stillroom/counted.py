"""Define how things are counted by name: the fields `<kind>:<what>:<name>` of `ns:stats` and `ns:counts`. Pure.

Kinds are loaders, limits and rules of abuse. Their names are the app's own words, of which there are few; a process
counts a hundred of each kind by name, and the rest as `others`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence

LOADER, LIMIT, RULE = "loader", "limit", "rule"
OTHERS = "others"
# Fields that count by name: those of by_name, and keys.WOULD_DENY.
_NAMED = re.compile(r"(?:(?:loader|limit|rule):[^:]+|limit_would_deny):(?P<name>.+)", re.DOTALL)
# The longest a load took, in ms, and the count for those that took no longer. The last one is for all longer ones.
LOAD_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000)
LONGEST_MS = 60_000  # reported for a load that took longer than the last bound
TOOK = tuple(f"took_{bound}" for bound in (*LOAD_BOUNDS, "longer"))


def by_name(counts: Mapping[str, int], kind: str) -> dict[str, dict[str, int]]:
    """Return what is counted of each thing of a kind: name → what → how many.

    >>> by_name({"loader:hits:a:b": 2, "limit:checks:api": 3, "hits": 9}, LOADER)
    {'a:b': {'hits': 2}}
    """
    found: dict[str, dict[str, int]] = {}
    for field, number in counts.items():
        of, _, rest = field.partition(":")
        if of == kind:
            what, _, name = rest.partition(":")
            found.setdefault(name, {})[what] = number
    return found


def rare(counts: Mapping[str, int], most: int) -> list[tuple[str, str]]:
    """Return the fields of the names that are counted least, beyond so many fields; each with that of the others.

    >>> rare({"limit:checks:api": 9, "limit:checks:t1": 1, "limit:denials:t1": 1, "hits": 8}, 2)
    [('limit:checks:t1', 'limit:checks:others'), ('limit:denials:t1', 'limit:denials:others')]
    """
    of_name: dict[str, list[str]] = {}
    for field in counts:
        if found := _NAMED.fullmatch(field):
            of_name.setdefault(found["name"], []).append(field)
    of_name.pop(OTHERS, None)
    folds: list[tuple[str, str]] = []
    for name in sorted(of_name, key=lambda name: sum(counts[field] for field in of_name[name])):
        if len(counts) - len(folds) <= most:
            break
        folds += [(field, field.removesuffix(name) + OTHERS) for field in of_name[name]]
    return folds


def took(seconds: float) -> str:
    """Return what a load that took so long is counted as.

    >>> took(0.001), took(0.0011), took(99)
    ('took_1', 'took_2', 'took_longer')
    """
    return TOOK[bisect_left(LOAD_BOUNDS, seconds * 1000)]


def percentile(numbers: Sequence[int], share: float) -> float | None:
    """Return how long this share of the loads took at the most, ms, estimated within its bucket; None without any.

    `numbers`: of each bucket, as in TOOK.

    >>> percentile([0, 0, 0, 10] + [0] * 11, 0.5), percentile([0] * 15, 0.5)
    (7.5, None)
    """
    total = sum(numbers)
    if not total:
        return None
    left = share * total
    lower = 0.0
    for upper, number in zip((*LOAD_BOUNDS, LONGEST_MS), numbers, strict=True):
        if number and left <= number:
            return round(lower + (upper - lower) * left / number, 3)
        left -= number
        lower = upper
    return float(LONGEST_MS)
