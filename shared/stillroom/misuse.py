"""Explain a call whose arguments do not fit: Python's sentence, and what was probably meant. Pure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from stillroom.errors import InvalidArgument, did_you_mean, in_code

C = TypeVar("C", bound=Callable[..., Any])

BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# inspect's words
TOO_MANY, MISSING = "too many positional arguments", "missing a required"
YES_OR_NO = "True or False"  # what is meant by a flag: the text "no" would be taken for yes
# What options are called in Django, cashews, fastapi-cache, redis-py, slowapi and Flask-Limiter → here.
ELSEWHERE = {
    "condition": "keep",
    "deduct_when": "count",
    "ex": "ttl",
    "expire": "ttl",
    "key_func": "by",
    "on_breach": "render",
    "stale_while_revalidate": "swr",
    "timeout": "ttl",
}
# What methods are called there → here, whichever of them a service has.
METHODS_ELSEWHERE = {
    "delete": ("invalidate", "destroy"),
    "delete_many": ("invalidate_many", "destroy_many"),
    "delete_match": ("invalidate_by_pattern",),
    "delete_pattern": ("invalidate_by_pattern",),
    "delete_tags": ("invalidate_by_tag",),
    "hit": ("check",),
}
SLIP = 0.65  # how like a name a slip of it is: `expire` is no slip of `ignore`, nor `wait` of `warm_with`


def explained(given: C) -> C:
    """Let a function, or a class when it is made, suggest the right name for a keyword it does not know."""
    if isinstance(given, type):
        given.__init__ = explained(given.__init__)  # type: ignore[misc]
        return given

    @functools.wraps(given)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return given(*args, **kwargs)
        except TypeError as error:
            wrong = misuse(error, given, args, kwargs)
            if wrong is None:
                raise
        raise wrong

    return called  # type: ignore[return-value]


def misuse(
    error: Exception, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> InvalidArgument | None:
    """Return what is wrong with a call that has failed; None if its arguments fit.

    A call that is right pays nothing for it.
    """
    if type(error) is not TypeError:
        return None
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as unfit:
        name, known = _name_of(function, args), signature.parameters.values()
        takes_any = any(p.kind is p.VAR_KEYWORD for p in known)
        by_name = [p.name for p in known if p.kind in BY_NAME and p.name != "self"]
        unknown = () if takes_any else [n for n in kwargs if n not in by_name]
        if unknown:
            return InvalidArgument(_unknown(name, unknown[0], by_name, known))
        only = [p.name for p in known if p.kind is p.KEYWORD_ONLY]
        hint = (
            f"; it takes {_taken(known) or 'none'}"
            if str(unfit).startswith((MISSING, TOO_MANY))
            else ""
        )
        if only and str(unfit) == TOO_MANY:
            hint = f"; by name only: {', '.join(only)}"
        return InvalidArgument(f"{name}(): {unfit}{hint}")
    return None


def refuse_other(what: str, given: object, kind: type | tuple[type, ...], meant: str) -> None:
    """Refuse an argument of another type, in words that say what is `meant`. Raises InvalidArgument."""
    if not isinstance(given, kind):
        raise InvalidArgument(f"{what}={in_code(given):.100}: {meant}")


def texts_of(what: str, given: object) -> Iterable[Any]:
    """Return the texts that were given, one or several. One text is not as many as it has letters.

    Raises InvalidArgument.
    """
    if isinstance(given, str):
        return (given,)
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise InvalidArgument(
            f"{what}={in_code(given):.100}: a text, or a list of them; leave it out for none"
        )
    return given


def refuse_awaited(what: str, *given: Any) -> None:
    """Refuse a coroutine function where a plain one is called: nobody would await it. Raises InvalidArgument."""
    for function in filter(callable, given):
        if is_awaited(function):
            raise InvalidArgument(
                f"{what}={name_of(function)}: a plain function; this one has to be awaited"
            )


def refuse_unfit(what: str, function: Any, *args: Any) -> None:
    """Refuse a function that can't be called with these: it would fail at each load. Raises InvalidArgument."""
    if unfit := _unfit(function, *args):
        given = "the value alone" if args else "nothing"
        raise InvalidArgument(
            f"{what}={name_of(function)}: a function that is given {given}; {unfit}"
        )


def is_awaited(function: Any) -> bool:
    """Return whether the result of a function has to be awaited. A partial, and an object with `__call__`, too."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is None and callable(function):
        code = getattr(type(function).__call__, "__code__", None)
    return code is not None and bool(code.co_flags & inspect.CO_COROUTINE)  # this runs on hits


def name_of(function: Any) -> str:
    """Return the name of a function, or of what is called like one."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def takes(function: object, number: int) -> bool:
    """Return whether this can be called with so many arguments. What is no function, or no Python, might be."""
    return not _unfit(function, *[None] * number)


def _unfit(function: object, *args: object) -> str:
    """Return why a function can't be called with these; empty if it can, or does not say what it takes.

    A builtin does not, nor what makes up its attributes. A decorator that gives an argument itself takes less than
    the function it stands for.
    """
    if not callable(function):
        return ""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except Exception:
        return ""
    try:
        signature.bind(*args)
    except TypeError as error:
        return str(error)
    return ""


def _name_of(function: Callable[..., Any], args: Sequence[Any]) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    return type(args[0]).__name__ if name.endswith("__init__") and args else name


def _unknown(
    function: str, given: str, by_name: Iterable[str], known: Iterable[inspect.Parameter]
) -> str:
    names = [*by_name]
    if (meant := ELSEWHERE.get(given)) in names:
        hint = f"; did you mean {meant}?"
    else:
        hint = did_you_mean(given, names, cutoff=SLIP) or f"; it takes {_taken(known)}"
    return f"{function}() got an unexpected keyword argument {given!r}{hint}"


def _taken(known: Iterable[inspect.Parameter]) -> str:
    return ", ".join(
        str(p.replace(annotation=p.empty, default=p.empty)) for p in known if p.name != "self"
    )
