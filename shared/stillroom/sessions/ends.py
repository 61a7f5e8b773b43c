"""Ends that Redis may not have heard of yet, as this process keeps them: what is to end, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stillroom.scripts import session_destroy, session_hold, session_undo
from stillroom.wire import Command

TRIES = 5  # to find out which was first, an end or a rotation; then as many that favour the end more and more
# What a response does to the browser's cookie: see lua/session_destroy.lua and session_create.lua.
NO_COOKIE, TAKES_AWAY, UNLESS_LATE, BRINGS_ANOTHER, BOTH = 0, 1, 1, 2, 3


class End(NamedTuple):
    """A session that is to end, and since when. A rotation after that, elsewhere, does not save it.

    An age travels to Redis, not a time: the server's clock may have stepped since. Of a name that was rotated the
    script says how long before the asking its grace was over, as far as it can know: it does not see how long the
    command was on its way. If that may have been longer, the rotation may as well have come after the asking. Then
    the end is sent again, now that its age is known. Which was first by less than a round trip nobody can tell: the
    end wins.
    """

    keys: tuple[bytes, ...]  # its record, under each pepper
    prefix: bytes
    asked_us: int  # of this machine's steady clock
    cookie: int = NO_COOKIE
    only: bytes = b""  # b"1": if it has no data
    doubts: int = 0

    def command(self, now_us: int) -> Command:
        return session_destroy(
            self.keys, self.prefix, b"%d" % self.age(now_us), b"%d" % self.cookie, self.only
        )

    def holding(self, now_us: int) -> Command:
        """Return the command that takes it out of use, to be freed or ended."""
        return session_hold(self.keys, self.prefix, self.age(now_us), self.cookie)

    def age(self, now_us: int) -> int:
        return max(0, now_us - self.asked_us)

    def after(self, late_us: int, took_us: int) -> End | None:
        """Return the end to send after an exchange that took so long, or None: all is done.

        `late_us`: how long before the asking the grace was over; -1: the script did what it was asked.
        """
        if not 0 <= late_us < took_us or self.doubts == 2 * TRIES:
            return None
        benefit = took_us << self.doubts - TRIES if self.doubts >= TRIES else 0
        return self._replace(doubts=self.doubts + 1, asked_us=self.asked_us - benefit)


class Gone(End):
    """A session that was gone when the request looked. What its name leads to since then is not ended in its place.

    Another request may just have given the session a new name, whose cookie is on its way to the browser.
    """

    def age(self, now_us: int) -> int:
        return 0

    def after(self, late_us: int, took_us: int) -> End | None:
        return None


def late_in(reply: Sequence[int | bytes]) -> int:
    """Return by how many µs an end was late; -1: it was not late.

    `reply`: of lua/session_destroy.lua or session_hold.lua.
    """
    return int(reply[1]) if len(reply) > 1 else -1


class Undo(NamedTuple):
    """A creation or a rotation whose reply was lost, so that nobody got the token it made."""

    # That token's record; of a rotation, also the one it came from, under each pepper.
    keys: tuple[bytes, ...]
    prefix: bytes

    def command(self, now_us: int) -> Command:
        return session_undo(self.keys, self.prefix)
