"""Load stale values again."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from celery import signals
from celery.concurrency.thread import TaskPool

from stillroom import LoadShed, RedisUnavailable, UnknownLoader
from stillroom.cache.loaders import BadArguments
from stillroom.cache.refreshes import Piece, Refreshes
from stillroom.cache.sharded import shard_of
from stillroom.dispatch import REFRESH_MANY_TASK, REFRESH_TASK, RefreshOrder, RefreshOrders
from stillroom.operation import Failed
from stillroom.shown import repr_of, shown
from stillroom_workers.contained import WouldEnd, loading
from stillroom_workers.crew import Alone, Crew, Hands
from stillroom_workers.tasks.checked import Report, refuse, register_task
from stillroom_workers.tasks.worker_app import WorkerApp

log = logging.getLogger("stillroom.workers")

AWAY_S = 5.0  # how long the orders of a message wait for Redis to come back
LOOK_AGAIN_S = 0.1
SAID_LENGTH = 1_000  # characters of an error: one of a database may have the rows of a statement


def register(app: WorkerApp) -> None:
    """`stillroom.refresh` takes one RefreshOrder, `stillroom.refresh_many` up to a hundred.

    An error of a loader is the single task's failure, seen in Flower; among many it is logged and counted, and the
    others are loaded all the same. So is an order that is refused, which is kept as a dead letter in both cases.
    """
    refreshing = Refreshing(app)
    signals.worker_ready.connect(refreshing.meet, weak=False)
    register_task(app, REFRESH_TASK, RefreshOrder, refreshing.one)
    register_task(app, REFRESH_MANY_TASK, RefreshOrders, refreshing.many)


class Refreshing:
    """The work of both tasks."""

    def __init__(self, app: WorkerApp) -> None:
        self._app = app
        self._hands: Hands[Piece] = Alone(self._pass_on)

    def meet(self, sender: Any, **_: Any) -> None:
        """Note that the worker is ready: now it is known whether it has threads. A child of prefork has none."""
        pool = sender.pool
        if sender.app is self._app and (isinstance(pool, TaskPool) or pool.is_green):
            self._hands = Crew(self._app.threads)

    def one(self, order: RefreshOrder) -> Report:
        """Returns its report: outcome and loader. Events tell it to Flower, where no key is to be seen."""
        patience = time.monotonic() + AWAY_S
        outcome = self._hands.one(partial(self._refresh, order, patience))
        return {"outcome": outcome, "loader": order.loader}

    def many(self, message: RefreshOrders) -> Report:
        """Returns how many orders had which outcome. One that was passed on is another task's."""
        outcomes: list[str] = []
        patience = time.monotonic() + AWAY_S
        shards = self._app.room.settings.shards
        refreshes = Refreshes(message.orders, lambda order: shard_of(order.key.encode(), shards))

        def work(piece: Piece) -> None:
            if piece.waiting and self._app.room.upkeep.refreshes_are_paused():
                outcomes.extend(["paused"] * len(piece.waiting))
                return
            # What a loader raises that is no Exception is the failure of its order, told below like others.
            with suppress(WouldEnd), loading():
                self._app.room.upkeep.refresh_piece(piece)
            for order, ended in refreshes.ended():
                outcomes.append(self._outcome(order, ended, patience))

        self._hands.each(work, refreshes)
        passed_on = len(message.orders) - len(outcomes)
        counts = Counter(outcomes) + Counter({"passed on": passed_on})
        return {"outcomes": dict(counts)}

    def _outcome(self, order: RefreshOrder, ended: dict[str, Any] | Failed, patience: float) -> str:
        if not isinstance(ended, Failed):
            return str(ended["outcome"])
        try:
            return self._refresh(order, patience, partial(_raise, ended.error))
        except (BadArguments, UnknownLoader) as error:
            refuse(self._app, REFRESH_TASK, (), order.model_dump(), str(error))
            return "refused"
        except Exception as error:
            why = shown(repr_of(error), SAID_LENGTH)
            log.error("refresh of %.100r by %r failed: %s", order.key, order.loader, why)
            return "failed"

    def _refresh(
        self,
        order: RefreshOrder,
        patience: float,
        first: Callable[[], dict[str, Any]] | None = None,
    ) -> str:
        """Return the outcome. `first`: raises what the first try has ended in, if it was made among others.

        While the breaker is open the order waits: refusing each at once would only empty the queue. While refreshes
        are paused it is let go, and where its load is shed: a stale read asks again.
        """
        upkeep = self._app.room.upkeep
        if first is None and upkeep.refreshes_are_paused():
            return "paused"
        act = first or partial(upkeep.refresh, order)
        while True:
            try:
                with loading():
                    return str(act()["outcome"])
            except LoadShed:
                return "shed"
            except RedisUnavailable as error:
                if error.reason != "breaker" or time.monotonic() > patience:
                    raise
            time.sleep(LOOK_AGAIN_S)
            act = partial(upkeep.refresh, order)

    def _pass_on(self, piece: Piece) -> bool:
        """Send a task for each order, where none of them is claimed yet."""
        return piece.pass_on(
            lambda order: self._app.send_task(REFRESH_TASK, kwargs=order.model_dump(), retry=False)
        )


def _raise(error: BaseException) -> NoReturn:
    raise error
