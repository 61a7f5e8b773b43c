"""How a service asks for background work. State in Redis is the truth; a task is only a wake-up."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import queue
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from stillroom.keys import KEY_LIMIT
from stillroom.settings import Settings
from stillroom.wire import reset_after_fork

log = logging.getLogger("stillroom.dispatch")

REFRESH_TASK = "stillroom.refresh"
REFRESH_MANY_TASK = "stillroom.refresh_many"
ORDERS_LIMIT = 100  # in one message


class RefreshOrder(BaseModel):
    """Please load this key again: the whole message of a `stillroom.refresh` task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loader: str = Field(min_length=1, max_length=200)
    args: dict[str, Any]
    key: str = Field(min_length=1, max_length=KEY_LIMIT)  # as it stands in Redis
    token: str = Field(pattern=r"^[0-9a-f]{16}$")  # of the refresh lease


class RefreshOrders(BaseModel):
    """Several of them: the whole message of a `stillroom.refresh_many` task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    orders: list[RefreshOrder] = Field(min_length=1, max_length=ORDERS_LIMIT)


class Dispatch(Protocol):
    """Hands orders to whoever does the work. `send` never waits for them, and does not raise."""

    @property
    def ready(self) -> bool:
        """False while the broker is away: then nobody takes a lease for nothing."""

    @property
    def inline(self) -> bool:
        """True if the caller is to run the order itself, now."""

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        """Hand over orders; `undelivered` is called, in any thread, if that turns out impossible."""

    def close(self) -> None:
        """Deliver what waits, for half a second at most."""


class InlineDispatch:
    """The caller does the work itself, at once. For tests and small tools."""

    ready = True
    inline = True

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        raise AssertionError("an inline order is run by the operation that asks for it")

    def close(self) -> None:
        pass


class NoDispatch:
    """Nobody refreshes: stale values are served until they die."""

    ready = False
    inline = False

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        undelivered()

    def close(self) -> None:
        pass


_Orders: TypeAlias = tuple[Sequence[RefreshOrder], Callable[[], object]]


class CeleryDispatch:
    """Publishes Celery tasks from a thread of its own, so that no request ever waits for the broker.

    A publish to a broker that hangs can't be bounded from the outside (connecting, declaring the queue and
    sending are a dozen round trips, each with its own timeout). An order that gets lost with its process costs
    nothing: the lease runs out and the next stale read asks again.
    """

    inline = False
    waiting_limit = 1_000
    retry_after = 1.0  # seconds without a try after a failure

    queue_limit = 10_000  # tasks nobody takes: a queue without workers must not grow for ever

    def __init__(self, settings: Settings, queue_name: str) -> None:
        self._settings = settings
        self._queue_name = queue_name
        self._down_until = 0.0
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Nothing to send and nobody who sends: a forked child begins anew; its parent delivers what it holds."""
        self._orders: queue.Queue[_Orders | None] = queue.Queue(self.waiting_limit)
        self._lock = threading.Lock()  # so that two first orders start one thread
        self._thread: threading.Thread | None = None
        self._producer: Any = None
        self._app: Any = None

    @property
    def ready(self) -> bool:
        return time.monotonic() >= self._down_until

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._start()
        try:
            self._orders.put_nowait((orders, undelivered))
        except queue.Full:
            undelivered()

    def _start(self) -> None:
        self._thread = threading.Thread(
            target=self._work, args=(self._orders,), name="stillroom dispatch", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Deliver what waits, for half a second at most, and end the thread. It can be used again."""
        atexit.unregister(self.close)
        thread, orders = self._thread, self._orders
        if thread is None:
            return
        with contextlib.suppress(queue.Full):
            orders.put_nowait(None)
            thread.join(0.5)
        self.reset()

    def _work(self, orders: queue.Queue[_Orders | None]) -> None:
        while (waiting := orders.get()) is not None:
            several, undelivered = waiting
            try:
                for start in range(0, len(several), ORDERS_LIMIT):
                    self._deliver(several[start : start + ORDERS_LIMIT])
            except Exception as error:
                self._failed(error)
                undelivered()
        self._hang_up()

    def _deliver(self, orders: Sequence[RefreshOrder]) -> None:
        if not self.ready:
            raise ConnectionError("the broker was away a moment ago")
        if self._producer is None:
            self._connect()
        self._refuse_to_pile_up()
        message: BaseModel = orders[0] if len(orders) == 1 else RefreshOrders(orders=list(orders))
        self._app.send_task(
            REFRESH_TASK if len(orders) == 1 else REFRESH_MANY_TASK,
            kwargs=message.model_dump(),
            queue=self._queue_name,
            producer=self._producer,
            expires=self._settings.refresh_lease,  # later than that the lease is gone, and with it the work
            retry=False,
            ignore_result=True,
            argsrepr="",  # nothing to format, and arguments stay out of Flower
            kwargsrepr=json.dumps({"loader": orders[0].loader, "orders": len(orders)}),
        )

    def _connect(self) -> None:
        import celery

        self._app = celery.Celery(broker=self._settings.broker, set_as_current=False)
        self._app.conf.update(producer_settings(self._settings))
        self._producer = self._app.amqp.Producer(self._app.connection_for_write())

    def _refuse_to_pile_up(self) -> None:
        length = getattr(
            self._producer.channel, "_size", None
        )  # kombu's own queues; other brokers have limits
        if length is not None and length(self._queue_name) >= self.queue_limit:
            raise OverflowError(f"{self.queue_limit:,} refreshes wait and no worker takes them")

    def _failed(self, error: Exception) -> None:
        if self.ready:
            why = error if isinstance(error, OverflowError) else type(error).__name__
            log.warning(
                "the broker takes no refreshes (%s); stale values are served meanwhile", why
            )
        self._down_until = time.monotonic() + self.retry_after
        self._hang_up()

    def _hang_up(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(Exception):
                producer.connection.collect(socket_timeout=0.1)


def producer_settings(settings: Settings) -> Mapping[str, Any]:
    """What a process that only publishes tells Celery. kombu's default patience with a dead broker is endless."""
    return {
        "task_serializer": "json",
        "task_ignore_result": True,
        "broker_connection_retry": False,
        "broker_transport_options": {
            "socket_timeout": 1.0,
            "socket_connect_timeout": 0.25,
            "max_retries": 0,
        },
        "broker_use_ssl": broker_tls(settings),
    }


def broker_tls(settings: Settings) -> dict[str, Any] | None:
    """kombu's own `rediss://` takes any certificate, password and all; ours has to be a valid one."""
    if not settings.broker.startswith("rediss://") or "ssl_cert_reqs" in settings.broker:
        return None
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED}
