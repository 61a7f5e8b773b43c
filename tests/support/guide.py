"""Make the files of the code blocks on a page of the docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.support.processes import run_to_end

DOCS = Path(__file__).parent.parent.parent / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"(?:#|<!--) ([\w/]+\.(?:py|html))\b")


def blocks(page: str, language: str = "python") -> list[str]:
    """Return all blocks of a language on a page, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [code for kind, code in _BLOCK.findall(text) if kind == language]


def files(page: str) -> dict[str, str]:
    """Return the blocks by the file name in their first line. A block without one is a mistake."""
    found: dict[str, str] = {}
    for code in [*blocks(page), *blocks(page, "html")]:
        name = _NAME.match(code)
        assert name is not None, f"{page}: a block does not say which file it is:\n{code}"
        found[name[1]] = found.get(name[1], "") + code
    assert found, page
    return found


def write_files(page: str, folder: Path, **more: str) -> None:
    """Write the files of a page into a folder; `more` has what the page leaves out, by name without `.py`."""
    for name, code in {
        **files(page),
        **{f"{name}.py": code for name, code in more.items()},
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")


def run_pytest(folder: Path) -> str:
    """Run the tests in a folder as somebody else would; return what pytest said."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:valkey"]
    command += ["-p", "no:cacheprovider", "-p", "no:celery", "-p", "no:docker_tools", str(folder)]
    done = run_to_end(command, cwd=folder)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said
