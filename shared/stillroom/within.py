"""Notes on functions: which decorator of ours is around one, for an app that knows the function without it.

Such an app limits, caches or asks nothing there. So each decorator notes what is told of that.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

_MARK = "__stillroom_within__"  # on a function: what is told, and the function's id


def note_within(function: Any, around: Any, why: str) -> None:
    """Note which decorator is around a function. `why`: what is told of an app that knows it without."""
    around.__dict__.pop(_MARK, None)  # functools.wraps has copied the note of an earlier one
    with suppress(AttributeError, TypeError):  # of a bound method, or a builtin
        setattr(function, _MARK, (why, id(function)))


def noted_within(view: Any) -> str:
    """Return what is told of an app that knows this view, or an empty text.

    functools.wraps copies the note to a decorator that calls what is around the view.
    """
    noted = getattr(view, "__dict__", {}).get(_MARK)
    return noted[0] if noted and noted[1] == id(view) else ""
