"""What stands in the place of a function, as decorators make it, is a loader as the function itself is."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Annotated, Any, Optional, Self

import pytest
from pydantic import BaseModel

from stillroom.cache.around import OnlyAsync
from stillroom.cache.orders import Load

A_DAY = dt.date(2026, 11, 28)


class Product(BaseModel):
    id: int = 7

    @classmethod
    def one(cls) -> Self:
        return cls()

    @classmethod
    def perhaps(cls) -> Self | None:
        return cls()

    @classmethod
    def optional(cls) -> Optional[Self]:  # noqa: UP045 - what it is called in older code
        return cls()

    @classmethod
    def noted(cls) -> Annotated[Self, "a note"]:
        return cls()

    @classmethod
    def by_id(cls) -> dict[str, tuple[Self, ...]]:
        return {"7": (cls(),)}

    def itself(self) -> Self:
        return self


class Shoe(Product):
    size: int = 42


class Timed:
    """A decorator that is a class, as many are: functools.wraps gives it what the function says of itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]


def plain(function: Any) -> Any:
    return function


@pytest.mark.parametrize("decorator", [functools.lru_cache, functools.cache, Timed, plain])
def test_the_type_is_found_behind_a_wrapper(room: Any, decorator: Any) -> None:
    """A value has the type that the wrapped function declares, on a miss and on a hit."""

    @decorator
    def day(id: int) -> dt.date:
        return A_DAY

    load = room.cache.cached("day:{id}", name="day")(day)
    assert [load(1), load(1), *load.many([1, 2])] == [A_DAY] * 4
    for _ in range(2):
        assert room.cache.get_or_set("a-day", functools.partial(day, 1)) == A_DAY
    assert load.invalidate(1) == 1


def test_a_decorator_may_give_an_argument_itself(room: Any) -> None:
    """An argument that a decorator gives, such as a connection, is not part of a call: the key has the others."""

    def connected(function: Callable[[str, int], dt.date]) -> Callable[[int], dt.date]:
        @functools.wraps(function)
        def call(id: int) -> dt.date:
            return function("a connection", id)

        return call

    @connected
    def day(connection: str, id: int) -> dt.date:
        return A_DAY + dt.timedelta(days=id)

    load = room.cache.cached("day:{id}", name="day")(day)
    assert [load(0), load(id=0), *load.many([0])] == [A_DAY] * 3
    with pytest.raises(TypeError):
        load("a connection", 0)


def by_place(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(**kwargs: Any) -> Any:
        return function(**kwargs)

    return call


def by_its_first(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(first: int, *args: Any, **kwargs: Any) -> Any:
        return function(first, *args, **kwargs)

    return call


@pytest.mark.parametrize("decorator", [by_place, by_name, by_its_first, functools.singledispatch])
def test_a_decorator_may_pass_on_places_or_names(room: Any, decorator: Any) -> None:
    """What takes arguments by their place alone is loaded so, in a worker too, and what takes names by these."""

    @decorator
    def day(id: int, more: int = 1) -> dt.date:
        return A_DAY + dt.timedelta(days=id + more)

    load = room.cache.cached("day:{id}:{more}", name="day")(day)
    expected = [A_DAY + dt.timedelta(days=days) for days in (1, 3, 2)]
    assert [load(0), load(1, more=2), *load.many([1])] == expected
    assert room.upkeep.load(Load(loader="day", args={"id": 5, "more": 1}))["outcome"] == "loaded"


def test_a_cached_function_loads_for_another_key(room: Any) -> None:
    """A cached function, or a partial of one, is a loader for another key and for another loader."""
    inner = getattr(room, "inner", room)

    @inner.cache.cached("day:{id}")
    def day(id: int) -> dt.date:
        return A_DAY

    again = room.cache.cached("again:{id}", name="again")(day)
    for _ in range(2):
        assert room.cache.get_or_set("today", functools.partial(day, 1)) == A_DAY
        assert again(1) == A_DAY


def test_a_class_loads_objects_of_its_own(room: Any) -> None:
    """What a class makes has the type of the class, on a miss and on a hit, also by a partial."""
    for _ in range(2):
        assert room.cache.get_or_set("plain", Product) == Product(id=7)
        assert room.cache.get_or_set("given", functools.partial(Product, id=8)) == Product(id=8)


class Source:
    """A loader with a state, whose names are those of a cached function."""

    def __init__(self) -> None:
        self.key = self.many = self.invalidate = self.loader = self.__name__ = "mine"
        self.table = "products"

    def __call__(self, id: int) -> int:
        return id


def test_attributes_of_a_function_hide_nothing(room: Any) -> None:
    """A cached function has the attributes of its function, but `key`, `many` and `invalidate` stay its own."""
    inner = getattr(room, "inner", room)

    def function(id: int) -> int:
        return id

    vars(function).update(vars(Source()))
    for number, given in enumerate((function, Source())):
        load = inner.cache.cached(f"{number}:{{id}}", name=f"n{number}")(given)
        assert load.table == "products"
        assert load.key(1) == f"{number}:1"
        load = room.cache.cached(f"again{number}:{{id}}", name=f"again{number}")(given)
        assert [load(1), *load.many([1, 2])] == [1, 1, 2]
        assert load.invalidate(1) == 1


LOADS = ["one", "perhaps", "optional", "noted", "by_id", "itself"]


@pytest.mark.parametrize("name", LOADS)
def test_self_is_the_class_that_a_method_is_bound_to(room: Any, name: str) -> None:
    """A bound method that returns Self, by itself or in something else, gives objects of its class on a hit."""
    load = getattr(Shoe() if name == "itself" else Shoe, name)
    cached = room.cache.cached("shoe", name="shoe")(load)
    expected = load()
    for _ in range(2):
        assert room.cache.get_or_set("a-shoe", load) == expected
        assert cached() == expected


class Page(BaseModel):
    lines: Iterable[int]


@pytest.mark.parametrize("kind", [Page, list[Page], Page | None])
def test_an_iterator_in_a_model_is_not_used_up(room: Any, kind: Any) -> None:
    """A model that has an iterator is not stored, and its caller can read it, once as without a cache."""

    def load() -> Any:
        page = Page(lines=iter([1, 2]))
        return [page] if kind == list[Page] else page

    cached = room.cache.cached("page", name="page", type=kind)(load)
    for _ in range(2):
        found = cached()
        page = found[0] if isinstance(found, list) else found
        assert list(page.lines) == [1, 2]


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[None]:
    yield


def test_a_partial_in_an_awaited_context_is_told_by_its_function(room: Any) -> None:
    """A partial of a blocking function that is given an awaited context is told by the name of that function."""
    getattr(room, "inner", room).around_load(session)

    def load(region: str, id: int) -> int:
        return id

    cached = room.cache.cached("n:{id}", name="n")(functools.partial(load, "eu"))
    with pytest.raises(OnlyAsync, match="the loader load is not async"):
        cached(7)
