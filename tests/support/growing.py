"""Histories of sessions and of quotas while a cluster's slots move; see history.py for the check.

The end of a session is a version that is larger than all others. So a session that is back after its end is a stale
read. One that is missing before its end began is lost.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

from stillroom import Limit, NoDispatch, RedisUnavailable, SessionEnded, Settings, Stillroom
from tests.support.history import Floor, Read
from tests.support.limits import forget_denials
from tests.support.threads import Threads

ENDED = 1 << 62
PAUSE_S = 0.001
LIVING = 40  # sessions at a time …
RECENT = 80  # … and with those that ended lately
USERS = 8


class Load(Threads):
    """Threads that act on rooms of their own for as long as the `with` block runs."""

    def __init__(
        self, settings: Sequence[Settings], threads: int = 3, pause_s: float = PAUSE_S
    ) -> None:
        """`threads`: in each room. `pause_s`: of each of them between two calls."""
        super().__init__()
        self._pause_s = pause_s
        self._settings = settings
        self._threads = threads
        self.refused = 0  # calls for which Redis was away

    def __enter__(self) -> Self:
        self.rooms = [
            self._stack.enter_context(Stillroom(one, dispatch=NoDispatch()))
            for one in self._settings
        ]
        self.begin()
        for room in self.rooms * self._threads:
            self.start(partial(self._run, room))
        return self

    def begin(self) -> None:
        """Do what comes before the load."""

    def act(self, room: Stillroom) -> None:
        raise NotImplementedError

    def _run(self, room: Stillroom) -> None:
        while not self._stop.wait(self._pause_s):
            try:
                self.act(room)
            except RedisUnavailable:
                self.refused += 1


class One:
    """A session, as its browser knows it. One thread at a time changes it; any thread may read it."""

    def __init__(self, name: str, user: str, token: str) -> None:
        self.name, self.user, self.token = name, user, token
        self.version = 0
        self.end_began = 0  # ns: from here on nobody knows, until the end's floor
        self.lock = threading.Lock()


class Logins(Load):
    """Sessions are begun, read, changed, rotated, and ended in each way there is."""

    def __init__(self, settings: Sequence[Settings], **how: Any) -> None:
        super().__init__(settings, **how)
        self.reads: list[Read] = []
        self.floors: list[Floor] = []
        self.lost: list[Read] = []
        self._sessions: list[One] = []
        self._numbers = itertools.count()
        self._users = {f"user:{number}": threading.Lock() for number in range(USERS)}

    @property
    def ends(self) -> int:
        return sum(floor.version == ENDED for floor in self.floors)

    def begin(self) -> None:
        for _ in range(LIVING):
            self._log_in(self.rooms[0])

    def act(self, room: Stillroom) -> None:
        recent = self._sessions[-RECENT:]
        if sum(not one.end_began for one in recent) < LIVING:
            self._log_in(room)
        one = random.choice(recent)
        how = random.choices(
            [self._read, self._update, self._rotate, self._log_out, self._end, self._end_all],
            [60, 8, 4, 2, 2, 0.5],
        )[0]
        if how in (self._read, self._end_all):
            how(room, one)
        elif one.lock.acquire(blocking=False):
            try:
                how(room, one)
            finally:
                one.lock.release()

    def _log_in(self, room: Stillroom) -> None:
        number = next(self._numbers)
        user = f"user:{number % USERS}"
        with self._users[user]:  # nobody ends all of theirs meanwhile
            session = room.sessions.create(user, {"version": 0}, tags=["all"])
            self._sessions.append(One(f"session:{number}", user, session.token))

    def _read(self, room: Stillroom, one: One) -> None:
        token, began = one.token, time.monotonic_ns()
        session = room.sessions.get(token)
        if session is not None:
            self.reads.append(Read(one.name, began, session.data["version"]))
        elif not one.end_began and one.token == token:
            self.lost.append(Read(one.name, began, ENDED))

    def read_again(self) -> None:
        """Read each session that was ever begun, after everything, in the last room."""
        for one in self._sessions:
            self._read(self.rooms[-1], one)

    def _update(self, room: Stillroom, one: One) -> None:
        one.version += 1
        try:
            room.sessions.update(one.token, {"version": one.version})
        except SessionEnded:
            return
        self.floors.append(Floor(one.name, time.monotonic_ns(), one.version))

    def _rotate(self, room: Stillroom, one: One) -> None:
        try:
            one.token = room.sessions.rotate(one.token).token
        except SessionEnded:
            return

    def _log_out(self, room: Stillroom, one: One) -> None:
        self._note_end([one], lambda: room.sessions.destroy(one.token))

    def _end(self, room: Stillroom, one: One) -> None:
        """End one from the list of the user's devices."""
        handle = room.sessions.get(one.token)
        if handle is not None:
            self._note_end([one], lambda: room.sessions.end(one.user, handle.handle))

    def _end_all(self, room: Stillroom, one: One) -> None:
        """End all sessions of the user."""
        with self._users[one.user], ExitStack() as stack:
            living = [other for other in self._sessions if not other.end_began]
            theirs = [other for other in living if other.user == one.user]
            for other in theirs:
                stack.enter_context(other.lock)
            self._note_end(theirs, lambda: room.sessions.destroy_for_user(one.user))

    def _note_end(self, those: Sequence[One], end: Callable[[], object]) -> None:
        began = time.monotonic_ns()
        for one in those:
            one.end_began = one.end_began or began
        end()
        returned = time.monotonic_ns()
        self.floors.extend(Floor(one.name, returned, ENDED) for one in those)


class Quotas(Load):
    """Many clients spend quotas of address and user. `admitted` counts by client what they were given."""

    def __init__(self, settings: Sequence[Settings], quota: int, **how: Any) -> None:
        super().__init__(settings, **how)
        self.quota = quota
        self.limits = [
            Limit("by-ip", 10 * quota, 3_600, away="strict"),
            Limit("by-user", quota, 3_600, by="user", away="strict"),
        ]
        self.admitted: Counter[str] = Counter()
        self.degraded: Counter[str] = Counter()  # refusals, by why Redis did not decide
        self.admitted_degraded = 0
        self._lock = threading.Lock()

    def clients(self) -> Iterator[tuple[str, dict[str, str | None]]]:
        for number in range(24):
            yield f"u{number}", {"ip": f"198.51.100.{number}", "user": f"u{number}"}

    def begin(self) -> None:
        self._clients = list(self.clients())

    def act(self, room: Stillroom) -> None:
        name, subject = random.choice(self._clients)
        self._spend(room, name, subject)

    def spend_the_rest(self) -> None:
        """Let each client ask until it is denied by Redis."""
        for name, subject in self._clients:
            while self._spend(self.rooms[0], name, subject):
                pass

    def _spend(self, room: Stillroom, name: str, subject: dict[str, Any]) -> bool:
        forget_denials(room)
        decision = room.limits.check(subject, self.limits)
        with self._lock:
            if decision:
                self.admitted[name] += 1
                self.admitted_degraded += bool(decision.degraded)
            elif decision.degraded:
                self.degraded[decision.degraded] += 1
        return bool(decision)
