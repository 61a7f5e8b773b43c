"""The token a browser holds, and the names Redis knows it by. Pure.

A token is `<shard>.<secret>`: two hex digits and 256 bits as base64url. Redis sees its HMAC only, so what leaks
from there opens no session. A handle is that HMAC with its shard: it names a session and opens nothing.
"""

from __future__ import annotations

import hashlib
import re
from binascii import b2a_base64
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple
from zlib import crc32

SECRET_BYTES = 32
SHARDS_LIMIT = 256
_TOKEN = re.compile(r"[0-9a-f]{2}\.[A-Za-z0-9_-]{43}", re.ASCII)
_HANDLE = re.compile(r"([0-9a-f]{2})-([A-Za-z0-9_-]{43})", re.ASCII)
_URLSAFE = bytes.maketrans(b"+/", b"-_")


def _own_sha256() -> Callable[[bytes], Any]:
    """Return CPython's own SHA-256, where there is one.

    OpenSSL's gives the same, and in a request it takes three times as long for so few bytes: it goes through a lot
    of memory, and what ran in between has pushed that out of the processor's caches.
    """
    for name in ("_sha2", "_sha256"):  # 3.12 and newer; 3.11
        try:
            sha256: Callable[[bytes], Any] = import_module(name).sha256
        except ImportError:
            continue
        return sha256
    return hashlib.sha256


_sha256 = _own_sha256()


class Pepper:
    """HMAC-SHA256 (RFC 2104) under one secret, the half of it that is always the same done once."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, secret: bytes) -> None:
        block = (secret if len(secret) <= 64 else _sha256(secret).digest()).ljust(64, b"\0")
        self._inner = _sha256(bytes([byte ^ 0x36 for byte in block]))
        self._outer = _sha256(bytes([byte ^ 0x5C for byte in block]))

    def name(self, token: bytes) -> bytes:
        """Return the name that Redis knows the session of this token by."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(token)
        outer.update(inner.digest())
        return b2a_base64(outer.digest()).translate(_URLSAFE)[:-2]  # without `=` and the line's end


NAME_LENGTH = 43
TOKEN_LENGTH = 3 + NAME_LENGTH  # with the shard and a dot


class Place(NamedTuple):
    """Hold the place of a session: its shard, and the names it may have there, one for each pepper."""

    shard: int
    names: tuple[bytes, ...]


def make_token(shard: int, secret: bytes) -> str:
    """Return the text that goes into the cookie. `secret`: 32 random bytes."""
    text = b2a_base64(secret).translate(_URLSAFE)[:-2]
    return f"{shard:02x}.{text.decode()}"


def is_token(text: object) -> bool:
    """Return whether this looks like a token of ours. Only Redis knows whether it is one."""
    return isinstance(text, str) and _TOKEN.fullmatch(text) is not None


def place_of(token: str, peppers: tuple[Pepper, ...]) -> Place | None:
    """Return where the session of this token would be, or None for what no token of ours looks like.

    The token says its shard. A process that has fewer shards than the one that made it finds it there all the same.
    """
    if _TOKEN.fullmatch(token) is None:
        return None
    shard, text = int(token[:2], 16), token.encode()
    if len(peppers) == 1:
        return _new_tuple(Place, (shard, (peppers[0].name(text),)))
    return Place(shard, tuple([pepper.name(text) for pepper in peppers]))


_new_tuple = tuple.__new__


def make_handle(shard: int, name: bytes) -> str:
    return f"{shard:02x}-{name.decode()}"


def read_handle(handle: object) -> Place | None:
    """Return the place of the session with this handle, or None for a value that no handle looks like."""
    match = _HANDLE.fullmatch(handle) if isinstance(handle, str) else None
    return None if match is None else Place(int(match[1], 16), (match[2].encode(),))


def shard_of(user: bytes, shards: int) -> int:
    """Return the shard of a user. A user's sessions live together, so that one script can count them."""
    return crc32(user) % shards
