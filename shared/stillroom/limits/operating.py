"""Lets operators change limits for some time while the apps run, and look at the changes."""

from __future__ import annotations

from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidLimit, did_you_mean
from stillroom.limits.asking import Asking
from stillroom.limits.changes import (
    LONGEST_S,
    MOST,
    Change,
    checked,
    known_names,
    known_windows,
    read_changes,
)
from stillroom.misuse import refuse_other
from stillroom.operation import Once, Operation
from stillroom.scripts import limit_change


class Operating(Asking):
    """The operations. A driver runs them. They raise RedisUnavailable while Redis is away."""

    def change(
        self, name: str, quota: int, window: int, seconds: Duration, by: str = ""
    ) -> Operation[Change]:
        """Change the limit of this name in all processes for some seconds, up to 30 days.

        They see it within a second, in the round trip of a check; an idle process with its first check. Hits that
        were counted still count. `by` says who made the change, for people. Raises InvalidArgument, and
        InvalidLimit, which is also raised for a name that no process has used if they have used others.
        """
        name = checked(name, quota, window, 0.0).name
        refuse_other("by", by, str, "a text that says who changes it; leave it out for nobody")
        lasts = seconds_of("seconds", seconds, least=1, most=LONGEST_S)
        # A half surrogate, as in a login's name that is no UTF-8, can't be sent.
        told = by[:100].encode(errors="replace").decode()
        return self._changing(name, quota, window, round(lasts), told)

    def restore(self, name: str) -> Operation[bool]:
        """End a change before its time. Return True if there was one. Raises InvalidLimit for what is no name."""
        checked(name, 1, 1, 0.0)
        words = (name, "", 0, 0, "", MOST)
        # Once: the second of two that arrive would find no change.
        (ended,) = yield Once([limit_change([self._keys.limit_changes], *words)])
        return bool(ended)

    def changes(self) -> Operation[list[Change]]:
        """Return the changes in force, ordered by their end."""
        (reply,) = yield [(b"HGETALL", self._keys.limit_changes)]
        now = self._server.now_ms() / 1000
        found = [one for one in read_changes(reply) if one.until > now]
        return sorted(found, key=lambda change: change.until)

    def names(self) -> Operation[list[str]]:
        """Return the names of the limits that processes have reported."""
        (reply,) = yield [(b"HGETALL", self._keys.limit_windows)]
        return known_names(reply[::2])

    def windows(self) -> Operation[dict[str, int]]:
        """Return the longest window of each limit that processes have reported, seconds by its name."""
        (reply,) = yield [(b"HGETALL", self._keys.limit_windows)]
        return known_windows(reply)

    def _changing(
        self, name: str, quota: int, window: int, seconds: int, by: str
    ) -> Operation[Change]:
        known = yield from self.names()
        if known and name not in known:
            raise InvalidLimit(
                name, f"no process has a limit of this name{did_you_mean(name, known)}"
            )
        words = (name, quota, window, seconds, by, MOST)
        # Once: a copy that arrives behind `restore`, or another change, would bring this one back.
        (done,) = yield Once([limit_change([self._keys.limit_changes], *words)])
        if done != 1:
            raise InvalidLimit(name, f"{MOST} limits are changed; restore one of them first")
        (text,) = yield [(b"HGET", self._keys.limit_changes, name.encode())]
        made = read_changes([name.encode(), text] if text else [])
        # None: somebody has ended it already.
        return made[0] if made else Change(name, quota, window, self._server.now_ms() / 1000, by=by)
