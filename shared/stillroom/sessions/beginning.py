"""The creation of one session, and the end of the one it replaces: wherever it is cut off, not both live."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from stillroom.errors import SessionStoreUnavailable, is_in_doubt
from stillroom.operation import Once, Operation, Pause
from stillroom.scripts import session_create, session_free
from stillroom.sessions.asking import LOGOUT, Asking, replies_of, steady_us
from stillroom.sessions.ends import End, Undo, late_in
from stillroom.sessions.token import Place
from stillroom.wire import NodeAway

log = logging.getLogger("stillroom.sessions")

TRIES = 100  # of a login of a user with very many sessions: each clears some away
MOST = 5  # its place in `about`


class Beginning:
    """One creation.

    In the shard of the new session its script also ends the one it replaces. In another shard that one is held
    before, in the same batch, and ends after it. It is freed where the login is refused, as there are too many
    sessions or the server is full.
    """

    def __init__(
        self,
        asking: Asking,
        place: Place,
        names: Sequence[bytes],
        old: Place | None,
        ending: End | None,
        about: Sequence[bytes],
        fields: Sequence[bytes],
    ) -> None:
        """`about`, `fields`: the arguments of lua/session_create.lua."""
        self._asking = asking
        self._place = place
        self._names = names
        self._old = old
        self._ending = ending
        self._about = about
        self._fields = fields
        self._is_near = old is not None and old.shard == place.shard
        self._held = b""  # the name of the session that is held
        self.expired: list[bytes] = []  # name, user, name, user … of those that were cleared away

    def run(self) -> Operation[Any]:
        """Create the session, and return the script's reply: `ok` or `full`.

        Redis away: see SessionsBody.create.
        """
        try:
            if self._asking._keys.is_spread:
                yield from self._asking._say_shards_aside()
            reply, in_doubt = yield from self._create()
            # Also where none was held: the end tells slower responses that the browser is getting another cookie.
            if self._ending and reply[0] == b"ok" and (in_doubt or not self._is_near):
                yield from self._end()
        except BaseException as error:
            if is_in_doubt(error):
                self._give_up()
            elif isinstance(error, SessionStoreUnavailable):
                yield from self._free()
            raise
        if reply[0] != b"ok":
            yield from self._free()
        return reply

    def _create(self) -> Operation[tuple[Any, bool]]:
        """Return the reply, and whether the replaced session may live on because it was rotated meanwhile."""
        for _ in range(TRIES):
            sent = steady_us()
            way, reply = yield from self._send(sent)
            again = self._ending and self._after(self._late(way, reply), steady_us() - sent)
            if reply[0] == b"replaced" and again:
                self._ending = again  # nothing was begun; a rotation may have come after the asking
                continue
            if reply[0] != b"again":
                return reply, again is not None
            self.expired += reply[1]
            yield Pause(0)
        return (b"full", self._about[MOST]), False

    def _send(self, now: int) -> Operation[tuple[Any, Any]]:
        """Return the replies to the end of the replaced session, or None, and to the creation."""
        says, way = self._asking._saying_shards(), self._making_way(now)
        batch = [*says, *way, self._creating(now)]
        kept_as = LOGOUT if self._ending else ""  # the one to replace must not live on
        try:
            replies = yield from self._asking._ask(batch, Once, kept_as)
        except SessionStoreUnavailable as error:
            refused = replies_of(error, len(batch))
            self._note_held(refused)
            if _is_refused(refused) and error.reason != "noscript":
                raise  # whether the numbers of shards can be compared has nothing to do with it
            # The server lacked one of the scripts and had one behind it, so they would be out of order. It has all
            # of them now, and each that is sent again recognises itself.
            if error.reason != "noscript":
                self._asking._compare_no_more(error)
                says, batch = [], batch[len(says) :]
            replies = yield from self._once_more(batch, kept_as)
            began = refused[-1] if refused else None
            if isinstance(began, list) and began[0] == replies[-1][0] == b"ok":
                replies = [*replies[:-1], began]  # it told who ended for it, and of a new device
        if says:
            self._asking._have_said_shards(replies[0])
        return replies[-2] if way else None, replies[-1]

    def _once_more(self, batch: list[Any], kept_as: str) -> Operation[list[Any]]:
        """Return the replies to a batch of which a part was done already, whatever becomes of this one."""
        try:
            return (yield from self._asking._ask(batch, Once, kept_as))
        except SessionStoreUnavailable as error:
            replies = replies_of(error, len(batch))
            self._note_held(replies)
            # A script that was lost once more refuses nothing: it may have run in the first batch.
            if _is_refused(replies) and error.reason != "noscript":
                raise
            failure = SessionStoreUnavailable(error.reason, error.detail, may_be_done=True)
            raise failure from error

    def _making_way(self, now: int) -> list[Any]:
        if self._ending is None or self._is_near:
            return []
        return [self._ending.holding(now)]

    def _creating(self, now: int) -> Any:
        keys, aliases, age = self._names, b"%d" % (len(self._names) - 1), b"0"
        if self._ending:
            age = b"%d" % self._ending.age(now)
            keys = (*keys, *self._ending.keys) if self._is_near else keys
        return session_create(keys, *self._about, aliases, age, *self._fields)

    def _late(self, way: Any, reply: Any) -> int:
        """Return how many µs before this call the grace of the replaced name was over, or -1 if it was not."""
        if way is None:
            place = {b"ok": 4, b"replaced": 1}.get(reply[0])
            return -1 if place is None else int(reply[place])
        self._held = self._held or way[0]
        return late_in(way)

    def _note_held(self, replies: Sequence[Any]) -> None:
        """Remember which session is held, where a batch failed behind that."""
        is_held = self._ending is not None and not self._is_near
        if is_held and replies and isinstance(replies[-2], list):
            self._held = self._held or replies[-2][0]

    def _after(self, late: int, took: int) -> End | None:
        """Return the end to send after that exchange, or None: it is done, or there is none. See End.after."""
        return None if self._ending is None else self._ending.after(late, took)

    def _free(self) -> Operation[None]:
        """Free the replaced session: the login was refused, and the visitor goes on with it."""
        if not self._held or self._ending is None:
            return
        prefix = self._ending.prefix
        try:
            yield from self._asking._ask([session_free([prefix + b"s:" + self._held], prefix)])
        except SessionStoreUnavailable as error:
            log.warning("the session before a refused login could not be kept: %s", error)

    def _end(self) -> Operation[None]:
        """End the replaced session. The login is made, so no error here may fail it."""
        if self._ending is None or self._old is None:
            return
        try:
            yield from self._asking._end(self._ending)
        except SessionStoreUnavailable:
            self._asking._defer(self._old, self._ending)

    def _give_up(self) -> None:
        """Give up: nobody gets the token, so a session that began, or still may, is ended."""
        self._asking._defer(self._place, Undo((self._names[0],), self._about[0]))
        if self._old is not None and self._ending is not None:
            self._asking._defer(self._old, self._ending)


def _is_refused(replies: Sequence[Any]) -> bool:
    """Return whether the server refused the creation, the last of the batch.

    Nor was it done if it was sent before: the script would have recognised itself.
    """
    if not replies:
        return False
    return isinstance(replies[-1], Exception) and not isinstance(replies[-1], NodeAway)
