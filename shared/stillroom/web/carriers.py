"""Reads which limits the endpoints of an app carry, for `stillroom check` and `stillroom routes`.

Nothing of the app is called, and no framework is imported: whoever has no Flask needs none.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, get_args

from stillroom.cache.cached import UNCACHED
from stillroom.limits import Limit
from stillroom.web.limited import Limited, carried, is_exempt, kind_of
from stillroom.within import noted_within

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
FLASK_EXTENSION = "stillroom.limits"  # in app.extensions
_BELOW = "put it below @app.route, which takes what it finds there"
LOST = f"has a @limited that the app does not know, so it limits nothing: {_BELOW}"
UNASKED = f"has a @fresh that the app does not know, so it asks nobody: {_BELOW}"
GUARD = "__stillroom_guard__"  # on what is meant for Depends(…): how it is written
MAKES_GUARD = "__stillroom_makes_guard__"  # on what returns that, and is none itself
WEBSOCKET = frozenset({"WEBSOCKET"})
CHARGES = "charges_endpoints"  # on a middleware of ASGI apps
DEEP = 20  # apps within apps, functions within functions
WRAPPED = 4  # of which so many may be middlewares that keep the next one under a name of their own


class Carried(NamedTuple):
    """Hold a declaration of limits, and the methods that it is charged for."""

    declaration: Limited
    methods: frozenset[str] | None  # None: any

    @property
    def limits(self) -> tuple[Limit, ...] | None:
        """Return the limits, with the kinds of subjects they count here. None: a function of the request names
        them.
        """
        given = self.declaration.limits
        return given if isinstance(given, tuple) else None

    def by(self, limit: Limit) -> str:
        """Return the kind of subjects that a limit counts here."""
        by = self.declaration.by
        if by is None:
            return limit.by
        return by if isinstance(by, str) else kind_of(by)

    def takes(self, method: str) -> bool:
        """Return whether the carrier is called with this method. `method`: in capitals."""
        wanted = "GET" if method == "HEAD" else method
        return self.methods is None or wanted in self.methods


class Endpoint(NamedTuple):
    """Hold the name of what answers a route, and the limits that it carries: the outermost first."""

    name: str = ""
    carries: tuple[Carried, ...] = ()
    lost: str = ""  # why what guards it is not in the app, such as LOST


def layers(app: object) -> Iterator[Any]:
    """Yield the app and the apps that it wraps, as far as they can be seen."""
    seen = getattr(app, "__self__", app)  # app.wsgi_app is a method of the app
    for _ in range(DEEP):
        yield seen
        inner = _wrapped(seen)
        if inner is None or inner is seen or hasattr(seen, "mounts"):  # several apps side by side
            return
        seen = getattr(inner, "__self__", inner)


def shows_routes(app: object) -> bool:
    """Return whether this is an app of Starlette, FastAPI, Flask or Django, whose routes can be seen."""
    routes, rules = getattr(app, "routes", None), getattr(app, "url_map", None)
    return isinstance(routes, Sequence) or hasattr(rules, "iter_rules") or is_django(app)


def _wrapped(layer: object) -> Any:
    """Return the app that a layer wraps. A middleware may keep it under any name, and a function in a closure."""
    inner = getattr(layer, "app", None)
    if inner is not None or shows_routes(layer):
        return inner
    seen: dict[tuple[int, int], Any] = {}
    return next((one for one in held(layer) if _leads_to_routes(one, WRAPPED, seen)), None)


def _leads_to_routes(thing: Any, depth: int, seen: dict[tuple[int, int], Any]) -> bool:
    """Return whether an app is found from here. `seen`: what has led nowhere, by its id and depth.

    Without it thirty functions that know each other would be followed along a million ways.
    """
    if (id(thing), depth) in seen:
        return False
    seen[id(thing), depth] = thing  # kept, so that nothing else gets its id
    with suppress(Exception):  # an object that makes up attributes, or a proxy of nothing
        thing = getattr(thing, "__self__", thing)
        if not callable(thing) or isinstance(thing, type):
            return False
        inner = (getattr(thing, "app", None), *held(thing)) if depth else ()
        return shows_routes(thing) or any(_leads_to_routes(one, depth - 1, seen) for one in inner)
    return False


def held(layer: object) -> list[Any]:
    """Return what an object, or the closure of a function, holds."""
    found = list(getattr(layer, "__dict__", {}).values())
    for cell in getattr(layer, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty
            found.append(cell.cell_contents)
    return found


def around(app: object) -> tuple[Limited, ...]:
    """Return the limits around a whole ASGI app: of its layers, and of the middleware that it will be made of."""
    found: list[Limited] = []
    for layer in layers(app):
        found += carried(layer)
        for middleware in getattr(layer, "user_middleware", ()):
            found += carried(getattr(middleware, "cls", None))
    return tuple(found)


def charges(app: object) -> bool:
    """Return whether the app has what charges the limits of its endpoints: an extension, or a middleware."""
    for layer in layers(app):
        if hasattr(layer, "url_map"):
            return FLASK_EXTENSION in getattr(layer, "extensions", ())
        if is_django(layer):
            return bool(django_limits())
        made_of = [getattr(one, "cls", None) for one in getattr(layer, "user_middleware", ())]
        if any(getattr(one, CHARGES, False) for one in (layer, *made_of)):
            return True
    return False


def default_of(app: object) -> tuple[Limit, ...]:
    """Return the limits of the endpoints that carry none."""
    for layer in layers(app):
        if hasattr(layer, "url_map"):
            extension = getattr(layer, "extensions", {}).get(FLASK_EXTENSION)
            return extension.default if extension is not None else ()
        if is_django(layer):
            return tuple([limit for one in django_limits() for limit in one.default])
    return ()


# Flask


def of_flask(app: Any, rule: Any) -> Endpoint:
    """Return the endpoint of a rule of Flask: see flask_limits.py, which charges the same."""
    view = app.view_functions.get(rule.endpoint)
    names = str(rule.endpoint).split(".")[:-1]
    blueprints = [app.blueprints.get(".".join(names[: n + 1])) for n in range(len(names))]
    kind = getattr(view, "view_class", None)
    return _endpoint(rule.endpoint, view, [*blueprints, kind, view], kind, _methods(rule))


def lost_views(app: Any, why: str = LOST) -> list[str]:
    """Return the views that are in an app of Flask without what was put around them.

    `why`: LOST, UNASKED or UNCACHED.
    """
    views = getattr(app, "view_functions", {})
    return [name for name, view in views.items() if noted_within(view) == why]


# Django


def of_django(view: Any, outer: Sequence[Limited]) -> Endpoint:
    """Return the endpoint of a URL pattern. `outer`: the limits of the URLs that lead to it."""
    kind, named = _class_of(view), _actions_of(view)
    methods = _allowed(view) if kind is None else frozenset(named) or _methods_of(kind)
    name = f"{view.__module__}.{getattr(kind or view, '__qualname__', type(view).__name__)}"
    return _endpoint(name, view, [view], kind, methods, outer, named)


def carried_in_django(view: Any, method: str) -> tuple[Limited, ...]:
    """Return the limits of a view, and of the method of its class that answers."""
    kind = _class_of(view)
    if kind is None:
        return carried(view)
    wanted = "GET" if method == "HEAD" else method
    handler = getattr(kind, _actions_of(view).get(wanted, wanted.lower()), None)
    return (*carried(view), *carried(handler))


def _class_of(view: Any) -> Any:
    return getattr(view, "view_class", None) or getattr(view, "cls", None)


def _actions_of(view: Any) -> dict[str, str]:
    """Return which methods call which actions, in a set of views of REST framework."""
    actions = getattr(view, "actions", None) or {}
    return {method.upper(): name for method, name in actions.items()}


def django_limits() -> list[Any]:
    """Return the middlewares of Django's settings that charge limits."""
    from django.conf import settings
    from django.utils.module_loading import import_string

    from stillroom.web.django.limits import LimitsMiddleware

    others = [path for path in settings.MIDDLEWARE if not path.startswith("django.")]
    found = [import_string(path) for path in others]
    return [one for one in found if isinstance(one, type) and issubclass(one, LimitsMiddleware)]


def is_django(app: object) -> bool:
    handlers = sys.modules.get("django.core.handlers.base")
    return handlers is not None and isinstance(app, handlers.BaseHandler)


def _allowed(view: Any) -> frozenset[str] | None:
    """Return the methods that Django's require_http_methods lets through to a function."""
    for _ in range(DEEP):
        cells = inspect.getclosurevars(view).nonlocals if inspect.isfunction(view) else {}
        if "request_method_list" in cells:
            return frozenset(cells["request_method_list"])
        view = getattr(view, "__wrapped__", None)
    return None


# Starlette and FastAPI


def of_starlette(route: Any, outer: Sequence[Limited]) -> Endpoint:
    """Return the endpoint of a route. `outer`: the limits around the apps that lead to it."""
    view = getattr(route, "endpoint", None)
    kind = view if isinstance(view, type) else None
    methods = _methods(route) or (_methods_of(kind) if kind else None)
    if "websocket" in type(route).__name__.lower():
        methods = WEBSOCKET
    dependant = getattr(route, "dependant", None)
    carriers = [*[one.call for one in _dependencies(dependant, 0)], view]
    name = f"{getattr(view, '__module__', '')}.{getattr(view, '__qualname__', type(view).__name__)}"
    found = _endpoint(name, view, carriers, kind, methods)
    carries = (*[Carried(one, methods) for one in outer], *found.carries)
    noted = noted_within(view)
    lost = noted if noted in (LOST, UNCACHED) else _undepended(dependant)
    return found._replace(carries=carries, lost=lost)


def _dependencies(dependant: Any, depth: int) -> Iterator[Any]:
    for one in getattr(dependant, "dependencies", ()) if depth < DEEP else ():
        yield one
        yield from _dependencies(one, depth + 1)


def _undepended(dependant: Any) -> str:
    """Return what is wrong with an endpoint of FastAPI that takes a guard of ours as an ordinary parameter."""
    for one in (dependant, *_dependencies(dependant, 0)):
        if (guard := getattr(getattr(one, "call", None), MAKES_GUARD, None)) is not None:
            return f"depends on what makes a guard, so it guards nothing: write Depends({guard})"
        for field in (*getattr(one, "query_params", ()), *getattr(one, "body_params", ())):
            said = field.field_info
            for given in (said.default, *said.metadata, *get_args(said.annotation)):
                if (guard := getattr(given, GUARD, None)) is not None:
                    return f"takes {guard} without Depends, so it guards nothing: write Depends({guard})"
    return ""


# Shared by the frameworks


def _endpoint(
    name: str,
    view: Any,
    carriers: Iterable[Any],
    kind: type | None,
    methods: frozenset[str] | None,
    outer: Sequence[Limited] = (),
    named: dict[str, str] | None = None,
) -> Endpoint:
    """Return an endpoint, with what its carriers declare for all methods, and the methods of its class for one."""
    if is_exempt(view):
        outer, carriers = (), [one for one in carriers if one is view or one is kind]
    whole = [*outer, *[one for carrier in carriers for one in carried(carrier)]]
    found = [Carried(one, methods) for one in dict.fromkeys(whole)]
    for method in METHODS if kind is not None else ():
        handler = getattr(kind, (named or {}).get(method, method.lower()), None)
        if methods is None or method in methods:
            found += [Carried(one, frozenset([method])) for one in carried(handler)]
    return Endpoint(name, tuple(found))


def _methods(route: Any) -> frozenset[str] | None:
    """Return the methods that a route names. Each framework answers OPTIONS by itself."""
    methods = getattr(route, "methods", None)
    return frozenset(methods) - {"HEAD", "OPTIONS"} or frozenset(methods) if methods else None


def _methods_of(kind: type) -> frozenset[str] | None:
    """Return the methods that a class of views answers. None: it answers in a way of its own."""
    allowed = getattr(kind, "http_method_names", None) or [one.lower() for one in METHODS]
    named = [one for one in METHODS[:-2] if one.lower() in allowed and hasattr(kind, one.lower())]
    return frozenset(named) or None


def looking(carried: Carried, name: str) -> bool:
    """Return whether a limit of this name counts all who only look: each GET, whatever its answer."""
    declaration = carried.declaration
    names = [limit.name for limit in carried.limits or ()]
    says_when = callable(declaration.cost) or declaration.exempt_when is not None
    return name in names and carried.takes("GET") and declaration.count == "all" and not says_when
