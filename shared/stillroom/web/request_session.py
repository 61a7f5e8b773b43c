"""The session as one request sees it: read when it is looked at, written once, when the response begins.

`RequestSession` is what both faces share: what the request has done to the session, and the operations that read
and write it. Nothing is read for a request that does not look, nothing written for one that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from pydantic_core import to_json

from stillroom.errors import (
    SessionEnded,
    SessionNotLoaded,
    SessionStoreUnavailable,
    SessionTooLate,
    StillroomError,
)
from stillroom.operation import AsyncDriver, Driver, Failed, Operation, together
from stillroom.sessions import Session, SessionsBody
from stillroom.web.fields import field_of, key_of
from stillroom.web.session_cookie import SessionCookie


class Login(NamedTuple):
    """Whose the session shall be, and what `create` is told besides."""

    user_id: str
    options: Mapping[str, Any]


class RequestSession(MutableMapping[str, Any]):
    """A mapping of str to JSON values, and who is logged in.

    `login(user_id)` begins a new session under a new token, whatever cookie came in; the data of an anonymous
    session goes along, another user's does not. `logout()` ends it. `renew()` gives it a new token: where rights
    change. All of it is written together when the response begins; changes of one request leave other requests'
    keys alone.

    Raises SessionStoreUnavailable where Redis is away (answered with 503, the cookie left as it is), SessionTooLate
    for a change after the response has begun, SessionDataRefused for a key or value that can't be kept.
    """

    failure: StillroomError | None = None  # why it could not be read or written

    def __init__(self, body: SessionsBody, cookie: SessionCookie, token: str | None) -> None:
        self._body = body
        self._cookie = cookie
        self._token = token
        self._found: Session[Any] | None = None
        self._is_asked = token is None  # whether Redis has said what there is
        self._data: dict[str, Any] | None = None  # None: not looked at
        self._changed: set[str] = set()
        self._gone: set[str] = set()
        self._handed_out: dict[str, bytes] = {}  # lists and dicts as they were, as JSON
        self._login: Login | None = None
        self._is_renewed = False
        self._is_ended = False
        self._is_written = False
        self._set_cookie: str | None = None

    # What the app sees

    @property
    def user_id(self) -> str | None:
        """Who is logged in; None: nobody."""
        self._look()
        if self._login:
            return self._login.user_id
        return self._found.user_id if self._found and not self._is_ended else None

    @property
    def found(self) -> Session[Any] | None:
        """The session as it was read: its handle, times, tags and meta. None: there was none."""
        self._look()
        return self._found

    def login(self, user_id: str, **options: Any) -> None:
        """This user is logged in from now on. `options` are those of `room.sessions.create`: tags, meta, idle …"""
        before = self.user_id
        self._change()
        if before not in (None, user_id):
            self.clear()
        self._login, self._is_ended = Login(user_id, options), False

    def logout(self) -> None:
        """The session ends, its data is gone, the browser forgets the cookie."""
        self._look()
        self._change()
        self.clear()
        self._login, self._is_ended = None, True

    def renew(self) -> None:
        """Give the session a new token; the old one opens nothing any more."""
        self._look()
        self._change()
        self._is_renewed = True

    def __getitem__(self, key: str) -> Any:
        value = self._look()[key]
        if isinstance(value, list | dict) and key not in self._changed | self._handed_out.keys():
            self._handed_out[key] = to_json(value)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        field_of(key)
        data = self._look()
        self._change()
        data[key] = value
        self._changed.add(key)
        self._gone.discard(key)

    def __delitem__(self, key: str) -> None:
        data = self._look()
        self._change()
        del data[key]
        self._changed.discard(key)
        self._gone.add(key)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._look()))

    def __len__(self) -> int:
        return len(self._look())

    def __repr__(self) -> str:
        state = "not looked at" if self._data is None else f"{len(self._data)} keys"
        return f"<{type(self).__name__}: {state}>"

    # What middleware sees

    @property
    def is_looked_at(self) -> bool:
        """Whether the response depends on the cookie."""
        return self._data is not None or self.failure is not None

    @property
    def is_read(self) -> bool:
        """Whether looking at it takes no round trip (any more)."""
        return self._is_asked

    @property
    def is_unknown(self) -> bool:
        """Whether the token looked like one of ours, and opened nothing."""
        return self._token is not None and self._is_asked and self._found is None

    @property
    def is_lost(self) -> bool:
        """Whether a list or dict in it was changed after it was written: nobody will see that."""
        return self._is_written and bool(self._altered())

    def reading(self) -> Operation[None]:
        """Read it, unless that was done. Raises SessionStoreUnavailable."""
        if self._data is None:
            try:
                yield from self.prefetching()
            except StillroomError as error:
                self.failure = error
                raise
            self._data = {} if self._found is None else _keys_of(self._found.data)

    def prefetching(self) -> Operation[None]:
        """Have it ready for who looks at it. A failure is no failure before somebody does."""
        if self._token is not None and not self._is_asked:
            self._found = yield from self._body.get(self._token)
            self._is_asked = True

    def writing(self) -> Operation[str | None]:
        """Write what the request has changed, unless that was done; the Set-Cookie header this takes.

        Nothing can be changed afterwards.
        """
        if not self._is_written:
            self._is_written = True
            self._changed |= self._altered()
            try:
                self._set_cookie = yield from self._writing()
            except (SessionStoreUnavailable, SessionEnded) as error:
                self.failure = error
                raise
            self._remember()
        return self._set_cookie

    def drop(self) -> bool:
        """Write nothing any more: the request failed. Whether there was anything to write."""
        has_changed = not self._is_written and self._has_changed()
        self._is_written = True
        return has_changed

    # Writing

    def _writing(self) -> Operation[str | None]:
        if self._is_ended and not self._data:
            return (yield from self._ending())
        if self._login or self._is_ended or (self._found is None and self._data):
            return (yield from self._beginning())
        if self._found is None:
            return None
        if self._is_renewed:
            return (yield from self._renewing())
        if self._changed or self._gone:
            yield from self._updating()
        elif not self._found.was_touched:
            return None
        return self._kept(self._found)

    def _ending(self) -> Operation[str | None]:
        if self._token is None:
            return None
        yield from self._body.destroy(self._token)
        return self._cookie.clear()

    def _beginning(self) -> Operation[str]:
        """A new session; the one before, if there was one, ends with it."""
        user_id, options = self._login or (None, {})
        data = {field_of(key): value for key, value in (self._data or {}).items()}
        made = yield from self._body.create(user_id, data, replaces=self._token, **options)
        return self._cookie.write(made.token, _life(made))

    def _updating(self) -> Operation[int]:
        assert self._token is not None
        assert self._data is not None
        changed = {field_of(key): self._data[key] for key in self._changed}
        return (
            yield from self._body.update(self._token, changed, remove=map(field_of, self._gone))
        )

    def _renewing(self) -> Operation[str]:
        """First the changes, then the new token: the server does both in one batch, in this order."""
        assert self._token is not None
        rotating = self._body.rotate(self._token, grace=0)
        acts = [self._updating(), rotating] if self._changed or self._gone else [rotating]
        outcomes = yield from together(*acts)
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                raise outcome.error
        return self._cookie.write(outcomes[-1].token, _life(outcomes[-1]))

    def _kept(self, found: Session[Any]) -> str | None:
        """The cookie again, with the time it has from now. Not under a token that was rotated away: a response that
        is late would put it back over the new one."""
        if not self._body.is_current(found):
            return None
        return self._cookie.write(found.token, _life(found))

    # Small things

    def _look(self) -> dict[str, Any]:
        raise NotImplementedError

    def _change(self) -> None:
        if self._is_written:
            raise SessionTooLate(
                "the response has begun: change the session before it, or in a request of its own"
            )

    def _has_changed(self) -> bool:
        asked = self._login or self._is_ended or self._is_renewed
        return bool(asked or self._changed or self._gone or self._altered())

    def _remember(self) -> None:
        """The lists and dicts as they were written: see is_lost."""
        data = self._data or {}
        kept = [key for key in self._changed | self._handed_out.keys() if key in data]
        self._handed_out = {
            key: to_json(data[key]) for key in kept if isinstance(data[key], list | dict)
        }
        self._changed = set()

    def _altered(self) -> set[str]:
        """The lists and dicts that were changed in place."""
        data = self._data or {}
        return {
            key
            for key, before in self._handed_out.items()
            if key in data and key not in self._changed and to_json(data[key]) != before
        }


class WebSession(RequestSession):
    """For threads and greenlets: it is read by the first look at it.

    `save()` writes it before the response begins, where what that raises is to be handled (TooManySessions …).
    """

    def __init__(
        self, body: SessionsBody, driver: Driver, cookie: SessionCookie, token: str | None
    ) -> None:
        super().__init__(body, cookie, token)
        self._driver = driver

    def save(self) -> None:
        """Write it now. Nothing can be changed afterwards."""
        self._driver.run(self.writing())

    def _look(self) -> dict[str, Any]:
        if self._data is None:
            self._driver.run(self.reading())
        assert self._data is not None
        return self._data


class AsyncWebSession(RequestSession):
    """For asyncio: `session = await request_session.load()` first, and then as any other."""

    def __init__(
        self, body: SessionsBody, driver: AsyncDriver, cookie: SessionCookie, token: str | None
    ) -> None:
        super().__init__(body, cookie, token)
        self._driver = driver

    async def load(self) -> AsyncWebSession:
        """Read it, unless that was done; one round trip at the most, none without a cookie of ours."""
        await self._driver.run(self.reading())
        return self

    async def save(self) -> None:
        """Write it now. Nothing can be changed afterwards."""
        await self._driver.run(self.writing())

    def _look(self) -> dict[str, Any]:
        if self._data is None:
            raise SessionNotLoaded("await session.load() before looking at the session")
        return self._data


def _keys_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key_of(field): value for field, value in fields.items()}


def _life(session: Session[Any]) -> float:
    """Seconds from when it was seen to its end."""
    return session.expires_at - session.last_seen
