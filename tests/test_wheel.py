"""The wheel has what an app needs and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a freshly built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("stillroom-*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Return the files in the wheel."""
    return set(zipfile.ZipFile(wheel).namelist())


def test_it_brings_two_packages_and_nothing_else(names: set[str]) -> None:
    """No top-level `shared`, `workers` or `tests` meets an app's own."""
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "stillroom",
        "stillroom_workers",
    }


def test_it_holds_the_scripts_the_style_and_the_types(names: set[str]) -> None:
    """Every Lua file, the style of /status, the users of Redis, and the marker for type checkers."""
    here = {
        path.relative_to(ROOT / "shared").as_posix()
        for kind in ("*.lua", "*.css")
        for path in (ROOT / "shared").rglob(kind)
    }
    assert here
    assert here <= names
    assert {"stillroom/py.typed", "stillroom_workers/py.typed", "stillroom/cli/users.acl"} <= names


def test_it_holds_the_documentation(names: set[str]) -> None:
    """Pages for people and llms.txt for machines are in the wheel; what builds the site is not."""
    written = {
        path.relative_to(ROOT / "docs").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if path.parent.name not in ("decisions", "reference") and "_build" not in path.parts
    }
    assert len(written) > 20
    held = {name.removeprefix("stillroom/docs/") for name in names if "/docs/" in name}
    assert written | {"llms.txt", "explanation/clock.svg"} <= held
    assert [name for name in held if name.endswith(".py") or "_build" in name] == []


COMMANDS = """
import contextlib, io, json, sys
import stillroom.cli
told = [stillroom.__file__]
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        stillroom.cli.main()
    told.append(said.getvalue())
print(json.dumps(told))
"""


def test_a_command_reads_its_files_from_a_zip(wheel: Path, tmp_path: Path) -> None:
    """Commands that read files of the package find them where it is imported from a zip, as zipapp makes one."""
    commands = [["docs"], ["docs", "howto/tags"], ["docs", "--json"], ["secrets", str(tmp_path)]]
    words = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    where, pages, page, as_json, secrets = json.loads(done.stdout)
    assert where.startswith(str(wheel))
    assert "(howto/tags.md)" in pages
    assert "# How to choose tags" in page
    assert '"howto/tags"' in as_json
    assert "users.acl" in secrets


def test_the_source_roots_are_no_packages() -> None:
    """The folders `shared/` and `workers/` hold packages and are none themselves."""
    assert not (ROOT / "shared/__init__.py").exists()
    assert not (ROOT / "workers/__init__.py").exists()
