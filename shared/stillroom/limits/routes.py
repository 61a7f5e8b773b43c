"""Which limits a request has: by the template of its path, not by the path, which a client makes up. Pure.

This table stands in front of the app's own routing, so it can only guess what a path will be taken for. Where a
path can be read in several ways, the limits of all routes it might mean are charged: an odd spelling is never
cheaper.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar
from urllib.parse import unquote

from stillroom.errors import InvalidLimit, did_you_mean
from stillroom.limits.limit import DEFAULT, Limit, check_cost, check_limits
from stillroom.limits.template import Template
from stillroom.misuse import explained, is_awaited, name_of, takes

T = TypeVar("T")
R = TypeVar("R")
Counted = Literal["all", "failures"] | Callable[[Any], bool]

KEPT = 4_096  # paths whose route is remembered …
KEPT_LENGTH = 200  # … of so many characters at the most
_METHOD = re.compile(r"[A-Z]{1,20}", re.ASCII)
_AS_GET = {"HEAD": "HEAD", "WEBSOCKET": "the handshake of a websocket"}
# A path that nobody can read in two ways, where no template has capitals: small letters, no empty part, none that
# begins with a dot.
_PLAIN = re.compile(r"(?:/[a-z0-9_~-][a-z0-9._~-]*)*/?", re.ASCII)
# Where a server that takes the path for a URL, or for a C string, ends it.
_ENDS = re.compile(r"[?#\x00]")
_ORIGIN = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:(//[^/]*)?")  # of an absolute URI
# Of a path that begins with no slash: what Werkzeug's dispatcher takes for a mount.
_BEFORE = re.compile(r"^[^/]+(?=/)")
_SLASHES = re.compile("/{2,}")
_PARAMETERS = re.compile(r";[^/]*")  # of one part, in old servers
_UNSEEN = "".join(map(chr, (*range(0x21), *range(0x7F, 0xA1)))) + "\u2028\u2029\ufeff"


@explained
@dataclass(frozen=True, slots=True)
class Route:
    """The limits of a path's template: `/product/{id}`, `/static/{path:path}`; `{…:path}` also spans slashes.

    `methods` () means all; GET includes HEAD. A preflight that a CORS layer answers costs nothing, unless OPTIONS
    is named. `limits` may be empty: then Redis is asked nothing, and a banned client is let through as well. `cost`
    is what one request takes. `count` says which requests count: "all"; "failures", those that are answered with
    400 or more; or a function of the answer (see stillroom.web.Answered). Raises InvalidLimit.
    """

    template: str
    limits: Sequence[Limit] = (DEFAULT,)
    methods: Sequence[str] = ()
    cost: int = 1
    count: Counted = "all"
    form: Template = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_cost(self.cost)
        check_count(self.count)
        object.__setattr__(self, "limits", check_limits(self.limits))
        object.__setattr__(self, "methods", _checked(self.methods))
        object.__setattr__(self, "form", Template(self.template))

    def __hash__(self) -> int:
        return hash(self.template)

    @property
    def named(self) -> str:
        """Return its methods and template, as a person reads them."""
        return " ".join([*self.methods, self.template])

    def takes(self, method: str) -> bool:
        """Return whether the route limits this method. `method`: in capitals, GET for HEAD."""
        return not self.methods or method in self.methods


@explained
class Routes:
    """The table: a request has the limits of the first route that it matches, or else `default`."""

    def __init__(self, routes: Iterable[Route] = (), default: Sequence[Limit] = (DEFAULT,)) -> None:
        if isinstance(routes, Route | str) or not isinstance(routes, Iterable):
            meant = "; did you mean [Route(…)]?" if isinstance(routes, Route) else ""
            raise InvalidLimit(routes, f"Routes takes a list of Route(…)s{meant}")
        self.routes = tuple(routes)
        for one in self.routes:
            if not isinstance(one, Route):
                raise InvalidLimit(one, f"Routes holds Route(…)s, not a {type(one).__name__}")
        self.default = Route("/{path:path}", default)
        self._is_small = all(route.form.is_small for route in self.routes)
        self._remembered = lru_cache(KEPT)(self._look_up)
        self._joined = lru_cache(KEPT)(self._join)

    def find(self, method: str, path: str, whole: str = "") -> Route:
        """Return the route of a request.

        `path` is decoded, as servers give it, and without what the app is mounted under; `whole` is with that. HEAD
        counts as GET. Where a path can be taken for several routes, the answer is a route with the limits of all.
        """
        wanted = "GET" if method.upper() == "HEAD" else method.upper()
        if len(path) + len(whole) > KEPT_LENGTH:
            return self._look_up(wanted, path, whole)
        return self._remembered(wanted, path, whole)

    def unreached(self) -> Iterator[tuple[Route, Route]]:
        """Yield each route whose limits no request has, with the one in front of it that takes all of its."""
        for place, route in enumerate(self.routes):
            extremes = route.form.extremes()
            for other in self.routes[:place]:
                if other.form.takes(extremes) and _hides(other, route):
                    yield route, other
                    break

    def _look_up(self, method: str, path: str, whole: str) -> Route:
        candidates = [one for one in self.routes if one.takes(method)]
        first = next((one for one in candidates if one.form.fits(path)), self.default)
        if self._is_small and whole in ("", path) and _PLAIN.fullmatch(path):
            return first
        found, root = [first], whole.removesuffix(path)
        elsewhere = self.default if _climbs(path) else None
        readings = [*_readings(path), *(_readings(whole) if whole not in ("", path) else ())]
        for reading in dict.fromkeys([*readings, *[below(root, one) for one in readings]]):
            fitting = (one for one in candidates if one.form.fits_in_any_case(reading))
            other = next(fitting, elsewhere)
            if other and other.limits and other not in found:
                found.append(other)
        return first if len(found) == 1 else self._joined(tuple(found))

    def _join(self, routes: tuple[Route, ...]) -> Route:
        """Join these routes into one with all limits, and the stricter where two share a name."""
        limits: dict[str, Limit] = {}
        for limit in [limit for route in routes for limit in route.limits]:
            known = limits.get(limit.name, limit)
            limits[limit.name] = min(known, limit, key=_pace)
        name = next(route.template for route in routes if route is not self.default)
        cost = max(route.cost for route in routes)
        return Route(name, tuple(limits.values()), cost=cost)


def below(root: str, path: str) -> str:
    """Return the path below what the app is mounted under. A path that does not begin with that is taken as it is.

    >>> below("/api", "/api/login"), below("/api", "/apis")
    ('/login', '/apis')
    """
    if not root or not path.startswith(root) or path[len(root) : len(root) + 1] not in ("", "/"):
        return path
    return path[len(root) :] or "/"


def resolved(path: str) -> str:
    """Return the path without empty parts and dots.

    >>> resolved("//shop/./x/../login/")
    '/shop/login'
    """
    kept: list[str] = []
    for part in path.replace("\\", "/").split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part)
    return "/" + "/".join(kept)


def check_count(count: object) -> None:
    """Raise InvalidLimit for what says of no answer whether it counts."""
    if count not in ("all", "failures") and not callable(count):
        near = did_you_mean(count, ("all", "failures"))
        raise InvalidLimit(count, f"count is all, failures, or a function of the answer{near}")
    check_plain("count", count)


def check_plain(name: str, given: object) -> None:
    """Raise InvalidLimit for a coroutine function: nobody awaits it, and a coroutine is true for every request."""
    if is_awaited(given):
        raise InvalidLimit(
            name_of(given), f"{name}= is a plain function; this one has to be awaited"
        )
    check_takes_one(name, given)


def told(what: str, function: Callable[[T], R], given: T) -> R:
    """Call a function of the app with a request, an answer or a refusal of ours.

    Raises InvalidLimit where it wants an attribute of a framework's own request or response.
    """
    try:
        return function(given)
    except AttributeError as error:
        if error.obj is not given:
            raise
        known = [name for name in dir(given) if name[0] != "_" and not hasattr(tuple, name)]
        has = f"has no {error.name}, but {', '.join(known)}{did_you_mean(error.name, known)}"
        why = f"{what}= is called with the {type(given).__name__}, which {has}"
        raise InvalidLimit(name_of(function), why) from error


def check_takes_one(name: str, given: object) -> None:
    """Raise InvalidLimit for a function that can't be called with one argument, the request or the answer."""
    if isinstance(given, type):
        name_here = f"{name}= is called with one argument, and this is a class"
        raise InvalidLimit(given.__name__, f"{name_here}; did you mean {given.__name__}(…)?")
    if not takes(given, 1):
        meant = "; did you mean @limited(AUTH)?" if name == "limits" else ""
        raise InvalidLimit(
            name_of(given), f"{name}= is called with one argument, and this can't be{meant}"
        )


def _readings(path: str) -> Iterator[str]:
    """Return what a server, a proxy or a framework might read this path as."""
    given = (path, unquote(path, errors="replace"))
    without = [cut.sub("", one) for one in given for cut in (_ORIGIN, _BEFORE)]
    for text in dict.fromkeys([*given, *without]):
        bare = text.strip(_UNSEEN)
        yield bare  # a `$` in a regular expression looks past a newline
        yield "/" + _SLASHES.sub("/", bare).strip("/" + _UNSEEN)  # as Litestar reads it
        yield resolved(bare)
        cut = _ENDS.split(bare, maxsplit=1)[0].strip(_UNSEEN)
        yield resolved(cut)
        yield resolved(_PARAMETERS.sub("", cut))


def _hides(one: Route, other: Route) -> bool:
    """Return whether the first of two routes takes all methods of the second one, and limits them otherwise."""
    if (one.limits, one.cost, one.count) == (other.limits, other.cost, other.count):
        return False
    return not one.methods or (bool(other.methods) and {*other.methods} <= {*one.methods})


def _climbs(path: str) -> bool:
    """Return whether some parts may lead out of the route to a path that no table knows."""
    return any(".." in re.split(r"[/\\]", text) for text in (path, unquote(path)))


def _pace(limit: Limit) -> float:
    return limit.quota / limit.window


def _checked(methods: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(methods, Iterable):
        raise InvalidLimit(methods, 'methods is a list, such as ["POST"]; () means all')
    names = tuple(methods) if not isinstance(methods, str) else (methods,)
    for name in names:
        if not isinstance(name, str) or not _METHOD.fullmatch(name):
            raise InvalidLimit(name, "a method is written in capitals: GET, POST …")
        if name in _AS_GET and "GET" not in names:
            raise InvalidLimit(name, f"{_AS_GET[name]} is found as GET: name that")
    return names
