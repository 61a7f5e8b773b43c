"""SQLAlchemy: invalidate what a transaction changed after it has committed, and nothing after a rollback.

@invalidates("products", "product:{id}", "brand:{brand_id}")
class Product(Base): …

after_commit = AfterCommit(room)
after_commit.watch(Session)          # a sessionmaker, an async_sessionmaker, a scoped_session, a Session class

session.get(Product, 7).price = 5
session.commit()                     # the tags of the row as it was and as it is are invalidated
"""

from __future__ import annotations

import asyncio
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy import event, select
from sqlalchemy import inspect as inspected
from sqlalchemy.engine import Connection
from sqlalchemy.orm import (
    ORMExecuteState,
    QueryableAttribute,
    Session,
    SessionTransaction,
    object_session,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.orm.attributes import get_history
from sqlalchemy.orm.base import PassiveFlag
from sqlalchemy.util.concurrency import await_only, in_greenlet

from stillroom.errors import InvalidArgument, InvalidKey, in_code
from stillroom.integrations.model_tags import (
    ATTRIBUTE,
    Before,
    ModelTags,
    TagSpec,
    refuse_bare,
    tags_of_model,
)
from stillroom.integrations.pending import Pending, blocking_cache, deliver, deliver_async
from stillroom.misuse import explained
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.unsettled import watch

log = logging.getLogger("stillroom.integrations")

M = TypeVar("M", bound=type)

UNLOADED_STAYS = PassiveFlag.PASSIVE_NO_INITIALIZE  # a look at the history loads nothing
TAGS_OPTION = "stillroom_tags"  # the execution option of a statement that says its own tags

if TYPE_CHECKING:  # importing it takes greenlet, which only async sessions need
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

    # The two classes that SQLAlchemy calls a session.
    AnySession: TypeAlias = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]
    Watchable: TypeAlias = (
        type[Session | AsyncSession]
        | sessionmaker[Any]
        | async_sessionmaker[Any]
        | scoped_session[Any]
        | async_scoped_session[Any]
        | Session
        | AsyncSession
    )


def invalidates(*tags: TagSpec) -> Callable[[M], M]:
    """Say which tags a change to a row of this model invalidates.

    A tag is a text, a template of the model's columns (`product:{id}`), or a function of the row that returns
    tags; its argument has the columns as attributes. A row that changes invalidates its tags as it was and as it
    is, so a product that moves to another brand invalidates both brands. Raises InvalidKey for a name that is no
    column. A class derived from the model has the same tags unless it says its own.
    """

    refuse_bare(tags)

    def mark(model: M) -> M:
        found = ModelTags(model.__name__, tags, _attributes_of(model))
        setattr(model, ATTRIBUTE, found)
        mapper: Any = inspected(model)
        if mapper.configured:
            _refuse_relationships(mapper, found)
        else:
            event.listen(model, "mapper_configured", lambda m, _: _refuse_relationships(m, found))
        event.listen(model, "after_insert", _inserted, propagate=True)
        event.listen(model, "before_update", _about_to_update, propagate=True)
        event.listen(model, "before_delete", _about_to_delete, propagate=True)
        return model

    return mark


class AfterCommit:
    """Invalidates after the commit of the sessions it watches.

    Flushes tell which rows of marked models changed; a change of a many-to-many relation counts for both sides.
    `invalidate`, `invalidate_by_tag` and `invalidate_by_pattern` add more by hand. A rolled back savepoint drops
    what was added inside it.

    A statement (`update(Product)…`) tells no rows: give it `execution_options(stillroom_tags=["product:7"])`.
    Without them the model's constant tags are invalidated. Core statements on tables, SQL text, and
    `bulk_save_objects`, `bulk_insert_mappings` and `bulk_update_mappings` tell nothing at all: call
    `invalidate_by_tag(session, …)` beside them.

    `room` may be a Stillroom or an AsyncStillroom, with any kind of session. It is true for every reader when
    `session.commit()` returns. Redis away: the invalidations are deferred, and the commit raises nothing.
    A commit whose outcome is unknown (the connection was lost, the task was cancelled) invalidates as well.
    """

    def __init__(self, room: Stillroom | AsyncStillroom) -> None:
        self._room = room
        self._blocking = blocking_cache(room)
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, sessions: Watchable) -> None:
        """Watch all sessions of this maker, class or registry, or this one. Watching twice changes nothing.

        Raises InvalidArgument for anything else, such as an engine.
        """
        target = _target(sessions)
        is_class = isinstance(target, type) and issubclass(target, Session)
        if not is_class and not isinstance(target, sessionmaker | scoped_session | Session):
            raise InvalidArgument(
                f"watch({in_code(sessions):.100}): a sessionmaker, a scoped_session, a Session or its class"
            )
        for name, listener in (
            ("after_transaction_create", self._created),
            ("after_begin", self._began),
            ("before_flush", self._about_to_flush),
            ("after_flush", self._flushed),
            ("do_orm_execute", self._executes),
            ("after_commit", self._committed),
            ("after_transaction_end", self._ended),
        ):
            if not event.contains(target, name, listener):
                event.listen(target, name, listener)

    def invalidate(self, session: AnySession, *keys: str) -> None:
        """Invalidate these keys after the commit of the session's transaction. Raises InvalidKey."""
        self._blocking.loaders.refuse_unfilled(*keys)
        self._pending_of(session).add_keys(keys)

    @explained
    def invalidate_by_tag(self, session: AnySession, *tags: str, soft: bool = False) -> None:
        """Invalidate these tags after the commit. `soft`: see Cache.invalidate_by_tag. Raises InvalidKey."""
        self._blocking.loaders.refuse_unfilled(*tags)
        self._pending_of(session).add_tags(tags, soft=soft)

    def invalidate_by_pattern(self, session: AnySession, glob: str) -> None:
        """Invalidate the keys that this glob matches after the commit. Raises InvalidKey."""
        self._blocking.loaders.refuse_unfilled(glob)
        self._pending_of(session).add_glob(glob)

    def _pending_of(self, session: AnySession) -> Pending:
        inner = _sync_session(session)
        changes = self._changes_of(inner)
        watch(changes)
        return changes.frame(_innermost(inner))

    # Events of SQLAlchemy's sessions

    def _created(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            watch(self._changes_of(session))

    def _began(
        self, session: Session, transaction: SessionTransaction, connection: Connection
    ) -> None:
        changes = self._changes_of(session)
        watch(changes)
        if transaction.parent is None:
            changes.commit_is_sent = False  # another session's, on the same connection
        _watch_commit_of(connection, changes)

    def _about_to_flush(self, session: Session, context: Any, instances: Any) -> None:
        """Note the rows on both sides of a changed many-to-many relation, whose own columns did not change."""
        changes = self._changes_of(session)
        watch(changes)  # another task may have begun its transaction: wait_for(session.get(…))
        for row in [*session.new, *session.dirty, *session.deleted]:
            if relatives := _changed_relatives(row):
                changes.touched += [row, *relatives]

    def _flushed(self, session: Session, context: Any) -> None:
        """Note the tags of changed rows as they are now, with the keys that the database gave them."""
        changes = self._changes_of(session)
        touched, changes.touched = changes.touched, []
        if touched:
            frame = changes.frame(_innermost(session))
            for row in touched:
                tags = tags_of_model(type(row))
                if tags is not None and row not in session.deleted:
                    frame.add_tags(tags.of(row))

    def _executes(self, state: ORMExecuteState) -> None:
        """Note the tags of a statement that changes rows of a model."""
        if state.is_select:
            return
        given = state.execution_options.get(TAGS_OPTION)
        mapper = state.bind_mapper
        tags = tags_of_model(mapper.class_) if mapper is not None else None
        if given is None and tags is None:
            return
        frame = self._pending_of(state.session)
        if given is not None:
            said = [given] if isinstance(given, str) else list(given)
            self._blocking.loaders.refuse_unfilled(*said)
            frame.add_tags(said)
        elif tags is not None:
            frame.add_tags(tags.constant)
            if tags.needs_row:
                log.warning(
                    "a statement changes %s rows and does not name them: %s invalidated; "
                    "give it execution_options(stillroom_tags=[…])",
                    tags.model,
                    tags.constant_words,
                )

    def _committed(self, session: Session) -> None:
        changes = self._changes_of(session)
        nested = session.get_nested_transaction()
        if nested is not None:  # a savepoint was released: its parent decides
            changes.release(nested)
        else:
            self._deliver(changes.take_all())

    def _ended(self, session: Session, transaction: SessionTransaction) -> None:
        """Drop the invalidations that were rolled back.

        After a COMMIT without an answer they are made all the same.
        """
        changes = self._changes_of(session)
        if transaction.parent is not None:
            changes.drop(transaction)
            changes.touched.clear()  # of a flush that failed: its rows are as they were, or nobody's
        elif changes.commit_is_sent:
            self._deliver(changes.take_all())
        else:
            changes.drop_all()

    def _changes_of(self, session: Session) -> Changes:
        """Return what this session's transactions invalidate in this room; other rooms may watch it, too."""
        watchers: dict[int, Changes] = session.info.setdefault(_KEY, {})
        known = watchers.get(id(self))
        return known or watchers.setdefault(id(self), Changes(session))

    # Telling the cache

    def _deliver(self, pending: Pending) -> None:
        if not pending:
            return
        if isinstance(self._room, AsyncStillroom) and _can_await():
            await_only(self._deliver_in_task(self._room, pending))
        else:
            deliver(self._blocking, pending)

    async def _deliver_in_task(self, room: AsyncStillroom, pending: Pending) -> None:
        """Deliver in a task of its own, because a cancelled caller does not undo its commit."""
        task = asyncio.create_task(deliver_async(room.cache, pending))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)


class Changes:
    """Collect what one session's open transactions make untrue: a frame for the root and for each savepoint."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._frames: dict[SessionTransaction | None, Pending] = {}
        self.touched: list[Any] = []  # rows of the flush that is under way
        self.commit_is_sent = False

    def frame(self, transaction: SessionTransaction | None) -> Pending:
        return self._frames.setdefault(transaction, Pending())

    def release(self, nested: SessionTransaction) -> None:
        """Hand what a savepoint collected to the transaction around it."""
        if collected := self._frames.pop(nested, None):
            self.frame(_decider(nested.parent)).take_in(collected)

    def drop(self, transaction: SessionTransaction) -> None:
        self._frames.pop(transaction, None)

    def take_all(self) -> Pending:
        """Return everything that was collected, and begin anew."""
        whole = Pending()
        for frame in self._frames.values():
            whole.take_in(frame)
        self.drop_all()
        return whole

    def drop_all(self) -> None:
        self._frames.clear()
        self.touched.clear()
        self.commit_is_sent = False

    def is_settled(self) -> bool:
        """Return whether the session has neither uncommitted nor unflushed changes. See unsettled.Work."""
        session = self._session()
        if any(self._frames.values()):
            return False
        return session is None or not (session.new or session.deleted or session.dirty)

    def is_over(self) -> bool:
        """Return whether it is settled and no transaction is open, which may change something at any time."""
        session = self._session()
        return self.is_settled() and (session is None or not session.in_transaction())


_KEY = "stillroom"  # in session.info: watcher → its Changes

# Connections in a watched session's transaction, so that it is known when COMMIT is sent.
_committing: weakref.WeakKeyDictionary[Connection, list[Changes]] = weakref.WeakKeyDictionary()


def _watch_commit_of(connection: Connection, changes: Changes) -> None:
    engine = connection.engine
    if not event.contains(engine, "commit", _commit_is_sent):
        event.listen(engine, "commit", _commit_is_sent)
    watching = _committing.setdefault(connection, [])
    if not any(one is changes for one in watching):
        watching.append(changes)


def _commit_is_sent(connection: Connection) -> None:
    for changes in _committing.get(connection, ()):
        changes.commit_is_sent = True


def _can_await() -> bool:
    """Return whether this is the inside of an AsyncSession. Without greenlet there is none."""
    try:
        return in_greenlet()
    except Exception:
        return False


def _innermost(session: Session) -> SessionTransaction | None:
    """Return the savepoint or root transaction that decides over what happens now."""
    return session.get_nested_transaction() or session.get_transaction()


def _decider(transaction: SessionTransaction | None) -> SessionTransaction | None:
    while transaction is not None and transaction.parent is not None and not transaction.nested:
        transaction = transaction.parent
    return transaction


# Rows. These listeners belong to the models; only a watched session has Changes to write to.


def _inserted(_: Any, __: Any, row: Any) -> None:
    for changes in _watched(row):
        changes.touched.append(row)


def _about_to_update(_: Any, connection: Connection, row: Any) -> None:
    session = object_session(row)
    if session is not None and session.is_modified(row, include_collections=False):
        _note_former(connection, row)
        for changes in _watched(row):
            changes.touched.append(row)


def _about_to_delete(_: Any, connection: Connection, row: Any) -> None:
    _note_former(connection, row)


def _note_former(connection: Connection, row: Any) -> None:
    """Note the tags of a row as it was, which are unknown after the flush."""
    session, tags = object_session(row), tags_of_model(type(row))
    watching = _watched(row)
    if session is not None and watching and tags is not None:
        fields = [column.key for column in _mapper_of(row).column_attrs]
        if not tags.has_functions:  # the columns that a function looks at are unknown
            fields = [name for name in fields if name in tags.fields]
        former = _former(connection, row, fields)
        noted = tags.of(Before(row, former))
        for changes in watching:
            changes.frame(_innermost(session)).add_tags(noted)


def _watched(row: Any) -> list[Changes]:
    session = object_session(row)
    return [] if session is None else list(session.info.get(_KEY, {}).values())


def _former(connection: Connection, row: Any, fields: Iterable[str]) -> Mapping[str, Any]:
    """Return the former values of these columns, asked of the database where the session does not know them.

    With `expire_on_commit=False` it keeps what it read before its last commit, and others may have changed that.
    """
    state: Any = inspected(row)
    mapper, session = state.mapper, state.session
    key = list(zip(mapper.primary_key, state.identity or (), strict=False))
    former = {mapper.get_property_by_column(column).key: value for column, value in key}
    knows = session is None or session.expire_on_commit
    unknown = []
    for name in fields:
        if name in former:
            continue
        history = get_history(row, name, UNLOADED_STAYS)
        if knows and history.deleted:
            former[name] = history.deleted[0]
        elif history.added or not history.unchanged or not knows:
            unknown.append(name)
    if unknown and key:
        columns = [getattr(mapper.class_, name) for name in unknown]
        asked = select(*columns).where(*(column == value for column, value in key))
        former.update(zip(unknown, connection.execute(asked).first() or (), strict=False))
    return former


def _changed_relatives(row: Any) -> list[Any]:
    """Return the rows that joined or left this one's many-to-many relations."""
    changed: list[Any] = []
    for relation in _mapper_of(row).relationships:
        if relation.secondary is not None:
            history = get_history(row, relation.key, UNLOADED_STAYS)
            changed += [*history.added, *history.deleted]
    return changed


def _mapper_of(row: Any) -> Any:
    state: Any = inspected(row)
    return state.mapper


def _attributes_of(model: type) -> list[str]:
    return [name for name in dir(model) if isinstance(getattr(model, name), QueryableAttribute)]


def _refuse_relationships(mapper: Any, tags: ModelTags) -> None:
    for name in tags.fields:
        if name not in mapper.column_attrs:
            columns = ", ".join(sorted(column.key for column in mapper.column_attrs))
            raise InvalidKey(
                f"{{{name}}}", f"it is no column of {tags.model}; its columns: {columns}"
            )


# Sessions


def _sync_session(session: AnySession) -> Session:
    found: Any = session
    if isinstance(found, scoped_session) or _is_async(found, "async_scoped_session"):
        found = found()
    inner = found.sync_session if _is_async(found, "AsyncSession") else found
    if not isinstance(inner, Session):
        raise InvalidArgument(
            f"session={in_code(session):.100}: the session whose commit is waited for comes first"
        )
    return inner


def _target(sessions: Any) -> Any:
    """Return what SQLAlchemy takes as the target of a session's events."""
    if _is_async(sessions, "AsyncSession"):
        return sessions.sync_session
    if _is_async(sessions, "async_scoped_session"):
        return _target(sessions.session_factory)
    if _is_async(sessions, "async_sessionmaker"):
        return _own_sync_class(sessions)
    if isinstance(sessions, type) and hasattr(sessions, "sync_session_class"):
        return sessions.sync_session_class
    return sessions


def _is_async(thing: Any, kind: str) -> bool:
    """Return whether it is of this class of sqlalchemy.ext.asyncio, and False where that is not imported."""
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return module is not None and isinstance(thing, getattr(module, kind))


def _own_sync_class(maker: async_sessionmaker[Any]) -> type[Session]:
    """Return the class of the maker's inner sessions. It is made for this maker if it shares one with others."""
    known: type[Session] = maker.kw.get("sync_session_class") or maker.class_.sync_session_class
    if "_of_stillroom" in vars(known):
        return known
    own = type(known.__name__, (known,), {"_of_stillroom": True})
    maker.configure(sync_session_class=own)
    return own
