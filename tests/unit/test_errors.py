"""Each error goes with its message and its data wherever Python takes it."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import stillroom
from stillroom import InvalidKey, LoadShed, RedisRefused, RedisUnavailable, StillroomError, public
from stillroom.wire import NodeAway, refusal

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


def test_an_error_with_the_replies_of_a_cluster_is_pickled_and_copied() -> None:
    """An error of a batch that a node of a cluster did not answer comes out with its class, reason and replies."""
    away = RedisUnavailable("timeout", "it is frozen", may_be_done=True)
    error = refusal([b"OK", NodeAway(away)])
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (type(again), str(again)) == (RedisRefused, str(error))
        assert (again.reason, again.may_be_done) == ("timeout", True)
        ok, node = again.replies
        assert (ok, str(node), str(node.failure)) == (b"OK", str(NodeAway(away)), str(away))


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


BARE = {"RuntimeError", "Exception"}
A_LOADERS = "_called"  # it says so of a loader that raised what generators use


def raised_bare(tree: ast.AST) -> Iterator[str]:
    """Yield each function that raises an error which is no StillroomError, and the error's name."""
    for function in ast.walk(tree):
        if (
            isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            and function.name != A_LOADERS
        ):
            raised = [one.exc for one in ast.walk(function) if isinstance(one, ast.Raise)]
            for call in raised:
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") in BARE:
                    yield f"{function.name}: {ast.unparse(call.func)}"


def test_a_long_text_is_told_with_its_own_length() -> None:
    """An error that shows the beginning of a text tells how many characters the text itself has."""
    assert "… (300 characters): no" in str(InvalidKey("ü" * 300, "no"))
    assert str(InvalidKey([1] * 300, "no")).endswith("…: no")


def test_what_is_raised_on_purpose_is_of_one_family() -> None:
    """No module raises a RuntimeError of Python's own, which `except StillroomError` would miss."""
    files = sorted(Path(stillroom.__file__).parent.rglob("*.py"))
    found = {
        file.name: bare
        for file in files
        if (bare := list(raised_bare(ast.parse(file.read_text(encoding="utf-8")))))
    }
    assert found == {}
