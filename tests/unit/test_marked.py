"""Values that JSON cannot write come back with their type, and no client input is taken for one."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections import deque
from dataclasses import dataclass
from enum import Enum, StrEnum
from ipaddress import IPv4Address
from pathlib import PurePath
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from markupsafe import Markup
from pydantic import BaseModel, SecretStr
from pydantic_core import from_json, to_json

from stillroom import SessionDataRefused
from stillroom.marked import SIGN, Marks, is_plain, key_text, keys_in_common
from stillroom.sessions import decoded_value, encoded_value
from stillroom.sessions.data import check_kept
from stillroom.web.fields import to_fields

MARKS = Marks()
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.uuids(),
    st.decimals(allow_nan=False),
    st.datetimes(timezones=st.sampled_from([None, datetime.UTC])),
    st.datetimes().map(lambda moment: moment.replace(fold=1)),
    st.dates(),
    st.times(),
    st.times().map(lambda moment: moment.replace(fold=1)),
    st.timedeltas(),
    st.text().map(Markup),
)
HASHABLE = st.one_of(st.integers(), st.text(), st.binary(), st.tuples(st.integers(), st.text()))
VALUES: Any = st.recursive(
    ATOMS,
    lambda inside: st.one_of(
        st.lists(inside, max_size=4),
        st.dictionaries(st.text(max_size=4), inside, max_size=4),
        st.dictionaries(HASHABLE, inside, max_size=4),
        st.lists(inside, max_size=4).map(tuple),
        st.sets(HASHABLE, max_size=4),
        st.frozensets(HASHABLE, max_size=4),
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and of the same types at every depth."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return all(same(a, b) and same(x, y) for (a, x), (b, y) in pairs)
    if isinstance(one, datetime.datetime | datetime.time):
        return one.utcoffset() is not None or one.fold == other.fold
    if isinstance(one, list | tuple):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return True


@given(VALUES)
def test_a_value_comes_back_with_its_type(value: Any) -> None:
    """A value comes back from JSON with its type at any depth."""
    packed = MARKS.pack(value)
    assert same(MARKS.unpack(from_json(to_json(packed, inf_nan_mode="constants"))), value)


@given(
    st.recursive(
        st.text(max_size=3),
        lambda inside: st.dictionaries(st.sampled_from(["!", "v", "a"]), inside),
    )
)
def test_what_a_client_sends_is_never_taken_for_a_mark(value: Any) -> None:
    """No JSON that a client sends is taken for a mark, with our own signs in it too."""
    assert MARKS.unpack(json.loads(json.dumps(MARKS.pack(value)))) == value


@given(VALUES)
def test_plain_values_are_left_as_they_are(value: Any) -> None:
    """A plain value is stored as it is, and any other value has a mark."""
    if is_plain(value):
        assert MARKS.pack(value) is value
        assert same(from_json(to_json(value, inf_nan_mode="constants")), value)
    else:
        assert SIGN in to_json(MARKS.pack(value), inf_nan_mode="constants")


@given(VALUES)
def test_a_session_keeps_types_but_for_keys(value: Any) -> None:
    """A session keeps types, except that keys become text as in Flask's and Django's sessions."""
    assume(not _has_keys_in_common(value))
    kept = decoded_value(encoded_value("k", value))
    assert same(decoded_value(encoded_value("k", kept)), kept)
    if not _has_odd_keys(value):
        assert same(kept, value)


def _has_keys_in_common(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(keys_in_common(value)) or any(map(_has_keys_in_common, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_keys_in_common, value))


def _has_odd_keys(value: Any) -> bool:
    if isinstance(value, dict):
        odd = any(type(key) is not str for key in value)
        return odd or any(map(_has_odd_keys, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_odd_keys, value))


@pytest.mark.parametrize(
    "value",
    [
        (1, ("a", [2])),
        b"\xff",
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC),
        uuid.UUID(int=7),
        decimal.Decimal("1.10"),
        Markup("<b>"),
        [("message", Markup("<b>"))],
    ],
    ids=repr,
)
def test_what_flask_keeps_is_kept(value: Any) -> None:
    """Each type of Flask's own sessions is kept."""
    assert same(decoded_value(encoded_value("k", value)), value)


@pytest.mark.parametrize(
    "value", [{7: "a", "7": "b"}, [{True: 1, "true": 2}], {"a": {None: 1, "null": 2}}]
)
@pytest.mark.parametrize("write", [encoded_value, check_kept])
def test_two_keys_that_json_writes_alike_are_refused(write: Any, value: Any) -> None:
    """Two keys that are one text in JSON are refused with their names, because a value would be lost."""
    with pytest.raises(SessionDataRefused, match=r"^cart: the keys .* are one text in JSON"):
        write("cart", value)


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    "moment", [datetime.time(9, 30, tzinfo=BERLIN), datetime.time(2, tzinfo=BERLIN, fold=1)]
)
@pytest.mark.parametrize("write", [encoded_value, check_kept])
def test_a_time_of_a_zone_without_a_date_is_refused(write: Any, moment: Any) -> None:
    """A time of a zone whose offset depends on the date is refused, because it would come back without the zone."""
    with pytest.raises(SessionDataRefused, match="opens: time would lose its zone"):
        write("opens", [moment])
    assert same(decoded_value(encoded_value("k", NOON)), NOON)


NOON = datetime.time(12, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))

HALVES = st.text(st.characters(codec=None, categories=["Cs", "Ll"]), max_size=4)


@given(
    st.recursive(
        st.one_of(HALVES, HALVES.map(Markup), st.none()),
        lambda inside: st.one_of(
            st.lists(inside, max_size=3),
            st.lists(inside, max_size=3).map(tuple),
            st.dictionaries(HALVES, inside, max_size=3),
        ),
        max_leaves=8,
    )
)
def test_half_of_a_surrogate_pair_is_kept(value: Any) -> None:
    """A text with half of a surrogate pair, which JSON of a client may hold, is kept at any depth."""
    assert same(decoded_value(encoded_value("k", value)), value)


def test_what_says_how_it_is_written_as_html_is_kept_as_html() -> None:
    """An object that says how it is written as HTML, such as a late translation, is kept as safe text."""

    class Late:
        def __html__(self) -> str:
            return "<b>x</b>"

    kept = decoded_value(encoded_value("k", ("message", Late())))
    assert same(kept, ("message", Markup("<b>x</b>")))


class Colour(Enum):
    RED = 1


class Cart(BaseModel):
    lines: int = 0


@dataclass
class Line:
    price: decimal.Decimal = decimal.Decimal(1)


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Cart(),
        Line(),
        bytearray(b"x"),
        deque([1]),
        1j,
        PurePath("/x"),
        SecretStr("x"),
        IPv4Address("192.0.2.1"),
        range(3),
        (one for one in "ab"),
        Exception("x"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_web_session_refuses_what_would_come_back_as_something_else(
    value: Any, inside: bool
) -> None:
    """A value that would come back as one of another type is refused, and the error names its type."""
    given = {"a": [(1, value)]} if inside else value
    with pytest.raises(SessionDataRefused, match=f"k: {type(value).__name__} would") as refused:
        to_fields({"k": given}, ["k"])
    assert "tuple, set, frozenset, datetime, time, bytes" in str(refused.value)


def test_a_value_within_itself_is_left_to_be_refused_as_such() -> None:
    """A value that holds itself is refused as that, and not as a value of a type that is not kept."""
    endless: list[Any] = [(1,)]
    endless.append(endless)
    fields = to_fields({"k": endless}, ["k"])
    with pytest.raises(SessionDataRefused, match="nested too deep, or within itself"):
        encoded_value("k", fields["k"])


@given(VALUES)
def test_a_web_session_takes_all_that_keeps_its_type(value: Any) -> None:
    """No value is refused that comes back with its type."""
    assert to_fields({"k": value}, ["k"]) == {"k": value}


def test_a_kind_that_is_not_known_here_stays_as_it_was_written() -> None:
    """A kind that this version does not know stays as a newer process wrote it."""
    for text in (b'{"!":"matrix","v":[1]}', b'{"!":1,"v":2}', b'{"!":"bytes"}', b'{"!":null}'):
        assert MARKS.unpack(from_json(text)) == json.loads(text)


def test_keys_are_written_as_json_writes_them() -> None:
    """Keys that are numbers, true, false or null become the text that JSON writes."""

    class Colour(StrEnum):
        RED = "red"

    keys = [7, 1.5, True, None, "a", Colour.RED]
    assert [key_text(key) for key in keys] == [*json.loads(json.dumps(dict.fromkeys(keys)))]
