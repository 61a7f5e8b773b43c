"""Anything may be under an entry's key, and only bytes that the library wrote there whole are ever a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from zlib import crc32

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings
from pydantic import BaseModel, ConfigDict, Field

from stillroom import Settings, Stillroom, StillroomError
from stillroom.cache.entry import body
from stillroom.codec import Codec
from stillroom.embedded import EmbeddedServer
from stillroom.errors import ValueTooLarge
from tests.support.crowd import patient_room
from tests.support.entries import Recording

FRONT = 4  # header fields before the checksum: the server's, not covered by it
quickly = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Book(BaseModel):
    """A model that is written by its aliases."""

    model_config = ConfigDict(populate_by_name=True)

    id: int
    title: str = Field(alias="bookTitle")
    tags: list[str] = Field(default_factory=list, alias="subjectHeadings")
    parent: Book | None = Field(default=None, alias="partOf")
    price: float | None = None


no_surrogates = st.characters(exclude_categories=["Cs"])
texts = st.text(no_surrogates, max_size=20)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    texts,
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
books = st.recursive(
    st.builds(
        Book,
        id=st.integers(),
        title=texts,
        tags=st.lists(texts),
        price=st.floats(allow_nan=False, allow_infinity=False),
    ),
    lambda inner: st.builds(Book, id=st.integers(), title=texts, parent=inner),
    max_leaves=3,
)
fields = st.binary(max_size=12).filter(lambda raw: not {b"\t", b"\n"} & {bytes([b]) for b in raw})
numbers = st.one_of(
    fields, st.integers().map(lambda n: b"%d" % n), st.integers(1, 5_000).map(lambda n: b"9" * n)
)
moments = st.integers(0, 2**50).map(lambda n: b"%d" % n)  # µs since 1970, some of them to come


@pytest.fixture
def stillroom(server: EmbeddedServer) -> Iterator[Stillroom]:
    """Share one room for all examples of a test; an entry is put under its key by hand."""
    with patient_room(server.url, Recording()) as room:
        yield room


def read_in_every_way(room: Stillroom, type: Any = Any) -> list[Any]:
    """Return what each kind of reader sees under `k`, without the misses."""
    entry = room.cache.get_entry("k", type)
    seen = [room.cache.get("k", type), entry and entry.value]
    return [value for value in [*seen, *room.cache.get_many(["k"], type).values()] if value]


def real_entry(room: Stillroom, client: Any) -> bytes:
    room.cache.set("k", {"name": "jam", "price": 350}, swr=60, tags=["a", "b"])
    return bytes(client.get(room.keys.entry(b"k")))


# Bytes


@quickly
@given(raw=st.binary(max_size=200) | st.lists(fields, max_size=10).map(b"\t".join))
@example(b"")
@example(b"1")
@example(b"1\t\t\t\t\t")
@example(b"1\tepoch\t0\t0\t0\tj\t\tk\n1")
@example(b"1\t\t0\t0\t%d\tj\t\tk\n1" % crc32(b"j\t\tk\n1"))
def test_any_bytes_are_a_miss(stillroom: Stillroom, client: Any, raw: bytes) -> None:
    """Random bytes are never a value and never raise, and the next load replaces them."""
    key = stillroom.keys.entry(b"k")
    client.set(key, raw)
    assert read_in_every_way(stillroom) == []
    assert stillroom.cache.get_or_set("k", lambda: "loaded") == "loaded"
    assert stillroom.cache.get("k") == "loaded"


def flip(raw: bytes, at: int, by: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ by]) + raw[at + 1 :]


def cut_out(raw: bytes, at: int, by: int) -> bytes:
    return raw[:at] + raw[at + by :]


def cut_off(raw: bytes, at: int, by: int) -> bytes:
    return raw[:at]


def put_in(raw: bytes, at: int, by: int) -> bytes:
    return raw[:at] + bytes([by]) * (1 + by % 5) + raw[at:]


@quickly
@given(
    damage=st.sampled_from([flip, cut_out, cut_off, put_in]),
    where=st.floats(0, 1, exclude_max=True),
    by=st.integers(1, 255),
)
def test_a_damaged_entry_is_a_miss(
    stillroom: Stillroom,
    client: Any,
    damage: Callable[[bytes, int, int], bytes],
    where: float,
    by: int,
) -> None:
    """An entry that is flipped, cut or stretched behind the server's fields is a miss, by its checksum."""
    raw = real_entry(stillroom, client)
    rest = raw.split(b"\t", FRONT)[-1]
    # The checksum's own number may be written in other ways: +1, 01, 1_0, or with a line break put in behind it.
    # Behind that every byte counts.
    begin = len(raw) - len(rest) + rest.index(b"\t") + (damage is put_in)
    at = begin + int((len(raw) - begin) * where)
    damaged = damage(raw, at, by)
    client.set(stillroom.keys.entry(b"k"), damaged)
    assert damaged != raw
    assert read_in_every_way(stillroom) == []


@quickly
@given(index=st.integers(0, FRONT - 1), field=numbers)
@example(index=3, field=b"9" * 400)
def test_a_damaged_front_is_a_miss_or_the_value(
    stillroom: Stillroom, client: Any, index: int, field: bytes
) -> None:
    """An entry with damaged server fields, which have no checksum, is a miss or the value and never raises."""
    parts = real_entry(stillroom, client).split(b"\t", FRONT)
    parts[index] = field
    client.set(stillroom.keys.entry(b"k"), b"\t".join(parts))
    assert all(value == {"name": "jam", "price": 350} for value in read_in_every_way(stillroom))


@quickly
@given(
    codec=st.sampled_from([b"j", b"z"]) | fields,
    source=fields,
    tags=st.lists(fields, max_size=3),
    payload=st.binary(max_size=60) | json_values.map(repr).map(str.encode),
    is_stale=st.booleans(),
)
@example(codec=b"j", source=b"\xff", tags=[b"\xff"], payload=b"1", is_stale=True)
@example(codec=b"j", source=b"load {", tags=[], payload=b"1", is_stale=True)
def test_a_whole_entry_of_anything_is_no_exception(
    stillroom: Stillroom,
    client: Any,
    codec: bytes,
    source: bytes,
    tags: list[bytes],
    payload: bytes,
    is_stale: bool,
) -> None:
    """An entry with a right checksum and any content is a value that fits or a miss."""
    front = real_entry(stillroom, client).split(b"\t", FRONT)[:FRONT]
    if is_stale:
        front[3] = b"1"
    raw = b"\t".join([*front, body(codec, source, b"k", tags, payload)])
    client.set(stillroom.keys.entry(b"k"), raw)
    assert all(isinstance(value, int) for value in read_in_every_way(stillroom, int))
    assert all(isinstance(value, Book) for value in read_in_every_way(stillroom, Book))


@quickly
@given(
    raw=st.binary(max_size=30)
    | st.builds(lambda epoch, seq: epoch + b"." + seq, fields, fields | moments)
)
@example(b".")
@example(b"e.5")
@example(b"e.1e3")  # numbers to Lua, and none to Python
@example(b"e.0x10")
@example(b"e. 5")
@example(b"e.inf")
def test_any_bytes_as_the_clock_are_no_exception(
    stillroom: Stillroom, client: Any, raw: bytes
) -> None:
    """Random bytes as the clock make earlier entries a miss, and the next invalidation sets the clock right."""
    client.flushall()
    stillroom.cache.set("k", "before", tags=["t"])
    client.set(stillroom.keys.clock, raw)
    assert read_in_every_way(stillroom) == []
    assert stillroom.cache.get_or_set("k", lambda: "loaded") == "loaded"
    stillroom.cache.invalidate_by_tag("t")
    assert stillroom.cache.set("k", "after", tags=["t"])
    assert stillroom.cache.get("k") == "after"
    stillroom.cache.invalidate_by_tag("t")
    assert read_in_every_way(stillroom) == []


# Values


def codec_of(**changes: Any) -> Codec:
    return Codec(Settings(**changes))


@settings(quickly, max_examples=300)
@given(value=json_values, compress_above=st.sampled_from([0, 4096]))
@example(value=math.inf, compress_above=0)
@example(value={"": [{}, [], "", 0, -0.0, 1e-320, 2**70]}, compress_above=0)
def test_every_json_value_comes_back(value: Any, compress_above: int) -> None:
    """Every JSON value comes back as it was, plain and compressed."""
    codec = codec_of(compress_above=compress_above)
    assert codec.decode(*codec.encoded(value)[:2]) == value


@settings(quickly, max_examples=300)
@given(book=books, compress_above=st.sampled_from([0, 4096]))
def test_every_model_comes_back_as_itself(book: Book, compress_above: int) -> None:
    """Every model, written by its aliases, comes back as the model or as plain JSON."""
    codec = codec_of(compress_above=compress_above)
    for declared in (Any, Book):
        encoded = codec.encoded(book, declared)[:2]
        assert codec.decode(*encoded, Book) == book
        assert codec.decode(*encoded)["bookTitle"] == book.title


@settings(quickly, max_examples=200)
@given(
    value=st.recursive(
        scalars
        | st.text(max_size=5)
        | st.floats()
        | st.binary(max_size=5)
        | st.just(object())
        | st.just(codec_of)
        | st.complex_numbers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner)
            | st.dictionaries(scalars, inner, max_size=3)
        ),
        max_leaves=6,
    ),
    type=st.sampled_from([Any, int, str, list[int], dict[str, float], Book]),
)
def test_a_value_is_refused_or_comes_back(value: Any, type: Any) -> None:
    """Any value is refused with our error, or its bytes read as the declared type."""
    codec = codec_of()
    try:
        encoded = codec.encoded(value, type)[:2]
    except StillroomError:
        return
    codec.decode(*encoded, type)


@settings(quickly, max_examples=50)
@given(size=st.integers(0, 400), compress_above=st.sampled_from([0, 4096]))
def test_what_is_stored_can_be_read(size: int, compress_above: int) -> None:
    """Every stored value can be read, because writing and reading have the same limits."""
    codec = codec_of(value_limit=100, decoded_limit=200, compress_above=compress_above)
    for value in ("x" * size, [n * 7919 % 1000 for n in range(size)]):
        try:
            encoded = codec.encoded(value)[:2]
        except ValueTooLarge:
            continue
        assert codec.decode(*encoded) == value
