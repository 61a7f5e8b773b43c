"""Which tags a change to a row of a model invalidates. The ORMs' modules find the rows that changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter
from typing import Any, TypeAlias

from stillroom.cache.arguments import text_in_tag
from stillroom.cache.loaders import several
from stillroom.cache.template import Template, refuse_foreign
from stillroom.errors import InvalidArgument, InvalidKey, did_you_mean
from stillroom.keys import sanitized

log = logging.getLogger("stillroom.integrations")

TagSpec: TypeAlias = "str | Callable[[Any], Iterable[str]]"
ATTRIBUTE = "__stillroom_tags__"


def refuse_bare(tags: Sequence[object]) -> None:
    """Refuse `@invalidates` without its parentheses, which would put a function in the place of the model."""
    for model in tags:
        if isinstance(model, type):
            raise InvalidArgument(
                f'write @invalidates("{model.__name__.lower()}:{{id}}") above {model.__name__}, with its tags'
            )


class ModelTags:
    """Texts (`products`), templates of the row's fields (`product:{id}`), and functions of the row."""

    def __init__(self, model: str, specs: Sequence[TagSpec], fields: Iterable[str]) -> None:
        if not specs:
            raise InvalidArgument(f"{model}: give at least one tag")
        known = list(fields)
        self.model = model
        self.constant: list[str] = []
        self._templates: list[Template] = []
        self._functions: list[Callable[[Any], Iterable[str]]] = []
        for spec in specs:
            if callable(spec):
                self._functions.append(spec)
                continue
            names = names_in(spec)
            refuse_foreign(spec, known, names)
            if names:
                for name in names:
                    if name not in known:
                        reason = f"{{{name}}} is no field of {model}{did_you_mean(name, known)}"
                        raise InvalidKey(spec, reason)
                self._templates.append(Template(spec, names, lambda _: text_in_tag, escapes=False))
            else:
                sanitized(spec)
                self.constant.append(spec)
        self.fields = frozenset(name for template in self._templates for name in template.names)

    @property
    def needs_row(self) -> bool:
        """Return whether some tags depend on the row."""
        return bool(self._templates or self._functions)

    @property
    def constant_words(self) -> str:
        """Return what is invalidated by a change that names no rows, for a log line: `only products are`."""
        return f"only {', '.join(self.constant)} are" if self.constant else "nothing is"

    @property
    def has_functions(self) -> bool:
        """Return whether some tags depend on fields that only a function knows."""
        return bool(self._functions)

    def of(self, row: Any) -> list[str]:
        """Return the tags of a row: anything that has the fields as attributes.

        A row must be saved even if one of its tags can't be made, so that is logged and the tag is left out.
        """
        tags = list(self.constant)
        for make in (*map(_filled, self._templates), *self._functions):
            try:
                made = list(several("tags", make(row)))
                for tag in made:
                    sanitized(tag)
            except Exception as error:
                log.error("%s: a tag of a row can't be made: %r", self.model, error)
            else:
                tags += made
        return tags


class Before:
    """A row as it was: the object, with the former values of some fields in front."""

    def __init__(self, row: Any, former: Mapping[str, Any]) -> None:
        self._row = row
        self._former = former

    def __getattr__(self, name: str) -> Any:
        return self._former[name] if name in self._former else getattr(self._row, name)


def tags_of_model(model: type) -> ModelTags | None:
    """Return what `invalidates` said of this class, or of the nearest class it is derived from."""
    return getattr(model, ATTRIBUTE, None)


def _filled(template: Template) -> Callable[[Any], str]:
    return lambda row: template.fill({name: getattr(row, name) for name in template.names})


def names_in(text: str) -> list[str]:
    """Return the names in braces. Raises InvalidKey for what is no template."""
    try:
        return [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except (ValueError, TypeError) as error:
        raise InvalidKey(text, f"not a template: {error}") from None
