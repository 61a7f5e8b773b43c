"""Gives the worker of refreshes.py a loader that takes as long as BENCH_LOADER_MS says."""

from __future__ import annotations

import os
import time
from typing import Any

from stillroom import Stillroom

room = Stillroom()
TAKES_S = float(os.environ.get("BENCH_LOADER_MS", "0")) / 1_000


@room.cache.cached("product:{id}", ttl=60, swr=600, tags=["products"])
def product(id: int) -> dict[str, Any]:
    if TAKES_S:
        time.sleep(TAKES_S)
    return {"id": id, "name": "x" * 200}
