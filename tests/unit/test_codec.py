"""The codec writes only values that are read again with the same value and type."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import functools
import threading
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pydantic.dataclasses
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretBytes,
    SecretStr,
    SerializeAsAny,
    model_validator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from werkzeug.utils import cached_property as werkzeug_cached_property

from stillroom import InvalidArgument, Settings
from stillroom.codec import Codec, Undecodable, Unencodable
from stillroom.sameness import is_plain, is_same

codec, early = Codec(Settings()), Codec(Settings())
INF, NAN = float("inf"), float("nan")
NOW = dt.datetime(2026, 11, 27, 12, tzinfo=dt.UTC)
BERLIN = ZoneInfo("Europe/Berlin")
TWICE = dt.datetime(2026, 10, 25, 2, 30)  # the clocks of Berlin show it twice
T = TypeVar("T")


class Parcel(BaseModel):
    label: Label | None = None
    note: Any = None


class Numbered(BaseModel):
    label: Label | None = None
    numbers: Iterable[int]


unfinished = early.checked(Parcel)
early.checked(Numbered)


class Label(BaseModel):
    text: str


class Nowhere(BaseModel):
    label: Missing  # type: ignore[name-defined]  # noqa: F821


class Color(enum.Enum):
    RED = "red"


class Item(BaseModel):
    id: int


class Book(Item):
    author: str = ""


class Price(BaseModel):
    limit: float | None = None
    more: dict[str, Any] = {}


@dataclasses.dataclass
class Score:
    x: float
    cached: int = dataclasses.field(default=0, compare=False)


class Secretive(BaseModel):
    password: SecretStr


class Excluding(BaseModel):
    a: int
    b: int = Field(0, exclude=True)


class Private(BaseModel):
    a: int
    _b: int = PrivateAttr(0)


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    a: int = Field(alias="A")


class Written(BaseModel):
    a: int = Field(serialization_alias="B")


class WrittenAndRead(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    a: int = Field(serialization_alias="B", validation_alias=AliasChoices("C", "D"))


class Nameable(BaseModel):
    model_config = ConfigDict(validate_by_alias=False, validate_by_name=True)
    a: int = Field(alias="A")


class Read(BaseModel):
    a: int = Field(validation_alias="C")


class Blob(BaseModel):
    data: bytes


class Base64Blob(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    data: bytes


class Locked(BaseModel):
    a: int
    _lock: Any = PrivateAttr(default_factory=threading.Lock)


class Table(BaseModel):
    """Stands for a table of SQLModel: after a commit nothing is in it, until it is asked for."""

    _sa_class_manager: ClassVar[str] = "SQLAlchemy's"
    a: int | None = None


class Orm(MappedAsDataclass, DeclarativeBase):
    pass


class Stored(Orm):
    __tablename__ = "mapped"
    id: Mapped[int] = mapped_column(primary_key=True)


class Extra(BaseModel):
    model_config = ConfigDict(extra="allow")


class Page(BaseModel, Generic[T]):
    items: list[T]


class Point(NamedTuple):
    x: int
    y: str


class Place(Point):
    """A subclass, so an instance takes further attributes."""


@dataclasses.dataclass
class Basket:
    items: list[int]

    def __post_init__(self) -> None:
        self.note = ""
        self.lock = threading.Lock()

    @functools.cached_property
    def total(self) -> int:
        return sum(self.items)


@dataclasses.dataclass
class Weighed:
    items: list[int]

    @werkzeug_cached_property
    def weight(self) -> int:
        return sum(self.items)


@dataclasses.dataclass(slots=True)
class Slotted(Basket):
    """Its own fields are in slots; what its base sets is in a dict."""


@pydantic.dataclasses.dataclass(config=ConfigDict(extra="allow"))
class Open:
    a: int


@dataclasses.dataclass
class Listed(list[int]):
    total: int = 0

    @classmethod
    def of(cls, *items: int) -> Listed:
        listed = cls(len(items))
        listed.extend(items)
        return listed


def with_attributes(value: Any, **attributes: Any) -> Any:
    for name, one in attributes.items():
        setattr(value, name, one)
    return value


def private(b: int) -> Private:
    made = Private(a=1)
    made._b = b
    return made


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


KEPT: list[tuple[Any, Any]] = [
    *((7, int), ("ü", str), (True, bool), (None, type(None)), (1.5, float), (-0.0, float)),
    *((INF, float), (NAN, float), ([INF, NAN], list[float]), ({"a": NAN}, Any)),
    *((Price(limit=INF), Price), (Price(limit=NAN), Price), (Price(more={"a": [INF]}), Price)),
    *((Score(INF), Score), ([Score(-INF)], list[Score]), ([Price(limit=INF)], list[Price])),
    *(
        (b"\x89PNG\xff", bytes),
        (b"text", bytes),
        (b"\xff", Any),
        (b"\xff", bytes | None),
        (None, bytes | None),
    ),
    *(
        ({"a": b"\xff"}, dict[str, bytes]),
        ((b"\xff", "image/png"), tuple[bytes, str]),
        ("x", bytes | str),
    ),
    *((Blob(data=b"text"), Blob), (Base64Blob(data=b"\xff"), Base64Blob)),
    *(({1: "a"}, dict[int, str]), ({NOW: 1}, dict[dt.datetime, int]), ({1, 2}, set[int])),
    *(((1, "a"), tuple[int, str]), (Point(1, "a"), Point), (frozenset({1}), frozenset[int])),
    *(
        (collections.deque([1]), collections.deque[int]),
        (collections.OrderedDict(a=1), collections.OrderedDict[str, int]),
        (collections.defaultdict(list, {"a": [1]}), collections.defaultdict[str, list[int]]),
    ),
    *(
        (Basket([1]), Basket),
        ([Slotted([1])], list[Slotted]),
        (with_attributes(Basket([1]), total=7), Basket),
        (with_attributes(Weighed([1]), weight=7), Weighed),
        (Place(1, "a"), Place),
    ),
    *(
        (TWICE.replace(tzinfo=BERLIN), dt.datetime),
        (TWICE.replace(tzinfo=BERLIN, fold=1), dt.datetime),
        (TWICE, dt.datetime),
    ),
    *(
        (NOW, dt.datetime),
        (NOW.astimezone(BERLIN), dt.datetime),
        (NOW, dt.datetime | str),
    ),
    *(
        (dt.date(2026, 1, 1), dt.date),
        (dt.time(1, 2, 3), dt.time),
        (dt.timedelta(microseconds=1), dt.timedelta),
    ),
    *((Decimal("1.50"), Decimal), (Color.RED, Color), (AnyUrl("https://a.example/"), AnyUrl)),
    *((Item(id=1), Item), (Book(id=1, author="x"), Book), ([Book(id=1)], list[Book | Item])),
    *(
        (Excluding(a=1), Excluding),
        (private(0), Private),
        (Locked(a=1), Locked),
        (Aliased(a=1), Aliased),
        (Written(a=1), Written),
        ([WrittenAndRead(a=1)], list[WrittenAndRead]),
        ({"n": Nameable(a=1)}, dict[str, Nameable]),
        (Extra(x=[1]), Extra),
    ),
    *((Page[int](items=[1]), Page[int]), (deep(90), Any), (10**4_000, int), (2**200, Any)),
    *(({"a": [1, "x", None, True, 1.5]}, Any), ({"a": 1}, dict[str, Any]), ([], list[Any])),
]


@pytest.mark.parametrize(("value", "type"), KEPT, ids=lambda one: f"{one!r:.30}")
def test_what_is_kept_comes_back_the_same(value: Any, type: Any) -> None:
    """A stored value comes back with the same value and types at every depth, and its loader's caller
    gets the same.
    """
    stored = codec.encoded(value, type)
    assert is_same(value, codec.decode(stored.codec, stored.payload, type))
    assert is_same(value, stored.back)


OTHER_FORM: list[tuple[Any, Any, Any]] = [
    *(((1, 2), Any, [1, 2]), ({1: "a"}, Any, {"1": "a"}), (NOW, Any, "2026-11-27T12:00:00Z")),
    *(
        (Item(id=1), Any, {"id": 1}),
        ({"p": Price(limit=INF)}, Any, {"p": {"limit": INF, "more": {}}}),
    ),
    *(({"at": NOW}, dict[str, Any], {"at": "2026-11-27T12:00:00Z"}), (Color.RED, Any, "red")),
    *((Price(more={"at": (1,)}), Price, Price(more={"at": [1]})), (Aliased(a=1), Any, {"A": 1})),
    *(
        (1, float, 1.0),
        ([1, 2.5], list[float], [1.0, 2.5]),
        (True, int, 1),
        (Point(1, "a"), Any, [1, "a"]),
    ),
    *(
        (Page(items=[1]), Page[int], Page[int](items=[1])),
        ([Page(items=[1])], list[Page[int]], [Page[int](items=[1])]),
    ),
    *((Page(items=[Item(id=1)]), Page, Page(items=[{"id": 1}])), (Decimal("1.5"), Any, "1.5")),
]


@pytest.mark.parametrize(("value", "type", "back"), OTHER_FORM, ids=lambda one: f"{one!r:.30}")
def test_what_is_not_declared_may_have_another_form(value: Any, type: Any, back: Any) -> None:
    """Where no type is declared, the loader's caller gets the form that a hit has."""
    stored = codec.encoded(value, type)
    assert is_same(stored.back, back)
    assert is_same(codec.decode(stored.codec, stored.payload, type), back)


class Moment(dt.datetime):
    """A moment with nanoseconds, as pandas has one."""

    nanoseconds = 0

    def with_nanoseconds(self, nanoseconds: int) -> Moment:
        self.nanoseconds = nanoseconds
        return self

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.nanoseconds == getattr(other, "nanoseconds", 0)

    __hash__ = dt.datetime.__hash__


REFUSED: list[tuple[Any, Any]] = [
    *(
        ([Book(id=1, author="x")], list[Item]),
        (Book(id=1), Item),
        ({"a": Book(id=1)}, dict[str, Item]),
    ),
    *(
        (Secretive(password=SecretStr("x")), Secretive),
        (SecretStr("x"), Any),
        (SecretBytes(b"x"), SecretBytes),
    ),
    *(({"s": Secretive(password=SecretStr("x"))}, Any), ({"a": [SecretStr("x")]}, dict[str, Any])),
    *(
        (Excluding(a=1, b=2), Excluding),
        (Excluding(a=1, b=2), Any),
        (private(5), Private),
        ({"p": private(5)}, Any),
    ),
    *(
        (Blob(data=b"\xff"), Blob),
        ({"a": b"x"}, Any),
        (bytearray(b"x"), Any),
        (Read(C=1), Read),
    ),
    *((str(uuid4()), UUID | str), (Color.RED, Color | str), ((1, 2), list[int] | tuple[int, int])),
    *(({1}, list[int] | set[int]), ("2026-01-01", dt.date | str), (Score(1, cached=2), None)),
    *(((1, 2), list | tuple), ({1}, list | set | None), ((1,), list[Any] | tuple[Any, ...])),
    *(
        ({1: "a", "1": "b"}, Any),
        ({1: "a", "1": "b"}, dict[int | str, str]),
        ({None: 1, "None": 2}, Any),
    ),
    *(
        (10**5_000, Any),
        (10**5_000, int),
        (deep(250), Any),
        (deep(250), list[Any]),
        ("\ud800", str),
    ),
    *((map(str, [1]), Any), ([map(str, [1])], Any), ((n for n in [1]), list[int]), (object(), Any)),
    *(
        (collections.deque([1], maxlen=3), collections.deque[int]),
        ({"a": [collections.deque([1], 3)]}, dict[str, list[collections.deque[int]]]),
        (collections.defaultdict(lambda: 5, a=1), collections.defaultdict[str, int]),
        (collections.defaultdict(None, a=1), collections.defaultdict[str, int]),
    ),
    *(
        (TWICE.replace(fold=1), dt.datetime),
        (TWICE.time().replace(fold=1), dt.time),
        (TWICE.replace(fold=1), Any),
        ({"at": [TWICE.replace(fold=1)]}, dict[str, Any]),
        (dt.time(2, tzinfo=BERLIN), dt.time),
        (dt.time(2, tzinfo=BERLIN), Any),
        (Moment(2026, 1, 1).with_nanoseconds(7), Any),
        ({"at": Moment(2026, 1, 1).with_nanoseconds(7)}, Any),
    ),
    *(
        (with_attributes(Basket([1]), note="seven"), Basket),
        (with_attributes(Basket([1]), other=7), Basket),
        ([with_attributes(Slotted([1]), other=7)], list[Slotted]),
        (with_attributes(Basket([1]), other=7), Any),
        ({"b": with_attributes(Basket([1]), other=7)}, dict[str, Any]),
        (with_attributes(Open(1), other=7), Open),
        (with_attributes(Place(1, "a"), other=7), Place),
    ),
    *((Table(a=1), Table), (Table(a=1), Any), ([Table()], list[Table]), (Stored(id=1), Any)),
    *(([Book(id=1)], list[SerializeAsAny[Item]]), (Book(id=1), SerializeAsAny[Item])),
    *((Listed.of(7), Listed), (Listed.of(7), Any), ([Listed.of(7)], list[Listed])),
    *(("seven", int), (None, int), ({"id": 1}, Item), (1.5, int), (Decimal("NaN"), Decimal)),
]


@pytest.mark.parametrize(("value", "type"), REFUSED, ids=lambda one: f"{type(one).__name__}")
def test_what_would_come_back_as_something_else_is_refused(value: Any, type: Any) -> None:
    """A value that would come back different is refused with what would be lost, and not with the value."""
    with pytest.raises((Unencodable, InvalidArgument)) as refused:
        codec.encoded(value, type)
    assert "seven" not in str(refused.value)


def test_what_is_too_deep_to_be_compared_is_refused() -> None:
    """A value that JSON holds, but that goes too deep to compare what comes back, is refused as any other."""

    def called_from(frames: int) -> None:
        called_from(frames - 1) if frames else codec.encoded(deep(190), Any)

    with pytest.raises(Unencodable, match="recursion"):
        called_from(400)


@pytest.mark.parametrize(
    ("value", "type", "said"),
    [
        (collections.deque([1], 3), collections.deque[int], "it comes back with another maxlen"),
        (
            {"a": [collections.deque([1], 3)]},
            dict[str, list[collections.deque[int]]],
            r"\[…\]\[0\] comes back with another maxlen",
        ),
        (
            collections.defaultdict(lambda: 5, a=1),
            collections.defaultdict[str, int],
            "another default_factory",
        ),
        (TWICE.replace(fold=1), dt.datetime, "a datetime with fold=1 and no zone"),
        (dt.time(2, tzinfo=BERLIN), dt.time, "a time with zone without an offset"),
        (with_attributes(Basket([1]), other=7), Basket, r"\.other is left out"),
        (with_attributes(Place(1, "a"), other=7), Place, "it comes back with no attribute other"),
        (Listed.of(7), Listed, "it is a dataclass and comes back without its items"),
        ((1,), list[int] | tuple[int], "it is of the type tuple, and comes back as list"),
        (
            [Extra(x=(1,))],
            list[Extra],
            r"list: \[0\]\.x is of the type tuple, and comes back as list",
        ),
        ([Color.RED], list[Color | str], r"\[0\] is of the type .*\.Color, and comes back as str"),
    ],
    ids=lambda one: f"{one!r:.30}",
)
def test_a_refusal_says_what_would_be_lost(value: Any, type: Any, said: str) -> None:
    """The sentence of a refusal names what `==` does not see."""
    with pytest.raises(Unencodable, match=said):
        codec.encoded(value, type)


@pytest.mark.parametrize(
    ("value", "type", "said"),
    [
        ((1, 2), list[int], "tuple: it is declared as list[int]"),
        ({"label": None}, Parcel, "dict: it is declared as Parcel"),
        (Item.model_construct(id="canary"), Item, "Item: id is declared as int"),
        ("canary", int | list[int], "str: it is declared as int, it is declared as list[int]"),
        (None, Item, "None: it is declared as Item; did you mean Item | None?"),
        (None, list[int], "None: it is declared as list[int]; did you mean list[int] | None?"),
        (
            {(1, 2): "a"},
            dict[tuple[int, int], str],
            "dict: it can't be read back as dict[tuple[int, int],str]: tuple_type",
        ),
    ],
    ids=lambda one: f"{one!r:.30}",
)
def test_a_value_of_another_type_is_refused_in_our_words(value: Any, type: Any, said: str) -> None:
    """A value that is not of its type is refused with what was declared and where, and without its contents."""
    with pytest.raises(Unencodable) as caught:
        codec.encoded(value, type)
    assert str(caught.value) == said


def test_whoever_loaded_a_value_gets_what_a_reader_gets() -> None:
    """The fields of a model that count as given are the same for its loader's caller and for a hit."""
    stored = codec.encoded(Price(), Price)
    read = codec.decode(stored.codec, stored.payload, Price)
    assert stored.back.model_dump(exclude_unset=True) == read.model_dump(exclude_unset=True)


def test_what_is_refused_is_not_used_up() -> None:
    """A refused iterator is returned to its caller unused."""
    numbers = iter([1, 2])
    for value in (numbers, [numbers], {"a": {"b": numbers}}, Price(more={"a": numbers})):
        with pytest.raises(Unencodable, match="read once only"):
            codec.encoded(value, type(value) if isinstance(value, Price) else Any)
    assert list(numbers) == [1, 2]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
ANYTHING = st.recursive(
    st.one_of(
        JSON, st.binary(), st.dates(), st.datetimes(), st.uuids(), st.decimals(), st.just(Color.RED)
    ),
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=3), st.tuples(inner, inner), st.builds(Price, more=st.just({}))),
        st.dictionaries(st.none() | st.integers() | st.text(), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(JSON)
def test_json_is_kept_as_it_is(value: Any) -> None:
    """Untyped JSON is stored without reading it back."""
    stored = codec.encoded(value)
    assert is_plain(value)
    assert is_same(codec.decode(stored.codec, stored.payload), value)


@given(
    ANYTHING,
    st.sampled_from(
        [Any, dict[str, Any], list[Any], list[dict[str, Any]], object, int | str, Price, str, bytes]
    ),
)
def test_a_hit_is_what_the_miss_got(value: Any, type: Any) -> None:
    """A hit equals what its miss returned, or nothing is stored."""
    try:
        stored = codec.encoded(value, type)
    except Unencodable:
        return
    assert is_same(codec.decode(stored.codec, stored.payload, type), stored.back)


@pytest.mark.parametrize("given", [None, 0, {}, "", "Item", [], 1.5, True, lambda: 1, Item(id=1)])
def test_what_is_no_type_is_refused(given: Any) -> None:
    """A text or None in the place of a type is refused: `get(key, None)` was meant as a default."""
    for use in (codec.reader, codec.adapter, lambda one: codec.encoded(1, one)):
        with pytest.raises(InvalidArgument, match=r"is no type; a default is given as default="):
            use(given)


def test_a_variable_is_a_type() -> None:
    """A type variable, which a method of a generic class may return, is a type: any, or what it is bound to."""
    for value in (7, "text", [None]):
        stored = codec.encoded(value, T)
        assert codec.decode(stored.codec, stored.payload, T) == value
    bound: Any = TypeVar("bound", bound=Item)  # type: ignore[misc]
    stored = codec.encoded(Item(id=1), bound)
    assert codec.decode(stored.codec, stored.payload, bound) == Item(id=1)


def test_a_class_may_name_another_that_is_defined_below_it() -> None:
    """What a type allows is known also where a class that it names was defined after its adapter was made."""
    numbers = iter([1, 2])
    with pytest.raises(Unencodable, match="can be read once only"):
        early.encoded(Numbered(numbers=numbers), Numbered)
    assert list(numbers) == [1, 2]
    assert early.encoded(Parcel(note=(1,)), Parcel).back == Parcel(note=[1])


def test_an_adapter_that_another_thread_may_use_is_not_changed() -> None:
    """An adapter that was made too early is replaced as a whole, because two threads can't rebuild the same one."""
    adapter = early.adapter(Parcel)
    assert adapter.pydantic_complete
    assert early.adapter(Parcel) is adapter
    assert not unfinished.pydantic_complete


def test_a_class_that_is_defined_nowhere_is_refused_in_our_words() -> None:
    """A type that names a class which is not defined is refused where it is used, also within another type."""
    for kind in (Nowhere, list[Nowhere], list["Nothing"]):  # type: ignore[name-defined]  # noqa: F821
        for use in (codec.reader, lambda one: codec.encoded(1, one)):
            with pytest.raises(InvalidArgument, match="names a class that is not defined"):
                use(kind)


def test_a_class_without_json_is_refused_in_our_words() -> None:
    """A class without a JSON form is refused in Stillroom's words, not in pydantic's."""
    with pytest.raises(
        InvalidArgument, match="has no schema; a value is a pydantic model, a dataclass"
    ):
        codec.adapter(type("Plain", (), {}))


@pytest.mark.parametrize("kind", [BaseModel, list[BaseModel], BaseModel | None])
def test_a_model_without_fields_is_no_type_of_a_value(kind: Any) -> None:
    """BaseModel itself is refused where it is written, because pydantic can't make a value of it."""
    with pytest.raises(InvalidArgument, match=r"BaseModel has no fields, .*; name the model"):
        codec.adapter(kind)


class Hasty(BaseModel):
    cents: int

    @model_validator(mode="before")
    @classmethod
    def reads(cls, data: Any) -> Any:
        return {"cents": 100 // data["euros"]}


@pytest.mark.parametrize("older", [b"{}", b'{"euros": 0}', b'{"euros": "1"}', b"[]"])
def test_a_value_at_which_a_validator_stumbles_is_undecodable(older: bytes) -> None:
    """A validator's KeyError or TypeError at an older release's value makes it undecodable: a miss."""
    with pytest.raises(
        Undecodable, match=r"Hasty.* a validator raised (Key|Type|ZeroDivision)Error"
    ):
        codec.decode(b"j", older, Hasty)


def test_bytes_are_read_as_bytes_only() -> None:
    """Bytes are read as bytes only, and not as text of the same bytes."""
    stored = codec.encoded(b"text", bytes)
    assert stored.codec == b"b"
    assert codec.decode(b"b", b"text") == b"text"
    for other in (str, int, Item, list[int]):
        with pytest.raises(Undecodable):
            codec.decode(b"b", b"1", other)


def test_a_large_value_is_compressed_whatever_its_form() -> None:
    """A large value of any form is compressed and comes back."""
    many = {"a": b"\xff" * 20_000}
    stored = Codec(Settings(compress_above=1_000)).encoded(many, dict[str, bytes])
    assert stored.codec == b"y"
    assert len(stored.payload) < 1_000
    assert codec.decode(*stored[:2], dict[str, bytes]) == many
