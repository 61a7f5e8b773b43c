"""The README's examples run, and say to Redis what they claim to say."""

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

from stillroom import Settings
from stillroom.cli.recorder import Recorder
from stillroom.embedded import EmbeddedServer
from stillroom.settings import environment_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SENT = "# => "


class Product(BaseModel):
    id: int
    name: str
    brand: str = "acme"


class Database:
    def fetch_product(self, id: int) -> Product:
        return Product(id=id, name="Plum jam")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def statements(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each statement with the commands that are printed behind it."""
    lines = block.splitlines()
    starts = [_first_line(node) for node in ast.parse(block).body]
    for first, following in zip(starts, [*starts[1:], len(lines) + 1], strict=True):
        section = lines[first - 1 : following - 1]
        yield (
            "\n".join(section),
            [line.removeprefix(SENT) for line in section if line.startswith(SENT)],
        )


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def matches(sent: str, claimed: str) -> bool:
    sent = re.sub(
        r"^\d+ x ", "", sent
    )  # a script's first call is sent twice: once to find it missing
    begins, cut, _ = claimed.partition(" …")
    return sent.startswith(begins) if cut else sent == claimed


def test_the_python_examples_run_and_send_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statement, in order, on a real server; every printed command was sent, and no other."""
    with EmbeddedServer() as server, Recorder(server.url) as recorder:
        monkeypatch.setenv("REDIS_URL", server.url)
        names: dict[str, Any] = {
            "Product": Product,
            "product": Product(id=7, name="Plum jam"),
            "db": Database(),
            "fetch_rates": lambda: {"EUR": 1.0},
            "load_many": lambda keys: dict.fromkeys(keys, 1),
            "url": server.url,
        }
        checked = 0
        for block in blocks("python"):
            for source, claimed in statements(block):
                recorder.commands()
                exec(compile(source, "README.md", "exec", dont_inherit=True), names)
                if claimed:
                    sent = recorder.commands()
                    assert len(sent) == len(claimed), (source, sent)
                    assert all(map(matches, sent, claimed)), (source, sent)
                    checked += len(claimed)
        assert checked >= 9
        names["room"].close()


def test_the_settings_it_names_exist_with_these_defaults() -> None:
    """The table is the truth about the environment."""
    environment = {name: field for field, name in environment_names().items()}
    rows = re.findall(r"^\| (`[A-Z].*?) \| (.*?) \|", README, flags=re.MULTILINE)
    assert len(rows) >= 8
    settings = Settings()
    for variables, default in rows:
        names = re.findall(r"`(\w+)`", variables)
        for name, value in zip(names, default.replace("`", "").split(", "), strict=False):
            if name.endswith("_FILE") and name != "STILLROOM_HEARTBEAT_FILE":
                continue
            actual = getattr(settings, environment[name])
            assert str(actual if actual not in (None, ()) else value).removesuffix(".0") == value


def test_its_commands_exist() -> None:
    """Each make target it names, each extra it installs, each Celery command's app."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"[`$ ]make ([a-z]+)(?=`| {2})", README)) <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(re.findall(r"\[([a-z]+)\]", README)) <= set(extras)
    find = "from celery.app.utils import find_app; print(find_app('stillroom_workers').main)"
    found = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, check=True)
    assert found.stdout == "stillroom\n"
    assert set(re.findall(r"-A (\w+)", README)) == {"stillroom_workers"}


def test_it_is_short() -> None:
    """A README, not a reference book."""
    assert len(README.splitlines()) <= 168
