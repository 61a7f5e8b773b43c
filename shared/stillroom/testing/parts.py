"""Find the parts of a room by walking from attribute to attribute: its services, bodies, drivers and wires."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from stillroom.cache.loaders import Loader, Loaders


def parts_of(room: object) -> Iterator[Any]:
    """Yield the room and each object of this package that it is made of, each once."""
    seen: set[int] = set()
    waiting: list[Any] = [room]
    while waiting:
        part = waiting.pop()
        if id(part) not in seen and is_part(part):
            seen.add(id(part))
            yield part
            for value in vars(part).values():
                waiting += _within(value)


def twins(old: object, new: object) -> Iterator[tuple[Any, Any]]:
    """Yield (part of one room, the part in its place in the other), the rooms themselves first."""
    seen: set[int] = set()
    waiting: list[tuple[Any, Any]] = [(old, new)]
    while waiting:
        one, other = waiting.pop()
        if id(one) in seen or not (is_part(one) and is_part(other)):
            continue
        seen.add(id(one))
        yield one, other
        theirs = vars(other)
        waiting += [(value, theirs[name]) for name, value in vars(one).items() if name in theirs]


def is_part(thing: object) -> bool:
    """Return whether this is an object of ours with attributes. Settings, loaders and functions are no parts."""
    of_ours = type(thing).__module__.startswith("stillroom.")
    is_data = isinstance(thing, BaseModel | Loader | Loaders | type)
    return of_ours and not is_data and hasattr(thing, "__dict__")


def _within(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [part for one in value for part in _within(one)]
    if isinstance(value, Mapping):
        return [part for one in list(value.values()) for part in _within(one)]
    owner = getattr(value, "__self__", None)  # a bound method, such as a driver's `run`
    return [owner if owner is not None and not isinstance(owner, type) else value]
