"""Gives back what this process has leased in Redis: loads, refreshes and places. core.py takes the leases.

Others wait for a lease. So what can't be given back at once, because Redis is away or the call is interrupted, is
owed: it goes along with a later call. lua/lib/lease.lua says what a key's lease contains.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterable, Sequence

from stillroom.cache.bites import SCRIPTS_AT_ONCE, in_bites
from stillroom.cache.failures import TOLD_MS, Failures, OfOneCall, as_json, is_of_the_caller
from stillroom.errors import READS_ONLY, LoadShed, RedisRefused, RedisUnavailable
from stillroom.keys import Keys
from stillroom.operation import Freeing, Operation
from stillroom.scripts import back_off, fail_load, release
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import AWAY, Command

OWED_LIMIT = 1_000  # leases and places that a process has yet to free
FAILURES_KEPT_MS = 600_000  # how long after a backoff its count of failures is remembered


class Leases:
    """The leases that this process gives back. A lease is (a sanitized key, the content of that key's lease).

    `besides` are commands that are sent along. Redis away: nothing is raised, and all of it is owed.
    """

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        stats: Stats,
        fall_back: Callable[[str, RedisUnavailable], None],
    ) -> None:
        """`fall_back` is told of each step that Redis did not answer."""
        self._settings = settings
        self._keys = keys
        self._stats = stats
        self._fall_back = fall_back
        self.failures = Failures()
        stats.riders.append(self.failures.forget)
        # Commands that free a lease or a place, and that Redis may not have. Others would wait for these.
        self.owed: dict[Command, None] = {}

    def release(
        self, leases: Iterable[tuple[bytes, bytes]], besides: Sequence[Command] = ()
    ) -> Operation[None]:
        """Free those of these leases that are still ours."""
        yield from self._free("release", Freeing([*self._releasing(leases), *besides]))

    def load_failed(
        self,
        leases: Sequence[tuple[bytes, bytes]],
        error: BaseException,
        besides: Sequence[Command] = (),
    ) -> Operation[None]:
        """Free the leases of a failed load and tell all its waiters."""
        if not isinstance(error, Exception) or is_of_the_caller(error):  # nobody else's failure
            yield from self.release(leases, besides)
            return
        told, batch = as_json(error), Freeing(besides)
        for name, held in leases:
            self.failures.keep(held, error)
            keys = [self._keys.lease(name), self._keys.failure(name)]
            batch.append(fail_load(keys, held, told, TOLD_MS))
        yield from self._free("release", batch)

    def refresh_failed(
        self,
        leases: Sequence[tuple[bytes, bytes]],
        error: BaseException,
        besides: Sequence[Command] = (),
    ) -> Operation[None]:
        """Back a failed refresh off. One that was shed, or failed by its caller alone, is tried with the next stale
        read."""
        if isinstance(error, LoadShed | OfOneCall):
            yield from self.release(leases, besides)
            return
        self._stats.counts["refresh_errors"] += 1
        yield from self.back_off(leases, besides)

    def back_off(
        self, leases: Sequence[tuple[bytes, bytes]], besides: Sequence[Command] = ()
    ) -> Operation[None]:
        """Keep these keys from being refreshed for a while, which doubles with each failure in a row."""
        settings, batch = self._settings, Freeing(besides)
        first, longest = int(settings.backoff * 1000), int(settings.backoff_limit * 1000)
        for name, held in leases:
            given = (held, first, longest, random.randint(500, 1000), FAILURES_KEPT_MS)
            batch.append(back_off([self._keys.lease(name)], *given))
        yield from self._free("back_off", batch)

    def owe(self, leases: Iterable[tuple[bytes, bytes]], besides: Sequence[Command] = ()) -> None:
        """Have these leases freed along with a later call."""
        self._owe([*self._releasing(leases), *besides])

    def free_owed(self) -> Operation[None]:
        """Free what could not be freed. Raises RedisUnavailable.

        Each of these commands acts on this process's own lease or place only, so late or twice does no harm. A
        server that refuses all writes is asked again by the next call, with the first of them.
        """
        bite = 1
        while some := list(self.owed)[:bite]:
            try:
                yield some
            except RedisRefused as refused:
                if refused.reason in AWAY:
                    raise
                if refused.reason in READS_ONLY:
                    return
            for command in some:  # those that were refused run out by themselves
                self.owed.pop(command, None)
            bite = SCRIPTS_AT_ONCE

    def _releasing(self, leases: Iterable[tuple[bytes, bytes]]) -> list[Command]:
        return [release([self._keys.lease(name)], held) for name, held in leases]

    def _free(self, what: str, batch: Freeing) -> Operation[None]:
        """Send commands that others wait for. Where Redis is away, or a signal or a cancellation interrupts this,
        they go along with a later call.
        """
        try:
            yield from in_bites(batch)
        except RedisUnavailable as error:
            self._fall_back(what, error)
            self._owe(batch)
        except BaseException:
            self._owe(batch)
            raise

    def _owe(self, commands: Sequence[Command]) -> None:
        if len(self.owed) < OWED_LIMIT:  # past it they run out by themselves
            self.owed.update(dict.fromkeys(commands))


def load_lease(ms: int) -> bytes:
    """Return the content of a key's lease during a load that may take `ms`."""
    return b"load.%b.%d" % (new_token(), ms)


def loading(holder: bytes | None) -> bytes:
    """Return the lease, if it is a load's."""
    return holder if holder is not None and holder.startswith(b"load.") else b""


def refresh_lease(token: str) -> bytes:
    """Return what the content of a key's lease begins with during a worker's refresh."""
    return b"working.%b." % token.encode()


def new_token() -> bytes:
    return secrets.token_hex(8).encode()
