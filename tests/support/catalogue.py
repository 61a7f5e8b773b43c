"""A small catalogue in SQLite, seen through SQLAlchemy, with sessions of both kinds behind one set of calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Column, ForeignKey, Table, create_engine, event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    sessionmaker,
)

from stillroom.integrations.sqlalchemy import invalidates


class Base(DeclarativeBase):
    pass


labelled = Table(
    "labelled",
    Base.metadata,
    Column("product_id", ForeignKey("product.id"), primary_key=True),
    Column("label_id", ForeignKey("label.id"), primary_key=True),
)


@invalidates("label:{id}")
class Label(Base):
    __tablename__ = "label"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@invalidates("brand:{id}")
class Brand(Base):
    __tablename__ = "brand"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    products: Mapped[list[Product]] = relationship(cascade="all, delete-orphan")


@invalidates("products", "product:{id}", "brand:{brand_id}", lambda row: [f"price:{row.price}"])
class Product(Base):
    __tablename__ = "product"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int]
    brand_id: Mapped[int] = mapped_column(ForeignKey("brand.id"))
    labels: Mapped[list[Label]] = relationship(secondary=labelled)


class Catalogue:
    """The database, and a maker of sessions of one kind. `url` is of a file: its connections see each other."""

    def __init__(
        self, folder: Path, kind: str = "sync", loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self.kind = kind
        self._loop: Any = loop
        self.engine = create_engine(f"sqlite:///{folder}/catalogue.db")
        _begin_when_told(self.engine)
        Base.metadata.create_all(self.engine)
        with Session(self.engine) as session:
            session.add(Brand(id=1, name="acme", products=[Product(id=7, price=1)]))
            session.add(Brand(id=2, name="other"))
            session.add(Label(id=3, text="new"))
            session.commit()
        self.maker: Any = sessionmaker(self.engine)
        if kind == "async":
            self._async_engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/catalogue.db")
            _begin_when_told(self._async_engine.sync_engine)
            self.maker = async_sessionmaker(self._async_engine)

    def run(self, work: Callable[[Session], object], *, commit: bool = True) -> None:
        """Run the function in one session, and commit or roll back."""
        if self.kind == "sync":
            with self.maker() as session:
                work(session)
                session.commit() if commit else session.rollback()
        else:
            self._loop.run_until_complete(self._run(work, commit))

    async def _run(self, work: Callable[[Session], object], commit: bool) -> None:
        async with self.maker() as session:
            await session.run_sync(work)
            await (session.commit() if commit else session.rollback())

    def price(self, id: int = 7) -> int | None:
        """Return the committed price, read by a connection of its own."""
        with Session(self.engine) as session:
            product = session.get(Product, id)
            return None if product is None else product.price

    def close(self) -> None:
        if self.kind == "async":
            self._loop.run_until_complete(self._async_engine.dispose())
        self.engine.dispose()


def _begin_when_told(engine: Any) -> None:
    """Let SQLite's driver begin transactions when SQLAlchemy says so, not at its own time."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        with closing(connection.cursor()) as cursor:
            cursor.execute("PRAGMA foreign_keys=ON")
            # A reader does not keep a writer from committing.
            cursor.execute("PRAGMA journal_mode=WAL")

    @event.listens_for(engine, "begin")
    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")
