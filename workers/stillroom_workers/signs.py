"""Shows that a process of ours can work: by a file for a container, a message for systemd, a word in Redis."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery.worker import state

from stillroom import Settings, Stillroom
from stillroom.health import WorkerStats
from stillroom_workers.channels import Channel

log = logging.getLogger("stillroom.workers")

SEEN_EVERY_S = 5.0
# The broker answers at least every two seconds: to BRPOP, or to the heartbeat that is published beside it.
ANSWERED_WITHIN_S = 15.0
ANSWERING = (
    "redis",
    "rediss",
    "redis+socket",
    "sentinel",
)  # brokers whose answers channels.py notes
BEAT_WITHIN_S = 20.0  # its tightest tick comes every five
# Twice as long as the longest lease: what has not ended by then is not going to, and its value would be refused.
STUCK_AFTER_LEASES = 2.0
_STUCK = (
    "Task %s[%s] has run for %.0f s and holds one of %d places of this worker until it is restarted. "
    "What it loads would no longer be stored: give its loader a timeout"
)


class SignsOfLife:
    """Says, to the container, to systemd and to Redis, that this worker could run a task just now."""

    def __init__(self, settings: Settings, app: Any) -> None:
        self._settings = settings
        self._app = app
        self._is_redis = settings.broker.partition("://")[0] in ANSWERING
        self._due = 0.0  # time.monotonic()
        self._beat = time.monotonic() - BEAT_WITHIN_S  # when it last sent what was due
        self._is_told = False  # that the file can't be written
        self._told: set[str] = set()  # ids of tasks that have been named as stuck
        self.with_beat = False  # whether beat is a thread of this worker, not a process of its own

    def can_work(self) -> bool:
        """Return whether the broker answers and a thread is free, or will be.

        The room is open and has its loaders.
        """
        now = time.monotonic()
        answered = not self._is_redis or now - Channel.answered < ANSWERED_WITHIN_S
        beats = not self.with_beat or now - self._beat < BEAT_WITHIN_S
        return answered and beats and len(self._stuck()) < self._app.threads

    def of_beat(self) -> None:
        """Note that beat's last tick reached the broker. In a process of its own that is all there is to say."""
        self._beat = time.monotonic()
        if not self.with_beat:
            self._show()

    def of_worker(self, room: Stillroom, about: Callable[[], WorkerStats]) -> None:
        """Note that the worker lives, with each beat of Celery's heart, every two seconds, and name what is stuck.

        Redis is told every five or six seconds: while it is away that costs nothing.
        """
        self._name_stuck()
        if not self.can_work():
            return
        self._show()
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + SEEN_EVERY_S
            room.upkeep.record_heartbeat(f"{os.uname().nodename}-{os.getpid()}", about())

    def end(self) -> None:
        """Let the process end well: nobody is to take the last sign for a new one."""
        notify("STOPPING=1")
        if self._settings.heartbeat_file:
            with contextlib.suppress(OSError):
                self._settings.heartbeat_file.unlink(missing_ok=True)

    def _show(self) -> None:
        if self._settings.heartbeat_file:
            self._touch(self._settings.heartbeat_file)
        notify("READY=1\nWATCHDOG=1")

    def _touch(self, path: Path) -> None:
        """Say that the process can work. What hinders that, as a full disk does, is told once, and ends no work."""
        try:
            path.touch()
        except OSError as error:
            if not self._is_told:
                said = "STILLROOM_HEARTBEAT_FILE=%s can't be written: %s. Health checks take this process for dead."
                log.error(said, path, error.strerror)
            self._is_told = True

    def _stuck(self) -> list[Any]:
        """Return the tasks that are not going to end."""
        began = time.monotonic() - self._settings.lease_limit * STUCK_AFTER_LEASES
        return [request for request in list(state.active_requests) if request.began < began]

    def _name_stuck(self) -> None:
        """Name each task that does not end, with its loader, once: nothing else tells whose load hangs."""
        stuck = {request.id: request for request in self._stuck()}
        for task_id in stuck.keys() - self._told:
            request = stuck[task_id]
            name = request.request_dict.get("shadow") or request.name
            seconds = time.monotonic() - request.began
            log.warning(_STUCK, name, task_id, seconds, self._app.threads)
        self._told = {*stuck}


def notify(message: str) -> None:
    """Tell systemd, where it asks to be told: see sd_notify(3). A manager that does not listen costs nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.setblocking(False)
        link.sendto(message.encode(), address if address[0] == "/" else "\0" + address[1:])
