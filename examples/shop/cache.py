"""The shop's room, and how its pages' values are made. Workers import this: STILLROOM_LOADERS=shop.cache

Whoever changes the database says what was changed, after the commit: see `product_changed` and `prices_changed`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from shop import db
from shop.db import Product
from stillroom import Settings, Stillroom

T = TypeVar("T")

IMAGES = Path(__file__).parent / "static"
STALE = 3600  # seconds a page may be shown after its time, while a worker makes a newer one

room = Stillroom(Settings(image_root=IMAGES))


class Read(BaseModel, Generic[T]):
    """Holds a value from the database, and for a page's foot when and by which process it was read."""

    value: T
    at: float
    by: int


def tags_of(read: Read[Product | None]) -> list[str]:
    return ["products", f"brand:{read.value.brand}"] if read.value else ["products"]


@room.cache.cached("product:{id}", swr=STALE, tags=[tags_of])
def load_product(id: int) -> Read[Product | None]:
    """Load a product, or None. None is cached too: whoever guesses numbers asks the database once for each."""
    return just_read(db.find_product(id))


@room.cache.cached("listing", swr=STALE, tags=["listings"])
def load_listing() -> Read[list[Product]]:
    return just_read(db.list_products())


def product_changed(id: int) -> None:
    """Tell the cache that a change of a product is committed. No page shows the old state after this returns.

    `defer`: what is saved must not look as if it failed. With Redis away the caches hear of it when it is back,
    before this process believes any of them.
    """
    room.cache.invalidate(load_product.key(id), defer=True)
    room.cache.invalidate_by_tag("listings", defer=True)


def prices_changed(brand: str) -> None:
    """Tell the cache the same of all products of a brand, however many there are: one script."""
    room.cache.invalidate_by_tag(f"brand:{brand}", "listings", defer=True)


def just_read(value: T) -> Read[T]:
    return Read(value=value, at=time.time(), by=os.getpid())
