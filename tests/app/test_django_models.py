"""What a transaction changed in Django's models is invalidated after its commit, and not after a rollback."""

from __future__ import annotations

import asyncio
import logging
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction
from django.db.models import F
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext

from stillroom import InvalidArgument, InvalidKey, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.unsettled import is_unsettled
from stillroom.web.django import after_commit
from stillroom.web.django import room as room_of_django
from tests.app.test_sqlalchemy import ALL, ROW, Tags
from tests.support.crowd import PATIENT
from tests.support.django_project import configure
from tests.support.stepper import MOMENTS, LoadBeside

configure()

from tests.support.djangoshop.models import (  # noqa: E402
    Bottle,
    Brand,
    Cheap,
    Label,
    Note,
    Product,
    Ticket,
)

pytestmark = pytest.mark.any_server
MODELS = [Label, Brand, Product, Bottle, Note, Ticket]


@pytest.fixture(scope="module")
def tables() -> Iterator[None]:
    """Create the models' tables for as long as these tests run."""
    with connection.schema_editor() as schema:
        for model in MODELS:
            schema.create_model(model)
    yield
    with connection.schema_editor() as schema:
        for model in reversed(MODELS):
            schema.delete_model(model)
    connection.close()


@pytest.fixture
def room(server: EmbeddedServer) -> Iterator[Stillroom]:
    """Return the room that Django uses."""
    given = PATIENT | {"redis_url": server.url, "namespace": "django"}
    with override_settings(STILLROOM=given):
        room = room_of_django()
        yield room
        room.close()


@pytest.fixture
def rows(tables: None, room: Stillroom) -> Iterator[None]:
    Brand(id=1, name="acme").save()
    Brand(id=2, name="other").save()
    Label(id=3, text="new").save()
    Product(id=7, price=1, brand_id=1).save()
    Note(id=1, text="a").save()
    yield
    for model in (Product, Label, Brand, Note, Ticket):
        model._default_manager.all().delete()


@pytest.fixture
def tags(room: Stillroom, rows: None) -> Tags:
    return loaded(room)


def loaded(room: Stillroom) -> Tags:
    """Store an entry for each tag."""
    return Tags(room, *ALL, "note:1", "ticket:a", "seat:3")


@contextmanager
def rolled_back() -> Iterator[None]:
    """Run a transaction, or a savepoint, that an error ends."""
    with suppress(ZeroDivisionError), transaction.atomic():
        yield
        raise ZeroDivisionError


def product() -> Any:
    return Product.objects.get(id=7)


def reprice() -> None:
    found = product()
    found.price = 5
    found.save()


def move() -> None:
    found = product()
    found.brand_id = 2
    found.save(update_fields=["brand_id"])


def bulk_move() -> None:
    found = product()
    found.brand_id = 2
    Product.objects.bulk_update([found], ["brand_id"])


def compute() -> None:
    found = product()
    found.price = F("price") + 4
    found.save()


def upsert() -> None:
    fields: Any = {"unique_fields": ["pk"], "update_fields": ["price", "brand_id"]}
    given = (one for one in [Product(id=7, price=5, brand_id=2)])
    Product.objects.bulk_create(given, update_conflicts=True, **fields)


def delete_what_has_moved() -> None:
    found = product()
    Product._base_manager.filter(id=7).update(brand_id=2)
    found.delete()


def label_and_clear() -> None:
    product().labels.add(3)
    product().labels.clear()


NEW = {"products", "product:8", "brand:2", "price:5"}
CHANGES: dict[str, tuple[Callable[[], object], set[str]]] = {
    "a save": (reprice, ROW | {"price:5"}),
    "a save of one column": (move, ROW | {"brand:2"}),
    "a save of an expression": (compute, ROW | {"price:5"}),
    "a save of a row that was never read": (
        lambda: Product(id=7, price=5, brand_id=2).save(),
        ROW | {"brand:2", "price:5"},
    ),
    "a create": (lambda: Product.objects.create(id=8, price=5, brand_id=2), NEW),
    "a delete": (lambda: product().delete(), ROW),
    "a delete of many": (lambda: Product.objects.all().delete(), ROW),
    "a delete of a row that was never read": (lambda: Product(id=7).delete(), ROW),
    "a delete of a row that was read in part": (
        lambda: Product.objects.only("id").get(id=7).delete(),
        ROW,
    ),
    "a delete of a row that has moved": (
        delete_what_has_moved,
        {"products", "product:7", "brand:2", "price:1"},
    ),
    "a delete of many that are read in part": (lambda: Product.objects.only("id").delete(), ROW),
    "a delete by cascade": (lambda: Brand.objects.get(id=1).delete(), ROW),
    "update_or_create": (
        lambda: Product.objects.update_or_create(id=7, defaults={"price": 5}),
        ROW | {"price:5"},
    ),
    "bulk_create": (lambda: Product.objects.bulk_create([Product(id=8, price=5, brand_id=2)]), NEW),
    "bulk_create of a row that is there": (upsert, ROW | {"brand:2", "price:5"}),
    "bulk_update": (bulk_move, ROW | {"brand:2"}),
    "update": (lambda: Product.objects.update(price=5), {"products"}),
    "update that says its tags": (
        lambda: Product.objects.filter(id=7).tagged("product:7").update(price=5),
        {"products", "product:7"},
    ),
    "a relation from one side": (lambda: product().labels.add(3), ROW | {"label:3"}),
    "a relation from the other side": (
        lambda: Label.objects.get(id=3).product_set.add(7),
        ROW | {"label:3"},
    ),
    "a relation that is cleared": (label_and_clear, ROW | {"label:3"}),
    "a derived model": (
        lambda: Bottle(id=8, price=5, brand_id=2).save(),
        NEW,
    ),
    "a row that the database completes": (lambda: Ticket().save(), {"ticket:a", "seat:3"}),
    "a proxy": (lambda: Cheap.objects.get(id=7).delete(), ROW),
    "a model without columns in its tags": (lambda: Note.objects.get(id=1).save(), {"note:1"}),
    "by hand": (lambda: after_commit.invalidate_by_tag("by hand"), {"by hand"}),
    "a read": (product, set()),
}
change_and_tags = pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)


@change_and_tags
@pytest.mark.parametrize("durable", [False, True])
def test_a_commit_invalidates_the_tags_of_what_changed(
    tags: Tags, change: Callable[[], object], expected: set[str], durable: bool
) -> None:
    """Inside the transaction nothing is invalid; after its commit the tags of what changed are, and no others."""
    with transaction.atomic(durable=durable):
        change()
        assert tags.invalidated() == set()
    assert tags.invalidated() == expected


@change_and_tags
def test_outside_a_transaction_it_happens_at_once(
    tags: Tags, change: Callable[[], object], expected: set[str]
) -> None:
    """Outside a transaction a change is invalidated at once, because Django commits each statement then."""
    change()
    assert tags.invalidated() == expected


@change_and_tags
def test_what_is_loaded_right_before_a_write_is_invalidated_by_it(
    tags: Tags, room: Stillroom, change: Callable[[], object], expected: set[str]
) -> None:
    """Outside a transaction, too, nothing is invalidated before the write, for readers would load the old rows."""

    def load_before(execute: Any, sql: str, *rest: Any) -> Any:
        if sql.startswith(("INSERT", "UPDATE", "DELETE")):
            Context().run(loaded, room)  # as another thread does it
        return execute(sql, *rest)

    with connection.execute_wrapper(load_before):
        change()
    assert tags.invalidated() == expected


@change_and_tags
def test_a_rollback_invalidates_nothing(
    tags: Tags, change: Callable[[], object], expected: set[str]
) -> None:
    """The error that rolls a transaction back also drops what it would have invalidated."""
    with rolled_back():
        change()
    assert tags.invalidated() == set()
    assert not is_unsettled()


def test_a_rolled_back_savepoint_drops_what_was_done_inside_it(tags: Tags) -> None:
    """A rolled back savepoint drops its invalidations; those before, after and in a kept savepoint happen."""
    with transaction.atomic():
        after_commit.invalidate_by_tag("brand:1")
        with rolled_back():
            after_commit.invalidate_by_tag("brand:2")
            with transaction.atomic():
                after_commit.invalidate_by_tag("label:3")
        with transaction.atomic():
            after_commit.invalidate_by_tag("price:5")
        after_commit.invalidate_by_tag("by hand")
    assert tags.invalidated() == {"brand:1", "price:5", "by hand"}


def test_keys_globs_and_soft_tags_wait_too(tags: Tags, room: Stillroom) -> None:
    """Keys, globs and soft tags, like all tags, can be invalidated after the commit."""
    with transaction.atomic():
        after_commit.invalidate("of price:1")
        after_commit.invalidate_by_pattern("of brand:*")
        after_commit.invalidate_by_tag("product:7", soft=True)
        assert tags.invalidated() == set()
    assert tags.invalidated() == {"price:1", "brand:1", "brand:2"}
    entry = room.cache.get_entry("of product:7")
    assert entry is not None
    assert entry.freshness.value == "stale"


def test_an_async_view_invalidates_after_its_commit(tags: Tags) -> None:
    """An async view's changes, which Django makes in a thread, are invalidated when they return."""

    async def view() -> None:
        found = await Product.objects.aget(id=7)
        found.price = 5
        await found.asave()
        await after_commit.ainvalidate_by_tag("by hand")

    asyncio.run(view())
    assert tags.invalidated() == ROW | {"price:5", "by hand"}


@pytest.mark.parametrize("moments", MOMENTS, ids=str)
@pytest.mark.parametrize("is_committed", [True, False], ids=["commit", "rollback"])
def test_no_load_leaves_the_old_value_behind(
    rows: None, room: Stillroom, make_room: Any, moments: tuple[int, int, int], is_committed: bool
) -> None:
    """Wherever a load begins, reads and stores beside a transaction, later readers see what is committed.

    0: before the change. 1: before the commit. 2: between commit and invalidation. 3: after it.
    """
    reader: Stillroom = make_room(namespace="django")

    @reader.cache.cached("price:{id}", ttl=60, tags=["product:{id}"])
    def price(id: int) -> int:
        other = connection.copy()
        with other.cursor() as cursor:
            cursor.execute("SELECT price FROM djangoshop_product WHERE id = %s", [id])
            found: int = cursor.fetchone()[0]
        other.close()
        return found

    at = LoadBeside(reader, price.loader, (7,), moments).at
    at(0)
    with transaction.atomic() if is_committed else rolled_back():
        transaction.on_commit(lambda: at(2))
        reprice()
        at(1)
    if not is_committed:
        at(2)
    at(3)
    assert price(7) == (5 if is_committed else 1)


def test_a_load_inside_a_transaction_stores_nothing_that_may_be_rolled_back(
    rows: None, room: Stillroom
) -> None:
    """A loader that reads the uncommitted row gives it to its caller, and to nobody else."""

    def load() -> int:
        return int(product().price)

    with rolled_back():
        assert room.cache.get_or_set("clean", load) == 1
        reprice()
        assert room.cache.get_or_set("dirty", load) == 5
    assert room.cache.get_many(["clean", "dirty"]) == {"clean": 1}
    assert room.cache.get_or_set("dirty", load) == 1
    assert room.cache.get("dirty") == 1


def test_a_test_case_of_django_caches_as_ever(rows: None, room: Stillroom) -> None:
    """In Django's TestCase, whose transaction never commits, the cache works, and captured callbacks invalidate."""
    seen: list[Any] = []

    def look() -> None:
        seen.append(room.cache.get_or_set("k", lambda: len(seen), tags=["product:7"]))

    class InATest(TestCase):
        def test_it(self) -> None:
            reprice()
            look()
            look()
            for edit in (reprice, reprice, lambda: product().delete()):
                with self.captureOnCommitCallbacks(execute=True):
                    edit()
                look()
                with transaction.atomic():  # as around a view with ATOMIC_REQUESTS
                    look()

    result = unittest.TestResult()
    unittest.TestSuite([InATest("test_it")]).run(result)
    assert not result.errors, result.errors
    assert seen == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_transaction_in_a_test_case_of_django_is_one(rows: None, room: Stillroom) -> None:
    """In a TestCase nothing is stored of what an open transaction inside of it has changed, and all else is."""
    seen: list[Any] = []

    def load() -> int:
        return int(product().price)

    class InATest(TestCase):
        def test_it(self) -> None:
            reprice()
            with transaction.atomic():
                seen.append(room.cache.get_or_set("before", load))
                reprice()
                seen.append(room.cache.get_or_set("within", load))
            with transaction.atomic():
                seen.append(room.cache.get_or_set("after", load))
            seen.append(room.cache.get_many(["before", "within", "after"]))

    result = unittest.TestResult()
    unittest.TestSuite([InATest("test_it")]).run(result)
    assert not result.errors, result.errors
    assert seen == [5, 5, 5, {"before": 5, "after": 5}]


def test_an_edit_is_no_error_while_redis_is_away(
    rows: None, own_server: EmbeddedServer, room: Stillroom, usual_deadlines: None
) -> None:
    """An edit while Redis is away is saved, and its invalidation waits in this process."""
    given = {"redis_url": own_server.url, "namespace": "away", "session_peppers": "p" * 40}
    with override_settings(STILLROOM=given):
        away = room_of_django()
        away.cache.set("k", 1, ttl=60, tags=["product:7"])
        own_server.freeze()
        with transaction.atomic():
            reprice()
        assert product().price == 5
        assert away.cache.deferred
        own_server.thaw()
        away.close()


def test_other_callbacks_of_the_commit_run_in_any_case(
    rows: None, room: Stillroom, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing invalidation is logged, and the other callbacks of the commit run."""
    called: list[bool] = []

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(room.cache, "invalidate_by_tag", broken)
    with transaction.atomic():
        reprice()
        transaction.on_commit(lambda: called.append(True))
    assert called == [True]
    assert "after a commit" in caplog.text


class Replicas:
    """A router that reads from replicas; here they can't be reached."""

    def db_for_read(self, *_: Any, **__: Any) -> str:
        return "replica"


def test_bulk_update_asks_no_replica_and_waits_for_the_commit_of_its_own_database(
    tags: Tags,
) -> None:
    """Where a router reads from replicas, bulk_update looks at, and waits for, the database that it writes to."""
    moved = Product(id=7, price=5, brand_id=2)
    with override_settings(DATABASE_ROUTERS=[Replicas()]), transaction.atomic():
        Product.objects.bulk_update([moved], ["brand_id", "price"])
        assert tags.invalidated() == set()
    assert tags.invalidated() == ROW | {"brand:2", "price:5"}


def test_update_without_tags_is_logged(
    rows: None, room: Stillroom, caplog: pytest.LogCaptureFixture
) -> None:
    """An update without tags is logged with the invalidated tags and how to say others; one with tags
    logs nothing.
    """
    with caplog.at_level(logging.WARNING):
        Product.objects.bulk_update([product()], ["price"])
        Product.objects.tagged("product:7").update(price=5)
        assert not caplog.records
        Product.objects.update(price=5)
    assert "only products are invalidated" in caplog.text


def test_models_that_are_not_marked_are_left_alone(rows: None) -> None:
    """Models that are not marked keep their fast deletes, because nobody listens to them."""
    from django.db.models import signals

    assert not signals.pre_delete.has_listeners(Brand)
    assert not signals.pre_save.has_listeners(Brand)
    assert signals.pre_delete.has_listeners(Product)


@pytest.mark.parametrize(
    ("tag", "said"),
    [("brand:{brand}", "did you mean brand_id"), ("product:{idd}", "did you mean id")],
)
def test_a_mistake_is_told_where_the_model_is_marked(tag: str, said: str) -> None:
    """A relation, or a misspelt column, is refused where the model is marked, with the probable name."""
    with pytest.raises(InvalidKey, match=said):
        after_commit.invalidates(tag)(Product)
    with pytest.raises(InvalidArgument, match=r"write @invalidates\(.*\) above Product"):
        after_commit.invalidates(Product)  # type: ignore[arg-type]


def test_a_row_whose_key_the_database_makes_is_not_looked_for(tags: Tags) -> None:
    """A new row is not looked for by a key that it does not have yet: PostgreSQL has no DEFAULT in a condition."""
    with CaptureQueriesContext(connection) as asked:
        Ticket().save()
    assert not [query for query in asked.captured_queries if query["sql"].startswith("SELECT")]


def test_a_failed_statement_rolls_back(tags: Tags) -> None:
    """After a database error that rolls back, the collected invalidations are dropped."""
    with suppress(DatabaseError), transaction.atomic(), connection.cursor() as cursor:
        reprice()
        cursor.execute("SELECT nonsense")
    assert tags.invalidated() == set()
