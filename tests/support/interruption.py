"""An exception that a signal's handler raises in the middle of a call, at whichever line a test says."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any


class Interruption(BaseException):
    """Raised by a signal handler, or by gevent's timeouts, in the middle of a call."""


@contextmanager
def interrupted_at(step: int, lines: Mapping[CodeType, Container[int]]) -> Iterator[list[int]]:
    """Raise an Interruption the n-th time that a call comes to one of these lines. Yield those it came to."""
    reached: list[int] = []

    def line(frame: FrameType, event: str, _: object) -> Any:
        if event == "line" and frame.f_lineno in lines[frame.f_code]:
            reached.append(frame.f_lineno)
            if len(reached) == step:
                raise Interruption
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: line if frame.f_code in lines else None)
    try:
        yield reached
    finally:
        sys.settrace(before)


def lines_of(code: CodeType) -> set[int]:
    """Return all lines of a function."""
    return {line for *_, line in code.co_lines() if line is not None}
