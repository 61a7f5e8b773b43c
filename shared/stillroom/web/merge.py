"""Two requests that changed the same list, dict or set of a session: both keep what they did. Pure.

A value has three states: `base`, as this request read it; `ours`, as this request leaves it; `theirs`, as another
request has written it meanwhile. What was added to `base` is added to `theirs`, what was removed is removed. Where
nobody can say what was added (a number, a text, a list in another order), ours wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GONE: Any = object()  # in the place of a value: the key was removed, or was not there


def merged(base: Any, ours: Any, theirs: Any) -> Any:
    """Return what the session shall hold, or GONE.

    >>> merged(["tea"], ["tea", "jam"], ["tea", "rye"])
    ['tea', 'rye', 'jam']
    """
    if base == theirs and type(base) is type(theirs):
        return ours
    if base is GONE and type(ours) is type(theirs) and isinstance(ours, list | dict | set):
        base = type(ours)()  # both began one
    if isinstance(base, list):
        return _emptied(ours, _lists(base, _or(ours, []), _or(theirs, [])))
    if isinstance(base, dict):
        return _emptied(ours, _dicts(base, _or(ours, {}), _or(theirs, {})))
    if isinstance(base, set):
        return _emptied(ours, _sets(base, _or(ours, set()), _or(theirs, set())))
    return ours


def merged_keys(
    base: Mapping[str, Any], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keys and values that differ from `theirs` when what this request did is done to them.

    `base` has the keys this request has looked at; a key that it set or removed unseen has none, and ours wins.
    """
    found = {
        key: merged(base[key], value, theirs.get(key, GONE)) if key in base else value
        for key, value in ours.items()
    }
    return {key: value for key, value in found.items() if value is not theirs.get(key, GONE)}


def _lists(base: list[Any], ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return ours
    if ours[: len(base)] == base:
        return theirs + ours[len(base) :]
    if ours[len(ours) - len(base) :] == base:
        return ours[: len(ours) - len(base)] + theirs
    removed = _removed(base, ours)
    return ours if removed is None else _without(theirs, removed)


def _removed(base: list[Any], ours: list[Any]) -> list[Any] | None:
    """Return the elements of base that ours lacks, or None if ours was changed in another way too."""
    left = iter(base)
    removed: list[Any] = []
    for kept in ours:
        for one in left:
            if one == kept:
                break
            removed.append(one)
        else:
            return None
    return [*removed, *left]


def _without(values: list[Any], removed: list[Any]) -> list[Any]:
    values = list(values)
    for one in removed:
        if one in values:
            values.remove(one)
    return values


def _dicts(base: dict[Any, Any], ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ours
    result = dict(theirs)
    for key in [*base, *(key for key in ours if key not in base)]:
        before, now = base.get(key, GONE), ours.get(key, GONE)
        if before is now or (before == now and type(before) is type(now)):
            continue
        value = merged(before, now, theirs.get(key, GONE))
        if value is GONE:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def _sets(base: set[Any], ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, set) or not isinstance(theirs, set):
        return ours
    return (theirs | (ours - base)) - (base - ours)


def _or(value: Any, empty: Any) -> Any:
    return empty if value is GONE else value


def _emptied(ours: Any, result: Any) -> Any:
    """Drop a key that this request removed, unless another request has put something into it."""
    return GONE if ours is GONE and not result else result
