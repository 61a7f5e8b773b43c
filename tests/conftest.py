"""Real servers, rooms on them, and nothing left behind, for all tests."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import redis
from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.health.report import System
from stillroom.health.system import SystemWatch
from tests.support.crowd import PATIENT
from tests.support.entries import Recording
from tests.support.faces import FACES, open_room

pytest_plugins = ["stillroom.testing"]  # what apps get, for tests/redis/test_testing.py
SERVERS = ["valkey", "redis"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--server", choices=SERVERS, help="only this kind; the tests of the other one are skipped"
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="proofs in full: 20 failovers instead of 3, 1,000 sessions",
    )


def pytest_configure() -> None:
    """Reset the signals by which tests end their processes, which a background job may be told to ignore."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


# What some tests need beside Python: a program, and what is not tested without it.
NEEDED = {
    "redis-server": "half of the tests: they run on the embedded server alone",
    "docker": "the image and the Swarm",
    "chromium": "pages as a browser shows them",
    "apache2": "a shared cache in front of the pages",
    "openssl": "TLS",
    "gcc": "servers whose clock moves",
}


def pytest_report_header() -> list[str]:
    """Say at once what is going to be skipped, and why."""
    return [
        f"skipped, because {program} is not installed: {tested}"
        for program, tested in NEEDED.items()
        if shutil.which(program) is None
    ]


@pytest.fixture
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether the proofs are to be as long as the documentation says; short ones are for each run of the gate."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith(("STILLROOM_", "REDIS_")):
            monkeypatch.delenv(name)
    # The redis-server of a distribution has an old number, whatever was repaired in it.
    monkeypatch.setenv("STILLROOM_HEALTH_ACCEPT", "server_old")
    monkeypatch.setenv("STILLROOM_BAN_FILE", os.devnull)  # a test is a machine of its own


def binary_of(request: pytest.FixtureRequest) -> str | None:
    """Return the server's binary: the embedded one always, redis-server where it is installed."""
    kind, only = request.param, request.config.getoption("--server")
    if only not in (kind, None):
        pytest.skip(f"--server {only}")
    if kind == "valkey":
        return None
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed; the embedded server runs this test too")
    return binary


@pytest.fixture(scope="session", params=SERVERS)
def shared_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """Start one server of each kind for all tests that leave it as they found it."""
    with EmbeddedServer(binary=binary_of(request)) as server:
        yield server


@pytest.fixture
def server(shared_server: EmbeddedServer) -> EmbeddedServer:
    """Return a server without data."""
    with redis.Redis.from_url(shared_server.url) as client:
        client.flushall()
        client.script_flush()
    return shared_server


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A server of the test's own, to be frozen, killed and restarted. What it has acknowledged is in its file:
    with `everysec` a write waits in memory while an fsync is under way, and a kill takes it along."""
    with EmbeddedServer(appendonly=True, options={"appendfsync": "always"}) as server:
        yield server


@pytest.fixture
def calm_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake a calm machine, because a full disk or a high load is not what a test of health is about."""
    calm = System(cpu=0.1, load1=0.1, memory=0.1, disk=0.1, fds=20, fd_limit=1_000, rss=50_000_000)
    monkeypatch.setattr(SystemWatch, "look", lambda _: calm)


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[Any]:
    """Return a plain client to look at the server directly."""
    with redis.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def state_client(client: Any) -> Any:
    """Return a plain client of the state's server, which is the cache's except in tests/cluster."""
    return client


@pytest.fixture
def places(server: EmbeddedServer) -> dict[str, Any]:
    """Return the settings that say where Redis is."""
    return {"redis_url": server.url}


@pytest.fixture
def settings(server: EmbeddedServer) -> Settings:
    """Return settings with patient deadlines; tests/faults tests the impatient ones."""
    return Settings(**{"redis_url": server.url} | PATIENT)


@pytest.fixture
def dispatch() -> Recording:
    return Recording()


@pytest.fixture
def make_room(settings: Settings, dispatch: Recording) -> Iterator[Callable[..., Stillroom]]:
    """Return a function that makes rooms on the server. Each stands for a process and is closed at the end."""
    rooms: list[Stillroom] = []

    def make(**changes: Any) -> Stillroom:
        changed = Settings(**{"redis_url": settings.redis_url} | PATIENT | changes)
        rooms.append(Stillroom(changed, dispatch=dispatch))
        return rooms[-1]

    yield make
    for room in rooms:
        room.close()


@pytest.fixture(params=FACES)
def room(request: pytest.FixtureRequest, settings: Settings, dispatch: Recording) -> Iterator[Any]:
    """Open a room, once with each face."""
    with open_room(request.param, settings, dispatch) as room:
        yield room
