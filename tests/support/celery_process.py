"""Real `celery` processes for tests: started, watched, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import nursery

# Seconds after which what has not come is a failure. They promise nothing: on a busy machine a program may get no
# CPU for some of them. A test of a promise about time gives a number of its own.
PATIENCE_S = 40.0


def until(
    condition: Callable[[], Any], what: str, within: float = PATIENCE_S, *, pause: float = 0.01
) -> Any:
    """Wait until the condition is true; fail with `what` at the deadline. Times are in seconds."""
    deadline = time.monotonic() + within
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(pause)
    return answer


class CeleryProcess:
    """`celery -A <app> …` with settings from `environment`, in a process group of its own."""

    program: tuple[str, ...] = ()  # another one, without an app

    def __init__(
        self,
        log: Path,
        environment: dict[str, str],
        *arguments: str,
        app: str = "stillroom_workers",
    ) -> None:
        self._log = log
        with log.open("ab") as out:
            self.process = nursery.start(
                [*(self.program or ("-m", "celery", "-A", app)), *arguments],
                {
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    **environment,
                },
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def await_line(self, text: str, within: float = PATIENCE_S) -> None:
        until(
            lambda: text in self.log or self.process.poll() is not None,
            f"{text!r} in the log",
            within,
        )
        assert text in self.log, self.log

    def terminate(self, within: float = 30.0) -> int:
        """Send SIGTERM, as a container is stopped; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)

    def kill(self) -> None:
        """Send SIGKILL to the whole group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
