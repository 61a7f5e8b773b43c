"""A session as the app sees it, and as its hash holds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import FrozenInstanceError, dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Generic, TypeVar

from pydantic import PydanticUserError, SecretStr, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from stillroom.codec import MISREAD
from stillroom.durations import Duration, seconds_of
from stillroom.errors import (
    InvalidArgument,
    InvalidKey,
    SessionDataRefused,
    SessionUnreadable,
    ValueTooLarge,
)
from stillroom.keys import original, sanitized
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
from stillroom.sessions.token import make_handle

T = TypeVar("T")

META_LIMIT = 4096  # bytes of JSON
LACKS_FIELDS = "the record lacks fields of its own"
DATA_LIMIT = "STILLROOM_SESSION_DATA_LIMIT"
TAGS_LIMIT = 16
_STARS = b"*" * 10  # how pydantic writes a secret
_OF_SECRETS = (
    "a secret is written as stars, and would be lost; give what get_secret_value() returns"
)
_SURE_BYTES = 400  # shorter JSON is neither too deep nor has a number too long to be read
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", re.ASCII)
# What nearly all records say of themselves: plain names, numbers of our length, no meta. See read_device.
_PLAIN_HEAD = re.compile(
    rb"[ -$&-~]*(?:\t\d{1,16}){4}\t\d{1,15}\t\d{0,16}\t[\n -$&-~]*\t\{\}"
).fullmatch
# The adapter of a dataclass takes 2 ms to make.
_adapter_of: Callable[[type], TypeAdapter[Any]] = lru_cache(128)(TypeAdapter)
_to_json = partial(to_json, by_alias=True, round_trip=True, inf_nan_mode="constants")
MAPPINGS = (dict, Mapping)  # the first is told at once
_JSON = (str, int, float, list, dict, type(None))


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
        return self.device.handle

    @property
    def user_id(self) -> str | None:
        return self.device.user_id

    @property
    def created(self) -> float:
        return self.device.created

    @property
    def last_seen(self) -> float:
        return self.device.last_seen

    @property
    def expires_at(self) -> float:
        return self.device.expires_at

    @property
    def ends_by(self) -> float:
        return self.device.ends_by

    @property
    def authenticated_at(self) -> float | None:
        return self.device.authenticated_at

    @property
    def version(self) -> int:
        return self.device.version

    @property
    def tags(self) -> tuple[str, ...]:
        return self.device.tags

    @property
    def meta(self) -> dict[str, Any]:
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
        raise InvalidArgument(f"meta={meta!r:.100}: a mapping of what a list of devices shows")
    text = encoded_value("meta", dict(meta))
    if len(text) > META_LIMIT:
        raise ValueTooLarge(len(text), META_LIMIT)
    if len(text) > _SURE_BYTES:
        decoded(text, None)
    return text


def texts_of(what: str, given: object) -> Iterable[Any]:
    """Return the texts that were given, one or several. Raises InvalidArgument."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise InvalidArgument(
            f"{what}={given!r:.100}: a text, or a list of them; leave it out for none"
        )
    return given


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
