"""Asks Redis for the sessions' operations.

It knows what Redis has to be told before, which shards there are, and since when something is asked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from stillroom.agreed import FIELDS_LIMIT, Rule, this_process
from stillroom.errors import (
    OF_THE_COMMAND,
    READS_ONLY,
    REFUSED_FOR_GOOD,
    RedisRefused,
    RedisUnavailable,
    SessionStoreUnavailable,
    partly_done,
)
from stillroom.keys import Keys
from stillroom.operation import Once, Operation, Pause
from stillroom.replicas import kept
from stillroom.scripts import agree
from stillroom.sessions.ends import End, Undo, late_in
from stillroom.sessions.token import SHARDS_LIMIT, Place
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.whole import number_in
from stillroom.wire import STEADY, Command, Server, StateServer, refusal

log = logging.getLogger("stillroom.sessions")

DEFERRED_LIMIT = 10_000
DEFERRED_BITE = 100
LOGOUT, ROTATION = "a logout", "a rotation"  # their names in the error where no replica has them
ASK_AGAIN_S = 5.0
SHARDS_SAID_S = 60.0  # how often a process says how many shards it has


class Asking:
    """Ask Redis, for all operations of the sessions."""

    def __init__(
        self, settings: Settings, server: Server | StateServer, keys: Keys, stats: Stats
    ) -> None:
        self.settings = settings
        self.stats = stats
        self._server = server
        self._keys = keys
        self._shards = settings.session_shards
        self._known_shards = self._shards  # the most that any process has said
        self._says_shards_at = 0.0  # time.monotonic()
        self._may_compare = True  # until Redis says that this user may not
        self._deferred: dict[Place, End | Undo] = {}

    def _ask(
        self,
        batch: Sequence[Command],
        kind: Callable[[Sequence[Command]], list[Command]] = list,
        kept_as: str = "",
    ) -> Operation[list[Any]]:
        """Return the replies. What has to be told first is told first; counts that are due ride along behind.

        `kept_as`: what the batch is called where it is to be on replicas when this returns.
        """
        if self._deferred:
            yield from self._tell_ends_first()
        if batch and time.monotonic() <= self.stats.due:  # as nearly always
            try:
                if kept_as and self.settings.replicas:
                    return (yield from self._on_replicas(kind(batch), kept_as))
                return (yield kind(batch))  # type: ignore[no-any-return]
            except RedisUnavailable as error:
                raise SessionStoreUnavailable.of(error) from error
        return (yield from self._ask_with_counts(batch, kind, kept_as))

    def _on_replicas(self, batch: list[Command], what: str) -> Operation[list[Any]]:
        return kept(batch, self.settings.replicas, self.stats, what)

    def _ask_with_counts(
        self,
        batch: Sequence[Command],
        kind: Callable[[Sequence[Command]], list[Command]],
        kept_as: str,
    ) -> Operation[list[Any]]:
        """Ask with the counts that are due. Once: no count is added twice, and no event is written twice."""
        flush = self.stats.flush(self._server.now_ms()) if time.monotonic() > self.stats.due else []
        size = len(batch)
        commands = kind(batch)
        if flush:
            own = getattr(commands, "parts", ())
            commands = joined = Once([*batch, *flush])
            joined.parts = [*own, (len(flush), True)] if own else ()
        if not commands:
            return []
        try:
            replies = (
                (yield from self._on_replicas(commands, kept_as)) if kept_as else (yield commands)
            )
        except RedisRefused as refused:
            # A server that is full refuses to count, not to do what it was asked.
            if not flush or any(isinstance(reply, Exception) for reply in refused.replies[:size]):
                raise SessionStoreUnavailable.of(refused) from refused
            replies = refused.replies
        except RedisUnavailable as error:
            if flush and batch and kind is list and error.reason == "closed":
                # It may be asked again, without the counts.
                return (yield from self._ask(batch, kept_as=kept_as))
            raise SessionStoreUnavailable.of(error) from error
        return list(replies[:size])

    # Ends

    def _end(self, ending: End) -> Operation[bool]:
        """End a session; return whether it lived."""
        sent = steady_us()
        reply, may_be_second = yield from self._ask_for_end(ending.command(sent))
        if len(reply) == 1:  # it was not late
            return bool(reply[0]) or (may_be_second and not ending.only)
        again = ending.after(late_in(reply), steady_us() - sent)
        return again is not None and (yield from self._end(again))

    def _ask_for_end(self, command: Command) -> Operation[tuple[Any, bool]]:
        """Return the reply to an end, and whether a first copy of it may have been carried out.

        The connection died under that copy. It does no harm twice, but the reply to the second one does not tell
        whether there was a session: whoever asked for the end believes so, mostly rightly.
        """
        try:
            (reply,) = yield from self._ask([command], Once, LOGOUT)
        except SessionStoreUnavailable as error:
            if error.reason != "closed":
                raise
            with partly_done(error.may_be_done):
                (reply,) = yield from self._ask([command], kept_as=LOGOUT)
            return reply, error.may_be_done
        return reply, False

    def _defer(self, place: Place, what: End | Undo) -> bool:
        """Keep the end until Redis can be told. Return False when too many wait."""
        waiting = len(self._deferred)
        if waiting >= DEFERRED_LIMIT:
            log.error("the end of a session is dropped: %d others already wait for Redis", waiting)
            return False
        self._deferred.setdefault(place, what)  # the first of them was asked for earlier
        self.stats.remind()
        return True

    def _tell_ends_first(self) -> Operation[None]:
        """Tell Redis of all deferred ends. A part of it that is away keeps nothing from the others."""
        try:
            yield from self._tell_ends()
        except SessionStoreUnavailable as error:
            if not self._is_about_a_part(error):
                raise

    def _is_about_a_part(self, error: SessionStoreUnavailable) -> bool:
        """Return whether other sessions can be had.

        A node of a cluster is away, a shard is being moved, or the server refuses writes alone.
        """
        return self._keys.is_spread or error.reason in READS_ONLY | {"tryagain"}

    def _tell_ends(self, *, rests: bool = False) -> Operation[None]:
        """Tell Redis of all deferred ends, in exchanges of their own that nothing overtakes, unless it `rests`.

        Where only a part of Redis is away the others' ends are told all the same, before this raises.
        """
        waiting = list(self._deferred)
        away: SessionStoreUnavailable | None = None
        while waiting:
            some, waiting = waiting[:DEFERRED_BITE], waiting[DEFERRED_BITE:]
            try:
                waiting += yield from self._tell_some_ends(some)
            except SessionStoreUnavailable as error:
                if not self._is_about_a_part(error):
                    raise
                away = error
                shards = {place.shard for place in some if place in self._deferred}
                waiting = [place for place in waiting if place.shard not in shards]
            if rests:
                yield Pause(0)
        if away is not None:
            raise away

    def _tell_some_ends(self, places: Sequence[Place]) -> Operation[list[Place]]:
        """Tell Redis of some deferred ends. Return those that are in doubt, to be told again.

        An end that Redis refuses for itself is dropped and logged.
        """
        told = [(place, what) for place in places if (what := self._deferred.get(place))]
        if not told:
            return []
        sent = steady_us()
        try:
            ends: list[Command] = [what.command(sent) for _, what in told]
            replies: Sequence[Any] = yield from self._on_replicas(ends, LOGOUT)
        except RedisRefused as refused:
            replies = refused.replies
            if len(replies) != len(told):
                raise SessionStoreUnavailable.of(refused) from refused
        except RedisUnavailable as error:
            raise SessionStoreUnavailable.of(error) from error
        took = steady_us() - sent
        for (place, what), reply in zip(told, replies, strict=True):
            if _is_settled(reply):
                self._note_told(place, what, reply, took)
        if stuck := [reply for reply in replies if not _is_settled(reply)]:
            raise SessionStoreUnavailable.of(refusal(stuck))
        return [place for place, _ in told if place in self._deferred]

    def _note_told(self, place: Place, what: End | Undo, reply: Any, took_us: int) -> None:
        """Forget an end that was told, or keep what is left of it."""
        if isinstance(reply, Exception):
            log.error("Redis refuses to end a session: %s", reply)
        left = _left_of(what, reply, took_us)
        if left is None:
            self._deferred.pop(place, None)
        elif place in self._deferred:
            self._deferred[place] = left

    # Shards

    def _everywhere(
        self,
        command: Callable[[int], Command],
        kind: Callable[[Sequence[Command]], list[Command]] = list,
        kept_as: str = "",
    ) -> Operation[list[Any]]:
        """Return the replies of all shards in order: this process's shards, and more where another
        process has more.
        """
        known = self._known_shards
        own = [*map(command, range(known))]
        compares = [self._comparing_shards()] if self._may_compare else []
        try:
            replies = yield from self._ask([*compares, *own], kind, kept_as)
        except SessionStoreUnavailable as error:
            self._compare_no_more(error)
            done = replies_of(error, 1 + len(own))[1:]
            if done and not any(isinstance(reply, Exception) for reply in done):
                return list(done)  # asked again, the shards would find nothing left to end
            with partly_done(error.may_be_done):
                return (yield from self._ask(own, kind, kept_as))
        if compares:
            self._learn_shards(replies.pop(0))
        if self._known_shards > known:
            more = map(command, range(known, self._known_shards))
            with partly_done(kind is not list):  # else it reads
                replies += yield from self._ask(list(more), kind, kept_as)
        return replies

    def _saying_shards(self) -> list[Command]:
        """Return the command that reports this process's number of shards, now and then before it
        makes a session.
        """
        is_due = self._may_compare and time.monotonic() >= self._says_shards_at
        return [self._comparing_shards()] if is_due else []

    def _say_shards_aside(self) -> Operation[None]:
        """In a cluster, report this process's number of shards in an exchange of its own.

        What it is reported to may be away while the session's shard is not. A process that has never reported it
        makes no session before it has: see `_saying_shards`.
        """
        if not (says := self._saying_shards()):
            return
        try:
            (reply,) = yield says
        except RedisUnavailable as error:
            failure = SessionStoreUnavailable.of(error)
            if error.reason in OF_THE_COMMAND:
                self._compare_no_more(failure)
            elif not self._says_shards_at:
                raise failure from error
            else:
                self._says_shards_at = time.monotonic() + ASK_AGAIN_S
        else:
            self._have_said_shards(reply)

    def _have_said_shards(self, reply: Sequence[bytes]) -> None:
        self._learn_shards(reply)
        self._says_shards_at = time.monotonic() + SHARDS_SAID_S

    def _compare_shards(self) -> Operation[None]:
        """Learn the number of shards."""
        if not self._may_compare:
            return
        try:
            (said,) = yield from self._ask([self._comparing_shards()])
        except SessionStoreUnavailable as error:
            self._compare_no_more(error)
        else:
            self._learn_shards(said)

    def _compare_no_more(self, error: SessionStoreUnavailable) -> None:
        """Go on with this process's shards where they can't be compared. Raises any other error.

        The user lacks a right, or a stranger has written the key: no reason to let nobody log in.
        """
        if error.reason not in OF_THE_COMMAND or not self._may_compare:
            raise error
        self._may_compare = False
        log.error("shards can't be compared with those of other processes: %s", error)

    def _comparing_shards(self) -> Command:
        """Return the command that agrees on the most shards that any process has."""
        asked = ("session_shards", str(self._shards), Rule.LARGEST.value)
        return agree([self._keys.agreed], this_process(), FIELDS_LIMIT, *asked)

    def _learn_shards(self, reply: Sequence[bytes]) -> None:
        said = number_in(reply[0])
        if said is not None and self._known_shards < said <= SHARDS_LIMIT:
            self._known_shards = said


def steady_us() -> int:
    """Return the time by this machine's steady clock, µs. A logout gets older while the machine sleeps."""
    return time.clock_gettime_ns(STEADY) // 1_000


def is_shut(error: RedisUnavailable) -> bool:
    """Return whether `stillroom move-state` has shut the shard. A slot that is on its way is TRYAGAIN too."""
    return error.reason == "tryagain" and "the sessions of this shard" in error.detail


def replies_of(error: SessionStoreUnavailable, size: int) -> Sequence[Any]:
    """Return the replies to a batch of so many commands, of which one is an error; none where some are lost."""
    replies: Sequence[Any] = getattr(error.__cause__, "replies", ())[:size]
    return replies if len(replies) == size else ()


def _is_settled(reply: Any) -> bool:
    """Return whether a command was done, or refused for good, so that it need not be sent again."""
    if not isinstance(reply, Exception):
        return True
    return str(reply).partition(" ")[0].lower() in REFUSED_FOR_GOOD


def _left_of(what: End | Undo, reply: Any, took_us: int) -> End | None:
    """Return the rest of an end that is still to be told after its reply."""
    if isinstance(what, Undo) or isinstance(reply, Exception):
        return None
    return what.after(late_in(reply), took_us)
