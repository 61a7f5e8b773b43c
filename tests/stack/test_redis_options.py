"""With the options of stack.yml no user fills Redis, a full disk leaves it healthy, and scripts can be ended."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import Settings, Stillroom
from stillroom.dispatch import MESSAGE_LIMIT
from stillroom.embedded import EmbeddedServer
from stillroom.health.lifetimes import REDIS
from tests.conftest import SERVERS, binary_of
from tests.support.celery_process import until
from tests.support.roles import server_with_roles, url_of

STACK_FILE = (Path(__file__).parents[2] / "stack.yml").read_text(encoding="utf-8")
STATE = STACK_FILE[STACK_FILE.index("\n  redis:  #") : STACK_FILE.index("\n  redis-cache:")]
OWN = {"aclfile", "appendonly", "save"}  # the tests' own affair, or the embedded server's
SPARE_MB = 256  # beside what Redis counts: the limit of the container is 768


def options() -> dict[str, str]:
    """Return the options as in the stack, with defaults for variables."""
    lines = re.findall(r"^      - --([\w-]+) ([^#\n]+)", STATE, flags=re.MULTILINE)
    plain = {name: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value).strip() for name, value in lines}
    return {name: value for name, value in plain.items() if name not in OWN}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedServer]:
    with server_with_roles(tmp_path / "secrets", binary_of(request), options=options()) as server:
        yield server


def client(server: EmbeddedServer, folder: Path, role: str) -> Any:
    password = (folder / "secrets" / f"{role}_password").read_text(encoding="utf-8")
    return redis.Redis.from_url(url_of(server, role), password=password, socket_timeout=20)


@contextmanager
def connection(server: EmbeddedServer, folder: Path, role: str) -> Iterator[socket.socket]:
    """Return a logged-in socket that sends anything."""
    password = (folder / "secrets" / f"{role}_password").read_text(encoding="utf-8")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
        link.sendall(f"AUTH {role} {password}\r\n".encode())
        assert link.recv(100) == b"+OK\r\n"
        yield link


def flood(link: socket.socket, data: bytes, times: int) -> None:
    """Send the command that often, until the server refuses."""
    with suppress(OSError):
        for _ in range(times):
            link.sendall(data)


HALF_A_COMMAND = b"*2\r\n$4\r\nPING\r\n$500000000\r\n"


@pytest.mark.parametrize(
    ("begin", "data", "times"),
    [
        (b"", b"COMMAND\r\n" * 100, 30),
        (b"", b"INFO\r\n" * 100, 300),
        (HALF_A_COMMAND, b"x" * 1_048_576, 200),
        (b"*1000000\r\n", b"$3\r\nabc\r\n" * 10_000, 100),
    ],
    ids=["COMMAND", "INFO", "half a command", "a million arguments"],
)
def test_no_low_user_stops_the_app(
    server: EmbeddedServer, tmp_path: Path, begin: bytes, data: bytes, times: int
) -> None:
    """Connections that send or do not read much memory are bounded, and the app still writes."""
    with (
        client(server, tmp_path, "web") as web,
        connection(server, tmp_path, "health") as first,
        connection(server, tmp_path, "producer") as second,
    ):
        for link in (first, second):
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            flood(link, begin + data, 1)
            flood(link, data, times)
        assert web.set("stillroom:{0}:e:a", "v")
        assert web.info("memory")["used_memory_rss"] < SPARE_MB * 2**20


def test_a_message_that_no_worker_takes_can_not_be_left_for_the_health_check(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    """A huge message, which a look at its queue would read whole, is refused; a worker's largest is accepted."""
    with client(server, tmp_path, "producer") as producer:
        assert producer.lpush("stillroom.maintenance", b"x" * MESSAGE_LIMIT) == 1
        with pytest.raises((redis.RedisError, OSError)):
            producer.lpush("stillroom.maintenance", b"x" * 40_000_000)
        assert producer.llen("stillroom.maintenance") == 1


def test_who_says_nothing_is_closed() -> None:
    """Silent connections of strangers are closed, so that they do not fill the server's list."""
    assert 0 < int(options()["timeout"]) <= 600


def test_the_wire_lives_with_connections_that_were_closed(
    own_server: EmbeddedServer,
) -> None:
    """A call after Redis closed the idle connection is answered."""
    settings = Settings(redis_url=own_server.url, command_timeout=5, call_timeout=10)
    with Stillroom(settings) as room, redis.Redis.from_url(own_server.url) as db:
        room.cache.set("a", 1, ttl=60)
        db.client_kill_filter(_type="normal", skipme=True)
        assert room.cache.get("a") == 1
        assert room.cache.set("a", 2, ttl=60)


def health_check() -> str:
    found = re.search(r"^    test: (REDISCLI_AUTH=.+)$", STACK_FILE, flags=re.MULTILINE)
    assert found
    return found[1].replace("$$", "$")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 12 MB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_redis_healthy(tmp_path: Path, small_disk: Path) -> None:
    """The health check passes on a full disk, where PING says MISCONF, because every read is answered."""
    if shutil.which("redis-cli") is None:
        pytest.skip("redis-cli is not installed")
    secrets, places = tmp_path / "secrets", {"directory": small_disk, "appendonly": True}
    options = {"appendfsync": "everysec"}  # as in the stack: with `always` a server ends
    with server_with_roles(secrets, None, options=options, **places) as server:
        web = client(server, tmp_path, "web")
        web.set("stillroom:{0}:e:a", "v")
        (small_disk / "fill").write_bytes(b"")
        with (small_disk / "fill").open("ab") as fill, suppress(OSError):
            while True:
                fill.write(b"x" * 65_536)
                fill.flush()
        until(lambda: _is_refused(web), "a write that is refused", 30)
        assert web.get("stillroom:{0}:e:a") == b"v"
        check = health_check().replace("/run/secrets", str(secrets))
        check = check.replace("redis-cli", f"redis-cli -p {server.port}")
        assert subprocess.run(["sh", "-c", check], check=False).returncode == 0
        server.freeze()
        slow = f"timeout 2 sh -c '{check}'"
        assert subprocess.run(["sh", "-c", slow], check=False).returncode != 0
        server.thaw()


def _is_refused(client: Any) -> bool:
    try:
        client.set("stillroom:{0}:e:b", "x" * 20_000)
    except redis.ResponseError as error:
        return "MISCONF" in str(error)
    return False


def test_the_pinned_server_is_one_that_is_safe() -> None:
    """`stillroom doctor` has no finding about the pinned server."""
    found = re.search(r"\$\{REDIS_IMAGE:-redis:(\d+)\.(\d+)\.(\d+)-alpine\}", STACK_FILE)
    assert found
    major, minor, patch = map(int, found.groups())
    assert patch >= (REDIS[major, minor].least or 0)
