"""Find the session that a call names, and tell who listens what becomes of it. See token.py for the names."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import SecretStr

from stillroom import pepper
from stillroom.errors import InvalidArgument, SessionEnded
from stillroom.keys import Keys, written
from stillroom.misuse import refuse_awaited
from stillroom.sessions.asking import Asking, steady_us
from stillroom.sessions.ends import NO_COOKIE, End
from stillroom.sessions.session import Session, SessionEvent
from stillroom.sessions.token import SECRET_BYTES, Pepper, Place, make_handle, make_token, place_of
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import Server, StateServer

log = logging.getLogger("stillroom.sessions")

Known = Session[Any] | SecretStr | str  # a session, its id, or the text of its cookie


class Named(Asking):
    """Find the places of sessions, and tell the listeners what became of them."""

    def __init__(
        self, settings: Settings, server: Server | StateServer, keys: Keys, stats: Stats
    ) -> None:
        super().__init__(settings, server, keys, stats)
        self.on_event: list[Callable[[SessionEvent], object]] = []
        self._peppers: tuple[Pepper, ...] = ()

    def _place(self, session: Known, *, denied: bool = False) -> Place | None:
        """Return the place of the session, or None for a text that is no token or a session that ended here."""
        place = place_of(
            session if isinstance(session, str) else token_of(session),
            self._peppers or self._ring(),
        )
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

    def _new_place(self, shard: int | None) -> tuple[str, Place]:
        """Make a token and its place.

        The record has the first name; other peppers' processes find it by another.
        """
        number = secrets.randbelow(self._shards) if shard is None else shard
        token = make_token(number, os.urandom(SECRET_BYTES))
        return token, Place(number, tuple([one.name(token.encode()) for one in self._ring()]))

    def _destroying(
        self, place: Place, cookie: int = NO_COOKIE, asked_us: int | None = None
    ) -> End:
        """Return the end of this session. `cookie` says what the response does to the browser's cookie."""
        asked = steady_us() if asked_us is None else asked_us
        return End(*self._keys.record(*place), asked, cookie)

    def _refused(self, place: Place, reply: Any) -> SessionEnded:
        """Return the reason why there is no session. What expired or was revoked has been counted as it ended."""
        reason = reply[0].decode()
        if reason == "replayed":
            self._tell_all(reason, place.shard, reply[1:])
        elif reason == "missing":
            self.stats.counts["sessions_missing"] += 1
        return SessionEnded(reason)

    def _tell_all(self, kind: str, shard: int, ended: Sequence[bytes]) -> None:
        """Count these and tell the listeners. `ended` is name, user, name, user …"""
        if not ended:
            return
        if kind != "new_device":  # it is counted as created
            self.stats.counts[f"sessions_{kind}"] += len(ended) // 2
        for name, user in zip(ended[::2], ended[1::2], strict=True):
            user_id = written(user) or None
            self._tell(SessionEvent(kind, make_handle(shard, name), user_id))

    def _tell(self, event: SessionEvent) -> None:
        log.info("session %s: handle=%s user=%a", event.kind, event.handle, event.user_id)
        for listener in self.on_event:
            try:
                refuse_awaited("on_event", listener)
                listener(event)
            except Exception:
                log.exception("a listener of session events failed")


def token_of(session: object) -> str:
    """Return the text of its cookie; empty for None. Raises InvalidArgument for what names no session."""
    if isinstance(session, Session):
        return session.token
    if session is None:  # there was no cookie
        return ""
    if not isinstance(session, str | SecretStr):
        raise InvalidArgument(
            f"{type(session).__name__}: give a session of `get` or `create`, its `id`, or the text of its cookie. "
            "What a list shows is ended by end(user_id, handle)"
        )
    return session.get_secret_value() if isinstance(session, SecretStr) else session
