"""The code keeps its shape: imports point downward, and both faces are one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import stillroom
from stillroom import AsyncStillroom, Settings, Stillroom

ROOT = Path(__file__).parent.parent


def test_imports_point_downward() -> None:
    """import-linter's contracts in pyproject.toml hold."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_celery_is_imported_only_when_it_is_needed() -> None:
    """An app that reads its cache does not pay for the workers' libraries, nor for other people's frameworks."""
    program = "import sys, stillroom; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    for heavy in (
        *("celery", "kombu", "typer", "rich", "stillroom_workers"),
        *("flask", "django", "starlette", "pytest"),
    ):
        assert repr(heavy) not in done.stdout


@pytest.mark.parametrize(
    "service", ["abuse", "cache", "health", "limits", "sessions", "tasks", "upkeep"]
)
def test_both_faces_have_the_same_methods(service: str) -> None:
    """Both faces have the same methods with the same signatures and docstrings."""
    faces = [getattr(room(Settings()), service) for room in (Stillroom, AsyncStillroom)]
    methods = [
        {n: m for n, m in inspect.getmembers(face, callable) if not n.startswith("_")}
        for face in faces
    ]
    assert methods[0].keys() == methods[1].keys()
    for name in methods[0]:
        sync, awaited = methods[0][name], methods[1][name]
        assert inspect.getdoc(sync)
        if name not in ("cached", "gather"):  # which are of functions: blocking or awaited ones
            assert inspect.getdoc(sync) == inspect.getdoc(awaited)
            signatures = inspect.signature(sync), inspect.signature(awaited)
            assert signatures[0].parameters == signatures[1].parameters
            if name != "hold":  # `with` and `async with`
                assert signatures[0] == signatures[1]


def test_every_public_name_is_exported_once_and_documented() -> None:
    """`from stillroom import *` gives each public name once, and each has a docstring."""
    assert sorted(set(stillroom.__all__)) == sorted(stillroom.__all__)
    assert all(inspect.getdoc(getattr(stillroom, name)) for name in stillroom.__all__)


def test_every_lua_file_is_loaded_and_opens_with_its_contract() -> None:
    """Each Lua file is loaded, is the only copy, and opens with KEYS, ARGV and returns."""
    from stillroom.scripts import BY_SHA

    files = {path.stem: path.read_text() for path in (ROOT / "shared/stillroom/lua").glob("*.lua")}
    assert {text.script.name for text in BY_SHA.values()} == set(files)
    for name, text in files.items():
        header = [line for line in text.splitlines() if line.startswith("--")]
        assert all(
            any(line.startswith(f"-- {part}") for line in header)
            for part in ("KEYS", "ARGV", "returns")
        ), name


def test_keys_are_spelled_in_one_module() -> None:
    """Only one module spells Redis keys with the namespace."""
    for path in (ROOT / "shared/stillroom").rglob("*.py"):
        if path.name not in ("keys.py", "recorder.py"):
            text = path.read_text()
            assert "{0}:" not in text.replace("`ns:{0}:e:<key>`", ""), path
