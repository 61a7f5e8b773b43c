"""Reach the broker as our processes do: with which settings of Celery, and with one message at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.backoff import NoBackoff
from redis.retry import Retry

import redis
from stillroom.address import is_sentinel, read_sentinel
from stillroom.errors import DispatchFailed
from stillroom.keys import Keys
from stillroom.place import each_url
from stillroom.settings import Settings
from stillroom.wire import no_fork
from stillroom.wire.trust import tls_options

# When a message was sent, so that health can tell how long it waits.
SENT_HEADER = "stillroom_sent_ms"


def import_celery() -> Any:
    """Return the module of our Celery app. It is slow to import: only a process that publishes does."""
    with no_fork():
        from stillroom import own_celery

    return own_celery


def publish(
    settings: Settings, task: str, queue: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Send one message, now, from the calling thread. Raises DispatchFailed if the broker does not take it."""
    with import_celery().OwnCelery(broker=settings.broker) as app:
        app.conf.update(producer_settings(settings))
        try:
            # By a connection of its own: all pools of a process have one limit, which is the project's to set.
            with app.connection_for_write() as connection:
                app.send_task(
                    task,
                    list(args),
                    dict(kwargs),
                    queue=queue,
                    headers=sent_now(),
                    retry=False,
                    connection=connection,
                )
        except Exception as error:  # kombu's, redis-py's and the socket's, of any broker
            raise DispatchFailed(
                f"the broker did not take it: {type(error).__name__}: {error}"
            ) from error


def reach(settings: Settings) -> None:
    """Connect to the broker as a publisher does, and see that it would take a message. Raises DispatchFailed."""
    names = [Keys(settings.namespace).queue(kind) for kind in ("refresh", "maintenance")]
    with import_celery().OwnCelery(broker=settings.broker) as app:
        app.conf.update(producer_settings(settings))
        try:
            with app.connection_for_write() as connection:
                connection.connect()
                for name in names:
                    _rehearse_push(connection.default_channel, name)
        except Exception as error:  # kombu's, redis-py's and the socket's, of any broker
            raise DispatchFailed(f"{type(error).__name__}: {error}") from error


def _rehearse_push(channel: Any, queue_name: str) -> None:
    """See that Redis lets this user count and push. A transaction that is not carried out shows it, and changes
    nothing.
    """
    from kombu.transport import redis

    if not isinstance(channel, redis.Channel):
        return
    channel._size(queue_name)
    link = channel.client.connection_pool.get_connection()
    try:
        for words in (("MULTI",), ("LPUSH", queue_name, "")):
            link.send_command(*words)
            link.read_response()
    finally:
        link.disconnect()
        channel.client.connection_pool.release(link)


def own_ms() -> int:
    """Return this machine's clock, in ms since 1970."""
    return int(time.time() * 1000)


def sent_now(now_ms: Callable[[], int] = own_ms) -> dict[str, Any]:
    """Return the header of a message that is sent now."""
    return {SENT_HEADER: now_ms()}


def producer_settings(settings: Settings) -> Mapping[str, Any]:
    """Return Celery's settings for a process that only publishes.

    kombu's default patience with a dead broker is endless.
    """
    own = own_names(settings)
    return own | {
        "task_serializer": "json",
        "task_ignore_result": True,
        "task_create_missing_queue_type": "quorum" if is_amqp(settings) else "classic",
        "broker_connection_retry": False,
        "broker_transport_options": own["broker_transport_options"]
        | {
            "socket_timeout": 1.0,
            "socket_connect_timeout": 0.25,
            "max_retries": 0,
            **kept_alive(),
            **sentinel_options(settings),
        },
        "broker_use_ssl": broker_tls(settings),
    }


def own_names(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings that keep apps on one broker apart.

    Their defaults are the same for every app: each gives back the others' unacknowledged messages by its own
    patience, and a command to one app's workers reaches all.
    """
    keys = Keys(settings.namespace)
    return {
        "control_exchange": keys.control,
        "event_exchange": keys.events,
        "event_queue_prefix": keys.events,
        "broker_transport_options": {
            "unacked_key": keys.unacked,
            "unacked_index_key": keys.unacked_index,
            "unacked_mutex_key": keys.unacked_mutex,
            "keyprefix_binding_deadlines": keys.binding_deadlines,
            **({"confirm_publish": True} if is_amqp(settings) else {}),
        },
    }


def is_amqp(settings: Settings) -> bool:
    """Return whether the broker is RabbitMQ, or another one that speaks AMQP."""
    return settings.broker.partition("://")[0] in ("amqp", "amqps", "pyamqp")


def kept_alive() -> dict[str, Any]:
    """Return kombu's options for connections that show signs of life while they are idle, as redis-py's own do.

    Otherwise a NAT or a firewall forgets them after some minutes. Neither end is told: what is sent then gets lost.
    """
    options = redis.Connection().socket_keepalive_options  # type: ignore[no-untyped-call]
    return {"socket_keepalive": True, "socket_keepalive_options": {**options}}


def sentinel_options(settings: Settings, url: str | None = None) -> dict[str, Any]:
    """Return the options that kombu and Celery need for Sentinels, whose addresses are in the URL: the broker's
    unless another is given.
    """
    url = url or settings.broker_url or settings.redis_url
    if not is_sentinel(url):
        return {}
    # redis-py would ask one that does not run four times, and wait eight seconds in all before it asks the next.
    patience = {
        "socket_timeout": 1.0,
        "socket_connect_timeout": 0.5,
        "retry": Retry(NoBackoff(), 0),
    }
    tls = broker_tls(settings, url)
    own: dict[str, Any] = (
        patience | settings.sentinel_login | ({} if tls is None else {"ssl": True, **tls})
    )
    return {"master_name": read_sentinel(url).master, "sentinel_kwargs": own}


def broker_tls(settings: Settings, url: str | None = None) -> dict[str, Any] | None:
    """Return what the URL says of TLS, read as the app's connections read it; None where there is no TLS.

    kombu's own `rediss://` takes any certificate, password and all; ours has to be a valid one. Most options are
    text to kombu. The URL is the broker's unless another is given.
    """
    from kombu.utils.url import parse_ssl_cert_reqs

    url = each_url(url or settings.broker_url or settings.redis_url)[0]
    server = read_sentinel(url).primary if is_sentinel(url) else url
    if not server.startswith("rediss://"):
        return None
    given = {"ssl_cert_reqs": "required"} | tls_options(server)
    return given | {"ssl_cert_reqs": parse_ssl_cert_reqs(given["ssl_cert_reqs"])}
