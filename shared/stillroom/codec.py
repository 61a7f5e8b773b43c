"""Values ⇄ bytes: pydantic's JSON, compressed above a threshold, bounded both ways. Never pickle.

**What is read is what was written**, in value and in type, or it is not written. JSON alone does not promise that:
it has no infinity, no bytes, no subclasses. So each value is decoded once when it is written; reads pay nothing.

A codec is one letter in the entry:

    j  JSON as it stands          z  the same, compressed by zlib
    x  JSON with bytes as base64  y  the same, compressed
    b  bytes as they are
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, get_args, get_origin

import pydantic_core
from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticSerializationError

from stillroom.errors import InvalidArgument, StillroomError, ValueTooLarge, in_code
from stillroom.fingerprint import fingerprint
from stillroom.sameness import TYPES_LIMIT, changed_in, has_iterator, is_plain, is_same, lost_in
from stillroom.settings import Settings

JSON, EXACT, BYTES = b"j", b"x", b"b"
PACKED = {JSON: b"z", EXACT: b"y"}
UNPACKED = {packed: plain for plain, packed in PACKED.items()}
MISS: Any = object()  # no value: None is one
T = TypeVar("T")
Parse: TypeAlias = Callable[[bytes], Any]  # a payload → its value
# What validators of an app raise over a value that an older release has written. Pydantic passes it on.
MISREAD = (ArithmeticError, AttributeError, LookupError, TypeError)
UNREADABLE = (
    ValueError,
    *MISREAD,
)  # whatever a reader or a parser raises over bytes that are no value

# How the codec of JSON as it stands begins. Behind a colon stands whose value it is.
PLAIN_JSON = (b"j", b"j:")
# Pydantic's warning of a value that is not of the type declared: that type, and the field of a model.
_UNFIT = re.compile(
    r"Expected `([^`]+)` - serialized value may not be as expected \[(?:field_name='(\w+)')?"
)
UNFIT_TOLD = 3
_INPUT = re.compile(r",? ?input_value=.*?(?=, input_type=|])")


def _kept(made: dict[Any, T], type: Any, one: T) -> T:
    if len(made) >= TYPES_LIMIT:
        made.clear()
    return made.setdefault(type, one)


def text_size(codec: bytes, payload: bytes) -> int:
    """Return the uncompressed size, in bytes, of a payload that could be decoded."""
    packed = codec.partition(b":")[0] in UNPACKED
    return len(zlib.decompress(payload)) if packed else len(payload)


class Undecodable(ValueError):
    """The bytes are not a value of the type asked for."""


class Unencodable(StillroomError, TypeError):
    """The value has no JSON that gives it back. The message says what would be lost.

    Answer: a mistake in the code; annotate the type, or store another value.
    """


class Encoded(NamedTuple):
    """A value as it is stored, and `back`: what a reader of it gets."""

    codec: bytes
    payload: bytes
    back: Any


class Codec:
    """Encodes by the value's own type unless one is given; decodes by the type asked for."""

    def __init__(self, settings: Settings) -> None:
        self._value_limit = settings.value_limit
        self._decoded_limit = settings.decoded_limit
        self._compress_above = settings.compress_above
        self._adapters: dict[Any, TypeAdapter[Any]] = {}
        self._exact_adapters: dict[Any, TypeAdapter[Any]] = {}
        self._open: dict[Any, bool] = {Any: True}
        self._iterated: dict[Any, bool] = {}
        self._trusted: dict[Any, bool] = {Any: True}
        self._readers: dict[Any, Parse] = {}
        self._fingerprints: dict[Any, bytes] = {}

    def adapter(self, type: Any) -> TypeAdapter[Any]:
        """Return the validator for a type, made once. Raises InvalidArgument for what is no type or undefined."""
        adapter = self.checked(type)
        if not adapter.pydantic_complete:
            # Made anew, and not rebuilt: two threads that rebuild one adapter get each other's halves.
            with suppress(TypeError):  # it can't be hashed, and is not kept
                self._adapters.pop(type, None)
            adapter = self.checked(type)
            if not adapter.pydantic_complete:
                raise InvalidArgument(f"{in_code(type):.100} names a class that is not defined")
        return adapter

    def checked(self, type: Any) -> TypeAdapter[Any]:
        """Return the validator for a type that may name classes which are defined below it. Raises as `adapter`."""
        adapter: TypeAdapter[Any] = _made(self._adapters, type, _adapter)
        return adapter

    def reader(self, type: Any) -> Parse:
        """Return what makes values of this type of their JSON. Raises InvalidArgument for what is no type.

        It is run on every hit, so it goes past the adapter's own method, which is Python.
        """
        try:
            return self._readers[type]
        except KeyError:
            read = self.adapter(type).validator.validate_json
            return _kept(self._readers, type, read)
        except TypeError:
            return self.adapter(type).validator.validate_json

    def parser(self, codec: bytes, type: Any) -> Parse:
        """Return what makes values of payloads of one codec and type. What it raises, `decode` tells apart."""
        if codec[:2] in PLAIN_JSON:
            return self.reader(type)
        return partial(self.decode, codec, type=type)

    def fingerprint(self, type: Any) -> bytes:
        """Return what tells values of this type from those of another shape. See fingerprint.py."""
        found: bytes = _made(self._fingerprints, type, lambda t: fingerprint(t, self.checked(t)))
        return found

    def encoded(self, value: Any, type: Any = Any) -> Encoded:
        """Return the value encoded. Raises ValueTooLarge, or Unencodable where a reader would get another value.

        `back` is for whoever loaded it: a model has all its fields given there, as in a hit. Where the type leaves
        open what the value is (Any, or part of it), a reader may get another form of it: a list in the place of a
        tuple, text in the place of a date. An int where a float is declared is a float there.
        """
        codec, text, back = self._on_its_way_back(value, type)
        payload = text
        if codec in PACKED and len(text) > self._compress_above:
            packed = zlib.compress(text, 1)
            if len(packed) < len(text):
                codec, payload = PACKED[codec], packed
        if len(text) > self._decoded_limit:
            raise ValueTooLarge(len(text), self._decoded_limit, "STILLROOM_DECODED_LIMIT")
        if len(payload) > self._value_limit:
            raise ValueTooLarge(len(payload), self._value_limit, "STILLROOM_VALUE_LIMIT")
        return Encoded(codec, payload, back)

    def decode(self, codec: bytes, payload: bytes, type: Any = Any) -> Any:
        """Return the value. Raises Undecodable."""
        try:
            if codec[:2] in PLAIN_JSON:
                return self.reader(type)(payload)
            return self._decode_other(codec.partition(b":")[0], payload, type)
        except ValidationError as error:
            kinds = ", ".join(
                sorted({detail["type"] for detail in error.errors(include_input=False)})
            )
            raise Undecodable(f"{error.title}: {kinds}") from None
        except StillroomError:  # it is no type
            raise
        except MISREAD as error:
            said = f"{in_code(type):.100}: a validator raised {error.__class__.__name__}"
            raise Undecodable(said) from None

    def _decode_other(self, codec: bytes, payload: bytes, type: Any) -> Any:
        if codec in UNPACKED:
            codec, payload = UNPACKED[codec], self._unpacked(payload)
        match codec:
            case b"j":
                return self.reader(type)(payload)
            case b"x":
                return self._exact(type).validate_json(payload)
            case b"b":
                return self.adapter(type).validate_python(payload, strict=True)
        raise Undecodable(f"unknown codec {codec!r}")

    def _unpacked(self, payload: bytes) -> bytes:
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(payload, self._decoded_limit)
        except zlib.error as error:
            raise Undecodable(str(error)) from None
        if not unpacker.eof:
            raise Undecodable(f"cut short, or more than {self._decoded_limit:,} bytes")
        return text

    # The way back

    def _on_its_way_back(self, value: Any, type: Any) -> Encoded:
        """Return the first form of the value that gives it back; for an open type, the first that loses nothing."""
        is_as_in_json = self._is_open(type) and is_plain(value)
        is_trusted = is_as_in_json and _made(self._trusted, type, self._keeps_plain)
        if not is_as_in_json and self._is_used_up(value, type):
            raise Unencodable(f"{_named(value)}: an iterator can be read once only; make it a list")
        why = "it has no JSON"
        for codec, make in self._forms(value, type):
            try:
                text = make()
                back = value if is_trusted and type is Any else self.decode(codec, text, type)
                if is_trusted or is_same(value, back):
                    return Encoded(codec, text, back)
                lost = lost_in(value, back)
                is_open = self._is_open(type) and not _is_another_of(type, value, back)
                if lost is None and (is_open or is_same(value, back, True)):
                    return Encoded(codec, text, back)
                why = lost or changed_in(value, back)
            except Undecodable as error:
                why = f"it can't be read back as {error}"
            except (PydanticSerializationError, ValueError, RecursionError) as error:
                why = _without_values(error)
        if value is None:
            declared = _written(type)
            raise Unencodable(
                f"None: it is declared as {declared}; did you mean {declared} | None?"
            )
        raise Unencodable(f"{_named(value)}: {why}")

    def _forms(self, value: Any, type: Any) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
        """Yield the forms a value may have, the usual one first: (codec, how to make it)."""
        # By alias and for the round trip: validation must read exactly the written form.
        options: Any = {"by_alias": True, "round_trip": True, "warnings": "error"}
        if isinstance(value, bytes):
            yield BYTES, lambda: bytes(value)
        adapter = self.adapter(type)
        yield JSON, lambda: adapter.dump_json(value, **options)
        # It may be read by the names of its fields only, or be written and read by different aliases.
        yield JSON, lambda: adapter.dump_json(value, **{**options, "by_alias": False})
        # A model's or a dataclass' own configuration writes null for an infinity.
        yield JSON, lambda: _with_infinities(adapter.dump_python(value, **options))
        yield EXACT, lambda: self._exact(type).dump_json(value, **options)

    def _is_used_up(self, value: Any, type: Any) -> bool:
        """Return whether encoding would use the value up."""
        may_have_one = self._is_open(type) or _made(self._iterated, type, self._mentions_iterators)
        return has_iterator(value) if may_have_one else hasattr(value, "__next__")

    def _mentions_iterators(self, type: Any) -> bool:
        return _mentions("generator", self.adapter(type).core_schema)

    def _exact(self, type: Any) -> TypeAdapter[Any]:
        adapter: TypeAdapter[Any] = _made(self._exact_adapters, type, _exact_adapter)
        return adapter

    def _keeps_plain(self, type: Any) -> bool:
        """Return whether what JSON gives back by itself is the same through this type: dict[str, Any], list."""
        return _is_anything(self.adapter(type).core_schema)

    def _is_open(self, type: Any) -> bool:
        return bool(
            _made(self._open, type, lambda kind: _mentions("any", self.adapter(kind).core_schema))
        )


def _made(made: dict[Any, Any], type: Any, make: Callable[[Any], Any]) -> Any:
    is_kept, found = True, MISS
    try:
        found = made.get(type, MISS)
    except TypeError:  # it can't be hashed, such as Annotated with a list
        is_kept = False
    if found is not MISS:  # what `make` raises is raised by itself, not as of a KeyError
        return found
    one = make(type)
    return _kept(made, type, one) if is_kept else one


def _adapter(type: Any) -> TypeAdapter[Any]:
    if not _is_type(type):
        raise InvalidArgument(f"{in_code(type):.100} is no type; a default is given as default=…")
    try:
        adapter = TypeAdapter(type, config=ConfigDict(ser_json_inf_nan="constants"))
    except PydanticUserError:  # a model, a dataclass: it has a configuration of its own
        adapter = _plain_adapter(type)
    if _names_any_model(adapter):
        raise InvalidArgument(
            f"{in_code(type):.100}: BaseModel has no fields, so no value can be read as one; name the model"
        )
    return adapter


def _names_any_model(adapter: TypeAdapter[Any]) -> bool:
    """Return whether a type is BaseModel, or contains it. Pydantic makes none of it, and raises AttributeError."""
    return adapter.pydantic_complete and _is_any_model(adapter.core_schema)


def _is_any_model(schema: Any) -> bool:
    if isinstance(schema, dict):
        is_model = schema.get("type") == "model" and schema.get("cls") is BaseModel
        return is_model or any(map(_is_any_model, schema.values()))
    return isinstance(schema, list | tuple) and any(map(_is_any_model, schema))


def _plain_adapter(type: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(type)
    except PydanticSchemaGenerationError:
        reason = "a value is a pydantic model, a dataclass, a TypedDict, or made of what JSON has"
        raise InvalidArgument(f"{in_code(type):.100} has no schema; {reason}") from None
    except PydanticUserError as error:
        reason = str(error).partition("\n")[0]
        raise InvalidArgument(f"{in_code(type):.100} has no schema: {reason}") from None


def _exact_adapter(type: Any) -> TypeAdapter[Any]:
    exact = ConfigDict(
        ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64"
    )
    try:
        return TypeAdapter(type, config=exact)
    except PydanticUserError:
        return _adapter(type)


def _is_type(given: Any) -> bool:
    """Return whether this can be a type: a class, Any, list[int], int | None, an alias, a type variable."""
    if isinstance(given, type | TypeVar) or given is Any or get_origin(given) is not None:
        return True
    is_name = hasattr(given, "__supertype__") or hasattr(given, "__value__")  # NewType, type X = …
    return is_name or getattr(given, "__module__", "") in ("typing", "typing_extensions")


def _is_another_of(union: Any, value: Any, back: Any) -> bool:
    """Return whether a value of one class that a union names has come back as another: `list | tuple`."""
    kinds = [get_origin(one) or one for one in get_args(union)]
    return type(value) in kinds and type(back) is not type(value)


def _mentions(kind: str, schema: Any) -> bool:
    """Return whether a type contains another, at whatever depth: "any", or "generator" for Iterable."""
    if isinstance(schema, dict):
        return schema.get("type") == kind or any(_mentions(kind, one) for one in schema.values())
    return isinstance(schema, list | tuple) and any(_mentions(kind, one) for one in schema)


def _is_anything(schema: Any) -> bool:
    """Return whether a type is Any, or lists and dicts with text keys of it, of any length."""
    match schema:
        case {"type": "any", **more}:
            return not more
        case {"type": "list", "items_schema": items, **more}:
            return not more and _is_anything(items)
        case {
            "type": "dict",
            "keys_schema": {"type": "any" | "str", **of_keys},
            "values_schema": values,
            **more,
        }:
            return not of_keys and not more and _is_anything(values)
    return False


def _with_infinities(value: Any) -> bytes:
    return pydantic_core.to_json(value, inf_nan_mode="constants")


def _named(value: Any) -> str:
    return type(value).__name__


def _written(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else f"{in_code(annotation):.100}"


def _without_values(error: Exception) -> str:
    """Return an error's sentence for the log without the contents of a value."""
    text = " ".join(str(error).split())
    if unfit := _UNFIT.findall(text):
        told = dict.fromkeys(f"{field or 'it'} is declared as {kind}" for kind, field in unfit)
        return ", ".join([*told][:UNFIT_TOLD])
    return _INPUT.sub("", text)
