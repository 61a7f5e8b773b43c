"""Reads what a loader's function declares: its parameters and their types, what it returns, where it is written."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import (
    Annotated,
    Any,
    ForwardRef,
    Literal,
    NewType,
    NotRequired,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import pydantic_core
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, with_config
from typing_extensions import TypedDict, is_typeddict

from stillroom.errors import InvalidArgument, in_code
from stillroom.misuse import name_of

RESULTS_LIMIT = 10_000  # annotations that are remembered
# (id of a function's code, annotation) → that code, the type
_results: dict[tuple[int, Any], tuple[Any, Any]] = {}
NO_SCHEMA = (PydanticUserError, pydantic_core.SchemaError)
# What to write in the place of a parameter that has no name in a call, or is several.
_INSTEAD: Mapping[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "take one list or tuple",
    inspect.Parameter.VAR_KEYWORD: "name each of them",
    inspect.Parameter.POSITIONAL_ONLY: "leave out the / behind it",
}
_ITERATED = (
    "Iterator",
    "Iterable",
    "Generator",
    "AsyncIterator",
    "AsyncIterable",
    "AsyncGenerator",
)


def result_of(function: Any) -> Any:
    """Return the type of what a loader returns, by its annotation; Any if it has none. Raises InvalidArgument.

    Asked for on each get_or_set: what has been found once is remembered by the function's code.
    """
    declared = declaring(function)
    if isinstance(declared, type):
        return declared  # a class makes objects of itself
    annotation = getattr(declared, "__annotations__", {}).get("return", Any)
    if annotation is Any:
        return Any
    if isinstance(annotation, str) or _names_a_class(annotation):
        annotation = _result_named(annotation, declared)
    if (owner := getattr(declared, "__self__", None)) is not None:
        annotation = _of_owner(annotation, owner if isinstance(owner, type) else type(owner))
    return _checked_result(annotation, name_of(function))


def value_type_of(load_many: Any) -> Any:
    """Return the type of the values in the mapping that a loader of many returns; Any if it does not say."""
    found = _values_in(result_of(load_many))
    return Any if isinstance(found, TypeVar) else found


def _values_in(mapping: Any) -> Any:
    """Return the type of the values of a mapping's type, such as dict[str, Product] or a class that extends it."""
    mapping = meant(mapping)
    kind, args = get_origin(mapping) or mapping, get_args(mapping)
    if not (isinstance(kind, type) and issubclass(kind, Mapping)):
        return Any
    if len(args) == 2:
        return args[1]
    bases = map(_values_in, getattr(kind, "__orig_bases__", ()))
    found = next((one for one in bases if one is not Any), Any)
    return dict(zip(getattr(kind, "__parameters__", ()), args, strict=False)).get(found, found)


def meant(annotation: Any) -> Any:
    """Return the type behind an alias, without annotations."""
    if annotation is None:
        return types.NoneType
    if isinstance(annotation, NewType):
        return meant(annotation.__supertype__)
    if hasattr(annotation, "__value__"):  # type Id = int
        return meant(annotation.__value__)
    if get_origin(annotation) is Annotated:
        return meant(get_args(annotation)[0])
    if isinstance(annotation, TypeVar):
        return meant(Any if annotation.__bound__ is None else annotation.__bound__)
    return dict if is_typeddict(annotation) else annotation


def place_of(function: Any) -> str:
    """Return where a function is written: `shop.views.page.<locals>.load`."""
    function = declaring(function)
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', name_of(function))}"


def is_coroutine_function(function: Any) -> bool:
    """Return whether calling a function gives a coroutine. A partial and an object with a `__call__` count, too."""
    return inspect.iscoroutinefunction(behind(function))


def signature_of(function: Any) -> inspect.Signature:
    """Return the parameters of what is called: a decorator may give the function behind it one by itself.

    One that takes any arguments passes them on, so there the parameters of that function count.
    """
    own = _own_signature(function)
    if own is not None and not _kinds_in(own) & _ANY:
        return own
    try:
        return inspect.signature(function)
    except ValueError:
        # Nothing says what is behind it: what asgiref's async_to_sync makes, a builtin.
        if own is None:
            what = "Python does not know its parameters; make it a function of your own"
            raise InvalidArgument(f"{in_code(function):.100}: {what}") from None
        return own


def takes_places(function: Any) -> bool:
    """Return whether a function takes any number of positional arguments, and perhaps no others: `call(*args)`."""
    own = _own_signature(function)
    return own is not None and inspect.Parameter.VAR_POSITIONAL in _kinds_in(own)


_ANY = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _own_signature(function: Any) -> inspect.Signature | None:
    called = behind(function) if _is_bound_object(function) else function
    try:
        return inspect.signature(called, follow_wrapped=False)
    except ValueError:  # what functools.lru_cache makes has none of its own
        return None


def _kinds_in(signature: inspect.Signature) -> set[Any]:
    return {one.kind for one in signature.parameters.values()}


def plain_parameters(signature: inspect.Signature, name: str) -> list[str]:
    """Return the names of a loader's parameters. Raises InvalidArgument for one that has no name in a call."""
    for parameter in signature.parameters.values():
        if (instead := _INSTEAD.get(parameter.kind)) is not None:
            raise InvalidArgument(
                f"{name}: a loader has plain named parameters only, not {parameter}; {instead}"
            )
    return list(signature.parameters)


def hints_of(function: Any, name: str) -> dict[str, Any]:
    """Return the types of a loader's parameters by name. Raises InvalidArgument for one that is not found."""
    try:
        declared = declaring(function)
        if isinstance(declared, type):
            return {}  # a partial of a class: those of the class are no parameters
        hints = get_type_hints(declared, include_extras=True)
        for hint in hints.values():
            meant(hint)  # `type Id = …` is looked up as late as here
    except NameError as error:
        raise InvalidArgument(
            f"{name}: {error}; types in a loader's signature are found in its module"
        ) from None
    except (AttributeError, SyntaxError, TypeError) as error:
        raise InvalidArgument(
            f"{name}: a type in its signature can't be read: {error.__class__.__name__}: {error}"
        ) from None
    return hints


def check_function(function: Any, name: str) -> None:
    """Refuse what is no function, or gives what can be read once only."""
    if isinstance(function, classmethod):
        raise InvalidArgument(f"{name}: write @classmethod above @….cached(…), not below it")
    if isinstance(function, type) or not callable(function):
        raise InvalidArgument(f"{name}: a loader is a function, not {in_code(function):.100}")
    called = behind(function)
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise InvalidArgument(f"{name}: what it yields could be read once only; return a list")


def checked_as(
    hints: Mapping[str, Any], not_required: frozenset[str] = frozenset()
) -> TypeAdapter[dict[str, Any]]:
    """Return what checks arguments of these types by name. Raises one of NO_SCHEMA."""
    fields = {n: NotRequired[hint] if n in not_required else hint for n, hint in hints.items()}
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    # A type checker wants literals; a signature is known when the app runs.
    make: Any = TypedDict
    return TypeAdapter(with_config(config)(make("arguments", fields)))


def has_schema(hint: Any) -> bool:
    try:
        checked_as({"argument": hint})
    except NO_SCHEMA:
        return False
    return True


def declaring(function: Any) -> Any:
    """Return what has the annotations of a call: a function, a class, or an object made by functools.wraps."""
    function = _bare(function)
    says_so = isinstance(function, type) or hasattr(function, "__wrapped__")
    return function if says_so else behind(function)


def behind(function: Any) -> Any:
    """Return the function behind a partial, a static method or a callable object."""
    function = _bare(function)
    is_function = inspect.isroutine(function) and not _is_bound_object(function)
    return function if is_function else getattr(function, "__call__", function)  # noqa: B004


def _is_bound_object(function: Any) -> bool:
    """Return whether this is a callable object that binds as a method does. Python takes it for a builtin."""
    is_python = inspect.isfunction(getattr(type(function), "__call__", None))  # noqa: B004
    return is_python and inspect.ismethoddescriptor(function)


def captured_by(function: Any) -> dict[str, Any]:
    """Return by name the values a function has captured: variables around it, arguments of a partial."""
    found: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        found.update(zip(signature_of(function.func).parameters, function.args, strict=False))
        function = function.func
    inner = innermost(function)
    names, cells = inner.__code__.co_freevars, inner.__closure__ or ()
    for name, cell in zip(names, cells, strict=False):
        with suppress(ValueError):  # it is empty
            found[name] = cell.cell_contents
    return found


def innermost(function: Any) -> Any:
    """Return the function as it was written, below all its decorators."""
    while hasattr(function := declaring(function), "__wrapped__"):
        function = function.__wrapped__
    return function


def _of_owner(annotation: Any, owner: type) -> Any:
    """Return an annotation of a bound method with its class in the place of Self."""
    if annotation is Self:
        return owner
    args, origin = get_args(annotation), get_origin(annotation)
    if not args or origin is Literal:
        return annotation
    found = tuple(_of_owner(one, owner) for one in args)
    if found == args:
        return annotation
    if isinstance(annotation, types.UnionType):
        return functools.reduce(operator.or_, found)
    is_builtin = isinstance(annotation, types.GenericAlias)
    return origin[found] if is_builtin or origin is Annotated else annotation.copy_with(found)


def _names_a_class(annotation: Any) -> bool:
    """Return whether an annotation names a class by a text inside of it, as list["Product"] does."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is None or origin is Literal:
        return False
    parts = args[:1] if origin is Annotated else args
    return any(isinstance(one, str | ForwardRef) or _names_a_class(one) for one in parts)


def _result_named(annotation: Any, declared: Any) -> Any:
    """Return the type that an annotation names, which is looked up once for each function.

    The codes of two modules' functions may be equal, and so are those of a module before and after it is reloaded.
    """
    code = getattr(inspect.unwrap(declared), "__code__", declared)
    place = id(code), annotation if isinstance(annotation, str) else repr(annotation)
    if place not in _results:
        if len(_results) > RESULTS_LIMIT:
            _results.clear()
        _results[place] = code, hints_of(declared, name_of(declared)).get("return", Any)
    return _results[place][1]


def _bare(function: Any) -> Any:
    while isinstance(function, functools.partial | staticmethod):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return function


def _checked_result(result: Any, name: str) -> Any:
    """Return the type of a result, or of an awaitable's result."""
    kind = get_origin(result) or result
    if getattr(kind, "__module__", "") != "collections.abc":
        return type(None) if result is None else result
    if kind.__name__ in ("Awaitable", "Coroutine"):
        return (get_args(result) or (Any,))[-1]
    if kind.__name__ in _ITERATED:
        raise InvalidArgument(
            f"{name}: {kind.__name__} could be read once only; declare and return a list"
        )
    return result
