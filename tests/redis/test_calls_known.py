"""What a call wants is remembered, and that changes nothing but its price."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from werkzeug.local import LocalProxy

from stillroom.cache import calls


def known(room: Any) -> int:
    """Return how many calls this process remembers."""
    body = room.cache._body
    memories = {id(part._wanted): part._wanted for part in getattr(body, "shards", [body])}
    return sum(map(len, memories.values()))


def test_equal_arguments_of_other_types_are_other_calls(make_room: Any) -> None:
    """1, True and 1.0 are equal to Python, and have keys of their own; so has a text beside its bytes."""
    given: list[Any] = []

    @make_room().cache.cached("any:{id}", ttl=60)
    def load(id: Any) -> str:
        given.append(id)
        return repr(id)

    wanted: list[Any] = [1, True, 1.0, "1", b"1", None, 0, False]
    for _ in range(2):
        assert [load(one) for one in wanted] == list(map(repr, wanted))
        assert load.many(wanted) == list(map(repr, wanted))
    assert len(given) == len(wanted)


def test_contexts_that_come_later_are_entered(make_room: Any) -> None:
    """`around_load` holds for the next load of a call that was made before it."""
    room, entered = make_room(), list[str]()

    @room.cache.cached("page:{id}", ttl=60)
    def load(id: int) -> int:
        entered.append("load")
        return id

    @contextmanager
    def context() -> Any:
        entered.append("context")
        yield

    load(1)
    room.around_load(context)
    room.cache.invalidate("page:1")
    load(1)
    assert entered == ["load", "context", "load"]


@pytest.mark.parametrize("options", [{}, {"near": True}], ids=["plain", "near"])
def test_large_arguments_are_not_kept(make_room: Any, options: Any) -> None:
    """A long text is hashed in its key. Neither what is remembered nor what is kept near holds it."""
    room = make_room()

    @room.cache.cached("search:{words}", ttl=60, **options)
    def search(words: str) -> int:
        return len(words)

    for length in (5, 100_000):
        with room.request():
            assert search("x" * length) == search("x" * length) == length
    assert known(room) == 1
    assert all(len(call[1]) < 1_000 for call in room.cache._body.copies._calls)


@pytest.mark.parametrize("shards", [1, 3])
def test_not_more_than_so_many_are_kept(
    make_room: Any, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Where as many calls are remembered as may be, the next one is the first again."""
    monkeypatch.setattr(calls, "CALLS_KNOWN", 10)
    room = make_room(shards=shards)

    @room.cache.cached("n:{n}", ttl=60)
    def load(n: int) -> int:
        return n

    assert [load(n) for n in range(25)] == list(range(25))
    assert load.many(range(25)) == list(range(25))
    assert 0 < known(room) <= 10


def test_what_raises_is_not_remembered(make_room: Any) -> None:
    """A call that does not fit its function raises each time."""
    room = make_room()

    @room.cache.cached("n:{n}", ttl=60)
    def load(n: int) -> int:
        return n

    for _ in range(2):
        with pytest.raises(TypeError, match="too many"):
            load(1, 2)
    assert known(room) == 0


@pytest.mark.parametrize("options", [{}, {"near": True}], ids=["plain", "near"])
def test_a_stand_in_is_remembered_by_nobody(make_room: Any, options: Any) -> None:
    """What a lazy object stands for changes with the request, and outside of one it raises: it is not kept."""
    now: ContextVar[int] = ContextVar("now")
    room, stand_in = make_room(), LocalProxy(now)

    @room.cache.cached("n:{n}", ttl=60, **options)
    def load(n: int) -> int:
        return int(n)

    for n in (-1, -2, 7):  # the first two have one hash
        token = now.set(n)
        with room.request():
            assert load(stand_in) == load.many([stand_in])[0] == n
        now.reset(token)
        with room.request():
            assert load(n) == load.many([n])[0] == n


@pytest.mark.parametrize("options", [{}, {"near": True}], ids=["plain", "near"])
def test_a_default_that_the_app_changes_is_another_key(make_room: Any, options: Any) -> None:
    """The key has the text that a default has when the call is made."""
    room, shown = make_room(), {"currency": "EUR"}

    @room.cache.cached("price:{id}:{how}", ttl=60, **options)
    def price(id: int, how: dict[str, str] = shown) -> str:
        return f"{id} {how['currency']}"

    for currency in ("EUR", "USD", "EUR"):
        shown["currency"] = currency
        for _ in range(2):
            with room.request():
                assert price(7) == price.many([7])[0] == f"7 {currency}"
    assert known(room) == 0
