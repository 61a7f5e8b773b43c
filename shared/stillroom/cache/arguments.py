"""Write an argument into a key, as a text that says all of its value and is the same in every process.

A parameter that is declared to be of one type has the plain text: `7` for an int, the text itself for a str. Where
several types are possible, a str that looks like another type's text is quoted: `7` and `'7'`, `None` and `'None'`.
The other types carry their name there, `UUID(…)`, and so do classes of the app: two NamedTuples of equal parts are
equal to Python, and not to a loader that takes both. A value of another type than declared is marked: `%1F"7"`, and
so is one of the app's own `class Id(int)` that has attributes: `%1Fshop.Id(7){tenant:"acme"}`. Where just an int is
declared, neither its class nor its attributes are looked at.

The table of types is closed. Of anything else (a connection, an object of a class) no text says what it is: str(),
repr() and hash() differ between processes, or do not differ where they should. So it is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import operator
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import PurePath
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin
from uuid import UUID

from pydantic import AnyUrl, BaseModel

from stillroom import pepper
from stillroom.cache.declared import meant
from stillroom.errors import InvalidArgument, in_code
from stillroom.sameness import SECRETS, attributes_of, full_name, has_attributes, is_row, plain_time
from stillroom.settings import Settings

Text: TypeAlias = Callable[[Any], str]

MARK = "\x1f"  # in front of a value of another type than declared; in Redis it is %1F
DEPTH_LIMIT = 50  # containers in containers
SECRET_DIGITS = 32  # of an HMAC, hexadecimal

ADDRESSES = (
    *(IPv4Interface, IPv6Interface, IPv4Network, IPv6Network, IPv4Address, IPv6Address),
    *(AnyUrl, PurePath),
)
CONTAINERS = (list, tuple, set, frozenset, dict)
TABLE = (
    "None, bool, int, float, str, bytes, Decimal, UUID, date, time, datetime, timedelta, Enum, paths, URLs and IP "
    "addresses, pydantic models and dataclasses, and lists, tuples, sets and dicts of these"
)

# The form of the texts of values other than str.
_OTHERS = re.compile(
    r"'.*|None|True|False|-?[0-9].*|-?inf|nan|[\[({].*|[^\W\d][\w.<>]*[\[({].*", re.DOTALL
)
_NONE = re.compile(r"'.*|None", re.DOTALL)


class Unkeyable(InvalidArgument):
    """A value or a type has no text that says all of it."""


class Texts:
    """Makes the texts of arguments. `hide` is given a secret, and returns what may be seen of it."""

    def __init__(self, hide: Callable[[bytes], str], *, names_own: bool = True) -> None:
        self._hide = hide
        self._names_own = names_own
        self._declared = Texts(hide, names_own=False) if names_own else self

    def of(self, annotation: Any) -> Text:
        """Return what makes the text of an argument that is declared so; Any: it is not declared.

        Raises Unkeyable for a type of which no value has a text.
        """
        plain = (self._declared if _is_closed(annotation) else self)._of(annotation)
        own = frozenset(filter(_is_own, _members(annotation)))
        if not own:
            return plain

        def text(value: Any) -> str:
            is_other = type(value) not in own and _is_own(type(value))
            if is_other or _attributes_of_scalar(value):
                return MARK + self.canonical(value)
            return plain(value)

        return text

    def _of(self, annotation: Any) -> Text:
        members = list(dict.fromkeys(_members(annotation)))
        kinds = [_base_of(member) for member in members if member is not types.NoneType]
        if len(kinds) != 1 or kinds[0] is Any:
            return self.open
        is_optional = len(members) > 1
        if kinds[0] is str:
            return self._text_or_none if is_optional else self._text
        plain = self._plain_of(kinds[0])
        return self._or_none(plain) if is_optional else self._or_marked(plain)

    def of_tag(self, annotation: Any) -> Text:
        """Return what makes the text of such an argument in a tag: the one that a person writes, `f"sku:{sku}"`.

        A value of another type than declared has the plain text of its own type. Two values may share a text there:
        that invalidates more than was meant, and a text that nobody writes invalidates nothing.
        """
        texts = self._declared
        declared = texts._of(annotation)

        def text(value: Any) -> str:
            if isinstance(value, str):
                return str.__str__(value)
            said = declared(value)
            is_plain = declared != texts.open and not said.startswith(MARK)
            return said if is_plain else texts._own(value, said)

        return text

    def _own(self, value: Any, otherwise: str) -> str:
        """Return the plain text of a value of just its type, or the other text where that type is not known."""
        try:
            return self._of(type(value))(value)
        except Unkeyable:
            return otherwise

    def open(self, value: Any) -> str:
        """Return the text of a value that may be of any type."""
        if type(value) is not str:
            return self.canonical(value)
        return f"'{value}'" if _OTHERS.fullmatch(value) else value

    def _text(self, value: Any) -> str:
        if type(value) is not str:
            if not isinstance(value, str):
                return MARK + self.canonical(value)
            value = str.__str__(value)
        return f"{MARK}'{value}'" if value.startswith(MARK) else value

    def _text_or_none(self, value: Any) -> str:
        if value is None:
            return "None"
        text = self._text(value)
        return f"'{text}'" if _NONE.fullmatch(text) else text

    def _or_marked(self, plain: Callable[[Any], str | None]) -> Text:
        def text(value: Any) -> str:
            found = plain(value)
            return MARK + self.canonical(value) if found is None else found

        return text

    def _or_none(self, plain: Callable[[Any], str | None]) -> Text:
        def text(value: Any) -> str:
            if value is None:
                return "None"
            found = plain(value)
            return MARK + self.canonical(value) if found in (None, "None") else found

        return text

    def _plain_of(self, kind: Any) -> Callable[[Any], str | None]:
        """Return what makes the plain text of a value of this kind, and None of any other."""
        if kind is int:
            return _int_like
        if kind is float:
            return _float_like
        if kind in CONTAINERS:
            return lambda value: (
                self._container(value, 0) if isinstance(value, CONTAINERS) else None
            )
        if issubclass(kind, Enum):
            return lambda value: _name_of(value) if type(value) is kind else None
        if issubclass(kind, SECRETS):
            return lambda value: self._secret(value) if isinstance(value, kind) else None
        if issubclass(kind, ADDRESSES):
            return lambda value: str(value) if isinstance(value, kind) else None
        if plain := _PLAIN.get(kind):
            return lambda value: plain(value) if _kind_of(value) is kind else None
        return lambda value: self._record(value, 0) if type(value) is kind else None

    def canonical(self, value: Any, depth: int = 0) -> str:
        """Return the text of a value, whatever was declared. Raises Unkeyable."""
        if depth > DEPTH_LIMIT:
            raise Unkeyable(f"a value that goes {DEPTH_LIMIT} deep has no text to stand in a key")
        if isinstance(value, CONTAINERS):
            return self._own_name(type(value)) + self._container(value, depth)
        if isinstance(value, SECRETS):
            return f"secret({self._secret(value)})"
        if (text := _scalar(value, self._own_name(type(value)))) is not None:
            more = _attributes_of_scalar(value)
            return text + (self._attributes(value, more, depth) if more else "")
        if _is_record_type(type(value)):
            return full_name(type(value)) + self._record(value, depth)
        raise Unkeyable(_sentence(type(value)))

    def _own_name(self, kind: type) -> str:
        return full_name(kind) if self._names_own and _is_own(kind) else ""

    def _container(self, value: Any, depth: int) -> str:
        """Return the parts of a container, and the attributes that it has besides."""
        more = attributes_of(value) if has_attributes(type(value)) else None
        return self._parts(value, depth) + (self._named(more, depth) if more else "")

    def _parts(self, value: Any, depth: int) -> str:
        def text(one: Any) -> str:
            return self.canonical(one, depth + 1)

        if isinstance(value, list):
            return f"[{','.join(map(text, value))}]"
        if isinstance(value, tuple):
            return f"({','.join(map(text, value))})"
        if isinstance(value, dict):
            pairs = [f"{text(key)}:{text(one)}" for key, one in value.items()]
            if not isinstance(value, OrderedDict):
                pairs.sort()
            return f"{{{','.join(pairs) or ':'}}}"
        return f"{{{','.join(sorted(map(text, value)))}}}"

    def _record(self, value: Any, depth: int) -> str:
        """Return the fields of a model or a dataclass, private ones and other attributes too."""
        return self._named(_fields_of(value), depth)

    def _named(self, parts: Mapping[str, Any], depth: int) -> str:
        fields = sorted(f"{name}:{self.canonical(one, depth + 1)}" for name, one in parts.items())
        return f"{{{','.join(fields)}}}"

    def _attributes(self, value: Any, more: Mapping[str, Any], depth: int) -> str:
        try:
            return self._named(more, depth)
        except Unkeyable as error:
            kind = type(value)
            plain = next(one.__name__ for one in kind.__mro__ if one in _SCALARS)
            raise Unkeyable(
                f"{kind.__name__} is a {plain} with attributes; declare the parameter as {plain} if they do not "
                f"matter: {error}"
            ) from None

    def _secret(self, value: Any) -> str:
        secret = value.get_secret_value()
        if isinstance(secret, bytes):
            return self._hide(b"b" + secret)
        text = secret if isinstance(secret, str) else self.canonical(secret)
        return self._hide(b"s" + text.encode("utf-8", "surrogatepass"))


def text_in_tag(value: Any) -> str:
    """Return the text of any value in a tag. Raises Unkeyable."""
    return Texts(_refuse).of_tag(Any)(value)


def _refuse(_: bytes) -> str:
    raise Unkeyable("a secret has no text")


class Secrets:
    """Replace secret arguments in keys by their HMAC. The pepper is fetched with the first of them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pepper = b""

    def __call__(self, secret: bytes) -> str:
        """Return an HMAC of the secret."""
        if not self._pepper:
            (self._pepper, *_) = pepper.ring(
                self._settings,
                self._settings.session_peppers,
                "STILLROOM_SESSION_PEPPERS",
                without="cached values of secret arguments are known to this process only",
            )
        return hidden_with(self._pepper, secret)


def hidden_with(pepper: bytes, secret: bytes) -> str:
    """Return what stands in a key for a secret: an HMAC of it."""
    message = b"stillroom argument\0" + secret
    return hmac.digest(pepper, message, hashlib.sha256).hex()[:SECRET_DIGITS]


# Types


def _members(annotation: Any) -> Iterator[Any]:
    """Return the types that an annotation admits, or Any where they are unknown."""
    annotation = meant(annotation)
    origin = get_origin(annotation)
    if origin is Literal:
        yield from map(type, get_args(annotation))
    elif origin is Union or isinstance(annotation, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif type(annotation).__hash__ is None:
        raise Unkeyable(f"{in_code(annotation):.100} is no type; write list[int], for example")
    elif annotation in (Any, object):
        yield Any
    else:
        yield annotation if origin is None else origin


def _is_closed(annotation: Any) -> bool:
    """Return whether a value's own class adds nothing to what is declared, down to the items of containers.

    A Markup in a list[str] is the str that is declared; in a list[UserId | OrderId] a class decides.
    """
    named = list(_named_in(annotation))
    return Any not in named and (Union not in named or not any(map(_is_own, named)))


def _named_in(annotation: Any, within: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield the types in an annotation, down to the items of containers.

    Any stands for what only a value decides, and Union for a place in which several may stand. `within`: the
    annotations around this one; an alias may name itself.
    """
    if annotation in within:
        return
    around, annotation = (*within, annotation), meant(annotation)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal or annotation in (types.NoneType, ...):
        return
    if origin is None:
        scalars = (*_SCALARS, Enum, *SECRETS, *ADDRESSES)
        is_known = isinstance(annotation, type) and issubclass(annotation, scalars)
        yield annotation if is_known else Any
    elif origin is Union or isinstance(annotation, types.UnionType):
        if len({*args} - {types.NoneType}) > 1:
            yield Union
    elif origin not in CONTAINERS and origin.__module__ != "collections.abc":
        yield Any
    for one in args:
        yield from _named_in(one, around)


def _base_of(kind: Any) -> Any:
    """Return the table's type that this type is or derives from, or Any where the value decides.

    Raises Unkeyable.
    """
    if kind is Any or not isinstance(kind, type) or _is_open(kind):
        return Any
    if issubclass(kind, (Enum, *SECRETS, *ADDRESSES)):
        return kind
    for base in (*_PLAIN, int, float, str, *CONTAINERS):
        if issubclass(kind, base):
            return base
    if _is_record_type(kind):
        return kind
    raise Unkeyable(_sentence(kind))


def _is_open(kind: type) -> bool:
    """Return whether the type stands for others: a protocol, Mapping, Hashable, pydantic's EmailStr."""
    if getattr(kind, "_is_protocol", False) or kind.__module__ in ("collections.abc", "numbers"):
        return True
    return kind.__module__.startswith("pydantic.") and not issubclass(
        kind, (BaseModel, *SECRETS, *ADDRESSES)
    )


def _sentence(kind: type) -> str:
    if is_row(kind):
        what = "is a row that belongs to a session of SQLAlchemy; give its id"
        return f"{full_name(kind)} {what}"
    if hasattr(kind, "_meta") and hasattr(kind, "pk"):
        return f"{full_name(kind)} is a row of Django's; give its pk"
    return f"{full_name(kind)} has no text that says all of a value; a key is made of {TABLE}"


# Values


def _scalar(value: Any, own: str) -> str | None:
    """Return the text of a value without parts, or None for any other value. `own`: its class, if that is told."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, Enum):
        return f"{full_name(type(value))}({_name_of(value)})"
    if isinstance(value, ADDRESSES):
        return f"{type(value).__name__}({json.dumps(str(value), ensure_ascii=False)})"
    if isinstance(value, str | int | float):
        return f"{own}({_native(value)})" if own else _native(value)
    kind = _kind_of(value)
    return None if kind is None else f"{own or kind.__name__}({_PLAIN[kind](value)})"


def _native(value: str | float) -> str:
    if isinstance(value, str):
        return json.dumps(str.__str__(value), ensure_ascii=False)
    return _int_text(int(value)) if isinstance(value, int) else _float_text(value)


def _is_own(kind: Any) -> bool:
    """Return whether this is an app's own class of texts, numbers or containers.

    A moment is the same in any class of moments, numpy's floats are floats, and asyncpg's UUIDs are UUIDs.
    """
    if not isinstance(kind, type) or kind in _TYPES or issubclass(kind, (Enum, *ADDRESSES)):
        return False
    return issubclass(kind, _NAMED) and kind.__module__.partition(".")[0] not in _NEIGHBOURS


def _attributes_of_scalar(value: Any) -> dict[str, Any]:
    """Return the attributes that somebody has set on a value of an app's own class of numbers, texts or times."""
    if not _may_have_attributes(type(value)):
        return {}
    return attributes_of(value, _UUID_SLOTS)


def _may_have_attributes(kind: Any) -> bool:
    """Return whether this is an app's own class of values without parts. A member of an Enum is its name."""
    if not isinstance(kind, type) or kind in _SCALARS or issubclass(kind, (Enum, *ADDRESSES)):
        return False
    return issubclass(kind, tuple(_SCALARS)) and has_attributes(kind)


def _is_record_type(kind: type) -> bool:
    return (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)) and not is_row(kind)


def _fields_of(value: Any) -> dict[str, Any]:
    if not isinstance(value, BaseModel):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {**fields, **attributes_of(value, fields.keys())}
    # Not by getattr: a deprecated field warns of it.
    fields = {name: vars(value)[name] for name in type(value).model_fields if name in vars(value)}
    return {**fields, **(value.model_extra or {}), **(value.__pydantic_private__ or {})}


def _kind_of(value: Any) -> type | None:
    """Return which type with a plain text the value has, subclasses included."""
    return next((kind for kind in _PLAIN if isinstance(value, kind)), None)


def _int_text(value: int) -> str:
    # Python writes no decimals for numbers of more than 4,300 digits.
    return str(value) if value.bit_length() < 10_000 else hex(value)


def _int_like(value: Any) -> str | None:
    """Return the text of an int, of numpy's ints and of an IntEnum, which equals an int."""
    if type(value) is int:
        return _int_text(value)
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        return None
    return _int_text(operator.index(value))


def _float_like(value: Any) -> str | None:
    """Return the text of a float, or of an int that equals one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return _float_text(number) if number == value or isinstance(value, float) else None


def _float_text(value: float) -> str:
    return float.__repr__(float(value) + 0.0)  # 0.0 and -0.0 are equal


def _name_of(value: Enum) -> str:
    return str(value.value) if isinstance(value, Flag | str | int) else value.name


def _decimal_text(value: Decimal) -> str:
    """Return one text for equal numbers such as 1.5 and 1.50."""
    if not value.is_finite():
        return str(value)
    sign, digits, exponent = value.as_tuple()
    number = "".join(map(str, digits)).lstrip("0")
    stripped = number.rstrip("0")
    if not stripped:
        return "0"
    assert isinstance(exponent, int)
    power = exponent + len(number) - len(stripped)
    return f"{'-' * sign}{stripped}" + (f"E{power}" if power else "")


def _datetime_text(value: datetime) -> str:
    """Return one text for one moment in any zone."""
    plain = plain_time(value)
    if plain is None:
        raise Unkeyable(_sentence(type(value)))
    offset = plain.utcoffset()
    if offset is None:
        return plain.replace(tzinfo=None, fold=0).isoformat()
    try:
        return plain.astimezone(UTC).isoformat()
    except OverflowError:  # in the first or the last day there is
        return str(plain.replace(tzinfo=None) - datetime.min - offset)


def _timedelta_text(value: timedelta) -> str:
    """Return one text for one length of time. A subclass may write itself in the words of a language."""
    plain = plain_time(value)
    if plain is None:
        raise Unkeyable(_sentence(type(value)))
    return str(plain)


def _time_text(value: time) -> str:
    if value.utcoffset() is None:
        return value.replace(tzinfo=None, fold=0).isoformat()
    return _datetime_text(datetime.combine(date(2000, 1, 1), value))


# Types with a plain text for each value, the more special ones first: a datetime is a date.
_PLAIN: dict[type, Callable[[Any], str]] = {
    datetime: _datetime_text,
    date: date.isoformat,
    time: _time_text,
    timedelta: _timedelta_text,
    Decimal: _decimal_text,
    UUID: UUID.__str__,
    bytes: bytes.hex,
    bool: str,
}
_SCALARS = frozenset([*_PLAIN, int, float, str])
_TYPES = _SCALARS.union(CONTAINERS)
_NAMED = (int, float, str, bytes, Decimal, UUID, *CONTAINERS)
_NEIGHBOURS = ("asyncpg", "collections", "numpy")
_UUID_SLOTS = frozenset(UUID.__slots__)  # what its text says
