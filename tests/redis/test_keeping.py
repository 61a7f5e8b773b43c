"""A value itself may decide whether and for how long it is kept, and every reader gets the same type."""

from __future__ import annotations

import datetime as dt
import logging
from datetime import timedelta
from typing import Annotated, Any, Generic, Optional, TypeVar

import pytest
from pydantic import BaseModel, SecretStr

from stillroom import InvalidArgument, NoDispatch, Stillroom
from tests.support.entries import age


class Product(BaseModel):
    id: int


class Book(Product):
    author: str = ""


class Secretive(BaseModel):
    password: SecretStr


def seconds_left(room: Any, client: Any, key: str) -> float:
    return float(client.pttl(room.keys.entry(key.encode()))) / 1000


def test_what_keep_says_no_to_is_not_kept(room: Any, client: Any) -> None:
    """A value that `keep` refuses is returned to its caller and not stored; the next caller loads again."""
    answers: list[list[int]] = [[], [], [1]]
    calls: list[int] = []

    @room.cache.cached("k", ttl=60, keep=bool)
    def load() -> list[int]:
        calls.append(1)
        return answers[len(calls) - 1]

    assert [load(), load(), load(), load()] == [[], [], [1], [1]]
    assert len(calls) == 3
    assert client.keys("*:l:*") == [], "the lease is free"
    assert room.stats.counts["not_stored"] == 0


@pytest.mark.parametrize("options", [{"keep": lambda found: found != "none"}, {}])
def test_a_negative_answer_may_be_kept_for_less(room: Any, client: Any, options: Any) -> None:
    """A negative answer may be kept for a shorter time: one that `keep` refuses or, without `keep`, None."""
    nothing = "none" if options else None
    calls: list[str] = []

    @room.cache.cached("k:{name}", ttl=600, swr=600, negative_ttl=timedelta(seconds=5), **options)
    def find(name: str) -> str | None:
        calls.append(name)
        return nothing if name == "no" else name

    assert [find("no"), find("no"), find("yes"), find("yes")] == [nothing, nothing, "yes", "yes"]
    assert calls == ["no", "yes"]
    assert 4 < seconds_left(room, client, "k:no") <= 5
    assert 1_199 < seconds_left(room, client, "k:yes") <= 1_200


def test_a_ttl_may_come_from_the_value(room: Any, client: Any) -> None:
    """A ttl made from the value is seconds or a timedelta, and None means the setting."""
    until: dict[str, Any] = {"a": 7, "b": timedelta(minutes=1), "c": None}
    for key in until:
        room.cache.get_or_set(key, lambda: key, ttl=lambda value: until[value])  # noqa: B023
        assert room.cache.get(key) == key
        wanted = {"a": 7, "b": 60, "c": room.settings.ttl}[key]
        assert wanted - 1 < seconds_left(room, client, key) <= wanted
    many = room.cache.get_or_set_many(
        ["d"], lambda keys: {"d": "a"}, ttl=lambda value: until[value]
    )
    assert many == {"d": "a"}
    assert 6 < seconds_left(room, client, "d") <= 7


@pytest.mark.parametrize("given", [-1, 0, "5", 10**9, lambda: 1])
def test_a_ttl_of_a_value_that_is_none_is_told_and_nothing_is_kept(
    room: Any, caplog: pytest.LogCaptureFixture, given: Any
) -> None:
    """A ttl function that returns no time is logged; the value is returned and not stored."""
    assert room.cache.get_or_set("k", lambda: 1, ttl=lambda _: given) == 1
    assert room.cache.get("k") is None
    assert "can't be kept" in caplog.text
    assert "ttl" in caplog.text


def test_a_log_names_a_key_as_the_app_writes_it(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A log about a key shows the text that the app uses, and not the bytes that stand in Redis."""

    @room.cache.cached("größe:{id}")
    def load_size(id: Any) -> int:
        return None  # type: ignore[return-value]

    assert load_size({"a%": 1}) is None
    (told,) = [text for text in caplog.messages if "can't be kept" in text]
    assert f"{load_size.key({'a%': 1})!r}: load_size: None: it is declared as int" in told


def test_who_can_not_repeat_a_call_is_told_once(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that no worker can repeat is logged with the loader's name once, and with the reason."""

    @room.cache.cached("size:{id}", ignore=["shop"])
    def load_size(shop: Any, id: int) -> int:
        return id

    assert load_size(object(), 7) == 7
    (told,) = [text for text in caplog.messages if "no worker" in text]
    assert told.startswith("no worker can repeat a call of load_size: its arguments have no JSON: ")
    assert told.count("load_size") == 1


def test_an_error_of_several_lines_forges_no_line_of_the_log(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The second line of an app's error, which may hold a visitor's words, is indented, and no escape is left."""

    def tag(value: Any) -> str:
        raise ValueError("DETAIL: Key (name)=(x)\nFORGED \x1b[31m")

    assert room.cache.get_or_set("k", lambda: 1, tags=[tag]) == 1
    (told,) = [text for text in caplog.messages if "can't be kept" in text]
    assert "\n  FORGED \\x1b[31m" in told


@pytest.mark.parametrize(
    "options", [{"keep": 1}, {"keep": "yes"}, {"negative_ttl": "5"}, {"negative_ttl": -1}]
)
def test_how_to_keep_is_checked_where_it_is_written(room: Any, options: Any) -> None:
    """The options of keeping are checked at the decorator."""
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        room.cache.get_or_set("k", lambda: 1, **options)


def test_what_is_stored_together_does_not_end_together(make_room: Any, client: Any) -> None:
    """The ttl is spread over a tenth and never longer than asked, whichever call stored the value."""
    room = make_room(jitter=0.1)
    keys = [f"k:{n}" for n in range(60)]
    load = room.cache.cached("n:{n}", ttl=100, name="load")(lambda n: n)
    room.cache.set_many(dict.fromkeys(keys[:10], 1), ttl=100)
    for key in keys[10:20]:
        room.cache.set(key, 1, ttl=100)
    for key in keys[20:30]:
        room.cache.add(key, 1, ttl=100)
    for key in keys[30:40]:
        room.cache.set(key, 1, ttl=1)
        room.cache.touch(key, ttl=100)
    room.cache.get_or_set_many(keys[40:50], lambda missing: dict.fromkeys(missing, 1), ttl=100)
    for n in range(10):
        load(n)
    left = [seconds_left(room, client, key) for key in [*keys[:50], *(f"n:{n}" for n in range(10))]]
    assert all(89 < one <= 100 for one in left)
    for start in range(0, 60, 10):
        assert max(left[start : start + 10]) - min(left[start : start + 10]) > 0.5


def test_stale_time_is_not_shortened(make_room: Any, client: Any) -> None:
    """Jitter shortens the ttl and never `swr`."""
    room = make_room(jitter=0.5)
    room.cache.set("k", 1, ttl=100, swr=50)
    fresh_until = room.cache.get_entry("k").fresh_until
    now, _ = client.time()
    assert seconds_left(room, client, "k") - (fresh_until - now) == pytest.approx(50, abs=1.5)


@pytest.mark.parametrize("way", ["get_or_set", "cached", "many"])
def test_a_miss_gives_what_a_hit_gives(room: Any, way: str) -> None:
    """A miss returns the same form of a value as a hit, also without a type."""
    at = dt.datetime(2026, 11, 27, tzinfo=dt.UTC)
    value = {"pair": (1, 2), "at": at, "product": Product(id=1), 7: "seven"}
    wanted = {
        "pair": [1, 2],
        "at": "2026-11-27T00:00:00Z",
        "product": {"id": 1},
        "7": "seven",
    }

    def load() -> Any:
        return value

    if way == "many":
        answers = [room.cache.get_or_set_many(["k"], lambda _: {"k": value})["k"] for _ in range(2)]
    elif way == "cached":
        kept = room.cache.cached("k")(load)
        answers = [kept(), kept()]
    else:
        answers = [room.cache.get_or_set("k", load) for _ in range(2)]
    assert answers == [wanted, wanted]


def test_a_load_without_redis_gives_what_a_hit_gives() -> None:
    """A load without Redis returns the same types as a hit."""
    away = Stillroom("redis://127.0.0.1:1", dispatch=NoDispatch())
    assert away.cache.get_or_set("k", lambda: (1, 2)) == [1, 2]
    assert away.cache.get_or_set_many(["k"], lambda _: {"k": (1, 2)}) == {"k": [1, 2]}
    assert away.cache.cached("k")(pair)() == [1, 2]


def pair() -> Any:
    return (1, 2)


def test_get_or_set_takes_the_type_from_its_load(room: Any) -> None:
    """get_or_set takes the type from its loader, so that a hit is a Product as the type checker was told."""

    def load() -> Product:
        return Product(id=1)

    async def load_async() -> Product:
        return Product(id=2)

    def load_many(keys: list[str]) -> dict[str, Product]:
        return {key: Product(id=3) for key in keys}

    for _ in range(2):
        assert room.cache.get_or_set("one", load) == Product(id=1)
        assert room.cache.get_or_set("two", load_async) == Product(id=2)
        assert room.cache.get_or_set_many(["three"], load_many) == {"three": Product(id=3)}


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list["Product"], [Product(id=1)]),
        (Optional["Product"], Product(id=1)),
        (dict[str, tuple["Book", ...]], {"a": (Book(id=1),)}),
        (Annotated[list["Product"], ["a note"]], [Product(id=1)]),
    ],
)
def test_a_class_may_be_named_by_a_text_within_a_type(
    room: Any, annotation: Any, value: Any
) -> None:
    """A class that is named by a text within a loader's annotation, as one that is defined later is, is found."""

    def load() -> Any:
        return value

    load.__annotations__["return"] = annotation
    cached = room.cache.cached("cached", name="cached")(load)
    for _ in range(2):
        assert cached() == room.cache.get_or_set("given", load) == value


R = TypeVar("R")


class Rows(dict[str, Product]):
    """A mapping of an app's own."""


class RowsOf(dict[str, R], Generic[R]):
    pass


class MoreRows(RowsOf[Product]):
    pass


class Shown:
    """What an app mixes into its mappings."""


class ShownRows(Shown, dict[str, Product]):
    pass


class GenericRows(Generic[R], dict[str, R]):  # noqa: PYI059  # an app may write it so
    pass


OF_AN_APP = [Rows, RowsOf[Product], MoreRows, ShownRows, GenericRows[Product]]


@pytest.mark.parametrize("kind", [*OF_AN_APP, Annotated[dict[str, Product], "a note"]])
def test_many_have_the_type_that_a_mapping_of_an_apps_own_says(room: Any, kind: Any) -> None:
    """Values that a loader of many returns in a mapping of its own have the type which that declares."""

    def load_many(keys: list[str]) -> Any:
        return Rows({key: Product(id=3) for key in keys})

    load_many.__annotations__["return"] = kind
    for _ in range(2):
        assert room.cache.get_or_set_many(["three"], load_many) == {"three": Product(id=3)}


def test_what_cannot_be_kept_is_told_and_counted_by_its_loader(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A value that cannot be stored is returned each time, and logged once per loader in half a minute."""

    @room.cache.cached("secret:{id}")
    def secret(id: int) -> Secretive:
        return Secretive(password=SecretStr("hunter2"))

    @room.cache.cached("books:{id}")
    def books(id: int) -> list[Product]:
        return [Book(id=id, author="Le Guin")]

    with caplog.at_level(logging.WARNING, "stillroom"):
        for id in (1, 2):  # noqa: A001
            assert secret(id).password.get_secret_value() == "hunter2"
            assert books(id) == [Book(id=id, author="Le Guin")]
    told = [record.getMessage() for record in caplog.records]
    assert sum("secret: Secretive: .password is SecretStr" in line for line in told) == 1
    assert sum("books: list: [0] comes back as Product" in line for line in told) == 1
    assert "hunter2" not in caplog.text
    assert (
        room.stats.counts["loader:not_kept:secret"]
        == room.stats.counts["loader:not_kept:books"]
        == 2
    )
    report = room.health.check()
    assert [advice.code for advice in report.advice if advice.code == "not-kept"] == []


def test_a_stale_value_that_no_worker_can_load_is_loaded_by_a_reader(
    room: Any, client: Any, dispatch: Any
) -> None:
    """A stale value whose arguments have no JSON form is refreshed by a reader, because no worker can load it."""
    versions = iter(range(9))

    @room.cache.cached("k:{at}", ttl=60, swr=60)
    def load(at: SecretStr) -> int:
        return next(versions)

    key = SecretStr("x")
    assert load(key) == 0
    (name,) = client.keys("*:e:*")
    age(client, name, 61)
    assert [load(key), load(key)] == [1, 1]
    assert dispatch.orders == []
