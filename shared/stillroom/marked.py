"""Values that JSON has no word for, written as JSON and read back with their type. Never pickle. Pure.

Such a value is `{"!": <its kind>, "v": <its parts>}`. A dict of the app's own that has a key `!` is the kind
`dict`, so nothing that a client sends is ever taken for a mark. Who can write to Redis can make values, and can't
run code.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

MARK, PARTS = "!", "v"
# Types that JSON has a word for, by exact type: a subclass of str may be more than its text.
ATOMS = frozenset({str, int, float, bool, type(None)})
# These can't be changed in place.
FIXED = ATOMS | {bytes, datetime.datetime, datetime.date, datetime.time, datetime.timedelta}
FIXED |= {decimal.Decimal, uuid.UUID}
# These come back as they are; what is derived from one of them would come back as that one.
EXACT = FIXED | {list, dict, tuple, set, frozenset}
SIGN = b'{"!":'  # JSON without it has no marked value


class Kind(NamedTuple):
    """Take values of one type apart, and put them together again."""

    name: str
    fits: Callable[[Any], bool]
    parts: Callable[[Any], Any]
    whole: Callable[[Any], Any]


def kind(
    name: str, type: type, parts: Callable[[Any], Any], whole: Callable[[Any], Any] | None = None
) -> Kind:
    """Return the kind of all instances of a type. `whole` is the type itself unless it is given."""
    return Kind(name, lambda value: isinstance(value, type), parts, whole or type)


def is_plain(value: Any) -> bool:
    """Tell whether JSON alone gives this value back as it is. Costs little: most values are plain."""
    if type(value) in ATOMS:
        return True
    if type(value) is list:
        inside: Any = value
    elif type(value) is dict and MARK not in value and set(map(type, value)) <= {str}:
        inside = value.values()
    else:
        return False
    return set(map(type, inside)) <= ATOMS or all(map(is_plain, inside))


class Marks:
    """The kinds that one part of the library keeps.

    `text_keys`: keys that JSON would write as text (int, float, bool, None) become text, as in Flask's and
    Django's sessions; else a dict with such keys comes back as it was. `refuse` is called with each value that
    JSON alone can't give back, and returns the error to raise, or None; without it a value of no kind is left to
    whoever writes the JSON.
    """

    def __init__(
        self,
        kinds: Sequence[Kind] = (),
        *,
        text_keys: bool = False,
        refuse: Callable[[Any], Exception | None] | None = None,
    ) -> None:
        self.kinds = [*self._containers(), *KINDS, *kinds]
        self._fitting = [*self.kinds, SAYS_HTML]
        self._by_name = {kind.name: kind for kind in (*self._fitting, TEXT)}
        self._text_keys = text_keys
        self._refuse = refuse

    @property
    def names(self) -> str:
        """Return the names of the types that JSON has no word for, for an error."""
        kinds = (kind.name.partition(" ")[0] for kind in self.kinds)
        return ", ".join(name for name in dict.fromkeys(kinds) if name != "dict")

    def pack(self, value: Any) -> Any:
        """Return the value as JSON can hold it; a plain one is returned as it is."""
        if is_plain(value):
            return value
        if self._refuse is not None and (error := self._refuse(value)):
            raise error
        if isinstance(value, list):
            return self._list(value)
        if isinstance(value, dict):
            return self._dict(value)
        for kind in self._fitting:
            if kind.fits(value):
                return {MARK: kind.name, PARTS: kind.parts(value)}
        return value

    def unpack(self, value: Any) -> Any:
        """Return what `pack` was given. A kind that is not known here stays as it was written."""
        if isinstance(value, list):
            return [self.unpack(one) for one in value]
        if not isinstance(value, dict):
            return value
        name = value.get(MARK)
        if isinstance(name, str) and name in self._by_name and PARTS in value:
            parts = value[PARTS]  # a text that UTF-8 can't write is marked itself
            return self._by_name[name].whole(self.unpack(parts) if type(parts) is dict else parts)
        return {key: self.unpack(one) for key, one in value.items()}

    def _dict(self, value: dict[Any, Any]) -> Any:
        if self._text_keys:
            value = {key_text(key): one for key, one in value.items()}
        if MARK not in value and all(type(key) is str for key in value):
            return {key: self.pack(one) for key, one in value.items()}
        return {
            MARK: "dict",
            PARTS: [[self.pack(key), self.pack(one)] for key, one in value.items()],
        }

    def _list(self, values: Any) -> Any:
        return [self.pack(one) for one in values]

    def _unpacked(self, parts: Any) -> Any:
        return map(self.unpack, parts)

    def _containers(self) -> list[Kind]:
        return [
            kind("tuple", tuple, self._list, lambda parts: tuple(self._unpacked(parts))),
            kind("set", set, self._list, lambda parts: set(self._unpacked(parts))),
            kind(
                "frozenset", frozenset, self._list, lambda parts: frozenset(self._unpacked(parts))
            ),
            kind("dict", dict, self._dict, lambda parts: dict(map(self._unpacked, parts))),
        ]


def key_text(key: Any) -> Any:
    """Return a dict's key as JSON writes it; one that JSON can't write stays as it is.

    >>> key_text(7), key_text(True), key_text(None), key_text("a")
    ('7', 'true', 'null', 'a')
    """
    if isinstance(key, bool):
        return "true" if key else "false"
    if key is None:
        return "null"
    if isinstance(key, int):
        return int.__repr__(key)
    return float.__repr__(key) if isinstance(key, float) else key


def keys_in_common(value: Any) -> list[Any]:
    """Return the keys of a dict that JSON would write as the text of another key: of 7 and "7" both.

    >>> keys_in_common({7: "a", "7": "b", 8: "c"})
    [7, '7']
    """
    if not isinstance(value, dict) or all(type(key) is str for key in value):
        return []
    texts = Counter(map(key_text, value))
    return [key for key in value if texts[key_text(key)] > 1]


def loses_its_zone(value: Any) -> bool:
    """Tell whether this is a time of a zone that has no offset without a date: an ISO text has no place for it."""
    is_time = isinstance(value, datetime.time | datetime.datetime)
    return is_time and value.tzinfo is not None and value.utcoffset() is None


def writable(packed: Any) -> Any:
    """Return a packed value in which each text that UTF-8 can't write is marked.

    A client's JSON may hold half of a surrogate pair, and so may what an app keeps of it.
    """
    if isinstance(packed, list):
        return [writable(one) for one in packed]
    if isinstance(packed, dict):
        if all(map(_has_utf8, packed)):
            return {key: writable(one) for key, one in packed.items()}
        return {MARK: "dict", PARTS: [[writable(k), writable(v)] for k, v in packed.items()]}
    return packed if _has_utf8(packed) else {MARK: TEXT.name, PARTS: TEXT.parts(packed)}


def _has_utf8(text: Any) -> bool:
    """Return whether UTF-8 can write this, if it is a text."""
    try:
        text.encode() if isinstance(text, str) else None
    except UnicodeEncodeError:
        return False
    return True


def is_safe_text(value: Any) -> bool:
    """Tell whether the value is text of one of the packages that have a type for what is HTML already."""
    return any(type(value).__name__ == kind.name and kind.fits(value) for kind in SAFE_TEXTS)


def _safe_text(module: str, name: str) -> Kind:
    """Return a package's type of text that is HTML already. Without the package such a value is plain text."""

    def fits(value: Any) -> bool:
        known = getattr(sys.modules.get(module), name, None)
        return known is not None and isinstance(value, known)

    def whole(text: str) -> Any:
        try:
            return getattr(import_module(module), name)(text)
        except ImportError:
            return text

    return Kind(name, fits, str.__str__, whole)


SAFE_TEXTS = (
    _safe_text("markupsafe", "Markup"),
    _safe_text("django.utils.safestring", "SafeString"),
)


def _folded(type: Any) -> Kind:
    """Return the kind of times without an offset that a clock shows for the second time: no ISO text says so."""

    def fits(value: Any) -> bool:
        return isinstance(value, type) and bool(value.fold) and value.utcoffset() is None

    def whole(text: str) -> Any:
        return type.fromisoformat(text).replace(fold=1)

    return Kind(f"{type.__name__} fold=1", fits, type.isoformat, whole)


# The first that fits: a datetime is a date, safe text is a str.
KINDS = (
    _folded(datetime.datetime),
    _folded(datetime.time),
    kind("bytes", bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    kind(
        "datetime",
        datetime.datetime,
        datetime.datetime.isoformat,
        datetime.datetime.fromisoformat,
    ),
    kind("date", datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    kind("time", datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    kind(
        "timedelta",
        datetime.timedelta,
        lambda delta: [delta.days, delta.seconds, delta.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
    kind("Decimal", decimal.Decimal, str),
    kind("UUID", uuid.UUID, str),
    *SAFE_TEXTS,
)


def _html(text: str) -> Any:
    """Return HTML as the type that one of the packages has for it."""
    made = (kind.whole(text) for kind in SAFE_TEXTS)
    return next((one for one in made if type(one) is not str), text)


# What says by itself how it is written as HTML, such as a translation that is looked up late: it becomes safe text.
SAYS_HTML = Kind(
    "Markup",
    lambda value: callable(getattr(type(value), "__html__", None)),
    lambda value: str(value.__html__()),
    _html,
)
# Half of a surrogate pair: see `writable`.
TEXT = Kind(
    "text",
    lambda _: False,
    lambda text: base64.b64encode(text.encode(errors="surrogatepass")).decode(),
    lambda parts: base64.b64decode(parts).decode(errors="surrogatepass"),
)
