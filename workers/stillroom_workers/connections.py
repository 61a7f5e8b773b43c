"""Gives an app's broker connections the guarded transports: channels.py for Redis, rabbit.py for RabbitMQ."""

from __future__ import annotations

from typing import Any

from celery.app import amqp
from kombu import connection
from kombu.transport import pyamqp
from kombu.transport import redis as transport

from stillroom_workers import rabbit
from stillroom_workers.channels import SentinelTransport, Transport

LONGEST_PAUSE_S = 4.0  # between two tries to connect
UNTOLD_RETRIES = 1  # of a publication, if who publishes does not say how many

# Neither library has types of its own. As Any they look the same to mypy with and without stubs.
_StockConnection: Any = connection.Connection
_StockPool: Any = connection.ConnectionPool
_StockPooledConnection: Any = connection.PooledConnection
_StockAMQP: Any = amqp.AMQP

GUARDED = {
    transport.Transport: Transport,
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

    def ensure_connection(
        self,
        errback: Any = None,
        max_retries: int | None = None,
        interval_start: float = 2,
        interval_step: float = 2,
        interval_max: float = LONGEST_PAUSE_S,
        **options: Any,
    ) -> Any:
        """Connect, in as many tries as it may take.

        Stock pauses for up to half a minute between them, and so long the work waits when the broker is back.
        """
        pauses = interval_start, interval_step, interval_max
        return super().ensure_connection(errback, max_retries, *pauses, **options)

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
    """A connection of the pool, which takes the guarded transport and gives up in the end."""

    def ensure(
        self,
        obj: Any,
        fun: Any,
        errback: Any = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Any:
        """Publish, and connect anew if need be. Where nobody says how often, as in remote control, stock tries for
        ever: while the broker is away no Flower ends, and no worker that wants to reply."""
        tries = UNTOLD_RETRIES if max_retries is None else max_retries
        return super().ensure(obj, fun, errback, tries, **options)

    def get_transport_cls(self) -> Any:
        return _guarded(super().get_transport_cls())


def _guarded(stock: Any) -> Any:
    return GUARDED.get(stock, stock)


class AMQP(_StockAMQP):  # type: ignore[misc]
    """Guards all broker connections of an app: `Celery(amqp="stillroom_workers.connections:AMQP")`."""

    Connection = Connection
    BrokerConnection = Connection
