"""The session as one request sees it: read when it is looked at, written once, when the response begins.

`RequestSession` is what all faces share: who is logged in, and the operations that read and write the session.
What a request has done to the data is in session_data.py. Nothing is read for a request that does not look,
nothing written for one that changes nothing.

A cookie goes out only where the browser has to keep another one: a session begins, gets a new token, or ends. That
it was seen is the server's business: the cookie's age is the session's end in any case.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stillroom.durations import Duration, seconds_of
from stillroom.errors import (
    SessionConflict,
    SessionEnded,
    SessionNotFresh,
    SessionNotLoaded,
    SessionStoreUnavailable,
    SessionTooLate,
    SessionUnreadable,
    StillroomError,
)
from stillroom.misuse import explained
from stillroom.operation import AsyncDriver, Driver, Operation
from stillroom.sessions import (
    Session,
    SessionsBody,
    encoded_user,
    legible,
    not_fresh,
    steady_us,
)
from stillroom.web.agent import device_of
from stillroom.web.fields import field_of, to_data, to_fields
from stillroom.web.session_cookie import SessionCookie
from stillroom.web.session_data import SessionData

log = logging.getLogger("stillroom.web")

TRIES = 100  # to merge with other requests' writes: each lost try means that another request won
_SAYS_HTTPS = ("HTTP_X_FORWARDED_PROTO", "HTTP_FORWARDED")
CLEARS_WITHIN_S = 2.0  # a slower response might meet a login that never knew this cookie

# The names of the attributes that sessions of this process had so far: see _judge_attributes.
_judged: set[str] = set()


class Login(NamedTuple):
    """Whose the session shall be, and what `create` is told besides."""

    user_id: str
    options: Mapping[str, Any]


class RequestSession(SessionData):
    """A mapping of str to values, and who is logged in.

    Values are JSON, and tuples, sets, bytes, dates and times, Decimal, UUID and safe HTML, which keep their type.
    `login(user_id)` begins a new session under a new token, whatever cookie came in; the data of an anonymous
    session goes along, another user's does not. `logout()` and `clear()` end it. `renew()` gives it a new token:
    where rights change. `confirm()` does that too, and says that the user has just proved who he is. All of it is
    written together when the response begins; changes of one request leave other requests' keys alone, and what
    two requests add to one list or dict is both there.

    Raises SessionStoreUnavailable where Redis is away (answered with 503, the cookie left as it is), SessionTooLate
    for a change after the response has begun, SessionDataRefused for a key or value that can't be kept.
    """

    failure: StillroomError | None = None  # why it could not be read or written, or was refused
    is_over = False  # its app has raised: who answers in the app's place may look at it

    def __init__(
        self,
        body: SessionsBody,
        driver: Any,
        cookie: SessionCookie,
        token: str | None,
        request: Mapping[str, Any],
    ) -> None:
        """`driver` is that of the face. `request`: the environ or the scope."""
        self._body = body
        self._driver = driver
        self._cookie = cookie
        self._token = token
        self._request = request
        self._is_asked = token is None  # whether the session was read
        self._changed = set()
        self._gone = set()
        self._seen = {}

    # The cookie of the framework (Flask, Django) that took over a session which was read along with the limits.
    taken_by: SessionCookie | None = None
    # Whether a check of limits came by, which reads it along where the last request looked at it.
    rides = False

    # What most requests leave as it is.
    _found: Session[Any] | None = None
    _login: Login | None = None
    _is_renewed = False
    _is_confirmed = False
    _is_ended = False
    _is_written = False
    _set_cookie: str | None = None
    _touches = True  # whether to look at it keeps it alive
    # The keys whose values are not worth an error where the session was over before they were written.
    _may_be_lost: frozenset[str] = frozenset()
    _looked_at = 0.0  # time.monotonic(), where the cookie opened nothing
    _asked_us: int | None = None  # when it was read, by this machine's steady clock

    # The app's view

    @property
    def user_id(self) -> str | None:
        """Return the user who is logged in; None: nobody."""
        self._look()
        if self._login:
            return self._login.user_id
        return self._found.user_id if self._found and not self._is_ended else None

    @property
    def found(self) -> Session[Any] | None:
        """Return the session as it was read: its handle, times, tags and meta. None: there was none."""
        self._look()
        return self._found

    @explained
    def login(
        self,
        user_id: str,
        *,
        tags: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        idle: Duration | None = None,
        absolute: Duration | None = None,
        max_per_user: int | None = None,
        on_cap: str = "evict_oldest",
        device: str | None = None,
        fresh: bool = True,
    ) -> None:
        """Log this user in. The options are those of `room.sessions.create`.

        `user_id`: up to 1,024 bytes of text, not empty; InvalidKey for anything else.
        What must not outlive a login (`session_login_drops`: CSRF tokens) is dropped. Without `device=` the device
        is the browser and its system, from the User-Agent without its versions; `device=""` is none.
        """
        options: dict[str, Any] = {
            "tags": tags,
            "meta": meta,
            "max_per_user": max_per_user,
            "on_cap": on_cap,
        }
        given = {"idle": idle, "absolute": absolute, "device": device}
        options |= {name: one for name, one in given.items() if one is not None}
        self._begin_login(Login(user_id, {**options, "fresh": fresh}))

    def _begin_login(self, login: Login) -> None:
        user_id = login.user_id
        encoded_user(user_id)  # which refuses what is no user
        before = self.user_id
        self._change()
        if before not in (None, user_id):
            self._empty()
        for key in self._dropped_at_login():
            self.pop(key, None)
        self._login, self._is_ended = login, False

    def logout(self) -> None:
        """End the session: its data is gone, the browser forgets the cookie."""
        self._look()
        self._change()
        self._empty()
        self._login, self._is_renewed, self._is_ended = None, False, True

    def clear(self) -> None:
        """Drop all data, and who is logged in: a logout. What is set afterwards begins a new session."""
        self.logout()

    def renew(self) -> None:
        """Give the session a new token; the old one opens nothing any more."""
        self._look()
        self._change()
        self._is_renewed = True

    def confirm(self) -> None:
        """Note that the user has just proved again who they are: the session is fresh, under a new token. See
        `require_fresh`."""
        self.renew()
        self._is_confirmed = True

    def is_fresh(self, seconds: Duration) -> bool:
        """Tell whether the user proved within so many seconds who they are: by logging in, or by `confirm`."""
        seconds = seconds_of("seconds", seconds, least=0)
        if self.user_id is None:
            return False
        if self._login or self._is_confirmed:
            return self._is_confirmed or bool(
                self._login and self._login.options.get("fresh", True)
            )
        return self._found is not None and self._found.is_fresh(seconds)

    def require_fresh(self, seconds: Duration) -> None:
        """Raise SessionNotFresh unless `is_fresh`: a sensitive page asks again. Unhandled, it is answered with
        401."""
        seconds = seconds_of("seconds", seconds, least=0)
        if not self.is_fresh(seconds):
            found = self._found
            self.failure = (
                SessionNotFresh(seconds, None) if found is None else not_fresh(found, seconds)
            )
            raise self.failure

    # The middleware's view

    @property
    def is_looked_at(self) -> bool:
        """Return whether the response depends on the cookie."""
        return self._data is not None or self.failure is not None

    @property
    def is_loaded(self) -> bool:
        """Return whether the app may look at the session without anything being read."""
        return self._data is not None

    @property
    def is_read(self) -> bool:
        """Return whether looking at the session takes no round trip (any more)."""
        return self._is_asked

    @property
    def is_unknown(self) -> bool:
        """Return whether the token looked like one of ours, and opened nothing."""
        return self._token is not None and self._is_asked and self._found is None

    @property
    def unknown_token(self) -> str | None:
        """Return the token that came, if it opened nothing."""
        return self._token if self.is_unknown else None

    @property
    def is_lost(self) -> bool:
        """Return whether a list or dict was changed after the session was written. Nobody will see that change."""
        return self._is_written and bool(self._altered())

    @property
    def token(self) -> str | None:
        """Return the token that came in the cookie."""
        return self._token

    @property
    def cookie(self) -> SessionCookie:
        return self._cookie

    @property
    def is_over_http(self) -> bool:
        """Return whether the request came over plain http, as far as the app can know."""
        raise NotImplementedError

    def has_read(self, body: SessionsBody, token: str | None) -> bool:
        """Return whether the session of this token was read along with the limits: then `was_read` holds it."""
        return self._is_asked and token is not None and (body, token) == (self._body, self._token)

    @property
    def asked_us(self) -> int | None:
        """Return when the session was read, µs of this machine's steady clock. None: it was not."""
        return self._asked_us

    @property
    def was_read(self) -> Session[Any] | None:
        """Return the session that reading has found so far."""
        return self._found

    def adopt(self, other: RequestSession) -> None:
        """Take over what another one has read."""
        if other.has_read(self._body, self._token):
            self._found, self._is_asked = other.was_read, True
            self._asked_us = other.asked_us

    def reading(self) -> Operation[None]:
        """Read it, unless that was done. Raises SessionStoreUnavailable."""
        if self._data is None:
            try:
                yield from self.prefetching()
            except StillroomError as error:
                self._fail(error)
                raise
            self._open()

    def _fail(self, error: StillroomError) -> None:
        """Note why the session could not be read."""
        self.failure = error

    def _open(self) -> None:
        """Let the app look at what was read.

        Tasks and threads of one request may come here together: all of them get what the first one has opened,
        because it may have been changed already.
        """
        found = self._found = legible(self._found, tell_of_unreadable)
        data = {} if found is None else to_data(found.data)
        vars(self).setdefault("_data", data)  # in one step, also between threads
        if self.is_unknown:
            self._looked_at = time.monotonic()

    def prefetching(self) -> Operation[None]:
        """Prefetch the session. An error counts only if the app looks at the session."""
        if self._token is not None and not self._is_asked:
            asked_us, found = steady_us(), None
            try:
                found = yield from self._body.get(self._token, touch=self._touches)
            except SessionUnreadable as error:
                tell_of_unreadable(error)
            if not self._is_asked:  # by another task of this request
                self._asked_us, self._found, self._is_asked = asked_us, found, True

    def reading_ahead(self) -> Operation[None]:
        """Prefetch the session without raising. An app that looks at the session is told of a failure."""
        try:
            yield from self.prefetching()
        except StillroomError:
            return

    def writing(self) -> Operation[str | None]:
        """Write what the request has changed, unless that was done. Return the Set-Cookie header this takes.

        Nothing can be changed afterwards.
        """
        if not self._is_written:
            self._judge_attributes()  # of a websocket, say, for which `is_left` is not asked
            self._is_written = True
            if self._data is not None:
                self._changed |= self._altered()
                self._settle()
            try:
                self._set_cookie = yield from self._writing()
            except SessionConflict as error:  # another request has just given it a new token
                self.failure = SessionEnded("rotated")
                raise self.failure from error
            except (SessionStoreUnavailable, SessionEnded) as error:
                self.failure = error
                raise
            if self._changed:
                self._remember()
        return self._set_cookie

    def is_left(self) -> bool:
        """Return whether there is nothing to write. Then nothing can be changed afterwards, as after `writing`."""
        if not self.__dict__.keys() <= _judged:
            self._judge_attributes()
        if self._is_written or self.failure is not None:
            return False
        if self._data is not None and self._may_write():
            return False
        self._is_written = True
        return True

    def _judge_attributes(self) -> None:
        """Log once for each name what the app has set on its session, where a key was meant. A class of the app's
        own may have attributes."""
        kind = type(self)
        for name in self.__dict__.keys() - _judged:
            _judged.add(name)
            is_known = name.startswith("_") or hasattr(kind, name)
            if not is_known and kind.__module__.startswith("stillroom."):
                log.error(
                    "session.%s = … is lost with its request: a session keeps its items, not attributes; "
                    'did you mean session["%s"] = …?',
                    *(name, name),
                )

    def drop(self) -> bool:
        """Write nothing any more: the request failed. Return whether there was anything to write."""
        has_changed = not self._is_written and self.has_changed
        self._is_written = True
        return has_changed

    @property
    def has_changed(self) -> bool:
        """Return whether the request has changed anything."""
        return self._has_acted or bool(self._seen and self._altered())

    @property
    def _has_acted(self) -> bool:
        """Return whether the request has acted, apart from lists and dicts that were changed in place."""
        return bool(
            self._changed
            or self._gone
            or self._mutated
            or self._login
            or self._is_ended
            or self._is_renewed
        )

    # Writing

    def _may_write(self) -> bool:
        """Return whether `_writing` has something to do. A cookie that opened nothing is forgotten."""
        return self.has_changed or (self._looked_at != 0.0 and self.is_unknown)

    def _writing(self) -> Operation[str | None]:
        if self._is_ended and not self._data:
            return (yield from self._ending())
        if self._login or self._is_ended or (self._found is None and self._data):
            return (yield from self._beginning())
        if self._found is None:
            return (yield from self._forgetting()) if self.is_unknown and self._looked_at else None
        if self._changed or self._gone or self._mutated:
            yield from self._updating()
        if self._is_renewed:
            return (yield from self._renewing())
        return None

    def _ending(self) -> Operation[str | None]:
        if self._token is None:
            return None
        if (yield from self._body.log_out(self._token, asked_us=self._asked_us)):
            return self._cookie.clear()
        return (yield from self._forgetting())

    def _forgetting(self) -> Operation[str | None]:
        """Forget a cookie that opens nothing, unless the browser is just getting another one: the response
        to a login may have overtaken this one."""
        assert self._token is not None
        if self._looked_at and time.monotonic() - self._looked_at > CLEARS_WITHIN_S:
            return None  # its next request does it
        try:
            is_late = yield from self._body.is_late(self._token)
        except SessionStoreUnavailable:
            return None
        return None if is_late else self._cookie.clear()

    def _beginning(self) -> Operation[str | None]:
        """Begin a new session; the current one, if any, ends with it."""
        data: Mapping[str, Any] = self._data or {}
        if self._found is not None and not (self._is_ended or self._has_emptied):
            data = yield from self._with_theirs(data)
        try:
            made = yield from self._begun(to_fields(data, data))
        except SessionEnded:
            if self._unwritten() <= self._may_be_lost:
                return None  # a logout, say, that was clicked twice
            raise
        return self._cookie.write(made.token, self._kept_for(made))

    def _with_theirs(self, data: Mapping[str, Any]) -> Operation[Mapping[str, Any]]:
        """Return the data of the next session, with what others have added to this one since it was read.

        To look at a password takes long enough for the page to put something into the cart.
        """
        assert self._token is not None
        assert self._found is not None
        found = self._found
        theirs = yield from self._body.get(self._token, touch=False)
        if theirs is None or theirs.user_id != found.user_id or theirs.version == found.version:
            return data
        merged = self._redone_on(to_data(theirs.data))[1]
        dropped = set(self._dropped_at_login() if self._login else ()) - data.keys()
        return {key: value for key, value in merged.items() if key not in dropped}

    def _unwritten(self) -> set[str]:
        """Return the keys of the changes that are lost if no session begins."""
        return self._changed | self._mutated

    def _begun(self, fields: Mapping[str, Any]) -> Operation[Session[Any]]:
        if self._login:
            user_id, options = self._login
            given = {"device": device_of(self._agent()), **self._options(), **options}
            given["asked_us"] = self._asked_us
            made: Session[Any] = yield from self._body.log_in(self._token, user_id, fields, **given)
        elif self._token is None:
            made = yield from self._body.create(None, fields, **self._options())
        else:
            own = {**self._options(), "ends": self._is_ended, "asked_us": self._asked_us}
            made = yield from self._body.begin(self._token, fields, **own)
        return made

    def _updating(self) -> Operation[None]:
        """Write what changed, merged with what another request has written since this one has read."""
        assert self._token is not None
        assert self._found is not None
        assert self._data is not None
        keys = self._changed | self._gone | self._mutated
        data: Mapping[str, Any] = self._data
        version = self._found.version if self._merges(keys) else None
        for _ in range(TRIES):
            kept = [key for key in keys if key in data]
            gone = [field_of(key) for key in keys if key not in data]
            try:
                yield from self._body.update(
                    self._token, to_fields(data, kept), remove=gone, if_version=version
                )
            except SessionConflict as conflict:
                version = conflict.current
            else:
                return
            keys, data, version = yield from self._merging()
        raise SessionConflict(version)

    def _merging(self) -> Operation[tuple[set[str], dict[str, Any], int]]:
        """Return (keys to write, the data to write, its version): this request's changes, on the newest data."""
        assert self._token is not None
        theirs = yield from self._body.get(self._token, touch=False)
        if theirs is None:
            raise SessionEnded("missing")
        keys, data = self._redone_on(to_data(theirs.data))
        return keys, data, theirs.version

    def _renewing(self) -> Operation[str]:
        """Renew the token after the changes, so that refused changes leave the browser's token good."""
        assert self._token is not None
        made = yield from self._body.renew(self._token, is_proof=self._is_confirmed)
        return self._cookie.write(made.token, self._kept_for(made))

    # Answers that a framework may overrule

    def _settle(self) -> None:
        """Settle the request: its changes are known now."""

    def _options(self) -> dict[str, Any]:
        """Return the options of a new session."""
        return {}

    def _kept_for(self, made: Session[Any]) -> float | None:
        """Return the seconds for which the browser keeps the cookie, or None until it is closed."""
        return made.ends_by - made.read_at if self._cookie.persistent else None

    def _dropped_at_login(self) -> tuple[str, ...]:
        return self._body.settings.session_login_drops

    def _agent(self) -> str:
        """Return the User-Agent."""
        raise NotImplementedError

    # Small things

    def _change(self) -> None:
        if self._is_written:
            raise SessionTooLate(
                "the session can't be changed any more: the response has begun, save() was called, or the request "
                "has failed. Change it before that, or in a request of its own"
            )


class WebSession(RequestSession):
    """For threads and greenlets: it is read by the first look at it.

    `save()` writes it before the response begins, where what that raises is to be handled (TooManySessions …).
    """

    _driver: Driver

    def save(self) -> None:
        """Write it now. Nothing can be changed afterwards."""
        self._driver.run(self.writing())

    @property
    def is_over_http(self) -> bool:
        said = [str(self._request.get(name, "")) for name in _SAYS_HTTPS]
        return self._request.get("wsgi.url_scheme") == "http" and "https" not in "".join(said)

    def _agent(self) -> str:
        return str(self._request.get("HTTP_USER_AGENT", ""))

    def _look(self) -> dict[str, Any]:
        if self._data is None:
            if self._is_asked:
                self._open()
            else:
                self._driver.run(self.reading())
        assert self._data is not None
        return self._data


class AsyncWebSession(RequestSession):
    """For asyncio: `session = await request_session.load()` first, and then as any other."""

    _driver: AsyncDriver

    async def load(self) -> AsyncWebSession:
        """Read it, unless that was done; one round trip at the most, none without a cookie of ours."""
        if self._data is None and self._is_asked:
            self._open()
        else:
            await self._driver.run(self.reading())
        return self

    async def save(self) -> None:
        """Write it now. Nothing can be changed afterwards."""
        await self._driver.run(self.writing())

    @property
    def is_over_http(self) -> bool:
        said = self._header(b"x-forwarded-proto") + self._header(b"forwarded")
        return self._request.get("scheme", "http") in ("http", "ws") and "https" not in said

    def _agent(self) -> str:
        return self._header(b"user-agent")

    def _header(self, wanted: bytes) -> str:
        found = [value for name, value in self._request["headers"] if name == wanted]
        return b", ".join(found).decode("latin-1")

    def _look(self) -> dict[str, Any]:
        if self._data is None:
            raise SessionNotLoaded("await session.load() before looking at the session")
        return self._data


def tell_of_unreadable(error: SessionUnreadable) -> None:
    """Log that a request goes on as if its session had ended: its visitor could do nothing about it."""
    log.error("a session can't be read, and is taken for one that has ended: %s", error)
