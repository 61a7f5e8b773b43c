"""Each error goes with its message and its data wherever Python takes it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from stillroom import InvalidKey, LoadShed, RedisUnavailable, StillroomError, public

assert public  # it knows all the modules that have errors of their own


def errors_under(kind: type[StillroomError]) -> Iterator[type[StillroomError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from errors_under(below)


@pytest.mark.parametrize(
    "kind", sorted(set(errors_under(StillroomError)), key=lambda k: k.__name__)
)
def test_an_error_is_pickled_and_copied(kind: type[StillroomError]) -> None:
    """Every error comes out of a pickle and a copy with its class, message and data."""
    error = kind.__new__(kind)
    error.args = ("a sentence",)
    vars(error).update(reason="timeout", retry_after=1.5)
    error.add_note("a note")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize(
    "error",
    [
        InvalidKey("k", "why"),
        LoadShed("l", 3, 1.0),
        RedisUnavailable("timeout", "d", may_be_done=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_another_process_arrives(error: StillroomError) -> None:
    """An error that is raised in a process pool reaches its caller, and the pool goes on."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                pool.submit(fail, error).result()
            assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))


def fail(error: StillroomError) -> None:
    raise error
