"""Enter an app's contexts around each load, such as a database session. See `around_load` of a room."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from inspect import isasyncgenfunction, isgeneratorfunction
from typing import Any, TypeAlias

from stillroom.errors import InvalidArgument
from stillroom.misuse import name_of, refuse_awaited, refuse_unfit

Around: TypeAlias = Callable[[], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]


class OnlyAsync(InvalidArgument):
    """A blocking function was to be called inside a context that has to be awaited."""


def checked(make: Any) -> Around:
    """Return the function that makes a context manager, also from a generator function. Raises InvalidArgument."""
    if not callable(make):
        raise InvalidArgument(
            f"around_load takes a function that makes a context manager, such as app.app_context, not a "
            f"{type(make).__name__}"
        )
    refuse_awaited("around_load", make)
    refuse_unfit("around_load", make)
    if isgeneratorfunction(make):
        return contextmanager(make)
    return asynccontextmanager(make) if isasyncgenfunction(make) else make


def within(
    around: Sequence[Around], function: Callable[..., Any], *, is_async: bool
) -> Callable[..., Any]:
    """Return the function with these contexts entered around each of its calls, in their order.

    An async function may have async ones as well. A blocking function that has one raises OnlyAsync.
    """
    if is_async:

        @functools.wraps(function)
        async def load_async(*args: Any, **kwargs: Any) -> Any:
            async with AsyncExitStack() as stack:
                for make in around:
                    context = make()
                    if isinstance(context, AbstractAsyncContextManager):
                        await stack.enter_async_context(context)
                    else:
                        stack.enter_context(context)
                return await function(*args, **kwargs)

        return load_async

    @functools.wraps(function)
    def load(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for make in around:
                context = make()
                if not isinstance(context, AbstractContextManager):
                    raise OnlyAsync(
                        f"the loader {name_of(function)} is not async, and around_load gives it a "
                        f"{type(context).__name__}, which only an async one can enter"
                    )
                stack.enter_context(context)
            return function(*args, **kwargs)

    return load
