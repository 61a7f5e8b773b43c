"""Makes the page: four of 300 products and the rates, each from a loader that takes 3 ms.

One visit in fifty changes a product, so that its next reader loads it again.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any, NamedTuple

from typing_extensions import TypedDict

PRODUCTS, ON_A_PAGE = 300, 4
ONE_IN = 50  # visits change a product
LOAD_S = 0.003
TTL, RATES_TTL, RATES_SWR = 300, 2, 60  # seconds
ALLOWED, PER_S = 1_000_000, 60  # requests: everybody counts, nobody is refused
SESSION: dict[str, Any] = {"theme": "dark", "user": 7, "cart": [1, 2, 3], "csrf": "x" * 32}


class Product(TypedDict):
    id: int
    name: str
    brand: str
    price_cents: int
    in_stock: bool
    labels: list[str]


class Visit(NamedTuple):
    """Holds the products that one visit reads, and the one it changes."""

    products: list[int]
    changed: int | None


def visit() -> Visit:
    chosen = [random.randrange(PRODUCTS) for _ in range(ON_A_PAGE)]
    return Visit(chosen, random.randrange(PRODUCTS) if random.randrange(ONE_IN) == 0 else None)


def page(theme: str, products: list[Product], rates: dict[str, float]) -> dict[str, Any]:
    return {"theme": theme, "products": products, "rates": rates}


def product(id: int) -> Product:
    return {
        "id": id,
        "name": f"Copper preserving pan, {id} litres, hammered",
        "brand": "acme",
        "price_cents": 12_950,
        "in_stock": True,
        "labels": ["kitchen", "copper", "preserving", "bestseller"],
    }


RATES = {"EUR": 1.0, "USD": 1.08, "GBP": 0.86, "CHF": 0.94}


def load_product(id: int) -> Product:
    time.sleep(LOAD_S)
    return product(id)


def load_rates() -> dict[str, float]:
    time.sleep(LOAD_S)
    return RATES


async def load_product_async(id: int) -> Product:
    await asyncio.sleep(LOAD_S)
    return product(id)


async def load_rates_async() -> dict[str, float]:
    await asyncio.sleep(LOAD_S)
    return RATES
