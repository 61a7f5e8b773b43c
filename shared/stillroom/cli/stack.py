"""Defines what runs together on one machine: an embedded server, worker, beat, and Flower.

The server runs only if none is named, and Flower only if it is installed.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from stillroom.cli.supervisor import Service
from stillroom.embedded import HOST, EmbeddedServer
from stillroom.errors import StillroomError

WORKERS = "stillroom_workers"  # named here, imported only by the processes it runs in
# -P: a celery.py or a queue.py in the folder of the project is not taken for Celery, or for Python's own.
MODULE = (sys.executable, "-P", "-m")


class PortTaken(StillroomError):
    """Something listens on the port that is Flower's."""


@contextmanager
def redis_url() -> Iterator[tuple[str, bool]]:
    """Yield the URL to use, and whether it is an embedded server that lives as long as this block."""
    if url := os.environ.get("REDIS_URL"):
        yield url, False
        return
    with EmbeddedServer() as server:
        # It has no password, and one that is set is another server's: whoever names the user may give any.
        has_password = "REDIS_PASSWORD" in os.environ or "REDIS_PASSWORD_FILE" in os.environ
        yield server.url.replace("://", "://default@" if has_password else "://"), True


def services(environment: Mapping[str, str], *, flower_port: int | None) -> list[Service]:
    """Return worker, beat and Flower, in the order they start. Raises PortTaken."""
    found = [
        _celery("worker", environment, "worker", "-l", "INFO"),
        _celery("beat", environment, "beat", "--pidfile=", "-l", "INFO"),
    ]
    if flower_port is not None and importlib.util.find_spec("flower"):
        _refuse_taken(flower_port)
        # Only this machine: Flower can start tasks, and has no password here.
        flower = ("flower", f"--address={HOST}", f"--port={flower_port}")
        found.append(_celery("flower", environment, *flower))
    return found


def _refuse_taken(port: int) -> None:
    """Raise PortTaken where something listens on the port: Flower ends with a traceback there, and all with it."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as Flower: not a port that was just left
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PortTaken(
                f"Flower can't listen on port {port} ({error.strerror}); is it another `stillroom up`? "
                "--flower-port gives it another one; 0: no Flower"
            ) from None


def _celery(name: str, environment: Mapping[str, str], *arguments: str) -> Service:
    return Service(name, [*MODULE, "celery", "-A", WORKERS, *arguments], environment)
