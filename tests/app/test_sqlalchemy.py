"""What a transaction changed through SQLAlchemy is invalidated after its commit, and not after a rollback."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, event, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from stillroom import AsyncStillroom, InvalidArgument, InvalidKey, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.integrations.sqlalchemy import AfterCommit, invalidates
from stillroom.unsettled import is_unsettled
from tests.support.catalogue import Base, Brand, Catalogue, Label, Product
from tests.support.crowd import PATIENT
from tests.support.processes import run_to_end
from tests.support.stepper import MOMENTS, LoadBeside

pytestmark = pytest.mark.any_server


@pytest.fixture
def after_commit(room: Any, catalogue: Catalogue) -> AfterCommit:
    """Watch the catalogue's sessions."""
    after_commit = AfterCommit(getattr(room, "inner", room))
    after_commit.watch(catalogue.maker)
    return after_commit


class Tags:
    """One entry for each tag; a missing entry says that its tag was invalidated."""

    def __init__(self, room: Any, *tags: str) -> None:
        self._room = room
        self._tags = tags
        for tag in tags:
            room.cache.set(f"of {tag}", 1, ttl=60, tags=[tag])

    def invalidated(self) -> set[str]:
        return {tag for tag in self._tags if self._room.cache.get(f"of {tag}") is None}


ALL = ["products", "product:7", "product:8", "product:9", "brand:1", "brand:2", "label:3"]
ALL += ["price:1", "price:5", "by hand"]


@pytest.fixture
def tags(room: Any) -> Tags:
    return Tags(room, *ALL)


def reprice(session: Session) -> None:
    session.get_one(Product, 7).price = 5


def move(session: Session) -> None:
    session.get_one(Product, 7).brand_id = 2


def add(session: Session) -> None:
    session.add(Product(id=8, price=5, brand_id=2))


def remove(session: Session) -> None:
    session.delete(session.get_one(Product, 7))


def orphan(session: Session) -> None:
    brand = session.get_one(Brand, 1)
    brand.products.clear()


def remove_with_brand(session: Session) -> None:
    session.delete(session.get_one(Brand, 1))


def label(session: Session) -> None:
    product = session.get_one(Product, 7)
    product.labels.append(session.get_one(Label, 3))


def add_to_brand(session: Session) -> None:
    brand = session.get_one(Brand, 2)
    brand.products.append(Product(id=9, price=5))


def expired(session: Session) -> None:
    """Set a new brand while the old one is not in memory."""
    product = session.get_one(Product, 7)
    session.expire(product)
    product.brand_id = 2


ROW = {"products", "product:7", "brand:1", "price:1"}
CHANGES: dict[str, tuple[Callable[[Session], object], set[str]]] = {
    "an update": (reprice, ROW | {"price:5"}),
    "a move to another brand": (move, ROW | {"brand:2"}),
    "a move of an expired row": (expired, ROW | {"brand:2"}),
    "an insert": (add, {"products", "product:8", "brand:2", "price:5"}),
    "an insert by a relation": (add_to_brand, {"products", "product:9", "brand:2", "price:5"}),
    "a delete": (remove, ROW),
    "a delete of an orphan": (orphan, ROW),
    "a delete by cascade": (remove_with_brand, ROW),
    "a many-to-many relation": (label, ROW | {"label:3"}),
    "an update that changes nothing": (lambda s: setattr(s.get_one(Product, 7), "price", 1), set()),
    "a read": (lambda s: s.get_one(Product, 7), set()),
    "a statement that says its tags": (
        lambda s: s.execute(
            update(Product).values(price=5), execution_options={"stillroom_tags": ["product:7"]}
        ),
        {"product:7"},
    ),
    "a statement that says one tag": (
        lambda s: s.execute(delete(Product).execution_options(stillroom_tags="product:7")),
        {"product:7"},
    ),
    "a statement that says none": (
        lambda s: s.execute(update(Product).values(price=5)),
        {"products"},
    ),
    "SQL text": (lambda s: s.execute(text("UPDATE product SET price = 5")), set()),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_commit_invalidates_the_tags_of_what_changed(
    after_commit: AfterCommit,
    catalogue: Catalogue,
    tags: Tags,
    change: Callable[[Session], object],
    expected: set[str],
) -> None:
    """The tags of changed rows, as they were and as they are, are invalid when commit returns; no other tag is."""
    catalogue.run(change)
    assert tags.invalidated() == expected


@pytest.mark.parametrize("change", [change for change, _ in CHANGES.values()], ids=CHANGES)
def test_a_rollback_invalidates_nothing(
    after_commit: AfterCommit, catalogue: Catalogue, tags: Tags, change: Callable[[Session], object]
) -> None:
    """Neither a rollback, nor a session that is closed without a commit, invalidates a tag."""
    catalogue.run(lambda session: [change(session), session.flush()], commit=False)
    assert tags.invalidated() == set()


@pytest.mark.parametrize("expire_on_commit", [True, False])
@pytest.mark.parametrize(
    ("change", "also"),
    [
        (lambda _, row: setattr(row, "price", 5), {"price:5", "brand:1"}),
        (lambda _, row: setattr(row, "brand_id", 3), set()),
        (lambda session, row: session.delete(row), set()),
    ],
    ids=["a price", "a brand", "a delete"],
)
def test_a_row_that_others_moved_since_it_was_read_loses_its_tags_too(
    after_commit: AfterCommit,
    catalogue: Catalogue,
    tags: Tags,
    change: Callable[[Session, Product], object],
    also: set[str],
    expire_on_commit: bool,
) -> None:
    """A row's former tags are those that the database has, also where the session keeps what it read before."""
    catalogue.maker.configure(expire_on_commit=expire_on_commit)

    def work(session: Session) -> None:
        product = session.get_one(Product, 7)
        assert product.brand_id == 1
        session.commit()
        with Session(catalogue.engine) as other:  # of another process
            other.add(Brand(id=3, name="third"))
            move(other)
            other.commit()
        change(session, product)

    catalogue.run(work)
    invalidated = tags.invalidated()
    assert invalidated - also == {"products", "product:7", "brand:2", "price:1"}


def test_what_is_asked_for_by_hand_waits_for_the_commit(
    after_commit: AfterCommit, catalogue: Catalogue, room: Any, tags: Tags
) -> None:
    """Keys, tags, soft tags and globs are invalidated after the commit, not before."""
    room.cache.set("key", 1, ttl=60)
    room.cache.set("glob:1", 1, ttl=60)

    def work(session: Session) -> None:
        after_commit.invalidate(session, "key")
        after_commit.invalidate_by_tag(session, "by hand")
        after_commit.invalidate_by_tag(session, "brand:2", soft=True)
        after_commit.invalidate_by_pattern(session, "glob:*")

    catalogue.run(work, commit=False)
    assert room.cache.get("key") == room.cache.get("glob:1") == 1
    assert tags.invalidated() == set()
    catalogue.run(work)
    assert room.cache.get("key") is None
    assert room.cache.get("glob:1") is None
    assert tags.invalidated() == {"by hand"}
    assert room.cache.get_entry("of brand:2").freshness.value == "stale"


def test_a_rolled_back_savepoint_drops_what_was_done_inside_it(
    after_commit: AfterCommit, catalogue: Catalogue, tags: Tags
) -> None:
    """A released savepoint hands on its invalidations, and a rolled back one at any depth forgets them."""

    def work(session: Session) -> None:
        with session.begin_nested():
            reprice(session)
            inner = session.begin_nested()
            after_commit.invalidate_by_tag(session, "brand:2")
            inner.rollback()
        lost = session.begin_nested()
        with session.begin_nested():
            after_commit.invalidate_by_tag(session, "label:3")
        session.add(Product(id=8, price=7, brand_id=1))
        session.flush()
        lost.rollback()
        after_commit.invalidate_by_tag(session, "by hand")

    catalogue.run(work)
    assert tags.invalidated() == ROW | {"price:5", "by hand"}


def test_a_failed_flush_invalidates_nothing(
    after_commit: AfterCommit, catalogue: Catalogue, tags: Tags
) -> None:
    """A commit that ends before COMMIT is sent has changed nothing."""
    with pytest.raises(IntegrityError):
        catalogue.run(lambda session: session.add(Product(id=8, price=5, brand_id=99)))
    assert tags.invalidated() == set()


def test_a_failed_flush_in_a_savepoint_leaves_nothing_for_the_next_one(
    after_commit: AfterCommit,
    catalogue: Catalogue,
    tags: Tags,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A flush that failed inside a savepoint adds nothing to what the commit invalidates, and logs no error."""

    def work(session: Session) -> None:
        product = session.get_one(Product, 7)
        with pytest.raises(IntegrityError), session.begin_nested():
            product.brand_id = 99
        session.expunge(product)
        session.get_one(Brand, 2).name = "renamed"

    catalogue.run(work)
    assert tags.invalidated() == {"brand:2"}
    assert not caplog.records


def test_a_commit_of_unknown_outcome_invalidates(
    after_commit: AfterCommit, catalogue: Catalogue, tags: Tags, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that sent COMMIT and got no answer invalidates: too much rather than too little."""
    engine = catalogue.engine if catalogue.kind == "sync" else catalogue._async_engine.sync_engine
    commit = engine.dialect.do_commit

    def cut_off(connection: Any) -> None:
        commit(connection)
        raise ConnectionResetError("cut off")

    monkeypatch.setattr(engine.dialect, "do_commit", cut_off)
    with pytest.raises(ConnectionResetError):
        catalogue.run(reprice)
    assert catalogue.price() == 5
    assert tags.invalidated() == ROW | {"price:5"}


def test_each_transaction_of_a_session_stands_for_itself(
    after_commit: AfterCommit, catalogue: Catalogue, tags: Tags
) -> None:
    """A later commit does not include what an earlier transaction rolled back."""

    def work(session: Session) -> None:
        after_commit.invalidate_by_tag(session, "brand:2")
        reprice(session)
        session.flush()
        session.rollback()
        after_commit.invalidate_by_tag(session, "by hand")

    catalogue.run(work)
    assert tags.invalidated() == {"by hand"}


# The database and the cache together


@pytest.mark.parametrize("moments", MOMENTS, ids=str)
@pytest.mark.parametrize("is_committed", [True, False], ids=["commit", "rollback"])
def test_no_load_leaves_the_old_value_behind(
    tmp_path: Path,
    server: EmbeddedServer,
    make_room: Any,
    moments: tuple[int, int, int],
    is_committed: bool,
) -> None:
    """Wherever a load begins, reads and stores beside a transaction, later readers see what is committed.

    0: before the change. 1: before the commit. 2: between commit and invalidation. 3: after it.
    """
    writer, reader = make_room(), make_room()
    catalogue = Catalogue(tmp_path)
    after_commit = AfterCommit(writer)

    @reader.cache.cached("price:{id}", ttl=60, tags=["product:{id}"])
    def price(id: int) -> int | None:
        return catalogue.price(id)

    at = LoadBeside(reader, price.loader, (7,), moments).at
    with catalogue.maker() as session:
        event.listen(session, "after_commit", lambda _: at(2))
        after_commit.watch(session)
        at(0)
        reprice(session)
        session.flush()
        at(1)
        if is_committed:
            session.commit()
        else:
            session.rollback()
            at(2)
        at(3)
    assert price(7) == (5 if is_committed else 1)
    catalogue.close()


def test_a_load_inside_a_transaction_stores_nothing_that_may_be_rolled_back(
    after_commit: AfterCommit, catalogue: Catalogue, room: Any
) -> None:
    """A loader that reads the uncommitted row gives it to its caller, and to nobody else."""
    if catalogue.kind == "async" or hasattr(room, "inner"):
        pytest.skip("a loader of the same thread")

    def work(session: Session) -> None:
        @room.cache.cached("price:{id}", ttl=60)
        def price(id: int) -> int:
            return session.get_one(Product, id).price

        many = lambda keys: {key: session.get_one(Product, 7).price for key in keys}  # noqa: E731
        assert room.cache.get_or_set("clean", lambda: session.get_one(Product, 7).price) == 1
        assert room.cache.get("clean") == 1
        reprice(session)
        assert price(7) == 5  # not even flushed
        session.flush()
        assert price(7) == 5
        assert room.cache.get_or_set_many(["a", "b"], many) == {"a": 5, "b": 5}
        assert is_unsettled()
        session.rollback()
        assert not is_unsettled()
        assert room.cache.get_many(["price:7", "a", "b"]) == {}
        assert price(7) == 1
        assert room.cache.get("price:7") == 1

    catalogue.run(work, commit=False)


@pytest.mark.parametrize("expire_on_commit", [True, False])
def test_another_session_beside_it_changes_nothing_of_that(
    room: Any, after_commit: AfterCommit, catalogue: Catalogue, expire_on_commit: bool
) -> None:
    """What a session shows before its commit is not stored, also if another session began after its first read."""
    if catalogue.kind == "async":
        pytest.skip("a loader of the same thread")
    catalogue.maker.configure(expire_on_commit=expire_on_commit)
    with catalogue.maker() as session:
        product = session.get_one(Product, 7)
        for end in (session.commit, session.rollback):
            with catalogue.maker() as other:
                other.get_one(Brand, 1)
                product.price += 4
                assert room.cache.get_or_set("price:7", lambda: product.price) == product.price
            session.flush()
            with catalogue.maker() as other:
                other.get_one(Brand, 1)
                assert room.cache.get_or_set("price:7", lambda: product.price) == product.price
            assert is_unsettled()
            end()
            assert not is_unsettled()
            assert room.cache.get("price:7") is None
    assert catalogue.price() == 5


def test_a_session_whose_transaction_began_in_another_task(
    settings: Settings, tmp_path: Path
) -> None:
    """What a session has sent is not stored before its commit, also where another task began the transaction."""

    async def edit(maker: Any, act: Callable[[AsyncSession], Any]) -> None:
        async with maker() as session:
            await asyncio.create_task(session.get_one(Product, 7))
            await act(session)
            assert is_unsettled()
            await session.rollback()
            assert not is_unsettled()

    async def flush(session: AsyncSession) -> None:
        (await session.get_one(Product, 7)).price = 5
        await session.flush()

    async def execute(session: AsyncSession) -> None:
        await session.execute(update(Product).values(price=5))

    async def main() -> None:
        room = AsyncStillroom(settings, dispatch=NoDispatch())
        catalogue = Catalogue(tmp_path, "async")
        AfterCommit(room).watch(catalogue.maker)
        for act in (flush, execute):
            await asyncio.create_task(edit(catalogue.maker, act))
        await catalogue._async_engine.dispose()
        await room.close()
        catalogue.engine.dispose()

    asyncio.run(main())


def test_a_loader_needs_a_session_of_its_own(tmp_path: Path, make_room: Any) -> None:
    """A loader needs a session of its own: one from before the commit returns old rows, which no cache can see."""
    catalogue, room = Catalogue(tmp_path), make_room()
    AfterCommit(room).watch(catalogue.maker)
    with Session(catalogue.engine) as opened_before:
        known = opened_before.get_one(Product, 7)
        assert known.price == 1
        catalogue.run(reprice)
        borrowed = room.cache.get_or_set(
            "borrowed", lambda: opened_before.get_one(Product, 7).price, tags=["product:7"]
        )
        own = room.cache.get_or_set("own", catalogue.price, tags=["product:7"])
    assert (borrowed, own) == (1, 5)
    catalogue.close()


def test_a_commit_is_no_error_while_redis_is_away(
    own_server: EmbeddedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A commit while Redis is away is saved, and its invalidation waits and is delivered when Redis is back."""
    settings = Settings(
        **PATIENT | {"command_timeout": 0.5, "call_timeout": 0.5}, redis_url=own_server.url
    )
    catalogue = Catalogue(tmp_path)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        tags = Tags(room, "product:7")
        AfterCommit(room).watch(catalogue.maker)
        own_server.freeze()
        catalogue.run(reprice)
        assert catalogue.price() == 5
        assert room.cache.deferred
        own_server.thaw()
        assert tags.invalidated() == {"product:7"}
    catalogue.close()


def test_a_wrong_password_is_logged_and_the_commit_stands(
    tmp_path: Path, server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong password of Redis is logged, and the commit stands without an error."""
    catalogue = Catalogue(tmp_path)
    settings = Settings(redis_url=server.url, redis_password="wrong")
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        AfterCommit(room).watch(catalogue.maker)
        catalogue.run(reprice)
    assert catalogue.price() == 5
    assert "after a commit" in caplog.text
    catalogue.close()


def test_what_is_no_session_is_refused(settings: Settings) -> None:
    """An engine in the place of sessions, and a tag in the place of the session, are refused in our words."""
    after_commit: Any = AfterCommit(Stillroom(settings, dispatch=NoDispatch()))
    for wrong in (create_engine("sqlite://"), Product, None):
        with pytest.raises(InvalidArgument, match=r"^watch\(.*a sessionmaker"):
            after_commit.watch(wrong)
    for forgotten in ("invalidate", "invalidate_by_tag"):
        with pytest.raises(
            InvalidArgument, match=r"session='products': the session .* comes first"
        ):
            getattr(after_commit, forgotten)("products")


async def cancelled_commit(settings: Settings, folder: Path) -> None:
    catalogue = Catalogue(folder)
    engine = create_async_engine(str(catalogue.engine.url).replace("sqlite", "sqlite+aiosqlite"))
    maker = async_sessionmaker(engine)
    async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
        after_commit = AfterCommit(room)
        after_commit.watch(maker)
        await room.cache.set("k", 1, tags=["product:7"])
        begun = asyncio.Event()
        invalidate = room.cache.invalidate_by_tag

        async def slow(*tags: str, **options: Any) -> None:
            begun.set()
            await asyncio.sleep(0)
            await invalidate(*tags, **options)

        room.cache.invalidate_by_tag = slow  # type: ignore[method-assign]

        async def edit() -> None:
            async with maker() as session:
                (await session.get_one(Product, 7)).price = 5
                await session.commit()

        task = asyncio.create_task(edit())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.gather(*after_commit._tasks)
        assert await room.cache.get("k") is None
    await engine.dispose()
    catalogue.close()


def test_a_cancelled_task_still_invalidates_what_it_committed(
    settings: Settings, tmp_path: Path
) -> None:
    """A task cancelled between commit and invalidation, as by a client that hangs up, still invalidates."""
    asyncio.run(cancelled_commit(settings, tmp_path))


# What can be watched, and mistakes


def test_everything_that_makes_sessions_can_be_watched(tmp_path: Path, make_room: Any) -> None:
    """Makers, registries, classes and single sessions can be watched, twice is once, and other makers
    are left alone.
    """
    room = make_room()
    catalogue = Catalogue(tmp_path)
    after_commit = AfterCommit(room)

    class Own(Session):
        pass

    single = Session(catalogue.engine)
    sources: list[Any] = [
        (sessionmaker(catalogue.engine),) * 2,
        (scoped_session(sessionmaker(catalogue.engine)),) * 2,
        (Own, lambda: Own(catalogue.engine)),
        (single, lambda: single),
    ]
    for watched, make in sources:
        after_commit.watch(watched)
        after_commit.watch(watched)
        tags = Tags(room, "by hand")
        session = make()
        after_commit.invalidate_by_tag(session, "by hand")
        session.commit()
        assert tags.invalidated() == {"by hand"}
        session.close()
    tags = Tags(room, "product:7")
    with Session(catalogue.engine) as other:
        reprice(other)
        other.commit()
    assert tags.invalidated() == set()
    catalogue.close()


def test_two_rooms_may_watch_one_session(tmp_path: Path, make_room: Any) -> None:
    """Two rooms that watch one session each get every invalidation, in their own namespaces."""
    rooms = [make_room(namespace=name) for name in ("one", "two")]
    catalogue = Catalogue(tmp_path)
    for room in rooms:
        AfterCommit(room).watch(catalogue.maker)
    tags = [Tags(room, "product:7", "label:3") for room in rooms]
    catalogue.run(reprice)
    assert [one.invalidated() for one in tags] == [{"product:7"}] * 2
    catalogue.close()


def test_sessions_that_share_a_connection_do_not_mix(tmp_path: Path, make_room: Any) -> None:
    """Sessions that share a connection do not mix: one's commit invalidates nothing of another."""
    catalogue, room = Catalogue(tmp_path), make_room()
    after_commit = AfterCommit(room)
    with catalogue.engine.connect() as connection:
        one, other = Session(connection), Session(connection)
        for session in (one, other):
            after_commit.watch(session)
        one.get_one(Product, 7)
        one.rollback()
        other.get_one(Product, 7)
        other.commit()
        tags = Tags(room, "by hand")
        one.get_one(Product, 7)
        after_commit.invalidate_by_tag(one, "by hand")
        one.rollback()
        assert tags.invalidated() == set()
        one.close()
        other.close()
    catalogue.close()


WITHOUT_GREENLET = """
import sys
sys.modules["greenlet"] = None
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from stillroom import AsyncStillroom, NoDispatch, Settings
from stillroom.integrations.sqlalchemy import AfterCommit
room = AsyncStillroom(Settings(redis_url="redis://127.0.0.1:1"), dispatch=NoDispatch())
after_commit = AfterCommit(room)
with Session(create_engine("sqlite://")) as session:
    after_commit.watch(session)
    after_commit.invalidate_by_tag(session, "t")
    session.commit()
assert room.cache.deferred == 1
room._cache_body._invalidator.outbox.numbers.clear()
"""


def test_greenlet_is_needed_for_async_sessions_only() -> None:
    """greenlet is needed for async sessions only, and not for an async room with blocking sessions."""
    command = [sys.executable, "-c", WITHOUT_GREENLET]
    done = run_to_end(command)
    assert done.returncode == 0, done.stderr


def test_an_async_maker_is_watched_alone() -> None:
    """An async maker is watched alone: its inner sessions get a class of their own."""
    room = AsyncStillroom(Settings(redis_url="redis://127.0.0.1:1"), dispatch=NoDispatch())
    maker, other = async_sessionmaker(), async_sessionmaker()
    AfterCommit(room).watch(maker)
    assert maker().sync_session.__class__ is not Session
    assert other().sync_session.__class__ is Session
    registry = async_scoped_session(other, scopefunc=lambda: 1)
    AfterCommit(room).watch(registry)
    assert registry().sync_session.__class__ is not Session
    own = AsyncSession()
    AfterCommit(room).watch(own)
    assert own.sync_session.__class__ is Session


MISTAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    "a slip of the pen": (("product:{idd}",), "idd.* is no field of Product; did you mean id"),
    "no name": (("product:{}",), "is no field"),
    "a stray brace": (("product:{id",), "not a template"),
    "an empty tag": (("",), "1 to 1,024 bytes"),
    "a relationship": (
        ("label:{labels}",),
        "it is no column of Product; its columns: brand_id, id, price",
    ),
    "nothing": ((), "at least one tag"),
    "no parentheses": (
        (Product,),
        r"write @invalidates\(\"product:{id}\"\) above Product, with its tags",
    ),
}


@pytest.mark.parametrize(("given", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_where_the_model_is_marked(given: Any, said: str) -> None:
    """A bad tag is refused where the model is marked and not at the first edit."""
    Base.registry.configure()
    before = Product.__stillroom_tags__  # type: ignore[attr-defined]
    try:
        with pytest.raises((InvalidKey, ValueError), match=said):
            invalidates(*given)(Product)
    finally:
        Product.__stillroom_tags__ = before  # type: ignore[attr-defined]


def test_nothing_of_a_session_is_kept(after_commit: AfterCommit, catalogue: Catalogue) -> None:
    """A session that is dropped in the middle of a transaction leaves nothing behind."""
    if catalogue.kind == "sync":
        session = catalogue.maker()
        reprice(session)
        session.flush()
        assert is_unsettled()
        session.close()
        assert not is_unsettled()
        del session
        gc.collect()
