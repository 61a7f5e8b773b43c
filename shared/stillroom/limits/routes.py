"""Which limits a request has: by the template of its path, not by the path, which a client makes up. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from stillroom.errors import InvalidLimit
from stillroom.limits.limit import DEFAULT, Limit, check_cost
from stillroom.misuse import explained

_SLASHES = re.compile(r"/{2,}")
_FIELD = re.compile(r"\{([^{}]*)\}")
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::(path))?", re.ASCII)
_METHOD = re.compile(r"[A-Z]{1,20}", re.ASCII)


@explained
@dataclass(frozen=True, slots=True)
class Route:
    """The limits of a path's template: `/product/{id}`, `/static/{path:path}`; `{…:path}` also spans slashes.

    `methods` () means all but OPTIONS; GET includes HEAD. `limits` may be empty. `cost` is what one request takes.
    Raises InvalidLimit.
    """

    template: str
    limits: Sequence[Limit] = (DEFAULT,)
    methods: Sequence[str] = ()
    cost: int = 1
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_cost(self.cost)
        object.__setattr__(self, "limits", tuple(self.limits))
        object.__setattr__(self, "methods", _checked(self.methods))
        object.__setattr__(self, "_pattern", re.compile(_regex(self.template), re.DOTALL))

    def accepts(self, method: str, path: str) -> bool:
        """`method` in capitals, `path` as `normalized` gives it."""
        wanted = method in self.methods if self.methods else method != "OPTIONS"
        return wanted and self._pattern.fullmatch(path) is not None


@explained
class Routes:
    """The table: the first route that a request fits into has its limits. All others share `default`."""

    def __init__(self, routes: Iterable[Route] = (), default: Sequence[Limit] = (DEFAULT,)) -> None:
        self._routes = tuple(routes)
        self._default = Route("/{path:path}", default, ())

    def find(self, method: str, path: str) -> Route:
        """The route of a request. `path`: as it was sent, or decoded; a query is ignored.

        HEAD counts as GET. OPTIONS has the limits of a route that names it, else the default ones.
        """
        wanted = "GET" if method.upper() == "HEAD" else method.upper()
        plain = normalized(path)
        return next((one for one in self._routes if one.accepts(wanted, plain)), self._default)


def normalized(path: str) -> str:
    """One spelling for all that a server may take for the same path.

    >>> normalized("//shop/%6cogin/.;/x/..%2f?next=/")
    '/shop/login/.;'
    """
    decoded = unquote(path.partition("?")[0].partition("#")[0], errors="replace")
    kept: list[str] = []
    for part in decoded.split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part)
    return "/" + "/".join(kept)


def _regex(template: str) -> str:
    """What a normalized path has to look like. Raises InvalidLimit."""
    if not isinstance(template, str) or not template.startswith("/"):
        raise InvalidLimit(template, "a template begins with /")
    if template.count("{") != template.count("}") or "{" in _FIELD.sub("", template):
        raise InvalidLimit(template, "its braces do not match")
    parts = [_part(part, template) for part in template.split("/") if part]
    return "".join(parts) or "/"


def _part(part: str, template: str) -> str:
    """One part between slashes, and the slash in front of it."""
    names = [_named(text, template) for text in _FIELD.findall(part)]
    if "path" in names:
        if _FIELD.sub("", part) or len(names) > 1:
            raise InvalidLimit(template, "a {…:path} stands alone between slashes")
        return "(?:/.*)?"
    literals = [re.escape(unquote(text)) for text in _FIELD.split(part)[::2]]
    return "/" + "[^/]+".join(literals)


def _named(text: str, template: str) -> str:
    match = _NAMED.fullmatch(text)
    if match is None:
        raise InvalidLimit(template, f"{{{text}}} is no field: {{name}} or {{name:path}}")
    return match[2] or ""


def _checked(methods: Sequence[str]) -> tuple[str, ...]:
    names = tuple(methods) if not isinstance(methods, str) else (methods,)
    for name in names:
        if not isinstance(name, str) or not _METHOD.fullmatch(name):
            raise InvalidLimit(name, "a method is written in capitals: GET, POST …")
    return names
