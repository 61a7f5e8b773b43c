"""Loads that stand still inside their loader until the test lets them go."""

from __future__ import annotations

import threading
from typing import Any

from stillroom.scripts import lease_load

WITHIN = 40.0  # seconds a test waits for anything before it fails, on a busy machine too


class Held:
    """A loader that says when it was called, and returns its value (or raises it) when it is let go."""

    def __init__(self, value: Any = "old") -> None:
        self._value = value
        self._called = threading.Event()
        self._let_go = threading.Event()

    def load(self) -> Any:
        self._called.set()
        assert self._let_go.wait(WITHIN), "nobody let go"
        if isinstance(self._value, BaseException):
            raise self._value
        return self._value

    def wait_until_called(self) -> None:
        assert self._called.wait(WITHIN), "nobody loads"

    def let_go(self) -> None:
        self._let_go.set()

    def let_go_when_waited_for(self, client: Any, lease: bytes, watching: threading.Event) -> None:
        """Let go once somebody has found the lease taken, and has looked at it again."""
        with client.monitor() as monitor:
            watching.set()
            looks = 0
            for seen in monitor.listen():
                looks += seen["client_type"] != "lua" and lease.decode() in seen["command"]
                if looks >= 3:
                    break
        self._let_go.set()


def is_lease_request(command: Any) -> bool:
    """Return whether this command asks for the lease of a load."""
    return bool(command[0] == b"EVALSHA" and command[1] == lease_load.text.sha)
