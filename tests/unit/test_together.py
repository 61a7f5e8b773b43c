"""Operations that run side by side share each batch, and none fails because of another."""

from __future__ import annotations

from typing import Any

import hiredis
import pytest

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.operation import (
    Call,
    Failed,
    Freeing,
    Once,
    Operation,
    Pause,
    Timed,
)
from stillroom.together import beside, together
from stillroom.wire import refusal


def asking(*batches: Any) -> Operation[list[Any]]:
    """Send these one after the other and return all replies."""
    replies: list[Any] = []
    for batch in batches:
        replies += [(yield batch)]
    return replies


def answered(operation: Operation[Any], *answers: Any) -> tuple[Any, list[Any]]:
    """Answer an operation with these replies, raising exceptions at their step; return result and steps."""
    steps = [operation.send(None)]
    try:
        for answer in answers:
            if isinstance(answer, BaseException):
                steps.append(operation.throw(answer))
            else:
                steps.append(operation.send(answer))
    except StopIteration as stop:
        return stop.value, steps
    raise AssertionError(f"it goes on: {steps[-1]}")


def test_batches_at_the_same_time_are_one() -> None:
    """Batches at the same time are sent as one in order, and each operation gets its replies."""
    result, steps = answered(
        together(asking([(b"A",), (b"B",)], [(b"C",)]), asking([(b"D",)], [(b"E",), (b"F",)])),
        [1, 2, 3],
        [4, 5, 6],
    )
    assert steps == [[(b"A",), (b"B",), (b"D",)], [(b"C",), (b"E",), (b"F",)]]
    assert result == [[[1, 2], [4]], [[3], [5, 6]]]


def test_the_longer_one_goes_on_alone() -> None:
    """The longer operation goes on alone; one without commands is done at once, and no operation is none."""
    result, steps = answered(
        together(asking([(b"A",)]), asking(), asking([(b"B",)], [(b"C",)])), [1, 2], [3]
    )
    assert steps == [[(b"A",), (b"B",)], [(b"C",)]]
    assert result == [[[1]], [], [[2], [3]]]
    with pytest.raises(StopIteration) as stopped:
        together().send(None)
    assert stopped.value.value == []


def test_once_is_contagious() -> None:
    """A batch with a part that must not be sent twice is not sent twice."""
    _, steps = answered(together(asking([(b"A",)]), asking(Once([(b"B",)]))), [1, 2])
    assert type(steps[0]) is Once
    _, steps = answered(together(asking([(b"A",)]), asking([(b"B",)])), [1, 2])
    assert type(steps[0]) is list


@pytest.mark.parametrize("step", [Call(len, ("x",)), Pause(1), Timed([(b"T",)])])
def test_what_is_no_plain_batch_is_taken_alone(step: Any) -> None:
    """A step that is no plain batch is answered alone and first, so that later steps can be joined."""
    result, steps = answered(
        together(asking([(b"A",)]), asking(step, [(b"B",)])), ["answer"], [1, 2]
    )
    assert steps == [step, [(b"A",), (b"B",)]]
    assert result == [[[1]], [["answer"], [2]]]


def test_an_error_reply_is_its_own_part_s() -> None:
    """An error reply fails its own operation, with the server's words and that part's replies."""
    replies = [1, hiredis.ReplyError("OOM command not allowed"), 3]
    result, _ = answered(together(asking([(b"A",)]), asking([(b"B",), (b"C",)])), refusal(replies))
    assert result[0] == [[1]]
    assert isinstance(result[1], Failed)
    error = result[1].error
    assert isinstance(error, RedisRefused)
    assert (error.reason, error.replies) == ("oom", replies[1:])


@pytest.mark.parametrize(
    "error",
    [
        RedisUnavailable("timeout"),
        RedisRefused("NOPERM", "no right to load scripts", [hiredis.ReplyError("NOPERM")]),
    ],
)
def test_an_error_of_the_whole_batch_reaches_each(error: RedisUnavailable) -> None:
    """An error of the whole batch reaches each operation, and each may handle it differently."""

    def patient() -> Operation[str]:
        try:
            yield [(b"B",)]
        except RedisUnavailable as caught:
            return f"without Redis: {caught.reason}"
        return "with"

    result, _ = answered(together(asking([(b"A",)], [(b"C",)]), patient()), error)
    assert result == [Failed(error), f"without Redis: {error.reason}"]


def test_an_operation_that_is_given_up_closes_its_parts() -> None:
    """An operation that is given up, as by a cancelled task, closes its parts."""
    closed: list[str] = []

    def part(name: str) -> Operation[None]:
        try:
            yield [(b"A",)]
        finally:
            closed.append(name)

    running = together(part("one"), part("other"))
    running.send(None)
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt())
    assert closed == ["one", "other"]


def test_an_interruption_in_the_middle_of_an_undoing_leaves_the_others_undoing() -> None:
    """Each of two operations that are interrupted undoes what it began, also where another interruption follows."""

    def part(name: bytes) -> Operation[None]:
        try:
            yield [(b"TAKE", name)]
        except KeyboardInterrupt:
            yield Freeing([(b"FREE", name)])
            raise

    running = together(part(b"one"), part(b"other"))
    running.send(None)
    assert running.throw(KeyboardInterrupt()) == [(b"FREE", b"one")]
    assert running.throw(KeyboardInterrupt()) == [(b"FREE", b"other")]
    with pytest.raises(KeyboardInterrupt):
        running.send([1])


def test_a_rider_goes_along_in_each_batch() -> None:
    """A rider is sent with each batch: the first operation's result is returned and both get their replies."""
    rider = asking([(b"C",), (b"D",)], [(b"F",)])
    result, steps = answered(beside(asking([(b"A",)], [(b"E",)]), rider), [1, 2, 3], [4, 5])
    assert steps == [[(b"A",), (b"C",), (b"D",)], [(b"E",), (b"F",)]]
    assert result == [[1], [4]]


def test_a_rider_is_not_begun_where_there_is_nothing_to_ride_on() -> None:
    """A rider is not begun, and closed, where the first operation sends nothing."""
    rider = asking([(b"A",)])
    with pytest.raises(StopIteration) as stopped:
        beside(asking(), rider).send(None)
    assert stopped.value.value == []
    assert list(rider) == []


def test_a_rider_that_fails_fails_alone() -> None:
    """A failing rider leaves the first operation its replies, and the first one's error is raised in any case."""
    refused = refusal([1, hiredis.ReplyError("NOPERM no")])
    result, _ = answered(beside(asking([(b"A",)]), asking([(b"B",)])), refused)
    assert result == [[1]]
    refused = refusal([hiredis.ReplyError("NOPERM no"), 1])
    with pytest.raises(RedisRefused, match="noperm"):
        answered(beside(asking([(b"A",)]), asking([(b"B",)])), refused)
