"""Configures `make docs`: reference.py makes the reference first, then Sphinx reads the Markdown pages."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import reference  # noqa: E402  # beside this file
from sphinx import addnodes  # noqa: E402

project = "Stillroom"
release = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["version"]
version = release
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Stillroom {release}"
html_extra_path = ["llms.txt"]
html_copy_source = True

myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]

# Docstrings are plain text with names in backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 100


def setup(app: Any) -> None:
    """Make the reference before Sphinx looks which pages there are."""
    reference.write(DOCS / "reference")
    app.connect("env-updated", leave_decisions_to_their_page)


def leave_decisions_to_their_page(_: Any, env: Any) -> None:
    """Keep more than a hundred decisions out of each page's navigation. They are listed on a page of their own."""
    for listed in [*env.tocs["decisions/index"].findall(addnodes.toctree)]:
        listed.parent.remove(listed)
