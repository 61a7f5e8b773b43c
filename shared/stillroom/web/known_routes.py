"""Reads an app's own routes, to say at start which routes of a table fit none of them.

Apps are asked what they are, not imported: whoever has no Flask needs none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

from stillroom.errors import did_you_mean
from stillroom.limits.routes import Route, Routes, below
from stillroom.limits.template import REST, Parts, Template, could_meet
from stillroom.web.carriers import (
    DEEP,
    Carried,
    Endpoint,
    around,
    is_django,
    layers,
    of_django,
    of_flask,
    of_starlette,
)
from stillroom.web.limited import Limited

log = logging.getLogger("stillroom.web")

# A field, and its kind. Those kinds which span no slash; any other may.
_BRACED = re.compile(r"\{[^{}:]*:?([^{}]*)\}")
_ANGLED = re.compile(r"<(?:([^<>:]*):)?[^<>]*>")
_OF_STARLETTE = ("", "str", "int", "float", "uuid")
_OF_FLASK = ("", "default", "string", "int", "float", "uuid", "any")
_OF_DJANGO = ("", "str", "int", "slug", "uuid")


class Known(NamedTuple):
    """One route of an app."""

    text: str  # as the app writes it
    parts: Parts
    methods: frozenset[str] | None  # None: any
    endpoint: Endpoint = Endpoint()

    @property
    def carries(self) -> tuple[Carried, ...]:
        """Return the limits that its endpoint carries."""
        return self.endpoint.carries


class Roots:
    """The path an app is mounted under, as the app says of itself, or its server, or an app mounted at its `/`.

    An app is looked at with the first request, when it is whole.
    """

    def __init__(self, app: object) -> None:
        self._app = app

    def of(self, root: str) -> str:
        """Return the app's root path. `root`: the one that the server says."""
        return self._own or root or self._inner

    @cached_property
    def _own(self) -> str:
        return _first_root(layers(self._app))

    @cached_property
    def _inner(self) -> str:
        routes = (getattr(layer, "routes", ()) for layer in layers(self._app))
        return _first_root(app for some in routes for app in _mounted(some, 0, at_root=True))


class Misfits:
    """Tells of limits that hold for nothing.

    No request comes to a route of the table: none of the app fits, or one in front takes all. Or a view is in the
    app without the limits that were put around it.
    """

    def __init__(self, routes: Routes | None) -> None:
        self._routes = Routes([]) if routes is None else routes

    def tell(self, app: object, root: str = "") -> None:
        """Log what has no use. Called once, with the first request: then the app has all its routes."""
        for route, other in self._routes.unreached():
            log.warning("the route %s is never reached: %s comes first", route.named, other.named)
        try:
            known = known_routes(app) or []
        except Exception as error:  # it is only a help
            log.debug("the routes of the app can't be seen: %r", error)
            return
        for name, hint in _misfits(self._routes.routes, known, root):
            log.warning(
                "the route %s fits no endpoint of this app, so its limits hold for nothing in it%s",
                *(name, hint),
            )
        for one in known:
            if one.endpoint.lost:
                log.warning("the view %s %s", one.endpoint.name, one.endpoint.lost)


def misfits(routes: Routes, app: object) -> list[tuple[str, str]]:
    """Return the routes of a table that fit no endpoint of an app, and what was probably meant."""
    return list(_misfits(routes.routes, known_routes(app) or [], root=""))


def _first_root(apps: Iterator[object]) -> str:
    """Return the first root path. An object that raises when it is looked at has none."""
    with suppress(Exception):
        return next(filter(None, map(_root_of, apps)), "")
    return ""


def _root_of(app: object) -> str:
    """Return the root path of an ASGI app that has one of its own: FastAPI's, or Django's by its settings."""
    if is_django(app):
        from django.conf import settings

        return settings.FORCE_SCRIPT_NAME or ""
    is_starlettes = isinstance(getattr(app, "routes", None), Sequence)  # Flask's is a folder
    return str(getattr(app, "root_path", "")) if is_starlettes else ""


def _misfits(
    routes: Sequence[Route], known: Sequence[Known], root: str
) -> Iterator[tuple[str, str]]:
    for route in routes if known else ():
        if not any(_could_fit(route, one, root) for one in known):
            hint = did_you_mean(route.template, [one.text for one in known])
            yield route.named, hint


def known_routes(app: object) -> list[Known] | None:
    """Return all routes of an app of Starlette, FastAPI, Flask or Django. None: they can't be seen."""
    for one in layers(app):
        if hasattr(one, "url_map") and hasattr(one.url_map, "iter_rules"):
            return [_of_flask(one, rule) for rule in one.url_map.iter_rules()]
        if isinstance(getattr(one, "routes", None), Sequence):
            return list(_of_starlette(one.routes, (), "", around(app)))
        if is_django(one):
            return django_routes()
    return None


def django_routes() -> list[Known]:
    """Return all routes of Django's ROOT_URLCONF."""
    from django.urls import get_resolver

    return list(_of_django(get_resolver().url_patterns, (), "", ()))


def inner_apps(app: object) -> Iterator[Any]:
    """Yield the apps that an app wraps, or that are mounted in it."""
    yield from list(layers(app))[1:]
    yield from _mounted(getattr(app, "routes", ()), 0)


def _mounted(routes: Any, depth: int, *, at_root: bool = False) -> Iterator[Any]:
    """Yield the apps that are mounted in an app. `at_root`: only those at `/`, whose paths are the app's own."""
    for route in routes if isinstance(routes, Sequence) and depth < DEEP else ():
        if not hasattr(route, "endpoint") and not (at_root and bool(getattr(route, "path", ""))):
            yield from layers(getattr(route, "app", None))
            yield from _mounted(getattr(route, "routes", ()), depth + 1, at_root=at_root)


def fits(known: Known, method: str, path: str) -> bool:
    """Return whether a request may come to this route, as far as its template says."""
    wanted = "GET" if method == "HEAD" else method
    if known.methods is not None and wanted not in known.methods:
        return False
    return could_meet(tuple([(part,) for part in path.split("/") if part]), known.parts)


def _could_fit(route: Route, known: Known, root: str) -> bool:
    methods = set(route.methods)
    if methods and known.methods is not None and not methods & known.methods:
        return False
    forms = {route.template, below(root, route.template)}
    return any(could_meet(Template(form).parts, known.parts) for form in forms)


def _of_starlette(
    routes: Sequence[Any], before: Parts, text: str, outer: Sequence[Limited], depth: int = 0
) -> Iterator[Known]:
    for route in routes:
        if included := getattr(route, "effective_route_contexts", None):  # a router in FastAPI
            contexts = [getattr(one, "starlette_route", None) or one for one in included()]
            yield from _of_starlette(contexts, before, text, outer, depth + 1)
            continue
        path, inner = getattr(route, "path", None), getattr(route, "routes", None)
        is_leaf = hasattr(route, "endpoint")
        limits = outer if is_leaf else (*outer, *around(getattr(route, "app", None)))
        if path is None:  # by host, or of the app's own kind
            yield Known(f"{text}/…", (*before, REST), None, of_starlette(route, limits))
            continue
        parts = (*before, *_parts(path, _BRACED, _OF_STARLETTE))
        if inner and depth < DEEP:
            yield from _of_starlette(inner, parts, text + path, limits, depth + 1)
        elif not is_leaf:  # another app is mounted there
            yield Known(f"{text}{path}/…", (*parts, REST), None, of_starlette(route, limits))
        else:
            yield Known(text + path, parts, _methods(route), of_starlette(route, limits))


def _of_flask(app: Any, rule: Any) -> Known:
    parts = _parts(rule.rule, _ANGLED, _OF_FLASK)
    return Known(str(rule.rule), parts, _methods(rule), of_flask(app, rule))


def _of_django(
    patterns: Sequence[Any], before: Parts, text: str, outer: Sequence[Limited]
) -> Iterator[Known]:
    for one in patterns:
        written = str(one.pattern)
        is_path = hasattr(one.pattern, "_route")  # else it is a regular expression, or a language
        parts = (*before, *(_parts(written, _ANGLED, _OF_DJANGO) if is_path else (REST,)))
        limits = (*outer, *getattr(one, "declarations", ()))
        if hasattr(one, "url_patterns"):
            yield from _of_django(one.url_patterns, parts, text + written, limits)
        else:
            endpoint = of_django(one.callback, limits)
            yield Known(f"/{text}{written}", parts, None, endpoint)


def _parts(path: str, field: re.Pattern[str], plain: Sequence[str]) -> Parts:
    """Return the parts. `plain` names the kinds of fields that span no slash."""
    parts: list[tuple[str, ...] | None] = []
    for part in filter(None, path.split("/")):
        kinds = [found.partition("(")[0] for found in field.findall(part)]
        parts.append(_pieces(part, field) if all(kind in plain for kind in kinds) else REST)
    return tuple(parts)


def _pieces(part: str, field: re.Pattern[str]) -> tuple[str, ...]:
    """Return the texts around the fields of a part."""
    texts, at = [], 0
    for found in field.finditer(part):
        texts.append(part[at : found.start()])
        at = found.end()
    return (*texts, part[at:])


def _methods(route: Any) -> frozenset[str] | None:
    methods = getattr(route, "methods", None)
    return frozenset(methods) if methods else None
