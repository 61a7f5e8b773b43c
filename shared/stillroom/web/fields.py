"""Translates between the keys of a request's session and the fields that keep them. Pure.

Flask and Django keep `_flashes` and `_auth_user_id`; a session's own record has `_u` (sessions/reading.py). So
a key that is no plain name is stored as `x.` and its text, with `-XX` for each byte that is no letter, digit or
`_`. Where that gets too long for a field, the field is `x..` and the key's SHA-256, and its value is [key, value].
A key that is no text is the text that JSON makes of it, as in Flask's and Django's own sessions: 7 is "7".
"""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from typing import Any

from stillroom.errors import SessionDataRefused
from stillroom.marked import key_text
from stillroom.sessions.data import check_kept

ESCAPED = "x."
HASHED = "x.."
LIMIT = 64  # characters of a field
_PLAIN = re.compile(r"(?!x\.)[A-Za-z][A-Za-z0-9_.-]{0,63}", re.ASCII)
_OTHER = re.compile(rb"[^A-Za-z0-9_]")
_CODE = re.compile(rb"-([0-9A-F]{2})")


def field_of(key: object) -> str:
    """Return the field of a key. Raises SessionDataRefused for a key that JSON can't write.

    >>> field_of("cart"), field_of("_flashes"), field_of("two words"), field_of(7)
    ('cart', 'x._flashes', 'x.two-20words', 'x.7')
    """
    text = text_of(key)
    if _PLAIN.fullmatch(text):
        return text
    raw = text.encode(errors="surrogatepass")
    if len(ESCAPED) + len(raw) <= LIMIT:
        field = ESCAPED + _OTHER.sub(lambda match: b"-%02X" % match[0][0], raw).decode()
        if len(field) <= LIMIT:
            return field
    return HASHED + urlsafe_b64encode(hashlib.sha256(raw).digest()).decode().rstrip("=")


def key_of(field: str) -> str:
    """Return the key that a field keeps; of one with a hash, the field itself: its value has the key."""
    if not field.startswith(ESCAPED) or field.startswith(HASHED):
        return field
    text = field.removeprefix(ESCAPED).encode()
    return _CODE.sub(lambda match: bytes([int(match[1], 16)]), text).decode(errors="surrogatepass")


def to_fields(data: Mapping[Any, Any], keys: Iterable[Any]) -> dict[str, Any]:
    """Return the fields, and their values, that keep these keys of the data. Raises SessionDataRefused."""
    fields = {field_of(key): (key, data[key]) for key in keys}
    for key, value in fields.values():
        check_kept(text_of(key), value)
    return {
        field: [_named(key), value] if field.startswith(HASHED) else value
        for field, (key, value) in fields.items()
    }


def to_data(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data that these fields keep."""
    data = dict(fields)
    if ESCAPED not in "\n".join(fields):  # as nearly always
        return data
    for field in fields:
        if field.startswith(ESCAPED):
            key, value = _item(field, data.pop(field))
            data[key] = value
    return data


def text_of(key: object) -> str:
    """Return the key as text. Raises SessionDataRefused."""
    text = key_text(key)
    if not isinstance(text, str):
        raise SessionDataRefused(
            f"a session's key is a str, or a number, bool or None, which become one; not {type(key).__name__}"
        )
    return text


def _item(field: str, value: Any) -> tuple[str, Any]:
    if not field.startswith(HASHED) or not isinstance(value, list) or len(value) != 2:
        return key_of(field), value
    name, kept = value
    return name.decode(errors="surrogatepass") if isinstance(name, bytes) else str(name), kept


def _named(key: object) -> str | bytes:
    """Return the key beside its value. A key with a lone surrogate has no JSON and is bytes."""
    text = text_of(key)
    return text if text.isprintable() else text.encode(errors="surrogatepass")
