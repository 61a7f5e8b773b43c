"""Orders on their way: written down by apps, carried out by workers, crossed off when they are done.

They decide what readers see, so they are on the state's server, where nothing is evicted: the cache's own list of
work (`todo`) may be lost, and costs memory then. An order that can't be done now is due again, later each time.
After eight tries it becomes a dead letter, which a person sends again or drops; so does an order with which eight
workers have ended. A try that finds the cache's Redis away does not count, and neither does a load that is shed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from stillroom.cache.bites import small_enough
from stillroom.cache.orders import (
    OF_0_1,
    Load,
    NotDone,
    Order,
    from_body,
    from_member,
    to_body,
    to_member,
)
from stillroom.cache.terms import LEASE_LIMIT, Terms
from stillroom.dead_letters import DeadLetter, DeadLetters
from stillroom.dispatch import RECLAIM_TASK, Dispatch
from stillroom.errors import (
    MISCONFIGURED,
    OF_THE_COMMAND,
    DeadLetterRefused,
    DispatchFailed,
    LoadShed,
    RedisUnavailable,
)
from stillroom.keys import Keys
from stillroom.operation import STATE, On, Once, Operation
from stillroom.pauses import PUT_OFF_MS, Pauses, are_paused
from stillroom.replicas import kept
from stillroom.scripts import finish_order, take_order, write_orders
from stillroom.settings import Settings
from stillroom.shown import message_of
from stillroom.stats import Stats
from stillroom.wire import leases_of_loads, micros

ORDERS_LIMIT = 10_000
TRIES_LIMIT = 8
HELD_MS = 60_000  # at least; then the order of a worker that died is due again
# After the first try it is due for the next run, which may be another worker's; then later each time.
FIRST_DELAY_MS, LONGEST_DELAY_MS = 15_000, 300_000
KIND = "order"  # of dead letter
INLINE_S = 20.0  # for orders that are carried out by who gives them
# Orders of one run that may meet a shard that is away: each takes up to a call's time.
AWAY_LIMIT = 20
# Redis refuses the order then, and is not away. Where the configuration is wrong, orders wait until it is mended.
REFUSED = OF_THE_COMMAND - MISCONFIGURED


class Taken(NamedTuple):
    """An order that is ours until `due`."""

    member: bytes
    due: bytes
    tries: int


class Ordering:
    """The operations. A driver of the cache runs them; orders are read and written on the state's server."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        dispatch: Dispatch,
        stats: Stats,
        dead_letters: DeadLetters,
        pauses: Pauses,
        cache: Any,
    ) -> None:
        self._replicas = settings.replicas
        self._keys = [keys.orders, keys.order_tries]
        self._dispatch = dispatch
        self._stats = stats
        self._dead_letters = dead_letters
        self._pauses = pauses
        self._cache = cache
        dead_letters.senders[KIND] = self._send_again

    def refuse_unfilled(self, *names: str) -> None:
        """Raise InvalidKey for a loader's template in the place of a key or a tag. See Loaders."""
        self._cache.loaders.refuse_unfilled(*names)

    def order(self, *orders: Order) -> Operation[None]:
        """Write down what a worker is to do: it will be done, whatever becomes of workers and broker.

        The same order twice, not yet done, is one. Large ones go in several scripts, each with its own deadline.
        Raises DispatchFailed if 10,000 wait already. Redis away: RedisUnavailable. Some may be written down then.
        """
        left: Sequence[bytes] = list(map(to_member, orders))
        while left:
            some = small_enough(left, len)
            yield On([(STATE, self._written(some))])
            left = left[len(some) :]
        if self._dispatch.inline:
            yield from self._carry_out_here()
        else:
            self._wake()

    def _carry_out_here(self) -> Operation[None]:
        """Do at once what is due, because no worker will. What can't be done now is due again with a later order.

        An order that a load gives waits for that one: the load might order itself.
        """
        if not leases_of_loads():
            with suppress(RedisUnavailable):
                yield from self.carry_out(INLINE_S)

    def carry_out(self, budget: float) -> Operation[dict[str, int]]:
        """Do what is due, for `budget` seconds, each order once.

        Returns counts: orders done, dead (they failed too often), left, and due among those. An order that could
        not be done is due again. Redis away: RedisUnavailable; the orders stay written down.
        """
        deadline = time.monotonic() + budget
        counts, began_us = Counter[str](), 0
        away: list[RedisUnavailable] = []
        most_away = AWAY_LIMIT if len(self._cache.shards) > 1 else 1
        while time.monotonic() < deadline and len(away) < most_away:
            ((taken, now_us),) = yield On([(STATE, self._take(began_us))])
            if taken is None:
                break
            began_us = began_us or now_us  # work that becomes due from now on is for the next run
            try:
                counts[(yield from self._try(taken))] += 1
            except RedisUnavailable as error:
                # Perhaps of one shard: the others' orders do not wait for it.
                away.append(error)
        if away:
            raise away[0]
        ((left, due),) = yield On([(STATE, self._count())])
        return {"done": counts["done"], "dead": counts["dead"], "left": left, "due": due}

    def adopt(self, works: Sequence[bytes]) -> Operation[bool]:
        """Write down orders that 0.1 wrote down in `todo`, where they may be crossed off then.

        False: 10,000 orders wait already, so they have to stay there. Redis away: RedisUnavailable.
        """
        try:
            yield On([(STATE, self._written(work.removeprefix(OF_0_1) for work in works))])
        except DispatchFailed as error:
            self._stats.say("orders that 0.1 left wait for room", "", error)
            return False
        self._wake()
        return True

    # Carrying out

    def _try(self, taken: Taken) -> Operation[str]:
        """Try an order; return done, dead or "put off"."""
        try:
            if taken.tries > TRIES_LIMIT:
                raise NotDone(f"{TRIES_LIMIT} workers have ended while they tried it")
            order = from_member(taken.member)
            if isinstance(order, Load) and (yield from are_paused(self._pauses)):
                return (yield from self._put_off(taken, PUT_OFF_MS))
            yield from order.carried_out_by(self._cache)
        except RedisUnavailable as error:
            if error.reason in REFUSED:
                return (yield from self._failed(taken, error))
            self._stats.say("orders wait until the cache's Redis is back", error.reason, error)
            yield from self._put_off(taken, 0)
            raise
        except LoadShed as shed:
            # Other loads of this loader are under way: this one waits, and has not failed.
            return (yield from self._put_off(taken, int(shed.retry_after * 1_000)))
        except Exception as error:
            return (yield from self._failed(taken, error))
        yield On([(STATE, self._finish(taken))])
        return "done"

    def _put_off(self, taken: Taken, ms: int) -> Operation[str]:
        """Make an order due again that was not tried."""
        yield On([(STATE, self._finish(taken, ms, counts=False))])
        return "put off"

    def _failed(self, taken: Taken, error: Exception) -> Operation[str]:
        reason = f"{type(error).__name__}: {message_of(error)}"
        if taken.tries >= TRIES_LIMIT:
            what = "an order failed too often and is a dead letter now"
            self._stats.say(what, type(error).__name__, reason)
            yield On([(STATE, self._bury(taken, reason))])
            return "dead"
        self._stats.say("an order failed and is tried again", type(error).__name__, reason)
        later = FIRST_DELAY_MS * 2 ** (taken.tries - 2) if taken.tries > 1 else 0
        yield On([(STATE, self._finish(taken, min(int(later), LONGEST_DELAY_MS)))])
        return "put off"

    # On the state's server

    @property
    def _terms(self) -> Terms:
        terms: Terms = self._cache.shards[0].terms
        return terms

    def _written(self, members: Iterable[bytes]) -> Operation[None]:
        writes = write_orders(self._keys, ORDERS_LIMIT, self._terms.keep_ms, *members)
        (written,) = yield from kept([writes], self._replicas, self._stats, "an order")
        if not written:
            raise DispatchFailed(f"{ORDERS_LIMIT:,} orders wait and no worker takes them")

    def _wake(self) -> None:
        if not self._dispatch.inline:
            self._dispatch.wake(RECLAIM_TASK)

    def _take(self, by_us: int) -> Operation[tuple[Taken | None, int]]:
        # Not while its load may be under way: another worker would take the lease over, and lose it in turn.
        load_ms = max(HELD_MS, self._cache.loaders.longest_lease())
        longest_ms = max(LONGEST_DELAY_MS, int(self._terms.longest(LEASE_LIMIT) * 1_000))
        times = (HELD_MS, longest_ms, self._terms.keep_ms, by_us, load_ms)
        (taken,) = yield Once([take_order(self._keys, *times)])
        if taken is None:
            return None, 0
        member, due, tries, now_us = taken
        return Taken(member, due, tries), int(now_us)

    def _finish(
        self, taken: Taken, again_ms: int | None = None, *, counts: bool = True
    ) -> Operation[None]:
        """Cross the order off, or put it off. `counts`: the try is one of those after which it is a dead letter."""
        again = b"" if again_ms is None else b"%d" % again_ms
        yield [finish_order(self._keys, taken.member, taken.due, again, int(counts))]

    def _bury(self, taken: Taken, reason: str) -> Operation[None]:
        body, place = to_body(taken.member), (taken.member, taken.due)
        yield Once([self._dead_letters.burying(KIND, body, reason, taken.tries, *place)])

    def _count(self) -> Operation[tuple[int, int]]:
        left, now = yield [(b"ZCARD", self._keys[0]), (b"TIME",)]
        (due,) = yield [(b"ZCOUNT", self._keys[0], b"-inf", b"%d" % micros(now))]
        return left, due

    def _send_again(self, letter: DeadLetter) -> Operation[None]:
        """Write the order of a dead letter down anew, with the state's driver."""
        try:
            order = from_body(letter.body)
        except ValueError:
            reason = "this release can make no order of it; a newer one may, or drop it"
            raise DeadLetterRefused(letter.id, reason) from None
        yield from self._written([to_member(order)])
