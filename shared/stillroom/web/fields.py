"""What a request's session calls a key, and the field that keeps it. Pure.

Flask and Django keep `_flashes` and `_auth_user_id`; a session's own record has `_user` (sessions/session.py). So
a key that is no plain name is stored as `x.` and its text, with `-XX` for each byte that is no letter, digit or
`_`.
"""

from __future__ import annotations

import re

from stillroom.errors import SessionDataRefused

ESCAPED = "x."
LIMIT = 64  # characters of a field
_PLAIN = re.compile(r"(?!x\.)[A-Za-z][A-Za-z0-9_.-]{0,63}", re.ASCII)
_OTHER = re.compile(rb"[^A-Za-z0-9_]")
_CODE = re.compile(rb"-([0-9A-F]{2})")


def field_of(key: object) -> str:
    """The field of a key. Raises SessionDataRefused.

    >>> field_of("cart"), field_of("_flashes"), field_of("two words")
    ('cart', 'x._flashes', 'x.two-20words')
    """
    if not isinstance(key, str):
        raise SessionDataRefused(f"a session's key is a str, not {type(key).__name__}")
    if _PLAIN.fullmatch(key):
        return key
    text = key.encode(errors="surrogatepass")
    field = ESCAPED + _OTHER.sub(lambda match: b"-%02X" % match[0][0], text).decode()
    if len(field) > LIMIT:
        raise SessionDataRefused(
            f"{ascii(key)[:80]}: {len(field)} characters as a field, the limit is {LIMIT}"
        )
    return field


def key_of(field: str) -> str:
    """The key that a field keeps."""
    if not field.startswith(ESCAPED):
        return field
    text = field.removeprefix(ESCAPED).encode()
    return _CODE.sub(lambda match: bytes([int(match[1], 16)]), text).decode(errors="surrogatepass")
