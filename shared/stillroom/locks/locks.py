"""`room.lock` and `room.semaphore`, for threads and for asyncio."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType

from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument, Misplaced, RedisUnavailable
from stillroom.keys import sanitized
from stillroom.locks.body import LocksBody
from stillroom.locks.held import AsyncHeld, Held
from stillroom.operation import AsyncDriver, Driver
from stillroom.whole import is_whole

LEAST_LEASE_S, LONGEST_LEASE_S = 0.1, 3_600.0
LONGEST_S = 366 * 86_400.0
SLOTS_LIMIT = 10_000


class Terms:
    """A name, and on which terms its slots are held. Raises InvalidKey, InvalidArgument."""

    def __init__(
        self, name: str, slots: int, lease: Duration, wait: Duration, longest: Duration
    ) -> None:
        sanitized(name, "a lock's name")
        if not is_whole(slots, most=SLOTS_LIMIT):
            raise InvalidArgument(f"slots={slots!r}: a whole number from 1 to {SLOTS_LIMIT:,}")
        self.name = name
        self.slots = slots
        self.lease = seconds_of("lease", lease, least=LEAST_LEASE_S, most=LONGEST_LEASE_S)
        self.wait = seconds_of("wait", wait, least=0)
        self.longest = seconds_of("longest", longest, least=LEAST_LEASE_S, most=LONGEST_S)

    def __str__(self) -> str:
        return f"{self.name!r} slots {self.slots} lease {self.lease:g} s"


class Lock:
    """A lock, or a semaphore, that processes share. `with room.lock("import") as held: …`

    It is held for a lease and renewed by a thread. Waiting callers are served in the order of asking. It is not
    reentrant, and an object is for one `with` at a time: `room.lock(…)` costs nothing.
    Raises LockTaken when `wait` is over, and LockLost at the end of the block if the lock was lost meanwhile.
    Redis away: RedisUnavailable, since nobody can say whether somebody else holds it.
    No thread is free to renew it: RuntimeError, and the lock is not taken.
    """

    def __init__(self, body: LocksBody, driver: Driver, terms: Terms) -> None:
        self._body = body
        self._driver = driver
        self._terms = terms
        self._use = _Use(terms.name)
        self._held: Held | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._terms}>"

    def acquire(self) -> Held:
        """Take the lock, and release it by `release()` of what is returned, or by `with` of it."""
        name, terms = self._terms.name, self._terms
        grant = self._driver.run(self._body.take(name, terms.slots, terms.lease, terms.wait))
        try:
            return Held(self._body, self._driver, name, grant, terms.lease, terms.longest)
        except BaseException:  # no thread is free to renew it, or a signal came
            with suppress(RedisUnavailable):  # then its lease runs out
                self._driver.run(self._body.free(name, grant.token))
            raise

    def __enter__(self) -> Held:
        self._use.begin()
        try:
            self._held = self.acquire()
        except BaseException:
            self._use.end()
            raise
        return self._held

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        held, self._held = self._held, None
        assert held is not None
        try:
            self._use.end()
        finally:  # whatever a signal's handler raises
            held.__exit__(kind, error, trace)


class AsyncLock:
    """Hold a lock, or a semaphore, for asyncio: `async with room.lock("import") as held: …`. See Lock.

    A task renews it.
    """

    def __init__(self, body: LocksBody, driver: AsyncDriver, terms: Terms) -> None:
        self._body = body
        self._driver = driver
        self._terms = terms
        self._use = _Use(terms.name)
        self._held: AsyncHeld | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._terms}>"

    async def acquire(self) -> AsyncHeld:
        """Take it, and release it by `release()` of what is returned, or by `async with` of it."""
        name, terms = self._terms.name, self._terms
        grant = await self._driver.run(self._body.take(name, terms.slots, terms.lease, terms.wait))
        return AsyncHeld(self._body, self._driver, name, grant, terms.lease, terms.longest)

    async def __aenter__(self) -> AsyncHeld:
        self._use.begin()
        try:
            self._held = await self.acquire()
        except BaseException:
            self._use.end()
            raise
        return self._held

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        held, self._held = self._held, None
        self._use.end()
        assert held is not None
        await held.__aexit__(kind, error, trace)


class _Use:
    """One `with` at a time, from before it waits: of two that waited, one would give back the slot of the other."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._taken = threading.Lock()

    def begin(self) -> None:
        """Raise Misplaced if another `with` of the same object waits or holds."""
        if not self._taken.acquire(blocking=False):
            raise Misplaced(
                f"the lock {self._name!r} is in use by this object: call room.lock(…) for each use"
            )

    def end(self) -> None:
        self._taken.release()
