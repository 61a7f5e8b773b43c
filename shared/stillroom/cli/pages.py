"""`stillroom docs`: the documentation of the version that is installed, as text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillroom.cli.tables import AsJson, print_json
from stillroom.errors import StillroomError, did_you_mean

# In a wheel the pages are beside the package's modules, in a checkout beside the source roots.
_FOLDERS = (Path(__file__).parents[1] / "docs", Path(__file__).parents[3] / "docs")


class NoPage(StillroomError, LookupError):
    """There is no such page; the message names one that is spelled alike."""


def docs(
    page: Annotated[
        str | None, typer.Argument(help="A page, such as howto/tags; none: their list.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a page of the documentation, or the list of all pages."""
    folder = next(found for found in _FOLDERS if (found / "llms.txt").is_file())
    pages = {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.md")
    }
    if page is None:
        overview = (folder / "llms.txt").read_text(encoding="utf-8")
        print_json(sorted(pages)) if as_json else typer.echo(overview)
        return
    name = page.removesuffix(".md")
    if name not in pages:
        raise NoPage(f"there is no page {page!r}{did_you_mean(page, pages)}")
    text = pages[name].read_text(encoding="utf-8")
    print_json({"page": name, "text": text}) if as_json else typer.echo(text)
