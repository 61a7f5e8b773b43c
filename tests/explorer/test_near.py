"""No accident lets a process show a copy that was changed, and the explorer finds broken variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from stillroom.cache.judge import Judge
from stillroom.cache.marks import Marks, read_clock
from stillroom.cache.memo import Memo
from stillroom.cache.near import Near
from stillroom.wire import time_left
from tests.explorer.explorer import Broken, explore, maker, search
from tests.explorer.mutants import replaced
from tests.explorer.near import NearModel, interrupted
from tests.explorer.world import World

RUNS = {True: 750, False: 100}
FINDS_WITHIN = 2_500


def _sweeps_alone(self: Memo, names: Any = None) -> None:
    if names is None:
        _changed(self)


def _names_whatever_came_before(self: Near, _: bytes, after: bytes) -> None:
    if after:
        self._synced = read_clock(after)[1]


def _marks_whatever_came_before(self: Judge, _: bytes, after: bytes, members: Any) -> None:
    if after:
        _learn_own(self, self.marks.clock, after, members)


def _the_last_stands(self: Memo, name: bytes, known: Any) -> None:
    if (request := time_left()) is not None:
        request.memo[self, name] = known


@contextmanager
def _loads_are_as_others() -> Iterator[None]:
    with (
        patch("stillroom.cache.near.loading_since", lambda: 0.0),
        patch("stillroom.cache.memo.loading_since", lambda: 0.0),
    ):
        yield


_changed, _learn_own = Memo.changed, Judge.learn_own
STANDS_STILL = property(lambda _: b"", lambda _, __: None)

MUTANTS: dict[str, Callable[[], Any]] = {
    "own keys are forgotten": lambda: replaced(Memo, "changed", _sweeps_alone),
    "names are known up to an own change": lambda: replaced(
        Near, "learn_own", _names_whatever_came_before
    ),
    "marks are known up to an own one": lambda: replaced(
        Judge, "learn_own", _marks_whatever_came_before
    ),
    "a copy that was alive is alive": lambda: replaced(Marks, "turn", STANDS_STILL),
    "a load is made of what is older": _loads_are_as_others,
    "of two looks the last stands": lambda: replaced(Memo, "remember", _the_last_stands),
}


@pytest.mark.long
def test_no_accident_shows_a_copy_that_was_changed(world: World, is_full: bool) -> None:
    """No read near is older than it may be, and no request is torn, wherever threads are interrupted."""
    runs = RUNS[is_full]
    with interrupted(world):
        assert explore(world, range(runs), maker(NearModel)) == runs


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_process_that_shows_one_is_found(world: World, mutant: str) -> None:
    """Each broken variant shows a copy too long, or two values in one request."""
    with (
        MUTANTS[mutant](),
        interrupted(world),
        pytest.raises(Broken, match=r"in spite of|one request saw"),
    ):
        search(world, mutant, FINDS_WITHIN, maker(NearModel))
