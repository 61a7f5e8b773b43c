"""Django's sessions in the room: `SESSION_ENGINE = "stillroom.web.django.sessions"`.

The session key is a token, and Redis holds no more than its HMAC. Who Django says is logged in is the session's
user, so `room.sessions.list_for_user(str(user.pk))` and `destroy_for_user` work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.base import CreateError, SessionBase, UpdateError

from stillroom.durations import Duration
from stillroom.errors import (
    SessionConflict,
    SessionEnded,
    SessionStoreUnavailable,
    SessionUnreadable,
)
from stillroom.marked import FIXED
from stillroom.operation import Operation
from stillroom.sessions import (
    Session,
    SessionsBody,
    decoded,
    decoded_value,
    legible,
)
from stillroom.sessions.token import is_token
from stillroom.web.agent import device_of
from stillroom.web.django import room
from stillroom.web.fields import field_of, text_of, to_data, to_fields
from stillroom.web.merge import GONE, merged_keys
from stillroom.web.request_session import (
    CLEARS_WITHIN_S,
    TRIES,
    RequestSession,
    tell_of_unreadable,
)
from stillroom.web.session_data import differing, encoded_values

T = TypeVar("T")

EXPIRY = "_session_expiry"  # the key that set_expiry writes
# By so much Redis keeps a session longer than its moment: each request may put that off.
PART, SLACK_S = 0.1, 60.0


class SessionStore(SessionBase):
    """Django's sessions: `SESSION_ENGINE = "stillroom.web.django.sessions"`.

    Data is JSON, whatever SESSION_SERIALIZER says; tuples, sets, bytes, dates and times, Decimal and UUID keep
    their type. Only the keys that changed are written; what two requests add to one list or dict is both there.

    A session's user and lifetime are fixed when it begins: where the data says another user, or set_expiry another
    time, `save` begins a new one in its place, under a new key. It lives for `get_expiry_age()` seconds after it
    was seen last, up to the moment that set_expiry was given (a datetime, a timedelta), and for the room's
    session_absolute (7 d) in any case. A moment may be put off in each request: that makes no new key, and Redis
    forgets such a session a little after its moment.

    In a request a new key is made when the session is saved, or when somebody asks for it.

    Redis away: SessionStoreUnavailable, which SessionMiddleware answers with 503; never an empty session.
    """

    _session_key: Any  # a property of SessionBase
    _found: Session[Any] | None = None
    _before: Mapping[str, bytes] | None = None  # the data in Redis, as far as this request knows
    _version: int | None = None  # … and its version, where that is not the one it was read with
    _dead: str | None = None  # the key that came, and opened nothing
    _looked_at = 0.0  # … when: time.monotonic()
    _cycles = False  # a new key is due, when it is saved
    _confirms = False  # … because the user has just proved their identity
    _logs_in = False  # this request has logged a user in
    _is_new = False  # this request has begun it, so that its cookie is still to go out
    _has_emptied = False  # all data was dropped, and so is what another request adds before a new session begins
    _reading: asyncio.Lock | None = None  # held by the task that reads

    # Told by the middleware about the request
    is_in_request = False
    agent = ""
    asked_us: int | None = None  # when it came in, by this machine's steady clock
    along: RequestSession | None = None
    has_ended = False  # by this request
    failure: SessionStoreUnavailable | None = None  # why it could not be read

    @property
    def session_key(self) -> Any:
        """Return the key. A new one that is due is made now, because who asks may keep it to end the session."""
        if self._cycles and not self.is_empty():  # of one that was flushed nothing is left to save
            self.save()
        return self._session_key

    @property
    def unknown_token(self) -> str | None:
        """Return the key that came, if it looked like one of ours and opened nothing."""
        return self._dead if is_token(self._dead) else None

    @property
    def found(self) -> Session[Any] | None:
        """Return the session as it was read: its handle, times and user. None: there was none."""
        self._get_session()
        return self._found

    async def _aget_session(self, no_load: bool = False) -> dict[str, Any]:
        """Return the data. Tasks of one request that look together get the same, which Django reads for each."""
        if "_session_cache" in vars(self):
            known: dict[str, Any] = self._get_session(no_load=no_load)
            return known
        if self._reading is None:
            self._reading = asyncio.Lock()
        async with self._reading:
            read: dict[str, Any] = await super()._aget_session(no_load=no_load)
            return read

    def load(self) -> dict[str, Any]:
        """Return the data. A key that opens nothing is forgotten; what no token looks like costs no round trip."""
        key = self._session_key
        self._found = legible(self._read(key), tell_of_unreadable)
        data = {} if self._found is None else to_data(self._found.data)
        if _is_over(data):
            room().sessions.destroy(key, defer=True)
            self._found, data = None, {}
        if self._found is None:
            self._dead = None if self.has_ended else key
            self._looked_at, self._session_key = time.monotonic(), None
        return data

    def _read(self, key: str | None) -> Session[Any] | None:
        if self.along is not None and self.along.has_read(_body(), key):
            return self.along.was_read
        try:
            return room().sessions.get(key) if key else None
        except SessionUnreadable as error:
            tell_of_unreadable(error)
        except SessionStoreUnavailable as error:
            self.failure = error
            raise
        return None

    def exists(self, session_key: str | None) -> bool:
        return bool(session_key) and room().sessions.get(session_key or "", touch=False) is not None

    def create(self) -> None:
        """Begin a session at once, with what this request has put into it so far."""
        self._session_key = None
        self._begin(self._get_session(no_load=True))
        self.modified = True

    def save(self, must_create: bool = False) -> None:
        """Write what changed. Raises UpdateError if the session has ended meanwhile."""
        data: dict[Any, Any] = self._get_session(no_load=must_create)
        key = self._session_key
        if must_create and key and self.exists(key):
            raise CreateError
        try:
            if must_create or key is None:
                self._begin(data)
                self.modified = True  # so that the response brings its key
            else:
                self._update(data)
        except (SessionEnded, SessionConflict) as error:
            raise UpdateError from error

    def delete(self, session_key: str | None = None) -> None:
        key = session_key or self._session_key
        if key and _run(_body().log_out(key, asked_us=self.asked_us)):
            self.has_ended |= key == self._session_key
        elif key and key == self._session_key:
            self._dead = key

    def clear(self) -> None:
        super().clear()
        self._has_emptied = True

    def cycle_key(self) -> None:
        """Give the session a new key; the old one opens nothing any more.

        In a request that happens when it is saved: one that fails leaves the visitor what he had.
        """
        data = self._get_session()
        if self.is_in_request:
            self._cycles = True
        elif self._session_key is None:
            self._begin(data)
        else:
            try:
                self._rotate()
            except (SessionEnded, SessionConflict) as error:
                raise UpdateError from error
        self.modified = True

    async def acycle_key(self) -> None:
        await sync_to_async(self.cycle_key)()

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._logs_in |= key == SESSION_KEY

    async def aset(self, key: Any, value: Any) -> None:
        await super().aset(key, value)
        self._logs_in |= key == SESSION_KEY

    def confirm(self) -> None:
        """Note that the user has just proved again who he is: the session is fresh, under a new key. See
        `is_fresh`.
        """
        self._get_session()
        self._cycles = self._confirms = self.modified = True

    def is_fresh(self, seconds: Duration) -> bool:
        """Tell whether the user proved within so many seconds who he is: by logging in, or by `confirm`."""
        data = self._get_session()
        if self._confirms or self._has_other_user(data):
            return SESSION_KEY in data
        return self._found is not None and self._found.is_fresh(seconds)

    @classmethod
    def clear_expired(cls) -> None:
        """Sweep expired sessions, as the worker does each minute."""
        room().upkeep.sweep_sessions()

    def may_be_forgotten(self, key: str) -> bool:
        """Return whether the browser may be told to forget this key: it opens nothing, or has just been ended here.

        Not if another request has just logged in: the response to that may have overtaken this one.
        """
        if self.has_ended:
            return True
        if self._looked_at and time.monotonic() - self._looked_at > CLEARS_WITHIN_S:
            return False
        return not _run(_body().is_late(key))

    # Writing

    def _begin(self, data: Mapping[Any, Any]) -> None:
        """Begin a new session with this data."""
        named = _named(data)
        fields, user, options = to_fields(named, named), _user_of(data), self._options(data)
        if options["idle"] <= 0:  # it is over before it began
            self._before = encoded_values(named)
            return
        if user is not None:
            made = _run(self._logging_in(self._dead, user, fields, options))
        elif self._dead is not None:
            try:
                made = _run(_body().begin(self._dead, fields, idle=options["idle"]))
            except SessionEnded:
                if not self._sets_lifetime_alone(named.keys()):
                    raise
                self._before = encoded_values(named)
                return
        else:
            made = _run(_body().create(None, fields, **options))
        self._began(made, named)

    def _update(self, data: Mapping[Any, Any]) -> None:
        named = _named(data)
        keys = differing(self._known(), encoded_values(named))
        if self._logs_in_by(data):
            self._log_in_anew(data, named)
        elif self._has_other_user(data):
            self._begin_anew(data, named)
        elif EXPIRY in keys and not self._lives_as_long(data):
            try:
                self._begin_anew(data, named)
            except SessionEnded:
                if not self._sets_lifetime_alone(keys):
                    raise
        else:
            if keys:
                self._write(keys, named)
            if self._cycles:
                self._rotate()

    def _write(self, keys: set[str], given: Mapping[str, Any]) -> None:
        """Set and remove these keys; where another request was first, do to its data what was done to ours."""
        before, data = self._known(), given
        base = {key: decoded_value(before[key]) if key in before else GONE for key in keys}
        ours = {key: data.get(key, GONE) for key in keys}
        merges = any(map(_is_container, (*base.values(), *ours.values())))
        assert self._found is not None
        version = (self._version or self._found.version) if merges else None
        for _ in range(TRIES):
            kept = [key for key in keys if key in data]
            gone = [field_of(key) for key in keys if key not in data]
            fields = to_fields(data, kept)
            try:
                self._version = _run(
                    _body().update(self._session_key, fields, remove=gone, if_version=version)
                )
            except SessionConflict:
                theirs = _run(_body().get(self._session_key, touch=False))
                if theirs is None:
                    raise SessionEnded("missing") from None
                data = to_data(theirs.data)
                merged = merged_keys(base, ours, data)
                keys, version = set(merged), theirs.version
                data = {k: v for k, v in (data | merged).items() if v is not GONE}
            else:
                self._before = encoded_values(data)
                if data is not given:
                    self._show(data)
                return
        raise SessionConflict(version)

    def _show(self, data: Mapping[str, Any]) -> None:
        """Show another request's changes, from which this request goes on."""
        self._session_cache.clear()
        self._session_cache.update(data)

    def _begin_anew(self, data: Mapping[Any, Any], named: Mapping[str, Any]) -> None:
        """Begin a new session in place of the current one. Data that cannot be written leaves that as it was."""
        options = self._options(data)
        if options["idle"] <= 0:
            self.delete()
            return
        shown = self._with_theirs(named)
        made = _run(_body().succeed(self._session_key, _user_of(data), _all(shown), **options))
        self._began(made, shown)
        if shown is not named:
            self._show(shown)

    def _log_in_anew(self, data: Mapping[Any, Any], named: Mapping[str, Any]) -> None:
        """Begin a session for a login, whatever others did to the current one: a button may be clicked twice."""
        options, user = self._options(data), _user_of(data)
        assert user is not None
        if options["idle"] <= 0:
            self.delete()
            return
        shown = self._with_theirs(named)
        logging_in = self._logging_in(self._session_key, user, _all(shown), options)
        self._began(_run(logging_in), shown)
        if shown is not named:
            self._show(shown)

    def _with_theirs(self, named: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the data of the next session, with what others have added to this one since it was read."""
        if self._has_emptied:
            return named
        before, found = self._known(), self._found
        theirs = _run(_body().get(self._session_key, touch=False))
        if theirs is None or found is None or theirs.user_id != found.user_id:
            return named
        if theirs.version == found.version or found.user_id not in (None, _user_of(named)):
            return named
        keys = differing(before, encoded_values(named))
        base = {key: decoded_value(before[key]) if key in before else GONE for key in keys}
        data = to_data(theirs.data)
        merged = data | merged_keys(base, {key: named.get(key, GONE) for key in keys}, data)
        return {key: value for key, value in merged.items() if value is not GONE}

    def _logging_in(
        self, before: str | None, user: str, fields: Mapping[str, Any], options: dict[str, Any]
    ) -> Operation[Session[Any]]:
        return _body().log_in(before, user, fields, asked_us=self.asked_us, **options)

    def _rotate(self) -> None:
        made = _run(_body().renew(self._session_key, is_proof=self._confirms))
        self._session_key = made.token
        self._cycles = self._confirms = False

    def _began(self, made: Session[Any], data: Mapping[str, Any]) -> None:
        self._found, self._session_key, self._version = made, made.token, 1
        self._before, self._dead = encoded_values(data), None
        self._cycles = self._confirms = self._logs_in = self._has_emptied = False
        self._is_new = True

    def _options(self, data: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the options of a session with this data."""
        options: dict[str, Any] = {"idle": self._idle(data)}
        if _user_of(data) is not None:
            options["device"] = device_of(self.agent)
            is_login = self._logs_in_by(data) or self._has_other_user(data)
            options["fresh"] = self._confirms or is_login
        return options

    # Facts about the session

    def _known(self) -> Mapping[str, bytes]:
        """Return the data in Redis, read now where it was replaced without a look."""
        if self._before is None:
            self._found = self._found or room().sessions.get(self._session_key, touch=False)
            if self._found is None:
                raise SessionEnded("missing")
            # A copy of the data as it was read, because the request may change it in place.
            self._before = encoded_values(to_data(decoded(self._found.text, None)))
        return self._before

    def _sets_lifetime_alone(self, keys: AbstractSet[str]) -> bool:
        """Return whether this request sets the lifetime alone, which the first of several at once has done."""
        return self.is_in_request and not self._cycles and keys == {EXPIRY}

    def _logs_in_by(self, data: Mapping[Any, Any]) -> bool:
        """Return whether this data is of a login, as django.contrib.auth does one: a new key, and a user."""
        return self._logs_in and self._cycles and _user_of(data) is not None

    def _has_other_user(self, data: Mapping[Any, Any]) -> bool:
        known = None if self._found is None else self._found.user_id
        return known != _user_of(data)

    def _lives_as_long(self, data: Mapping[Any, Any]) -> bool:
        """Return whether Redis keeps the session for as long as set_expiry says, so that its key may stay.

        One that this request has begun may still get another kind of cookie: somebody may have noted its key.
        """
        found = self._found
        if self._is_new and found is not None:
            kept = found.expires_at - found.last_seen
            if abs(self._idle(data) - kept) < 1:
                return True
        return self._is_put_off(data)

    def _is_put_off(self, data: Mapping[Any, Any]) -> bool:
        """Return whether set_expiry has moved the session's moment, and Redis keeps the session for that long."""
        before, found = self._known().get(EXPIRY), self._found
        was = None if before is None else _moment_of({EXPIRY: decoded_value(before)})
        moment = _moment_of(data)
        if was is None or moment is None or found is None:
            return False
        left: float = self.get_expiry_age(expiry=moment)
        return 0 < left <= found.expires_at - found.last_seen

    def _idle(self, data: Mapping[Any, Any]) -> float:
        """Return the seconds that the session may be idle. 0 or less: it is over."""
        moment = _moment_of(data)
        idle = float(self.get_expiry_age(expiry=moment or data.get(EXPIRY)))
        if moment is not None and idle > 0:
            idle += PART * idle + SLACK_S
        return min(idle, _body().settings.session_absolute)


def _body() -> SessionsBody:
    return room().operations.sessions


def _run(operation: Operation[T]) -> T:
    return room().state.run(operation)


def _user_of(data: Mapping[Any, Any]) -> str | None:
    user = data.get(SESSION_KEY)
    return None if user is None else str(user)


def _moment_of(data: Mapping[Any, Any]) -> datetime | None:
    """Return the moment at which a session with this data ends. None: its lifetime counts from its last use."""
    expiry = data.get(EXPIRY)
    if isinstance(expiry, str):
        return datetime.fromisoformat(expiry)
    return expiry if isinstance(expiry, datetime) else None


def _is_over(data: Mapping[Any, Any]) -> bool:
    moment = _moment_of(data)
    return moment is not None and moment.timestamp() <= time.time()


def _named(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the data with text keys, as JSON would make them."""
    return {text_of(key): value for key, value in data.items()}


def _all(data: Mapping[str, Any]) -> dict[str, Any]:
    return to_fields(data, data)


def _is_container(value: Any) -> bool:
    return value is not GONE and type(value) not in FIXED
