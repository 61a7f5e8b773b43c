"""Loaders: how a value is made, under which key and tags, and for how long it is good."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple, Protocol, TypeAlias, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from stillroom.cache.around import Around, within
from stillroom.cache.warm import check, warm_of
from stillroom.durations import Duration
from stillroom.errors import InvalidKey, StillroomError, UnknownLoader
from stillroom.operation import Call

TagSpec: TypeAlias = "str | Callable[[Any], Iterable[str]]"


class TimeOptions(TypedDict, total=False):
    """For how long a value is good."""

    ttl: float  # seconds fresh; default: the setting
    swr: float  # seconds after that in which it is served stale while refreshed; default: the setting


class SetOptions(TimeOptions, total=False):
    """How a value is kept."""

    tags: Sequence[str]
    type: Any  # what it is encoded as; default: whatever it is


class KeepOptions(TimeOptions, total=False):
    """How a loaded value is kept."""

    tags: Sequence[TagSpec]  # texts, or functions of the value that give texts
    type: Any  # what a cached value is checked against; default: anything


class LoaderOptions(KeepOptions, total=False):
    """How a loader's values are kept: tags may be templates, as the key is; its type is what it returns."""

    name: str  # what messages to workers carry: keep it stable; default: the function's name
    lease: float  # seconds; a load that takes longer is not stored; default: the setting
    memo: bool  # within `room.request()` a key is asked for once: see cache/memo.py
    warm_every: Duration  # seconds: a worker loads its values this often, asked for or not; from 10
    warm_with: (
        Any  # for which arguments: dicts, tuples or single ones, or a function that returns them
    )


class Recipe(NamedTuple):
    """One value to be had: the call that makes it and how it is kept. Times in ms."""

    call: Call
    type: Any
    ttl: int
    swr: int
    lease: int
    tags: Callable[[Any], list[str]]
    loader: Loader | None = None  # a registered one can be run by a worker
    values: Mapping[str, Any] = {}


_NAME = re.compile(r"[\w.:-]{1,200}", re.ASCII)


class Template:
    """`product:{id}`: text with the names of parameters in braces.

    Arguments whose texts differ never make the same key: in each value but the last, the character that ends it
    in the template is written as %XX. (7 and "7" have the same text.)
    """

    def __init__(self, text: str, parameters: Sequence[str]) -> None:
        self.text = text
        self.names = [name for name in self._parse(text, parameters) if name]
        self._format = text.format_map
        self._escapes = {name: end for name, end in self._endings(text) if end}

    def _parse(self, text: str, parameters: Sequence[str]) -> Iterable[str | None]:
        try:
            pieces = list(Formatter().parse(text))
        except ValueError as error:
            raise InvalidKey(text, f"not a template: {error}") from None
        for index, (literal, name, spec, conversion) in enumerate(pieces):
            if name is not None:
                self._check(text, name, spec, conversion, parameters)
                if index and not literal and pieces[index - 1][1] is not None:
                    raise InvalidKey(
                        text, f"something must stand before {{{name}}} to keep values apart"
                    )
            yield name

    @staticmethod
    def _check(
        text: str, name: str, spec: str | None, conversion: str | None, parameters: Sequence[str]
    ) -> None:
        if spec or conversion or not name.isidentifier():
            raise InvalidKey(text, f"{{{name}}}: only the name of a parameter can stand in braces")
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = (
                f"did you mean {{{near[0]}}}?"
                if near
                else f"it has {', '.join(parameters) or 'none'}"
            )
            raise InvalidKey(text, f"{{{name}}} is not a parameter of the loader; {hint}")

    @staticmethod
    def _endings(text: str) -> Iterable[tuple[str, str]]:
        pieces = list(Formatter().parse(text))
        for (_, name, _, _), (following, *_) in zip(pieces, [*pieces[1:], ("",)], strict=True):
            if name is not None:
                yield name, (following or "")[:1]

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text for these arguments."""
        if not self._escapes:
            return self._format(values)
        return self._format({name: self._escaped(name, values[name]) for name in self.names})

    def _escaped(self, name: str, value: Any) -> str:
        text = str(value)
        end = self._escapes.get(name)
        if end is None or (end not in text and "%" not in text):
            return text
        return text.replace("%", "%25").replace(end, f"%{ord(end):02X}")


class Loader:
    """A function of the app, registered under a stable name so that a worker can run it too."""

    def __init__(
        self,
        function: Callable[..., Any],
        key: str,
        options: LoaderOptions,
        ttl_ms: int,
        swr_ms: int,
        lease_ms: int,
    ) -> None:
        self.function = function
        self.name = options.get("name") or function.__name__
        self._signature = inspect.signature(function)
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"{self.name!r}: a loader's name has 1 to 200 letters, digits or any of _ . : -"
            )
        self._names = _plain_parameters(self._signature, self.name)
        self._known = frozenset(self._names)
        hints = _hints(function, self.name)
        self.type = options.get("type", hints.get("return", Any))
        self._template = Template(key, self._names)
        self._tags = [
            t if callable(t) else Template(t, self._names) for t in several(options.get("tags", ()))
        ]
        self._defaults = {
            n: p.default for n, p in self._signature.parameters.items() if p.default is not p.empty
        }
        self._arguments = _arguments_type(self._signature, hints, self.name)
        self._times = ttl_ms, swr_ms, lease_ms
        self.is_remembered = bool(options.get("memo", False))
        self.around: list[Around] | None = None  # of the registry it was registered in first
        self.warm = warm_of(options.get("warm_every"), options.get("warm_with"))
        if self.warm is not None:
            check(self.values, self.warm.given)

    @property
    def template(self) -> str:
        """The template of its key."""
        return self._template.text

    def values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, defaults filled in. Raises TypeError as the call itself would."""
        values = dict(zip(self._names, args, strict=False))
        values.update(kwargs)
        if kwargs and not kwargs.keys() <= self._known:
            self._signature.bind(*args, **kwargs)
        if len(values) != len(self._names) or len(args) + len(kwargs) != len(values):
            if len(args) + len(kwargs) != len(values) or not values.keys() <= set(self._names):
                self._signature.bind(*args, **kwargs)
            values = {**self._defaults, **values}
            if len(values) != len(self._names):
                self._signature.bind(*args, **kwargs)
        return values

    def key(self, values: Mapping[str, Any]) -> str:
        return self._template.fill(values)

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        function = self.within(self.function) if self.around else self.function
        call = Call(function, (), values)
        return Recipe(call, self.type, *self._times, self._tagger(values), self, values)

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called as the app wants its loaders to be called: see Loaders.around."""
        return within(self.around, function) if self.around else function

    def _tagger(self, values: Mapping[str, Any]) -> Callable[[Any], list[str]]:
        def tags(value: Any) -> list[str]:
            found: list[str] = []
            for tag in self._tags:
                if isinstance(tag, Template):
                    found.append(tag.fill(values))
                else:
                    found.extend(several(tag(value)))
            return found

        return tags

    def source(self, values: Mapping[str, Any]) -> bytes:
        """`<name> <arguments as JSON>`: how an entry says what made it."""
        return self.name.encode() + b" " + self._arguments.dump_json(dict(values), warnings=False)

    def json_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as a message carries them. Raises ValueError for what has no JSON."""
        fields: dict[str, Any] = json.loads(self._arguments.dump_json(dict(values), warnings=False))
        return fields

    def validated(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments from a message, by the types of the signature. Raises BadArguments."""
        try:
            return self._arguments.validate_python(args)
        except ValidationError as error:
            raise BadArguments(f"{self.name}: {_brief(error)}") from None


class BadArguments(StillroomError, ValueError):
    """A message's arguments do not fit the loader's signature."""


class Loaders:
    """The registered loaders of one room, by name.

    `around` has functions that return context managers: each load of these loaders happens inside all of them, in
    the app's processes and in workers. It is for what loaders need and a worker lacks, such as Flask's app context.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Loader] = {}
        self.around: list[Around] = []

    def register(self, loader: Loader) -> None:
        if loader.name in self._by_name:
            raise ValueError(f"a loader named {loader.name!r} exists already; give this one name=…")
        for other in self._by_name.values():
            if other.template == loader.template:
                raise ValueError(
                    f"{loader.name}: the loader {other.name!r} has the key {loader.template!r}"
                )
        if loader.around is None:
            loader.around = self.around
        self._by_name[loader.name] = loader

    def adopt(self, others: Loaders) -> None:
        """Take over another room's loaders."""
        for loader in others._by_name.values():
            if self._by_name.get(loader.name) is not loader:
                self.register(loader)

    def __getitem__(self, name: str) -> Loader:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownLoader(name, self.names()) from None

    def names(self) -> list[str]:
        return sorted(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self._by_name)


class Asked(Protocol):
    """Whoever names a loader and its arguments."""

    @property
    def loader(self) -> str: ...
    @property
    def args(self) -> dict[str, Any]: ...


def recipe_of(order: Asked, loaders: Loaders) -> Recipe:
    """What an order asks for. Raises UnknownLoader or BadArguments."""
    loader = loaders[order.loader]
    return loader.recipe(loader.validated(order.args))


def several(tags: Any) -> Sequence[Any]:
    """Tags as they were meant: one text is one tag, not as many as it has letters."""
    return [tags] if isinstance(tags, str) or callable(tags) else list(tags)


def _hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{name}: {error}; types in a loader's signature are found in its module"
        ) from None


def _plain_parameters(signature: inspect.Signature, name: str) -> list[str]:
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{name}: a loader has plain named parameters only, not {parameter}")
    return list(signature.parameters)


def _arguments_type(
    signature: inspect.Signature, hints: Mapping[str, Any], name: str
) -> TypeAdapter[dict[str, Any]]:
    fields = {parameter: hints.get(parameter, Any) for parameter in signature.parameters}
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    make: Any = TypedDict  # a type checker wants literals; a signature is known when the app runs
    return TypeAdapter(with_config(config)(make(f"{name} arguments", fields)))


def _brief(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        for detail in error.errors(include_input=False)
    )
