"""The shop's database: SQLite, in the file SHOP_DATABASE names. It knows nothing of Stillroom."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from hashlib import scrypt
from typing import NamedTuple

from pydantic import BaseModel

PATH = os.environ.get("SHOP_DATABASE", "shop.db")
SLOW = float(os.environ.get("SHOP_QUERY_MS", "0")) / 1000  # what a busy database would take
ADMIN = "admin"

SCHEMA = """
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, brand TEXT, cents INTEGER, image TEXT);
CREATE TABLE users (name TEXT PRIMARY KEY, salt BLOB, hash BLOB);
CREATE TABLE logins (name TEXT, ok INTEGER, at REAL);
CREATE TABLE orders (id INTEGER PRIMARY KEY, user TEXT, items TEXT, cents INTEGER);
"""
PRODUCTS = [
    (1, "Apricot jam", "acme", 420, "apricot.png"),
    (2, "Blackcurrant jelly", "acme", 390, "blackcurrant.png"),
    (3, "Gooseberry chutney", "birch", 510, "gooseberry.png"),
    (4, "Lemon curd", "birch", 480, "lemon.png"),
    (5, "Quince paste", "cove", 650, "quince.png"),
    (6, "Raspberry cordial", "cove", 560, "raspberry.png"),
    (7, "Plum jam", "acme", 350, "plum.png"),
]
USERS = {"ann": "apricot", "ben": "blackcurrant", ADMIN: "quince"}  # it is a demo


class Product(BaseModel):
    id: int
    name: str
    brand: str
    cents: int
    image: str


class Order(NamedTuple):
    id: int
    items: dict[str, int]
    cents: int


def prepare() -> None:
    """Make and fill the tables, unless somebody has."""
    with _transaction("EXCLUSIVE") as db:
        if db.execute("SELECT 1 FROM sqlite_master").fetchone():
            return
        for statement in filter(None, map(str.strip, SCHEMA.split(";"))):
            db.execute(statement)
        db.executemany("INSERT INTO products VALUES (?, ?, ?, ?, ?)", PRODUCTS)
        for name, password in USERS.items():
            salt = secrets.token_bytes(16)
            db.execute("INSERT INTO users VALUES (?, ?, ?)", [name, salt, _hash(password, salt)])


def find_product(id: int) -> Product | None:
    found = _products("WHERE id = ?", id)
    return found[0] if found else None


def list_products() -> list[Product]:
    return _products("ORDER BY name")


def update_product(id: int, name: str, cents: int) -> bool:
    """Change a product. Return False if there is no such product."""
    with _transaction("IMMEDIATE") as db:
        sql = "UPDATE products SET name = ?, cents = ? WHERE id = ?"
        return db.execute(sql, [name, cents, id]).rowcount == 1


def reduce_prices(brand: str, percent: int) -> bool:
    """Reduce the prices of a brand. Return False if there is no such brand."""
    with _transaction("IMMEDIATE") as db:
        sql = "UPDATE products SET cents = cents * (100 - ?) / 100 WHERE brand = ?"
        return db.execute(sql, [percent, brand]).rowcount > 0


def check_password(name: str, password: str) -> bool:
    """Return whether the password is right. It takes as long for a name that nobody has.

    Each try leaves a line in `logins`.
    """
    with _transaction() as db:
        found = db.execute("SELECT salt, hash FROM users WHERE name = ?", [name]).fetchone()
    salt, expected = found or (b"nobody", b"")
    ok = hmac.compare_digest(_hash(password, salt), expected)
    with _transaction("IMMEDIATE") as db:
        db.execute("INSERT INTO logins VALUES (?, ?, ?)", [name, ok, time.time()])
    return ok


def place_order(user: str, items: Mapping[str, int]) -> None:
    """Place an order, at the prices of this moment, not those of a page; none where there are no items.

    `items`: a product's id → how many.
    """
    if not items:
        return
    with _transaction("IMMEDIATE") as db:
        prices = dict(db.execute("SELECT id, cents FROM products"))
        cents = sum(prices.get(int(one), 0) * count for one, count in items.items())
        sql = "INSERT INTO orders (user, items, cents) VALUES (?, ?, ?)"
        db.execute(sql, [user, json.dumps(dict(items)), cents])


def list_orders(user: str) -> list[Order]:
    with _transaction() as db:
        rows = db.execute("SELECT id, items, cents FROM orders WHERE user = ? ORDER BY id", [user])
        return [Order(number, json.loads(items), cents) for number, items, cents in rows]


def _products(which: str, *values: object) -> list[Product]:
    time.sleep(SLOW)
    with _transaction() as db:
        db.row_factory = sqlite3.Row
        return [Product(**row) for row in db.execute(f"SELECT * FROM products {which}", values)]


def _hash(password: str, salt: bytes) -> bytes:
    return scrypt(password.encode(errors="replace"), salt=salt, n=2**14, r=8, p=1)


@contextmanager
def _transaction(kind: str = "DEFERRED") -> Iterator[sqlite3.Connection]:
    """Commit at the end of the block; nothing stays of a block that raises."""
    with closing(sqlite3.connect(PATH, timeout=10, isolation_level=None)) as db:
        db.execute(f"BEGIN {kind}")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
