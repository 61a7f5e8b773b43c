"""List, count, end and sweep many sessions: of a user, with a tag, all, and those that have expired."""

from __future__ import annotations

import time
from typing import Any

from stillroom.dispatch import Dispatch
from stillroom.durations import Duration, seconds_of
from stillroom.errors import (
    OF_THE_COMMAND,
    InvalidArgument,
    SessionEnded,
    SessionStoreUnavailable,
    SettingsError,
    in_code,
    partly_done,
)
from stillroom.keys import Keys
from stillroom.operation import Once, Operation, Pause
from stillroom.scripts import (
    session_end,
    session_end_all,
    session_list,
    session_reclaim,
    session_revoke,
    session_sweep,
)
from stillroom.sessions.asking import LOGOUT, is_shut, steady_us
from stillroom.sessions.ends import End
from stillroom.sessions.named import Known, Named
from stillroom.sessions.session import Device, encoded_user, listed_device, tag_names
from stillroom.sessions.token import Place, make_handle, read_handle
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.whole import is_whole
from stillroom.wire import Command, Server, StateServer

SWEEP_TASK = "stillroom.sweep_sessions"
BITE = 100  # sessions one script looks at …
BITE_LIMIT = 200  # … and may be told to: some 3 ms of the server's
SWEEP_S = 50.0  # one run of the sweep ends after this; the next goes on
PAGE = 200  # sessions of a user that one script lists: some 3 ms of the server's


class Many(Named):
    """The operations on many sessions. SessionsBody has those on one."""

    def __init__(
        self,
        settings: Settings,
        server: Server | StateServer,
        keys: Keys,
        dispatch: Dispatch,
        stats: Stats,
    ) -> None:
        super().__init__(settings, server, keys, stats)
        self.dispatch = dispatch

    def list_for_user(self, user_id: str, *, limit: int | None = None) -> Operation[list[Device]]:
        """Return the user's living sessions, the one seen last first: no data, no tokens.

        `limit`: only that many, those that began last. Even of very many, no script blocks the server for long.
        Redis away: SessionStoreUnavailable.
        """
        if limit is not None and not is_whole(limit):
            raise SettingsError(f"limit={in_code(limit):.100}: 1 or more sessions")
        listed = yield from self._listed(encoded_user(user_id), limit)
        devices = [device for one in listed if (device := self._device(*one))]
        if limit is not None:
            devices = sorted(devices, key=lambda device: device.created, reverse=True)[:limit]
        return sorted(devices, key=lambda device: device.last_seen, reverse=True)

    def end(self, user_id: str, handle: str) -> Operation[bool]:
        """End one session by the handle that a list shows. Return True if it lived and was this user's.

        This works even if it was rotated since it was listed, up to 1,000 times.
        Redis away: SessionStoreUnavailable.
        """
        user, place = encoded_user(user_id), read_handle(handle)
        if not isinstance(handle, str):
            raise InvalidArgument(
                f"{type(handle).__name__}: the `handle` that a list shows is text"
            )
        if place is None:
            return False
        ends = session_end(*self._keys.record(*place), user)
        count, may_be_second = yield from self._ask_for_end(ends)
        ended = bool(count) or may_be_second
        self.stats.counts["sessions_destroyed"] += ended
        return ended

    def destroy_for_user(self, user_id: str, keep: Known | None = None) -> Operation[int]:
        """End all sessions of a user except `keep` (a session, its token, or its handle). Return how many lived.

        True for every reader when it returns, and for logins that began before. If there are many, workers reclaim
        the memory, and sessions that had already ended may be counted. If the session to keep has ended, it is not
        brought back; a `keep` that can't be a session raises SessionEnded, and nothing is ended. A handle keeps its
        session even if that was rotated since it was listed, an old token only within its grace.
        Redis away: SessionStoreUnavailable; some shards may have been done then.
        """
        user = encoded_user(user_id)
        return (yield from self._revoke(b"u:" + user, *self._kept(keep)))

    def destroy_by_tag(self, *tags: str) -> Operation[int]:
        """End all sessions that carry one of these tags. Return how many lived. See destroy_for_user."""
        ended = 0
        for place, tag in enumerate(tag_names(tags)):
            if place:
                yield Pause(0)  # others first; and each tag has its own deadline
            with partly_done(place > 0):
                ended += yield from self._revoke(b"g:" + tag, None)
        return ended

    def destroy_all(self) -> Operation[int]:
        """End all sessions of all users, and all anonymous ones. Return how many there were.

        Sessions that had ended and were not swept yet are counted. True for every reader when it returns, whatever
        was in progress; one short script for each shard, however many sessions there are. Workers free the memory.
        Redis away: SessionStoreUnavailable; some shards may have been done.
        """
        longest = b"%d" % (1_000 * max(self.settings.session_absolute, 7 * 86_400))

        def ending_all(shard: int) -> Command:
            due, prefix = self._keys.due_sessions(shard), self._keys.shard(shard)
            return session_end_all([due], prefix, longest)

        ended: int = sum((yield from self._everywhere(ending_all, Once.apart)))
        self.stats.counts["sessions_revoked"] += ended
        if ended:
            with partly_done():
                yield from self._have_swept()
        return ended

    def count(self, user_id: str | None = None) -> Operation[int]:
        """Return how many sessions there are: of one user exactly; of all with those that ended and are not swept.

        Redis away: SessionStoreUnavailable.
        """
        if user_id is not None:
            return len((yield from self._listed(encoded_user(user_id), None)))
        replies = yield from self._everywhere(
            lambda shard: (b"ZCARD", self._keys.due_sessions(shard))
        )
        return sum(replies)

    def sweep(self, limit: int = BITE, seconds: Duration = SWEEP_S) -> Operation[dict[str, Any]]:
        """Delete what has expired, oldest first, and what was revoked, in bites of `limit`. For a worker.

        Returns {"expired", "deleted", "lag_s", "done"}: `lag_s` is how long the oldest of them had waited, and
        `done` is False if `seconds` were up first. Two at once share the work. It works on a server that is full.
        Raises SettingsError for a `limit` that is none, InvalidArgument for `seconds`.
        Redis away: SessionStoreUnavailable. Where only a node of a cluster is away, or a foreign key is in the
        place of an index, the others' sessions are swept before this is raised. A shard that `stillroom move-state`
        has shut is left out.
        """
        if not is_whole(limit, most=BITE_LIMIT):
            raise SettingsError(f"limit={in_code(limit):.100}: 1 to {BITE_LIMIT:,} sessions a bite")
        deadline = time.monotonic() + seconds_of("seconds", seconds, least=0)
        expired = deleted = lag = 0
        yield from self._compare_shards()
        left = set(range(self._known_shards))
        away: SessionStoreUnavailable | None = None
        while left and time.monotonic() < deadline:
            for shard in sorted(left):
                try:
                    ended, due, waited = yield from self._sweep_shard(shard, limit)
                    gone, unfinished, longer = yield from self._reclaim(shard, limit)
                except SessionStoreUnavailable as error:
                    if not self._is_about_a_part(error) and error.reason not in OF_THE_COMMAND:
                        raise
                    left.discard(shard)
                    if not is_shut(error):  # a shard that is moved is swept afterwards
                        away = away or error
                    continue
                expired, deleted, lag = expired + ended, deleted + gone, max(lag, waited, longer)
                if due < limit and not unfinished:
                    left.discard(shard)
                yield Pause(0)  # others first; and each bite has its own deadline
        if away is not None:
            raise away
        return {"expired": expired, "deleted": deleted, "lag_s": lag / 1e6, "done": not left}

    # Steps

    def _listed(self, user: bytes, most: int | None) -> Operation[list[tuple[int, bytes, bytes]]]:
        """Return (shard, name, record) of the user's living sessions, at most `most` of each shard."""
        size = PAGE if most is None else min(most, PAGE)

        def page(shard: int, below: bytes) -> Command:
            index = self._keys.user_sessions(shard, user)
            return session_list([index], self._keys.shard(shard), below, size)

        first = yield from self._everywhere(lambda shard: page(shard, b"+inf"))
        pages, listed = dict(enumerate(first)), []
        found = dict.fromkeys(pages, 0)
        while True:
            for shard, (_, *devices) in pages.items():
                pairs = zip(devices[::2], devices[1::2], strict=True)
                listed += [(shard, name, about) for name, about in pairs]
                found[shard] += len(devices) // 2
            wanted = [shard for shard in pages if most is None or found[shard] < most]
            below = {shard: b"(" + stamp for shard in wanted if (stamp := pages[shard][0])}
            if not below:
                return listed
            yield Pause(0)  # others first; and each page has its own deadline
            replies = yield from self._ask([page(*one) for one in below.items()])
            pages = dict(zip(below, replies, strict=True))

    def _device(self, shard: int, name: bytes, about: bytes) -> Device | None:
        device = listed_device(shard, name, about)
        if device is None:
            handle = make_handle(shard, name)
            self.stats.say("a list of sessions", "unreadable", f"{handle} is left out of it")
        return device

    def _kept(self, keep: Known | None) -> tuple[Place | None, bool]:
        """Return the place of the session to keep, and whether its handle names it."""
        if keep is None:
            return None, False
        place = self._place(keep)
        if place is not None:
            return place, False
        place = read_handle(keep if isinstance(keep, str) else None)
        if place is None:
            raise SessionEnded("missing")  # better none is ended than all by mistake
        return place, True

    def _revoke(self, name: bytes, keep: Place | None, is_handle: bool = False) -> Operation[int]:
        """Revoke `name`: u:<user> or g:<tag>. Once: a second run would end what began since the first."""
        asked = steady_us()
        at_once: int | bytes = b"" if is_handle else 0

        def revoking(shard: int, kept: Place | None = keep, age: int | bytes = at_once) -> Command:
            names = self._keys.sessions(*kept) if kept is not None and kept.shard == shard else ()
            prefix = self._keys.shard(shard)
            return session_revoke([prefix + name, *names], prefix, name, BITE, age)

        replies = yield from self._everywhere(revoking, Once.apart, LOGOUT)
        with partly_done():
            if keep is not None and keep.shard < len(replies) and replies[keep.shard][0] < 0:
                # It did nothing there: the name to keep was rotated. After this was asked for, perhaps: see End.
                again: End | None = self._destroying(keep)._replace(asked_us=asked)
                while again is not None:
                    sent = steady_us()
                    more = revoking(keep.shard, keep, again.age(sent))
                    (reply,) = yield from self._ask([more], Once, LOGOUT)
                    again = again.after(int(reply[1]) if reply[0] < 0 else -1, steady_us() - sent)
                if reply[0] < 0:  # before: then nothing is kept
                    (reply,) = yield from self._ask([revoking(keep.shard, None)], Once, LOGOUT)
                replies[keep.shard] = reply
            ended = sum(int(count) for count, _ in replies)
            self.stats.counts["sessions_revoked"] += ended
            if any(unfinished for _, unfinished in replies):
                yield from self._have_swept()
        return ended

    def _have_swept(self) -> Operation[None]:
        """Have a worker give the memory back, or do it here where background work is done at once."""
        if self.dispatch.inline:
            yield from self.sweep()
        else:
            self.dispatch.wake(SWEEP_TASK)

    def _sweep_shard(self, shard: int, limit: int) -> Operation[tuple[int, int, int]]:
        """Return (expired, how many were due, how long the oldest had been, µs)."""
        command = session_sweep([self._keys.due_sessions(shard)], self._keys.shard(shard), limit)
        ((ended, due, waited),) = yield from self._ask([command])
        self._tell_all("expired", shard, ended)
        return len(ended) // 2, due, waited

    def _reclaim(self, shard: int, limit: int) -> Operation[tuple[int, int, int]]:
        """Return (deleted, revocations left, how long the oldest has waited, µs)."""
        command = session_reclaim([self._keys.revocations(shard)], self._keys.shard(shard), limit)
        ((deleted, left, waited),) = yield from self._ask([command])
        return deleted, left, waited
