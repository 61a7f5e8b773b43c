"""Hand the files of tests to processes, and go on with what is left where a process ends amid a test."""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class Scheduling(LoadFileScheduling):
    """The scheduling of --dist loadfile, whose run ends also where a process has crashed.

    pytest-xdist 3.8 then hands out work that is done and waits for its end, or one test to a process that waits for
    the next one: https://github.com/pytest-dev/pytest-xdist/issues/1378 and /issues/1327.
    """

    def remove_node(self, node: WorkerController) -> str | None:
        """Hand what a process has left to others. Return the test that ended it, which has failed with that."""
        left = {
            file: {test: False for test, is_done in tests.items() if not is_done}
            for file, tests in self.assigned_work.pop(node).items()
        }
        file, crashed = next(
            ((file, test) for file, tests in left.items() for test in tests), ("", None)
        )
        if crashed is not None:
            del left[file][crashed]
        self.workqueue.update({file: tests for file, tests in left.items() if tests})
        for other in self.nodes:
            self._reschedule(other)
        return crashed

    def _reschedule(self, node: WorkerController) -> None:
        if (
            node not in self.registered_collections
        ):  # it replaces another one, and is still starting up
            return
        # A process begins a test once it knows the next one, or that there is none.
        while (
            self.workqueue
            and not node.shutting_down
            and self._pending_of(self.assigned_work[node]) <= 2
        ):
            try:
                self._assign_work_unit(node)
            except OSError:  # it has ended, which is told next
                file, tests = self.assigned_work[node].popitem()
                self.workqueue[file] = tests
                return
        if not self.workqueue:
            node.shutdown()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Replace the scheduling of --dist loadfile, and no other."""
    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
