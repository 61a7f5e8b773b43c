"""The data of a session as its record holds them: each top-level key, and its JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from stillroom.codec import MISREAD
from stillroom.errors import (
    InvalidArgument,
    SessionDataRefused,
    SessionUnreadable,
    ValueTooLarge,
    in_code,
)
from stillroom.marked import (
    ATOMS,
    SAYS_HTML,
    SIGN,
    Marks,
    keys_in_common,
    loses_its_zone,
    writable,
)
from stillroom.sameness import has_secret, is_same, lost_in

META_LIMIT = 4096  # bytes of JSON
DATA_LIMIT = "STILLROOM_SESSION_DATA_LIMIT"
MAPPINGS = (dict, Mapping)  # the first is told at once
_STARS = b"*" * 10  # how pydantic writes a secret
_OF_SECRETS = (
    "a secret is written as stars, and would be lost; give what get_secret_value() returns"
)
_SURE_BYTES = 400  # shorter JSON is neither too deep nor has a number too long to be read
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", re.ASCII)
# The adapter of a dataclass takes 2 ms to make.
_adapter_of: Callable[[type], TypeAdapter[Any]] = lru_cache(128)(TypeAdapter)
_to_json = partial(to_json, by_alias=True, round_trip=True, inf_nan_mode="constants")
_JSON = (str, int, float, list, dict, type(None))


def encoded(data: Any, limit: int, keys_limit: int) -> dict[bytes, bytes]:
    """Return each top-level key and its JSON. Raises SessionDataRefused, SessionUnreadable or ValueTooLarge."""
    if not isinstance(data, MAPPINGS):
        return _encoded_record(data, limit, keys_limit)
    items = dict(data)
    names = [*map(_known_key, items)]
    texts = [*map(encoded_value, items, items.values())]
    written = b"".join(names + texts)
    size = len(written)
    if size > _SURE_BYTES:
        for text in texts:
            if len(text) > _SURE_BYTES:
                decoded(b'{"":%b}' % text, None)  # as it will be read: in the object, one deeper
    if _STARS in written and has_secret(data):
        raise SessionDataRefused(_OF_SECRETS)
    if len(names) > keys_limit:
        raise SessionDataRefused(f"{len(names)} keys, the limit is {keys_limit}")
    if size > limit:
        raise ValueTooLarge(size, limit, DATA_LIMIT)
    return dict(zip(names, texts, strict=True))


def flat(fields: Mapping[bytes, bytes]) -> Iterable[bytes]:
    """Return key, value, key, value … as a script takes them."""
    return chain.from_iterable(fields.items())


def _encoded_record(data: Any, limit: int, keys_limit: int) -> dict[bytes, bytes]:
    """Return the same of a model or a dataclass. Also refuses one of which a reader would get none, or another."""
    fields = encoded(_items(data), limit, keys_limit)
    text = joined(fields)
    if _STARS in text and has_secret(data):
        raise SessionDataRefused(_OF_SECRETS)
    back = decoded(text, _adapter_of(data.__class__))
    try:
        lost = None if is_same(data, back, True) else lost_in(data, back)
    except RecursionError:
        lost = "it is nested too deep"
    if lost:
        raise SessionDataRefused(f"{data.__class__.__name__}: {lost}")
    return fields


def names_in(data: Any) -> list[bytes]:
    """Return the top-level keys of data that was read. Raises SessionDataRefused."""
    return [*map(_known_key, data if isinstance(data, MAPPINGS) else _items(data))]


def encoded_value(key: str, value: object) -> bytes:
    """Return the JSON of one value, a type that JSON has no word for marked. Raises SessionDataRefused."""
    try:
        packed = value if type(value) in ATOMS else _packed(_MARKS, key, value)
        try:
            return _to_json(packed)
        except PydanticSerializationError:
            return _json(key, writable(packed))
    except RecursionError:
        raise SessionDataRefused(f"{ascii(key)[:80]}: nested too deep, or within itself") from None


def check_kept(key: str, value: object) -> None:
    """Raise SessionDataRefused for a value that would come back as one of another type, in silence."""
    with suppress(RecursionError):  # which is said when it is written
        _packed(_CHECKS, key, value)


def _packed(marks: Marks, key: str, value: object) -> Any:
    try:
        return marks.pack(value)
    except SessionDataRefused as refused:
        raise SessionDataRefused(f"{ascii(key)[1:-1][:80]}: {refused}") from None


def _loss(value: object) -> SessionDataRefused | None:
    """Return the error for a value of which a part would be lost, whatever type it is read by."""
    if keys := keys_in_common(value):
        names = " and ".join(ascii(one)[:40] for one in keys[:2])
        return SessionDataRefused(
            f"the keys {names} are one text in JSON, so one value would be lost"
        )
    if loses_its_zone(value):
        return SessionDataRefused(
            f"{type(value).__name__} would lose its zone, which has no offset without a date"
        )
    return None


def _refusal(value: object) -> SessionDataRefused | None:
    if loss := _loss(value):
        return loss
    if isinstance(value, _JSON) or any(kind.fits(value) for kind in (*_MARKS.kinds, SAYS_HTML)):
        return None
    return SessionDataRefused(
        f"{type(value).__name__} would come back as something else; a session keeps JSON, {_MARKS.names}: "
        "make it one of these before you store it"
    )


_MARKS = Marks(text_keys=True, refuse=_loss)
_CHECKS = Marks(text_keys=True, refuse=_refusal)


def decoded_value(text: bytes) -> Any:
    """Return the value of this JSON, as `encoded_value` wrote it."""
    return decoded(b'{"":%b}' % text, None)[""]


def checked_key(key: object) -> bytes:
    """Return the key as its field in Redis. Raises SessionDataRefused for what is no key of a session."""
    if isinstance(key, str) and _KEY.fullmatch(key):
        return key.encode()
    raise SessionDataRefused(
        f"{ascii(key)[:80]} is no key of a session: a letter, then up to 63 of A-Z a-z 0-9 _ . -"
    )


_known_key = lru_cache(1_024)(checked_key)  # an app has few keys, and uses them with every request


def encoded_meta(meta: Mapping[str, Any] | None) -> bytes:
    """Return the JSON of a session's meta, whose values keep their types as the data's do.

    Raises SessionDataRefused, SessionUnreadable or ValueTooLarge.
    """
    if not meta:
        return b"{}"
    if not isinstance(meta, MAPPINGS):
        raise InvalidArgument(
            f"meta={in_code(meta):.100}: a mapping of what a list of devices shows"
        )
    text = encoded_value("meta", dict(meta))
    if len(text) > META_LIMIT:
        raise ValueTooLarge(len(text), META_LIMIT)
    if len(text) > _SURE_BYTES:
        decoded(text, None)
    return text


def decoded(text: bytes, adapter: TypeAdapter[Any] | None) -> Any:
    """Return the data, as it is or checked by a type. Raises SessionUnreadable."""
    try:
        if SIGN in text:
            return _decoded_marked(text, adapter)
        return from_json(text) if adapter is None else adapter.validate_json(text)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, detail['loc']))} ({detail['type']})"
            for detail in error.errors(include_input=False)
        ]
        raise SessionUnreadable(f"{error.title}: {', '.join(wrong)}") from None
    except ValueError:
        raise SessionUnreadable("a value is not JSON") from None
    except MISREAD as error:
        raise SessionUnreadable(f"a validator raised {error.__class__.__name__}") from None


def _decoded_marked(text: bytes, adapter: TypeAdapter[Any] | None) -> Any:
    """Decode data in which some values are marked. A requested type reads them in pydantic's JSON form."""
    try:
        data = _MARKS.unpack(from_json(text))
    except (ArithmeticError, AttributeError, TypeError) as error:
        raise SessionUnreadable(f"a marked value is broken ({error.__class__.__name__})") from None
    if adapter is None:
        return data
    try:
        text = to_json(data)
    except PydanticSerializationError:  # bytes that are no UTF-8
        return adapter.validate_python(data)
    return adapter.validate_json(text)


def joined(fields: Mapping[bytes, bytes]) -> bytes:
    """Return the data as one JSON object, as lua/lib/session.lua puts it together."""
    return b"{%b}" % b",".join([b'"%b":%b' % item for item in fields.items()])


def _items(data: object) -> dict[str, Any]:
    """Return the fields of a model or a dataclass. Raises SessionDataRefused."""
    try:
        plain = _adapter_of(data.__class__).dump_python(
            data, mode="json", by_alias=True, round_trip=True, warnings="error"
        )
    except (PydanticSerializationError, ValueError, TypeError) as error:
        raise SessionDataRefused(f"{data.__class__.__name__}: {error.__class__.__name__}") from None
    except PydanticUserError:  # it has no schema
        plain = None
    if not isinstance(plain, dict):
        raise SessionDataRefused(
            f"the data of a session is a mapping, a pydantic model or a dataclass, not {data.__class__.__name__}"
        )
    return plain


def _json(key: str, value: object) -> bytes:
    try:
        return _to_json(value)
    except PydanticSerializationError as error:
        raise SessionDataRefused(f"{key}: {error}") from None
