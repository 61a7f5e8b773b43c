"""What Stillroom promises, as the sentences of its tests: `make spec`; ARGS=sessions: those of some files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


def sentences(file: Path) -> Iterator[str]:
    """Yield the first paragraph of each test's docstring, on one line."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for group in (node for node in body if isinstance(node, ast.ClassDef)):
        body = [*body, *group.body]
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
            "test"
        ):
            said = ast.get_docstring(node) or ""
            yield " ".join(said.partition("\n\n")[0].split())


def headline(file: Path) -> str:
    """Return what a file of tests is about: the first line of its docstring."""
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or file.stem
    return said.splitlines()[0].rstrip(".")


def main(words: list[str]) -> None:
    for file in sorted(HERE.rglob("test_*.py")):
        where = file.relative_to(HERE).as_posix()
        if all(word in where for word in words):
            print(f"\n{headline(file)}  ({where})")
            print("\n".join(f"  - {sentence}" for sentence in sentences(file)))


if __name__ == "__main__":
    main(sys.argv[1:])
