"""A session as the app sees it, and as its hash holds it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import SecretStr, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from stillroom.errors import SessionDataRefused, SessionUnreadable, ValueTooLarge
from stillroom.keys import original, sanitized
from stillroom.sessions.token import make_handle

T = TypeVar("T")

META_LIMIT = 4096  # bytes of JSON
TAGS_LIMIT = 16
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Device:
    """One session of a user, as it may be shown in a list. Times are the server's clock, seconds since 1970.

    `handle` names it and opens nothing: see `end`.
    """

    handle: str
    user_id: str | None  # None: anonymous
    created: float
    last_seen: float
    expires_at: float
    version: int
    tags: tuple[str, ...]
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Session(Device, Generic[T]):
    """A session and its data. No repr, log or error shows its token."""

    data: T = field(repr=False)
    id: SecretStr
    was_touched: bool = field(default=False, compare=False)  # reading it has put off its end

    @property
    def token(self) -> str:
        """The text for the cookie. Whoever has it, has the session."""
        return self.id.get_secret_value()


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """`kind`: expired, replayed (an old token was used after its grace), evicted (it made room for another)."""

    kind: str
    handle: str
    user_id: str | None


def encoded(data: object, limit: int, keys_limit: int) -> dict[bytes, bytes]:
    """Each top-level key and its JSON. Raises SessionDataRefused or ValueTooLarge."""
    fields: dict[bytes, bytes] = {}
    for key, value in _items(data):
        fields[checked_key(key)] = _json(key, value)
    if len(fields) > keys_limit:
        raise SessionDataRefused(f"{len(fields)} keys, the limit is {keys_limit}")
    if (size := size_of(fields)) > limit:
        raise ValueTooLarge(size, limit)
    return fields


def checked_key(key: object) -> bytes:
    """Raises SessionDataRefused for what is no key of a session."""
    if isinstance(key, str) and _KEY.fullmatch(key):
        return key.encode()
    raise SessionDataRefused(
        f"{ascii(key)[:80]} is no key of a session: a letter, then up to 63 of A-Z a-z 0-9 _ . -"
    )


def size_of(fields: Mapping[bytes, bytes]) -> int:
    return sum(map(len, fields)) + sum(map(len, fields.values()))


def encoded_meta(meta: Mapping[str, Any] | None) -> bytes:
    """Raises SessionDataRefused or ValueTooLarge."""
    text = _json("meta", dict(meta or {}))
    if len(text) > META_LIMIT:
        raise ValueTooLarge(len(text), META_LIMIT)
    return text


def encoded_tags(tags: Sequence[str]) -> list[bytes]:
    """Each once. Raises InvalidKey or SessionDataRefused."""
    names = list(dict.fromkeys(map(sanitized, (tags,) if isinstance(tags, str) else tags)))
    if len(names) > TAGS_LIMIT:
        raise SessionDataRefused(f"{len(names)} tags, the limit is {TAGS_LIMIT}")
    return names


def decoded(text: bytes, adapter: TypeAdapter[Any] | None) -> Any:
    """The data, as it is or checked by a type. Raises SessionUnreadable."""
    try:
        return from_json(text) if adapter is None else adapter.validate_json(text)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, detail['loc']))} ({detail['type']})"
            for detail in error.errors(include_input=False)
        ]
        raise SessionUnreadable(f"{error.title}: {', '.join(wrong)}") from None
    except ValueError:
        raise SessionUnreadable("a value is not JSON") from None


def joined(fields: Mapping[bytes, bytes]) -> bytes:
    """The data as one JSON object, as lua/lib/session.lua puts it together."""
    return b"{%b}" % b",".join([b'"%b":%b' % item for item in fields.items()])


def head(user: bytes, now: int, idle: int, absolute: int, tags: bytes, meta: bytes) -> bytes:
    """What a record says of itself when it begins: see device_fields."""
    times = b"%d\t%d\t%d\t%d" % (now, now, now + absolute, idle)
    return b"\t".join((user, times, b"1", tags, meta))


def device_fields(shard: int, name: bytes, head: bytes) -> dict[str, Any]:
    """What a record says besides its data. Raises SessionUnreadable."""
    try:
        user, created, last_seen, limit, idle, version, tags, meta = head.split(b"\t")
        seen = int(last_seen)
        return {
            "handle": make_handle(shard, name),
            "user_id": original(user).decode() or None,
            "created": int(created) / 1e6,
            "last_seen": seen / 1e6,
            "expires_at": min(seen + int(idle), int(limit)) / 1e6,
            "version": int(version),
            "tags": tuple([original(tag).decode() for tag in tags.split(b"\n")]) if tags else (),
            "meta": from_json(meta) if meta != b"{}" else {},
        }
    except ValueError:
        raise SessionUnreadable("the record lacks fields of its own") from None


def _items(data: object) -> Iterable[tuple[Any, Any]]:
    if isinstance(data, Mapping):
        return data.items()
    try:
        plain = TypeAdapter(data.__class__).dump_python(
            data, mode="json", by_alias=True, round_trip=True, warnings="error"
        )
    except (PydanticSerializationError, ValueError, TypeError) as error:
        raise SessionDataRefused(f"{data.__class__.__name__}: {error.__class__.__name__}") from None
    if not isinstance(plain, dict):
        raise SessionDataRefused(
            f"the data of a session is a mapping or a model, not {data.__class__.__name__}"
        )
    return plain.items()


def _json(key: str, value: object) -> bytes:
    try:
        return to_json(value, by_alias=True, round_trip=True, inf_nan_mode="constants")
    except PydanticSerializationError as error:
        raise SessionDataRefused(f"{key}: {error}") from None
