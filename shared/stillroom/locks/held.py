"""A slot of a lock or semaphore while somebody holds it, and how it is renewed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from types import TracebackType
from typing import Self

from stillroom.errors import LockLost, RedisUnavailable
from stillroom.locks.body import Grant, LocksBody, steady_s
from stillroom.operation import AsyncDriver, Driver
from stillroom.wire import beside_all

log = logging.getLogger("stillroom")

RENEWALS = 3  # in each lease: one that fails is tried again before the slot is lost


class _Held:
    """The part that both faces share.

    A forked child holds none of its parent's locks, and gives none of them back.
    """

    def __init__(self, name: str, grant: Grant, lease: float, longest: float) -> None:
        self.name = name
        self.fence = grant.fence
        self._token = grant.token
        self._until = grant.until
        self._lease = lease
        self._renewed_until = steady_s() + longest
        self._is_released = False
        self._process = os.getpid()

    @property
    def is_held(self) -> bool:
        """Return whether the lease still runs, so that nobody else can hold the lock or slot.

        It looks at this process's clock only, so it works while Redis is away, and costs nothing.
        """
        return not self._is_over and steady_s() < self._until

    @property
    def _is_over(self) -> bool:
        """Return whether there is nothing to give back: it was given back, or is held by the parent process."""
        return self._is_released or self._process != os.getpid()

    def check(self) -> None:
        """Raise LockLost unless it is held: call it before a step that must not be done by two."""
        if self._is_released:
            raise LockLost(self.name, "is not held any more: it was given back")
        if not self.is_held:
            raise LockLost(self.name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} fence {self.fence}>"

    @property
    def _is_renewed(self) -> bool:
        return self.is_held and steady_s() < self._renewed_until

    def _learn(self, until: float) -> bool:
        """Take in the reply to a renewal; return whether to go on."""
        if until:
            self._until = until
        elif not self._is_released:  # else it was given back while the renewal was on its way
            self._until = 0.0
            log.warning("the lock %r is lost: its lease ran out before it was renewed", self.name)
        return bool(until)


class Held(_Held):
    """A held lock or slot, for threads and greenlets. A thread renews it.

    `fence` is larger than that of every holder before. Hand it to what the lock protects, which refuses a smaller
    one than it has seen.
    """

    def __init__(
        self,
        body: LocksBody,
        driver: Driver,
        name: str,
        grant: Grant,
        lease: float,
        longest: float,
    ) -> None:
        super().__init__(name, grant, lease, longest)
        self._body = body
        self._driver = driver
        self._renewal = body.renewer.add(lease / RENEWALS, self._renew)

    def release(self) -> None:
        """Give the slot back, once. Raises LockLost if it was lost meanwhile. Redis away: its lease runs out."""
        try:
            if self._is_over:
                return
            was_held, freed = self.is_held, None
            self._stop_renewing()
            with contextlib.suppress(RedisUnavailable):
                freed = self._driver.run(self._body.give_back(self.name, self._token))
        except BaseException:  # a signal's handler raised: it would be renewed for `longest`
            if self._process == os.getpid():
                self._stop_renewing()
                with contextlib.suppress(RedisUnavailable):
                    self._driver.run(self._body.free(self.name, self._token))
            raise
        if not (was_held if freed is None else freed):
            raise LockLost(self.name)

    def _stop_renewing(self) -> None:
        self._is_released = True
        self._body.renewer.drop(self._renewal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.release()
        except LockLost:
            if error is None:  # else the block's own error says more
                raise

    def _renew(self) -> bool:
        """Renew once; return whether there is to be another renewal."""
        if not self._is_renewed:
            return False
        try:
            until = self._driver.run(self._body.renew(self.name, self._token, self._lease))
        except RedisUnavailable:
            return True
        return self._learn(until)


class AsyncHeld(_Held):
    """A held lock or slot, for asyncio. A task renews it. See Held."""

    def __init__(
        self,
        body: LocksBody,
        driver: AsyncDriver,
        name: str,
        grant: Grant,
        lease: float,
        longest: float,
    ) -> None:
        super().__init__(name, grant, lease, longest)
        self._body = body
        self._driver = driver
        # The time of a request that holds it may be up long before the request ends.
        task = beside_all().run(asyncio.create_task, self._renew(), name=f"stillroom lock {name}")
        self._renewing = task

    async def release(self) -> None:
        """See Held.release."""
        if self._is_over:
            return
        was_held, freed = self.is_held, None
        self._is_released = True
        self._renewing.cancel()
        with contextlib.suppress(RedisUnavailable):
            freed = await self._driver.run(self._body.give_back(self.name, self._token))
        if not (was_held if freed is None else freed):
            raise LockLost(self.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.release()
        except LockLost:
            if error is None:
                raise

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease / RENEWALS)
            if not self._is_renewed:
                return
            try:
                renewing = self._body.renew(self.name, self._token, self._lease)
                if not self._learn(await self._driver.run(renewing)):
                    return
            except RedisUnavailable:
                continue
            except Exception:
                log.exception("the lock %r could not be renewed; it is tried again", self.name)
