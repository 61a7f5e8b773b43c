"""What an operation is, and the two drivers that run one.

An operation is a generator. It yields steps and is sent their results:

* a list of commands: one batch to Redis, answered by the list of replies (see Once, Freeing and Timed);
* `Call`: a function of the app, a loader; answered by what it returns;
* `Pause`: some seconds of waiting;
* `On`: other operations, on the servers of the cache's shards.

A step that fails raises at its yield. What the generator returns is the operation's result. So each
protocol on Redis is written once, and knows nothing of threads or event loops.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar

from stillroom.errors import RedisRefused
from stillroom.scripts import BY_SHA, Script
from stillroom.wire import (
    AsyncShardWire,
    AsyncWire,
    Command,
    ShardWire,
    Wire,
    refusal,
    time_left,
    words_of,
)

T = TypeVar("T")
Operation: TypeAlias = Generator[Any, Any, T]


class Once(list[Command]):
    """A batch that must not be sent a second time: doing it twice is not doing it once."""


class Freeing(list[Command]):
    """A batch that others are waiting for: it is sent even when the time of its request is up."""


class Timed(list[Command]):
    """A batch of scripts that refuse to act once the caller has given up: NOT_AFTER among their arguments
    becomes the server time, in µs, at which the driver gives up on this batch."""


class TimedOnce(Timed, Once):
    """Both of them."""


NOT_AFTER = b"<not after>"


class Call:
    """Call a function of the app, or await a coroutine function."""

    __slots__ = ("args", "function", "kwargs")

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs


class Pause:
    """Wait this many seconds."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class On:
    """Run these operations, each on the server of its shard; answered by their results in order.

    All are run; then the first error among them is raised.
    """

    __slots__ = ("operations",)

    def __init__(self, operations: Sequence[tuple[int, Operation[Any]]]) -> None:
        self.operations = operations


class Driver:
    """Runs operations in the calling thread."""

    def __init__(self, wire: Wire | ShardWire[Any]) -> None:
        self.wire = wire
        self._call_timeout = wire.server.settings.call_timeout
        self._command_timeout = wire.server.settings.command_timeout

    def run(self, operation: Operation[T]) -> T:
        """The operation's result. All its batches in a row get `call_timeout` seconds together."""
        left = self._call_timeout
        send = operation.send
        try:
            step = send(None)
            while True:
                try:
                    kind = type(step)
                    if kind is list or kind is Once:
                        started = time.monotonic()
                        try:
                            answer = self._exchange(step, left, idempotent=kind is list)
                        finally:
                            left -= time.monotonic() - started
                    else:
                        answer = self._take(step, left)
                        if isinstance(step, Call | Pause):
                            left = self._call_timeout  # what follows is another call
                except BaseException as error:
                    step = operation.throw(error)
                else:
                    step = send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _exchange(
        self,
        batch: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        budgeted: bool = True,
    ) -> list[Any]:
        budget = time_left() if budgeted else None
        started = 0.0
        if budget is not None:
            left = min(left, budget.left)
            started = time.monotonic()
        try:
            return self.wire.execute(batch, left, idempotent=idempotent)
        except RedisRefused as refused:
            repair = Repair(batch, refused)
            second: Sequence[Any] = []
            while repair.goes_on(second):
                try:
                    second = self.wire.execute(repair.commands, left, idempotent=idempotent)
                except RedisRefused as again:
                    second = again.replies
            return repair.mended(second)
        finally:
            if budget is not None:
                budget.left -= time.monotonic() - started

    def _take(self, step: Any, left: float) -> Any:
        if isinstance(step, Call):
            result = _called(step)
            return _in_background_loop(result) if inspect.isawaitable(result) else result
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Freeing):
            return self._exchange(step, self._call_timeout, budgeted=False)
        if isinstance(step, Timed):
            limit = _limit(left, self._command_timeout)
            batch, again = _timed(step, self.wire.server.now_us(), limit), type(step) is Timed
            return self._exchange(batch, limit, idempotent=again)
        raise TypeError(f"{type(step).__name__} is no step of an operation")


class AsyncDriver:
    """Runs operations in the calling task."""

    def __init__(self, wire: AsyncWire | AsyncShardWire) -> None:
        self.wire = wire
        self._call_timeout = wire.server.settings.call_timeout
        self._command_timeout = wire.server.settings.command_timeout

    async def run(self, operation: Operation[T]) -> T:
        """See Driver.run."""
        left = self._call_timeout
        send = operation.send
        try:
            step = send(None)
            while True:
                try:
                    kind = type(step)
                    if kind is list or kind is Once:
                        started = time.monotonic()
                        try:
                            answer = await self._exchange(step, left, idempotent=kind is list)
                        finally:
                            left -= time.monotonic() - started
                    else:
                        answer = await self._take(step, left)
                        if isinstance(step, Call | Pause):
                            left = self._call_timeout
                except BaseException as error:
                    step = operation.throw(error)
                else:
                    step = send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _exchange(
        self,
        batch: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        budgeted: bool = True,
    ) -> list[Any]:
        budget = time_left() if budgeted else None
        started = 0.0
        if budget is not None:
            left = min(left, budget.left)
            started = time.monotonic()
        try:
            return await self.wire.execute(batch, left, idempotent=idempotent)
        except RedisRefused as refused:
            repair = Repair(batch, refused)
            second: Sequence[Any] = []
            while repair.goes_on(second):
                try:
                    second = await self.wire.execute(repair.commands, left, idempotent=idempotent)
                except RedisRefused as again:
                    second = again.replies
            return repair.mended(second)
        finally:
            if budget is not None:
                budget.left -= time.monotonic() - started

    async def _take(self, step: Any, left: float) -> Any:
        if isinstance(step, Call):
            if inspect.iscoroutinefunction(step.function):
                return await step.function(*step.args, **step.kwargs)
            # A plain function may block for as long as a database takes: not in the event loop.
            result = await asyncio.to_thread(_called, step)
            return await result if inspect.isawaitable(result) else result
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Freeing):
            return await self._exchange(step, self._call_timeout, budgeted=False)
        if isinstance(step, Timed):
            limit = _limit(left, self._command_timeout)
            batch, again = _timed(step, self.wire.server.now_us(), limit), type(step) is Timed
            return await self._exchange(batch, limit, idempotent=again)
        raise TypeError(f"{type(step).__name__} is no step of an operation")


class ShardDriver(Driver):
    """A Driver that knows those of all shards, and so can do a step On them. Each has its own `call_timeout`."""

    def __init__(self, wire: Wire | ShardWire[Any], drivers: Sequence[Driver]) -> None:
        super().__init__(wire)
        self._drivers = drivers

    def _take(self, step: Any, left: float) -> Any:
        if not isinstance(step, On):
            return super()._take(step, left)
        return _all_good([self._outcome(*one) for one in step.operations])

    def _outcome(self, shard: int, operation: Operation[Any]) -> Any:
        try:
            return self._drivers[shard].run(operation)
        except Exception as error:
            return Failed(error)


class AsyncShardDriver(AsyncDriver):
    """The same for asyncio: the shards at the same time."""

    def __init__(self, wire: AsyncWire | AsyncShardWire, drivers: Sequence[AsyncDriver]) -> None:
        super().__init__(wire)
        self._drivers = drivers

    async def _take(self, step: Any, left: float) -> Any:
        if not isinstance(step, On):
            return await super()._take(step, left)
        if len(step.operations) == 1:
            return _all_good([await self._outcome(*step.operations[0])])
        return _all_good(await asyncio.gather(*(self._outcome(*one) for one in step.operations)))

    async def _outcome(self, shard: int, operation: Operation[Any]) -> Any:
        try:
            return await self._drivers[shard].run(operation)
        except Exception as error:
            return Failed(error)


def together(*operations: Operation[Any]) -> Operation[list[Any]]:
    """Run operations side by side: what they say to Redis at the same time goes there in one batch, in their order.
    Each is begun when the one before it waits, or is done.

    Answered by their results, a Failed in place of each that had none: one does not fail for another's sake.
    A batch with a Once in it is sent once. What is no plain batch (a Call, a Pause, a Timed) is taken one at a
    time.
    """
    sides = [_Side(operation) for operation in operations]
    try:
        for side in sides:
            side.resume()
        while waiting := [side for side in sides if not side.is_done]:
            batches = [side for side in waiting if type(side.step) in (list, Once)]
            if batches == waiting:
                yield from _joined(batches)
            else:
                yield from next(side for side in waiting if side not in batches).alone()
        return [side.outcome for side in sides]
    finally:
        for side in sides:
            side.operation.close()


class _Side:
    """One of several operations that are run together, and the step it waits at."""

    def __init__(self, operation: Operation[Any]) -> None:
        self.operation = operation
        self.step: Any = None
        self.outcome: Any = None
        self.is_done = False

    def resume(self, answer: Any = None, error: BaseException | None = None) -> None:
        """Hand over what its step was answered with."""
        try:
            if error is None:
                self.step = self.operation.send(answer)
            else:
                self.step = self.operation.throw(error)
        except StopIteration as stop:
            self.is_done, self.outcome = True, stop.value
        except Exception as failure:
            self.is_done, self.outcome = True, Failed(failure)

    def alone(self) -> Operation[None]:
        try:
            answer = yield self.step
        except Exception as error:
            self.resume(error=error)
        else:
            self.resume(answer)

    def take(self, replies: list[Any]) -> None:
        """Its share of a batch that had an error in it, in somebody's part."""
        if any(isinstance(reply, Exception) for reply in replies):
            self.resume(error=refusal(replies))
        else:
            self.resume(replies)


def _joined(sides: Sequence[_Side]) -> Operation[None]:
    """Send the batches of these as one, and give each its share of what comes back."""
    kind = Once if any(isinstance(side.step, Once) for side in sides) else list
    lengths = [len(side.step) for side in sides]
    try:
        replies = yield kind([command for side in sides for command in side.step])
    except RedisRefused as refused:
        if len(refused.replies) != sum(
            lengths
        ):  # not the batch: what it needed could not be loaded
            for side in sides:
                side.resume(error=refused)
            return
        replies = refused.replies
    except Exception as error:
        for side in sides:
            side.resume(error=error)
        return
    rest = iter(replies)
    for side, length in zip(sides, lengths, strict=True):
        side.take(list(islice(rest, length)))


def drivers_of(wires: Sequence[Wire | ShardWire[Any]]) -> list[Driver]:
    """A driver for each shard's wire."""
    if len(wires) == 1:
        return [Driver(wires[0])]
    drivers: list[Driver] = []
    drivers += [ShardDriver(wire, drivers) for wire in wires]
    return drivers


def async_drivers_of(wires: Sequence[AsyncWire | AsyncShardWire]) -> list[AsyncDriver]:
    """The same for asyncio."""
    if len(wires) == 1:
        return [AsyncDriver(wires[0])]
    drivers: list[AsyncDriver] = []
    drivers += [AsyncShardDriver(wire, drivers) for wire in wires]
    return drivers


class Failed(NamedTuple):
    """How an operation ended that has no result."""

    error: Exception


def _all_good(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            raise outcome.error
    return outcomes


class Repair:
    """What to send again after a batch met scripts that the server has lost (a restart, SCRIPT FLUSH)."""

    def __init__(self, batch: Sequence[Command], refused: RedisRefused) -> None:
        self._replies = refused.replies
        self._places = [n for n, reply in enumerate(self._replies) if _is_noscript(reply)]
        if not self._places:
            raise refused
        self._batch = batch
        self._prepare()

    def _prepare(self) -> None:
        words = {place: words_of(self._batch[place]) for place in self._places}
        scripts = {place: BY_SHA[said[1]].script for place, said in words.items()}
        sources = {script.text.source for script in scripts.values()}
        self._loads: list[Command] = [(b"SCRIPT", b"LOAD", source) for source in sources]
        again = [(b"EVALSHA", s.text.sha, *words[place][2:]) for place, s in scripts.items()]
        self.commands = [*self._loads, *again]

    def goes_on(self, second: Sequence[Any]) -> bool:
        """Whether to send `commands`: at first, and again without flags if this server knows none."""
        if not second:
            return True
        loaded = second[: len(self._loads)]
        flags_refused = Script.flags_are_known and any(map(_is_compile_error, loaded))
        if flags_refused:
            Script.flags_are_known = False
            self._prepare()
        return flags_refused

    def mended(self, second: Sequence[Any]) -> list[Any]:
        """The first replies, with those of the second try in the places that had failed.

        Raises RedisRefused if one is still an error.
        """
        if any(isinstance(reply, Exception) for reply in second[: len(self._loads)]):
            raise refusal(
                second
            )  # this user may not load scripts: say that, not that one is missing
        for place, reply in zip(self._places, second[len(self._loads) :], strict=True):
            self._replies[place] = reply
        if any(isinstance(reply, Exception) for reply in self._replies):
            raise refusal(self._replies)
        return self._replies


def _is_compile_error(reply: Any) -> bool:
    """Redis 6.2: `Error compiling script`; newer ones, of a flag they do not know: `Unexpected flag`."""
    return isinstance(reply, Exception) and str(reply).startswith("ERR ")


def _is_noscript(reply: Any) -> bool:
    return isinstance(reply, Exception) and str(reply).startswith("NOSCRIPT")


_background: asyncio.AbstractEventLoop | None = None
_background_lock = threading.Lock()


def _in_background_loop(awaitable: Awaitable[Any]) -> Any:
    """Await from a thread: all of a process' in one loop, so that they may share a database pool."""
    global _background
    if _background is not None and asyncio._get_running_loop() is _background:
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise RuntimeError(
            "an async loader called a blocking room that has async loaders: use AsyncStillroom in it"
        )
    with _background_lock:
        if _background is None or _background.is_closed():
            _background = asyncio.new_event_loop()
            threading.Thread(
                target=_background.run_forever, name="stillroom async loaders", daemon=True
            ).start()
    return asyncio.run_coroutine_threadsafe(_finish(awaitable), _background).result()


async def _finish(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _called(call: Call) -> Any:
    """What the function returns. The two exceptions that mean something to generators do not get near one."""
    try:
        return call.function(*call.args, **call.kwargs)
    except (StopIteration, GeneratorExit) as error:
        raise RuntimeError(f"the loader raised {type(error).__name__}") from error


def _limit(left: float, command_timeout: float) -> float:
    """Seconds until a batch that is sent now is given up."""
    budget = time_left()
    return min(left, command_timeout, left if budget is None else budget.left)


def _timed(batch: Sequence[Command], now_us: int, limit: float) -> list[Command]:
    not_after = b"%d" % (now_us + int(limit * 1_000_000))
    return [
        tuple(not_after if word is NOT_AFTER else word for word in words_of(command))
        for command in batch
    ]


def _forget_background_loop() -> None:
    global _background, _background_lock
    _background, _background_lock = None, threading.Lock()  # its thread stayed in the parent


os.register_at_fork(after_in_child=_forget_background_loop)
