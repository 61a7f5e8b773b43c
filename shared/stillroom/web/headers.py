"""Headers are text everywhere but in the messages of ASGI, where they are bytes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

Header: TypeAlias = tuple[str, str]


def decoded(headers: Iterable[tuple[bytes, bytes]]) -> list[Header]:
    """Return the headers of a message as text. In Latin-1, so that `encoded` gives the same bytes back."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def encoded(headers: Iterable[Header]) -> list[tuple[bytes, bytes]]:
    """Return the headers as a message has them."""
    return [(_encoded_name(name), value.encode("latin-1")) for name, value in headers]


@lru_cache(256)  # the names that we and the apps' CORS layers use
def _encoded_name(name: str) -> bytes:
    return name.lower().encode("latin-1")
