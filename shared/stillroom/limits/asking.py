"""Asks Redis for the limits' operations, and reads what operators have changed along with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.keys import Keys
from stillroom.limits.changes import READ_EVERY_S
from stillroom.limits.denials import Denials
from stillroom.limits.request import Request, Requests
from stillroom.operation import Once, Operation
from stillroom.replicas import kept
from stillroom.scripts import limit_check
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import (
    Breaker,
    Breakers,
    Command,
    Server,
    StateServer,
    refusal,
    reset_after_fork,
)

log = logging.getLogger("stillroom.limits")

UNREAD_EVERY_S = 30.0  # a user without the right to read changes asks no more often
RESERVATION = "a reservation"  # its name in the error when no replica has it in time
# The first element of limit_check's reply; else it is 1 admitted, 0 denied.
BANNED, OTHER_WIDTHS = -1, -2
_one_more = (1).__add__


class Asking:
    """Ask Redis, for all operations of the limits."""

    def __init__(
        self,
        settings: Settings,
        server: Server | StateServer,
        breaker: Breaker | Breakers,
        keys: Keys,
        stats: Stats,
    ) -> None:
        self.settings = settings
        self.stats = stats
        self._server, self._keys = server, keys
        self._breaker = breaker
        self._requests = Requests(settings, keys, stats)
        self._changes = self._requests.changes
        self._denials = Denials(settings.limits_memory)
        reset_after_fork(self._denials)
        reset_after_fork(self._changes)

    def _ask(self, command: Command, kept_as: str = "") -> Operation[Any]:
        """Return the reply. Counts that are due are sent behind. `kept_as`: see stillroom/replicas.py."""
        return (yield from self._ask_first([command], kept_as))[0]

    def _ask_all(self, commands: Sequence[Command], kept_as: str = "") -> Operation[list[Any]]:
        """Return the reply of each shard, or its error. See _ask."""
        try:
            replies = yield from self._ask_first(commands, kept_as, is_one=False)
        except RedisUnavailable as error:
            return [error] * len(commands)
        return [refusal([one]) if isinstance(one, Exception) else one for one in replies]

    def _ask_first(
        self, commands: Sequence[Command], kept_as: str, *, is_one: bool = True
    ) -> Operation[Sequence[Any]]:
        """Return the replies to these commands. `is_one`: an error of the first is raised."""
        now = time.monotonic()
        reading: list[Command] = []
        if now > self._changes.due:
            self._changes.due = now + READ_EVERY_S
            reading = [(b"HGETALL", self._keys.limit_changes)]
        flush = self.stats.flush(self._server.now_ms()) if now > self.stats.due else []
        batch = Once([*commands, *reading, *flush])
        if not is_one:
            rest = len(reading) + len(flush)
            batch.parts = [*[(1, True)] * len(commands), *([(rest, True)] if rest else [])]
        try:
            replies: Sequence[Any]
            if kept_as:
                replies = yield from kept(batch, self.settings.replicas, self.stats, kept_as)
            else:
                replies = yield batch
        except RedisRefused as refused:
            # A server that is full refuses to count, not to decide.
            replies = refused.replies or [refused]
            if len(replies) != len(batch) or (is_one and isinstance(replies[0], Exception)):
                raise
        if reading:
            self._learn_changes(replies[len(commands)])
        return replies[: len(commands)]

    def _reading_changes(self) -> Operation[None]:
        """Read the changes, which are due: a client denied from memory makes no check that carries them."""
        if self._breaker.is_open:
            return
        self._changes.due = time.monotonic() + READ_EVERY_S
        try:
            (reply,) = yield [(b"HGETALL", self._keys.limit_changes)]
        except RedisUnavailable as error:
            reply = error
        self._learn_changes(reply)

    def _learn_changes(self, reply: Any) -> None:
        """Learn the operators' changes, which hold from the next request on."""
        if isinstance(reply, Exception):
            self._changes.due += UNREAD_EVERY_S
            self.stats.say("limits", "changes", f"what operators changed can't be read: {reply}")
        elif self._changes.learn(reply, self._server.now_ms() / 1000, time.monotonic()):
            self._denials.reset()
            changed = ", ".join(map(str, self._changes.found)) or "none"
            log.info("limits that are changed for now: %s", changed)

    def _again(
        self,
        request: Request,
        reply: list[Any],
        mode: bytes,
        unseen: bytes = b"",
        reservation: bytes = b"",
    ) -> Operation[tuple[Request, list[int]]]:
        """Ask again with the current widths of banned networks, as often as new ones are made meanwhile."""
        while reply[0] == OTHER_WIDTHS:
            self._requests.learn_widths(reply[2], request.home)
            request = self._requests.again(request)
            words = request.words(mode, unseen, reservation)
            reply = yield from self._ask(limit_check.run(words), RESERVATION if reservation else "")
        return request, reply

    def _unseen(self, request: Request) -> bytes:
        denials = self._denials
        return b"" if denials.has_none_of(request.keys) else denials.take_unseen(request.keys)

    def _count(self, names: Sequence[str]) -> None:
        """Count one under each of these names, on every request."""
        counts = self.stats.counts
        counts.update(zip(names, map(_one_more, map(counts.__getitem__, names)), strict=False))
