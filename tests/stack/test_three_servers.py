"""stack.ha.yml, without Docker: its scripts with real servers and Sentinels, its users, its names."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import redis
from stillroom import NoDispatch, Settings, Stillroom
from tests.conftest import SERVERS, binary_of
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.healing import heal_once
from tests.support.trio import COUNT, MASTER, NAME, Trio, has_redis_cli

pytestmark = pytest.mark.any_server
ROOT = Path(__file__).parents[2]
STACK_FILE = (ROOT / "stack.yml").read_text(encoding="utf-8")
HA_FILE = (ROOT / "stack.ha.yml").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=SERVERS)
def formed(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Trio]:
    if not has_redis_cli():
        pytest.skip("redis-cli is not installed")
    with Trio(tmp_path_factory.mktemp("trio"), binary_of(request)) as trio:
        yield trio


@pytest.fixture
def trio(formed: Trio) -> Trio:
    """All of them well: what a test before this one broke is healed."""
    heal_once(formed, formed.heal)
    return formed


@pytest.fixture
def web(trio: Trio) -> Iterator[Stillroom]:
    """A room as the stack's app has it: by Sentinels, with its own password and that of `watch`."""
    settings = Settings(
        **PATIENT
        | {
            "redis_url": trio.url("web"),
            "redis_password": trio.password("web"),
            "sentinel_user": "watch",
            "sentinel_password": trio.password("watch"),
            "session_peppers": "a-pepper-for-tests-long-enough-to-be-one",
            "replicas": 1,
        }
    )
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield room


def test_everybody_is_known_by_a_name(trio: Trio) -> None:
    """Sentinels tell clients names, and keep names in their files: addresses change when a container comes back."""
    for port in trio.sentinel_ports:
        named = trio.ask(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
        assert named == [NAME, str(trio.primary())]
        kept = (trio.folder / str(port) / "sentinel.conf").read_text()
        known = re.findall(r"^sentinel (?:monitor|known-\w+) \S+ (\S+)", kept, re.MULTILINE)
        assert known == [NAME] * 5
    followers = trio.replication(trio.primary())
    assert [followers[f"slave{n}"]["ip"] for n in range(2)] == [NAME] * 2


SENTINEL_MB = 64  # the limit of its container


@pytest.mark.parametrize(
    ("begin", "data", "times"),
    [
        (b"", b"SENTINEL MASTERS\r\n" * 1_000, 300),
        (b"*2\r\n$4\r\nPING\r\n$500000000\r\n", b"x" * 1_048_576, 200),
    ],
    ids=["nothing is read", "half a command"],
)
def test_nobody_who_may_ask_a_sentinel_fills_its_memory(
    trio: Trio, begin: bytes, data: bytes, times: int
) -> None:
    """A connection that sends or does not read much memory is closed, and the Sentinel answers the others."""
    port = trio.sentinel_ports[0]
    with socket.create_connection((NAME, port), timeout=10) as link:
        link.sendall(f"AUTH watch {trio.password('watch')}\r\n".encode())
        assert link.recv(100) == b"+OK\r\n"
        with suppress(OSError):
            link.sendall(begin)
            for _ in range(times):
                link.sendall(data)
        assert trio.ask(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER, role="watch")
        assert psutil.Process(trio.running[port].pid).memory_info().rss < SENTINEL_MB * 2**20


def test_a_killed_primary_is_replaced_and_comes_back_as_a_replica(
    trio: Trio, web: Stillroom
) -> None:
    """Sessions and writes go on in the same process; what was acknowledged is there; nobody was refused a right."""
    session = web.sessions.create("u1", {"cart": [7]})
    old = trio.primary()
    trio.kill(old)
    until(lambda: trio.named() - {old}, "another primary")
    new = trio.primary()
    until(lambda: web.cache.set("k", 1), "a write")
    found = web.sessions.get(session.token)
    assert found is not None
    assert found.data == {"cart": [7]}
    trio.start(old)
    trio.await_formed()
    assert trio.primary() == new
    assert trio.replication(old)["role"] == "slave"
    assert f"The Sentinels name {NAME} {new}; this is {NAME} {old}" in trio.log(old)
    refused = [(one["username"], one["object"]) for one in all_refused(trio)]
    assert refused == []


def all_refused(trio: Trio) -> Iterator[Any]:
    for port in [*trio.ports, *trio.sentinel_ports]:
        with trio.client(port) as client:
            yield from client.acl_log()


def test_a_primary_that_lost_its_volume_takes_nothing_from_the_others(
    trio: Trio, web: Stillroom
) -> None:
    """It is back, empty, before a Sentinel has noticed: it waits for another primary, and copies that."""
    session, old = web.sessions.create("u1"), trio.primary()
    trio.kill(old)
    lose_volume(trio, old)
    trio.start(old)
    until(lambda: trio.named() - {old}, "another primary")
    trio.await_formed()
    until(lambda: web.sessions.get(session.token) is not None, "the session")
    assert "this has no data" in trio.log(old)


@pytest.mark.parametrize("is_lost", [False, True], ids=["old data", "no data"])
@pytest.mark.parametrize("which", range(COUNT))
def test_a_server_that_was_away_is_not_promoted_before_one_that_has_all(
    trio: Trio, web: Stillroom, which: int, is_lost: bool
) -> None:
    """It is back when the primary dies, and has nothing of what the third server has acknowledged."""
    away = trio.ports[which]
    replace(trio, away)
    trio.kill(away)
    if is_lost:
        lose_volume(trio, away)
    session, old = web.sessions.create("u1"), trio.primary()
    trio.kill(old)
    trio.start(away)
    until(lambda: len(trio.named()) == 1 and trio.named() != {old}, "another primary")
    trio.heal()
    until(lambda: web.sessions.get(session.token) is not None, "the session")


def replace(trio: Trio, port: int) -> None:
    """Make this one a replica."""
    if trio.primary() == port:
        trio.kill(port)
        until(lambda: trio.named() - {port}, "another primary")
        trio.heal()


def test_sentinels_that_do_not_answer_do_not_say_that_there_are_no_replicas(
    trio: Trio, web: Stillroom
) -> None:
    """An empty primary is not taken for one that nobody follows, or its replicas would copy nothing."""
    session, old = web.sessions.create("u1"), trio.primary()
    with trio.silent("sentinel replicas"):
        trio.kill(old)
        lose_volume(trio, old)
        trio.start(old)
        until(lambda: "this has no data" in trio.log(old) or trio.named() - {old}, "it has asked")
    until(lambda: trio.named() - {old}, "another primary")
    trio.heal()
    until(lambda: web.sessions.get(session.token) is not None, "the session")


def lose_volume(trio: Trio, *ports: int) -> None:
    for port in ports:
        shutil.rmtree(trio.folder / str(port) / "appendonlydir")


def test_a_backup_is_restored_as_the_guide_says(trio: Trio, web: Stillroom) -> None:
    """With all three stopped, the last primary gets the backup, starts first, and the others copy it."""
    kept, primary = web.sessions.create("u1"), trio.primary()
    written = trio.replication(primary)["master_repl_offset"]
    until(lambda: is_in_file(trio, primary, written), "it is in the file")
    files, backup = trio.folder / str(primary) / "appendonlydir", trio.folder / "backup"
    shutil.copytree(files, backup)
    later = web.sessions.create("u1")
    trio.kill(*trio.ports)
    lose_volume(trio, primary)
    backup.rename(files)
    trio.start(primary)
    until(lambda: answers(trio, primary), "the primary with the backup")
    trio.start(*{*trio.ports} - {primary})
    trio.await_formed()
    assert trio.primary() == primary
    until(lambda: web.cache.set("k", 1), "a write")  # the room has found it
    assert web.sessions.get(kept.token) is not None
    assert web.sessions.get(later.token) is None
    until(lambda: len({trio.ask(port, "DBSIZE") for port in trio.ports}) == 1, "the others' copies")


def answers(trio: Trio, port: int) -> bool:
    with suppress(redis.RedisError):
        return bool(trio.ask(port, "DBSIZE"))
    return False


def test_three_servers_that_lost_all_volumes_begin_anew(trio: Trio) -> None:
    """Where none has data any more, one that is empty is the primary, and nobody waits for ever."""
    trio.kill(*trio.ports)
    lose_volume(trio, *trio.ports)
    trio.start(*trio.ports)
    trio.await_formed()
    assert trio.ask(trio.primary(), "DBSIZE") == 0


def test_after_a_power_cut_there_is_one_primary_with_all_data(trio: Trio, web: Stillroom) -> None:
    """All six are killed and started at once. Sentinels know whom they named, and servers ask before they start."""
    session, everybody = web.sessions.create("u1"), [*trio.ports, *trio.sentinel_ports]
    await_files(trio)
    trio.kill(*everybody)
    trio.start(*everybody)
    trio.await_formed()
    until(lambda: roles_of(trio).count("master") == 1, "no second primary")
    until(lambda: web.cache.set("k", 1), "a write")
    assert web.sessions.get(session.token) is not None


def roles_of(trio: Trio) -> list[str]:
    return [trio.replication(port)["role"] for port in trio.ports]


def await_files(trio: Trio) -> None:
    """Wait until each server has all in its file that the primary has now."""
    written = trio.replication(trio.primary())["master_repl_offset"]
    until(lambda: all(is_in_file(trio, port, written) for port in trio.ports), "it is in all files")


def is_in_file(trio: Trio, port: int, written: int) -> bool:
    """Return whether a server has the stream up to `written`, and nothing of it waits in memory for its file.

    A kill takes along what waits for an fsync that is under way, and what a replica has had from a full
    resynchronization whose file is not yet rewritten.
    """
    with trio.client(port) as client:
        persistence, replication = client.info("persistence"), client.info("replication")
    has = replication.get("slave_repl_offset", replication["master_repl_offset"]) >= written
    if not persistence["aof_enabled"]:
        return False  # it is being resynchronized
    waiting = ("buffer_length", "pending_bio_fsync", "rewrite_in_progress", "rewrite_scheduled")
    return has and not any(persistence[f"aof_{name}"] for name in waiting)


def test_it_goes_back_to_the_first_server(trio: Trio, web: Stillroom) -> None:
    """The others are stopped, as Docker does, and what was acknowledged is there."""
    first, *others = trio.ports
    replace(trio, first)
    session = web.sessions.create("u1")
    await_files(
        trio
    )  # a server that writes its first file is deaf to a SIGTERM, until Docker kills it
    trio.stop(*others)
    until(lambda: trio.named() == {first}, "the first server as the primary")
    until(lambda: web.sessions.get(session.token) is not None, "the session")


@pytest.mark.parametrize(
    "command",
    [
        f"SENTINEL FAILOVER {MASTER}",
        f"SENTINEL SET {MASTER} quorum 1",
        f"SENTINEL REMOVE {MASTER}",
        "SENTINEL MONITOR other localhost 1 1",
        "SENTINEL CONFIG SET announce-ip evil",
        "ACL LIST",
        "SHUTDOWN",
        "PUBLISH __sentinel__:hello x",
    ],
)
def test_who_asks_for_the_primary_can_not_choose_it(trio: Trio, command: str) -> None:
    """`watch`, whose password every process has, is refused what would lead all others elsewhere."""
    said = trio.ask(trio.sentinel_ports[0], "SENTINEL", "MASTERS", role="watch")
    assert said
    with pytest.raises(redis.exceptions.NoPermissionError):
        trio.ask(trio.sentinel_ports[0], *command.split(), role="watch")
    for port in trio.sentinel_ports:
        with trio.client(port) as client:
            client.acl_log_reset()


def test_nobody_asks_without_a_password(trio: Trio) -> None:
    """Neither a Sentinel nor a server answers whom it does not know."""
    for port in (trio.ports[0], trio.sentinel_ports[0]):
        with redis.Redis(port=port) as stranger:
            with pytest.raises(redis.AuthenticationError):
                stranger.ping()


def test_passwords_are_on_no_command_line(trio: Trio) -> None:
    """`ps` and `docker top` show options, and none of them is a secret."""
    lines = [Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in trio.running.values()]
    for role in ("replica", "sentinel", "watch"):
        assert not any(trio.password(role).encode() in line for line in lines)


def options(text: str) -> list[str]:
    return re.findall(r"^ +- (--[\w-]+ [^#\n]+?) *(?:#.*)?$", text, flags=re.MULTILINE)


def test_the_three_are_set_as_the_one() -> None:
    """What stack.yml tells the state's Redis is told to each of the three, word for word."""
    one = STACK_FILE[STACK_FILE.index("\n  redis:  #") : STACK_FILE.index("\n  redis-cache:")]
    three = HA_FILE[HA_FILE.index("command: &command") : HA_FILE.index("configs: &server-configs")]
    assert options(three) == options(one)
    for line in ("  user:", "    test: REDISCLI", "    limits: {memory: 768M", "    reservations:"):
        assert re.findall(rf"^ *{line.strip()}.*$", HA_FILE, re.MULTILINE)[0].strip() in STACK_FILE
