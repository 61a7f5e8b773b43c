"""Measures the machine this process runs on with psutil. Without psutil nothing is known."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from stillroom.background import started
from stillroom.health.report import System
from stillroom.wire import reset_after_fork

WITHIN_S = 0.05  # an event loop waits so long, and at the first look
FIRST_WITHIN_S = 0.5  # for psutil to be imported: see find_psutil
KNOWN_S = 60.0

T = TypeVar("T")


class SystemWatch:
    """Looks at the machine; remembers the last look, because use of the CPU is a difference between two.

    A thread of its own looks: a disk that hangs holds up no check, and threads that others keep busy do not either.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None  # CPU seconds: busy, all
        self._seen: System | None = None
        self._seen_at = 0.0  # time.monotonic()
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Begin without thread: it does not survive a fork."""
        self._looking: threading.Thread | None = None

    def newest(self) -> System | None:
        """Return what is seen now; where that takes longer than WITHIN_S, what was seen in the last minute.

        Does not raise.
        """
        if self._looking is None or not self._looking.is_alive():
            self._begin()
        return self._seen if time.monotonic() - self._seen_at < KNOWN_S else None

    def _begin(self) -> None:
        self._looking = started(self._keep_look, "stillroom system")
        if self._looking is not None:  # else no thread is free, and the next check looks again
            self._looking.join(WITHIN_S if self._seen_at else FIRST_WITHIN_S)

    def _keep_look(self) -> None:
        self._seen, self._seen_at = self.look(), time.monotonic()

    def look(self) -> System | None:
        """Look now, in under a millisecond. Return None without psutil (the extra `stillroom[health]`)."""
        psutil = find_psutil()
        if psutil is None:
            return None
        process = _known(psutil.Process)
        if process is None:  # it opens files, and there may be none left to open
            return None
        return System(
            cpu=_known(lambda: self._cpu(psutil)),
            load1=_known(lambda: os.getloadavg()[0] / (os.cpu_count() or 1)),
            memory=_known(lambda: psutil.virtual_memory().percent / 100),
            disk=_known(lambda: psutil.disk_usage(".").percent / 100),
            fds=_known(process.num_fds),
            fd_limit=_known(lambda: process.rlimit(psutil.RLIMIT_NOFILE)[0]),
            rss=_known(lambda: process.memory_info().rss),
        )

    def _cpu(self, psutil: Any) -> float | None:
        """Return the CPU use. psutil.cpu_percent() would begin with a meaningless 0 in each thread."""
        times = psutil.cpu_times()
        counted = times[:-2] if hasattr(times, "guest") else times  # user's has the guests' in it
        spent = sum(counted)
        idle = times.idle + getattr(times, "iowait", 0.0)
        before, self._last = self._last, (spent - idle, spent)
        if before is None or spent <= before[1]:
            return None
        share = float(spent - idle - before[0]) / float(spent - before[1])
        return min(1.0, max(0.0, share))  # Linux lets iowait go back, and sums are rounded


def find_psutil() -> Any:
    """Return the module, or None. The first time takes as long as a check may: whoever has a deadline calls it
    before.
    """
    try:
        import psutil
    except ImportError:
        return None
    return psutil


def _known(look: Callable[[], T]) -> T | None:
    """Return the figure, or None where this system or user cannot see it.

    psutil's own errors, OSError, AttributeError on another system: none of them is ours to mend.
    """
    try:
        return look()
    except Exception:
        return None
