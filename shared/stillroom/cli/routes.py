"""`stillroom routes`: which limits a path has, by tables and by the views it may come to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import typer

from stillroom.cli.application import App, apps_of
from stillroom.cli.check_limits import InApp, in_app
from stillroom.cli.tables import AsJson, Table, print_json, print_table
from stillroom.errors import SettingsError
from stillroom.limits import Limit, Routes
from stillroom.limits.changes import write_rate
from stillroom.limits.routes import Counted
from stillroom.settings import Settings
from stillroom.web.carriers import METHODS, Carried, default_of
from stillroom.web.known_routes import Known, fits

COLUMNS = ("in", "view", "methods", "path", "limits", "cost", "counts")
OTHERS = "all others"

Path = Annotated[
    str | None, typer.Argument(help="Show only the limits of this path, such as /login.")
]
Method = Annotated[str, typer.Option(help="The method of the request for the path.")]


def routes(
    path: Path = None, method: Method = "GET", app: App = None, as_json: AsJson = False
) -> None:
    """Show the limits of tables and those that views carry, or what one path has. The app's modules are imported.

    A request is charged by both: by the table, and by the view it comes to. For one path each view is listed that
    may answer it.
    """
    specs = app or list(Settings().loaders)
    if not specs:
        raise SettingsError("say where the app is: --app shop.web:app, or STILLROOM_LOADERS")
    if path is not None and not path.startswith("/"):
        raise SettingsError(f"{path!r}: a path begins with /; did you mean /{path}?")
    found = in_app(apps_of(specs))
    rows = list(_rows(found, path, method.upper()))
    if not rows:
        raise SettingsError(_why_none(found, ", ".join(specs), path, method.upper()))
    if as_json:
        print_json(rows)
        return
    printed = Table(*COLUMNS)
    for row in rows:
        limits = ", ".join(_limit(one) for one in row["limits"])
        named = limits or (f"what {row['limits_of']} says" if row["limits_of"] else "none")
        methods = " ".join(row["methods"]) or "all"
        counts = row["counts"] + (f", unless {row['exempt_when']}" if row["exempt_when"] else "")
        words = (row["table"], row["view"] or "", methods, row["path"], named, row["cost"], counts)
        printed.add_row(*map(str, words))
    print_table(printed)


def _why_none(app: InApp, where: str, path: str | None, method: str) -> str:
    """Return why there is nothing to show: no limits at all, or none of a request that has this path."""
    if path is None or not any(_rows(app, None, method)):
        return f"there is no Routes in {where}, nor an app with one or with limits on views"
    others = ", ".join(one for one in METHODS if one != method and any(_rows(app, path, one)))
    return f"no route of {where} takes {method} {path}{f'; one takes {others}' if others else ''}"


def _rows(app: InApp, path: str | None, method: str) -> Iterator[dict[str, Any]]:
    for name, table in app.tables.items():
        yield from _of_table(name, table, path, method)
    for name, one, known in app.apps:
        found = [route for route in known if path is None or fits(route, method, path)]
        default = default_of(one)
        if not default and not any(route.carries for route in known):
            continue
        for route in found:
            yield from _of_view(name, route, None if path is None else method)
        if default and not any(route.carries for route in found if path is not None):
            limits = [_as_json(limit) for limit in default]
            yield _row(name, OTHERS, limits, view="default")


def _of_table(name: str, table: Routes, path: str | None, method: str) -> Iterator[dict[str, Any]]:
    for route in [*table.routes, table.default] if path is None else [table.find(method, path)]:
        text = OTHERS if route is table.default else route.template
        limits = [_as_json(limit) for limit in route.limits]
        counts = _counts(route.count)
        yield _row(name, text, limits, methods=list(route.methods), cost=route.cost, counts=counts)


def _of_view(name: str, known: Known, method: str | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each declaration. For one path a view that carries none is a row, too: it may be the one."""
    carries = [one for one in known.carries if method is None or one.takes(method)]
    for one in carries:
        yield _of_declaration(name, known, one)
    if not carries and method is not None:
        methods = sorted(known.methods or ())
        yield _row(name, known.text, [], view=known.endpoint.name, methods=methods)


def _of_declaration(name: str, known: Known, one: Carried) -> dict[str, Any]:
    limits = [_as_json(replace(limit, by=one.by(limit))) for limit in one.limits or ()]
    declaration = one.declaration
    given = declaration.limits
    return _row(
        name,
        known.text,
        limits,
        view=known.endpoint.name,
        methods=sorted(one.methods or ()),
        cost=declaration.cost if isinstance(declaration.cost, int) else _named(declaration.cost),
        counts=_counts(declaration.count),
        limits_of=None if isinstance(given, tuple) else _named(given),
        exempt_when=declaration.exempt_when and _named(declaration.exempt_when),
    )


def _row(
    name: str,
    path: str,
    limits: list[dict[str, Any]],
    *,
    view: str | None = None,
    methods: list[str] | tuple[str, ...] = (),
    cost: int | str = 1,
    counts: str = "all",
    limits_of: str | None = None,
    exempt_when: str | None = None,
) -> dict[str, Any]:
    """Return what is said of one route, with all fields. `name` is that of the table, or of the view's app."""
    return {
        "table": name,
        "view": view,
        "methods": list(methods),
        "path": path,
        "limits": limits,
        "limits_of": limits_of,
        "cost": cost,
        "counts": counts,
        "exempt_when": exempt_when,
    }


def _counts(count: Counted) -> str:
    return count if isinstance(count, str) else "a function of the answer"


def _named(function: Any) -> str:
    """Return the name of a function of the request."""
    return str(getattr(function, "__name__", type(function).__name__))


def _as_json(limit: Limit) -> dict[str, Any]:
    names = ("name", "quota", "window", "by", "away", "shadow")
    return {name: getattr(limit, name) for name in names}


def _limit(limit: dict[str, Any]) -> str:
    shadow = " in shadow" if limit["shadow"] else ""
    return f"{limit['name']} {write_rate(limit['quota'], limit['window'])} by {limit['by']}{shadow}"
