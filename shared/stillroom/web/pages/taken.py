"""Find the headers and cookies that a view of FastAPI takes as parameters. It imports no framework."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

DEEP = 20  # dependencies of dependencies
FASTAPI = "fastapi.params"


def taken_by(view: Callable[..., Any], depth: int = DEEP) -> Iterator[tuple[str, str]]:
    """Yield (header or cookie, its name) for each that a view, or a dependency of it, takes as a parameter."""
    try:
        parameters = inspect.signature(view).parameters.values()
    except (TypeError, ValueError):  # a builtin does not say what it takes
        return
    hints = _hints(view)
    for one in parameters if depth else ():
        hint = hints.get(one.name, one.annotation)
        for said in (one.default, *getattr(hint, "__metadata__", ())):
            kind = type(said).__name__ if type(said).__module__ == FASTAPI else ""
            if kind in ("Header", "Cookie"):
                is_spelled = getattr(said, "convert_underscores", False)
                for name, alias in _named(one.name, said, hint):
                    written = name.replace("_", "-") if is_spelled else name
                    yield kind.lower(), alias or written
            elif kind in ("Depends", "Security"):
                inner = said.dependency or getattr(hint, "__origin__", hint)
                if callable(inner):
                    yield from taken_by(inner, depth - 1)


def _named(parameter: str, said: Any, hint: Any) -> Iterator[tuple[str, str | None]]:
    """Yield (name, alias) of what is taken: the parameter, or each field of a model that stands for several."""
    model = getattr(hint, "__origin__", hint)  # of Annotated
    fields: Mapping[str, Any] | None = getattr(model, "model_fields", None)
    if fields is None:
        yield parameter, said.alias
    for name, field in (fields or {}).items():
        yield name, field.alias


def _hints(view: Callable[..., Any]) -> dict[str, Any]:
    """Return what the annotations mean, where that is known; those of an object are of its call."""
    function = (
        view
        if inspect.isroutine(view)
        else getattr(view, "__init__" if isinstance(view, type) else "__call__")
    )
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:  # a name that only type checkers know
        return {}
