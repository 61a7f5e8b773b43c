"""Real servers, rooms on them, and nothing left behind, for all tests."""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import hypothesis
import pytest

import redis
from stillroom import Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.health.report import System
from stillroom.health.system import SystemWatch
from tests.support.abuse import ARMED
from tests.support.bounded import assert_bounded
from tests.support.crowd import PATIENCE, PATIENT
from tests.support.emptying import emptied
from tests.support.entries import Recording
from tests.support.faces import FACES, open_room
from tests.support.proxy import Proxy
from tests.support.trips import Trips

pytest_plugins = [
    "stillroom.testing",  # what apps get, for tests/redis/test_testing.py
    "tests.support.scheduling",
]
SERVERS = ["valkey", "redis"]
HAS_REDIS = shutil.which("redis-server") is not None

# How fast a busy machine makes examples, or runs one, is not what a property is about.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--server", choices=SERVERS, help="only this kind; the tests of the other one are left out"
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="proofs in full: 20 failovers instead of 3, 1,000 sessions, each face on each kind of server",
    )


def pytest_configure() -> None:
    """Reset the signals by which tests end their processes, which a background job may be told to ignore."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what another test shows as well, and begin with the files that take longest."""
    only, is_full = config.getoption("--server"), bool(config.getoption("--full"))
    left_out = [item for item in items if is_left_out(item, only, is_full)]
    config.hook.pytest_deselected(items=left_out)
    kept = {*items} - {*left_out}
    items[:] = sorted((item for item in items if item in kept), key=place_in_line)


def is_left_out(item: pytest.Item, only: str | None, is_full: bool) -> bool:
    """Return whether a test is of the other server, or shows there what it shows elsewhere.

    Each face is tested on one kind of server and each kind with one face: the async one on the embedded server, the
    other one on redis-server where it is installed. What is about neither face runs on one of both, in turn.
    """
    if item.get_closest_marker("full") is not None and not is_full:
        return True
    callspec = getattr(item, "callspec", None)
    given = callspec.params if callspec else {}
    kind = next((given[name] for name in OF_A_KIND if given.get(name) in SERVERS), None)
    if kind is None or only is not None:
        return kind not in (None, only)
    if is_full:
        return False
    is_alike = item.get_closest_marker("any_server") or item.nodeid.startswith(STEPPED)
    if is_alike or not HAS_REDIS:
        return bool(kind != "valkey")
    in_turn = SERVERS[crc32(re.sub(r"\b(valkey|redis)\b", "", item.name).encode()) % 2]
    return bool(kind != {"async": "valkey", "sync": "redis"}.get(face_of(item), in_turn))


# The fixtures that start a server, or several, of each kind.
OF_A_KIND = ("shared_server", "shared_cluster", "formed", "places", "company", "shared_clocked")

# These are about the order of commands, and what processes do when servers fail, which no kind of server changes.
STEPPED = ("tests/races/", "tests/properties/", "tests/failover/")


def face_of(item: pytest.Item) -> str:
    """Return the face that a test runs with, or "" where it is about no face or about both."""
    callspec = getattr(item, "callspec", None)
    given = callspec.params if callspec else {}
    return next((face for face in FACES if face in (given.get("room"), given.get("face"))), "")


# Files that take twenty seconds and more, the longest first: one that began last would be waited for alone. What
# waits for workers and servers stands beside what computes, so that all CPUs are busy and none has too much to do.
LONGEST = [
    "tests/explorer/test_state.py",
    "tests/races/test_near_history.py",
    "tests/cli/test_commands.py",
    "tests/properties/test_paths.py",
    "tests/cli/test_health.py",
    "tests/redis/test_testing.py",
    "tests/redis/test_abuse.py",
    "tests/redis/test_session_bounds.py",
    "tests/explorer/test_cache.py",
    "tests/cluster/test_cache.py",
    "tests/redis/test_cache.py",
    "tests/properties/test_cache_machine.py",
    "tests/state_cluster/test_alike.py",
    "tests/redis/test_orders.py",
    "tests/cli/test_output.py",
    "tests/web/test_django_suite.py",
    "tests/web/test_peer_suites.py",
    "tests/web/test_endpoint_limits.py",
    "tests/web/test_status_page.py",
    "tests/web/test_pages.py",
    "tests/web/test_recipes.py",
    "tests/workers/test_guards.py",
    "tests/workers/test_rabbitmq.py",
    "tests/howto/test_pages.py",
    "tests/failover/test_workers.py",
    "tests/stack/test_acl.py",
    "tests/workers/test_neighbours.py",
    "tests/migration/test_guides.py",
    "tests/state_cluster/test_slots.py",
    "tests/workers/test_refresh.py",
    "tests/faults/test_sessions.py",
    "tests/faults/test_wire.py",
    "tests/faults/test_limit_outages.py",
    "tests/failover/test_proofs.py",
    "tests/cluster/test_shards.py",
    "tests/state_cluster/test_growth.py",
    "tests/state_cluster/test_health_nodes.py",
    "tests/state_cluster/test_move.py",
    "tests/workers/test_start.py",
    "tests/workers/test_one_process.py",
    "tests/workers/test_idle.py",
    "tests/workers/test_invalidation.py",
    "tests/workers/test_hygiene.py",
    "tests/stack/test_three_servers.py",
    "tests/failover/test_sentinels.py",
    "tests/stack/test_acl_cluster.py",
    "tests/faults/test_peers.py",
    "tests/e2e/test_shop.py",
    "tests/howto/test_tutorial.py",
    "tests/test_bench.py",
    "tests/howto/test_celery.py",
    "tests/processes/test_supervisor.py",
    "tests/e2e/test_faults.py",
    "tests/races/test_history.py",
    "tests/processes/test_servers.py",
    "tests/test_wheel.py",
    "tests/faults/test_limits.py",
]


def place_in_line(item: pytest.Item) -> int:
    file = item.nodeid.partition("::")[0]
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


# What some tests need beside Python: a program, and what is not tested without it.
NEEDED = {
    "redis-server": "what it may do differently: all tests run on the embedded server",
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


def pytest_collection_finish() -> None:
    """Keep thousands of tests out of each later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Let a thread that a failed test left behind make the run fail with its stack, not go on without end.

    A process of pytest-xdist waits here for slower ones. It is killed with all others when the last has ended.
    """
    if not hasattr(config, "workerinput"):
        faulthandler.dump_traceback_later(60, exit=True)


@pytest.fixture
def is_full(request: pytest.FixtureRequest) -> bool:
    """Return whether the proofs run as long as the documentation says. Each run of the gate has short ones."""
    return bool(request.config.getoption("--full"))


# These rooms start commands, workers and servers of web apps. On a busy machine a Redis that is well may wait for a
# CPU for longer than an app waits for Redis. What impatience does is tested in tests/faults.
PATIENT_ROOMS = tuple(
    f"tests/{room}/"
    for room in ("app", "cli", "e2e", "howto", "migration", "stack", "web", "workers")
)


@pytest.fixture(autouse=True)
def clean_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith(("STILLROOM_", "REDIS_")):
            monkeypatch.delenv(name)
    # The redis-server of a distribution has an old number, whatever was repaired in it.
    monkeypatch.setenv("STILLROOM_HEALTH_ACCEPT", "server_old")
    monkeypatch.setenv("STILLROOM_BAN_FILE", os.devnull)  # a test is a machine of its own
    if request.node.nodeid.startswith(PATIENT_ROOMS):
        for name, seconds in PATIENCE.items():
            monkeypatch.setenv(name, seconds)


@pytest.fixture
def usual_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rooms and programs of a patient room have the deadlines that they have by default."""
    for name in PATIENCE:
        monkeypatch.delenv(name, raising=False)


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


# A busy machine makes any command slow, and what came to the slowlog is a finding.
CALM_SERVER = {"slowlog-log-slower-than": "10000000"}  # microseconds


@pytest.fixture(scope="session", params=SERVERS)
def shared_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """Start one server of each kind for all tests that leave it as they found it."""
    with EmbeddedServer(binary=binary_of(request), options=CALM_SERVER) as server:
        yield server


@pytest.fixture
def server(shared_server: EmbeddedServer) -> EmbeddedServer:
    """Return a server without data."""
    return emptied(shared_server)


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A server of the test's own, to be frozen, killed and restarted. What it has acknowledged is in its file."""
    with EmbeddedServer(appendonly=True, options=CALM_SERVER) as server:
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
def proxy(server: EmbeddedServer) -> Iterator[Proxy]:
    """Return a proxy in front of the server, which holds or loses what passes."""
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def bounded(client: Any) -> Iterator[None]:
    """Check after the test that each remaining key of sessions and limits has a TTL."""
    yield
    assert_bounded(client)


@pytest.fixture
def state_client(client: Any) -> Any:
    """Return a plain client of the state's server, which is the cache's except in tests/cluster."""
    return client


@pytest.fixture
def places(server: EmbeddedServer) -> dict[str, Any]:
    """Return the settings that say where Redis is."""
    return {"redis_url": server.url}


@pytest.fixture
def settings(places: dict[str, Any]) -> Settings:
    """Return settings with patient deadlines; tests/faults tests the impatient ones."""
    return Settings(**places | PATIENT)


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """Write an operator's file of rules that ban, and are not in shadow."""
    (path := tmp_path / "rules.toml").write_text(ARMED)
    return path


@pytest.fixture
def dispatch() -> Recording:
    return Recording()


@pytest.fixture
def make_room(places: dict[str, Any], dispatch: Recording) -> Iterator[Callable[..., Stillroom]]:
    """Return a function that makes rooms there. Each stands for a process and is closed at the end."""
    rooms: list[Stillroom] = []

    def make(**changes: Any) -> Stillroom:
        rooms.append(Stillroom(Settings(**places | PATIENT | changes), dispatch=dispatch))
        return rooms[-1]

    yield make
    for room in rooms:
        room.close()


@pytest.fixture(params=FACES)
def room(request: pytest.FixtureRequest, settings: Settings, dispatch: Recording) -> Iterator[Any]:
    """Open a room, once with each face."""
    with open_room(request.param, settings, dispatch) as room:
        yield room


@pytest.fixture
def trips(room: Any, monkeypatch: pytest.MonkeyPatch) -> Trips:
    """Count the round trips of the room."""
    return Trips(room, monkeypatch)
