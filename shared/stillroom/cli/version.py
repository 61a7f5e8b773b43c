"""`stillroom --version`: of Stillroom, and of what it stands on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from stillroom.cli.tables import print_json

BESIDE = ("redis", "hiredis", "celery", "kombu", "pydantic", "flower", "opentelemetry-api")

Version = Annotated[
    bool, typer.Option("--version", help="Print the versions of Stillroom and of what it needs.")
]
AsJson = Annotated[bool, typer.Option("--json", help="With --version: print one JSON document.")]


def version(context: typer.Context, version: Version = False, as_json: AsJson = False) -> None:
    """The Redis services a web app shares, and the workers that keep them fresh."""
    if version:
        found = versions()
        print_json(found) if as_json else typer.echo(_line(found))
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def versions() -> dict[str, str]:
    """Return package → version of the installed packages."""
    found = {"stillroom": _version_of("stillroom"), "python": platform.python_version()}
    found |= {name: _version_of(name) for name in BESIDE}
    return {name: number for name, number in found.items() if number}


def _version_of(name: str) -> str:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return ""


def _line(found: dict[str, str]) -> str:
    """Return the versions as one line.

    >>> _line({"stillroom": "0.2", "python": "3.11", "redis": "8.1"})
    'stillroom 0.2 (python 3.11, redis 8.1)'
    """
    (name, number), *beside = found.items()
    return f"{name} {number} ({', '.join(' '.join(one) for one in beside)})"
