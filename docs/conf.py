"""Configures `make docs`: reference.py makes the reference first, then Sphinx reads the Markdown pages."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import reference  # noqa: E402  # beside this file

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


def setup(_: Any) -> None:
    """Make the reference before Sphinx looks which pages there are."""
    reference.write(DOCS / "reference")
