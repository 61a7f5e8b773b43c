"""The text of an argument says all of its value, is the same in every process, and belongs to one value only."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import ipaddress
import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    Optional,
    Self,
    TypedDict,
    TypeVar,
)
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, PositiveInt, SecretBytes, SecretStr

from stillroom.cache.arguments import Texts, Unkeyable, hidden_with
from stillroom.cache.template import Template, fitting
from stillroom.errors import InvalidArgument, InvalidKey
from stillroom.keys import sanitized

texts = Texts(lambda secret: hidden_with(b"pepper", secret))


class Color(enum.Enum):
    RED = "red"
    NONE = "None"


class Size(enum.StrEnum):
    NONE = "None"
    BIG = "big"


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: int


class Query(BaseModel):
    text: str
    pages: set[int] = set()
    hidden: str = Field("", repr=False)


@dataclasses.dataclass
class Tenant:
    name: str
    token: str = dataclasses.field(default="", repr=False, compare=False)


class Row(TypedDict):
    id: int


T = TypeVar("T")
Id = NewType("Id", int)
A_UUID = UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (int, 7, "7"),
        (int, -7, "-7"),
        (Id, 7, "7"),
        (PositiveInt, 7, "7"),
        (Annotated[int, "of a product"], 7, "7"),
        (int, Level.LOW, "1"),
        (str, "acme", "acme"),
        (str, "7", "7"),
        (str, "None", "None"),
        (str, "a:b%", "a:b%"),
        (str, Size.BIG, "big"),
        (str | None, "acme", "acme"),
        (str | None, "7", "7"),
        (Optional[int], 7, "7"),  # noqa: UP045  # the other spelling
        (Optional[int], None, "None"),  # noqa: UP045
        (bool, True, "True"),
        (float, 1.5, "1.5"),
        (float, 1, "1.0"),
        (Decimal, Decimal("1.50"), "15E-1"),
        (UUID, A_UUID, str(A_UUID)),
        (UUID | None, A_UUID, str(A_UUID)),
        (dt.date, dt.date(2026, 11, 27), "2026-11-27"),
        (dt.datetime, dt.datetime(2026, 11, 27, 12, tzinfo=dt.UTC), "2026-11-27T12:00:00+00:00"),
        (dt.datetime, dt.datetime(2026, 11, 27, 12), "2026-11-27T12:00:00"),
        (dt.time, dt.time(12, 30), "12:30:00"),
        (dt.timedelta, dt.timedelta(days=1), "1 day, 0:00:00"),
        (bytes, b"\xff\x00", "ff00"),
        (Color, Color.RED, "RED"),
        (Size, Size.BIG, "big"),
        (Literal["a", "b"], "a", "a"),
        (pathlib.PurePosixPath, pathlib.PurePosixPath("a/b"), "a/b"),
        (ipaddress.IPv4Address, ipaddress.ip_address("192.0.2.1"), "192.0.2.1"),
        (list[int], [1, 2], "[1,2]"),
        (tuple[str, int], ("a", 1), '("a",1)'),
        (Point, Point(1, 2), "(1,2)"),
        (set[str], {"b", "a"}, '{"a","b"}'),
        (frozenset[str], frozenset("ba"), '{"a","b"}'),
        (dict[str, int], {"b": 1, "a": 2}, '{"a":2,"b":1}'),
        (Row, {"id": 7}, '{"id":7}'),
        (Query, Query(text="x", pages={2, 1}), '{hidden:"",pages:{1,2},text:"x"}'),
        (Tenant, Tenant("acme", "s"), '{name:"acme",token:"s"}'),
        (Any, 7, "7"),
        (Any, "acme", "acme"),
        (Any, "7", "'7'"),
        (Any, None, "None"),
        (Any, "None", "'None'"),
        (object, "hello, world", "hello, world"),
        (int | str, "7", "'7'"),
        (int | str, 7, "7"),
        (Any, A_UUID, f"UUID({A_UUID})"),
        (Iterable[int], [1], "[1]"),
    ],
)
def test_what_is_declared_has_a_plain_text(annotation: Any, value: Any, text: str) -> None:
    """A declared type has the plain text that a person would write in a key by hand."""
    assert texts.of(annotation)(value) == text


EVERYTHING: list[Any] = [
    *(None, "None", True, "True", False, 1, "1", 1.0, "1.0", -1, "'1'", "", "''", 10**5000, "nan"),
    *(Decimal(1), "Decimal(1E0)", A_UUID, str(A_UUID), f"UUID({A_UUID})", b"1", "31", "bytes(31)"),
    *(
        dt.date(2026, 1, 1),
        "2026-01-01",
        dt.datetime(2026, 1, 1),
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    ),
    *(
        dt.time(1),
        dt.timedelta(1),
        Color.RED,
        Color.NONE,
        Size.NONE,
        Level.LOW,
        float("inf"),
        "inf",
    ),
    *(
        [],
        (),
        set(),
        {},
        [1],
        (1,),
        {1},
        {1: 1},
        ["1"],
        [[1]],
        [1, 1],
        {"a": 1},
        ("a", 1),
        '["1"]',
        "{}",
    ),
    *(Query(text="x"), Query(text="y"), Query(text="x", hidden="h"), Tenant("a"), Tenant("a", "t")),
    *(
        SecretStr("a"),
        SecretStr("b"),
        SecretBytes(b"a"),
        "secret(a)",
        pathlib.PurePosixPath("a"),
        "a",
    ),
    *(
        ipaddress.ip_address("::1"),
        "::1",
        ipaddress.ip_network("::1"),
        {None: 1},
        {"None": 1},
        "\x1f7",
    ),
]


@pytest.mark.parametrize(
    "annotation",
    [
        *(Any, object, int, str, str | None, bool, float, Decimal, UUID, bytes, dt.date, Color),
        *(dt.datetime, Size | None, Query, Tenant, list[int], tuple[int, ...], set[int], int | str),
        *(dict[str, int], SecretStr, int | None, Literal["a", 1], Mapping[str, int]),
        pathlib.PurePath | None,
    ],
    ids=str,
)
def test_no_two_values_share_a_text(annotation: Any) -> None:
    """No two different values of a declared type share a text; equal values of other types may."""
    text_of = texts.of(annotation)
    found: dict[str, Any] = {}
    for value in EVERYTHING:
        text = text_of(value)
        assert found.setdefault(text, value) == value, text


@pytest.mark.parametrize("annotation", [Any, dt.datetime, dt.datetime | None])
def test_equal_values_have_one_text(annotation: Any) -> None:
    """Equal values have one text: a moment in two zones, 1.5 and 1.50, 0.0 and -0.0, a set in any order."""
    noon = dt.datetime(2026, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    pairs = [
        (noon, noon.astimezone(dt.UTC)),
        (Decimal("1.5"), Decimal("1.50")),
        (Decimal(100), Decimal("1E2")),
        (Decimal(0), Decimal("-0.00")),
        (0.0, -0.0),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({3, 1, 2}, frozenset({1, 2, 3})),
        (dt.time(12, tzinfo=dt.UTC), dt.time(14, tzinfo=dt.timezone(dt.timedelta(hours=2)))),
    ]
    for one, other in pairs:
        assert one == other
        assert texts.of(annotation)(one) == texts.of(annotation)(other)


SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    *(st.binary(max_size=3), st.uuids(), st.dates(), st.datetimes(), st.decimals(allow_nan=False)),
    *(st.timedeltas(), st.times(), st.sampled_from(Color), st.sampled_from(Size)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(), inner)
    ),
    max_leaves=5,
)


@given(VALUES, VALUES)
def test_different_values_have_different_texts(one: Any, other: Any) -> None:
    """Different values of any types and nesting have different texts."""
    for annotation in (Any, str, int, str | None, float):
        text_of = texts.of(annotation)
        if text_of(one) == text_of(other):
            assert one == other


def test_a_text_is_the_same_in_every_process() -> None:
    """A text is the same in every process, for sets and dicts too."""
    program = (
        "from stillroom.cache.arguments import Texts\n"
        "print(Texts(str).open([set('stillroom'), {'b': frozenset('xyz'), 'a': 2}]))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert said == {'[{"i","l","m","o","r","s","t"},{"a":2,"b":{"x","y","z"}}]\n'}


class Connection:
    """A connection, which no text describes."""


@pytest.mark.parametrize(
    "annotation",
    [Connection, Connection | None, type[int], pathlib.Path | Connection, subprocess.Popen],
)
def test_a_type_without_a_text_is_refused_where_it_is_declared(annotation: Any) -> None:
    """A type without a text is refused where it is declared and not at the first request."""
    with pytest.raises(Unkeyable, match="has no text that says all of a value"):
        texts.of(annotation)


@pytest.mark.parametrize("annotation", [Any, str, int, float | None, Tenant, dt.date, list[int]])
@pytest.mark.parametrize("value", [Connection(), [Connection()], {"a": object()}, len, int])
def test_a_value_without_a_text_is_refused(annotation: Any, value: Any) -> None:
    """A value without a text is refused, also in a container, because its address would later be another's."""
    with pytest.raises(Unkeyable, match="has no text"):
        texts.of(annotation)(value)


class Table(BaseModel):
    """Stands for a table of SQLModel: after a commit nothing is in it, until it is asked for."""

    _sa_class_manager: ClassVar[str] = "SQLAlchemy's"
    id: int | None = None


def test_a_row_of_a_database_is_refused() -> None:
    """A row is no argument, because rows that are not loaded anew after a commit look alike."""
    for use in (
        lambda: texts.of(Table),
        lambda: texts.of(Table | None),
        lambda: texts.of(Any)(Table(id=1)),
        lambda: texts.of(list[Table])([Table(id=1)]),
    ):
        with pytest.raises(Unkeyable, match="belongs to a session of SQLAlchemy; give its id"):
            use()


class Ids(list[int]):
    """A list that takes attributes."""


@pytest.mark.parametrize("annotation", [Any, Tenant, Tenant | None, list[int], Iterable[int]])
@pytest.mark.parametrize("make", [lambda: Tenant("a"), lambda: Ids([1]), lambda: [Tenant("a")]])
def test_arguments_that_differ_in_an_attribute_have_two_texts(
    annotation: Any, make: Callable[[], Any]
) -> None:
    """An attribute that was set besides the fields or parts stands in the text, though `==` does not see it."""

    def text(**attributes: Any) -> str:
        value = make()
        vars(value[0] if type(value) is list else value).update(attributes)
        said: str = texts.of(annotation)(value)
        return said

    assert len({text(), text(shop="acme"), text(shop="globex"), text(name2="acme")}) == 4
    with pytest.raises(Unkeyable, match="has no text"):
        text(connection=Connection())


@dataclasses.dataclass(slots=True)
class Basket(list[int]):
    tenant: str = ""


class Slotted(list[int]):
    __slots__ = ("tenant",)


@pytest.mark.parametrize("make", [Basket, Slotted])
def test_containers_that_differ_in_a_slot_have_two_texts(make: Callable[[], Any]) -> None:
    """What a container has in slots stands in the text, as what it has in a dict does."""

    def text(tenant: str) -> str:
        value = make()
        value.tenant = tenant
        return texts.of(Any)(value)

    assert text("a") != text("b")


class Id(int):
    """A number that takes attributes."""


class Name(str):
    __slots__ = ("tenant",)


class Token(UUID):
    """A UUID that takes attributes, besides the slots of all UUIDs."""

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@pytest.mark.parametrize("value", [Id(7), Name("a"), Token(int=7)])
def test_scalars_that_differ_in_an_attribute_have_two_texts(value: Any) -> None:
    """What is set on a value of an app's own class of texts or numbers stands in its key, and in no tag."""
    kind: Any = type(value)
    plain = texts.of(kind)(value)
    assert plain == str(value)
    for annotation in (kind, kind | None, Any, list[Any]):
        told = {texts.of(annotation)([value] if annotation == list[Any] else value)}
        for value.tenant in ("acme", "globex"):
            told.add(texts.of(annotation)([value] if annotation == list[Any] else value))
        assert len(told) == 3
        del value.tenant
    value.tenant = "acme"
    assert texts.of(kind.__base__)(value) == texts.of_tag(kind)(value) == plain
    value.tenant = Connection()
    base = kind.__base__.__name__
    with pytest.raises(Unkeyable, match=f"{kind.__name__} is a {base} .* as {base} .* has no text"):
        texts.of(kind)(value)


class Other(int):
    """A number of another class."""


class Code(str):
    __slots__ = ()


class Circle(NamedTuple):
    x: int
    y: int


class Paged(Query, Generic[T]):
    """A model whose name has brackets once it is of a type."""


@pytest.mark.parametrize(
    "values",
    [
        (Id(7), Other(7), 7),
        (Name("a"), Code("a"), "a"),
        (Point(1, 2), Circle(1, 2), (1, 2)),
        (Ids([1]), Slotted([1]), [1]),
        (collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1)),
    ],
    ids=lambda values: type(values[0]).__name__,
)
def test_values_of_two_classes_have_two_texts(values: tuple[Any, ...]) -> None:
    """Equal values of two classes, of which a loader may take either, have two texts. In a tag they have one."""
    one, other = map(type, values[:2])
    for annotation in (one | other, Any, Hashable, one | int | str | tuple):
        assert len({texts.of(annotation)(value) for value in values}) == len(values)
        assert len({texts.of(annotation)([value]) for value in values}) == len(values)
    if one is not other:
        assert texts.of(one)(values[0]) != texts.of(one)(values[1])
        assert len({texts.of_tag(one | other)(value) for value in values}) == 1


@pytest.mark.parametrize(
    ("annotation", "one", "other"),
    [
        (list[str], ["a"], [Name("a")]),
        (list[str | None], [None, "a"], [None, Name("a")]),
        (Sequence[int], [7], [Id(7)]),
        (dict[str, list[int]], {"a": [7]}, {Name("a"): [Other(7)]}),
        (tuple[int, ...], (7,), (Id(7),)),
        (set[Id], {7}, {Id(7)}),
        (str | None, "a", Name("a")),
    ],
)
def test_a_value_of_a_declared_type_is_that_whatever_its_class(
    annotation: Any, one: Any, other: Any
) -> None:
    """Where one type is declared, down to the items, a Markup in a list[str] is the text."""
    assert texts.of(annotation)(one) == texts.of(annotation)(other)
    assert texts.of_tag(annotation)(one) == texts.of_tag(annotation)(other)


def test_where_several_classes_are_declared_in_a_container_they_have_two_texts() -> None:
    """In a list[Id | Other] the class of an item stands in the key, and in a list[Id] | list[Other]."""
    assert texts.of(list[Id] | list[Other])([Id(7)]) != texts.of(list[Id] | list[Other])([Other(7)])
    for annotation in (list[Id | Other], list[Any], list, dict[str, Any]):
        given = [[Id(7)], [Other(7)]] if annotation != dict[str, Any] else [{"a": Id(7)}, {"a": 7}]
        assert len(set(map(texts.of(annotation), given))) == 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older Pythons have no `type` statement")
def test_an_alias_may_name_itself() -> None:
    """A type alias that names itself is read once, and its values have their texts."""
    names: dict[str, Any] = {}
    exec("type Tree = list[Tree] | dict[str, Tree] | int", names)
    assert texts.of(names["Tree"])([7, [8]]) == "[7,[8]]"


def test_a_uuid_of_a_driver_is_the_uuid() -> None:
    """A UUID as asyncpg gives it, in a class of its own, has the text of the equal one, also in a list."""
    kind = type("UUID", (UUID,), {"__slots__": (), "__module__": "asyncpg.pgproto.pgproto"})
    one, other = UUID(int=7), kind(int=7)
    for annotation in (UUID, UUID | None, UUID | str, Any):
        assert texts.of(annotation)(one) == texts.of(annotation)(other)
    assert texts.of(list[UUID])([one]) == texts.of(list[UUID])([other])


def test_a_str_is_told_from_any_class_by_name() -> None:
    """A str that is written as the text of another value is quoted, also where a class has an odd name."""

    @dataclasses.dataclass
    class Größe:  # noqa: PLC2401
        a: int

    for value in (Größe(1), Paged[int](text="x"), Ids([1]), Id(7)):
        assert texts.of(Any)(value) != texts.of(Any)(texts.of(Any)(value))


class Nanoseconds(dt.timedelta):
    """A length of time with more digits, as pandas has one, that is written in words, as pendulum does."""

    def __new__(cls, nanoseconds: int) -> Self:
        made = super().__new__(cls, microseconds=nanoseconds // 1_000)
        made.rest = nanoseconds % 1_000
        return made

    rest: int

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.rest == getattr(other, "rest", 0)

    __hash__ = dt.timedelta.__hash__

    def __str__(self) -> str:
        return "ein Augenblick"


class Never(dt.datetime):
    """No time, as pandas has one: its parts are no numbers."""

    year = month = day = float("nan")  # type: ignore[assignment]


def test_a_time_of_another_class_has_the_text_of_python() -> None:
    """A length of time is written as Python's own is. What says more than that, or is no time, is refused."""
    assert texts.of(dt.timedelta)(Nanoseconds(5_000)) == "0:00:00.000005"
    for value in (Nanoseconds(5_001), Never(2026, 1, 1)):
        for annotation in (dt.timedelta, dt.datetime, Any):
            with pytest.raises(Unkeyable, match="has no text that says all"):
                texts.of(annotation)(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    """A value that contains itself is refused."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(Unkeyable, match="deep"):
        texts.of(Any)(endless)


@pytest.mark.parametrize("annotation", [SecretStr, Any, SecretStr | None, Mapping[str, Any]])
def test_a_secret_does_not_stand_in_a_key(annotation: Any) -> None:
    """A secret stands in a key as an HMAC, so that two secrets have two keys."""
    one, other = SecretStr("hunter2"), SecretStr("hunter3")
    text_of = texts.of(annotation)
    assert "hunter" not in text_of(one) + text_of({"password": one})
    assert text_of(one) == text_of(SecretStr("hunter2")) != text_of(other)
    assert text_of(one) != Texts(lambda s: hidden_with(b"another pepper", s)).of(annotation)(one)


# Templates

DELIMITERS = [chr(n) for n in range(32, 127) if chr(n) not in "{}"] + [
    "─",
    "\u2500",
    "é",
    "😀",
    "%%",
    "%2",
]


@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_different_arguments_never_make_the_same_text(delimiter: str) -> None:
    """Different arguments never make the same text, whatever stands between them in the template."""
    letters = sorted({*delimiter, "%", "2", "5", "~"})
    values = [""] + ["".join(word) for n in (1, 2) for word in itertools.product(letters, repeat=n)]
    template = Template(f"{{a}}{delimiter}{{b}}{delimiter}", ["a", "b"])
    pairs = list(itertools.product(values, repeat=2))
    assert len({template.fill({"a": a, "b": b}) for a, b in pairs}) == len(pairs)
    for a, b in pairs:
        assert template.read(template.fill({"a": a, "b": b})) == {"a": a, "b": b}


@given(st.characters(exclude_characters="{}"), st.data())
def test_a_delimiter_may_be_any_character(delimiter: str, data: st.DataObject) -> None:
    """Any character of Unicode may be a delimiter, and may occur in the values too."""
    template = Template(f"{{a}}{delimiter}{{b}}{delimiter}", ["a", "b"])
    words = st.text(alphabet=sorted({delimiter, *"%25~pe00"}), max_size=6)
    pairs = data.draw(st.tuples(st.tuples(words, words), st.tuples(words, words)))
    one, other = (template.fill(dict(zip("ab", pair, strict=True))) for pair in pairs)
    assert (one == other) == (pairs[0] == pairs[1])
    assert template.read(one) == dict(zip("ab", pairs[0], strict=True))


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
@example(("1:2", "x"), ("1", "2:x"))
def test_a_parameter_may_stand_in_a_template_twice(one: Any, other: Any) -> None:
    """A parameter may stand in a template twice, each time told apart from what follows it there."""
    template = Template("{a}:{b}/{a}", ["a", "b"])
    filled = [template.fill(dict(zip("ab", pair, strict=True))) for pair in (one, other)]
    assert (filled[0] == filled[1]) == (one == other)


@pytest.mark.parametrize(
    ("template", "key", "values"),
    [
        ("{a}", "x", {"a": "x"}),
        ("{a}:{b}", "1:2:3", {"a": "1", "b": "2:3"}),
        ("{a}:{b}", "1%3A%253A:2", {"a": "1:%3A", "b": "2"}),
        ("{a}-{a}", "1-1", {"a": "1"}),
        ("{a}-{a}", "1-2", None),
        ("doc:{a}:x", "doc:1:2:x", None),
        ("a.b:{a}", "axb:1", None),
        ("plain", "plain", {}),
    ],
)
def test_a_text_is_read_by_the_template_that_made_it(template: str, key: str, values: Any) -> None:
    """A template reads the values out of a text that it has made, and no other text."""
    assert Template(template, ["a", "b"]).read(key) == values


def test_a_single_value_stands_as_it_is() -> None:
    """A single value stands in its key as it is: `get("user:a:b")` finds what `load("a:b")` stored."""
    assert Template("user:{name}", ["name"]).fill({"name": "a:b%"}) == "user:a:b%"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("k:{idd}", r"\{idd\} is not a parameter of the loader; did you mean \{id\}\?"),
        ("k:{nothing}", r"it has id, brand"),
        ("k:{id!r}", r"\{id!r\}: only the name of a parameter"),
        ("k:{id:>3}", r"\{id:>3\}: only the name of a parameter"),
        ("k:{id.x}", "only the name of a parameter"),
        ("k:{}", "only the name of a parameter"),
        ("k:{id", "not a template"),
        ("k:{id}{brand}", "something must stand before {brand}"),
        (7, "a template is a str, not int"),
    ],
)
def test_a_template_that_cannot_work_says_why(text: Any, why: str) -> None:
    """A template that cannot work is refused when the loader is registered."""
    with pytest.raises(InvalidKey, match=why):
        Template(text, ["id", "brand"])


@pytest.mark.parametrize(
    "text", ["x" * 1_025, "", "\ud800", "search:" + "ü" * 600, "a\x1eb", "%" * 400]
)
def test_a_key_that_cannot_be_stored_is_hashed(text: str) -> None:
    """A key that is too long to store is hashed behind its readable front, which patterns match."""
    short, name = fitting(text)
    assert sanitized(short) == name
    assert short.startswith(text[:50].replace("\ud800", "?").replace("\x1e", "?"))
    assert fitting(text + "y")[0] != short != fitting(short)[0], (
        "nobody can give a text that is another's hash"
    )


def test_a_key_that_fits_stays_as_it_is() -> None:
    """A key of up to 1,024 bytes stays as it is."""
    for text in ("product:7", "a b\n%", "ü" * 512):
        assert fitting(text) == (text, sanitized(text))


def test_all_refusals_are_of_one_family() -> None:
    """A refused argument is a TypeError and a ValueError."""
    assert issubclass(Unkeyable, InvalidArgument)
    assert issubclass(InvalidArgument, TypeError)
    assert issubclass(InvalidArgument, ValueError)


@pytest.mark.parametrize(("day", "hour"), [(dt.datetime.min, 1), (dt.datetime.max, -1)])
def test_the_first_and_the_last_day_have_texts(day: dt.datetime, hour: int) -> None:
    """A moment that UTC has no date for has a text too, which is the same in each zone and no other moment's."""
    text = texts.of(dt.datetime)
    zone, other = (dt.timezone(dt.timedelta(hours=hour * n)) for n in (5, 6))
    moment = day.replace(tzinfo=zone)
    same = (day + dt.timedelta(hours=hour)).replace(tzinfo=other)
    assert moment == same
    assert text(moment) == text(same)
    assert len({text(moment), text(moment.replace(tzinfo=other)), text(day)}) == 3


def test_a_deprecated_field_is_read_without_a_warning() -> None:
    """The text of a model says its deprecated fields, and its missing ones, without a warning or an error."""

    class Filter(BaseModel):
        brand: str
        old: int = Field(3, deprecated=True)

    text = texts.of(Filter)
    assert (
        text(Filter(brand="a")) == text(Filter(brand="a", old=3)) != text(Filter(brand="a", old=4))
    )
    assert text(Filter.model_construct(brand="a")) == text(Filter(brand="a"))
    partly: Any = Filter.model_construct
    assert text(partly(old=3)) != text(partly(brand=None, old=3))
