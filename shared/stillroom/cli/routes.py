"""`stillroom routes`: which limits a path has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from stillroom.cli.application import apps_of, tables_in
from stillroom.cli.tables import Table, print_table
from stillroom.errors import SettingsError
from stillroom.limits import Limit, Route, Routes
from stillroom.limits.changes import write_rate
from stillroom.settings import Settings

COLUMNS = ("table", "methods", "path", "limits", "cost", "counts")

Path = Annotated[str | None, typer.Argument(help="Only what this path has: /login")]
App = Annotated[
    list[str] | None,
    typer.Option(
        "--app", help="Where the app or its Routes is: shop.web:app. Default: STILLROOM_LOADERS."
    ),
]
Method = Annotated[str, typer.Option(help="Of the request for the path.")]
AsJson = Annotated[bool, typer.Option("--json", help="As one JSON document.")]


def routes(
    path: Path = None, method: Method = "GET", app: App = None, as_json: AsJson = False
) -> None:
    """Show the tables of limits by path, or what one path has. The app's modules are imported for it.

    What views carry themselves (`limited`) is not in a table, and comes on top.
    """
    specs = app or list(Settings().loaders)
    if not specs:
        raise SettingsError("say where the app is: --app shop.web:app, or STILLROOM_LOADERS")
    tables = tables_in(apps_of(specs))
    if not tables:
        raise SettingsError(f"there is no Routes in {', '.join(specs)}, nor an app with one")
    rows = [row for name, table in tables.items() for row in _rows(name, table, path, method)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    printed = Table(*COLUMNS)
    for row in rows:
        limits = ", ".join(_limit(one) for one in row["limits"]) or "none"
        methods = " ".join(row["methods"]) or "all"
        printed.add_row(row["table"], methods, row["path"], limits, str(row["cost"]), row["counts"])
    print_table(printed)


def _rows(name: str, table: Routes, path: str | None, method: str) -> Iterator[dict[str, Any]]:
    found = [*table.routes, table.default] if path is None else [table.find(method, path)]
    for route in found:
        yield {
            "table": name,
            "methods": list(route.methods),
            "path": "all others" if route is table.default else route.template,
            "limits": [_as_json(limit) for limit in route.limits],
            "cost": route.cost,
            "counts": _counts(route),
        }


def _counts(route: Route) -> str:
    return route.count if isinstance(route.count, str) else "a function of the answer"


def _as_json(limit: Limit) -> dict[str, Any]:
    names = ("name", "quota", "window", "by", "away", "shadow")
    return {name: getattr(limit, name) for name in names}


def _limit(limit: dict[str, Any]) -> str:
    shadow = " in shadow" if limit["shadow"] else ""
    return f"{limit['name']} {write_rate(limit['quota'], limit['window'])} by {limit['by']}{shadow}"
