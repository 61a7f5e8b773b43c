"""The README's and the wire page's examples run, and send the commands that they print."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from shop.demo.recorder import QUIET, Recorder
from stillroom.embedded import EmbeddedServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WIRE = (ROOT / "docs/wire.md").read_text(encoding="utf-8")
HOME = "https://github.com/stillroom/stillroom"
SENT = "# => "


class Product(BaseModel):
    id: int
    name: str
    brand: str = "acme"


class Database:
    def fetch_product(self, id: int) -> Product:
        return Product(id=id, name="Plum jam")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def statements(block: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each statement with the commands that are printed behind it."""
    lines = block.splitlines()
    starts = [_first_line(node) for node in ast.parse(block).body]
    for first, following in zip(starts, [*starts[1:], len(lines) + 1], strict=True):
        section = lines[first - 1 : following - 1]
        yield (
            "\n".join(section),
            [
                line.removeprefix(SENT)
                for line in section
                if line.startswith(SENT) and _is_heard(line)
            ],
        )


def _is_heard(line: str) -> bool:
    """Leave out TIME, which any batch may carry now and then."""
    return line.removeprefix(SENT) not in QUIET


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def matches(sent: str, claimed: str) -> bool:
    sent = re.sub(
        r"^\d+ x ", "", sent
    )  # a script's first call is sent twice: once to find it missing
    begins, cut, _ = claimed.partition(" …")
    return sent.startswith(begins) if cut else sent == claimed


@pytest.mark.parametrize(("page", "commands"), [(README, 0), (WIRE, 17)], ids=["README", "wire"])
def test_the_python_examples_run_and_send_what_they_say(
    monkeypatch: pytest.MonkeyPatch, page: str, commands: int
) -> None:
    """Every statement runs, in order, on a real server; every printed command was sent, and no other."""
    with EmbeddedServer() as server, Recorder(server.url) as recorder:
        monkeypatch.setenv("REDIS_URL", server.url)
        names: dict[str, Any] = {
            "Product": Product,
            "product": Product(id=7, name="Plum jam"),
            "db": Database(),
            "fetch_rates": lambda: {"EUR": 1.0},
        }
        checked = 0
        for block in blocks("python", page):
            for source, claimed in statements(block):
                recorder.commands()
                exec(compile(source, "page.md", "exec", dont_inherit=True), names)
                if claimed:
                    sent = recorder.commands()
                    assert len(sent) == len(claimed), (source, sent)
                    assert all(map(matches, sent, claimed)), (source, sent)
                    checked += len(claimed)
        assert checked >= commands
        names["room"].close()


def test_its_links_are_absolute_and_lead_somewhere() -> None:
    """Every link works from anywhere, and those to the project's own pages lead to files that are there."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 12
    assert [link for link in links if not link.startswith("https://")] == []
    raw = HOME.replace("github.com", "raw.githubusercontent.com")
    for link in links:
        path = re.sub(rf"^({HOME}/(blob|tree)|{raw})/main/", "", link)
        assert link.startswith((HOME, raw)), link
        assert (ROOT / path).exists(), link
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Source"] == HOME
    assert all(url.startswith("https://") for url in urls.values())


def test_its_commands_exist() -> None:
    """Each make target, each extra and each Celery app that the README names is there."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"[`$ ]make ([a-z]+)(?=`| {2})", README)) <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(re.findall(r"stillroom\[([a-z,]+)\]", README.replace(",", "],stillroom["))) <= set(
        extras
    )
    find = "from celery.app.utils import find_app; print(find_app('stillroom_workers').main)"
    found = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, check=True)
    assert found.stdout == "stillroom\n"
    assert set(re.findall(r"-A (\w+)", README)) == {"stillroom_workers"}


def test_it_is_short() -> None:
    """The README is two screens, not a reference book."""
    assert len(README.splitlines()) <= 90
