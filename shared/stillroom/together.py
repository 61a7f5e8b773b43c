"""Run operations side by side, in the same batches: each is written as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, filterfalse, islice
from operator import attrgetter
from typing import Any, TypeVar

from stillroom.errors import RedisRefused
from stillroom.operation import BATCHES, STATE, Failed, Freeing, On, Once, Operation
from stillroom.wire import Command, refusal

T = TypeVar("T")


def together(*operations: Operation[Any]) -> Operation[list[Any]]:
    """Run operations side by side: what they say to Redis at the same time goes there in one batch, in their order.
    Each is begun when the one before it waits, or is done.

    Answered by their results, a Failed in place of each that had none: one does not fail for another's sake.
    A batch with a Once in it is sent once. What is no plain batch (a Call, a Pause, a Timed) is taken one at a
    time.
    """
    operations = tuple(map(iter, operations))  # so an Ahead is one of them
    try:
        sides = [Side(operation) for operation in operations]
        yield from _run_all(sides)
        return [side.outcome for side in sides]
    finally:
        for operation in operations:
            operation.close()


def beside(operation: Operation[T], *riders: Operation[Any]) -> Operation[T]:
    """Run an operation, and others in its batches, which are not begun where the first has nothing to say.

    Answered by the result of the first. Why another one fails is nobody's business here.
    """
    try:
        first = Side(operation)
        if not first.is_done:
            yield from _run_all([first, *map(Side, riders)])
        if type(first.outcome) is Failed:
            raise first.outcome.error
        return first.outcome  # type: ignore[no-any-return]
    finally:
        operation.close()
        for rider in riders:
            rider.close()


def beside_elsewhere(
    operation: Operation[T], elsewhere: Callable[[], Sequence[tuple[int, Operation[Any]]]]
) -> Operation[T]:
    """Run an operation of the state, and at the same time others, each at its place of a step On.

    They are not made where the first has nothing to say. Answered by the result of the first.
    """
    try:
        first = Side(operation)
        if not first.is_done:
            yield On([(STATE, rest(first)), *elsewhere()])
        if type(first.outcome) is Failed:
            raise first.outcome.error
        return first.outcome  # type: ignore[no-any-return]
    finally:
        operation.close()


def rest(side: Side) -> Operation[None]:
    """Run a side to its end. It alone is told of a cancellation."""
    while not side.is_done:
        try:
            yield from side.alone()
        except GeneratorExit:
            raise
        except BaseException as error:
            side.fail(error)


def _run_all(sides: Sequence[Side]) -> Operation[None]:
    """Run sides to their ends. A cancellation, or an interruption, is told to each: it undoes what it has begun."""
    try:
        while waiting := list(filterfalse(_is_done, sides)):
            steps = list(map(_step_of, waiting))
            if BATCHES.issuperset(map(type, steps)):
                yield from _joined(waiting, steps)
            else:
                yield from next(s for s in waiting if type(s.step) not in BATCHES).alone()
    except GeneratorExit:
        raise
    except BaseException as error:
        waiting = list(filterfalse(_is_done, sides))
        for side in waiting:
            side.fail(error)
        # One after the other: another interruption is told to one of them, and the others undo theirs all the same.
        for side in waiting:
            yield from rest(side)
        raise


class Side:
    """One of several operations that run together. It has begun: it has its first step, or is done."""

    step: Any = None
    outcome: Any = None
    is_done = False

    def __init__(self, operation: Operation[Any]) -> None:
        self.operation = operation
        self.resume(None)

    def resume(self, answer: Any) -> None:
        """Hand over what its step was answered with."""
        try:
            self.step = self.operation.send(answer)
        except StopIteration as stop:
            self.is_done, self.outcome = True, stop.value
        except Exception as failure:
            self.is_done, self.outcome = True, Failed(failure)

    def fail(self, error: BaseException) -> None:
        """Hand over the error that its step has ended in."""
        try:
            self.step = self.operation.throw(error)
        except StopIteration as stop:
            self.is_done, self.outcome = True, stop.value
        except BaseException as failure:
            self.is_done, self.outcome = True, Failed(failure)

    def alone(self) -> Operation[None]:
        try:
            answer = yield self.step
        except Exception as error:
            self.fail(error)
        else:
            self.resume(answer)

    def take(self, answer: list[Any] | Failed) -> None:
        """Go on with this side's part of what a joined batch was answered with."""
        if type(answer) is Failed:
            self.fail(answer.error)
        else:
            self.resume(answer)


_is_done, _step_of = attrgetter("is_done"), attrgetter("step")


def _joined(sides: Sequence[Side], steps: Sequence[list[Command]]) -> Operation[None]:
    """Send these batches of these sides as one, and give each side its replies."""
    try:
        replies = yield _batch(steps)
    except Exception as error:
        for side, answer in zip(sides, _parts_of(error, steps), strict=True):
            side.take(answer)
    else:
        parts = iter(replies)
        for side, step in zip(sides, steps, strict=True):
            side.resume(list(islice(parts, len(step))))


def answers(steps: Sequence[list[Command]]) -> Operation[list[list[Any] | Failed]]:
    """Send batches as one. Answered by the replies to each, or why it has none: see Side.take."""
    if not steps:
        return []
    try:
        parts = iter((yield _batch(steps)))
    except Exception as error:
        return _parts_of(error, steps)
    return [list(islice(parts, len(step))) for step in steps]


def _batch(steps: Sequence[list[Command]]) -> list[Command]:
    """Put batches together. Freeing ones make one of their kind; what has a Once in it is sent once."""
    kinds = set(map(type, steps))
    if kinds == {list}:
        return list(chain.from_iterable(steps))
    return Freeing(chain.from_iterable(steps)) if kinds == {Freeing} else Once.joined(steps)


def _parts_of(error: Exception, steps: Sequence[list[Command]]) -> list[list[Any] | Failed]:
    """Return each side's part of a batch that ended in an error. A side whose part has none of it goes on."""
    replies = error.replies if isinstance(error, RedisRefused) else ()
    if len(replies) != sum(map(len, steps)):
        # Nothing was done, or what the batch needed could not be loaded.
        return [Failed(error)] * len(steps)
    parts = iter(replies)
    return [_part(list(islice(parts, len(step)))) for step in steps]


def _part(replies: list[Any]) -> list[Any] | Failed:
    has_error = any(isinstance(reply, Exception) for reply in replies)
    return Failed(refusal(replies)) if has_error else replies
