"""A run of tests ends, and runs all of them, also where a test ends its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    "test_a": "def test_1(): pass",
    "test_b": "import os\ndef test_1(): pass\ndef test_2(): os._exit(1)\ndef test_3(): pass",
    "test_c": "def test_1(): pass",
    "test_d": "import os\ndef test_1(): os._exit(1)",
    "test_e": "def test_1(): pass\ndef test_2(): pass\ndef test_3(): pass",
    "test_f": "def test_1(): pass",
}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_other_tests_run_where_two_end_their_processes(tmp_path: Path, processes: int) -> None:
    """The two tests have failed, each once; what was handed to their processes is run by others."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    words = ["-m", "pytest", "-p", "xdist", "-p", "tests.support.scheduling", "-n", str(processes)]
    run = subprocess.run(
        [sys.executable, *words, "--dist", "loadfile", "--no-loadscope-reorder", "-q", tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.stdout.splitlines()[-1].startswith("2 failed, 8 passed"), run.stdout + run.stderr
