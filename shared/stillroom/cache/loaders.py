"""Loaders: how a value is made, under which key and tags, and for how long it is good."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeAlias

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from stillroom.cache.arguments import Text, Texts, Unkeyable
from stillroom.cache.around import Around, within
from stillroom.cache.declared import (
    NO_SCHEMA,
    captured_by,
    check_function,
    checked_as,
    has_schema,
    hints_of,
    innermost,
    is_coroutine_function,
    place_of,
    plain_parameters,
    result_of,
    signature_of,
    takes_places,
)
from stillroom.cache.entry import Entry
from stillroom.cache.keeping import Keeping, near_of
from stillroom.cache.sharing import is_frozen
from stillroom.cache.template import Template, fitting, prefix_of
from stillroom.cache.warm import check, warm_of
from stillroom.durations import Duration
from stillroom.errors import (
    InvalidArgument,
    InvalidKey,
    StillroomError,
    UnknownLoader,
    did_you_mean,
    in_code,
)
from stillroom.keys import refuse_crowd, sanitized
from stillroom.misuse import (
    YES_OR_NO,
    misuse,
    name_of,
    refuse_awaited,
    refuse_other,
    refuse_unfit,
    texts_of,
)
from stillroom.operation import Call
from stillroom.sameness import full_name, is_plain, is_same
from stillroom.shown import complaints
from stillroom.whole import is_whole
from stillroom.wire import no_fork

TagSpec: TypeAlias = str | Callable[[Any], Iterable[str]]


class Recipe(NamedTuple):
    """One value to be had: the call that makes it and how it is kept."""

    call: Call
    type: Any
    keeping: Keeping
    lease: int  # ms
    tags: Callable[[Any], list[str]]
    release: bytes  # tells its values from those of another release of the app
    loader: Loader | None = None  # a registered one can be run by a worker
    values: Mapping[str, Any] = {}
    at_once: int = 0  # loads of this loader that may run at the same time; 0: any number
    # How old a proof of a kept copy may be outside of a request; None: none is kept.
    near: float | None = None

    def owns(self, entry: Entry) -> bool:
        """Return whether an entry was stored by this release of the app, or is for all releases."""
        return not self.release or entry.release in (self.release, b"")

    def loading(self, *leases: bytes) -> Call:
        """Return the call that makes the value, in the contexts that the app wants around its loaders.

        `leases`: those that it is made under.
        """
        function, args, kwargs = self.call.function, self.call.args, self.call.kwargs
        if self.loader is not None:
            function = self.loader.within(function)
        return Call(function, args, kwargs, leases)

    @property
    def is_plain(self) -> bool:
        """Return whether no request remembers its values and no process keeps them."""
        return self.near is None and (self.loader is None or not self.loader.is_remembered)

    @property
    def name(self) -> str:
        """Return the name of the load in logs and counts."""
        return self.loader.name if self.loader else place_of(self.call.function)


log = logging.getLogger("stillroom")

PLACES_LIMIT = 1_000
UNINSTALLED = "__stillroom_uninstalled__"  # on the function of a page's loader: whether no app has installed it
_NAME = re.compile(r"[\w.:-]{1,200}", re.ASCII)
_EXACT = frozenset([int, str, bool])  # not float: JSON has no infinity


class Loader:
    """A function of the app, registered under a stable name so that a worker can run it too."""

    def __init__(
        self,
        function: Callable[..., Any],
        key: str,
        keeping: Keeping,
        lease: int,
        texts: Texts,
        *,
        tags: Sequence[TagSpec] = (),
        type: Any = None,
        name: str | None = None,
        ignore: Sequence[str] = (),
        at_once: int | None = None,
        version: str | int | None = None,
        memo: bool = False,
        near: bool | Duration | None = None,
        warm_every: Duration | None = None,
        warm_with: Any = None,
    ) -> None:
        self.function = function
        self.version = _checked_version(version)
        self.release_of: Callable[[], bytes] = bytes  # set where it is registered
        # Its lookups, set there too: see figures.LOOKUPS.
        self.counted_as: Sequence[str] = ("", "", "")
        self.at_once = _checked_places(at_once)
        self.keeping = keeping
        self.lease = lease
        self.name = _checked_name(name_of(function) if name is None else name)
        check_function(function, self.name)
        self._signature = signature_of(function)
        self._names = plain_parameters(self._signature, self.name)
        self._hints = hints_of(function, self.name)
        self._texts = texts
        self.type = result_of(function) if type is None else type
        self._template = Template(key, self._names, self._text_of)
        ignored = self._check_use(several("ignore", ignore))
        given = several("tags", tags)
        refuse_awaited("tags", *given)
        for tag in filter(callable, given):
            refuse_unfit("tags", tag, None)
        self._tags = [
            tag if callable(tag) else Template(tag, self._names, self._text_in_tag, escapes=False)
            for tag in given
        ]
        _check_constant([tag for tag in self._tags if isinstance(tag, Template) and not tag.names])
        parameters = self._signature.parameters
        self._places = [
            n for n in self._names if parameters[n].kind is not inspect.Parameter.KEYWORD_ONLY
        ]
        self._given_in_order = self._places if takes_places(function) else []
        self._known = frozenset(self._names)
        self._defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        self._not_sent = frozenset(n for n in ignored if n in self._defaults)
        self._arguments = self._arguments_type()
        refuse_other("memo", memo, bool, YES_OR_NO)
        self.is_remembered = memo
        self.near = near_of(near)
        self.near_prefix = prefix_of(self._template.head)
        # Whether equal arguments have one key at any time: a default that the app may change has no lasting text.
        self.is_steady = all(
            is_frozen(default) for n, default in self._defaults.items() if n in self._template.names
        )
        self.around: list[Around] | None = None  # of the registry it was registered in first
        self.warm = warm_of(warm_every, warm_with)
        if self.warm is not None:
            needed = [n for n in self._names if n not in self._defaults]
            if needed and warm_with is None:
                raise InvalidArgument(
                    f"{self.name}: warm_every needs warm_with, a list or a function: for which {', '.join(needed)}"
                )
            check(self, self.warm.given)

    @functools.cached_property
    def release(self) -> bytes:
        """Return what tells its values from those of another release of the app.

        Not asked for when it is registered: its type may name a class that is defined below it.
        """
        return self.release_of()

    @property
    def template(self) -> str:
        """Return the template of its key."""
        return self._template.text

    def has_keys_of(self, other: Loader) -> bool:
        """Return whether equal arguments make equal keys of both."""
        return self._template.shape == other._template.shape

    def unfilled_texts(self) -> list[str]:
        """Return the templates of its key and its tags that have parameters."""
        own = [self._template, *[tag for tag in self._tags if isinstance(tag, Template)]]
        return [template.text for template in own if template.names]

    @property
    def tag_templates(self) -> list[str]:
        """Return the templates of its tags. Those that are functions of the value are not among them."""
        return [tag.text for tag in self._tags if isinstance(tag, Template)]

    def values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, defaults filled in. Raises TypeError as the call itself would."""
        values = dict(zip(self._places, args, strict=False))
        values.update(kwargs)
        if len(args) + len(kwargs) != len(values) or (kwargs and not values.keys() <= self._known):
            self._refuse(args, kwargs)
        if len(values) != len(self._names):
            values = {**self._defaults, **values}
            if len(values) != len(self._names):
                self._refuse(args, kwargs)
        return values

    def _refuse(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        error = misuse(TypeError(), self.function, args, kwargs)
        raise error if error else TypeError(f"{self.name}() can't be called so")

    def key(self, values: Mapping[str, Any]) -> str:
        """Return the key of a call. Raises Unkeyable for an argument that no text says all of."""
        return self._fitting(values)[0]

    def place(self, values: Mapping[str, Any]) -> bytes:
        """Return the key of a call as it stands in Redis. Raises as `key` does."""
        return self._fitting(values)[1]

    def read_key(self, key: str) -> dict[str, str] | None:
        """Return what stands in a key for each parameter; None if the key is none of this loader's."""
        return self._template.read(key)

    def arguments_of(self, key: str) -> dict[str, Any] | None:
        """Return the arguments of the call that has this key, as an order carries them; None if it does not tell.

        A key has their texts: `7` may be a number, and of a long key there is only a hash. Whether they are found
        is seen by the key that they make.
        """
        texts = self._template.read(key)
        for args in () if texts is None else (texts, {n: _meant(t) for n, t in texts.items()}):
            with suppress(TypeError, ValueError):
                values = self.validated(args)
                if self.key(values) == key:
                    return self.ordered((), values)
        return None

    def _fitting(self, values: Mapping[str, Any]) -> tuple[str, bytes]:
        try:
            return fitting(self._template.fill(values))
        except Unkeyable as error:
            raise Unkeyable(f"{self.name}(): {error}") from None

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """Return what a call of it is kept by."""
        call, tags = self._call(values), self._tagger(values)
        return Recipe(
            *(call, self.type, self.keeping, self.lease, tags, self.release, self, values),
            self.at_once,
            self.near,
        )

    def _call(self, values: Mapping[str, Any]) -> Call:
        if not self._given_in_order:
            return Call(self.function, (), values)
        args = [values[name] for name in self._given_in_order]
        others = {n: value for n, value in values.items() if n not in self._given_in_order}
        return Call(self.function, args, others)

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, called as the app wants its loaders to be called: see Loaders.around."""
        if not self.around:
            return function
        return within(self.around, function, is_async=is_coroutine_function(function))

    def _tagger(self, values: Mapping[str, Any]) -> Callable[[Any], list[str]]:
        def tags(value: Any) -> list[str]:
            found: list[str] = []
            for tag in self._tags:
                if isinstance(tag, Template):
                    found.append(tag.fill(values))
                else:
                    found.extend(several("tags", tag(value)))
            return found

        return tags

    def source(self, values: Mapping[str, Any]) -> bytes:
        """Return `<name> <arguments as JSON>`: how an entry says what made it.

        Raises InvalidArgument for arguments that another process could not have as they are.
        """
        return self.name.encode() + b" " + self._as_json(values)

    def ordered(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call as an order carries them, once they are what its worker will accept.

        Raises TypeError as the call itself would, InvalidArgument as `source` does, BadArguments, Unkeyable.
        """
        values = self.values(args, kwargs)
        fields = _fields_of(self.name, self._as_json(values))
        for name, value in values.items():
            if isinstance(value, set | frozenset) and isinstance(fields.get(name), list):
                fields[name].sort(key=json.dumps)  # each process has them in an order of its own
        key, loads = self.key(values), self.key(self.validated(fields))
        if loads != key:  # an int in a list[float]
            raise InvalidArgument(
                f"{self.name}: this call reads {key!r}, and a worker would load {loads!r}: give what the "
                "signature declares, such as 1.0 in a list[float]"
            )
        return fields

    def _as_json(self, values: Mapping[str, Any]) -> bytes:
        try:
            return self._as_read_back(values)
        except RecursionError:
            raise _too_deep(self.name) from None

    def _as_read_back(self, values: Mapping[str, Any]) -> bytes:
        sent = {n: value for n, value in values.items() if n not in self._not_sent}
        options: Any = {"by_alias": True, "round_trip": True, "warnings": False}
        try:
            text = self._arguments.dump_json(sent, **options)
        except pydantic_core.PydanticSerializationError as error:
            raise InvalidArgument(f"{self.name}: its arguments have no JSON: {error}") from None
        if self._are_as_declared(sent):
            return text
        lost = self._lost_in(text, sent)
        if lost:  # perhaps a model that is read by the names of its fields
            named = self._arguments.dump_json(sent, **{**options, "by_alias": False})
            if not self._lost_in(named, sent):
                return named
        if lost and b"null" in text:  # perhaps an infinity
            written = self._arguments.dump_python(sent, **options)
            text = pydantic_core.to_json(written, inf_nan_mode="strings")
            lost = self._lost_in(text, sent)
        if lost:
            raise InvalidArgument(lost)
        return text

    def _are_as_declared(self, sent: Mapping[str, Any]) -> bool:
        """Return whether JSON gives all of these back by itself, so that there is nothing to compare."""
        are_declared = all(
            type(value) in _EXACT and self._hints.get(name) is type(value)
            for name, value in sent.items()
        )
        return are_declared and is_plain(sent)

    def _lost_in(self, text: bytes, sent: Mapping[str, Any]) -> str | None:
        """Return in words which argument a worker would not get as it is; None if it would get all of them."""
        try:
            back = self.validated(json.loads(text))
        except BadArguments as error:
            return str(error)
        for name, value in sent.items():
            other = back[name]
            if not is_same(value, other, type(value) is not bool):
                kind = type(other)
                instead = "another value" if kind is type(value) else f"of the type {kind.__name__}"
                return f"{name}: {type(value).__name__} is {instead} once it has been JSON"
        return None

    def validated(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a message, by the types of the signature. Raises BadArguments."""
        try:
            given = self._arguments.validate_python(args)
        except ValidationError as error:
            raise BadArguments(f"{self.name}: {complaints(error)}") from None
        return {**{name: self._defaults[name] for name in self._not_sent}, **given}

    # When it is registered

    def _text_of(self, name: str) -> Any:
        return self._text(name, self._texts.of)

    def _text_in_tag(self, name: str) -> Any:
        return self._text(name, self._texts.of_tag)

    def _text(self, name: str, make: Callable[[Any], Text]) -> Text:
        try:
            return make(self._hints.get(name, Any))
        except Unkeyable as error:
            raise Unkeyable(f"{self.name}: {{{name}}}: {error}") from None

    def _check_use(self, ignored: Sequence[str]) -> Sequence[str]:
        """Check that each parameter is in the key or is declared to be ignored."""
        for name in ignored:
            if name not in self._names:
                hint = (
                    did_you_mean(name, self._names)
                    or f"; it has {', '.join(self._names) or 'none'}"
                )
                raise InvalidArgument(f"{self.name}: ignore={name!r} is no parameter of it{hint}")
        unused = [n for n in self._names if n not in self._template.names and n not in ignored]
        if unused and unused[0] in ("self", "cls") and unused[0] == self._names[0]:
            raise InvalidArgument(
                f"{self.name}: a method's {unused[0]} is an argument like any other. Put {{{unused[0]}}} into the "
                f"key, or write ignore=[{unused[0]!r}]: then no worker can call it. Better load by a function"
            )
        if unused:
            raise InvalidArgument(
                f"{self.name}: {unused[0]} is not in the key {self.template!r}, so calls that differ in it would "
                f"share a value; put {{{unused[0]}}} into the key, or write ignore=[{unused[0]!r}]"
            )
        return ignored

    def _arguments_type(self) -> TypeAdapter[dict[str, Any]]:
        hints = {name: self._hints.get(name, Any) for name in self._names}
        try:
            return checked_as(hints, self._not_sent)
        except NO_SCHEMA:  # of a protocol, for example
            known = {name: hint if has_schema(hint) else Any for name, hint in hints.items()}
            return checked_as(known, self._not_sent)


class BadArguments(StillroomError, ValueError):
    """The arguments of an order do not fit the loader's signature."""


class Loaders:
    """The registered loaders of one room, by name.

    `around` has functions that return context managers: each load of these loaders happens inside all of them, in
    the app's processes and in workers. It is for what loaders need and a worker lacks, such as Flask's app context.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Loader] = {}
        self._unfilled: frozenset[str] = frozenset()
        self._of_pages: frozenset[str] = frozenset()
        # Places of loaders of which was told that they have captured other values.
        self._told: set[str] = set()
        self.around: list[Around] = []

    def register(self, loader: Loader) -> None:
        """Add a loader. One that is defined again, as when a module is reloaded, takes the earlier one's place."""
        with no_fork():  # one after the other, for modules are imported in several threads
            others = [other for other in self._by_name.values() if not _is_again(loader, other)]
            if any(other.name == loader.name for other in others):
                raise InvalidArgument(
                    f"a loader named {loader.name!r} exists already; give this one name=…"
                )
            for other in others:
                if other.has_keys_of(loader):
                    raise InvalidArgument(
                        f"{loader.name}: the loader {other.name!r} has the key {other.template!r}, which is the "
                        "same for the same arguments; begin this one with another text"
                    )
            self._tell_of_captured(loader)
            if loader.around is None:
                loader.around = self.around
            self._by_name = {other.name: other for other in [*others, loader]}
            self._note_unfilled()

    def _tell_of_captured(self, loader: Loader) -> None:
        """Log once that a function inside a function is defined again with other values from around it.

        Its key does not say them. A value that a visitor's request gave would be served to the next visitor.
        """
        known = self._by_name.get(loader.name)
        if known is None or (place := place_of(loader.function)) in self._told:
            return
        if others := _captured_otherwise(loader.function, known.function):
            self._told.add(place)
            log.warning(
                "%s is defined again with another %s: both have the key %r, so each is given what the other has "
                "loaded; define it once, and make %s a parameter that is in the key, or give each a name and a "
                "key of its own",
                *(loader.name, ", ".join(others), loader.template, others[0]),
            )

    def know_tags_of_pages(self, templates: Collection[str]) -> None:
        """Take note of templates of tags that are filled with what a page's address says: see refuse_unfilled."""
        if self._of_pages.issuperset(templates):  # Django makes some views anew for each request
            return
        with no_fork():
            self._of_pages = self._of_pages.union(templates)
            self._note_unfilled()

    def _note_unfilled(self) -> None:
        own = (text for one in self._by_name.values() for text in one.unfilled_texts())
        self._unfilled = self._of_pages.union(own)

    def refuse_unfilled(self, *names: str) -> None:
        """Raise InvalidKey for a template in the place of a key or a tag: its `f` was forgotten.

        It is one of a loader or a page. No entry is reached by it, and what is stored under it is everybody's: an
        edit would go unseen until the values end.
        """
        for name in names:
            if isinstance(name, str) and name in self._unfilled:
                raise InvalidKey(
                    name,
                    f"it is a template, and its braces are not filled; did you mean f{name!r}?",
                )

    def adopt(self, others: Loaders) -> None:
        """Take over another room's loaders."""
        for loader in others._by_name.values():
            if self._by_name.get(loader.name) is not loader:
                self.register(loader)
        self.know_tags_of_pages(others._of_pages)

    def __getitem__(self, name: str) -> Loader:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownLoader(name, self.names()) from None

    def names(self) -> list[str]:
        return sorted(self._by_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def uninstalled_pages(self) -> list[str]:
        """Return the names of pages that are cached nowhere, since no app has installed them: see Pages.install."""
        return [
            name.removeprefix("page.")
            for name, one in self._by_name.items()
            if getattr(one.function, UNINSTALLED, bool)()
        ]

    def longest_lease(self) -> int:
        """Return the longest lease of a loader, in ms; 0 without loaders."""
        return max((loader.lease for loader in self._by_name.values()), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self._by_name)


class LoaderCall(Protocol):
    """A message or an order that names a loader and has its arguments."""

    @property
    def loader(self) -> str: ...
    @property
    def args(self) -> dict[str, Any]: ...


def recipe_of(order: LoaderCall, loaders: Loaders) -> Recipe:
    """Return the recipe that an order asks for. Raises UnknownLoader or BadArguments."""
    loader = loaders[order.loader]
    return loader.recipe(loader.validated(order.args))


def several(what: str, given: Any) -> Sequence[Any]:
    """Return the texts or functions that were given, one or several. Raises InvalidArgument."""
    return [given] if callable(given) else list(texts_of(what, given))


def _is_again(one: Loader, other: Loader) -> bool:
    """Return whether a loader is the other one defined anew, in the same place of the same module.

    Of functions inside functions, lambdas and partials there may be several in one place: there name and key must
    be the same as well.
    """
    if place_of(one.function) != place_of(other.function):
        return False
    if one.name == other.name and one.template == other.template:
        return True
    is_one_of_a_kind = inspect.isfunction(one.function) and "<" not in one.function.__qualname__
    return is_one_of_a_kind and one.function is not other.function


def _captured_otherwise(one: Any, other: Any) -> list[str]:
    """Return by name the plain values that differ in two runs of one definition: variables, arguments."""
    code = getattr(innermost(one), "__code__", None)
    if code is None or code is not getattr(innermost(other), "__code__", None):
        return []
    mine, its = captured_by(one), captured_by(other)
    found = []
    for name in mine.keys() & its.keys():
        with suppress(Exception):  # a value that can't be compared
            pair = mine[name], its[name]
            if pair[0] is not pair[1] and _are_others(*pair):
                found.append(name)
    return sorted(found)


def _are_others(one: Any, other: Any) -> bool:
    """Return whether two captured values are known to differ. A class that is defined again is the same one."""
    if isinstance(one, type) and isinstance(other, type):
        return full_name(one) != full_name(other)
    return is_frozen(one) and is_frozen(other) and one != other


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{in_code(name):.300}: a loader's name has 1 to 200 letters, digits or any of _ . : -; "
            "give it one by name=…"
        )
    return name


def _check_constant(tags: Sequence[Template]) -> None:
    """Refuse tags that no entry can have. Those with parameters are known only when they are filled."""
    texts = [tag.fill({}) for tag in tags]
    for text in texts:
        sanitized(text)
    refuse_crowd(texts)


def _checked_places(at_once: Any) -> int:
    if at_once is None:
        return 0
    if not is_whole(at_once, most=PLACES_LIMIT):
        raise InvalidArgument(f"at_once={in_code(at_once):.100}: 1 to {PLACES_LIMIT:,} loads")
    return at_once


def _checked_version(version: Any) -> str | int | None:
    if isinstance(version, bool) or not isinstance(version, str | int | None):
        raise InvalidArgument(
            f"version={in_code(version):.100}: a text or a number without a fraction"
        )
    return version


def _fields_of(loader: str, text: bytes) -> dict[str, Any]:
    """Return arguments from their JSON. Raises InvalidArgument where a worker could not read them in an order."""
    try:
        pydantic_core.from_json(b'{"":%b}' % text)  # one deeper, as they are in there
    except ValueError:
        raise _too_deep(loader) from None
    fields: dict[str, Any] = json.loads(text)
    return fields


def _too_deep(loader: str) -> InvalidArgument:
    return InvalidArgument(f"{loader}: its arguments have no JSON: they are nested too deep")


def _meant(text: str) -> Any:
    """Return the plain value that has this text in a key: a number, None, a quoted text; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
