"""Measures the machine this process runs on with psutil. Without psutil nothing is known."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from stillroom.health.report import System

T = TypeVar("T")


class SystemWatch:
    """Looks at the machine; remembers the last look, because use of the CPU is a difference between two."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None  # CPU seconds: busy, all

    def look(self) -> System | None:
        """Takes under a millisecond. Does not raise. None without psutil (the extra `stillroom[health]`)."""
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
        return max(0.0, float(spent - idle - before[0]) / float(spent - before[1]))


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
    """Return the figure, or None where this system or user cannot see it."""
    try:
        return look()
    except (
        Exception
    ):  # psutil's own, OSError, AttributeError on another system: none of them is ours to mend
        return None
