"""Whether a value that has been to Redis and back is the one that was sent: equal, and of the same types. Pure."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import datetime, time
from enum import Enum
from typing import Any

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

NATIVE = (str, int, float, bool, type(None))  # JSON has these
DEPTH_LIMIT = 100  # containers in containers that JSON is trusted with unseen
BITS_LIMIT = 10_000  # of an int: parsers refuse numbers of more than 4,300 digits
SEQUENCES = (list, tuple, set, frozenset, deque)
LOST = (SecretStr, SecretBytes, Secret, bytes, bytearray, memoryview)


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is what JSON gives back by itself: lists, dicts with text keys, text, numbers, None."""
    kind = type(value)
    if kind is int:
        return bool(-(1 << BITS_LIMIT) < value < (1 << BITS_LIMIT))
    if kind in NATIVE:
        return True
    if depth > DEPTH_LIMIT:
        return False
    if kind is list:
        return all(is_plain(one, depth + 1) for one in value)
    if kind is dict:
        return all(type(key) is str for key in value) and all(
            is_plain(one, depth + 1) for one in value.values()
        )
    return False


def is_same(sent: Any, back: Any) -> bool:
    """Whether two values are equal and of the same types, all the way down.

    Moments are the same in any zone of the same offset. What pydantic does not restore, the set of fields that were
    given and a cached property, does not count.
    """
    kind = type(sent)
    if kind is not type(back):
        return False
    if kind in NATIVE:
        return bool(sent == back) or bool(sent != sent and back != back)
    if isinstance(sent, Mapping):
        return _pairwise(_items(sent), _items(back))
    if isinstance(sent, set | frozenset):
        return _same_set(sent, back)
    if isinstance(sent, SEQUENCES):
        return _pairwise(sent, back)
    if isinstance(sent, BaseModel):
        return all(map(is_same, _parts_of(sent), _parts_of(back)))
    if dataclasses.is_dataclass(sent):
        return _pairwise(_fields_of(sent), _fields_of(back))
    if isinstance(sent, datetime | time):
        return bool(sent == back and sent.utcoffset() == back.utcoffset())
    return bool(sent is back if isinstance(sent, Enum) else sent == back)


def lost_in(sent: Any, back: Any, path: str = "the value") -> str | None:
    """What JSON has lost of an untyped value, as a sentence; None if it has only another form there.

    A tuple may come back as a list, a date as text, a model as a dict. A secret, an infinity, bytes, two keys that
    have one text, a field that is left out may not: nobody could tell what it had been.
    """
    if isinstance(sent, Enum) or type(sent) in NATIVE or sent is back:
        return None if _is_kept(sent, back) else f"{path}: {sent!r} comes back as {back!r}"
    if isinstance(sent, LOST):
        return f"{path}: {type(sent).__name__} has no JSON of its own"
    if isinstance(sent, BaseModel):
        return _lost_of_model(sent, back, path)
    if dataclasses.is_dataclass(sent) and not isinstance(sent, type):
        names = [field.name for field in dataclasses.fields(sent)]
        return _lost_of_fields({name: getattr(sent, name) for name in names}, back, path)
    if isinstance(sent, Mapping):
        return _lost_of_mapping(sent, back, path)
    if isinstance(sent, set | frozenset):
        is_whole = isinstance(back, list) and len(back) == len(sent)
        return None if is_whole else f"{path}: a set of {len(sent)} comes back as {back!r:.50}"
    if isinstance(sent, SEQUENCES):
        return _lost_of_sequence(sent, back, path)
    return (
        None
        if _is_kept(sent, back)
        else f"{path}: {type(sent).__name__} comes back as {back!r:.50}"
    )


def _is_kept(sent: Any, back: Any) -> bool:
    """A value without parts: something of it is there."""
    if isinstance(sent, float):
        return type(back) in (float, int) and is_same(float(sent), float(back))
    return back is not None or sent is None or (isinstance(sent, Enum) and sent.value is None)


def _lost_of_model(sent: BaseModel, back: Any, path: str) -> str | None:
    if sent.__pydantic_private__:
        return f"{path}: {type(sent).__name__} has private attributes"
    fields = {name: getattr(sent, name) for name in type(sent).model_fields}
    aliases = {name: field.serialization_alias for name, field in type(sent).model_fields.items()}
    named = {aliases[name] or name: value for name, value in fields.items()}
    return _lost_of_fields({**named, **(sent.model_extra or {})}, back, path)


def _lost_of_fields(fields: Mapping[str, Any], back: Any, path: str) -> str | None:
    if not isinstance(back, dict):
        return None  # it has a serializer of its own
    for name, value in fields.items():
        if name not in back:
            return f"{path}: the field {name} is left out"
        if lost := lost_in(value, back[name], f"{path}.{name}"):
            return lost
    return None


def _lost_of_mapping(sent: Mapping[Any, Any], back: Any, path: str) -> str | None:
    if not isinstance(back, dict) or len(back) != len(sent):
        return f"{path}: of its keys some have one text"
    pairs = zip(sent.items(), back.values(), strict=True)
    return next(
        (lost for (k, v), b in pairs if (lost := lost_in(v, b, f"{path}[{k!r:.50}]"))), None
    )


def _lost_of_sequence(sent: Any, back: Any, path: str) -> str | None:
    if not isinstance(back, list) or len(back) != len(sent):
        return f"{path}: a {type(sent).__name__} comes back as {type(back).__name__}"
    pairs = enumerate(zip(sent, back, strict=True))
    return next((lost for n, (s, b) in pairs if (lost := lost_in(s, b, f"{path}[{n}]"))), None)


def _pairwise(sent: Any, back: Any) -> bool:
    return len(sent) == len(back) and all(map(is_same, sent, back))


def _items(mapping: Mapping[Any, Any]) -> list[Any]:
    return [part for pair in mapping.items() for part in pair]


def _same_set(sent: Any, back: Any) -> bool:
    if sent != back:
        return False
    found = {one: one for one in back}
    return all(is_same(one, found[one]) for one in sent)


def _parts_of(model: BaseModel) -> Iterator[Any]:
    fields = model.__dict__
    yield {name: fields.get(name) for name in type(model).model_fields}
    yield model.model_extra
    yield model.__pydantic_private__


def _fields_of(value: Any) -> list[Any]:
    return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
