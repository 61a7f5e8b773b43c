"""The two faces of an operation: a method that blocks, and a coroutine function. Both are made from the operation.

So a name, a signature and a docstring are written once. What the app gets wrong is told in terms of the method it
called, with what was probably meant, and a traceback shows the app's frames instead of ours.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from stillroom.errors import StillroomError
from stillroom.misuse import METHODS_ELSEWHERE, misuse
from stillroom.operation import Operation

T = TypeVar("T")
P = ParamSpec("P")
C = TypeVar("C", bound=Callable[..., Any])

OURS = str(Path(__file__).parent / "x").removesuffix("x")
# Between two frames of ours: how a driver gets from one thread or event loop to another.
PASSAGES = ("asyncio", "concurrent", "contextlib", "threading")
CHAIN_LIMIT = 20  # causes of causes


class Face:
    """A service as the app sees it: `_body` has the operations, `_driver` runs them."""

    _moved: Mapping[str, str] = {}  # methods that are the upkeep's now: name → name there
    _upkeep: Any = None

    def __init_subclass__(cls) -> None:
        for name, method in vars(cls).items():
            if inspect.isfunction(method):  # help() and tracebacks name the face, not the body
                method.__qualname__ = f"{cls.__qualname__}.{name}"
                method.__module__ = cls.__module__

    if not TYPE_CHECKING:  # a type checker is to know the others only

        def __getattr__(self, name: str) -> Any:
            """Return a worker's call, which stands in `room.upkeep` and can still be called here."""
            if name in self._moved:
                return getattr(self._upkeep, self._moved[name])
            kind = type(self)
            meant = [one for one in METHODS_ELSEWHERE.get(name, ()) if hasattr(kind, one)]
            hint = f"; did you mean {meant[0]}?" if meant else ""
            said = f"{kind.__name__!r} object has no attribute {name!r}{hint}"
            raise AttributeError(said, name=name, obj=self)


class Service(Face):
    """A face that is a body and its driver, and nothing else."""

    def __init__(self, body: Any, driver: Any) -> None:
        self._body = body
        self._driver = driver


def blocking(
    operation: Callable[Concatenate[Any, P], Operation[T]],
) -> Callable[Concatenate[Any, P], T]:
    """Make a method of a sync face: it runs the operation of this name of its body."""
    return _blocking(operation, "")


def awaiting(
    operation: Callable[Concatenate[Any, P], Operation[T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Make a method of an async face, a coroutine function. See blocking."""
    return _awaiting(operation, "")


class Part(NamedTuple):
    """A face that is kept in an attribute of another one, which has some of its operations as methods."""

    of: str

    def blocking(
        self, operation: Callable[Concatenate[Any, P], Operation[T]]
    ) -> Callable[Concatenate[Any, P], T]:
        """Make a method that runs the operation of the part. See blocking."""
        return _blocking(operation, self.of)

    def awaiting(
        self, operation: Callable[Concatenate[Any, P], Operation[T]]
    ) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
        """Make a coroutine function that runs the operation of the part. See awaiting."""
        return _awaiting(operation, self.of)


def _blocking(
    operation: Callable[Concatenate[Any, P], Operation[T]], of: str
) -> Callable[Concatenate[Any, P], T]:
    name = operation.__name__

    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        face = getattr(self, of) if of else self
        try:
            return face._driver.run(getattr(face._body, name)(*args, **kwargs))  # type: ignore[no-any-return]
        except Exception as error:
            wrong = misuse(error, method, (self, *args), kwargs)
            if wrong is None:
                drop_our_frames(error)
                raise
        raise wrong

    return _named(method, operation)


def _awaiting(
    operation: Callable[Concatenate[Any, P], Operation[T]], of: str
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    name = operation.__name__

    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        face = getattr(self, of) if of else self
        try:
            return await face._driver.run(getattr(face._body, name)(*args, **kwargs))  # type: ignore[no-any-return]
        except Exception as error:
            wrong = misuse(error, method, (self, *args), kwargs)
            if wrong is None:
                drop_our_frames(error)
                raise
        raise wrong

    return _named(method, operation)


def drop_our_frames(error: Exception) -> None:
    """Leave only the app's frames in the error's traceback, and in those shown above it.

    A frame of ours at the end of an error that is none of ours is a bug of ours: then all frames stay.
    """
    for one in _chain(error):
        frames = list(_walk(one.__traceback__))
        if frames and (isinstance(one, StillroomError) or not _is_ours(frames[-1].tb_frame)):
            # Not by assignment, which an error that is a frozen dataclass refuses.
            BaseException.with_traceback(one, _linked(_of_the_app(frames)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Return the error, and those that a traceback shows above it."""
    shown: BaseException | None = error
    for _ in range(CHAIN_LIMIT):
        if shown is None:
            return
        yield shown
        if shown.__cause__ is not None:
            shown = shown.__cause__
        else:
            shown = None if shown.__suppress_context__ else shown.__context__


def _walk(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _of_the_app(frames: Sequence[TracebackType]) -> list[TracebackType]:
    """Return the frames that are neither ours nor a passage between two of ours."""
    kept: list[TracebackType] = []
    passed: list[TracebackType] = []  # since a frame of ours; kept if the next is none of ours
    is_inside = False
    for one in frames:
        if _is_ours(one.tb_frame):
            passed, is_inside = [], True
        elif is_inside and _is_passage(one.tb_frame):
            passed.append(one)
        else:
            kept += [*passed, one]
            passed, is_inside = [], False
    return kept + passed


def _linked(frames: Sequence[TracebackType]) -> TracebackType | None:
    trace: TracebackType | None = None
    for one in reversed(frames):
        # None where a signal came between.
        line = one.tb_lineno or one.tb_frame.f_code.co_firstlineno
        trace = TracebackType(trace, one.tb_frame, one.tb_lasti, line)
    return trace


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OURS)


def _is_passage(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in PASSAGES


def _named(method: C, operation: Callable[..., Any]) -> C:
    """Give the method the operation's name, docstring and signature, with its final result as return type."""
    functools.update_wrapper(method, operation)
    signature = inspect.signature(operation)
    result = _result_of(signature.return_annotation)
    method.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
    method.__annotations__ = {**operation.__annotations__, "return": result}
    return method


def _result_of(annotation: Any) -> Any:
    text = str(annotation)
    if not text.startswith("Operation[") or not text.endswith("]"):
        raise TypeError(f"an operation returns Operation[…], not {text}")
    return text.removeprefix("Operation[").removesuffix("]")
