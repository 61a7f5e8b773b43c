"""What a Celery worker on Redis needs to outlive a restart of Redis and a bad element in its queue.

Stock Celery 5.7.0 with kombu 5.7.0 ends the worker process in both cases. Each guard names the
function that does it; the tests show the stock worker dying before the guarded one living.

Wiring, on the one app that worker, beat, Flower and producers share. The URL stays what it is:

    app = Celery("stillroom", broker="redis://…", amqp="stillroom_workers.guards:AMQP")
    app.conf.worker_consumer = "stillroom_workers.guards:Consumer"
    app.conf.broker_transport_options = {"set_aside_key": "stillroom:aside", …}  # or the default

The one key written here, `set_aside_key`, is a list: newest first, at most 1,000 elements, gone
7 days after the last addition. An element is one JSON line `{at, queue, reason, bytes}`, a newline,
then the raw bytes (at most 64 KiB):

    LPUSH stillroom:aside <element>
    LTRIM stillroom:aside 0 999
    EXPIRE stillroom:aside 604800

To run one after all: what follows the first newline is what lay in the queue, `LPUSH` it back.

A half-open connection needs options, not code: `socket_timeout` *and* `health_check_interval`, both
5 s. Cut off without a word, the worker went on after 10 to 12 s. With the first alone it took 53 s,
with the second alone or with neither it was still deaf after 30 s.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cached_property, partial
from time import time
from typing import Any

from celery import signals
from celery.app import amqp
from celery.worker import consumer, state
from kombu import connection
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.transport import redis as transport
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

import redis

__all__ = ["AMQP", "Channel", "Connection", "Consumer", "Transport"]

SET_ASIDE_LENGTH = 1_000  # elements; times SET_ASIDE_BYTES, the list is at most 64 MiB
SET_ASIDE_BYTES = 64 * 1024  # of each element's raw bytes
SET_ASIDE_TTL = 7 * 24 * 3600  # seconds after the last addition
REASON_LENGTH = 200  # characters; a reason may quote the message, and messages hold people's data

# What Python raises when data has the wrong shape. Not `Exception`: "can't start new thread" is the
# worker's trouble and must not cost a good message its place in the queue. KeyError belongs here
# (a LookupError), although kombu's Redis transport counts it among its *connection* errors: on a
# message without `id` the stock worker reconnected, gave it back and read it again, for ever.
_WRONG_SHAPE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    DecodeError,
    ContentDisallowed,
)

# Neither library has types of its own. As Any they look the same to mypy with and without stubs.
_StockChannel: Any = transport.Channel
_StockTransport: Any = transport.Transport
_StockConnection: Any = connection.Connection
_StockAMQP: Any = amqp.AMQP
_StockConsumer: Any = consumer.Consumer

_logger = logging.getLogger(__name__)


class Channel(_StockChannel):  # type: ignore[misc]
    """kombu's Redis channel, whose connection may be gone and whose queues may hold anything."""

    set_aside_key = "stillroom:aside"
    from_transport_options = (*_StockChannel.from_transport_options, "set_aside_key")

    def _connparams(self, asynchronous: bool = False) -> Any:
        """Where to connect to; a connection error once this channel's own connection is gone.

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
        return super()._connparams(asynchronous=asynchronous)

    @cached_property
    def client(self) -> Any:
        """The client that waits in BRPOP. What it pops is looked at before kombu acts on it.

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
        """The reply, or None, which is how BRPOP says that nothing came."""
        reply = parse(connection, command, **options)
        if command != "BRPOP" or not reply or self._is_message(reply[1], source=reply[0]):
            return reply
        return None

    def _handle_message(self, client: Any, reply: Any) -> Any:
        """The same for what is published: one `[1]` on the control channel ended *every* worker."""
        event = super()._handle_message(client, reply)
        published = bytes_to_str(event["type"]).endswith("message")
        if published and not self._is_message(event["data"], source=event["channel"]):
            event["data"] = None  # `_receive_one` delivers nothing then
        return event

    def _is_message(self, raw: bytes, *, source: bytes) -> bool:
        """Whether kombu can make a message of these bytes; if not, they are set aside.

        Tried rather than described: the same decoding and the same constructor that kombu runs
        next, then what `QoS.append` reads. About 10 µs; running the smallest task costs 2,000.
        """
        try:
            message = self.Message(loads(bytes_to_str(raw)), channel=self)
            _ = message.delivery_info["exchange"], message.delivery_info["routing_key"]
            if not isinstance(message.delivery_tag, str):
                raise TypeError("delivery_tag is not a string")
        except _WRONG_SHAPE as exc:
            queue = bytes_to_str(source).rsplit(self.sep, 1)[0]
            self.set_aside(raw, queue=queue, reason=f"not a message: {exc!r}")
            return False
        return True

    def set_aside(self, raw: bytes, *, queue: str, reason: str) -> None:
        """Keep an element that can't run where a person finds it, and say so in one ERROR line.

        raw: its bytes, of which the first 64 KiB are kept. queue: where it was.
        reason: what is wrong; the first 200 characters are logged and kept.

        Raises redis.ConnectionError and redis.TimeoutError. A server that *refuses* the write
        (memory full, ACL) is logged instead: raised, it would end the worker after all.
        """
        reason, key = reason[:REASON_LENGTH], self.set_aside_key
        _logger.error(
            "Set aside a bad element of %r: %s (%d bytes, in %r)", queue, reason, len(raw), key
        )
        about = {"at": round(time(), 3), "queue": queue, "reason": reason, "bytes": len(raw)}
        # A plain client: kombu's own puts `global_keyprefix` before LPUSH but not before LTRIM.
        with redis.Redis(connection_pool=self.pool).pipeline() as pipe:
            pipe.lpush(key, json.dumps(about).encode() + b"\n" + raw[:SET_ASIDE_BYTES])
            pipe.ltrim(key, 0, SET_ASIDE_LENGTH - 1)
            pipe.expire(key, SET_ASIDE_TTL)
            try:
                pipe.execute()
            except redis.ResponseError as exc:
                _logger.error("%r refused that element, it is lost: %s", key, exc)


class Transport(_StockTransport):  # type: ignore[misc]
    """kombu's Redis transport with the guarded channel."""

    Channel = Channel


class SentinelChannel(Channel, transport.SentinelChannel):
    """The same for a primary that Sentinels name. kombu asks them each time it connects."""

    from_transport_options = tuple(
        dict.fromkeys(
            (*Channel.from_transport_options, *transport.SentinelChannel.from_transport_options)
        )
    )


class SentinelTransport(Transport, transport.SentinelTransport):
    """kombu's transport for Sentinels with the guarded channel."""

    default_port = transport.SentinelTransport.default_port
    Channel = SentinelChannel


GUARDED = {_StockTransport: Transport, transport.SentinelTransport: SentinelTransport}


class Connection(_StockConnection):  # type: ignore[misc]
    """A broker connection that takes the guarded transport where kombu takes its own for Redis.

    Of the ways to choose a transport this one leaves URLs alone. `broker_transport="module:Class"`
    looks made for it, but kombu then forgets the scheme: `rediss://` connects *without TLS*,
    `as_uri()` (the worker's banner, Flower's broker page) says `module:Class://…`, and the second
    URL of a failover list is stock again. An alias in `kombu.transport.TRANSPORT_ALIASES` keeps the
    scheme, but changes every other app of the process too.

    Connections in kombu's producer pools stay stock: they read no queue and hold no message.
    """

    def get_transport_cls(self) -> Any:
        """The guarded transport for Redis, also behind Sentinels; any other scheme gets its own."""
        stock = super().get_transport_cls()
        return GUARDED.get(stock, stock)


class AMQP(_StockAMQP):  # type: ignore[misc]
    """Guards all broker connections of an app: `Celery(amqp="stillroom_workers.guards:AMQP")`."""

    Connection = Connection
    BrokerConnection = Connection


class Consumer(_StockConsumer):  # type: ignore[misc]
    """Celery's consumer, which sets a message aside where stock would exit, loop or delete it.

    A sound envelope may still hold no task. Stock (`celery/worker/consumer/consumer.py`,
    `create_task_handler`) foresees three exceptions; `worker/strategy.py` and `worker/request.py`
    raise others for a body that isn't `[args, kwargs, embed]`. The worker exits and gives the
    message back, the next worker reads it: one element takes them all down, again and again.
    What stock does foresee it deletes, and prints up to 1,024 characters of the arguments.

    No result is stored for what is set aside: whoever waits for one waits for his own timeout.
    """

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """The handler of every message: looks first, then catches what looking can't foresee."""
        stock = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            try:
                flaw = _flaw(message)
                if flaw is None:
                    _hide_arguments(message)
                    stock(message)
                    return
            except _WRONG_SHAPE as exc:
                if _is_handed_over(message):
                    raise  # it may be running: whatever broke, it wasn't the message
                flaw = repr(exc)
            self._set_aside(message, flaw)

        return on_task_received

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Names a task neither in the headers (protocol 2) nor in the body (protocol 1)."""
        self._set_aside(message, "names no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Names a task this worker doesn't have: a typo, or a producer newer than the worker."""
        self._set_aside(message, "no such task here")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """An ETA that is no date, a content type that isn't accepted."""
        self._set_aside(message, repr(exc))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """A body that doesn't decode or decompress."""
        self._set_aside(message, repr(exc))

    def _set_aside(self, message: Any, reason: str) -> None:
        """Kept, then acknowledged: if Redis leaves in between it comes back and is kept twice."""
        task, task_id = message.headers.get("task"), message.headers.get("id")
        message.channel.set_aside(
            dumps(message._raw).encode(),
            queue=message.delivery_info["routing_key"],
            reason=f"task {task!r:.60} id {task_id!r:.40}: {reason}",
        )
        message.ack()
        signals.task_rejected.send(sender=self, message=message, exc=None)


def _flaw(message: Any) -> str | None:
    """What would go wrong once the message is with the pool, where nobody catches it; or None.

    In a thread of the pool the exception ends in a Future that nobody reads: no log line, no ack,
    one slot of the prefetch gone. After each visibility timeout the message returns and takes
    another: four times, and a worker with four threads consumes nothing while it still looks alive.
    In the solo pool the worker exits.
    """
    if "task" not in message.headers:
        return None  # protocol 1, which other languages' clients still speak: stock reads it itself
    return _flaw_in_headers(message.headers) or _flaw_in_body(message.payload)


def _flaw_in_headers(headers: Any) -> str | None:
    match headers.get("id"), headers["task"], headers.get("shadow"):
        case str(), str(), str() | None:
            pass
        case _:
            return "id, task or shadow is not a string"
    match headers.get("timelimit"):
        case None | [] | [int() | float() | None, int() | float() | None]:
            pass
        case _:
            return "timelimit is not [hard, soft]"
    match headers.get("stamped_headers"):
        case None:
            return None
        case [*stamps] if all(isinstance(stamp, str) for stamp in stamps):
            return None
    return "stamped_headers is not a list of strings"


def _flaw_in_body(body: Any) -> str | None:
    match body:
        case {"args": _}:
            return None  # protocol 1 under headers: stock says InvalidTaskError if it can't use it
        case [[*_], dict(), None]:
            return None
        case [[*_], dict(), dict() as embed]:
            # Read when the task fails, outside the tracer; the other members are read inside it.
            if all(_is_signature(errback) for errback in embed.get("errbacks") or []):
                return None
            return "errbacks are not a list of signatures"
    return "the body is not [args, kwargs, embed]"


def _hide_arguments(message: Any) -> None:
    """Let events, which Flower keeps and shows to whoever may look, tell how much a task was given, not what.

    Arguments name keys, and keys name people. A client of ours sends no more than that anyway; Celery's own writes
    out whatever it is given, for the worker to pass on.
    """
    match message.payload:
        case [args, kwargs, _] if "task" in message.headers:
            shown = {"argsrepr": f"({len(args)})" if args else ""}
            shown["kwargsrepr"] = ", ".join(map(_shown, kwargs.items()))
            # Not in the dict itself, which is the message as it came, and as it is set aside.
            message.headers = {**message.headers, **shown}


def _shown(field: tuple[str, Any]) -> str:
    match field:
        case "loader", str(loader):
            return f"loader: {loader}"
        case name, [*_] | dict() as many:
            return f"{name}: {len(many)}"
        case name, bool() as flag:
            return f"{name}: {flag}"
    return f"{field[0]}: …"


def _is_signature(errback: Any) -> bool:
    match errback:
        case {"task": str(), "args": [*_], "kwargs": dict(), "options": dict()}:
            return True
    return False


def _is_handed_over(message: Any) -> bool:
    """Whether a request made of this message waits in the pool or in the timer."""
    return any(request.message is message for request in list(state.requests.values()))
