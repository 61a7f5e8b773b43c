"""Guards remote control: a worker takes from its own app's queues only, keeps a place to run tasks in, and replies
only to who asked.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from celery.app import control
from kombu import pidbox
from kombu.exceptions import OperationalError

import redis
from stillroom.shown import shown
from stillroom_workers.hygiene import REASON_LENGTH

# Neither library has types of its own. As Any they look the same to mypy with and without stubs.
_StockControl: Any = control.Control
_StockMailbox: Any = pidbox.Mailbox
_StockNode: Any = pidbox.Node

_logger = logging.getLogger(__name__)


class Control(_StockControl):  # type: ignore[misc]
    """Remote control, whose replies go to who asked and nowhere else."""

    def enable_events(self, *args: Any, **options: Any) -> Any:
        """Tell workers to send events. Flower does that every five seconds, and looks at no error: where the broker
        is away its log says so already."""
        with suppress(OperationalError):
            return super().enable_events(*args, **options)

    class Mailbox(_StockMailbox):  # type: ignore[misc]
        class node_cls(_StockNode):  # type: ignore[misc]  # noqa: N801  # kombu's name
            def handle(self, method: Any, arguments: Any = None) -> Any:
                """Carry out a command, unless the worker would end, or be deaf, by it. Refused any later than here,
                it would be so and answer "OK".

                A worker takes from its own app's queues, and leaves no others: any list of Redis looks like one.
                """
                given = {**(arguments or {})}
                if method in ("add_consumer", "cancel_consumer"):
                    self._look_at_queue(given.get("queue"))
                elif method in ("pool_grow", "pool_shrink"):
                    _keep_a_place(method, given, self.state.consumer.pool.num_processes)
                elif method == "autoscale":
                    _look_at_scale(given.get("max"), given.get("min"))
                return super().handle(method, given)

            def _look_at_queue(self, queue: Any) -> None:
                known = [one.name for one in self.state.app.conf.task_queues]
                if queue not in known:
                    raise ValueError(
                        f"{shown(queue, 60)!r} is none of the queues {', '.join(known)}"
                    )

            def reply(
                self, data: Any, exchange: Any, routing_key: Any, ticket: Any, **_: Any
            ) -> None:
                """Stock publishes wherever the command says. A reply that can't be sent is nobody's loss but
                theirs."""
                try:
                    super().reply(data, self.mailbox.reply_exchange.name, routing_key, ticket)
                except (redis.ResponseError, OperationalError) as error:
                    _logger.error(
                        "A reply to a remote command was refused or lost: %s",
                        shown(error, REASON_LENGTH),
                    )


def _keep_a_place(method: str, given: dict[str, Any], places: int) -> None:
    """Have a worker that is told to give up all its places keep one. With none it takes messages and runs nothing,
    and looks alive. Fewer than one is no number of places: stock counts on with them, below zero."""
    number = given.setdefault("n", 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{shown(number, 60)} is no number of places: 1 or more")
    if method == "pool_shrink":
        if places < 2:
            raise ValueError("this pool has one place, which it keeps")
        given["n"] = min(number, places - 1)


def _look_at_scale(most: Any, least: Any) -> None:
    """Refuse a scale that leaves no process at most, as `--autoscale` does."""
    for number, fewest in ((most, 1), (least, 0)):
        if number is not None and (not isinstance(number, int) or number < fewest):
            raise ValueError(
                f"{shown(number, 60)}: a worker has at most 1 process or more, and 0 or more at least"
            )
