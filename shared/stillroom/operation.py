"""Define operations, and the two drivers that run them.

An operation is a generator. It yields steps and is sent their results:

* a list of commands: one batch to Redis, answered by the list of replies (see Once, Freeing and Timed);
* `Kept`: such a batch, which is to be on replicas when it returns;
* `Call`: a function of the app, a loader; answered by what it returns;
* `Pause` and `Backoff`: some seconds without doing anything;
* `On`: other operations, on the servers of the cache's shards or of the state.

What asks one thing and is nearly always done with the answer may be an `Ahead`: its generator is begun only where
it is not.

A step that fails raises at its yield. What the generator returns is the operation's result. So each
protocol on Redis is written once, and knows nothing of threads or event loops.

Time: all batches of a call share `call_timeout` seconds with its backoffs, counted by one clock from its
beginning. A Call, a Pause and an On are bounded by whoever yields them; what follows one is another call.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias, TypeVar

from stillroom.background import in_background_loop
from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.repair import Repair
from stillroom.wire import (
    AsyncShardWire,
    AsyncSpreadWire,
    AsyncWire,
    Command,
    ShardWire,
    SpreadThreadsWire,
    SpreadWire,
    Wire,
    load_begun,
    refusal,
    side_by_side,
    time_left,
    to_its_end,
)

T = TypeVar("T")
Operation: TypeAlias = Generator[Any, Any, T]
BlockingWire: TypeAlias = Wire | ShardWire[Any] | SpreadWire | SpreadThreadsWire
AwaitedWire: TypeAlias = AsyncWire | AsyncShardWire | AsyncSpreadWire

UNUSUAL: Any = object()  # an answer that takes more than a look at it
WAIT_SHARE = 0.7  # of the time that is left; the rest is for the replies to come back
STATE = -1  # where a step On runs: on the state's server; shards count from 0


class Ahead:
    """An operation that asks one thing, and is nearly always done when that is answered.

    A generator and its steps are a third of what a hit costs. So the driver asks by itself, and begins the
    operation only where the answer is not the usual one. Whoever iterates over it (`yield from`, together.py) runs
    it as any other operation.
    """

    __slots__ = ()

    send = None  # by which a driver knows it
    batch: list[Command]  # what it asks: a plain batch

    def usual(self, replies: Sequence[Any]) -> Any:
        """Return the result of the operation, or UNUSUAL."""
        raise NotImplementedError

    def rest(
        self, replies: Sequence[Any] | None, away: RedisUnavailable | None = None
    ) -> Operation[Any]:
        """Return the operation, which goes on from the replies, or from the error in their place."""
        raise NotImplementedError

    def __iter__(self) -> Operation[Any]:
        try:
            replies = yield self.batch
        except RedisUnavailable as error:
            return (yield from self.rest(None, error))
        found = self.usual(replies)
        return found if found is not UNUSUAL else (yield from self.rest(replies))


def answered(
    operation: Operation[T],
    batch: list[Command],
    replies: Sequence[Any] | None,
    away: RedisUnavailable | None,
) -> Operation[T]:
    """Run an operation whose first batch was asked ahead of it: it is told the replies, or why there are none.

    Where it begins with another one after all, that is sent.
    """
    try:
        step: Any = operation.send(None)
        if step == batch:
            step = operation.send(replies) if away is None else operation.throw(away)
        while True:
            try:
                answer = yield step
            except BaseException as error:
                step = operation.throw(error)
            else:
                step = operation.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


class Once(list[Command]):
    """A batch that is not idempotent, so it must not be sent a second time.

    `parts`: where it was put together from several operations' batches, how long each part is, and whether that
    part is such a batch itself. The order of commands matters within a part, and not between parts.
    """

    _parts: Sequence[tuple[int, bool]] = ()
    _steps: Sequence[list[Command]] = ()

    @classmethod
    def joined(cls, steps: Sequence[list[Command]]) -> Once:
        """Put these operations' batches together."""
        batch = cls(chain.from_iterable(steps))
        batch._steps = steps
        return batch

    @classmethod
    def apart(cls, commands: Sequence[Command]) -> Once:
        """Put commands together that have nothing to do with each other, such as one for each shard.

        A server that lacks the script of one of them is sent that one again, and none of the others: see repair.py.
        """
        batch = cls(commands)
        batch._parts = [(1, True)] * len(commands)
        return batch

    @property
    def parts(self) -> Sequence[tuple[int, bool]]:
        # Asked for where something went wrong, or the batch goes to several servers.
        return self._parts or [(len(step), type(step) is Once) for step in self._steps]

    @parts.setter
    def parts(self, parts: Sequence[tuple[int, bool]]) -> None:
        self._parts = parts


class Freeing(list[Command]):
    """A batch that others are waiting for: it is sent even when the time of its request is up."""


class Timed(list[Command]):
    """A batch of scripts that refuse to act once the caller has given up: IN_TIME among their arguments
    becomes the server time from when to when the wire waits for this batch.

    It is never sent a second time: two copies could arrive in any order, with others' acts between them.
    """


class Replies(list[Any]):
    """The replies to a batch that was to be Kept."""

    replicas = 0  # so many had all of it in time
    trouble = ""  # why they could not be asked


class Kept:
    """A batch that is to be on so many replicas when it returns: WAIT rides behind it. Answered by Replies.

    Too few replicas in time are no error: what the batch does has happened.
    """

    __slots__ = ("_batch", "_replicas")

    def __init__(self, batch: list[Command], replicas: int) -> None:
        self._batch = batch
        self._replicas = replicas

    @property
    def is_timed(self) -> bool:
        return isinstance(self._batch, Timed)

    @property
    def is_idempotent(self) -> bool:
        return not isinstance(self._batch, Once | Timed)

    def with_wait(self, patience_s: float) -> list[Command]:
        """Return the batch and WAIT, which is answered before `patience_s` seconds are over."""
        budget = time_left()
        left = patience_s if budget is None else min(patience_s, budget.left)
        ms = max(1, int(left * WAIT_SHARE * 1000))
        batch = [*self._batch, (b"WAIT", b"%d" % self._replicas, b"%d" % ms)]
        parts = getattr(self._batch, "parts", ())
        if not parts:
            return batch
        batch = once = Once(batch)
        once.parts = [*parts, (1, False)]
        return batch

    def answered(self, replies: Sequence[Any], refused: RedisRefused | None = None) -> Replies:
        """Return the batch's replies, with what WAIT said. Raises an error of the batch, but none of WAIT."""
        *rest, kept = replies or [None]
        if refused is not None and not rest:
            raise refused
        if any(isinstance(reply, Exception) for reply in rest):
            raise refusal(rest)
        told = Replies(rest)
        if isinstance(kept, Exception):
            told.trouble = str(kept)
        else:
            told.replicas = int(kept)
        return told


class Call:
    """Call a function of the app, or await a coroutine function. `leases`: those of the load that it is."""

    __slots__ = ("args", "function", "kwargs", "leases")

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = {},
        leases: Sequence[bytes] = (),
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.leases = leases


class Pause:
    """Wait this many seconds for somebody else, or let others go first. Whoever yields it has a time of its own."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Backoff(Pause):
    """Wait this many seconds before another try. They are a part of the call's time."""

    __slots__ = ()


class On:
    """Run these operations, each on the server of its shard, or of the STATE; answered by their results in order.

    All are run; then the first error among them is raised.
    """

    __slots__ = ("operations",)

    def __init__(self, operations: Sequence[tuple[int, Operation[Any]]]) -> None:
        self.operations = operations


class Driver:
    """Runs operations in the calling thread.

    `places`: the drivers of the cache's shards, and last that of the state, for a step On them. Each has its own
    `call_timeout`.
    """

    def __init__(self, wire: BlockingWire, places: Sequence[Driver] = ()) -> None:
        self.wire = wire
        self._places = places
        self._call_timeout = wire.server.settings.call_timeout
        self._command_timeout = wire.server.settings.command_timeout

    def run(
        self,
        operation: Operation[T],
        deadline: float = 0.0,
        interruption: BaseException | None = None,
    ) -> T:
        """Return the operation's result.

        `deadline`: of a call that has begun; time.monotonic(). `interruption`: the operation has begun, and is told
        this next.
        """
        send: Any = operation.send
        if send is None:
            return self._run_ahead(operation)  # type: ignore[no-any-return]
        try:
            step = send(None) if interruption is None else operation.throw(interruption)
            # Not before: until its first step a call waits for nobody, and may have a large value to encode.
            deadline = deadline or time.monotonic() + self._call_timeout
            while True:
                try:
                    kind = type(step)
                    if kind in BATCHES:
                        left = deadline - time.monotonic()
                        answer = self._exchange(step, left, idempotent=kind is list)
                    else:
                        answer = self._take(step, deadline)
                        if isinstance(step, _OTHERS_TIME) and not isinstance(step, Backoff):
                            deadline = time.monotonic() + self._call_timeout
                except BaseException as error:
                    step = operation.throw(error)
                else:
                    step = send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except BaseException as error:
            if inspect.getgeneratorstate(operation) != inspect.GEN_SUSPENDED:
                raise  # it has ended with this
            # A signal's handler raised between two steps: what the operation has taken is to be given back.
            return Driver.run(self, operation, interruption=error)

    def _run_ahead(self, ahead: Any) -> Any:
        began, left, budget = time.monotonic(), self._call_timeout, time_left()
        if budget is not None:
            left = min(left, budget.left)
        try:
            # A read needs no repair, so this is all of _exchange.
            replies = self.wire.execute(ahead.batch, left)
        except RedisUnavailable as error:
            rest = ahead.rest(None, error)
        else:
            found = ahead.usual(replies)
            if found is not UNUSUAL:
                return found
            rest = ahead.rest(replies)
        finally:
            if budget is not None:
                budget.left -= time.monotonic() - began
        return Driver.run(self, rest, began + self._call_timeout)

    def _exchange(
        self,
        batch: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
        budgeted: bool = True,
    ) -> list[Any]:
        began = time.monotonic()
        budget = time_left() if budgeted else None
        if budget is not None:
            left = min(left, budget.left)
        try:
            return self.wire.execute(batch, left, idempotent=idempotent, timed=timed)
        except RedisRefused as refused:
            repair = Repair(batch, refused, may_repeat=idempotent and not timed)
            second: Sequence[Any] = []
            while repair.goes_on(second):
                try:
                    second = self.wire.execute(
                        repair.commands,
                        began + left - time.monotonic(),
                        idempotent=idempotent,
                        timed=timed,
                    )
                except RedisRefused as again:
                    second = again.replies
                except RedisUnavailable as error:
                    raise repair.failed(error) from None
            return repair.mended(second)
        finally:
            if budget is not None:
                budget.left -= time.monotonic() - began

    def _take(self, step: Any, deadline: float) -> Any:
        if isinstance(step, Call):
            with load_begun(step.leases):
                result = _called(step)
                return in_background_loop(result) if inspect.isawaitable(result) else result
        if isinstance(step, Pause):
            return time.sleep(_paused(step, deadline))
        if isinstance(step, Freeing):
            return self._exchange_freeing(step)
        if isinstance(step, Timed):
            left = min(deadline - time.monotonic(), self._command_timeout)
            return self._exchange(step, left, timed=True)
        if isinstance(step, Kept):
            return self._exchange_kept(step, deadline)
        if isinstance(step, On):
            return _all_good([self._outcome(*one) for one in step.operations])
        raise TypeError(f"{type(step).__name__} is no step of an operation")

    def _exchange_freeing(self, step: Freeing) -> list[Any]:
        """Return the replies. After an interruption it is sent once more: the first copy may have gone nowhere."""
        try:
            return self._exchange(step, self._call_timeout, budgeted=False)
        except RedisUnavailable:
            raise
        except BaseException:
            with contextlib.suppress(RedisUnavailable):
                self._exchange(step, self._call_timeout, budgeted=False)
            raise

    def _exchange_kept(self, step: Kept, deadline: float) -> Replies:
        # All that the call has: the first WAIT may take a batch's whole time before its script is repaired.
        left = deadline - time.monotonic()
        batch, how = step.with_wait(min(left, self._command_timeout)), step.is_idempotent
        try:
            replies = self._exchange(batch, left, idempotent=how, timed=step.is_timed)
        except RedisRefused as refused:
            return step.answered(refused.replies, refused)
        return step.answered(replies)

    def _outcome(self, place: int, operation: Operation[Any]) -> Any:
        try:
            # Past the `run` that events wrap: this is a part of a call that has its event.
            return Driver.run(self._places[place], operation)
        except Exception as error:
            return Failed(error)


class AsyncDriver:
    """Runs operations in the calling task. See Driver."""

    def __init__(self, wire: AwaitedWire, places: Sequence[AsyncDriver] = ()) -> None:
        self.wire = wire
        self._places = places
        self._call_timeout = wire.server.settings.call_timeout
        self._command_timeout = wire.server.settings.command_timeout
        self._longest_lease = wire.server.settings.lease_limit

    def at(self, place: int) -> AsyncDriver:
        """Return the driver of another place of a step On."""
        return self._places[place]

    def run(self, operation: Operation[T], deadline: float = 0.0) -> Coroutine[Any, Any, T]:
        """See Driver.run. Awaited by nobody, the operation is not begun."""
        send: Any = operation.send
        if send is None:
            return self._run_ahead(operation)
        return self._run_from(operation, deadline)

    async def _run_from(self, operation: Operation[T], deadline: float) -> T:
        try:
            step: Any = operation.send(None)
            # Not before: until its first step a call waits for nobody, however busy this loop is.
            deadline = deadline or time.monotonic() + self._call_timeout
            while True:
                try:
                    kind = type(step)
                    if kind in BATCHES:
                        left = deadline - time.monotonic()
                        answer = await self._exchange(step, left, idempotent=kind is list)
                        is_others_time = False
                    else:
                        answer = await self._take(step, deadline)
                        is_others_time = kind is not Backoff and isinstance(step, _OTHERS_TIME)
                except BaseException as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(answer)
                    now = time.monotonic()
                    if is_others_time:
                        deadline = now + self._call_timeout
                    elif deadline < now:
                        deadline = self._later(deadline, now)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _run_ahead(self, ahead: Any) -> Any:
        """See Driver._run_ahead."""
        began, left, budget = time.monotonic(), self._call_timeout, time_left()
        deadline = began + left
        if budget is not None:
            left = min(left, budget.left)
        try:
            replies = await self.wire.execute(ahead.batch, left)
        except RedisUnavailable as error:
            rest = ahead.rest(None, error)
        else:
            found = ahead.usual(replies)
            if found is not UNUSUAL:
                return found
            rest = ahead.rest(replies)
            deadline = self._later(deadline, time.monotonic())
        finally:
            if budget is not None:
                budget.left -= min(max(0.0, left), time.monotonic() - began)
        return await AsyncDriver.run(self, rest, deadline)

    def _later(self, deadline: float, now: float) -> float:
        """Return the deadline of what follows a step that was to end before this one.

        If it did not, this loop was busy, for the wire does not wait so long. What follows is not to pay for that.
        If the loop stood still for as long as a lease may last, the marks that judge what was read may be gone.
        """
        if deadline < now < deadline + self._longest_lease:
            return now + self._call_timeout
        return deadline

    async def _exchange(
        self,
        batch: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
        budgeted: bool = True,
    ) -> list[Any]:
        began = time.monotonic()
        budget = time_left() if budgeted else None
        if budget is not None:
            left = min(left, budget.left)
        try:
            return await self.wire.execute(batch, left, idempotent=idempotent, timed=timed)
        except RedisRefused as refused:
            repair = Repair(batch, refused, may_repeat=idempotent and not timed)
            second: Sequence[Any] = []
            if (answered := time.monotonic()) > began + left:  # this loop was busy: see run
                began = answered
            while repair.goes_on(second):
                try:
                    second = await self.wire.execute(
                        repair.commands,
                        began + left - time.monotonic(),
                        idempotent=idempotent,
                        timed=timed,
                    )
                except RedisRefused as again:
                    second = again.replies
                except RedisUnavailable as error:
                    raise repair.failed(error) from None
            return repair.mended(second)
        finally:
            if budget is not None:
                budget.left -= min(max(0.0, left), time.monotonic() - began)

    async def _take(self, step: Any, deadline: float) -> Any:
        if isinstance(step, Call):
            with load_begun(step.leases):
                if inspect.iscoroutinefunction(step.function):
                    return await step.function(*step.args, **step.kwargs)
                # A plain function may block for as long as a database takes: not in the event loop.
                result = await _called_aside(step)
                return await result if inspect.isawaitable(result) else result
        if isinstance(step, Pause):
            return await asyncio.sleep(_paused(step, deadline))
        if isinstance(step, Freeing):
            return await self._exchange_freeing(step)
        if isinstance(step, Timed):
            left = min(deadline - time.monotonic(), self._command_timeout)
            return await self._exchange(step, left, timed=True)
        if isinstance(step, Kept):
            return await self._exchange_kept(step, deadline)
        if isinstance(step, On):
            if len(step.operations) == 1:
                return _all_good([await self._outcome(*step.operations[0])])
            return _all_good(await side_by_side(self._outcome(*one) for one in step.operations))
        raise TypeError(f"{type(step).__name__} is no step of an operation")

    async def _exchange_freeing(self, step: Freeing) -> list[Any]:
        """See Driver._exchange_freeing. In a task that was cancelled it runs to its end."""
        freeing = partial(self._exchange, step, self._call_timeout, budgeted=False)
        if _is_being_cancelled():
            return await to_its_end(freeing())
        try:
            return await freeing()
        except (RedisUnavailable, GeneratorExit):
            raise
        except BaseException:
            with contextlib.suppress(RedisUnavailable):
                await to_its_end(freeing())
            raise

    async def _exchange_kept(self, step: Kept, deadline: float) -> Replies:
        # All that the call has: the first WAIT may take a batch's whole time before its script is repaired.
        left = deadline - time.monotonic()
        batch, how = step.with_wait(min(left, self._command_timeout)), step.is_idempotent
        try:
            replies = await self._exchange(batch, left, idempotent=how, timed=step.is_timed)
        except RedisRefused as refused:
            return step.answered(refused.replies, refused)
        return step.answered(replies)

    async def _outcome(self, place: int, operation: Operation[Any]) -> Any:
        try:
            return await AsyncDriver.run(self._places[place], operation)
        except Exception as error:
            return Failed(error)


def _is_being_cancelled() -> bool:
    """Return whether this task was cancelled, and may be cancelled again at its next await."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# Steps that are sent as they are.
BATCHES = frozenset([list, Once])
# Steps whose time is not the call's. A Backoff is a Pause, but takes the call's time.
_OTHERS_TIME = (Call, Pause, On)


def _paused(pause: Pause, deadline: float) -> float:
    """Return how long to wait. Raises RedisUnavailable for a backoff longer than the call's time."""
    if not isinstance(pause, Backoff):
        return pause.seconds
    budget, left = time_left(), deadline - time.monotonic()
    left = left if budget is None else min(left, budget.left)
    if pause.seconds > left:
        raise RedisUnavailable("budget")
    if budget is not None:
        budget.left -= pause.seconds
    return pause.seconds


def drivers_of(wires: Sequence[BlockingWire], state: BlockingWire) -> list[Driver]:
    """Return a driver for each shard's wire, which knows the others and that of the state."""
    places: list[Driver] = []
    drivers = [Driver(wire, places) for wire in wires]
    places += [*drivers, Driver(state, places)]
    return drivers


def async_drivers_of(wires: Sequence[AwaitedWire], state: AwaitedWire) -> list[AsyncDriver]:
    """Return the drivers of `wires` for asyncio; each knows all of them, and that of the state. See drivers_of."""
    places: list[AsyncDriver] = []
    drivers = [AsyncDriver(wire, places) for wire in wires]
    places += [*drivers, AsyncDriver(state, places)]
    return drivers


class Failed(NamedTuple):
    """Hold the error of an operation that ended without a result."""

    error: BaseException


def _all_good(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            raise outcome.error
    return outcomes


def _called(call: Call) -> Any:
    """Return the function's result. The two exceptions that generators use are kept away from them."""
    try:
        return call.function(*call.args, **call.kwargs)
    except (StopIteration, GeneratorExit) as error:
        raise RuntimeError(f"the loader raised {type(error).__name__}") from error


async def _called_aside(call: Call) -> Any:
    """Call a plain function in a thread. The coroutine that it returns to nobody, after a cancellation, is closed.

    Else Python would warn that it was never awaited: `lambda: fetch(7)` is a usual loader.
    """
    returned: list[Any] = []
    is_awaited = True

    def called() -> Any:
        result = _called(call)
        returned.append(result)
        if not is_awaited:
            _close(returned)
        return result

    try:
        return await asyncio.to_thread(called)
    except BaseException:
        is_awaited = False
        _close(returned)
        raise


def _close(returned: list[Any]) -> None:
    """Close the coroutine among these. Each of two threads may do this: it is taken once."""
    with contextlib.suppress(IndexError):
        if inspect.iscoroutine(result := returned.pop()):
            result.close()
