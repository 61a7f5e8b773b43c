"""Run the type checkers on every Python block of README and docs. `make check` does; it exits with what they say.

The blocks of a tour follow each other, as a reader types them; elsewhere each stands for itself. What an example
takes from its app is declared in PRELUDE.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TOURS = {"README.md"}
PRELUDE = """\
from typing import Any
from pydantic import BaseModel

class Product(BaseModel):
    id: int
    brand: str = ""

class Database:
    def fetch_product(self, id: int) -> Product: ...

db = Database()
product = Product(id=7)
def fetch_rates() -> dict[str, float]: ...
"""
# An example need not declare what its functions take: the library's own types are what is looked at.
MYPY = (
    *("--allow-untyped-defs", "--allow-incomplete-defs", "--allow-untyped-calls"),
    *("--allow-untyped-decorators", "--disable-error-code=empty-body", "--no-warn-unused-ignores"),
    "--disable-error-code=method-assign",  # app.wsgi_app = … is how Flask is wrapped
)


def blocks(document: Path) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def programs() -> dict[str, str]:
    """The programs that the documents are made of, by a name that leads back to them."""
    found: dict[str, str] = {}
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        name = re.sub(r"\W", "_", str(document.relative_to(ROOT)))
        pieces = blocks(document)
        if document.name in TOURS:
            pieces = [PRELUDE + "\n".join(pieces)]
        found |= {f"{name}_{number}.py": piece for number, piece in enumerate(pieces, 1)}
    return found


def main() -> int:
    with tempfile.TemporaryDirectory(dir=ROOT, prefix="documents-") as folder:
        paths = []
        for name, program in programs().items():
            path = Path(folder, name)
            path.write_text(program, encoding="utf-8")
            paths.append(str(path.relative_to(ROOT)))
        checks = [
            [sys.executable, "-m", "mypy", *MYPY, *paths],
            [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *paths],
        ]
        return max(subprocess.run(check, cwd=ROOT, check=False).returncode for check in checks)


if __name__ == "__main__":
    sys.exit(main())
