"""How a service asks for background work. State in Redis is the truth; a task is only a wake-up."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from stillroom.keys import KEY_LIMIT
from stillroom.settings import Settings

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
    """Hands orders to whoever does the work. `send` neither blocks nor raises."""

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


class CeleryDispatch:
    """Publishes Celery tasks from a thread of its own, so that no request ever waits for the broker.

    A publish to a broker that hangs can't be bounded from the outside (connecting, declaring the queue and
    sending are a dozen round trips, each with its own timeout). An order that gets lost with its process costs
    nothing: the lease runs out and the next stale read asks again.
    """

    inline = False
    waiting_limit = 1_000
    retry_after = 1.0  # seconds without a try after a failure

    def __init__(self, settings: Settings, queue_name: str) -> None:
        self._settings = settings
        self._queue_name = queue_name
        self._orders: queue.Queue[tuple[Sequence[RefreshOrder], Callable[[], object]]] = (
            queue.Queue(self.waiting_limit)
        )
        self._thread: threading.Thread | None = None
        self._down_until = 0.0
        self._producer: Any = None
        self._app: Any = None

    @property
    def ready(self) -> bool:
        return time.monotonic() >= self._down_until

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        try:
            self._orders.put_nowait((orders, undelivered))
        except queue.Full:
            undelivered()
        if (
            self._thread is None or not self._thread.is_alive()
        ):  # the first one, or the first after a fork
            self._thread = threading.Thread(
                target=self._work, name="stillroom dispatch", daemon=True
            )
            self._thread.start()
            atexit.register(self.close)

    def close(self) -> None:
        deadline = time.monotonic() + 0.5
        while self._orders.unfinished_tasks and time.monotonic() < deadline and self.ready:
            time.sleep(0.005)

    def _work(self) -> None:
        while True:
            orders, undelivered = self._orders.get()
            try:
                for start in range(0, len(orders), ORDERS_LIMIT):
                    self._deliver(orders[start : start + ORDERS_LIMIT])
            except Exception as error:
                self._failed(error)
                undelivered()
            finally:
                self._orders.task_done()

    def _deliver(self, orders: Sequence[RefreshOrder]) -> None:
        if not self.ready:
            raise ConnectionError("the broker was away a moment ago")
        if self._producer is None:
            self._connect()
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
        self._app.conf.update(producer_settings())
        self._producer = self._app.amqp.Producer(self._app.connection_for_write())

    def _failed(self, error: Exception) -> None:
        if self.ready:
            log.warning(
                "the broker is away (%s); stale values are served meanwhile", type(error).__name__
            )
        self._down_until = time.monotonic() + self.retry_after
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(Exception):
                producer.connection.collect(socket_timeout=0.1)


def producer_settings() -> Mapping[str, Any]:
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
    }
