"""Django's sessions in the room: `SESSION_ENGINE = "stillroom.web.django.sessions"`.

The session key is a token, and Redis holds no more than its HMAC. Who Django says is logged in is the session's
user, so `room.sessions.list_for_user(str(user.pk))` and `destroy_for_user` work.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.base import CreateError, SessionBase, UpdateError
from pydantic_core import to_json

from stillroom.errors import SessionConflict, SessionEnded
from stillroom.sessions import Session, Sessions
from stillroom.web.django import room
from stillroom.web.fields import field_of, key_of

EXPIRY = "_session_expiry"  # what set_expiry writes


class SessionStore(SessionBase):
    """Data is JSON, whatever SESSION_SERIALIZER says. Only the keys that changed are written.

    A session's user and lifetime are fixed when it begins: where the data says another user, or set_expiry another
    time, `save` begins a new one in its place, under a new key. It lives for `get_expiry_age()` seconds after it
    was seen last, and for the room's session_absolute (7 d) in any case.

    Redis away: SessionStoreUnavailable (middleware.py answers it with 503), never an empty session.
    """

    _session_key: Any  # a property of SessionBase
    _found: Session[Any] | None = None
    _before: Mapping[str, bytes] | None = None  # what Redis holds, as far as this request knows

    def load(self) -> dict[str, Any]:
        """The data. A key that opens nothing is forgotten; what no token looks like costs no round trip."""
        self._found = _sessions().get(self.session_key) if self.session_key else None
        if self._found is None:
            self._session_key = None
            return {}
        data = {key_of(field): value for field, value in self._found.data.items()}
        self._before = _encoded(data)
        return data

    def exists(self, session_key: str | None) -> bool:
        return bool(session_key) and _sessions().get(session_key or "", touch=False) is not None

    def create(self) -> None:
        """Begin an empty session, at once."""
        self._session_key = None
        self._begin({})
        self._session_cache: dict[str, Any] = {}
        self.modified = True

    def save(self, must_create: bool = False) -> None:
        """Write what changed. Raises UpdateError if the session has ended meanwhile."""
        data: dict[str, Any] = self._get_session(no_load=must_create)
        if must_create and self.session_key and self.exists(self.session_key):
            raise CreateError
        if must_create or self.session_key is None:
            self._begin(data)
        else:
            self._update(data)

    def delete(self, session_key: str | None = None) -> None:
        key = session_key or self.session_key
        if key:
            _sessions().destroy(key)

    def cycle_key(self) -> None:
        """The same session under a new key; the old one opens nothing any more."""
        data = self._get_session()
        if self.session_key is None:
            self._begin(data)
        else:
            try:
                self._session_key = _sessions().rotate(self.session_key, grace=0).token
            except (SessionEnded, SessionConflict) as error:
                raise UpdateError from error
        self.modified = True

    async def acycle_key(self) -> None:
        await sync_to_async(self.cycle_key)()

    @classmethod
    def clear_expired(cls) -> None:
        """What the worker does each minute."""
        room().upkeep.sweep_sessions()

    def _begin(self, data: Mapping[str, Any]) -> None:
        """A new session with this data."""
        user = data.get(SESSION_KEY)
        fields = {field_of(key): value for key, value in data.items()}
        self._before = _encoded(data)
        idle = self._idle(data)
        if idle > 0:  # else it is over before it began
            user_id = None if user is None else str(user)
            self._found = _sessions().create(user_id, fields, idle=idle)
            self._session_key = self._found.token

    def _update(self, data: Mapping[str, Any]) -> None:
        before = self._known()
        after = _encoded(data)
        changed = {key for key, text in after.items() if before.get(key) != text}
        gone = before.keys() - after.keys()
        if EXPIRY in changed | gone or self._has_other_user(data):
            self._begin_anew(data)
            return
        fields = {field_of(key): data[key] for key in changed}
        try:
            _sessions().update(self.session_key, fields, remove=map(field_of, gone))
        except SessionEnded as error:
            raise UpdateError from error
        self._before = after

    def _begin_anew(self, data: Mapping[str, Any]) -> None:
        """Only in the place of one that lives: who ends it first decides, so a logout meanwhile is not undone."""
        if not _sessions().destroy(self.session_key):
            raise UpdateError
        self._begin(data)

    def _known(self) -> Mapping[str, bytes]:
        """What Redis holds; asked for where the data was replaced without having been looked at."""
        if self._before is None:
            self._found = _sessions().get(self.session_key, touch=False)
            if self._found is None:
                raise UpdateError
            self._before = _encoded({key_of(f): v for f, v in self._found.data.items()})
        return self._before

    def _has_other_user(self, data: Mapping[str, Any]) -> bool:
        user = data.get(SESSION_KEY)
        known = None if self._found is None else self._found.user_id
        return known != (None if user is None else str(user))

    def _idle(self, data: Mapping[str, Any]) -> float:
        """Seconds the session may go unseen."""
        expiry = data.get(EXPIRY)
        if isinstance(expiry, str):
            expiry = datetime.fromisoformat(expiry)
        return float(self.get_expiry_age(expiry=expiry))


def _sessions() -> Sessions:
    return room().sessions


def _encoded(data: Mapping[str, Any]) -> dict[str, bytes]:
    return {key: to_json(value) for key, value in data.items()}
