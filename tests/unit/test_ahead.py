"""An operation whose first batch was asked ahead of it goes on as if it had asked."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom.errors import RedisUnavailable
from stillroom.operation import Operation, answered

AWAY = RedisUnavailable("closed")


def asking() -> Operation[list[Any]]:
    """Ask twice. Return what was answered, with the error in the place of an answer."""
    heard: list[Any] = []
    for batch in ([(b"A",)], [(b"B",)]):
        try:
            heard.append((yield batch))
        except RedisUnavailable as error:
            heard.append(error)
    return heard


def run(operation: Operation[Any], *answers: Any) -> tuple[list[Any], Any]:
    """Return what the operation asks, and its result."""
    asked = [operation.send(None)]
    for answer in answers:
        try:
            told = operation.throw if isinstance(answer, Exception) else operation.send
            asked.append(told(answer))
        except StopIteration as stop:
            return asked, stop.value
    raise AssertionError("it asks for more")


@pytest.mark.parametrize("away", [None, AWAY])
def test_what_was_asked_ahead_is_not_asked_again(away: RedisUnavailable | None) -> None:
    """It is told the replies, or why there are none, and asks for the rest; errors reach it there, too."""
    replies = None if away else [1]
    for second in ([2], AWAY):
        asked, heard = run(answered(asking(), [(b"A",)], replies, away), second)
        assert (asked, heard) == ([[(b"B",)]], [away or [1], second])


def test_what_begins_otherwise_after_all_asks_for_everything() -> None:
    """Where something has to be asked first by now, the replies are of no use, and are not taken for others."""
    asked, heard = run(answered(asking(), [(b"C",)], [3], None), [1], [2])
    assert (asked, heard) == ([[(b"A",)], [(b"B",)]], [[1], [2]])


def test_an_operation_that_has_nothing_more_to_ask_is_over() -> None:
    """A result, and an error of the operation itself, reach whoever runs it."""

    def one() -> Operation[int]:
        (number,) = yield [(b"A",)]
        return int(number)

    with pytest.raises(StopIteration) as stopped:
        answered(one(), [(b"A",)], [7], None).send(None)
    assert stopped.value.value == 7
    with pytest.raises(ValueError, match="invalid literal"):
        answered(one(), [(b"A",)], [b"x"], None).send(None)
