"""The sessions' operations: what they say to Redis, and when. sessions.py gives them their two faces.

Each act is one script in one slot (lua/session_*.lua), and the server's clock decides. What they serve: **a session
that has ended stays ended**; no update, touch or rotation that was under way brings it back.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

from pydantic import SecretStr

from stillroom import pepper
from stillroom.codec import Codec
from stillroom.dispatch import Dispatch
from stillroom.errors import (
    RedisRefused,
    RedisUnavailable,
    SessionConflict,
    SessionDataRefused,
    SessionEnded,
    SessionStoreUnavailable,
    SettingsError,
    TooManySessions,
    ValueTooLarge,
)
from stillroom.keys import Keys, original, sanitized
from stillroom.operation import Call, Once, Operation, Pause
from stillroom.scripts import (
    session_create,
    session_destroy,
    session_end,
    session_get,
    session_list,
    session_reclaim,
    session_revoke,
    session_rotate,
    session_sweep,
    session_touch,
    session_update,
)
from stillroom.sessions.session import (
    Device,
    Session,
    SessionEvent,
    checked_key,
    decoded,
    encoded,
    encoded_meta,
    encoded_tags,
    head,
    read_device,
)
from stillroom.sessions.token import (
    NAME_LENGTH,
    SECRET_BYTES,
    Pepper,
    Place,
    make_handle,
    make_token,
    place_of,
    read_handle,
    shard_of,
)
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Command, Server, pack

log = logging.getLogger("stillroom.sessions")

T = TypeVar("T")

SWEEP_TASK = "stillroom.sweep_sessions"
BITE = 100  # sessions one script looks at …
BITE_LIMIT = 1_000  # … and may be told to
SWEEP_S = 50.0  # one run of the sweep ends after this; the next goes on
TRIES = 100  # of mutate: each lost one means that somebody else's was won
DEFERRED_LIMIT = 10_000
DEFERRED_BITE = 100
LONGEST_S = 366 * 86_400

_BLANK = b"?" * NAME_LENGTH  # where a name goes

Known = Session[Any] | SecretStr | str  # a session, its id, or the text of its cookie


class SessionsBody:
    """The operations. A driver runs them."""

    def __init__(
        self, settings: Settings, server: Server, keys: Keys, dispatch: Dispatch, stats: Stats
    ) -> None:
        self.settings = settings
        self.dispatch = dispatch
        self.stats = stats
        self.on_event: list[Callable[[SessionEvent], object]] = []
        self._server = server
        self._keys = keys
        self._codec = Codec(settings)
        self._shards = settings.session_shards
        self._peppers: tuple[Pepper, ...] = ()
        self._touch = b"%d" % _us(settings.session_touch)
        self._times = self._times_of(None, None)
        self._deferred: dict[Place, Command] = {}
        self._frames: dict[tuple[int, bool], tuple[bytes, bytes, bytes]] = {}

    # One session

    @overload
    def create(
        self,
        user_id: str | None,
        data: Mapping[str, Any] | None = None,
        *,
        tags: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        idle: float | None = None,
        absolute: float | None = None,
        replaces: Known | None = None,
        max_per_user: int | None = None,
        on_cap: str = "evict_oldest",
    ) -> Operation[Session[dict[str, Any]]]: ...
    @overload
    def create(
        self,
        user_id: str | None,
        data: T,
        *,
        tags: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        idle: float | None = None,
        absolute: float | None = None,
        replaces: Known | None = None,
        max_per_user: int | None = None,
        on_cap: str = "evict_oldest",
    ) -> Operation[Session[T]]: ...
    def create(
        self,
        user_id: str | None,
        data: Any = None,
        *,
        tags: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        idle: float | None = None,
        absolute: float | None = None,
        replaces: Known | None = None,
        max_per_user: int | None = None,
        on_cap: str = "evict_oldest",
    ) -> Operation[Session[Any]]:
        """Begin a session; its `token` goes into the cookie. `user_id` None: nobody's yet.

        `data`: a mapping, a model or a dataclass. `meta` is for lists of devices. `idle`, `absolute`: seconds.
        `replaces`: the session before the login, which ends with it (a token planted there opens
        nothing afterwards). `max_per_user` with `on_cap` "evict_oldest" or "reject", which raises TooManySessions
        and ends nothing.
        Raises SessionDataRefused, SessionUnreadable (JSON that could not be read back), ValueTooLarge, InvalidKey.
        Redis away or full: SessionStoreUnavailable.
        """
        user = b"" if user_id is None else sanitized(user_id)
        _check_cap(user_id, max_per_user, on_cap)
        times = self._times if idle is absolute is None else self._times_of(idle, absolute)
        given = {} if data is None else data
        fields, note = encoded(given, *self._limits()), encoded_meta(meta)
        labels = b"\n".join(encoded_tags(tags))
        token, place = self._new_place(shard_of(user, self._shards) if user else None)
        makes_room = on_cap == "evict_oldest"
        numbers = [b"%d" % number for number in (*times, max_per_user or 0, makes_room)]
        old = None if replaces is None else self._place(replaces)
        is_near = old is not None and old.shard == place.shard  # then the one script ends it
        names = [*self._names(place), *(self._names(old) if old and is_near else ())]
        about = (self._keys.shard(place.shard), user, labels, *numbers, note)
        creates = session_create.run((b"%d" % len(names), *names, *about, *_flat(fields)))
        ends = [self._destroying(old)] if old and not is_near else []
        *_, reply = yield from self._ask([*(ends if makes_room else ()), creates])
        if reply[0] == b"full":
            raise TooManySessions(reply[1], max_per_user or 0)
        if ends and not makes_room:  # only now is it known that the visitor keeps nothing of it
            yield from self._ask(ends)
        self.stats.counts["sessions_created"] += 1
        if reply[2] or reply[3]:
            evicted = [part for name in reply[3] for part in (name, user)]
            self._tell_all("expired", place.shard, reply[2])
            self._tell_all("evicted", place.shard, evicted)
        began = head(user, int(reply[1]), *times, labels, note)
        where = place.shard, place.names[0], began
        if isinstance(given, Mapping):
            return Session(*where, fields, token, as_fields=True)
        return Session(*where, given, token)

    @overload
    def get(
        self, session: Known, type: None = None, *, touch: bool = True
    ) -> Operation[Session[dict[str, Any]] | None]: ...
    @overload
    def get(
        self, session: Known, type: type[T], *, touch: bool = True
    ) -> Operation[Session[T] | None]: ...
    def get(
        self, session: Known, type: Any = None, *, touch: bool = True
    ) -> Operation[Session[Any] | None]:
        """The session of this token or id; None if it never was, has ended, has expired, or was rotated away.

        `type`: a pydantic model or any other type of its data. `touch=False`: reading it does not keep it alive.
        What no token of ours looks like costs no round trip. Raises SessionUnreadable.
        Redis away: SessionStoreUnavailable, which is not a logout.
        """
        place = self._place(session)
        if place is None:
            return None
        (reply,) = yield from self._ask([self._reading(place, touch)])
        if reply[0] != b"ok":
            self._refused(place, reply)
            return None
        return self._read(place.shard, reply, session, type)

    def update(
        self,
        session: Known,
        data: Any = None,
        *,
        remove: Iterable[str] = (),
        if_version: int | None = None,
    ) -> Operation[int]:
        """Set these top-level keys and remove those; the others are left alone. Returns the new version.

        Two updates of different keys never undo one another; of the same key the last one wins, unless `if_version`
        says which version it must still have: SessionConflict. Also keeps the session alive.
        Raises SessionEnded (nothing is ever brought back), SessionDataRefused, SessionUnreadable, ValueTooLarge.
        Redis away or full: SessionStoreUnavailable; whether it was written is unknown then.
        """
        fields = encoded(
            {} if data is None else data,
            self.settings.session_data_limit,
            self.settings.session_keys_limit,
        )
        gone = [name for name in _names_of(remove) if name not in fields]
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

        If somebody did, again with theirs. `change` may return None: the data it was given, changed in place.
        Returns the session then. Raises SessionEnded, what `change` raises, and SessionConflict after 100 tries.
        Redis away: SessionStoreUnavailable.
        """
        current = 0
        for _ in range(TRIES):
            found = yield from self._must_get(session, type)
            before = encoded(found.data, *self._limits())
            changed = yield Call(change, (found.data,))
            after = encoded(found.data if changed is None else changed, *self._limits())
            gone = [key for key in before if key not in after]
            try:
                yield from self._write(session, b"%d" % found.version, after, gone)
            except SessionConflict as conflict:
                current = conflict.current or 0
            else:
                return (yield from self._must_get(session, type))
        raise SessionConflict(current)

    def touch(self, session: Known) -> Operation[bool]:
        """Keep the session alive for another idle time, never past its absolute end. False if there is none.

        Written down once in `session_touch` seconds. Redis away: SessionStoreUnavailable.
        """
        place = self._place(session)
        if place is None:
            return False
        prefix = self._keys.shard(place.shard)
        (reply,) = yield from self._ask([session_touch(self._names(place), prefix, self._touch)])
        if reply[0] != b"ok":
            self._refused(place, reply)
        return bool(reply[0] == b"ok")

    def destroy(self, session: Known, *, defer: bool = False) -> Operation[bool]:
        """End a session; True if it lived. It works on a server that is full.

        Redis away: SessionStoreUnavailable, unless `defer`: then the session has ended for this process at once
        (True), and Redis is told when it is back, before this process reads any session again. Other processes
        know it from then on. What could not be told when the room is closed is lost, with a line in the log.
        """
        place = self._place(session, denied=True)
        if place is None:
            return False
        try:
            (ended,) = yield from self._ask([self._destroying(place)])
        except SessionStoreUnavailable:
            if not defer or len(self._deferred) >= DEFERRED_LIMIT:
                raise
            # Who rotates it until then, in another process, does not undo this.
            self._deferred[place] = self._destroying(place, b"%d" % self._server.now_us())
            self.stats.counts["sessions_deferred"] += 1
            return True
        self.stats.counts["sessions_destroyed"] += ended
        return bool(ended)

    @overload
    def rotate(
        self, session: Known, type: None = None, *, grace: float | None = None
    ) -> Operation[Session[dict[str, Any]]]: ...
    @overload
    def rotate(
        self, session: Known, type: type[T], *, grace: float | None = None
    ) -> Operation[Session[T]]: ...
    def rotate(
        self, session: Known, type: Any = None, *, grace: float | None = None
    ) -> Operation[Session[Any]]:
        """The same session under a new token. The old one works for `grace` seconds more (default: the settings').

        After that its use is told to `on_event` as a replay. Where rights change, rotate with `grace=0`.
        Raises SessionEnded, or SessionConflict if somebody else has just rotated it.
        Redis away: SessionStoreUnavailable.
        """
        place = self._place(session)
        if place is None:
            raise SessionEnded("missing")
        seconds = self.settings.session_grace if grace is None else grace
        if not 0 <= seconds <= 3_600:
            raise SettingsError(f"grace={seconds!r}: 0 to 3,600 seconds")
        token, fresh = self._new_place(place.shard)
        keys = [*self._names(place), *self._names(fresh)]
        prefix = self._keys.shard(place.shard)
        (reply,) = yield from self._ask([session_rotate(keys, prefix, _us(seconds))])
        if reply[0] == b"conflict":
            raise SessionConflict(None)
        if reply[0] != b"ok":
            raise self._refused(place, reply)
        self.stats.counts["sessions_rotated"] += 1
        return self._read(place.shard, reply, token, type)

    # Many sessions

    def list_for_user(self, user_id: str) -> Operation[list[Device]]:
        """The user's living sessions, the one seen last first: no data, no tokens.

        Redis away: SessionStoreUnavailable.
        """
        user = sanitized(user_id)
        replies = yield from self._ask(
            [
                session_list([self._keys.user_sessions(shard, user)], self._keys.shard(shard))
                for shard in range(self._shards)
            ]
        )
        found = [
            read_device(shard, name, about)
            for shard, reply in enumerate(replies)
            for name, about in zip(reply[::2], reply[1::2], strict=True)
        ]
        return sorted(found, key=lambda device: device.last_seen, reverse=True)

    def end(self, user_id: str, handle: str) -> Operation[bool]:
        """End one session by the handle that a list shows; True if it lived and was this user's.

        Also if it was rotated since it was listed.

        Redis away: SessionStoreUnavailable.
        """
        user, place = sanitized(user_id), read_handle(handle, self._shards)
        if place is None:
            return False
        prefix = self._keys.shard(place.shard)
        (ended,) = yield from self._ask([session_end(self._names(place), prefix, user)])
        self.stats.counts["sessions_destroyed"] += ended
        return bool(ended)

    def destroy_for_user(self, user_id: str, keep: Known | None = None) -> Operation[int]:
        """End all sessions of a user, but for one (a session, its token, or its handle). Returns how many lived.

        True for every reader when it returns, also for logins that began before; of many the memory is reclaimed by
        workers, and those among them that had ended already are counted too. One to keep that does not live is not
        brought back; what looks like none at all raises SessionEnded, and ends nothing.
        Redis away: SessionStoreUnavailable; some shards may have been done then.
        """
        user = sanitized(user_id)
        kept = self._kept(keep)
        return (yield from self._revoke(b"u:" + user, kept))

    def destroy_by_tag(self, *tags: str) -> Operation[int]:
        """End all sessions that carry one of these tags. Returns how many lived. See destroy_for_user."""
        ended = 0
        for tag in encoded_tags(tags):
            ended += yield from self._revoke(b"g:" + tag, None)
        return ended

    def count(self, user_id: str | None = None) -> Operation[int]:
        """How many sessions there are: of a user, exactly; of all, with those not swept since they ended.

        Redis away: SessionStoreUnavailable.
        """
        if user_id is not None:
            return len((yield from self.list_for_user(user_id)))
        replies = yield from self._ask(
            [(b"ZCARD", self._keys.due_sessions(shard)) for shard in range(self._shards)]
        )
        return sum(replies)

    # Background work

    def sweep(self, limit: int = BITE, seconds: float = SWEEP_S) -> Operation[dict[str, Any]]:
        """Delete what has expired, oldest first, and what was revoked, in bites of `limit`. For a worker.

        Returns {"expired", "deleted", "lag_s", "done"}: `lag_s` is how long the oldest of them had waited, and
        `done` is False if `seconds` were up first. Two at once share the work. It works on a server that is full.
        Raises SettingsError for a `limit` that is none. Redis away: SessionStoreUnavailable.
        """
        if not 1 <= limit <= BITE_LIMIT:
            raise SettingsError(f"limit={limit!r}: 1 to {BITE_LIMIT:,} sessions a bite")
        deadline = time.monotonic() + seconds
        expired = deleted = lag = 0
        left = set(range(self._shards))
        while left and time.monotonic() < deadline:
            for shard in sorted(left):
                ended, due, waited = yield from self._sweep_shard(shard, limit)
                gone, unfinished, longer = yield from self._reclaim(shard, limit)
                expired, deleted, lag = expired + ended, deleted + gone, max(lag, waited, longer)
                if due < limit and not unfinished:
                    left.discard(shard)
                yield Pause(0)  # others first; and each bite has its own deadline
        return {"expired": expired, "deleted": deleted, "lag_s": lag / 1e6, "done": not left}

    def deliver(self) -> Operation[int]:
        """Tell Redis of the sessions that ended while it was away. Returns how many are left to tell.

        Happens by itself when Redis is back, and before this process reads a session. Does not raise.
        """
        while self._deferred:
            try:
                yield from self._ask([])
            except SessionStoreUnavailable:
                break
            yield Pause(0)
        return len(self._deferred)

    def flush_stats(self) -> Operation[None]:
        """Write the counts of this process down now. Redis away: they are lost."""
        self.stats.due = 0.0
        try:
            yield from self._ask([], Once)
        except SessionStoreUnavailable as error:
            log.info("the last counts are lost: %s", error)

    def is_current(self, session: Session[Any]) -> bool:
        """Whether its token is its name of today; False for one that was rotated and works on for a moment."""
        place = self._place(session)
        handles = () if place is None else [make_handle(place.shard, name) for name in place.names]
        return session.handle in handles

    # Asking

    def _ask(
        self, batch: Sequence[Command], kind: type[list[Command]] = list
    ) -> Operation[list[Any]]:
        """The replies. What has to be told first goes in front, the counts that are due behind."""
        if batch and not self._deferred and time.monotonic() <= self.stats.due:  # as nearly always
            try:
                return (yield kind(batch))  # type: ignore[no-any-return]
            except RedisUnavailable as error:
                raise SessionStoreUnavailable(error.reason, error.detail) from error
        told = list(self._deferred.items())[:DEFERRED_BITE] if self._deferred else []
        commands = kind([*(command for _, command in told), *batch])
        due = time.monotonic() > self.stats.due
        if due:  # counts and events must not be doubled
            commands = Once([*commands, *self.stats.flush(self._server.now_ms())])
        if not commands:
            return []
        last = len(told) + len(batch)
        try:
            replies = yield commands
        except RedisRefused as refused:
            # A server that is full refuses to count, not to do what it was asked.
            if not due or any(isinstance(reply, Exception) for reply in refused.replies[:last]):
                raise SessionStoreUnavailable(refused.reason, refused.detail) from refused
            replies = refused.replies
        except RedisUnavailable as error:
            raise SessionStoreUnavailable(error.reason, error.detail) from error
        for place, _ in told:
            self._deferred.pop(place, None)
        return list(replies[len(told) : last])

    def _write(
        self, session: Known, version: bytes, fields: Mapping[bytes, bytes], gone: Sequence[bytes]
    ) -> Operation[Any]:
        """What lua/session_update.lua replied. Once: a second time would count a version too many."""
        place = self._place(session)
        if place is None:
            raise SessionEnded("missing")
        limits = self._limits()
        updates = session_update(
            self._names(place),
            *(self._keys.shard(place.shard), version, *limits, len(fields)),
            *(*_flat(fields), *gone),
        )
        (reply,) = yield from self._ask([updates], Once)
        match reply[0]:
            case b"ok":
                return reply
            case b"conflict":
                raise SessionConflict(reply[1])
            case b"large":
                raise ValueTooLarge(reply[1], limits[0])
            case b"many":
                raise SessionDataRefused(f"{reply[1]} keys, the limit is {limits[1]}")
        raise self._refused(place, reply)

    def _must_get(self, session: Known, type: Any) -> Operation[Session[Any]]:
        found = yield from self.get(session, type)
        if found is None:
            raise SessionEnded("missing")
        return found  # type: ignore[no-any-return]  # which overload it was is not known here

    def _revoke(self, name: bytes, keep: Place | None) -> Operation[int]:
        """`name`: u:<user> or g:<tag>."""
        kept = {} if keep is None else {keep.shard: self._names(keep)}
        replies = yield from self._ask(
            [
                session_revoke([prefix + name, *kept.get(shard, ())], prefix, name, BITE)
                for shard in range(self._shards)
                if (prefix := self._keys.shard(shard))
            ]
        )
        ended = sum(int(count) for count, _ in replies)
        self.stats.counts["sessions_revoked"] += ended
        if any(unfinished for _, unfinished in replies):
            if self.dispatch.inline:
                yield from self.sweep()
            else:
                self.dispatch.wake(SWEEP_TASK)
        return ended

    def _sweep_shard(self, shard: int, limit: int) -> Operation[tuple[int, int, int]]:
        """(expired, how many were due, how long the oldest had been, µs)."""
        command = session_sweep([self._keys.due_sessions(shard)], self._keys.shard(shard), limit)
        ((ended, due, waited),) = yield from self._ask([command])
        self._tell_all("expired", shard, ended)
        return len(ended) // 2, due, waited

    def _reclaim(self, shard: int, limit: int) -> Operation[tuple[int, int, int]]:
        """(deleted, revocations left, how long the oldest has waited, µs)."""
        command = session_reclaim([self._keys.revocations(shard)], self._keys.shard(shard), limit)
        ((deleted, left, waited),) = yield from self._ask([command])
        return deleted, left, waited

    # Names

    def _place(self, session: Known, *, denied: bool = False) -> Place | None:
        """Where the session is; None for what is no token, or has ended here already."""
        token = session if type(session) is str else _token_of(session)
        place = place_of(token, self._peppers or self._ring(), self._shards)
        return None if self._deferred and place in self._deferred and not denied else place

    def _ring(self) -> tuple[Pepper, ...]:
        if not self._peppers:
            secret = pepper.ring(
                self.settings,
                self.settings.session_peppers,
                "STILLROOM_SESSION_PEPPERS",
                without="sessions end with this process, and no other knows them",
            )
            self._peppers = tuple(map(Pepper, secret))
        return self._peppers

    def _names(self, place: Place) -> list[bytes]:
        return self._keys.sessions(place.shard, place.names)

    def _new_place(self, shard: int | None) -> tuple[str, Place]:
        """A token and its place: under the first pepper only."""
        number = secrets.randbelow(self._shards) if shard is None else shard
        token = make_token(number, os.urandom(SECRET_BYTES))
        return token, Place(number, (self._ring()[0].name(token.encode()),))

    def _reading(self, place: Place, touch: bool) -> Command:
        """The command that reads a session. Each request sends one, so but for the name it is packed once."""
        shard, names = place
        if len(names) > 1:  # peppers are being changed
            return self._reads(shard, names, touch)
        frame = self._frames.get((shard, touch))
        if frame is None:
            whole = pack([self._reads(shard, [_BLANK], touch)])
            frame = self._frames[shard, touch] = whole.partition(_BLANK)
        return frame[0] + names[0] + frame[2]

    def _reads(self, shard: int, names: Sequence[bytes], touch: bool) -> Command:
        options = self._keys.shard(shard), self._touch if touch else b""
        return session_get(self._keys.sessions(shard, names), *options)

    def _destroying(self, place: Place, asked: bytes = b"") -> Command:
        """`asked`: when, in µs, if it is not now."""
        return session_destroy(self._names(place), self._keys.shard(place.shard), asked)

    def _kept(self, keep: Known | None) -> Place | None:
        if keep is None:
            return None
        handle = keep if isinstance(keep, str) else None
        place = self._place(keep) or read_handle(handle, self._shards)
        if place is None:
            raise SessionEnded("missing")  # better none is ended than all by mistake
        return place

    def _times_of(self, idle: float | None, absolute: float | None) -> tuple[int, int]:
        """In µs. Raises SettingsError."""
        times = (
            self.settings.session_idle if idle is None else idle,
            self.settings.session_absolute if absolute is None else absolute,
        )
        for name, seconds in zip(("idle", "absolute"), times, strict=True):
            if not 0.001 <= seconds <= LONGEST_S:
                raise SettingsError(f"{name}={seconds!r}: 0.001 to {LONGEST_S:,} seconds")
        return _us(times[0]), _us(times[1])

    def _limits(self) -> tuple[int, int]:
        return self.settings.session_data_limit, self.settings.session_keys_limit

    # Answers

    def _read(self, shard: int, reply: Any, session: Known, type: Any) -> Session[Any]:
        data = decoded(reply[3], None if type is None else self._codec.adapter(type))
        was_touched = len(reply) > 4 and reply[4] == 1
        return Session(shard, reply[1], reply[2], data, _token_of(session), was_touched)

    def _refused(self, place: Place, reply: Any) -> SessionEnded:
        """Count and tell why there is no session."""
        reason = reply[0].decode()
        self.stats.counts[f"sessions_{reason}"] += 1
        if reason == "replayed":
            self._tell_all(reason, place.shard, reply[1:])
        return SessionEnded(reason)

    def _tell_all(self, kind: str, shard: int, ended: Sequence[bytes]) -> None:
        """`ended`: name, user, name, user …"""
        if not ended:
            return
        if kind != "replayed":
            self.stats.counts[f"sessions_{kind}"] += len(ended) // 2
        for name, user in zip(ended[::2], ended[1::2], strict=True):
            user_id = original(user).decode(errors="replace") or None
            self._tell(SessionEvent(kind, make_handle(shard, name), user_id))

    def _tell(self, event: SessionEvent) -> None:
        log.info("session %s: handle=%s user=%a", event.kind, event.handle, event.user_id)
        for listener in self.on_event:
            try:
                listener(event)
            except Exception:
                log.exception("a listener of session events failed")


def _token_of(session: Known) -> str:
    if isinstance(session, str):
        return session
    if isinstance(session, Session):
        return session.token
    return session.get_secret_value() if isinstance(session, SecretStr) else str(session)


def _us(seconds: float) -> int:
    return int(seconds * 1_000_000)


def _flat(fields: Mapping[bytes, bytes]) -> list[bytes]:
    return [part for item in fields.items() for part in item]


def _check_cap(user_id: str | None, most: int | None, on_cap: str) -> None:
    if on_cap not in ("evict_oldest", "reject"):
        raise SettingsError(f"on_cap={on_cap!r}: evict_oldest or reject")
    if most is not None and most < 1:
        raise SettingsError(f"max_per_user={most!r}: 1 or more")
    if most is not None and user_id is None:
        raise SettingsError("max_per_user needs a user_id: the anonymous are not counted")


def _names_of(keys: Iterable[str]) -> list[bytes]:
    """One key, or several. Raises SessionDataRefused: the record's own fields are not among them."""
    return [checked_key(key) for key in ((keys,) if isinstance(keys, str) else keys)]
