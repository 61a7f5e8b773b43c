"""The page's loaders and limit in a room of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bench.page import shop
from stillroom import AsyncStillroom, Limit, Stillroom

LIMIT = Limit("page", shop.ALLOWED, shop.PER_S)


class Loaders(NamedTuple):
    """The cached functions of a page: the products of these ids, and the rates."""

    products: Callable[[list[int]], Any]
    rates: Callable[[], Any]


def loaders(room: Stillroom, *, near: bool = False, many: bool = False) -> Loaders:
    options: dict[str, Any] = {"near": True} if near else {}

    @room.cache.cached("product:{id}", ttl=shop.TTL, tags=["products"], **options)
    def product(id: int) -> shop.Product:
        return shop.load_product(id)

    @room.cache.cached("rates", ttl=shop.RATES_TTL, swr=shop.RATES_SWR, **options)
    def rates() -> dict[str, float]:
        return shop.load_rates()

    def one_by_one(ids: list[int]) -> list[shop.Product]:
        return [product(one) for one in ids]

    return Loaders(product.many if many else one_by_one, rates)


def async_loaders(room: AsyncStillroom, *, near: bool = False, many: bool = False) -> Loaders:
    options: dict[str, Any] = {"near": True} if near else {}

    @room.cache.cached("product:{id}", ttl=shop.TTL, tags=["products"], **options)
    async def product(id: int) -> shop.Product:
        return await shop.load_product_async(id)

    @room.cache.cached("rates", ttl=shop.RATES_TTL, swr=shop.RATES_SWR, **options)
    async def rates() -> dict[str, float]:
        return await shop.load_rates_async()

    async def one_by_one(ids: list[int]) -> list[shop.Product]:
        return [await product(one) for one in ids]

    return Loaders(product.many if many else one_by_one, rates)
