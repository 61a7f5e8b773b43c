"""Values ⇄ bytes: pydantic's JSON, compressed above a threshold, bounded both ways. Never pickle.

A codec is one letter in the entry: `j` is JSON as it stands, `z` is JSON compressed by zlib.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from stillroom.errors import StillroomError, ValueTooLarge
from stillroom.settings import Settings

T = TypeVar("T")

JSON, ZLIB = b"j", b"z"
MISS: Any = object()  # no value: None is one
TYPES_LIMIT = 500  # an app has so many; types made in each request must not pile up


def _adapter(type: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(type, config=ConfigDict(ser_json_inf_nan="constants"))
    except PydanticUserError:  # a model, a dataclass: it has a configuration of its own
        return TypeAdapter(type)


def _kept(made: dict[Any, T], type: Any, one: T) -> T:
    if len(made) >= TYPES_LIMIT:
        made.clear()
    return made.setdefault(type, one)


class Undecodable(ValueError):
    """The bytes are not a value of the type asked for."""


class Unencodable(StillroomError, TypeError):
    """The value has no JSON of the type it was declared to be."""


class Codec:
    """Encodes by the value's own type unless one is given; decodes by the type asked for."""

    def __init__(self, settings: Settings) -> None:
        self._value_limit = settings.value_limit
        self._decoded_limit = settings.decoded_limit
        self._compress_above = settings.compress_above
        self._adapters: dict[Any, TypeAdapter[Any]] = {}
        self._readers: dict[Any, Callable[[bytes], Any]] = {}

    def adapter(self, type: Any) -> TypeAdapter[Any]:
        """The validator for a type, made once."""
        try:
            return self._adapters[type]
        except KeyError:
            return _kept(self._adapters, type, _adapter(type))
        except TypeError:  # an unhashable type, such as Annotated with a list
            return _adapter(type)

    def _reader(self, type: Any) -> Callable[[bytes], Any]:
        """JSON of this type → value, past the adapter's own method, which is Python: it runs on every hit."""
        try:
            return self._readers[type]
        except KeyError:
            read = self.adapter(type).validator.validate_json
            return _kept(self._readers, type, read)
        except TypeError:
            return _adapter(type).validator.validate_json

    def encode(self, value: object, type: Any = Any) -> tuple[bytes, bytes]:
        """→ (codec, payload). Raises ValueTooLarge or Unencodable."""
        # By alias and for the round trip: what is written must be what validation reads.
        try:
            text = self.adapter(type).dump_json(
                value, by_alias=True, round_trip=True, warnings="error"
            )
        except PydanticSerializationError as error:
            raise Unencodable(f"{value.__class__.__name__}: {error}") from None
        if type is not Any:
            self._check_the_way_back(text, value, type)
        codec, payload = JSON, text
        if len(text) > self._compress_above:
            packed = zlib.compress(text, 1)
            if len(packed) < len(text):
                codec, payload = ZLIB, packed
        if len(text) > self._decoded_limit:
            raise ValueTooLarge(len(text), self._decoded_limit)
        if len(payload) > self._value_limit:
            raise ValueTooLarge(len(payload), self._value_limit)
        return codec, payload

    def _check_the_way_back(self, text: bytes, value: object, type: Any) -> None:
        """What could not be read again is refused now: None for an int, an alias that is only written."""
        try:
            self.adapter(type).validate_json(text)
        except ValidationError as error:
            raise Unencodable(f"{value.__class__.__name__} is no {error.title}") from None

    def decode(self, codec: bytes, payload: bytes, type: Any = Any) -> Any:
        """→ value. Raises Undecodable."""
        if codec != JSON:
            payload = self._unpacked(codec, payload)
        try:
            return self._reader(type)(payload)
        except ValidationError as error:
            kinds = ", ".join(
                sorted({detail["type"] for detail in error.errors(include_input=False)})
            )
            raise Undecodable(f"{error.title}: {kinds}") from None

    def _unpacked(self, codec: bytes, payload: bytes) -> bytes:
        if codec != ZLIB:
            raise Undecodable(f"unknown codec {codec!r}")
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(payload, self._decoded_limit)
        except zlib.error as error:
            raise Undecodable(str(error)) from None
        if not unpacker.eof:
            raise Undecodable(f"cut short, or more than {self._decoded_limit:,} bytes")
        return text
