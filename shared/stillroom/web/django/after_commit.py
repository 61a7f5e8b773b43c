"""Django's models: invalidate what a transaction changed after it has committed, and nothing after a rollback.

    @invalidates("products", "product:{id}", "brand:{brand_id}")
    class Product(models.Model):
        objects = InvalidatingManager()      # for bulk_create, bulk_update and update

    after_commit.invalidate_by_tag("prices")  # by hand, beside raw SQL

All of it is `transaction.on_commit` with `robust=True`: a rolled back savepoint drops what was asked inside it,
`atomic(durable=True)` changes nothing, and outside a transaction it happens at once. Redis away: the invalidations
are deferred (see `Cache.invalidate`), and the edit raises nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import DEFAULT_DB_ALIAS, connections, models, transaction
from django.db.models import signals

from stillroom.integrations.model_tags import (
    ATTRIBUTE,
    Before,
    ModelTags,
    TagSpec,
    refuse_bare,
    tags_of_model,
)
from stillroom.integrations.pending import Pending, deliver
from stillroom.unsettled import watch
from stillroom.web.django import room

log = logging.getLogger("stillroom.web")

M = TypeVar("M", bound=type[models.Model])

FORMER = "_stillroom_former"  # of a row that is being saved: the tags that it had


def invalidates(*tags: TagSpec) -> Callable[[M], M]:
    """Say which tags a change to a row of this model invalidates: its save, its delete, its many-to-many relations.

    A tag is a text, a template of the model's columns (`product:{id}`, `brand:{brand_id}`), or a function of the
    row that returns tags. A row that changes invalidates its tags as it was and as it is; where they depend on more
    than its key, its save or delete asks the database for the row first. Raises InvalidKey for a name that is no
    column.
    A model derived from this one has the same tags unless it says its own.
    """

    refuse_bare(tags)

    def mark(model: M) -> M:
        columns = [field.attname for field in model._meta.concrete_fields]
        setattr(model, ATTRIBUTE, ModelTags(model.__name__, tags, [*columns, "pk"]))
        _listen_to(model)
        return model

    return mark


def invalidate(*keys: str, using: str | None = None) -> None:
    """Invalidate these keys after the commit. `using` is the database's alias. Raises InvalidKey."""
    room().cache.loaders.refuse_unfilled(*keys)
    _after_commit(using, lambda pending: pending.add_keys(keys))


def invalidate_by_tag(*tags: str, soft: bool = False, using: str | None = None) -> None:
    """Invalidate these tags after the commit. `soft`: see Cache.invalidate_by_tag. Raises InvalidKey."""
    room().cache.loaders.refuse_unfilled(*tags)
    _after_commit(using, lambda pending: pending.add_tags(tags, soft=soft))


def invalidate_by_pattern(glob: str, *, using: str | None = None) -> None:
    """Invalidate the keys that this glob matches after the commit. Raises InvalidKey."""
    room().cache.loaders.refuse_unfilled(glob)
    _after_commit(using, lambda pending: pending.add_glob(glob))


ainvalidate = sync_to_async(invalidate)
ainvalidate_by_tag = sync_to_async(invalidate_by_tag)
ainvalidate_by_pattern = sync_to_async(invalidate_by_pattern)


class InvalidatingQuerySet(models.QuerySet):
    """A QuerySet whose bulk methods invalidate, too.

    `bulk_create` and `bulk_update` invalidate the tags of each row; `bulk_create(update_conflicts=True)` those of
    rows that are there where `unique_fields` names the columns by which they are found. `update` knows no rows: it
    invalidates the model's constant tags, and what `tagged` says.
    """

    _said: tuple[str, ...] | None = None

    def tagged(self, *tags: str) -> Any:
        """Say which tags an `update` invalidates: `Product.objects.tagged("product:7").filter(…).update(…)`."""
        room().cache.loaders.refuse_unfilled(*tags)
        clone = self._chain()
        clone._said = tags
        return clone

    def bulk_create(self, objs: Iterable[Any], *args: Any, **options: Any) -> list[Any]:
        rows = list(objs)
        former = self._stored_tags(options.get("unique_fields") or (), rows)
        created: list[Any] = super().bulk_create(rows, *args, **options)
        _note_tags([*former, *self._tags_of(created)], self.db)
        return created

    def bulk_update(self, objs: Iterable[Any], *args: Any, **options: Any) -> int:
        rows = list(objs)
        former = self._stored_tags(["pk"], rows)
        count: int = super(InvalidatingQuerySet, self.tagged()).bulk_update(rows, *args, **options)
        _note_tags([*former, *self._tags_of(rows)], self.db)
        return count

    def update(self, **values: Any) -> int:
        count: int = super().update(**values)
        tags = tags_of_model(self.model)
        said = self._said if self._said is not None else ()
        _note_tags([*(tags.constant if tags else ()), *said], self.db)
        if tags is not None and tags.needs_row and self._said is None:
            log.warning(
                "update() changes %s rows and does not name them: %s invalidated; "
                "name the others by .tagged(…)",
                tags.model,
                tags.constant_words,
            )
        return count

    def _clone(self) -> Any:
        clone = super()._clone()
        clone._said = self._said
        return clone

    def _stored_tags(self, columns: Iterable[str], rows: Sequence[Any]) -> list[str]:
        """Return the tags that the database has for the rows that are like these in these columns."""
        self._for_write = True  # so `db` is where they are written, and not a replica
        tags = tags_of_model(self.model)
        if tags is None or not columns or not _columns_needed(tags, self.model):
            return []
        same = {f"{name}__in": [getattr(row, name) for row in rows] for name in columns}
        return self._tags_of(self.model._base_manager.using(self.db).filter(**same))

    def _tags_of(self, rows: Iterable[Any]) -> list[str]:
        tags = tags_of_model(self.model)
        return [] if tags is None else [tag for row in rows for tag in tags.of(row)]

    bulk_create.alters_data = bulk_update.alters_data = update.alters_data = True  # type: ignore[attr-defined]


InvalidatingManager = models.Manager.from_queryset(InvalidatingQuerySet, "InvalidatingManager")


# Invalidations that wait for the commit


class Delivery:
    """Collect what one savepoint level of a transaction makes untrue. `run` is its on_commit callback."""

    def __init__(self) -> None:
        self.pending = Pending()

    def run(self) -> None:
        deliver(room().cache, self.pending)


class Transaction:
    """Tell whether a connection's transaction has changed something that is not committed. See unsettled.Work."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def is_settled(self) -> bool:
        """Return whether no transaction is open that has changed something.

        A test case's own ones do not count, nor what was changed in them: they are never committed.
        """
        blocks, entries = self._connection.atomic_blocks, self._connection.run_on_commit
        own = sum(not block._from_testcase for block in blocks)
        if not own:
            return True
        if own < len(blocks):
            opened = self._connection.savepoint_ids[-own]
            entries = [entry for entry in entries if opened in entry[0]]
        return not any(_delivery_of(entry) for entry in entries)

    def is_over(self) -> bool:
        """Return whether it is settled: its next change is watched anew."""
        return self.is_settled()


def _after_commit(using: str | None, add: Callable[[Pending], None]) -> None:
    """Add to what this savepoint level collects; outside a transaction it is delivered at once.

    In a test case each change has a callback of its own: captureOnCommitCallbacks calls those that are new since it
    began, and leaves them where they are.
    """
    connection = connections[using or DEFAULT_DB_ALIAS]
    level = set(connection.savepoint_ids)
    is_a_test = any(block._from_testcase for block in connection.atomic_blocks)
    for entry in () if is_a_test else reversed(connection.run_on_commit):
        known = _delivery_of(entry)
        if known is not None and entry[0] == level:
            add(known.pending)
            return
    delivery = Delivery()
    add(delivery.pending)
    transaction.on_commit(delivery.run, using=using, robust=True)
    if connection.in_atomic_block:
        if not hasattr(connection, "_stillroom"):
            connection._stillroom = Transaction(connection)
        watch(connection._stillroom)


def _delivery_of(entry: tuple[Any, ...]) -> Delivery | None:
    """Return the delivery of an on_commit entry: (savepoint ids, function, robust)."""
    owner = getattr(entry[1], "__self__", None)
    return owner if isinstance(owner, Delivery) else None


def _note_tags(tags: Iterable[str], using: str | None) -> None:
    if noted := list(tags):
        _after_commit(using, lambda pending: pending.add_tags(noted))


# Rows


def _listen_to(model: type[models.Model]) -> None:
    """Listen to this model alone: a listener to the deletes of all models would slow them down."""
    for signal, receiver in (
        (signals.pre_save, _about_to_save),
        (signals.post_save, _saved),
        (signals.pre_delete, _about_to_delete),
    ):
        signal.connect(receiver, sender=model, dispatch_uid=("stillroom", id(model)))
    signals.m2m_changed.connect(_related, dispatch_uid="stillroom")


def _prepared(sender: type[models.Model], **_: Any) -> None:
    if tags_of_model(sender) is not None:
        _listen_to(sender)


# For models derived from a marked one.
signals.class_prepared.connect(_prepared, dispatch_uid="stillroom")


def _about_to_save(sender: type[models.Model], instance: Any, using: str, **_: Any) -> None:
    """Keep the tags of the row as the database has it until it is saved.

    They are unknown then. Outside a transaction they would be invalidated now, and readers load the old row again.
    """
    columns = _columns_needed(_tags_of(sender), sender)
    is_stored = bool(columns) and not _has_new_key(instance)
    former = _stored_tags(sender, instance, using, columns) if is_stored else []
    setattr(instance, FORMER, former)


def _saved(sender: type[models.Model], instance: Any, using: str, **_: Any) -> None:
    tags, former = _tags_of(sender), vars(instance).pop(FORMER, ())
    saved = tags.of(Before(instance, _computed(sender, instance, using, tags)))
    _note_tags([*former, *saved], using)


def _about_to_delete(
    sender: type[models.Model], instance: Any, using: str, origin: Any = None, **_: Any
) -> None:
    """Note the tags of the row as the database has it. Rows of a query or a cascade were read for the delete."""
    tags = _tags_of(sender)
    columns = _columns_needed(tags, sender)
    is_old = bool(columns) and instance is origin
    found = _stored_tags(sender, instance, using, columns) if is_old else tags.of(instance)
    _note_tags(found, using)


def _has_new_key(instance: Any) -> bool:
    """Return whether a row has its key from its default, or is to have it from the database."""
    key = instance.pk
    if key is None or hasattr(key, "resolve_expression"):  # the latter: of db_default
        return True
    return bool(instance._state.adding and instance._meta.pk.has_default())


def _stored_tags(
    model: type[models.Model], instance: Any, using: str, columns: Iterable[str]
) -> list[str]:
    """Return the tags of a row as the database has it; none where it has none."""
    tags = _tags_of(model)
    rows = model._base_manager.using(using).filter(pk=instance.pk).values(*columns)
    return [tag for row in rows for tag in tags.of(Before(instance, row))]


def _related(
    sender: type[models.Model],
    instance: Any,
    action: str,
    reverse: bool,
    model: type[models.Model],
    pk_set: set[Any] | None,
    using: str,
    **_: Any,
) -> None:
    """Note the tags of the rows on both sides of a many-to-many relation."""
    if action not in ("post_add", "post_remove", "pre_clear"):
        return
    if (own := tags_of_model(type(instance))) is not None:
        _note_tags(own.of(instance), using)
    if (theirs := tags_of_model(model)) is not None:
        keys = _cleared(sender, instance, using, reverse) if pk_set is None else pk_set
        rows = model._base_manager.using(using).filter(pk__in=keys)
        _note_tags((tag for row in rows for tag in theirs.of(row)), using)


def _cleared(
    through: type[models.Model],
    instance: Any,
    using: str,
    reverse: bool,
) -> list[Any]:
    """Return the keys of the rows that `clear()` is about to part from this one."""
    ends: list[Any] = [field for field in through._meta.fields if field.many_to_one]
    here, there = (ends[1], ends[0]) if reverse else (ends[0], ends[1])
    links = through._base_manager.using(using).filter(**{here.name: instance})
    return list(links.values_list(there.attname, flat=True))


def _tags_of(model: type[models.Model]) -> ModelTags:
    tags = tags_of_model(model)
    assert tags is not None, f"{model.__name__} is not marked"
    return tags


def _columns_needed(tags: ModelTags, model: type[models.Model]) -> list[str]:
    """Return the columns that must be read to know a row's tags; none where its key says them all."""
    key = model._meta.pk
    columns = [field.attname for field in model._meta.concrete_fields]
    if tags.has_functions:
        return columns
    others = tags.fields - {"pk", key.attname if key is not None else "pk"}
    return [name for name in columns if name in others]


def _computed(
    model: type[models.Model], instance: Any, using: str, tags: ModelTags
) -> Mapping[str, Any]:
    """Return the columns that the database has computed (`F("price") + 1`), as it has them now."""
    columns = _columns_needed(tags, model)
    unknown = [n for n in columns if hasattr(instance.__dict__.get(n), "resolve_expression")]
    if not unknown:
        return {}
    row: dict[str, Any] = (
        model._base_manager.using(using).filter(pk=instance.pk).values(*unknown).get()
    )
    return row
