"""The operations on one session: what they say to Redis, and when. creating.py has those that begin one, many.py
those on many; sessions.py gives all of them their two faces.

Each act is one script in one slot (lua/session_*.lua), and the server's clock decides. What they serve: **a session
that has ended stays ended**; no update, touch or rotation that was under way brings it back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar, overload

from stillroom.codec import Codec
from stillroom.dispatch import Dispatch
from stillroom.durations import Duration, seconds_of
from stillroom.errors import (
    OF_THE_COMMAND,
    InvalidArgument,
    SessionConflict,
    SessionDataRefused,
    SessionEnded,
    SessionNotFresh,
    SessionStoreUnavailable,
    SessionUnreadable,
    ValueTooLarge,
    in_code,
    is_in_doubt,
    partly_done,
)
from stillroom.keys import Keys
from stillroom.misuse import YES_OR_NO, refuse_other, texts_of
from stillroom.operation import Call, Once, Operation
from stillroom.scripts import (
    session_rotate,
    session_touch,
    session_update,
)
from stillroom.sessions.asking import ROTATION
from stillroom.sessions.creating import Creating, us_of
from stillroom.sessions.data import (
    DATA_LIMIT,
    checked_key,
    decoded,
    encoded,
    flat,
    names_in,
)
from stillroom.sessions.ends import (
    BRINGS_ANOTHER,
    TAKES_AWAY,
    Undo,
)
from stillroom.sessions.many import Many
from stillroom.sessions.named import Known, token_of
from stillroom.sessions.reading import Reading
from stillroom.sessions.session import LACKS_FIELDS, Session
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.whole import is_whole
from stillroom.wire import Server, StateServer

log = logging.getLogger("stillroom.sessions")

T = TypeVar("T")

TRIES = 100  # tries of mutate: each lost one means that another caller won
REMOVE_LIMIT = 1_000  # keys in one update: no session has more


class SessionsBody(Many, Creating, Reading):
    """The operations. A driver runs them."""

    def __init__(
        self,
        settings: Settings,
        server: Server | StateServer,
        keys: Keys,
        dispatch: Dispatch,
        stats: Stats,
    ) -> None:
        super().__init__(settings, server, keys, dispatch, stats)
        self._codec = Codec(settings)
        self._limit_words = [b"%d" % limit for limit in self._limits]

    def succeed(
        self, before: Known, user_id: str | None, data: Mapping[str, Any], **options: Any
    ) -> Operation[Session[Any]]:
        """Begin a session, and end the one before it. What can't be begun leaves the one before as it was.

        Raises SessionEnded if that one has ended meanwhile: who ends it first decides, so a logout is not undone.
        `options` are those of `create`. Redis away: SessionStoreUnavailable; the new session ends as soon as this
        process reaches Redis, because nobody has its token.
        """
        made = yield from self.create(user_id, data, **options)
        place = self._place(before, denied=True)
        try:
            ending = None if place is None else self._destroying(place, BRINGS_ANOTHER)
            if ending is not None and (yield from self._end(ending)):
                return made  # type: ignore[no-any-return]
        except BaseException:  # also of a task that is cancelled
            self._undo(made)
            raise
        yield from self.destroy(made, defer=True)
        raise SessionEnded("missing")

    def _undo(self, made: Session[Any]) -> None:
        """Have a session of this process that nobody has the token of ended before its next act."""
        place = self._place(made, denied=True)
        if place is not None:
            keys, prefix = self._keys.record(*place)
            self._defer(place, Undo(keys[:1], prefix))

    @overload
    def get(
        self,
        session: Known,
        type: None = None,
        *,
        touch: bool = True,
        fresh: Duration | None = None,
    ) -> Operation[Session[dict[str, Any]] | None]: ...
    @overload
    def get(
        self, session: Known, type: type[T], *, touch: bool = True, fresh: Duration | None = None
    ) -> Operation[Session[T] | None]: ...
    def get(
        self,
        session: Known,
        type: Any = None,
        *,
        touch: bool = True,
        fresh: Duration | None = None,
    ) -> Operation[Session[Any] | None]:
        """Return the session of this token or id, or None if it ended, expired or was rotated, or never was.

        `type`: a pydantic model or any other type of its data. `touch=False`: reading it does not keep it alive.
        `fresh`: seconds, or a timedelta; raises SessionNotFresh if the user has not proved who they are in that
        time, by the login that began the session or by `confirm`.
        A text that can't be a token costs no round trip. Raises SessionUnreadable.
        Redis away: SessionStoreUnavailable, which is not a logout.
        """
        token = session if isinstance(session, str) else token_of(session)
        if fresh is not None:
            fresh = seconds_of("fresh", fresh, least=0)
        place = self._place(token)
        if place is None:
            refuse_other("touch", touch, bool, YES_OR_NO)
            self._refuse_no_type(type)
            return None
        reply = yield from self._looked_up(place, touch)
        if reply[0] != b"ok":
            self._refuse_no_type(type)
            self._refused(place, reply)
            return None
        found = self._read(place.shard, reply, token, type, reply[4])
        if fresh is not None and not found.is_fresh(fresh):
            raise not_fresh(found, fresh)
        return found

    def _refuse_no_type(self, type: Any) -> None:
        """Refuse what is no type where there is no session, as where there is one."""
        if type is not None:
            self._codec.adapter(type)

    def update(
        self,
        session: Known,
        data: Any = None,
        *,
        remove: Iterable[str] = (),
        if_version: int | None = None,
    ) -> Operation[int]:
        """Set some top-level keys and remove others; all others stay as they are. Return the new version.

        Two updates of different keys never undo one another; of the same key the last one wins, unless `if_version`
        says which version it must still have: SessionConflict. Also keeps the session alive.
        An update never brings an ended session back. Raises SessionEnded, SessionDataRefused, SessionUnreadable,
        ValueTooLarge.
        Redis away or full: SessionStoreUnavailable; whether it was written is unknown then.
        """
        fields = encoded({} if data is None else data, *self._limits)
        gone = [name for name in _names_of(remove) if name not in fields] if remove != () else []
        if len(gone) > REMOVE_LIMIT:
            raise SessionDataRefused(f"{len(gone):,} keys to remove, the limit is {REMOVE_LIMIT:,}")
        if if_version is not None and not is_whole(if_version, least=0):
            raise InvalidArgument(
                f"if_version={in_code(if_version):.100}: the whole number that a session's `version` was"
            )
        version = b"" if if_version is None else b"%d" % if_version
        reply = yield from self._write(session, version, fields, gone)
        return int(reply[1])

    @overload
    def mutate(
        self,
        session: Known,
        change: Callable[[dict[str, Any]], Any],
        type: None = None,
    ) -> Operation[Session[dict[str, Any]]]: ...
    @overload
    def mutate(
        self, session: Known, change: Callable[[T], Any], type: type[T]
    ) -> Operation[Session[T]]: ...
    def mutate(
        self, session: Known, change: Callable[[Any], Any], type: Any = None
    ) -> Operation[Session[Any]]:
        """Read the data, call `change(data)`, and store what it returns, only if nobody else wrote in between.

        If somebody did, `change` is called again with their data. It may change the data in place and return None.
        Returns the changed session. Raises SessionEnded, what `change` raises, and SessionConflict after 100 tries.
        Redis away: SessionStoreUnavailable; whether it was stored is unknown then.
        """
        if not callable(change):
            raise InvalidArgument(
                f"mutate(…, {in_code(change):.100}): a function that is given the data"
            )
        current = 0
        for _ in range(TRIES):
            found = yield from self._must_get(session, type)
            before = names_in(found.data)
            changed = yield Call(change, (found.data,))
            after = encoded(found.data if changed is None else changed, *self._limits)
            gone = [key for key in before if key not in after]
            try:
                yield from self._write(session, b"%d" % found.version, after, gone)
            except SessionConflict as conflict:
                current = conflict.current or 0
            else:
                with partly_done():
                    return (yield from self._must_get(session, type))
        raise SessionConflict(current)

    def touch(self, session: Known) -> Operation[bool]:
        """Keep the session alive for another idle time, never past its absolute end. Return False if there is none.

        Written down once in `session_touch` seconds. Redis away: SessionStoreUnavailable.
        """
        place = self._place(session)
        if place is None:
            return False
        (reply,) = yield from self._ask([session_touch(*self._keys.record(*place), self._touch)])
        if reply[0] != b"ok":
            self._refused(place, reply)
        return bool(reply[0] == b"ok")

    def destroy(self, session: Known, *, defer: bool = False) -> Operation[bool]:
        """End a session, and return True if it lived. It works on a server that is full.

        A rotation at the same time does not save it. An old token whose grace was over by then ends nothing.
        Redis away: SessionStoreUnavailable, unless `defer`: then the session has ended for this process at once
        (True), and Redis is told when it is back, before this process reads any session again. Other processes
        know it from then on. If the room is closed, or the process ends, before that, the logout is lost, with a
        line in the log.
        """
        refuse_other("defer", defer, bool, YES_OR_NO)
        place = self._place(session, denied=True)
        if place is None:
            return False
        ending = self._destroying(place)
        try:
            ended: bool = yield from self._end(ending)
        except SessionStoreUnavailable as error:
            if not defer or error.reason in OF_THE_COMMAND or not self._defer(place, ending):
                raise
            self.stats.counts["sessions_deferred"] += 1
            return True
        except BaseException as error:
            if defer and is_in_doubt(error):  # a browser does not wait for its logout
                self._defer(place, ending)
            raise
        self.stats.counts["sessions_destroyed"] += ended
        return ended

    @overload
    def rotate(
        self, session: Known, type: None = None, *, grace: Duration | None = None
    ) -> Operation[Session[dict[str, Any]]]: ...
    @overload
    def rotate(
        self, session: Known, type: type[T], *, grace: Duration | None = None
    ) -> Operation[Session[T]]: ...
    def rotate(
        self, session: Known, type: Any = None, *, grace: Duration | None = None
    ) -> Operation[Session[Any]]:
        """Give the session a new token. The old one works for `grace` seconds more (default: the settings').

        After that, and until the session's absolute end, its use is reported to `on_event` as a replay. If the
        user's rights change, rotate with `grace=0`. Raises SessionEnded, or SessionConflict if somebody else has
        just rotated it. Data that are not of this `type` raise SessionUnreadable, and the old token stays good.
        Redis away: SessionStoreUnavailable. If the rotation may have happened all the same, or was cancelled, it is
        undone as soon as this process reaches Redis again: the old token stays good.
        """
        return self._rotate(session, type, grace, is_proof=False)

    @overload
    def confirm(
        self, session: Known, type: None = None, *, grace: Duration | None = None
    ) -> Operation[Session[dict[str, Any]]]: ...
    @overload
    def confirm(
        self, session: Known, type: type[T], *, grace: Duration | None = None
    ) -> Operation[Session[T]]: ...
    def confirm(
        self, session: Known, type: Any = None, *, grace: Duration | None = None
    ) -> Operation[Session[Any]]:
        """Note that the user has just proved again who they are: the session is fresh, under a new token.

        See `get(fresh=…)`, and `rotate` for everything else.
        """
        return self._rotate(session, type, grace, is_proof=True)

    def renew(self, token: str, *, is_proof: bool) -> Operation[Session[Any]]:
        """Rotate it, or confirm it, for a request whose response brings the browser the new token: see `log_in`."""
        return self._rotate(token, None, 0, is_proof=is_proof, brings_cookie=True)

    def _rotate(
        self,
        session: Known,
        type: Any,
        grace: Duration | None,
        *,
        is_proof: bool,
        brings_cookie: bool = False,
    ) -> Operation[Session[Any]]:
        if type is not None:
            self._codec.adapter(type)
        place = self._place(session)
        if place is None:
            raise SessionEnded("missing")
        given = self.settings.session_grace if grace is None else grace
        grace_us = us_of("grace", given, least=0.0, most=3_600.0)
        token, fresh = self._new_place(place.shard)
        (old, prefix), new = self._keys.record(*place), self._keys.sessions(*fresh)
        how = (grace_us, len(new), int(is_proof), int(brings_cookie))
        rotates, undo = session_rotate([*old, *new], prefix, *how), Undo((new[0], *old), prefix)
        try:
            (reply,) = yield from self._ask([rotates], Once, ROTATION)
        except BaseException as error:
            if is_in_doubt(error):  # nobody gets the new token
                self._defer(fresh, undo)
            raise
        if reply[0] == b"conflict":
            raise SessionConflict(None)
        if reply[0] != b"ok":
            raise self._refused(place, reply)
        unseen = reply[4] if len(reply) > 4 else 0  # it is left away where the call was sent again
        try:
            rotated = self._read(place.shard, reply, token, type, unseen)
        except Exception:  # the data are not of this type: nobody gets the new token
            self._defer(fresh, undo)
            with suppress(SessionStoreUnavailable):
                yield from self._tell_ends_first()
            raise
        self.stats.counts["sessions_rotated"] += 1
        return rotated

    # Background work

    def deliver(self) -> Operation[int]:
        """Tell Redis of the sessions that ended while it was away. Returns how many are left to tell.

        Happens by itself when Redis is back, and before this process reads a session. Does not raise.
        """
        try:
            yield from self._tell_ends(rests=True)
        except SessionStoreUnavailable as error:
            log.debug("not all ends of sessions are told: %s", error)
            self.stats.remind()
        return len(self._deferred)

    def flush_stats(self) -> Operation[None]:
        """Write the counts of this process down now. Redis away: they are lost."""
        self.stats.due = 0.0
        try:
            yield from self._ask([], Once)
        except SessionStoreUnavailable as error:
            log.info("the last counts are lost: %s", error)

    # For a request

    def log_out(
        self, token: str, *, if_empty: bool = False, asked_us: int | None = None
    ) -> Operation[bool]:
        """End a session whose cookie the response takes away. A slower response must begin no session in its place.

        `if_empty`: only if there is no data in it, whoever has written last. `asked_us`: see `log_in`.
        """
        place = self._place(token, denied=True)
        if place is None:
            return False
        ending = self._destroying(place, TAKES_AWAY, asked_us)
        if if_empty:
            ending = ending._replace(only=b"1")
        ended: bool = yield from self._end(ending)
        self.stats.counts["sessions_destroyed"] += ended
        return ended

    def is_late(self, token: str) -> Operation[bool]:
        """Tell whether the browser that showed this token is getting another cookie, or none: by a login, a new
        token or a logout of a moment ago. Redis away: SessionStoreUnavailable."""
        place = self._place(token, denied=True)
        if place is None:
            return False
        (found,) = yield from self._ask([(b"EXISTS", *self._keys.late(place.shard, place.names))])
        return bool(found)

    # Writing

    def _write(
        self, session: Known, version: bytes, fields: Mapping[bytes, bytes], gone: Sequence[bytes]
    ) -> Operation[Any]:
        """Return the reply of lua/session_update.lua. Once: a second run would count a version too many."""
        place = self._place(session)
        if place is None:
            raise SessionEnded("missing")
        numbers = *self._limit_words, b"%d" % len(fields)
        updates = session_update(
            *self._keys.record(*place), version, *numbers, *flat(fields), *gone
        )
        (reply,) = yield from self._ask([updates], Once)
        match reply[0]:
            case b"ok":
                return reply
            case b"conflict":
                raise SessionConflict(reply[1])
            case b"large":
                raise ValueTooLarge(reply[1], self._limits[0], DATA_LIMIT)
            case b"many":
                raise SessionDataRefused(f"{reply[1]} keys, the limit is {self._limits[1]}")
            case b"unreadable":
                raise SessionUnreadable(LACKS_FIELDS)
        raise self._refused(place, reply)

    def _must_get(self, session: Known, type: Any) -> Operation[Session[Any]]:
        found = yield from self.get(session, type)
        if found is None:
            raise SessionEnded("missing")
        return found  # type: ignore[no-any-return]  # which overload it was is not known here

    def _read(self, shard: int, reply: Any, token: str, type: Any, unseen: int) -> Session[Any]:
        data = decoded(reply[3], None if type is None else self._codec.adapter(type))
        return Session(shard, reply[1], reply[2], data, token, unseen, reply[3])


def not_fresh(session: Session[Any], within: Duration) -> SessionNotFresh:
    """Return the error to raise for a session that is not fresh."""
    proved, seconds = session.authenticated_at, seconds_of("fresh", within, least=0)
    return SessionNotFresh(seconds, None if proved is None else session.read_at - proved)


def _names_of(keys: Iterable[str]) -> list[bytes]:
    """Return one key or several. Raises SessionDataRefused for the record's own fields."""
    return [checked_key(key) for key in texts_of("remove", keys)]
