"""docs/howto: each page's code is run as it stands."""

from __future__ import annotations

from pathlib import Path

from tests.support.guide import run_pytest, write_files


def test_testing(tmp_path: Path) -> None:
    """The page about tests is a test suite that passes."""
    write_files("howto/testing.md", tmp_path)
    assert "4 passed" in run_pytest(tmp_path)
