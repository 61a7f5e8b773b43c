"""The page's loaders and limit in a room of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.page import shop
from stillroom import AsyncStillroom, Limit, Stillroom
from stillroom.cache.cache import Cache

LIMIT = Limit("page", shop.ALLOWED, shop.PER_S)


class Loaders(NamedTuple):
    """The cached functions of a page."""

    product: Callable[[int], Any]
    rates: Callable[[], Any]


def loaders(room: Stillroom, near: bool = False) -> Loaders:
    options: dict[str, Any] = {"near": True} if near else {}

    @room.cache.cached("product:{id}", ttl=shop.TTL, tags=["products"], **options)
    def product(id: int) -> shop.Product:
        return shop.load_product(id)

    @room.cache.cached("rates", ttl=shop.RATES_TTL, swr=shop.RATES_SWR, **options)
    def rates() -> dict[str, float]:
        return shop.load_rates()

    return Loaders(product, rates)


def async_loaders(room: AsyncStillroom, near: bool = False) -> Loaders:
    options: dict[str, Any] = {"near": True} if near else {}

    @room.cache.cached("product:{id}", ttl=shop.TTL, tags=["products"], **options)
    async def product(id: int) -> shop.Product:
        return await shop.load_product_async(id)

    @room.cache.cached("rates", ttl=shop.RATES_TTL, swr=shop.RATES_SWR, **options)
    async def rates() -> dict[str, float]:
        return await shop.load_rates_async()

    return Loaders(product, rates)


def has_near() -> bool:
    """Return whether this release knows near entries."""
    return "near" in inspect.signature(Cache.cached).parameters
