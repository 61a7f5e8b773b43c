"""What an app wants around each load: an application context, a database session. See Loaders.around."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeAlias

Around: TypeAlias = Callable[[], AbstractContextManager[Any]]


def within(
    around: Sequence[Around], function: Callable[..., Any], *, is_async: bool
) -> Callable[..., Any]:
    """Return the function with these contexts entered around each of its calls, in their order."""
    if is_async:

        @functools.wraps(function)
        async def load_async(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for make in around:
                    stack.enter_context(make())
                return await function(*args, **kwargs)

        return load_async

    @functools.wraps(function)
    def load(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for make in around:
                stack.enter_context(make())
            return function(*args, **kwargs)

    return load
