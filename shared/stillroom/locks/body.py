"""Take, renew and free locks and semaphores in Redis. locks.py gives them their faces.

A slot is held under a token, for a lease; the holder renews it. Each taking gets a fencing number that is larger
than all before it, so that what the lock protects can refuse a holder who has lost it without noticing.
"""

from __future__ import annotations

import random
import secrets
import time
from contextlib import suppress
from typing import Any, NamedTuple

from stillroom.errors import LockTaken, RedisUnavailable
from stillroom.keys import Keys, sanitized
from stillroom.locks.renewer import Renewer
from stillroom.operation import Freeing, Once, Operation, Pause, Timed
from stillroom.replicas import kept
from stillroom.scripts import slot_renew, slot_take
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.wire import IN_TIME, STEADY, Clock, Command

TAKEN, LATE, CROWDED = 1, -1, -2  # the replies of lua/slot_take.lua
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.1  # between two tries
PLACE_KEPT_MS = 2_000  # a waiter that was not heard of for so long loses its place in the queue
WAITERS = 1_000


def steady_s() -> float:
    """Return the time by which a lease is held, in seconds. While this machine sleeps others take what it holds."""
    return time.clock_gettime(STEADY)


class Grant(NamedTuple):
    """A slot that was taken. `until` is this process' clock (steady_s): nobody else has it before."""

    token: bytes
    fence: int
    until: float


class LocksBody:
    """The operations. A driver runs them."""

    def __init__(self, settings: Settings, clock: Clock, keys: Keys, stats: Stats) -> None:
        self._settings = settings
        self._clock = clock
        self._keys = keys
        self._stats = stats
        self.renewer = Renewer()

    def take(self, name: str, slots: int, lease: float, wait: float) -> Operation[Grant]:
        """Take a slot, or wait for one in the order of asking. Raises LockTaken, RedisUnavailable."""
        token = b"%b.%d" % (secrets.token_hex(8).encode(), int(lease * 1_000))
        deadline = time.monotonic() + wait
        pause = FIRST_PAUSE_S
        try:
            while True:
                asked, left = steady_s(), deadline - time.monotonic()
                reply = yield from self._try(name, token, slots, lease, waits=left > 0)
                if reply[0] == LATE:  # its answer came in time all the same: the clock has stepped
                    self._clock.doubt_clock()
                    reply = yield from self._try(name, token, slots, lease, waits=left > 0)
                if reply[0] == TAKEN:
                    return Grant(token, int(reply[1]), asked + lease)
                if reply[0] == CROWDED or left <= 0:
                    raise LockTaken(name, wait, crowded=reply[0] == CROWDED)
                yield Pause(min(left, pause * random.uniform(0.5, 1.5)))
                pause = min(pause * 1.5, LONGEST_PAUSE_S)
        except GeneratorExit:
            raise
        except BaseException:
            # Given up, cancelled or not answered: the slot, or a place in the queue, may be ours all the same.
            with suppress(RedisUnavailable):  # then it runs out by itself
                yield from self.free(name, token)
            raise

    def _try(
        self, name: str, token: bytes, slots: int, lease: float, *, waits: bool
    ) -> Operation[list[Any]]:
        given = (token, slots, int(lease * 1_000), PLACE_KEPT_MS, IN_TIME, WAITERS, int(waits))
        takes = Timed([slot_take(self._keys.slots(sanitized(name)), *given)])
        (reply,) = yield from kept(takes, self._settings.replicas, self._stats, "a lock")
        return list(reply)

    def renew(self, name: str, token: bytes, lease: float) -> Operation[float]:
        """Keep the slot for another lease. Returns until when (steady_s), or 0.0 if it is lost."""
        asked = steady_s()
        keys = self._keys.slots(sanitized(name))[:1]
        (renewed,) = yield [slot_renew(keys, token, int(lease * 1_000))]
        return asked + lease if renewed else 0.0

    def give_back(self, name: str, token: bytes) -> Operation[bool | None]:
        """Give the slot back, and return whether it was still ours; None: not known, as the reply was late or lost.

        Redis away: RedisUnavailable, and its lease runs out.
        """
        try:
            # Once: the second of two copies would find no slot, as if it had been lost.
            (freed, *_) = yield Once(self._freeing(name, token))
        except RedisUnavailable as error:
            freed = yield from self.free(name, token)
            return True if freed else None if error.may_be_done else False
        except GeneratorExit:
            raise
        except BaseException:
            with suppress(RedisUnavailable):  # then it runs out by itself
                yield from self.free(name, token)
            raise
        return bool(freed)

    def free(self, name: str, token: bytes) -> Operation[bool]:
        """Give back whatever there is under this token, and return whether it was a slot. See give_back."""
        (freed, *_) = yield Freeing(self._freeing(name, token))
        return bool(freed)

    def holders(self, name: str) -> Operation[list[bytes]]:
        """Return the tokens under which slots are held. No two servers have the same. Raises RedisUnavailable."""
        slots, *_ = self._keys.slots(sanitized(name))
        (found,) = yield [(b"ZRANGE", slots, b"0", b"-1")]
        return list(found)

    def _freeing(self, name: str, token: bytes) -> list[Command]:
        slots, queue, waiters, _ = self._keys.slots(sanitized(name))
        return [(b"ZREM", key, token) for key in (slots, queue, waiters)]
