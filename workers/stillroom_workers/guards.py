"""Guards a Celery worker on Redis: it outlives a restart or failover of Redis and a bad element in its queue.

Stock Celery 5.7.0 with kombu 5.7.0 ends the worker process in each case. Each guard, here, in channels.py and in
control.py, names the function that does it; the tests show the stock worker dying before the guarded one living.

Wiring, on the one app that worker, beat, Flower and producers share. The URL stays what it is:

    app = Celery("stillroom", broker="redis://…", amqp="stillroom_workers.connections:AMQP")
    app.conf.worker_consumer = "stillroom_workers.guards:Consumer"
    app.conf.broker_transport_options = {"undeliverable": bury, …}
    app.conf.broker_connection_max_retries = None  # stock ends after 100 tries, which are seven minutes here

`bury(raw, queue, reason)` is called with each element that no task can be made of: the bytes that lay in the queue
(for some, the same JSON in other bytes), where they lay, and what is wrong. It keeps them (letters.py) and does not
raise.

A half-open connection needs options, not code: `socket_timeout` *and* `health_check_interval`, both
5 s. Cut off without a word, the worker went on after 10 to 12 s. With the first alone it took 53 s,
with the second alone or with neither it was still deaf after 30 s.
"""

from __future__ import annotations

import logging
import warnings
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from time import sleep
from typing import Any, ClassVar

from celery import signals
from celery.exceptions import CPendingDeprecationWarning
from celery.utils import threads
from celery.worker import consumer, heartbeat, state
from celery.worker.consumer import heart
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

import redis
from stillroom.errors import did_you_mean
from stillroom.shown import shown
from stillroom_workers import rabbit
from stillroom_workers.channels import (
    WRONG_SHAPE,
    NotTheServer,
    Transport,
    Unacked,
    WrongType,
    log_undeliverable,
)
from stillroom_workers.hygiene import (
    RAW_LIMIT,
    REASON_LENGTH,
    flaw_in_content,
    flaw_in_json,
    flaw_in_task,
    keep_what_a_task_needs,
)

# Between two connections to a server that says that it is not the one: it answers at once, and for seconds.
PEER_PAUSE_S = 1.0
SHOWN_FIELDS = 8  # of a task's arguments

# Neither library has types of its own. As Any they look the same to mypy with and without stubs.
_StockConsumer: Any = consumer.Consumer
_threads: Any = threads
_StockHeart: Any = heartbeat.Heart
_StockHeartStep: Any = heart.Heart

_logger = logging.getLogger(__name__)


class Heart(_StockHeart):  # type: ignore[misc]
    """The heart of a worker, each of whose beats is published once.

    Stock publishes a beat until it succeeds, in the thread that takes messages. While the broker hangs that thread
    does nothing else: it does not see SIGTERM either. Here the dispatcher keeps a beat that failed, and the thread
    goes on. It finds the connection lost by its own timeouts.
    """

    def _send(self, event: str, retry: bool = False) -> Any:
        return super()._send(event, retry=False)


class HeartStep(_StockHeartStep):  # type: ignore[misc]
    """The step that starts the heart with each new connection."""

    def start(self, c: Any) -> None:
        c.heart = Heart(c.timer, c.event_dispatcher, self.heartbeat_interval)
        c.heart.start()


STOCK_HEART = "celery.worker.consumer.heart:Heart"


class Consumer(_StockConsumer):  # type: ignore[misc]
    """Celery's consumer, which makes a dead letter of a message where stock would exit, loop or delete it.

    A sound envelope may still hold no task. Stock (`celery/worker/consumer/consumer.py`,
    `create_task_handler`) foresees three exceptions; `worker/strategy.py` and `worker/request.py`
    raise others for a body that isn't `[args, kwargs, embed]`. The worker exits and gives the
    message back, the next worker reads it: one element takes them all down, again and again.
    What stock does foresee it deletes, and prints up to 1,024 characters of the arguments.

    No result is stored for a dead letter: whoever waits for one waits for his own timeout.
    """

    class Blueprint(_StockConsumer.Blueprint):  # type: ignore[misc]
        default_steps: ClassVar = [
            HeartStep if step == STOCK_HEART else step
            for step in _StockConsumer.Blueprint.default_steps
        ]

    def close(self) -> None:
        """Take no more messages. From here on no answer of RabbitMQ is waited for longer than two seconds.

        Stock waits for each of them for ever: SIGTERM did not end a worker whose broker hangs. No acknowledgement
        gets lost, for none is answered. Connections to Redis have their deadlines anyway.
        """
        for one in (self, self.event_dispatcher):
            link = getattr(one, "connection", None)
            if link is not None and link.transport.driver_type == "amqp":
                _threads.bound_open_broker_sockets(link, rabbit.ANSWERED_AT_THE_END_S)
        super().close()

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Return the handler of every message: looks first, then catches what looking can't foresee.

        Called with each new connection.
        """
        self._give_back()
        stock = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            try:
                flaw = _flaw(message)
                if flaw is None:
                    self._trim(message)
                    stock(message)
                    return
            except WRONG_SHAPE as exc:
                if _is_handed_over(message):
                    raise  # it may be running: whatever broke, it wasn't the message
                flaw = repr(exc)
            self._bury(message, flaw)

        return on_task_received

    def _give_back(self) -> None:
        """Acknowledge what could not be while Redis was away, and put back into their queues what was taken and not
        noted. Replies and events are not waited for."""
        qos = getattr(self.task_consumer.channel, "qos", None)
        if isinstance(qos, Unacked):
            qos.ack_late()
        ours, unnoted = self.app.amqp.queues.consume_from, Transport.unnoted
        while unnoted:
            queue, message = unnoted[0]
            if queue in ours:
                self.task_consumer.channel._put(queue, message)
            unnoted.popleft()

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        self._raise_where_refused(exc)
        super().on_connection_error_before_connected(exc)
        self._mend(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        self._raise_where_refused(exc)
        self._keep_what_runs()
        # Celery tells in seven lines of a setting that is as it is on purpose: see app.py.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CPendingDeprecationWarning)
            super().on_connection_error_after_connected(exc)
        self._mend(exc)

    def _keep_what_runs(self) -> None:
        """Keep the messages of running tasks from being given back as the channel closes.

        Stock gives back all of them where Redis stayed up, or is up again by then: such a task ran twice at the
        same time. Now it is acknowledged when it has ended, on its old channel. RabbitMQ gives back by itself, and
        its channel knows no such messages.
        """
        qos: Any = getattr(getattr(self.task_consumer, "channel", None), "qos", None)
        for request in list(state.requests.values()) if qos is not None else ():
            # What waits for its time in this process is given back: the timer is cleared.
            if request.eta is None or request in state.active_requests:
                qos._delivered.pop(request.message.delivery_tag, None)

    @staticmethod
    def _raise_where_refused(error: Exception) -> None:
        """Raise what RabbitMQ will say again: stock tries anew without an end, five times a second."""
        if rabbit.refusal(error, "") is not None:
            raise error

    def _mend(self, error: Exception) -> None:
        """Heal a key of a wrong type, and wait before the next connection: such a server answers at once.

        So does RabbitMQ with some errors.
        """
        if isinstance(error, WrongType):
            self._heal()
        if isinstance(error, (NotTheServer, WrongType, *rabbit.AGAIN)):
            sleep(PEER_PAUSE_S)

    def _heal(self) -> None:
        """Heal by a channel of its own, because the existing ones have lost their connections."""
        try:
            with self.app.connection_for_write() as connection:
                mailbox = self.app.control.mailbox
                others = (mailbox.exchange.name, mailbox.reply_exchange.name)
                connection.channel().heal(self.app.amqp.queues.consume_from.values(), others)
        except (redis.RedisError, OSError) as error:
            why = shown(error, REASON_LENGTH)
            _logger.error("A key of a wrong type could not be deleted: %s", why)

    def shown_name(self, task: str, fields: Any) -> str:
        """Return the name that events and logs give a task with these arguments."""
        return task

    def _trim(self, message: Any) -> None:
        """Keep what a task needs, and let events tell how much it was given, not what.

        Events go to Flower, which keeps them and shows them to whoever may look. Arguments name keys, and
        keys name people. A client of ours sends no more than that anyway; Celery's own writes out whatever it
        is given, for the worker to pass on. Not in the message itself, of which a dead letter may be made.
        """
        body = message.payload
        args, fields = (
            body[:2] if isinstance(body, list) else (body.get("args"), body.get("kwargs"))
        )
        task = message.headers.get("task") or body["task"]
        message.headers = keep_what_a_task_needs(message.headers, body) | {
            "argsrepr": f"({len(args)})" if args else "",
            "kwargsrepr": ", ".join(map(_shown, list((fields or {}).items())[:SHOWN_FIELDS])),
            "shadow": self.shown_name(task, fields or {}),
        }

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Handle a message that names a task neither in the headers (protocol 2) nor in the body (protocol 1)."""
        self._bury(message, "names no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Handle a message whose task this worker doesn't have: a typo, or a producer newer than the worker."""
        known = [name for name in self.app.tasks if not name.startswith("celery.")]
        name = str(message.headers.get("task", ""))[:100]
        self._bury(message, f"no such task here{did_you_mean(name, known)}")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Handle a message with an ETA that is no date, or a content type that isn't accepted."""
        self._bury(message, repr(exc))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Handle a body that doesn't decode or decompress."""
        self._bury(message, repr(exc))

    def _bury(self, message: Any, reason: str) -> None:
        """Keep the message as a dead letter, then acknowledge it. If Redis leaves in between it is kept twice."""
        task, task_id = message.headers.get("task"), message.headers.get("id")
        options = self.app.conf.broker_transport_options
        raw, queue = _raw(message), message.delivery_info["routing_key"]
        why = f"task {task!r:.60} id {task_id!r:.40}: {reason}"
        options.get("undeliverable", log_undeliverable)(raw, queue, why)
        message.ack()
        signals.task_rejected.send(sender=self, message=message, exc=None)


def _flaw(message: Any) -> str | None:
    """Return what would go wrong once the message is with the pool, where nobody catches it; or None.

    In a thread of the pool the exception ends in a Future that nobody reads: no log line, no ack,
    one slot of the prefetch gone. After each visibility timeout the message returns and takes
    another: four times, and a worker with four threads consumes nothing while it still looks alive.
    In the solo pool the worker exits.
    """
    if len(message.body) > RAW_LIMIT:  # of what lay in Redis that is known by now
        return f"it has {len(message.body):,} bytes, and may have {RAW_LIMIT:,}"
    held = partial(_held, message)
    flaw = flaw_in_content(message.content_type) or flaw_in_json(message.body)
    if flaw is None and message.content_encoding == "utf-8":
        # Not by kombu's registry: a project may have put a decoder of its own there, under the name of JSON, which
        # makes a date of each text that looks like one.
        message._decoded_cache = loads(bytes_to_str(message.body))
    return flaw or flaw_in_task(message.headers, message.payload, held)


def _held(message: Any) -> tuple[int, int]:
    """Return (bytes of a message, how many messages this worker has taken and not acknowledged).

    RabbitMQ gives a worker no more messages than it has places for.
    """
    qos = getattr(message.channel, "qos", None)
    return len(_raw(message)), 0 if qos is None else len(qos._delivered)


def _raw(message: Any) -> bytes:
    """Return the message in the form in which it lies in Redis. RabbitMQ has another one, which is not JSON."""
    envelope = getattr(message, "_raw", None)
    if envelope is None:
        body = message.body
        text = body.encode(errors="backslashreplace") if isinstance(body, str) else bytes(body)
        envelope = {
            "headers": message.headers,
            "properties": {"body_encoding": "base64"},
            "body": b64encode(text).decode(),
        }
    return dumps(envelope).encode()


def _shown(field: tuple[str, Any]) -> str:
    name = shown(field[0], 40)
    match field:
        case "loader", str(loader):
            return f"loader: {shown(loader, 200)}"
        case _, [*_] | dict() as many:
            return f"{name}: {len(many)}"
        case _, bool() as flag:
            return f"{name}: {flag}"
    return f"{name}: …"


def _is_handed_over(message: Any) -> bool:
    """Return whether a request made of this message waits in the pool or in the timer."""
    return any(request.message is message for request in list(state.requests.values()))
