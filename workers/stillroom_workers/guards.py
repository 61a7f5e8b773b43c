"""Guards a Celery worker on Redis: it outlives a restart or failover of Redis and a bad element in its queue.

Stock Celery 5.7.0 with kombu 5.7.0 ends the worker process in each case. Each guard names the
function that does it; the tests show the stock worker dying before the guarded one living.

Wiring, on the one app that worker, beat, Flower and producers share. The URL stays what it is:

    app = Celery("stillroom", broker="redis://…", amqp="stillroom_workers.guards:AMQP")
    app.conf.worker_consumer = "stillroom_workers.guards:Consumer"
    app.conf.broker_transport_options = {"undeliverable": bury, …}

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from math import inf
from time import monotonic, sleep
from typing import Any, ClassVar

from celery import signals
from celery.app import amqp, control
from celery.exceptions import CPendingDeprecationWarning
from celery.utils import threads
from celery.worker import consumer, heartbeat, request, state
from celery.worker.consumer import heart
from kombu import connection, pidbox
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.transport import pyamqp
from kombu.transport import redis as transport
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

import redis
from stillroom.errors import did_you_mean
from stillroom.shown import shown
from stillroom_workers import rabbit
from stillroom_workers.events import flaw_in_events
from stillroom_workers.hygiene import (
    RAW_LIMIT,
    flaw_in_content,
    flaw_in_envelope,
    flaw_in_json,
    flaw_in_task,
    keep_what_a_task_needs,
)

__all__ = ["AMQP", "Channel", "Connection", "Consumer", "Control", "Request", "Transport"]

REASON_LENGTH = 200  # characters

# Errors that Python raises when data has the wrong shape. Not `Exception`: "can't start new thread" is the
# worker's trouble and must not cost a good message its place in the queue. KeyError belongs here
# (a LookupError), although kombu's Redis transport counts it among its *connection* errors: on a
# message without `id` the stock worker reconnected, gave it back and read it again, for ever.
_WRONG_SHAPE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,  # a Decimal in kombu's JSON that is none
    RecursionError,
    DecodeError,
    ContentDisallowed,
)

# A server that says this is not, or no longer, the one to talk to. It is no fault of the command: the connection is
# given up, and made anew. (The other half redis-py knows by itself.)
_PEER_ERRORS = (
    "UNBLOCKED",
    "READONLY",
    "MASTERDOWN",
    "NOREPLICAS",
    "MISCONF",
    "CLUSTERDOWN",
    "BUSY",
)
_PEER_CLASSES = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,  # and MASTERDOWN
    redis.exceptions.TryAgainError,
    redis.exceptions.OutOfMemoryError,  # inside of MULTI it is said of each command, an ack's too
)
# What is raised where Redis does not note who has a message. redis-py's TimeoutError is no ConnectionError.
_UNNOTED = (redis.ConnectionError, redis.TimeoutError, OSError)
_BINDING = ("routing key", "pattern", "queue")
# Between two connections to a server that says so: it answers at once, and for seconds.
PEER_PAUSE_S = 1.0

# Neither library has types of its own. As Any they look the same to mypy with and without stubs.
_StockQoS: Any = transport.QoS
_StockChannel: Any = transport.Channel
_StockTransport: Any = transport.Transport
_StockConnection: Any = connection.Connection
_StockPool: Any = connection.ConnectionPool
_StockPooledConnection: Any = connection.PooledConnection
_StockAMQP: Any = amqp.AMQP
_StockConsumer: Any = consumer.Consumer
_threads: Any = threads
_StockHeart: Any = heartbeat.Heart
_StockHeartStep: Any = heart.Heart
_StockControl: Any = control.Control
_StockMailbox: Any = pidbox.Mailbox
_StockNode: Any = pidbox.Node
_StockRequest: Any = request.Request

_logger = logging.getLogger(__name__)


class Unacked(_StockQoS):  # type: ignore[misc]
    """The messages that a channel has taken and not acknowledged: at most as many as its worker has threads."""

    def ack(self, delivery_tag: Any) -> None:
        """Acknowledge a message. It gives its place to another one also where Redis does not answer.

        Stock keeps the place until the connection that takes messages is lost, which an ack does not use: after as
        many acks that failed as there are threads, the worker took no message for ever, and looked alive. The
        message comes back when its visibility timeout ends.
        """
        with self._giving_its_place(delivery_tag):
            super().ack(delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Reject a message, which gives its place to another one too."""
        with self._giving_its_place(delivery_tag):
            super().reject(delivery_tag, requeue=requeue)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put a message back into its queue. What is noted and can't be given back becomes a dead letter.

        Stock raises for what is no message: while that lies there no worker starts, and those that run give nothing
        back. And a note names any list, to which the worker would push it with its own rights.
        """
        with self.channel.conn_or_acquire(client) as connected:
            noted = connected.hget(self.unacked_key, tag)
            if noted is None or self.channel.is_sound_note(noted):
                super().restore_by_tag(tag, connected, leftmost)
                return
            with connected.pipeline() as pipe:
                self._remove_from_indices(tag, pipe).execute()

    @contextmanager
    def _giving_its_place(self, delivery_tag: Any) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._quick_ack(delivery_tag)
            raise


class Channel(_StockChannel):  # type: ignore[misc]
    """kombu's Redis channel, whose connection may be gone and whose queues may hold anything."""

    QoS: Any = Unacked
    undeliverable: Callable[[bytes, str, str], None] | None = None
    # To these alone messages are given back. Where none are named: to any.
    own_queues: Sequence[str] = ()
    from_transport_options = (
        *_StockChannel.from_transport_options,
        "undeliverable",
        "own_queues",
        "keyprefix_binding_deadlines",
    )
    # When the broker last answered anybody in this process: time.monotonic().
    answered = 0.0
    _client: Any = None  # safe for threads: what it says goes by a connection of its pool

    def _connparams(self, asynchronous: bool = False) -> Any:
        """Return the connection's parameters. Raise a connection error once this channel's own connection is gone.

        Stock (`kombu/transport/redis.py`, `Channel._connparams`) reads `.hostname` of a client that
        is None by then, and nobody takes AttributeError for a lost connection. Two ways lead here:

        - `Consumer.on_connection_error_after_connected` lets go of the transport (`collect()`) and
          closes the connection, which wants to restore the unacked messages through that transport;
        - a task that ran across the reconnect acks late, on the channel it came by (`QoS.ack`).

        Either ends the worker. While a task still runs it is deaf first: it waits for the task,
        takes no other, then exits. As a connection error both are foreseen: the close goes on, the
        ack is logged, and the message comes back when its visibility timeout ends.
        """
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError(
                "the connection this message came by is gone; "
                "it is delivered again after the visibility timeout"
            )
        params = super()._connparams(asynchronous=asynchronous)
        return params | {"connection_class": _that_knows_its_peer(params["connection_class"])}

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return a client. Stock makes one for each ack and each event, which takes longer than what it is for."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        client = self._client
        if client is None or client.connection_pool is not self.pool:
            client = self._client = super()._create_client()
        return client

    @cached_property
    def client(self) -> Any:
        """Return the client that waits in BRPOP. What it pops is looked at before kombu acts on it.

        Stock (`Channel._brpop_read`) decodes the element and builds the message outside any `try`.
        Bytes that aren't JSON, JSON that isn't an object, a field of another type end the worker,
        and the element is gone with it.
        """
        client = self._create_client(asynchronous=True)
        client.parse_response = partial(self._sift_reply, client.parse_response)
        return client

    def _sift_reply(
        self, parse: Callable[..., Any], connection: Any, command: str, **options: Any
    ) -> Any:
        """Return the reply, or None, which is how BRPOP says that nothing came."""
        reply = parse(connection, command, **options)
        Channel.answered = monotonic()
        if command != "BRPOP" or not reply or self._is_message(reply[1], source=reply[0]):
            return reply
        return None

    def _put_fanout(self, *args: Any, **options: Any) -> None:
        """Publish. The worker's own heartbeat comes this way, while all its threads are busy and it takes
        nothing."""
        super()._put_fanout(*args, **options)
        Channel.answered = monotonic()

    def _handle_message(self, client: Any, reply: Any) -> Any:
        """Deliver only published messages: one `[1]` on the control channel ended *every* worker."""
        event = super()._handle_message(client, reply)
        if not bytes_to_str(event["type"]).endswith("message"):
            return event
        raw, channel = event["data"], bytes_to_str(event["channel"])
        is_told = f".{rabbit.EVENTS_EXCHANGE}/" in channel
        if not (self._is_event(raw) if is_told else self._is_message(raw, source=None)):
            event["data"] = None  # `_receive_one` delivers nothing then
        return event

    def _is_event(self, raw: bytes) -> bool:
        """Return whether what a worker tells of its work may be kept. If not it is dropped: nobody waits for it."""
        flaw = self._flaw(raw, None)
        if flaw is None:
            try:
                flaw = flaw_in_events(self.Message(loads(bytes_to_str(raw)), channel=self).decode())
            except _WRONG_SHAPE as exc:
                flaw = repr(exc)
        if flaw is not None:
            _logger.warning(
                "An event of %d bytes is dropped: %s", len(raw), shown(flaw, REASON_LENGTH)
            )
        return flaw is None

    def _is_message(self, raw: bytes, *, source: bytes | None) -> bool:
        """Return whether kombu can and may make a message of these bytes; if not, they become a dead letter.

        Tried rather than described: the same decoding and the same constructor that kombu runs
        next, then what `QoS.append` reads. About 15 µs; running the smallest task costs 2,000.
        What would take memory is looked at before it does.

        source: the list they lay in; None for what was published.
        """
        queue = None if source is None else bytes_to_str(source).rsplit(self.sep, 1)[0]
        flaw = self._flaw(raw, queue)
        if flaw is not None:
            self.bury(raw, queue or "", f"not a message: {flaw}")
        return flaw is None

    def _flaw(self, raw: bytes, queue: str | None) -> str | None:
        if len(raw) > RAW_LIMIT:
            return f"it has {len(raw):,} bytes, and may have {RAW_LIMIT:,}"
        if flaw := flaw_in_json(raw):
            return flaw
        try:
            envelope = loads(bytes_to_str(raw))
            # A reply to remote control comes by an exchange, and is not given back.
            flaw = flaw_in_envelope(envelope, None if queue in self.auto_delete_queues else queue)
            if flaw is None:
                self.Message(envelope, channel=self)
        except _WRONG_SHAPE as exc:
            return repr(exc)
        return flaw

    def is_sound_note(self, noted: bytes) -> bool:
        """Return whether what stands among the unacknowledged messages may go back to its queue; if not, it becomes
        a dead letter."""
        raw, queue, flaw = noted, "", flaw_in_json(noted)
        try:
            if flaw is None:
                raw, queue, flaw = self._note_of(noted)
        except _WRONG_SHAPE as exc:
            flaw = repr(exc)
        if flaw is not None:
            self.bury(raw, queue, f"not a message: {flaw}")
        return flaw is None

    def _note_of(self, noted: bytes) -> tuple[bytes, str, str | None]:
        """Return a message that was noted, the queue that it goes back to, and what is wrong with it."""
        match loads(bytes_to_str(noted)):
            case [{**message}, exchange, str(queue)] if self._is_own(exchange, queue):
                raw = dumps(message).encode()
                is_marked = isinstance(message.get("headers", {}), dict)  # as delivered again
                return raw, queue, self._flaw(raw, queue) if is_marked else "it has no headers"
            case [{**message}, _, where]:
                flaw = f"it was to be given back to {shown(repr(where), 60)}, no queue of ours"
                return dumps(message).encode(), "", flaw
        return noted, "", "it is not [message, exchange, routing key]"

    def _is_own(self, exchange: Any, queue: str) -> bool:
        return exchange in ("", queue) and queue in (self.own_queues or [queue])

    def bury(self, raw: bytes, queue: str, reason: str) -> None:
        """Hand an element that can't run to the keeper of dead letters."""
        (self.undeliverable or _log_undeliverable)(raw, queue, reason)

    def get_table(self, exchange: str) -> list[Any]:
        """Return the bindings of an exchange: to a queue of its own name, or to one that bears it at its end.

        Whoever may publish may add others. Stock raises for what is no binding, and then no command of remote
        control is answered; and a reply would go to any list, with this process' rights.
        """
        rows = [row for row in super().get_table(exchange) if len(row) == len(_BINDING)]
        return [row for row in rows if row[-1] == exchange or row[-1].endswith(f".{exchange}")]

    def heal(self, queues: Iterable[Any], others: Iterable[str]) -> None:
        """Delete what has another type than kombu keeps under that name: somebody else wrote it there, and as
        long as it is there no message is taken, from any queue. `others`: exchanges that are not the queues'."""
        kinds = {self.unacked_key: "hash", self.unacked_index_key: "zset"}
        kinds[self.keyprefix_binding_deadlines] = "zset"
        exchanges = [*others]
        for queue in queues:
            kinds |= {self._q_for_pri(queue.name, step): "list" for step in self.priority_steps}
            exchanges.append(queue.exchange.name)
        for table in (self.keyprefix_queue, self.keyprefix_binding_permanent):
            kinds |= {table % name: "set" for name in exchanges}
        with redis.Redis(connection_pool=self.pool) as client:
            for key, kind in {**kinds, self.unacked_mutex_key: "string"}.items():
                found = bytes_to_str(client.type(key))
                if found not in (kind, "none"):
                    client.delete(key)
                    _logger.error("%r was a %s, not a %s; it is deleted", key, found, kind)


class _NotTheServer(redis.ConnectionError):
    """The server said that it is not the one to talk to."""


class _WrongType(redis.ConnectionError):
    """A key of ours holds another type."""


def _that_knows_its_peer(stock: Any) -> Any:
    """Return a connection class that takes an error about the server, or a key of a wrong type, for a lost
    connection.

    Stock raises ResponseError, which neither kombu nor Celery counts among the errors of a connection: during a
    failover the reply to BRPOP is `UNBLOCKED`, then `READONLY`, and the worker exits.
    """

    class PeerAware(stock):  # type: ignore[misc]
        def read_response(self, *args: Any, **options: Any) -> Any:
            try:
                reply = super().read_response(*args, **options)
            except redis.ResponseError as error:
                self._judge(error)
                raise
            except redis.ConnectionError as error:
                # redis-py makes this of READONLY where Sentinels named the server. They may name it for a while.
                if isinstance(error.__context__, redis.exceptions.ReadOnlyError):
                    raise _NotTheServer(str(error)) from error
                raise
            if isinstance(reply, list):  # a transaction's: its commands' errors are in it
                for one in reply:
                    if isinstance(one, redis.ResponseError):
                        self._judge(one)
            return reply

        def _judge(self, error: redis.ResponseError) -> None:
            if kind := _as_connection_error(error):
                self.disconnect()
                raise kind(str(error)) from error

    return PeerAware


def _as_connection_error(error: redis.ResponseError) -> type[redis.ConnectionError] | None:
    if isinstance(error, _PEER_CLASSES) or str(error).startswith(_PEER_ERRORS):
        return _NotTheServer
    return _WrongType if str(error).startswith("WRONGTYPE") else None


class Transport(_StockTransport):  # type: ignore[misc]
    """kombu's Redis transport with the guarded channel."""

    Channel = Channel
    # Messages that were taken from their queue while Redis could not note that: by queue, oldest first.
    unnoted: ClassVar[deque[tuple[str, Any]]] = deque()
    _restores_at = 0.0  # time.monotonic()

    def drain_events(self, *args: Any, **options: Any) -> Any:
        """Wait for a message. From time to time, what killed workers held is given back first.

        A worker with greenlets takes its messages this way, and stock gives back only where a wait ends without any
        word: with an answer to BRPOP each second none does, and what was held would never come back.
        """
        if monotonic() >= self._restores_at:
            every = self.client.transport_options.get("unacked_restore_interval", 10)
            self._restores_at = monotonic() + every
            self.cycle.maybe_restore_messages()
        return super().drain_events(*args, **options)

    def _deliver(self, message: Any, queue: Any) -> None:
        """Hand a message to its consumer, with the route of the queue it came from, whatever the message says.

        A server that is full still gives a message out, and refuses to note who has it; a failover may come in
        between, too. Stock loses the message. Here it goes back when there is a connection again: perhaps twice.
        """
        message["properties"]["delivery_info"] = {"exchange": "", "routing_key": queue}
        try:
            super()._deliver(message, queue)
        except _UNNOTED:
            self.unnoted.append((queue, message))
            raise


class SentinelChannel(Channel, transport.SentinelChannel):
    """Guard the channel to a primary that Sentinels name. kombu asks them each time it connects."""

    from_transport_options = tuple(
        dict.fromkeys(
            (*Channel.from_transport_options, *transport.SentinelChannel.from_transport_options)
        )
    )


class SentinelTransport(Transport, transport.SentinelTransport):
    """kombu's transport for Sentinels with the guarded channel."""

    default_port = transport.SentinelTransport.default_port
    Channel = SentinelChannel


GUARDED = {
    _StockTransport: Transport,
    transport.SentinelTransport: SentinelTransport,
    pyamqp.Transport: rabbit.Transport,
}


class Connection(_StockConnection):  # type: ignore[misc]
    """A broker connection that takes the guarded transport where kombu takes its own for Redis.

    Of the ways to choose a transport this one leaves URLs alone. `broker_transport="module:Class"`
    looks made for it, but kombu then forgets the scheme: `rediss://` connects *without TLS*,
    `as_uri()` (the worker's banner, Flower's broker page) says `module:Class://…`, and the second
    URL of a failover list is stock again. An alias in `kombu.transport.TRANSPORT_ALIASES` keeps the
    scheme, but changes every other app of the process too.
    """

    def get_transport_cls(self) -> Any:
        """Return the guarded transport for Redis, also behind Sentinels, and RabbitMQ; others get their own."""
        return _guarded(super().get_transport_cls())

    def info(self) -> Any:
        """Return what `inspect stats` tells of the connection. Its options hold a function, which has no form in a
        reply, and a Sentinel's password."""
        return {**super().info(), "transport_options": {}}

    def Pool(self, limit: int | None = None, **options: Any) -> Any:  # noqa: N802  # kombu's name
        """Return the pool of connections that publish: beat's ticks, events, replies to remote control."""
        return Pool(self, limit, **options)


class Pool(_StockPool):  # type: ignore[misc]
    """A pool whose connections take the guarded transport too: what they declare bears the names we give."""

    def new(self) -> Any:
        return PooledConnection(self, **dict(self.connection._info(resolve=False)))


class PooledConnection(_StockPooledConnection):  # type: ignore[misc]
    """A connection of the pool, which takes the guarded transport."""

    def get_transport_cls(self) -> Any:
        return _guarded(super().get_transport_cls())


def _guarded(stock: Any) -> Any:
    return GUARDED.get(stock, stock)


class AMQP(_StockAMQP):  # type: ignore[misc]
    """Guards all broker connections of an app: `Celery(amqp="stillroom_workers.guards:AMQP")`."""

    Connection = Connection
    BrokerConnection = Connection


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
            except _WRONG_SHAPE as exc:
                if _is_handed_over(message):
                    raise  # it may be running: whatever broke, it wasn't the message
                flaw = repr(exc)
            self._bury(message, flaw)

        return on_task_received

    def _give_back(self) -> None:
        """Put back into their queues what was taken and not noted. Replies and events are not waited for."""
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
        # Celery tells in seven lines of a setting that is as it is on purpose: see app.py.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CPendingDeprecationWarning)
            super().on_connection_error_after_connected(exc)
        self._mend(exc)

    @staticmethod
    def _raise_where_refused(error: Exception) -> None:
        """Raise what RabbitMQ will say again: stock tries anew without an end, five times a second."""
        if rabbit.refusal(error, "") is not None:
            raise error

    def _mend(self, error: Exception) -> None:
        """Heal a key of a wrong type, and wait before the next connection: such a server answers at once.

        So does RabbitMQ with some errors.
        """
        if isinstance(error, _WrongType):
            self._heal()
        if isinstance(error, (_NotTheServer, _WrongType, *rabbit.AGAIN)):
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
        options.get("undeliverable", _log_undeliverable)(raw, queue, why)
        message.ack()
        signals.task_rejected.send(sender=self, message=message, exc=None)


def _log_undeliverable(raw: bytes, queue: str, reason: str) -> None:
    why = shown(reason, REASON_LENGTH)
    _logger.error("A message of %d bytes in %r can't run: %s", len(raw), queue, why)


class Control(_StockControl):  # type: ignore[misc]
    """Remote control, whose replies go to who asked and nowhere else."""

    class Mailbox(_StockMailbox):  # type: ignore[misc]
        class node_cls(_StockNode):  # type: ignore[misc]  # noqa: N801  # kombu's name
            def handle(self, method: Any, arguments: Any = None) -> Any:
                """Carry out a command. A worker is told to take from its own app's queues only: any list of Redis
                looks like one. Refused any later than here, it would end the worker and answer "OK"."""
                queue = (arguments or {}).get("queue")
                known = [one.name for one in self.state.app.conf.task_queues]
                if method == "add_consumer" and queue not in known:
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


class Request(_StockRequest):  # type: ignore[misc]
    """A request whose events are small: whoever watches the workers keeps thousands of them.

    It counts the failures, because a process of the prefork pool tells its own of them only to this one.
    """

    # By time.monotonic(), in the worker: the machine's clock may be set while the task runs.
    began = inf

    def on_accepted(self, pid: Any, time_accepted: float) -> None:
        self.began = time_accepted
        super().on_accepted(pid, time_accepted)

    def cancel(self, pool: Any, *args: Any, **options: Any) -> None:
        """End the task with its process. A thread has none: its task goes on, and the worker ends after it.

        Stock raises in the handler of SIGQUIT or of the second Ctrl-C, and ends with a traceback of its own.
        """
        try:
            super().cancel(pool, *args, **options)
        except NotImplementedError:
            _logger.warning(
                "Task %s[%s] can't be cut off in a thread: it is waited for", self.name, self.id
            )

    def info(self, safe: bool = True) -> Any:
        """Return what `inspect` tells of a task: how much it was given, not what, as its events do."""
        return super().info(safe=True)

    def send_event(self, type: str, **fields: Any) -> None:
        self.app.failed += type == "task-failed"
        super().send_event(
            type, **{name: _shortened(name, value) for name, value in fields.items()}
        )


EVENT_LIMITS = {"traceback": 4_000, "exception": 500, "result": 500}  # characters


def _shortened(name: str, value: Any) -> Any:
    """Return the beginning of the error, where it started, and its end, where it was raised."""
    limit = EVENT_LIMITS.get(name)
    if limit is None or not isinstance(value, str):
        return value
    # Of half a surrogate pair no page is made.
    value = value.encode(errors="backslashreplace").decode()
    if len(value) <= limit:
        return value
    half = limit // 2
    return f"{value[:half]}\n… {len(value) - 2 * half:,} characters …\n{value[-half:]}"


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


SHOWN_FIELDS = 8  # of a task's arguments


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
