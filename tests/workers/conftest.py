"""Start one server for the tests of a module, each of which finds it empty, and Celery processes on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

import redis
from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import CeleryProcess


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def db(own_server: EmbeddedServer) -> Iterator[Any]:
    """Return a plain client on an empty server."""
    with redis.Redis.from_url(own_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def environment(own_server: EmbeddedServer) -> dict[str, str]:
    """Return the environment of a process; modules add theirs."""
    return {"REDIS_URL": own_server.url}


@pytest.fixture
def room(own_server: EmbeddedServer, db: Any) -> Iterator[Stillroom]:
    """Open the app's process, whose pepper workers do not need."""
    patience = {"call_timeout": 5, "command_timeout": 5}
    settings = Settings(redis_url=own_server.url, session_peppers="p" * 32, **patience)
    with Stillroom(settings) as room:
        yield room


@pytest.fixture
def stranger(own_server: EmbeddedServer, db: Any) -> Iterator[Celery]:
    """Return a client that knows only Celery, our channels and the tasks' names."""
    with Celery(broker=own_server.url, set_as_current=False) as app:
        app.conf.update(event_exchange="stillroom.celeryev", control_exchange="stillroom")
        yield app


@pytest.fixture
def start(
    environment: dict[str, str], tmp_path: Path, db: Any
) -> Iterator[Callable[..., CeleryProcess]]:
    """Return a function that starts `celery -A <app> …`; a process that still runs at the end is killed."""
    with ExitStack() as started:

        def start(*arguments: str, app: str = "stillroom_workers", **changes: str) -> CeleryProcess:
            log = tmp_path / f"{time.monotonic_ns()}.log"
            process = CeleryProcess(log, environment | changes, *arguments, "-l", "INFO", app=app)
            started.callback(process.kill)
            return process

        yield start


@pytest.fixture
def start_worker(start: Callable[..., CeleryProcess]) -> Callable[..., CeleryProcess]:
    """Return a function that starts a worker and waits until it is ready."""

    def start_worker(*arguments: str, **changes: str) -> CeleryProcess:
        worker = start("worker", "--without-gossip", "--without-mingle", *arguments, **changes)
        worker.await_line(" ready.", 90)
        return worker

    return start_worker
