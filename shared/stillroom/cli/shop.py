"""The demo's app: a product page with a slow database behind it. Its loader is what the demo's worker runs.

`python -m stillroom.cli.shop` is the demo's other process: it prints the product's price for each line it reads.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

from pydantic import BaseModel

from stillroom import Settings, Stillroom

DATABASE = "DEMO_DATABASE"  # the path, in the environment: worker and app read the same
SLOW = 0.1  # seconds a query takes
FRESH = 1.0  # seconds; a page would say minutes

room = Stillroom(Settings(ttl=FRESH, swr=600))


class Product(BaseModel):
    id: int
    name: str
    price_cents: int


@room.cache.cached("product:{id}", tags=["products", "brand:{brand}"])
def load_product(id: int, brand: str) -> Product:  # noqa: ARG001 (the tag has it)
    """One slow query, which leaves a line in the database, so that queries can be counted."""
    time.sleep(SLOW)
    with closing(_connect()) as db, db:
        db.execute("INSERT INTO queries VALUES (?)", [os.getpid()])
        (row,) = db.execute("SELECT name, price_cents FROM products WHERE id = ?", [id])
    return Product(id=id, name=row[0], price_cents=row[1])


def create_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, price_cents INTEGER)")
        db.execute("CREATE TABLE queries (process INTEGER)")
        db.execute("INSERT INTO products VALUES (7, 'Plum jam', 350)")


def set_price(cents: int) -> None:
    with closing(_connect()) as db, db:
        db.execute("UPDATE products SET price_cents = ?", [cents])


def queries() -> list[int]:
    """The process ids of all queries so far."""
    with closing(_connect()) as db:
        return [pid for (pid,) in db.execute("SELECT process FROM queries")]


def _connect() -> sqlite3.Connection:
    return sqlite3.connect(os.environ[DATABASE], timeout=10)


if __name__ == "__main__":
    for _ in sys.stdin:
        print(load_product(7, "acme").price_cents, flush=True)
