"""The page's loaders and limit in a room of ours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from bench.page import shop
from stillroom import AsyncStillroom, Limit, Stillroom

LIMIT = Limit("page", shop.ALLOWED, shop.PER_S)

Reads: TypeAlias = Callable[[list[int]], tuple[list[Any], dict[str, float]]]
AsyncReads: TypeAlias = Callable[[list[int]], Awaitable[tuple[list[Any], dict[str, float]]]]


def reads(room: Stillroom, *, near: bool = False, gathered: bool = False) -> Reads:
    """Return what reads these products and the rates from the cache."""
    options: dict[str, Any] = {"near": True} if near else {}

    @room.cache.cached("product:{id}", ttl=shop.TTL, tags=["products"], **options)
    def product(id: int) -> shop.Product:
        return shop.load_product(id)

    @room.cache.cached("rates", ttl=shop.RATES_TTL, swr=shop.RATES_SWR, **options)
    def rates() -> dict[str, float]:
        return shop.load_rates()

    def one_by_one(ids: list[int]) -> Any:
        return [product(one) for one in ids], rates()

    def at_once(ids: list[int]) -> Any:
        *products, last = room.cache.gather(*(partial(product, one) for one in ids), rates)
        return products, last

    return at_once if gathered else one_by_one


def async_reads(room: AsyncStillroom, *, near: bool = False, gathered: bool = False) -> AsyncReads:
    """Return what reads these products and the rates from the cache."""
    options: dict[str, Any] = {"near": True} if near else {}

    @room.cache.cached("product:{id}", ttl=shop.TTL, tags=["products"], **options)
    async def product(id: int) -> shop.Product:
        return await shop.load_product_async(id)

    @room.cache.cached("rates", ttl=shop.RATES_TTL, swr=shop.RATES_SWR, **options)
    async def rates() -> dict[str, float]:
        return await shop.load_rates_async()

    async def one_by_one(ids: list[int]) -> Any:
        return [await product(one) for one in ids], await rates()

    async def at_once(ids: list[int]) -> Any:
        *products, last = await room.cache.gather(*(partial(product, one) for one in ids), rates)
        return products, last

    return at_once if gathered else one_by_one
