"""A session as the app sees it, read from the head of its record. data.py has what the app keeps in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Generic, TypeVar

from pydantic import SecretStr

from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidKey, SessionDataRefused, SessionUnreadable
from stillroom.keys import original, sanitized
from stillroom.misuse import texts_of
from stillroom.sessions.data import decoded, joined
from stillroom.sessions.token import make_handle

T = TypeVar("T")

LACKS_FIELDS = "the record lacks fields of its own"
TAGS_LIMIT = 16
# What nearly all records say of themselves: plain names, numbers of our length, no meta. See read_device.
_PLAIN_HEAD = re.compile(
    rb"[ -$&-~]*(?:\t\d{1,16}){4}\t\d{1,15}\t\d{0,16}\t[\n -$&-~]*\t\{\}"
).fullmatch


@dataclass(frozen=True, slots=True)
class Device:
    """One session of a user, as it may be shown in a list. Times are the server's clock, seconds since 1970.

    `handle` names it and opens nothing: see `end`.
    """

    handle: str
    user_id: str | None  # None: anonymous
    created: float
    last_seen: float
    expires_at: float  # unless it is seen again
    ends_by: float  # in any case
    version: int
    tags: tuple[str, ...]
    meta: dict[str, Any]
    authenticated_at: float | None  # the last proof of who the user is; None: never in this session


class Session(Generic[T]):
    """A session: its data, its token, and what a Device says of it. Frozen; no repr, log or error shows its token.

    Times, tags and meta are decoded when they are first looked at, because most requests need only the data.
    """

    # Two of them are set when it is made: that is once for each request.
    __slots__ = ("_about", "_data", "_device", "_fields")

    _about: tuple[int, bytes, bytes, str, int, bytes]
    _data: T
    _device: Device
    _fields: Mapping[bytes, bytes]

    def __init__(
        self,
        shard: int,
        name: bytes,
        head: bytes,
        data: T | Mapping[bytes, bytes],
        token: str,
        unseen: int = 0,
        text: bytes = b"",
        *,
        as_fields: bool = False,
    ) -> None:
        """`as_fields`: the data is given as it was stored, each key and its JSON. `unseen`: µs since
        `last_seen`."""
        _set(self, "_about", (shard, name, head, token, unseen, text))
        _set(self, "_fields" if as_fields else "_data", data)

    @property
    def token(self) -> str:
        """Return the text for the cookie. Whoever has it, has the session."""
        return self._about[3]

    @property
    def read_at(self) -> float:
        """Return the server's time when it was read or made, seconds since 1970."""
        return self.device.last_seen + self._about[4] / 1e6

    def is_fresh(self, seconds: Duration) -> bool:
        """Tell whether the user has proved who they are in so many seconds before the session was read.

        It is false for a proof from after that time, too: then the server's clock was set back since.
        """
        most, proved = seconds_of("seconds", seconds, least=0), self.device.authenticated_at
        return proved is not None and abs(self.read_at - proved) <= most

    @property
    def text(self) -> bytes:
        """Return the data as Redis holds it, where the session was read: one JSON object."""
        return self._about[5]

    @property
    def data(self) -> T:
        """Return the data that the app keeps in the session, as it is or of the type that was asked for."""
        try:
            return self._data
        except AttributeError:  # it has just been made, and nobody has looked at it
            data: T = decoded(joined(self._fields), None)
            _set(self, "_data", data)
            return data

    @property
    def id(self) -> SecretStr:
        """Return the token as it may be handed around: nothing prints it."""
        return SecretStr(self.token)

    @property
    def device(self) -> Device:
        """Return all that may be shown of the session. Raises SessionUnreadable."""
        try:
            return self._device
        except AttributeError:  # not looked at before
            device = read_device(*self._about[:3])
            _set(self, "_device", device)
            return device

    @property
    def handle(self) -> str:
        """Return the name of the session, as lists show it. It opens nothing."""
        return self.device.handle

    @property
    def user_id(self) -> str | None:
        """Return the user who is logged in; None: the session is anonymous."""
        return self.device.user_id

    @property
    def created(self) -> float:
        """Return when the session began, in seconds since 1970 by the server's clock."""
        return self.device.created

    @property
    def last_seen(self) -> float:
        """Return when a request last used it, in seconds since 1970; written once in `session_touch` seconds."""
        return self.device.last_seen

    @property
    def expires_at(self) -> float:
        """Return when the session ends unless a request uses it before, in seconds since 1970."""
        return self.device.expires_at

    @property
    def ends_by(self) -> float:
        """Return when the session ends in any case, in seconds since 1970."""
        return self.device.ends_by

    @property
    def authenticated_at(self) -> float | None:
        """Return when the user last proved who they are, in seconds since 1970; None: never in this session."""
        return self.device.authenticated_at

    @property
    def version(self) -> int:
        """Return the number of the record's version. Each change of the data adds one."""
        return self.device.version

    @property
    def tags(self) -> tuple[str, ...]:
        """Return the tags that `create` was given."""
        return self.device.tags

    @property
    def meta(self) -> dict[str, Any]:
        """Return what `create` was told about the session, such as its device."""
        return self.device.meta

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __setstate__(self, state: tuple[None, Mapping[str, Any]]) -> None:
        """Make a copy, whose fields are set once."""
        for name, value in state[1].items():
            _set(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Session):
            return NotImplemented
        same = self.token == other.token and self.data == other.data
        return same and self.device == other.device

    __hash__ = None  # type: ignore[assignment]  # its data may change

    def __repr__(self) -> str:
        return repr(self.device).replace("Device(", "Session(", 1)


_set = object.__setattr__


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """`kind`: expired, replayed (an old token was used after its grace), evicted (it made room for another),
    new_device (a user who is known by other devices began it on one that is not: see `create`).

    `handle`: of the session; of a replay, the one that the old token led to, to `end` it.
    """

    kind: str
    handle: str
    user_id: str | None


def legible(
    session: Session[Any] | None, tell: Callable[[SessionUnreadable], object]
) -> Session[Any] | None:
    """Return the session, or None where its `device` can't be read, of which `tell` is told."""
    if session is None or _PLAIN_HEAD(session._about[2]):  # which takes less than to read it
        return session
    try:
        _ = session.device
    except SessionUnreadable as error:
        tell(error)
        return None
    return session


def encoded_user(given: object) -> bytes:
    """Return a user's name as it stands in Redis. Raises InvalidKey."""
    if not isinstance(given, str):
        hint = "; did you mean str(user.id)?" if given is not None else ""
        raise InvalidKey(given, f"a user is a str, not {type(given).__name__}{hint}")
    return sanitized(given, "a user")


def tag_names(tags: Sequence[str]) -> list[bytes]:
    """Return each tag once, as it stands in Redis. Raises InvalidKey, InvalidArgument."""
    return list(dict.fromkeys(map(sanitized, texts_of("tags", tags))))


def encoded_tags(tags: Sequence[str]) -> list[bytes]:
    """Return the tags of one session. Raises as tag_names, or SessionDataRefused."""
    names = tag_names(tags)
    if len(names) > TAGS_LIMIT:
        raise SessionDataRefused(f"{len(names)} tags, the limit is {TAGS_LIMIT}")
    return names


def head(
    user: bytes, now: int, idle: int, absolute: int, tags: bytes, meta: bytes, proved: bytes
) -> bytes:
    """Return the head of a record that begins: see read_device."""
    times = b"%d\t%d\t%d\t%d" % (now, now, now + absolute, idle)
    return b"\t".join((user, times, b"1", proved, tags, meta))


def read_device(shard: int, name: bytes, head: bytes) -> Device:
    """Return all that a record says besides its data. Raises SessionUnreadable."""
    try:
        user, created, last_seen, limit, idle, version, proved, tags, meta = head.decode().split(
            "\t"
        )
        seen = int(last_seen)
        if not version.isdecimal() or len(version) > 15:  # which nobody has reached by counting
            raise ValueError
        return Device(
            handle=make_handle(shard, name),
            user_id=_as_given(user) or None,
            created=int(created) / 1e6,
            last_seen=seen / 1e6,
            expires_at=min(seen + int(idle), int(limit)) / 1e6,
            ends_by=int(limit) / 1e6,
            version=int(version),
            tags=tuple([_as_given(tag) for tag in tags.split("\n")]) if tags else (),
            meta=decoded(meta.encode(), None) if meta != "{}" else {},
            authenticated_at=(int(proved or created) / 1e6 or None) if user else None,
        )
    except (ValueError, OverflowError):
        raise SessionUnreadable(LACKS_FIELDS) from None


def listed_device(shard: int, name: bytes, head: bytes) -> Device | None:
    """Return the device for a list, which one bad record must not hide: without its meta if that can't be read.

    None: nothing of it can be read.
    """
    for text in (head, head.rpartition(b"\t")[0] + b"\t{}"):
        try:
            return read_device(shard, name, text)
        except SessionUnreadable:
            continue
    return None


def _as_given(name: str) -> str:
    return name if "%" not in name else original(name.encode()).decode()
