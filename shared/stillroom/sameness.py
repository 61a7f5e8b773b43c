"""Compare a value that was sent to Redis with the one that came back: equal, and of the same types. Pure."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from datetime import datetime, time, timedelta
from enum import Enum
from functools import partial
from inspect import getattr_static
from typing import Any, TypeAlias, overload

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

NATIVE = frozenset((str, int, float, bool, type(None)))  # JSON has these
DEPTH_LIMIT = 100  # containers in containers: deeper ones are looked at, not trusted
INT_LIMIT = 1 << 10_000  # parsers refuse numbers of more than 4,300 digits
TYPES_LIMIT = 500  # an app has so many; types made in each request must not pile up
SEQUENCES = (list, tuple, set, frozenset, deque)
CONTAINERS = (Mapping, *SEQUENCES)
MISSING: Any = object()
BY_IDENTITY: Any = object.__eq__
NO_FIELDS: frozenset[str] = frozenset()
SECRETS = (SecretStr, SecretBytes, Secret)
WITHOUT_JSON = (*SECRETS, bytes, bytearray, memoryview)


def is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether JSON gives the value back by itself: lists, dicts with text keys, text, numbers, None."""
    kind = type(value)
    if kind is int:
        return bool(-INT_LIMIT < value < INT_LIMIT)
    if kind is list:
        return depth < DEPTH_LIMIT and all(is_plain(one, depth + 1) for one in value)
    if kind is dict:
        parts = value.values() if all(type(key) is str for key in value) else [MISSING]
        return depth < DEPTH_LIMIT and all(is_plain(one, depth + 1) for one in parts)
    return kind in NATIVE


def has_iterator(value: Any) -> bool:
    """Return whether something in the value can be read once only, so that encoding would use it up."""
    return _has_part(value, lambda kind: hasattr(kind, "__next__"))


def has_secret(value: Any) -> bool:
    """Return whether something in the value is one of pydantic's secrets, which are written as stars."""
    return _has_part(value, lambda kind: issubclass(kind, SECRETS))


def _has_part(value: Any, fits: Callable[[type], bool], depth: int = 0) -> bool:
    kind = type(value)
    if kind in NATIVE:
        return False
    if fits(kind):
        return True
    if issubclass(kind, Mapping):
        parts: Any = value.values()
    elif _is_record(value):
        parts = _fields_of(value).values()
    else:
        parts = value if issubclass(kind, SEQUENCES) else ()
    return depth < DEPTH_LIMIT and any(_has_part(one, fits, depth + 1) for one in parts)


def is_same(sent: Any, back: Any, widened: bool = False) -> bool:
    """Return whether two values are equal and of the same types, all the way down.

    What `==` does not see counts as well: the `maxlen` of a deque, what a defaultdict makes, the `fold` of a time
    without a zone, attributes besides the fields of a dataclass. A moment is the same in every zone with its
    offset. Which fields of a model were given, and cached properties, are not part of its value. With `widened` an
    int may have become the float that it is equal to, a bool the int, and a generic model one with its parameters:
    a type checker takes one for the other.
    """
    kind = type(sent)
    if kind is not type(back):
        return widened and _is_widened(sent, back)
    if kind in NATIVE:
        return bool(sent == back) or bool(sent != sent and back != back)
    compare = _comparisons.get(kind)
    if compare is None:
        if len(_comparisons) >= TYPES_LIMIT:
            _comparisons.clear()
        compare = _comparisons[kind] = _comparison_of(kind)
    return compare(sent, back, widened)


def _is_widened(sent: Any, back: Any) -> bool:
    if isinstance(sent, BaseModel):
        origin = (
            type(back).__pydantic_generic_metadata__["origin"]
            if isinstance(back, BaseModel)
            else None
        )
        return origin is type(sent) and _same_model(sent, back, True)
    return type(sent) in (bool, int) and type(back) in (int, float) and bool(sent == back)


Comparison: TypeAlias = Callable[[Any, Any, bool], bool]

_comparisons: dict[type, Comparison] = {}


def _comparison_of(kind: type) -> Comparison:
    """Return how two values of this type are compared, chosen once because a list may have thousands."""
    if is_row(kind):
        return lambda *_: False
    if issubclass(kind, BaseModel):
        return _same_model
    compare = _comparison_of_container(kind) if issubclass(kind, CONTAINERS) else None
    if dataclasses.is_dataclass(kind):
        names = frozenset(field.name for field in dataclasses.fields(kind))
        fields = partial(_same_fields, names)
        return partial(_same_both, compare, fields) if compare else fields
    if compare is not None:
        return partial(_same_and_attributes, compare) if has_attributes(kind) else compare
    if issubclass(kind, datetime | time):
        return _same_time
    if issubclass(kind, Enum):
        return lambda one, other, _: one is other
    return lambda one, other, _: bool(one == other)


def _comparison_of_container(kind: type) -> Comparison:
    if issubclass(kind, defaultdict):
        return partial(_same_with, "default_factory", _same_mapping)
    if issubclass(kind, deque):
        return partial(_same_with, "maxlen", _same_sequence)
    if issubclass(kind, Mapping):
        return _same_mapping
    return _same_set if issubclass(kind, set | frozenset) else _same_sequence


def _same_with(name: str, compare: Comparison, sent: Any, back: Any, widened: bool) -> bool:
    return bool(getattr(sent, name) == getattr(back, name)) and compare(sent, back, widened)


def _same_both(items: Comparison, fields: Comparison, sent: Any, back: Any, widened: bool) -> bool:
    """Compare what is a container and a dataclass."""
    return items(sent, back, widened) and fields(sent, back, widened)


def _same_and_attributes(compare: Comparison, sent: Any, back: Any, widened: bool) -> bool:
    return compare(sent, back, widened) and _same_attributes(NO_FIELDS, sent, back, widened)


def _same_sequence(sent: Any, back: Any, widened: bool) -> bool:
    pairs = zip(sent, back, strict=False)
    return len(sent) == len(back) and all(is_same(*pair, widened) for pair in pairs)


def _same_mapping(sent: Any, back: Any, widened: bool) -> bool:
    is_keys = _same_sequence(sent, back, widened)
    return is_keys and _same_sequence(sent.values(), back.values(), widened)


def _same_set(sent: Any, back: Any, widened: bool) -> bool:
    found = {one: one for one in back}
    return bool(sent == back) and all(is_same(one, found[one], widened) for one in sent)


def _same_model(sent: Any, back: Any, widened: bool) -> bool:
    fields, others = sent.__dict__, back.__dict__
    for name in type(sent).__pydantic_fields__:
        if not is_same(fields.get(name), others.get(name), widened):
            return False
    is_extra = is_same(sent.__pydantic_extra__, back.__pydantic_extra__, widened)
    private = sent.__pydantic_private__
    return is_extra and (not private or _same_named(private, back.__pydantic_private__, widened))


def _same_fields(names: AbstractSet[str], sent: Any, back: Any, widened: bool) -> bool:
    is_alike = all(is_same(getattr(sent, n), getattr(back, n), widened) for n in names)
    return is_alike and _same_attributes(names, sent, back, widened)


def _same_attributes(fields: AbstractSet[str], sent: Any, back: Any, widened: bool) -> bool:
    """Return whether two objects have the same attributes besides their fields."""
    attributes = attributes_of(sent, fields)
    return not attributes or _same_named(attributes, attributes_of(back, fields), widened)


def _same_named(attributes: dict[str, Any], others: dict[str, Any], widened: bool) -> bool:
    return all(
        name in others
        and (_are_made_anew(one, others[name]) or is_same(one, others[name], widened))
        for name, one in attributes.items()
    )


def _are_made_anew(one: Any, other: Any) -> bool:
    """Return whether nothing tells these objects apart: each instance makes a lock of its own, for example."""
    kind: Any = type(one)
    return kind is type(other) and kind.__eq__ is BY_IDENTITY


def _same_time(sent: Any, back: Any, _: bool) -> bool:
    """Compare the clock's face and the offset: in the hour that a zone has twice no two zones compare as equal."""
    offset = sent.utcoffset()
    if offset != back.utcoffset() or (sent.tzinfo is None) != (back.tzinfo is None):
        return False
    is_alike = sent.replace(tzinfo=None) == back.replace(tzinfo=None)
    return bool(is_alike) and (offset is not None or sent.fold == back.fold)


def lost_in(sent: Any, back: Any, place: str = "") -> str | None:
    """Return what a value has lost on its way to JSON and back, in words; None if it has only another form.

    A tuple may come back as a list, a date as text, a model as a dict. Secrets, infinities, bytes, keys that have
    one text, and fields that are left out are lost. The sentence names no value, only its place.
    """
    if what := _never_kept(sent):
        return f"{place or 'it'} is {what}"
    if _lacks_items(sent, back):
        return f"{place or 'it'} is a dataclass and comes back without its items"
    if type(sent) is type(back) and (instead := _unseen(sent, back)):
        return f"{place or 'it'} comes back with {instead}"
    parts = _parts(sent, back)
    if parts is not None:
        for name, one, other in parts:
            if other is MISSING:
                return f"{place}{name} is left out"
            if lost := lost_in(one, other, f"{place}{name}"):
                return lost
        return None
    if isinstance(sent, set | frozenset):
        is_whole = isinstance(back, list | set | frozenset) and len(back) == len(sent)
        return None if is_whole else f"{place or 'it'} comes back as {type(back).__name__}"
    return (
        None if _has_a_form(sent, back) else f"{place or 'it'} comes back as {_words(sent, back)}"
    )


def changed_in(sent: Any, back: Any, place: str = "") -> str:
    """Return in words which part of a value comes back as another one, or as one of another type."""
    for name, one, other in _parts(sent, back) or ():
        if other is MISSING or not is_same(one, other, True):
            return changed_in(one, other, f"{place}{name}")
    kind, instead = map(full_name, (type(sent), type(back)))
    if kind == instead:
        return f"{place or 'it'} comes back as another {kind}"
    return f"{place or 'it'} is of the type {kind}, and comes back as {instead}"


def full_name(kind: type) -> str:
    """Return the name of a class with its module, but for Python's own."""
    name = kind.__qualname__
    return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}"


def _is_record(value: Any) -> bool:
    return isinstance(value, BaseModel) or dataclasses.is_dataclass(type(value))


def _never_kept(value: Any) -> str | None:
    """Return in words what a value is that no JSON gives back; None for any other value."""
    name = type(value).__name__
    if isinstance(value, WITHOUT_JSON):
        return f"{name}, which has no JSON of its own"
    if is_row(type(value)):
        return "a row that belongs to a session of SQLAlchemy; make a model of it"
    if isinstance(value, datetime | timedelta) and plain_time(value) is None:
        return f"a {name} that says more than microseconds"
    if isinstance(value, datetime | time) and not _has_a_text(value):
        what = "zone without an offset" if value.tzinfo else "fold=1 and no zone"
        return f"a {name} with {what}, which no text says"
    return None


def is_row(kind: type) -> bool:
    """Return whether objects of this type are rows of SQLAlchemy, as SQLModel's tables are.

    What such an object holds is loaded when it is asked for: after a commit nothing is in it.
    """
    return hasattr(kind, "_sa_class_manager")


def _lacks_items(sent: Any, back: Any) -> bool:
    """Return whether a container that is a dataclass has come back by its fields alone."""
    if not isinstance(sent, (dict, *SEQUENCES)) or not dataclasses.is_dataclass(type(sent)):
        return False
    return len(sent) > 0 and not (type(back) is type(sent) and len(back) == len(sent))


def _unseen(sent: Any, back: Any) -> str | None:
    """Return in words what a container has lost that is none of its parts; None if it has lost nothing."""
    if isinstance(sent, deque):
        return None if sent.maxlen == back.maxlen else "another maxlen"
    if isinstance(sent, defaultdict) and sent.default_factory != back.default_factory:
        return "another default_factory"
    if not isinstance(sent, list | tuple | dict | set | frozenset):
        return None
    lost = attributes_of(sent).keys() - attributes_of(back).keys()
    return f"no attribute {min(lost)}" if lost else None


def _parts(sent: Any, back: Any) -> Iterable[tuple[str, Any, Any]] | None:
    """Return (place, part sent, part read back) for each part, or None without parts or with other
    numbers of them.
    """
    if _is_record(sent):
        found = _fields_of(back) if type(back) is type(sent) else back
        if not isinstance(found, Mapping):
            return None
        names = {name: _alias(sent, name) for name in _fields_of(sent)}
        return [
            (f".{name}", one, found.get(names[name], found.get(name, MISSING)))
            for name, one in _fields_of(sent).items()
        ]
    if not _are_alike(sent, back) or len(sent) != len(back):
        return None
    if isinstance(sent, Mapping):
        return [("[…]", *pair) for pair in zip(sent.values(), back.values(), strict=True)]
    return [(f"[{n}]", *pair) for n, pair in enumerate(zip(sent, back, strict=True))]


def _are_alike(sent: Any, back: Any) -> bool:
    """Return whether both are mappings, or both sequences."""
    kinds = Mapping if isinstance(sent, Mapping) else (list, tuple, deque)
    return isinstance(sent, kinds) and isinstance(back, kinds)


def _has_a_form(sent: Any, back: Any) -> bool:
    """Return whether a value without parts came back in any form."""
    if isinstance(sent, Mapping | list | tuple | deque):
        return False
    if _is_record(sent) and _is_record(back):  # of another class
        return is_same(sent, back, True)
    if isinstance(sent, float):
        return type(back) in (float, int) and is_same(float(sent), float(back))
    if type(sent) in NATIVE:
        return bool(sent == back)
    return back is not None or (isinstance(sent, Enum) and sent.value is None)


@overload
def plain_time(value: datetime) -> datetime | None: ...
@overload
def plain_time(value: timedelta) -> timedelta | None: ...
def plain_time(value: datetime | timedelta) -> datetime | timedelta | None:
    """Return the value as one of Python's own class; None where its class knows more, such as nanoseconds.

    Pandas has a moment that is none.
    """
    plain: datetime | timedelta
    try:
        if isinstance(value, timedelta):
            plain = timedelta(value.days, value.seconds, value.microseconds)
        else:
            plain = datetime(
                *(value.year, value.month, value.day, value.hour, value.minute, value.second),
                *(value.microsecond, value.tzinfo),
                fold=value.fold,
            )
        return plain if plain == value else None
    except (TypeError, ValueError):
        return None


def _has_a_text(moment: datetime | time) -> bool:
    if moment.tzinfo is None:
        return not moment.fold
    return moment.utcoffset() is not None


def _words(sent: Any, back: Any) -> str:
    if isinstance(sent, Mapping) and isinstance(back, Mapping):
        return f"{len(back)} of its {len(sent)} keys: some have one text"
    if type(sent) is type(back):
        return f"another {type(back).__name__}"
    return type(back).__name__


def _alias(model: Any, name: str) -> str:
    field = type(model).model_fields.get(name) if isinstance(model, BaseModel) else None
    return (field and field.serialization_alias) or name


def _fields_of(value: Any) -> dict[str, Any]:
    """Return the fields of a model or a dataclass by name, with private and other attributes."""
    if not isinstance(value, BaseModel):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {**fields, **attributes_of(value, fields.keys())}
    fields = {name: value.__dict__.get(name) for name in type(value).model_fields}
    return {**fields, **(value.model_extra or {}), **(value.__pydantic_private__ or {})}


def has_attributes(kind: type) -> bool:
    """Return whether objects of this type may have attributes, in a dict or in slots."""
    return bool(kind.__dictoffset__) or any(vars(base).get("__slots__") for base in kind.__mro__)


def attributes_of(value: Any, fields: AbstractSet[str] = NO_FIELDS) -> dict[str, Any]:
    """Return the attributes that somebody has set on an object, besides its fields and its cached properties."""
    state: Any = object.__getstate__(value)
    own, in_slots = state if isinstance(state, tuple) else (state, None)
    attributes = {**(own or {}), **in_slots} if in_slots else own
    if not attributes or attributes.keys() <= fields:
        return {}
    kind = type(value)
    return {
        name: one
        for name, one in attributes.items()
        if name not in fields and not name.startswith("__") and not _is_computed(kind, name)
    }


def _is_computed(kind: type, name: str) -> bool:
    """Return whether the class makes this attribute by itself: `functools.cached_property` and its like."""
    maker = getattr_static(kind, name, None)
    is_plain_maker = hasattr(maker, "__get__") and not hasattr(maker, "__set__")
    return is_plain_maker or is_cached_property(maker)


def is_cached_property(maker: Any) -> bool:
    """Return whether this keeps what it computes in the instance. Django's and werkzeug's do that, too."""
    return any("cached_property" in kind.__name__ for kind in type(maker).__mro__)
