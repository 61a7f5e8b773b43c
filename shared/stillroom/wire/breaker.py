"""The circuit breaker: after some failures calls fall back in microseconds, and a probe waits for Redis.

A request never pays for finding out whether Redis is back. A thread does, one per server while it is
away: after 0.25, 0.5, then every second (jittered), so that recovery is noticed within 1.5 s.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable

from stillroom.daemon import Daemon
from stillroom.errors import RedisUnavailable
from stillroom.settings import Settings

log = logging.getLogger("stillroom.wire")
# The prober has random numbers of its own: drawing from the app's would change them for an app that seeds them.
_random = random.SystemRandom()


class Breaker:
    """Open while Redis is away. `probe` raises RedisUnavailable until it answers again."""

    def __init__(self, settings: Settings, name: str, probe: Callable[[], object]) -> None:
        self._settings = settings
        self._name = name
        self._probe = probe
        self.reason = ""
        self._ends_as = "is back"
        self.recovered: list[Callable[[], object]] = []  # called once after each outage
        self.calls = 0  # the wire adds one for each batch that was answered
        self.streak = 0  # failures in a row
        self.reset()

    def reset(self) -> None:
        """Be closed, with no memory and no prober: a new process starts like this after a fork."""
        self._lock = threading.RLock()  # a signal handler may call while this thread holds it
        self._is_reminded = False
        self._forget = threading.Event()  # ends the thread of `remind`
        self._stop = threading.Event()
        self._nudge = threading.Event()
        # When, and after how many answered calls.
        self._failures: deque[tuple[float, int]] = deque()
        self.elsewhere_at = 0.0  # time.monotonic(): see outcome.py
        self.is_open = False
        self.down_since: float | None = None  # time.time()
        self.streak = 0

    def no_call(self) -> RedisUnavailable:
        """Return why no call is made: the server is away, or else the caller has no time left."""
        return (
            RedisUnavailable("breaker", self.reason) if self.is_open else RedisUnavailable("budget")
        )

    def failed(self, error: RedisUnavailable) -> None:
        """Count a failure; open after too many."""
        now = time.monotonic()
        with self._lock:
            self.streak += 1
            self._failures.append((now, self.calls))
            while self._failures[0][0] < now - self._settings.breaker_window:
                self._failures.popleft()
            if not self.is_open and self._too_many():
                self._open(error)

    def _too_many(self) -> bool:
        failures = len(self._failures)
        calls = failures + self.calls - self._failures[0][1]
        return self.streak >= self._settings.breaker_failures or (
            calls >= self._settings.breaker_calls
            and failures >= calls * self._settings.breaker_ratio
        )

    def _open(self, error: RedisUnavailable) -> None:
        stop = threading.Event()
        try:
            Daemon(self._watch, f"probe {self._name}", (stop,)).start()
        except RuntimeError:  # no more threads: nobody would close it again, so it stays closed
            return
        self._stop = stop
        self._nudge.clear()
        self.is_open = True
        self.down_since = time.time()
        self.reason = error.reason
        log.error("%s is away: %s; calls fall back until it answers", self._name, error)

    def _watch(self, stop: threading.Event) -> None:
        began = time.monotonic()
        delay = self._settings.probe_delay
        is_told = False
        while self._waits(stop, delay * _random.uniform(0.8, 1.0)):
            try:
                self._probe()
            except Exception as error:  # whatever it is: nobody else closes the breaker
                if isinstance(error, RedisUnavailable):
                    self.reason = error.reason
                elif not is_told:
                    log.exception("%s could not be probed; it is probed again", self._name)
                    is_told = True
                delay = min(delay * 2, self._settings.probe_limit)
            else:
                return self._close(time.monotonic() - began)
        return None

    def _waits(self, stop: threading.Event, seconds: float) -> bool:
        """Wait for the next probe's time or for a reason to stop. Return False if there is to be no other probe."""
        self._nudge.wait(seconds)
        self._nudge.clear()
        return not stop.is_set()

    def remind(self) -> None:
        """Have what waits for Redis delivered in a second.

        A few calls that fail open no breaker, so there is no outage whose end would do that; and what has failed
        only because its request had no time left meets no outage at all.
        """
        if self.is_open:
            return
        with self._lock:
            if self._is_reminded:
                return
            self._is_reminded = True
            self._forget = forget = threading.Event()
        try:
            Daemon(self._remind, f"remind {self._name}", (forget,)).start()
        except RuntimeError:  # no more threads: the next call delivers it
            self._is_reminded = False

    def _remind(self, forget: threading.Event) -> None:
        is_stopped = forget.wait(self._settings.probe_limit)
        self._is_reminded = False
        if not (is_stopped or self.is_open):
            self._deliver()

    def hurry(self) -> None:
        """Probe the server now: there is news of it."""
        self._nudge.set()

    def leave(self) -> None:
        """End the outage without the server: it has left its cluster, and other nodes have what it had."""
        self._probe = lambda: None
        self._ends_as = "has left the cluster"
        self.hurry()

    def _close(self, downtime: float) -> None:
        with self._lock:
            self.streak = 0
            self._failures.clear()
            self.down_since = None
            self.is_open = False
        log.warning("%s %s after %.1f s", self._name, self._ends_as, downtime)
        self._deliver()

    def _deliver(self) -> None:
        for action in self.recovered:
            try:
                action()
            except Exception:  # one service's delivery is no reason to keep the others' back
                log.exception(
                    "%s: the writes that waited for it could not be delivered", self._name
                )

    def stop(self) -> None:
        """End the prober, and let the next call find out for itself."""
        self._forget.set()
        self._stop.set()
        self._nudge.set()
        self.is_open = False
        self.down_since = None
        self.streak = 0
