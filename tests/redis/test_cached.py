"""A cached function stays what it was, and a function that cannot be cached is refused where it is decorated."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import functools
import importlib
import inspect
import itertools
import pickle
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from asgiref.sync import async_to_sync
from pydantic import BaseModel, Field, SecretStr

from stillroom import AsyncStillroom, InvalidArgument, NoDispatch, Settings, Stillroom
from stillroom.integrations.model_tags import ModelTags
from stillroom.keys import sanitized
from stillroom.misuse import takes
from tests.support.entries import age

THE_ROOM = Stillroom(Settings(), dispatch=NoDispatch())
THE_ASYNC_ROOM = AsyncStillroom(Settings(), dispatch=NoDispatch())


@THE_ROOM.cache.cached("number:{id}")
def number(id: int) -> int:
    """Return a number."""
    return id


@THE_ASYNC_ROOM.cache.cached("number:{id}")
async def async_number(id: int) -> int:
    return id


class Shelf:
    """A class with loaders as methods."""

    name = "top"

    @THE_ROOM.cache.cached("book:{id}", ignore=["self"])
    def book(self, id: int) -> str:
        return f"{self.name} {id}"


def refusals() -> dict[str, tuple[Callable[[Any], Any], str]]:
    """Yield functions that cannot be loaders, each with the error text that says so."""

    def generator(n: int) -> Iterator[int]:
        yield from range(n)

    async def async_generator(n: int) -> AsyncIterator[int]:
        yield n

    def returns_iterable(n: int) -> Iterable[int]:
        return [n]

    class Book:
        def title(self, id: int) -> str:
            return "a title"

        @classmethod
        def of(cls, n: int) -> int:
            return n

    class Numbers:
        def __call__(self, n: int) -> Iterator[int]:
            yield n

    def connection(n: object, db: object) -> int:
        return 1

    function = number.loader.function

    return {
        "a generator": (lambda cached: cached("k:{n}")(generator), "could be read once only"),
        "an async generator": (
            lambda cached: cached("k:{n}")(async_generator),
            "could be read once only",
        ),
        "an object that yields": (lambda cached: cached("k:{n}")(Numbers()), "read once only"),
        "an iterable": (
            lambda cached: cached("k:{n}")(returns_iterable),
            "declare and return a list",
        ),
        "a method": (lambda cached: cached("k:{id}")(Book.title), r"ignore=\['self'\]"),
        "a class method": (
            lambda cached: cached("k:{n}")(vars(Book)["of"]),
            "write @classmethod above",
        ),
        "a class": (lambda cached: cached("k:{id}")(Book), "a loader is a function"),
        "no function": (lambda cached: cached("k")(7), "a loader is a function, not 7"),
        "no parentheses": (lambda cached: cached(generator), r'cached\("generator:\{…\}"\)'),
        "a parameter that is in no key": (
            lambda cached: cached("k:{n}")(connection),
            r"db is not in the key 'k:\{n\}'.*ignore=\['db'\]",
        ),
        "a parameter in a tag only": (
            lambda cached: cached("k:{n}", tags=["db:{db}"])(connection),
            "db is not in the key",
        ),
        "a misspelt ignore": (
            lambda cached: cached("k:{n}", ignore=["bd"])(connection),
            "did you mean db",
        ),
        "a misspelt option": (lambda cached: cached("k:{n}", tll=3), "did you mean ttl"),
        "Django's name of it": (lambda cached: cached("k:{n}", timeout=3), "did you mean ttl"),
        "tags that are none": (
            lambda cached: cached("k:{id}", tags=None)(function),
            "tags=None",
        ),
        **{
            f"a function for {what} that can't be given a value": (
                lambda cached, what=what: cached("k:{id}", **{what: lambda: 60})(function),
                f"{what}=<lambda>: a function that is given the value alone",
            )
            for what in ("keep", "ttl", "tags")
        },
        "a function for warm_with that wants a value": (
            lambda cached: cached("k:{id}", warm_every=60, warm_with=lambda _: [1])(function),
            "warm_with=<lambda>: a function that is given nothing",
        ),
        "a type that is none": (
            lambda cached: cached("k:{id}", type=7)(function),
            "7 is no type",
        ),
    }


@pytest.mark.parametrize("what", refusals())
@pytest.mark.parametrize("cache", [THE_ROOM.cache, THE_ASYNC_ROOM.cache], ids=["sync", "async"])
def test_what_cannot_be_cached_is_refused_where_it_is_written(cache: Any, what: str) -> None:
    """A function that cannot be cached is refused at its decorator, and the error says what to write instead."""
    make, sentence = refusals()[what]
    with pytest.raises(InvalidArgument, match=sentence):
        make(cache.cached)


def test_a_decorator_may_give_a_function_what_else_it_takes(room: Any) -> None:
    """A function for an option fits where its decorator does, whatever the function itself wants besides."""

    def with_database(function: Any) -> Any:
        return functools.wraps(function)(lambda *args: function("a database", *args))

    @with_database
    def of_value(database: str, value: int) -> Any:
        return [database] if value else 60

    @with_database
    def listed(database: str) -> list[int]:
        return [1]

    options = {"keep": of_value, "tags": of_value, "warm_every": 60, "warm_with": listed}
    load = room.cache.cached("k:{n}", name="load", **options)(lambda n: n)
    assert load(7) == 7
    assert takes(of_value, 1)


A_UUID = UUID("12345678-1234-5678-1234-567812345678")


class Row(Enum):
    TOP = "top"


@pytest.mark.parametrize(
    ("declared", "sku", "by_hand"),
    [
        *((Any, "4711", "4711"), (Any, 4711, "4711"), (Any, "a:b%", "a:b%"), (Any, None, "None")),
        *((Any, A_UUID, str(A_UUID)), (Any, str(A_UUID), str(A_UUID)), (Any, Row.TOP, "TOP")),
        *((str, "a:b%", "a:b%"), (str, 4711, "4711"), (str | None, "None", "None")),
        *((int, "4711", "4711"), (int | str, "4711", "4711"), (UUID, A_UUID, str(A_UUID))),
        *((Any, [1, "a"], '[1,"a"]'), (Any, "'4711'", "'4711'"), (bytes, "ff", "ff")),
    ],
    ids=str,
)
def test_a_tag_is_the_text_that_a_person_writes(
    room: Any, declared: Any, sku: Any, by_hand: str
) -> None:
    """`f"sku:{sku}:{lang}"` invalidates what a loader has tagged so, however its arguments are declared.

    A model whose row has these fields says the same tag.
    """
    loads = itertools.count(1)

    def load(sku: Any, lang: str) -> int:
        return next(loads)

    load.__annotations__["sku"] = declared
    load = room.cache.cached("{lang}:{sku}", tags=["sku:{sku}:{lang}"])(load)
    assert [load(sku, "de"), load(sku, "de")] == [1, 1]
    room.cache.invalidate_by_tag(f"sku:{by_hand}:de")
    assert load(sku, "de") == 2
    row = SimpleNamespace(sku=sku, lang="de")
    of_model = ModelTags("Product", ["sku:{sku}:{lang}"], ["sku", "lang"]).of(row)
    assert of_model == [f"sku:{by_hand}:de"]


def test_a_cached_function_is_pickled_by_its_name() -> None:
    """A cached function is pickled by its name, as one with functools.lru_cache is."""
    for function in (number, async_number):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function
    assert pickle.loads(pickle.dumps(Shelf.book)) is Shelf.book
    assert pickle.loads(pickle.dumps(Shelf().book)).key(id=7) == "book:7"


def test_a_bound_loader_equals_another_look_at_it() -> None:
    """Two looks at a loader of one object are equal, as those at a method are, so that a dict knows the second one.

    FastAPI calls such a dependency once in a request.
    """
    one, other = Shelf(), Shelf()
    assert one.book == one.book
    assert {one.book: 1}[one.book] == 1
    assert one.book != other.book
    assert one.book != Shelf.book
    assert Shelf.book == Shelf.book
    assert number != async_number


def test_a_load_that_is_ordered_of_a_bound_loader_is_of_its_object() -> None:
    """An ordered load of a method is that of its object: one without JSON is told, and no argument is missing."""
    with pytest.raises(InvalidArgument, match=r"its arguments have no JSON: .*Shelf"):
        THE_ROOM.tasks.load(Shelf().book, 7)


def test_a_bound_loader_has_the_signature_of_a_method() -> None:
    """The signature of a bound loader has no `self`, and that of the class' loader has it, as those of a method."""
    assert [*inspect.signature(Shelf().book).parameters] == ["id"]
    assert [*inspect.signature(Shelf.book).parameters] == ["self", "id"]
    assert [*inspect.signature(type(Shelf.book)).parameters] == ["loader", "body", "driver"]


def test_a_cached_function_looks_like_the_function() -> None:
    """A cached function keeps name, docstring and signature, and an async one is a coroutine function."""
    assert number.__name__ == "number"  # type: ignore[attr-defined]
    assert inspect.getdoc(number) == "Return a number."
    assert str(inspect.signature(number)) == "(id: 'int') -> 'int'"
    assert number.__globals__ is globals()  # where older FastAPI looks for what annotations mean
    assert inspect.iscoroutinefunction(async_number)
    assert inspect.iscoroutinefunction(async_number.invalidate)
    assert asyncio.iscoroutinefunction(async_number)
    assert not inspect.iscoroutinefunction(number)


def test_a_partial_and_an_object_are_functions_too(room: Any) -> None:
    """A partial or a callable object can be cached, with or without a name of its own."""

    def fetch(table: str, id: int) -> str:
        return f"{table} {id}"

    class Fetch:
        def __call__(self, id: int) -> int:
            return id

    assert room.cache.cached("t:{id}")(functools.partial(fetch, "t"))(7) == "t 7"
    assert room.cache.cached("f:{id}")(Fetch())(id=7) == 7
    assert room.cache.cached("g:{id}", name="g")(Fetch())(id=7) == 7
    assert sorted(getattr(room, "inner", room).cache.loaders.names()) == ["Fetch", "fetch", "g"]


def test_a_method_binds(room: Any, client: Any) -> None:
    """A method can be a loader if `self` is left out by name or is an argument with a text.

    Each reader refreshes it by itself.
    """
    calls: list[Any] = []
    inner = getattr(room, "inner", room)

    class Page(BaseModel):
        site: str

        def body(self, path: str) -> str:
            calls.append((self.site, path))
            return f"{self.site}{path}"

    kept = inner.cache.cached("page:{self}:{path}", ttl=60, swr=60)(Page.body)
    Page.kept = kept  # type: ignore[attr-defined]
    run = (lambda one: one) if room is inner else room._loop.run_until_complete
    for site in ("a", "b", "a"):
        assert run(Page(site=site).kept("/")) == f"{site}/"  # type: ignore[attr-defined]
    assert calls == [("a", "/"), ("b", "/")]
    key = Page(site="a").kept.key("/")  # type: ignore[attr-defined]
    assert room.cache.get_entry(key).loader is None, "no worker could make its self"
    age(client, room.keys.entry(sanitized(key)), 61)
    assert run(Page(site="a").kept("/")) == "a/"  # type: ignore[attr-defined]
    assert len(calls) == 3


def test_a_static_method_is_a_function(room: Any) -> None:
    """A static method can be cached in either order of the decorators; a class method stands above `cached`."""
    inner = getattr(room, "inner", room)
    run = (lambda one: one) if room is inner else room._loop.run_until_complete

    class Shop:
        @staticmethod
        @inner.cache.cached("one:{id}")
        def one(id: int) -> int:
            return id

        @inner.cache.cached("two:{id}")
        @staticmethod
        def two(id: int) -> int:
            return id

        @classmethod
        @inner.cache.cached("three:{id}", ignore=["cls"])
        def three(cls, id: int) -> str:
            return f"{cls.__name__} {id}"

    shop: Any = Shop
    assert [run(shop.one(1)), run(shop().one(1)), run(shop.two(2)), run(shop().two(2))] == [
        1,
        1,
        2,
        2,
    ]
    assert [run(shop.three(3)), run(shop().three(3))] == ["Shop 3", "Shop 3"]


@pytest.mark.parametrize("hit", [False, True])
def test_a_wrong_call_is_a_type_error(room: Any, hit: bool) -> None:
    """A wrong call raises the function's own TypeError, on a hit too, and says what was meant."""

    @room.cache.cached("search:{query}", ignore=["limit"])
    def search(query: str, *, limit: int = 3) -> str:
        return query

    if hit:
        search("a")
    for args, kwargs, said in [
        ((), {"qeury": "a"}, "did you mean query"),
        (("a",), {"lim": 3}, "did you mean limit"),
        (("a", 3), {}, "too many positional arguments"),
        ((), {}, "missing a required argument: 'query'"),
        (("a",), {"query": "a"}, "multiple values"),
    ]:
        for call in (search, search.key, search.invalidate):
            with pytest.raises(TypeError, match=said):
                call(*args, **kwargs)


def test_a_long_or_strange_argument_is_no_error(room: Any) -> None:
    """A long or strange argument, such as a visitor's search text, is no error."""
    calls: list[str] = []

    @room.cache.cached("search:{q}")
    def search(q: str) -> int:
        calls.append(q)
        return len(q)

    for q in ("x" * 2_000, "x" * 2_001, "\ud800", "", "\x1e"):
        assert search(q) == search(q) == len(q)
        assert room.cache.get(search.key(q)) == len(q)
        assert search.invalidate(q) == 1
    assert len(calls) == 5


def test_secrets_stay_out_of_redis(room: Any, client: Any, dispatch: Any) -> None:
    """Key, entry and messages hold only an HMAC of a secret argument."""

    @room.cache.cached("profile:{token}", ttl=60, swr=60)
    def profile(token: SecretStr) -> int:
        return len(token.get_secret_value())

    assert [profile(SecretStr("alice!")), profile(SecretStr("bob!"))] == [6, 4]
    for key in client.scan_iter(match="*:e:*"):
        assert b"alice" not in key + client.get(key)
        age(client, key, 61)
    assert profile(SecretStr("alice!")) == 6
    assert dispatch.orders == [], "a worker would be given stars"
    with pytest.raises(ValueError, match="token: SecretStr is another value once it has been JSON"):
        room.tasks.load(getattr(profile, "_inner", profile), SecretStr("alice!"))


class Sought(BaseModel):
    text: str = Field(serialization_alias="q")


@pytest.mark.parametrize(
    ("kind", "value", "is_run"),
    [
        (float, float("inf"), True),
        (float, float("nan"), True),
        (list[float], [float("-inf"), 1.5], True),
        (float, 1, True),
        (str, "Infinity", True),
        (str | None, None, True),
        (str | None, "null", True),
        (Any, "NaN", True),
        (Any, float("inf"), False),
        (Sought, Sought(text="a"), True),
        (int, "7", False),
        (int, True, False),
        (bool, 1, False),
        (str, 7, False),
        (dt.datetime, dt.datetime(2026, 10, 25, 2, 30, fold=1), False),
    ],
    ids=str,
)
def test_a_worker_loads_with_the_very_arguments(
    room: Any, client: Any, dispatch: Any, kind: Any, value: Any, is_run: bool
) -> None:
    """A refresh is called with what the call was given; where JSON has no form of that, no worker is asked."""
    seen: list[Any] = []

    def load(x: Any) -> int:
        seen.append(x)
        return len(seen)

    load.__annotations__["x"] = kind
    loaded = room.cache.cached("of:{x}", ttl=60, swr=60)(load)
    loaded(value)
    for key in client.scan_iter(match="*:e:*"):
        age(client, key, 61)
    if not is_run:
        with pytest.raises(ValueError, match=r"x: .* once it has been JSON|load: x: "):
            room.tasks.load(getattr(loaded, "_inner", loaded), value)
    assert loaded.many([value]) in ([1], [2])
    assert dispatch.run_all(room) == ["refreshed"] * is_run
    assert len(seen) == 2
    assert seen[1] == value or str(seen[1]) == str(value)


def test_an_ignored_argument_with_a_default_is_not_sent(
    room: Any, client: Any, dispatch: Any
) -> None:
    """An ignored argument with a default, such as a connection, is not sent: a worker loads without it."""
    seen: list[Any] = []

    @room.cache.cached("n:{id}", ttl=60, swr=60, ignore=["db"])
    def load(id: int, db: Any = None) -> int:
        seen.append(db)
        return id

    connection = object()
    load(7, connection)
    age(client, room.keys.entry(b"n:7"), 61)
    assert load(7, object()) == 7
    assert dispatch.run_all(room) == ["refreshed"]
    assert seen == [connection, None]


def test_a_module_may_be_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a module is loaded again the newest definition counts, also with another key."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_room.py").write_text(
        "from stillroom import NoDispatch, Stillroom\nroom = Stillroom(dispatch=NoDispatch())\n"
    )
    module = tmp_path / "some_loaders.py"
    source = "from a_room import room\n@room.cache.cached('{}:{{id}}')\ndef load(id: int) -> int: return id\n"
    module.write_text(source.format("p"))
    loaders: Any = importlib.import_module("some_loaders")
    first = loaders.load
    importlib.reload(loaders)
    module.write_text(source.format("another"))
    importlib.invalidate_caches()
    sys.modules["some_loaders"].__dict__.pop("load")
    exec(compile(module.read_text(), str(module), "exec"), vars(loaders))
    assert loaders.load is not first
    registered = loaders.room.cache.loaders
    assert registered.names() == ["load"]
    assert registered["load"].template == "another:{id}"


def test_a_loader_that_is_defined_again_with_another_value_is_told(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A loader that takes the visitor's name from the view around it is told once: its key lacks the name."""
    inner = getattr(room, "inner", room)

    def view(user: str, engine: object) -> None:
        @inner.cache.cached("dashboard")
        def load() -> str:
            return f"{user}'s {engine}"

    view("ann", object())
    view("ann", object())  # as an app's factory in tests
    assert not caplog.records
    for user in ("bob", "eve"):
        view(user, object())
    (told,) = [one.getMessage() for one in caplog.records]
    assert "load is defined again with another user: both have the key 'dashboard'" in told


def test_a_loader_for_another_class_is_told(room: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One key for the loaders of two classes is told, as a repository's factory may make them. A class that is
    defined again, as in a notebook, is no other one.
    """
    inner = getattr(room, "inner", room)

    def repository(model: type) -> None:
        @inner.cache.cached("row:{id}")
        def row(id: int) -> str:
            return f"{model.__name__} {id}"

    for name in ("Product", "Product"):
        repository(type(name, (), {}))
    assert not caplog.records
    repository(type("Order", (), {}))
    (told,) = [one.getMessage() for one in caplog.records]
    assert "row is defined again with another model" in told
    assert "give each a name and a key of its own" in told


def dashboard(user: str) -> str:
    return f"{user}'s"


def timed(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


@pytest.mark.parametrize(
    "make",
    [
        lambda user: functools.partial(dashboard, user),
        lambda user: timed(lambda: dashboard(user)),
        lambda user: functools.cache(lambda: dashboard(user)),
    ],
)
def test_a_partial_or_a_decorated_loader_that_is_made_again_with_another_value_is_told(
    room: Any, caplog: pytest.LogCaptureFixture, make: Any
) -> None:
    """The visitor's name that a partial holds, or a function below a decorator, is told as well."""
    for user in ("ann", "ann", "bob", "eve"):
        room.cache.cached("dashboard", name="load")(make(user))
    (told,) = [one.getMessage() for one in caplog.records]
    assert "load is defined again with another user: both have the key 'dashboard'" in told


def test_a_loader_is_defined_again_with_values_that_cannot_be_compared(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A value whose comparison raises is no reason to refuse a loader, nor to tell anything of it."""
    inner = getattr(room, "inner", room)

    def view(value: object) -> None:
        @inner.cache.cached("by:{id}", name="load")
        def load(id: int) -> str:
            return f"{value}"

    for _ in range(2):
        view(Decimal("sNaN"))
    assert not caplog.records


class Timed:
    """A decorator that is a class, and binds as a method does."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        return self.__wrapped__(*args)  # type: ignore[attr-defined]

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return functools.partial(self, instance)


class Awaited(Timed):
    async def __call__(self, *args: Any) -> Any:
        return await self.__wrapped__(*args)  # type: ignore[attr-defined]


def test_two_loaders_below_one_decorator_are_told_apart(room: Any) -> None:
    """Two functions below a decorator that is a class are two, and none is given what the other one loads."""

    def one(id: int) -> str:
        return "one"

    def two(id: int) -> str:
        return "two"

    load = room.cache.cached("n:{id}", name="load")(Timed(one))
    with pytest.raises(InvalidArgument, match="a loader named 'load' exists already"):
        room.cache.cached("n:{id}", name="load")(Timed(two))
    assert load(7) == "one"


def test_a_decorator_that_is_a_class_may_be_awaited(room: Any) -> None:
    """An object whose `__call__` is awaited is known as that, also if it binds as a method: asgiref makes such."""

    async def load(id: int) -> int:
        return id

    if hasattr(room, "inner"):
        assert room.cache.cached("n:{id}", name="load")(Awaited(load))(7) == 7
    else:
        with pytest.raises(InvalidArgument, match="load is a coroutine function: use Async"):
            room.cache.cached("n:{id}", name="load")(Awaited(load))
    for unknown in (async_to_sync(load), max):
        with pytest.raises(InvalidArgument, match=r"plain named parameters|does not know its"):
            room.cache.cached("n:{id}", name="load")(unknown)


def test_two_loaders_of_one_factory_are_told_apart(room: Any) -> None:
    """Two loaders that one factory made at the same place in the source are told apart."""
    inner = getattr(room, "inner", room)

    def make(key: str) -> None:
        @inner.cache.cached(key)
        def load() -> int:
            return 1

    make("one")
    make("one")
    with pytest.raises(InvalidArgument, match="a loader named 'load' exists already"):
        make("two")
