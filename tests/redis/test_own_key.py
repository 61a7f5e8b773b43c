"""A load that asks for its own key is not held up by itself."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import pytest

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from tests.support.faces import FACES, open_room

PATIENCE_S = 5.0  # half of how long a caller waits for another caller's load


@pytest.fixture
def room(settings: Settings) -> Any:
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield room


def test_a_load_does_not_wait_for_itself(room: Any) -> None:
    """A load that asks for its own key, directly, through another load or among many, is not held up."""

    @room.cache.cached("product:{id}")
    def product(id: int) -> list[int]:
        return [id]

    def indirect() -> list[int]:
        found: list[int] = room.cache.get_or_set("between", lambda: product(2))
        return found

    def many(keys: list[str]) -> dict[str, list[int]]:
        return dict(zip(keys, product.many([3, 4]), strict=True))

    def one_of_many(keys: list[str]) -> dict[str, Any]:
        return {key: room.cache.get_or_set_many([key], again)[key] for key in keys}

    def again(keys: list[str]) -> dict[str, Any]:
        return {key: [int(key[-1])] for key in keys}

    began = time.monotonic()
    assert room.cache.get_or_set("product:1", partial(product, 1)) == [1]
    assert room.cache.get_or_set("product:2", indirect) == [2]
    assert room.cache.get_or_set_many(["product:3", "product:4"], many)["product:4"] == [4]
    assert room.cache.get_or_set_many(["product:5", "product:6"], one_of_many)["product:6"] == [6]
    assert time.monotonic() - began < PATIENCE_S
    assert [room.cache.get(f"product:{n}") for n in range(1, 7)] == [[n] for n in range(1, 7)]


@pytest.mark.parametrize("face", FACES)
def test_nor_while_redis_is_away(face: str) -> None:
    """Also while Redis is away a load that asks for its own key, by itself or among many, is not held up."""
    settings = Settings(redis_url="redis://127.0.0.1:1", breaker_failures=1)
    with open_room(face, settings, NoDispatch()) as room:
        assert room.cache.get("away") is None
        cache = room.inner.cache if face == "async" else room.cache

        @cache.cached("product:{id}")  # type: ignore[untyped-decorator]
        def product(id: int) -> list[int]:
            return [id]

        async def many_async(keys: list[str]) -> dict[str, list[int]]:
            return {key: await product(int(key[-1])) for key in keys}

        def many(keys: list[str]) -> dict[str, list[int]]:
            return {key: product(int(key[-1])) for key in keys}

        began = time.monotonic()
        assert room.cache.get_or_set("product:1", partial(product, 1)) == [1]
        loader = many_async if face == "async" else many
        assert room.cache.get_or_set_many(["product:2", "product:3"], loader)["product:3"] == [3]
        assert time.monotonic() - began < PATIENCE_S


def test_an_endless_load_is_an_error_and_no_wait(room: Any) -> None:
    """A loader that calls itself without end fails as it would without a cache."""

    @room.cache.cached("endless:{id}", at_once=1)
    def endless(id: int) -> int:
        found: int = endless(id)
        return found

    began = time.monotonic()
    with pytest.raises(RecursionError):
        endless(1)
    assert time.monotonic() - began < PATIENCE_S


def test_the_tasks_of_a_load_do_not_wait_for_it(settings: Settings) -> None:
    """What a load gathers, and a task that it starts, do not wait for it."""

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            loads = []

            @room.cache.cached("product:{id}")
            async def product(id: int) -> int:
                loads.append(id)
                return id

            async def load() -> int:
                tasks.append(asyncio.create_task(another()))
                return sum(await product.many([1, 2]))

            async def another() -> Any:
                return await room.cache.get_or_set("product:1", lambda: 7)

            tasks: list[Any] = []
            began = time.monotonic()
            assert await room.cache.get_or_set("product:1", load) == 3
            assert await tasks[0] in (3, 7)
            assert loads == [1, 2]
            assert time.monotonic() - began < PATIENCE_S

    asyncio.run(main())
