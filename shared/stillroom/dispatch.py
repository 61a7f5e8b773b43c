"""Ask for background work from a service. State in Redis is the truth; a task is only a wake-up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from stillroom.at_exit import AtExit
from stillroom.broker import import_celery, own_ms, producer_settings, sent_now
from stillroom.daemon import Daemon
from stillroom.keys import KEY_LIMIT, Keys
from stillroom.oldest import oldest
from stillroom.settings import Settings
from stillroom.wire import no_fork, reset_after_fork

log = logging.getLogger("stillroom.dispatch")

REFRESH_TASK = "stillroom.refresh"
REFRESH_MANY_TASK = "stillroom.refresh_many"
RECLAIM_TASK = "stillroom.reclaim"
ORDERS_LIMIT = 100  # in one message
# Bytes of a message as it lies in the queue: workers take no larger one.
MESSAGE_LIMIT = 1024 * 1024
# Bytes of its fields as JSON, which becomes base64 and gets headers.
FIELDS_LIMIT = MESSAGE_LIMIT * 5 // 8
# A task costs a worker 2 ms, whatever it has to do. So orders that come at the same time are published together, at
# most this many in a message. Where there were several, the next ones get some time to gather. An order that comes
# alone is published at once.
JOINED_LIMIT = 25
PACE_S = 0.01
BUSY_PACE_S = 0.1  # while tasks wait for a worker: orders would only wait there
# A process that has just woken a task's workers does not wake them again for this long.
WAKE_AGAIN_S = 1.0
WAKES_LIMIT = 100  # tasks that wait for a worker; more of them need no other to be woken


class RefreshOrder(BaseModel):
    """Please load this key again: the whole message of a `stillroom.refresh` task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loader: str = Field(min_length=1, max_length=200)
    args: dict[str, Any]
    key: str = Field(min_length=1, max_length=KEY_LIMIT)  # as it stands in Redis
    token: str = Field(pattern=r"^[0-9a-f]{16}$")  # of the refresh lease


class RefreshOrders(BaseModel):
    """Several orders: the whole message of a `stillroom.refresh_many` task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    orders: list[RefreshOrder] = Field(min_length=1, max_length=ORDERS_LIMIT)


class Dispatch(Protocol):
    """Hands orders to whoever does the work. `send` never waits for them, and does not raise."""

    @property
    def ready(self) -> bool:
        """Return whether the broker takes orders. While it is away nobody takes a lease for nothing."""

    @property
    def inline(self) -> bool:
        """Return whether the caller is to run the order itself, now."""

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        """Hand over orders; `undelivered` is called, in any thread, if that turns out impossible."""

    def wake(self, task: str) -> None:
        """Have a worker run this maintenance task, which finds its work in Redis, soon. Beat runs it anyway.

        Never waits, does not raise; once a second per process is enough.
        """

    def close(self) -> None:
        """Deliver what waits, for half a second at most."""


class InlineDispatch:
    """The caller does the work itself, at once. For tests and small tools."""

    ready = True
    inline = True

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        raise AssertionError("an inline order is run by the operation that asks for it")

    def wake(self, task: str) -> None:
        raise AssertionError("inline maintenance is run by the operation that asks for it")

    def close(self) -> None:
        pass


class NoDispatch:
    """Nobody refreshes: stale values are served until they die."""

    ready = False
    inline = False

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        undelivered()

    def wake(self, task: str) -> None:
        pass

    def close(self) -> None:
        pass


def _nothing() -> None:
    """Do nothing: a wake-up holds no lease that would have to be freed."""


def _nowhere(_headers: Mapping[str, str]) -> AbstractContextManager[None]:
    """Return a context without meaning."""
    return contextlib.nullcontext()


def _no_headers() -> Mapping[str, str]:
    """Return no headers for a message."""
    return {}


class _Errand(NamedTuple):
    """The thread's next publication: orders or a wake. With neither, the thread only looks at its watch."""

    orders: Sequence[RefreshOrder] = ()
    undelivered: Callable[[], object] = _nothing  # called if the publication fails
    wakes: str = ""  # a task
    carried: Mapping[str, str] = {}  # headers of the message: where its spans belong


class CeleryDispatch:
    """Publishes Celery tasks from a thread of its own, so that no request ever waits for the broker.

    A refresh that is lost with its process costs nothing: its lease runs out and the next stale read asks again.
    Where no worker takes the tasks, the queue is filled up to 10,000.
    """

    # A message carries no time after which it expires: this machine's clock would set it, and the worker's would
    # decide. A lease's token says what a late order is worth: nothing, if the lease is gone.
    # A publish to a broker that hangs can't be bounded from the outside: connecting, declaring the queue and
    # sending are a dozen round trips, each with its own timeout.

    inline = False
    waiting_limit = 1_000
    retry_after = 1.0  # seconds without a try after a failure

    queue_limit = 10_000  # tasks nobody takes: a queue without workers must not grow for ever

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys
        self.carry: Callable[[], Mapping[str, str]] = _no_headers  # further headers of a message
        # The clock that tells in the health report for how long a message has waited: Redis', where it is known.
        self.now_ms: Callable[[], int] = own_ms
        # What orders are published in, given these headers: a tool that watches Celery writes its own over them.
        self.inside: Callable[[Mapping[str, str]], AbstractContextManager[None]] = _nowhere
        self._at_exit = AtExit(self.close)
        self._down_until = 0.0
        self._woken: dict[str, float] = {}  # task → time.monotonic() from which to wake it again
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Begin anew in a forked child: no orders and no thread. The parent delivers the orders it holds."""
        self._errands: queue.SimpleQueue[_Errand | None]
        # Orders that could not be queued: the thread tells their callers, because the caller may be an event loop.
        self._refused: deque[Callable[[], object]] = deque(maxlen=self.waiting_limit)
        self._lock = threading.RLock()  # so that two first orders start one thread
        self._owed: dict[str, float] = {}  # wakes that were put off → until when
        self._carried: Mapping[str, str] = {}  # of the message that is being sent
        self._due = 0.0  # time.monotonic() from which the next orders are published
        self._thread: threading.Thread | None = None
        self._producer: Any = None
        self._app: Any = None

    @property
    def ready(self) -> bool:
        return time.monotonic() >= self._down_until

    def send(self, orders: Sequence[RefreshOrder], undelivered: Callable[[], object]) -> None:
        self._enqueue(_Errand(orders, undelivered, carried=self.carry()))

    def wake(self, task: str) -> None:
        now, due = time.monotonic(), self._woken.get(task, 0.0)
        if not self.ready or task in self._owed:
            return
        if now >= due:
            self._woken[task] = now + WAKE_AGAIN_S
            self._enqueue(_Errand(wakes=task))
        else:  # the thread that was woken may be done before this: wake it again
            self._owed[task] = due
            self._enqueue(_Errand())

    def _enqueue(self, errand: _Errand) -> None:
        try:
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    self._start()
        except RuntimeError as error:  # "can't start new thread": there may be one later
            self._failed(error)
            if asyncio._get_running_loop() is None:
                self._give_back(errand.undelivered)
            else:  # giving back is a round trip: it waits for the thread, not in the event loop
                self._refused.append(errand.undelivered)
            return
        if self._errands.qsize() < self.waiting_limit:
            self._errands.put(errand)
        else:
            self._refused.append(errand.undelivered)

    def _start(self) -> None:
        """Start the thread, and keep it only once it runs: a thread that could not start cannot be joined.

        Its queue is made with it. gevent patches only what is made after it, and `gunicorn -k gevent --preload`
        makes rooms before: the thread, a greenlet then, would hold its whole process while it waits for orders.
        """
        if self._thread is None:
            # Not a Queue: its lock would lock out a signal handler that reads the cache in the middle of `put`.
            self._errands = queue.SimpleQueue()
        thread = Daemon(self._work, "stillroom dispatch", (self._errands,))
        thread.start()
        self._thread = thread
        self._at_exit.arm()

    def close(self) -> None:
        """Deliver what waits, for half a second at most, and end the thread. It can be used again."""
        self._at_exit.disarm()
        thread = self._thread
        if thread is None:
            return
        errands = self._errands
        import_celery()  # which the thread may be about to do: half a second is for the broker
        errands.put(None)
        thread.join(0.5)
        self.reset()

    def _work(self, errands: queue.SimpleQueue[_Errand | None]) -> None:
        ahead: deque[_Errand | None] = deque()  # taken from the queue and not yet done
        while (errand := self._next(errands, ahead)) is not None:
            joined = [errand, *self._orders_behind(errand, errands, ahead)]
            try:
                self._deliver(joined)
            except Exception as error:
                self._failed(error)
                for one in joined:
                    self._give_back(one.undelivered)
            while self._refused:
                self._give_back(self._refused.popleft())
        self._hang_up()

    @staticmethod
    def _give_back(undelivered: Callable[[], object]) -> None:
        """Give orders back. An error with one order does not end the thread: its lease runs out by itself."""
        try:
            undelivered()
        except Exception:
            log.exception("a refresh order could not be given back, so its lease has to run out")

    def _next(
        self, errands: queue.SimpleQueue[_Errand | None], ahead: deque[_Errand | None]
    ) -> _Errand | None:
        """Return the next errand. A postponed wake is one when its time has come."""
        while True:
            owed = oldest(self._owed.items(), WAKES_LIMIT)  # other threads add to them
            task, due = min(owed, key=lambda one: one[1], default=("", None))
            left = None if due is None else due - time.monotonic()
            if left is not None and left <= 0:
                del self._owed[task]
                self._woken[task] = time.monotonic() + WAKE_AGAIN_S
                return _Errand(wakes=task)
            try:
                return ahead.popleft() if ahead else errands.get(timeout=left)
            except queue.Empty:
                continue

    def _orders_behind(
        self,
        errand: _Errand,
        errands: queue.SimpleQueue[_Errand | None],
        ahead: deque[_Errand | None],
    ) -> list[_Errand]:
        """Take the orders that follow these, until the message is full or due."""
        behind: list[_Errand] = []
        count = len(errand.orders)
        while 0 < count < JOINED_LIMIT and not ahead:
            try:
                following = errands.get(timeout=max(0.0, self._due - time.monotonic()))
            except queue.Empty:
                break
            if following is None or not following.orders:
                ahead.append(following)
            else:
                behind.append(following)
                count += len(following.orders)
        return behind

    def _deliver(self, errands: Sequence[_Errand]) -> None:
        self._carried = {}  # a wake belongs to no read
        for errand in errands:
            if errand.wakes:
                self._deliver_wake(errand.wakes)
        orders = [order for errand in errands for order in self._sendable(errand)]
        self._carried = next((errand.carried for errand in errands if errand.carried), {})
        pace = PACE_S if len(errands) > 1 else 0.0
        with self.inside(self._carried):
            for some in batches(orders):
                if self._deliver_orders(some):
                    pace = BUSY_PACE_S
        self._due = time.monotonic() + pace

    def _sendable(self, errand: _Errand) -> Sequence[RefreshOrder]:
        """Return the errand's orders, or none if one of them is not what a worker takes."""
        for order in errand.orders:
            if flaw := _flaw(order):
                log.error("an order is not sent: the arguments of %r %s", order.loader, flaw)
                self._give_back(errand.undelivered)
                return ()
        return errand.orders

    def _deliver_orders(self, some: list[RefreshOrder]) -> int:
        """Publish the orders; return how many tasks were waiting for a worker."""
        message: BaseModel = some[0] if len(some) == 1 else RefreshOrders(orders=some)
        loaders = sorted({order.loader for order in some})
        return self._publish(
            REFRESH_TASK if len(some) == 1 else REFRESH_MANY_TASK,
            message.model_dump(),
            kind="refresh",
            shown={"loader": ", ".join(loaders), "orders": len(some)},
        )

    def _deliver_wake(self, task: str) -> None:
        if self._length(self._keys.queue("maintenance")) < WAKES_LIMIT:
            self._publish(task, {}, kind="maintenance", shown={})

    def _publish(self, task: str, fields: Mapping[str, Any], *, kind: str, shown: Any) -> int:
        """Send the task; return how many were waiting in its queue.

        Raises OverflowError where no worker takes them.
        """
        self._connect_once()
        queue_name = self._keys.queue(kind)
        waiting = self._length(queue_name)
        if waiting >= self.queue_limit:
            raise OverflowError(f"{self.queue_limit:,} tasks wait and no worker takes them")
        self._app.send_task(
            task,
            kwargs=fields,
            queue=queue_name,
            producer=self._producer,
            headers={**sent_now(self.now_ms), **self._carried},
            retry=False,
            ignore_result=True,
            argsrepr="",  # nothing to format, and arguments stay out of Flower
            kwargsrepr=json.dumps(shown),
        )
        return waiting

    def _connect_once(self) -> None:
        if not self.ready:
            raise ConnectionError("the broker was away a moment ago")
        if self._producer is None:
            self._connect()

    def _connect(self) -> None:
        with no_fork():  # the broker's transport is imported here
            self._app = import_celery().OwnCelery(broker=self._settings.broker)
            self._app.conf.update(producer_settings(self._settings))
            self._producer = self._app.amqp.Producer(self._app.connection_for_write())

    def _length(self, queue_name: str) -> int:
        """Return how many tasks wait there, or 0 with brokers that have limits of their own."""
        self._connect_once()
        length = getattr(self._producer.channel, "_size", None)  # kombu's own queues
        return int(length(queue_name)) if length is not None else 0

    def _failed(self, error: Exception) -> None:
        if self.ready:
            ours = isinstance(
                error, OverflowError | RuntimeError
            )  # too much waits, or no thread is left
            why = error if ours else type(error).__name__
            log.warning("the broker takes no tasks (%s); workers are told when it does", why)
        self._down_until = time.monotonic() + self.retry_after
        self._hang_up()

    def _hang_up(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(Exception):
                producer.connection.collect(socket_timeout=0.1)


def batches(orders: Iterable[RefreshOrder]) -> Iterator[list[RefreshOrder]]:
    """Yield the orders in messages that a worker takes."""
    some: list[RefreshOrder] = []
    size = 0
    for order in orders:
        more = _size(order)
        if some and (len(some) == JOINED_LIMIT or size + more > FIELDS_LIMIT):
            yield some
            some, size = [], 0
        some.append(order)
        size += more
    if some:
        yield some


def _flaw(order: RefreshOrder) -> str:
    """Return why no worker takes the order, or "". Its arguments come from an entry, which anybody may write."""
    try:
        size = _size(order)
    except ValueError as error:  # nested too deep
        return f"have no JSON: {error}"
    return f"have {size:,} bytes as JSON" if size > FIELDS_LIMIT else ""


def _size(order: RefreshOrder) -> int:
    return len(order.model_dump_json())
