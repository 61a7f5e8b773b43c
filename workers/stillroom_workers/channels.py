"""Guards kombu's connections to Redis: they may be lost, Redis may be another one, its queues may hold anything.

Stock kombu 5.7.0 ends the worker process, or loses a message, in each case. Each guard names the function that does
it. What takes these transports is in connections.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from time import monotonic
from typing import Any, ClassVar

from celery.worker import state
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.transport import redis as transport
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

import redis
from stillroom.errors import WHO_MAY
from stillroom.shown import shown
from stillroom_workers import rabbit
from stillroom_workers.events import flaw_in_events
from stillroom_workers.hygiene import RAW_LIMIT, REASON_LENGTH, flaw_in_envelope, flaw_in_json

# Up to ten answers are waited for when a worker ends, after those of five seconds that it waits for just then; and
# all have to fit into the 30 s that a container has.
ANSWERED_AT_THE_END_S = 1.0
LATE_LIMIT = 1_000  # what is not acknowledged beyond them runs again after the visibility timeout

# Errors that Python raises when data has the wrong shape. Not `Exception`: "can't start new thread" is the
# worker's trouble and must not cost a good message its place in the queue. KeyError belongs here
# (a LookupError), although kombu's Redis transport counts it among its *connection* errors: on a
# message without `id` the stock worker reconnected, gave it back and read it again, for ever.
WRONG_SHAPE = (
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

# Neither library has types of its own. As Any they look the same to mypy with and without stubs.
_worker_state: Any = state
_StockQoS: Any = transport.QoS
_StockChannel: Any = transport.Channel
_StockTransport: Any = transport.Transport
_StockPoller: Any = transport.MultiChannelPoller

_logger = logging.getLogger(__name__)


class Unacked(_StockQoS):  # type: ignore[misc]
    """The messages that a channel has taken and not acknowledged: at most as many as its worker has threads."""

    # The tags of what could not be acknowledged when it had ended, in this process, oldest first.
    late: ClassVar[deque[Any]] = deque(maxlen=LATE_LIMIT)

    def ack(self, delivery_tag: Any) -> None:
        """Acknowledge a message. It gives its place to another one also where Redis does not answer.

        Stock keeps the place until the connection that takes messages is lost, which an ack does not use: after as
        many acks that failed as there are threads, the worker took no message for ever, and looked alive. The
        message is acknowledged with the next one, or when the worker has connected again.
        """
        with self._giving_its_place(delivery_tag):
            try:
                self.ack_late()
                super().ack(delivery_tag)
            except _UNNOTED:
                self.late.append(delivery_tag)
                raise

    def ack_late(self) -> None:
        """Acknowledge what could not be before. An ack whose reply was lost is repeated, which changes nothing."""
        while self.late:
            try:
                tag = self.late.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                self._remove_from_indices(tag).execute()
            except _UNNOTED:
                self.late.append(tag)
                raise

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Give back what has not run, as a channel does when it is closed. A worker that ends waits a second for an
        answer: what it could not acknowledge within that gets a last try, or it would run again."""
        if _worker_state.should_stop is not None:
            with suppress(*_UNNOTED):
                self.ack_late()
        super().restore_unacked_once(stderr)

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
        is None by then, and nobody takes AttributeError for a lost connection: the worker ends. It comes here
        when it has lost its connection: `Consumer.on_connection_error_after_connected` lets go of the transport
        (`collect()`), then closes the connection, which wants to restore the unacked messages through that
        transport. As a connection error it is foreseen, and the close goes on.
        """
        if self._is_gone:
            raise redis.ConnectionError("the connection this message came by is gone")
        params = super()._connparams(asynchronous=asynchronous)
        return params | {"connection_class": _that_knows_its_peer(params["connection_class"])}

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return a client. Stock makes one for each ack and each event, which takes longer than what it is for.

        A task that ran while its worker connected again acks on the channel it came by, and the client that noted
        its message connects anew. Stock reads what is gone: the worker is deaf while such a task runs, then exits.
        """
        if asynchronous:
            return super()._create_client(asynchronous=True)
        client = self._client
        if client is None or not (self._is_gone or client.connection_pool is self.pool):
            client = self._client = super()._create_client()
        return client

    @property
    def _is_gone(self) -> bool:
        return self.connection is None or self.connection.client is None

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
            except WRONG_SHAPE as exc:
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
        except WRONG_SHAPE as exc:
            return repr(exc)
        return flaw

    def is_sound_note(self, noted: bytes) -> bool:
        """Return whether what stands among the unacknowledged messages may go back to its queue; if not, it becomes
        a dead letter."""
        raw, queue, flaw = noted, "", flaw_in_json(noted)
        try:
            if flaw is None:
                raw, queue, flaw = self._note_of(noted)
        except WRONG_SHAPE as exc:
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
        (self.undeliverable or log_undeliverable)(raw, queue, reason)

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


class NotTheServer(redis.ConnectionError):
    """The server said that it is not the one to talk to."""


class WrongType(redis.ConnectionError):
    """A key of ours holds another type."""


def _that_knows_its_peer(stock: Any) -> Any:
    """Return a connection class that takes an error about the server, or a key of a wrong type, for a lost
    connection.

    Stock raises ResponseError, which neither kombu nor Celery counts among the errors of a connection: during a
    failover the reply to BRPOP is `UNBLOCKED`, then `READONLY`, and the worker exits.
    """

    class PeerAware(stock):  # type: ignore[misc]
        def connect(self) -> None:
            _hurry_at_the_end(self)
            super().connect()

        def read_response(self, *args: Any, **options: Any) -> Any:
            try:
                reply = super().read_response(*args, **options)
            except redis.ResponseError as error:
                _judge(self, error)
                raise
            except redis.ConnectionError as error:
                # redis-py makes this of READONLY where Sentinels named the server. They may name it for a while.
                if isinstance(error.__context__, redis.exceptions.ReadOnlyError):
                    raise NotTheServer(str(error)) from error
                raise
            if isinstance(reply, list):  # a transaction's: its commands' errors are in it
                for one in reply:
                    if isinstance(one, redis.ResponseError):
                        _judge(self, one)
            return reply

    return PeerAware


def _judge(connection: Any, error: redis.ResponseError) -> None:
    if kind := _as_connection_error(error):
        connection.disconnect()
        raise kind(str(error)) from error


def _hurry_at_the_end(connection: Any) -> None:
    """Let a connection that is made while the worker stops wait for no answer longer than a second.

    Several parts of a worker end with a command each. Beside a broker that hangs they took longer, one after the
    other, than the 30 s that a container has.
    """
    if _worker_state.should_stop is not None:
        most = connection.socket_timeout or ANSWERED_AT_THE_END_S
        connection.socket_timeout = min(most, ANSWERED_AT_THE_END_S)


def _as_connection_error(error: redis.ResponseError) -> type[redis.ConnectionError] | None:
    if isinstance(error, _PEER_CLASSES) or str(error).startswith(_PEER_ERRORS):
        return NotTheServer
    return WrongType if str(error).startswith("WRONGTYPE") else None


class Poller(_StockPoller):  # type: ignore[misc]
    """kombu's poller, which tells once what Redis refuses it again and again.

    Where the user has lost a right since the worker began, stock writes a traceback of 46 lines every five seconds,
    or every second; with greenlets the worker ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[tuple[str, int], str] = {}

    def maybe_restore_messages(self) -> None:
        """Give back what killed workers held."""
        with self._telling("Messages that killed workers held can't be given back"):
            super().maybe_restore_messages()

    def maybe_refresh_binding_expiry(self) -> None:
        """Keep the queues of replies and events alive. Stock logs each refusal, and raises none."""
        for channel in self._channels:
            with self._telling("Queues of replies and events can't be kept alive", id(channel)):
                with suppress(*channel.connection_errors):  # it tries again in a second
                    channel.maybe_refresh_binding_expiry()

    @contextmanager
    def _telling(self, what: str, channel: int = 0) -> Iterator[None]:
        """Log a refusal, unless it is the one that was met the last time."""
        try:
            yield
        except redis.ResponseError as error:
            why = shown(error, REASON_LENGTH)
            if why != self._told.get((what, channel)):
                _logger.error("%s: %s; %s", what, why, WHO_MAY)
            self._told[what, channel] = why
        else:
            self._told.pop((what, channel), None)


class Transport(_StockTransport):  # type: ignore[misc]
    """kombu's Redis transport with the guarded channel."""

    Channel = Channel
    cycle: Any
    # Messages that were taken from their queue while Redis could not note that: by queue, oldest first.
    unnoted: ClassVar[deque[tuple[str, Any]]] = deque()
    _restores_at = 0.0  # time.monotonic()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cycle = Poller()

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


def log_undeliverable(raw: bytes, queue: str, reason: str) -> None:
    why = shown(reason, REASON_LENGTH)
    _logger.error("A message of %d bytes in %r can't run: %s", len(raw), queue, why)
