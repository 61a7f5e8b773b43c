"""requirements.lock is what the image is built from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PINS = re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==(\S+)", LOCK, flags=re.MULTILINE)
EXTRAS = ("flower", "health", "images")  # what the image has besides


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def test_it_satisfies_the_project() -> None:
    """Each dependency is pinned to a version in its range; `make lock` makes it so."""
    pins = dict(PINS)
    assert {one.name: pins.get(one.name) for one in wanted() if not fits(one, pins)} == {}


def test_no_flower_is_allowed_that_shows_an_error_as_html() -> None:
    """Flower before 2.2 writes a task's error, in which may be what a visitor sent, into its page as it is."""
    (flower,) = [one for one in wanted() if one.name == "flower"]
    assert [*flower.specifier.filter(["2.0.1", "2.1.0", "2.2.0"])] == ["2.2.0"]


def fits(one: Requirement, pins: dict[str, str]) -> bool:
    return one.name in pins and one.specifier.contains(pins[one.name])


def test_every_pin_has_its_hashes_and_no_host() -> None:
    """Each pin has its hashes and no host, so that what was tested is installed from wherever it comes."""
    blocks = re.split(r"\n(?=\S)", LOCK)
    pinned = [block for block in blocks if not block.startswith("#")]
    assert len(pinned) == len(PINS) > 20
    assert all("--hash=sha256:" in block for block in pinned)
    assert "://" not in LOCK
