"""`stillroom docs`: the documentation of the version that is installed, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from stillroom.cli.tables import AsJson, print_json
from stillroom.errors import StillroomError, did_you_mean

PAGE = ".md"
MENTIONS = 6  # at most so many pages are named where a word is none


class NoPage(StillroomError, LookupError):
    """There is no such page; the message names one that is spelled alike, or those that mention it."""


def docs(
    page: Annotated[
        str | None,
        typer.Argument(help="A page, such as howto/tags or tags. Without it: the list of pages."),
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
    name = _meant(page.removesuffix(PAGE), pages)
    text = pages[name].read_text(encoding="utf-8")
    print_json({"page": name, "text": text}) if as_json else typer.echo(text)


def _meant(name: str, pages: Mapping[str, Traversable]) -> str:
    """Return the page of this name, which may lack its folder. Raise NoPage, which says where to look."""
    found = [name] if name in pages else sorted(page for page in pages if name in page.split("/"))
    if len(found) == 1:
        return found[0]
    if found:
        raise NoPage(f"{name!r} stands for several pages: {', '.join(found)}")
    hint = did_you_mean(name, pages, cutoff=0.8)
    if not hint and (mentions := _mentions(name, pages)):
        hint = f"; these mention it: {', '.join(mentions)}"
    raise NoPage(f"there is no page {name!r}{hint}")


def _mentions(word: str, pages: Mapping[str, Traversable]) -> list[str]:
    """Return the pages that have a word most often, guides before decisions."""
    counts = {
        name: page.read_text(encoding="utf-8").lower().count(word.lower())
        for name, page in pages.items()
    }
    found = [name for name, count in counts.items() if count]
    found.sort(key=lambda name: (name.startswith("decisions/"), -counts[name], name))
    return found[:MENTIONS]


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
