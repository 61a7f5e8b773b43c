"""Measure how long this machine kept us waiting for a CPU, which is no fault of a deadline."""

from __future__ import annotations

import threading
import time
from typing import Self

GRAIN = 0.005  # seconds


class Stopwatch:
    """Measures the seconds inside a `with`, less those in which a thread that wanted to wake up could not."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._lag = 0.0
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._started = 0.0
        self._elapsed = 0.0

    @property
    def seconds(self) -> float:
        return self._elapsed - self._lag

    def __enter__(self) -> Self:
        self._sampler.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._elapsed = time.perf_counter() - self._started
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.is_set():
            asleep = time.perf_counter()
            self._ended.wait(GRAIN)
            late = time.perf_counter() - asleep - GRAIN
            if late > GRAIN:
                self._lag += late
