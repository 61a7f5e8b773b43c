"""`stillroom docs`: the documentation of the version that is installed, as text."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from stillroom.cli.tables import AsJson, print_json
from stillroom.errors import StillroomError, did_you_mean

PAGE = ".md"


class NoPage(StillroomError, LookupError):
    """There is no such page; the message names one that is spelled alike."""


def docs(
    page: Annotated[
        str | None,
        typer.Argument(help="A page, such as howto/tags. Without it: the list of pages."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a page of the documentation, or the list of all pages."""
    folder = next(found for found in _folders() if (found / "llms.txt").is_file())
    pages = dict(_pages(folder))
    if page is None:
        overview = (folder / "llms.txt").read_text(encoding="utf-8")
        print_json(sorted(pages)) if as_json else typer.echo(overview)
        return
    name = page.removesuffix(PAGE)
    if name not in pages:
        raise NoPage(f"there is no page {page!r}{did_you_mean(page, pages)}")
    text = pages[name].read_text(encoding="utf-8")
    print_json({"page": name, "text": text}) if as_json else typer.echo(text)


def _folders() -> Iterator[Traversable]:
    """Yield where the pages may be: beside the modules, perhaps in a zip, or beside the roots of a checkout."""
    yield files("stillroom") / "docs"
    yield Path(__file__).parents[3] / "docs"


def _pages(folder: Traversable, before: str = "") -> Iterator[tuple[str, Traversable]]:
    """Yield each page with its name, and those of the folders below."""
    for one in folder.iterdir():
        if one.is_dir():
            yield from _pages(one, f"{before}{one.name}/")
        elif one.name.endswith(PAGE):
            yield before + one.name.removesuffix(PAGE), one
