"""A run of tests ends, and runs all of them, also where a test ends its process."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_to_end
from tests.support.scheduling import Scheduling

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
    run = run_to_end(
        [sys.executable, *words, "--dist", "loadfile", "--no-loadscope-reorder", "-q", tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert run.stdout.splitlines()[-1].startswith("2 failed, 8 passed"), run.stdout + run.stderr


class Process:
    """Stands in the place of a process of pytest-xdist's, which may have ended without its end being told yet."""

    shutting_down = False

    def __init__(self, *, has_ended: bool = False) -> None:
        self.has_ended = has_ended
        self.handed: list[int] = []

    def send_runtest_some(self, tests: list[int]) -> None:
        if self.has_ended:
            raise OSError("cannot send (already closed?)")
        self.handed += tests

    def shutdown(self) -> None:
        self.shutting_down = True


def test_what_a_process_that_has_ended_can_not_take_is_run_by_another() -> None:
    """Its end is told behind what it said last: until then it is handed more, which does not end the run."""
    scheduling: Any = Scheduling.__new__(Scheduling)  # without a run's options
    gone, other = Process(has_ended=True), Process()
    tests = [f"test_{n}.py::test" for n in range(3)]
    scheduling.assigned_work = {gone: {}, other: {}}
    scheduling.registered_collections = {gone: tests, other: tests}
    scheduling.workqueue = OrderedDict((test.partition("::")[0], {test: False}) for test in tests)
    scheduling._reschedule(gone)
    assert scheduling.remove_node(gone) is None
    assert sorted(other.handed) == [0, 1, 2]
    assert not scheduling.workqueue
