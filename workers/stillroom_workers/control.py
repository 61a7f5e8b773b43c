"""Guards remote control: a worker takes from its own app's queues only, and replies only to who asked."""

from __future__ import annotations

import logging
from typing import Any

from celery.app import control
from kombu import pidbox

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

    class Mailbox(_StockMailbox):  # type: ignore[misc]
        class node_cls(_StockNode):  # type: ignore[misc]  # noqa: N801  # kombu's name
            def handle(self, method: Any, arguments: Any = None) -> Any:
                """Carry out a command. A worker takes from its own app's queues, and leaves no others: any list
                of Redis looks like one. Refused any later than here, it would end the worker and answer "OK"."""
                queue = (arguments or {}).get("queue")
                known = [one.name for one in self.state.app.conf.task_queues]
                if method in ("add_consumer", "cancel_consumer") and queue not in known:
                    raise ValueError(
                        f"{shown(queue, 60)!r} is none of the queues {', '.join(known)}"
                    )
                return super().handle(method, arguments)

            def reply(
                self, data: Any, exchange: Any, routing_key: Any, ticket: Any, **_: Any
            ) -> None:
                """Stock publishes wherever the command says. A reply that can't be sent is nobody's loss but
                theirs."""
                try:
                    super().reply(data, self.mailbox.reply_exchange.name, routing_key, ticket)
                except redis.ResponseError as error:
                    _logger.error(
                        "A reply to a remote command was refused: %s", shown(error, REASON_LENGTH)
                    )
