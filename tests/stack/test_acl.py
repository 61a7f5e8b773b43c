"""Each role of the stack has a Redis user that can do its work and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom import RedisUnavailable, Stillroom
from stillroom.cli.credentials import roles
from stillroom.embedded import EmbeddedServer
from tests.conftest import SERVERS, binary_of
from tests.support.celery_process import until
from tests.support.company import Company, company_at_work
from tests.support.roles import (
    ELSEWHERE,
    SELDOM,
    admin,
    granted,
    server_with_roles,
    settings_of,
)

pytestmark = pytest.mark.timeout(500)  # everybody works for a minute, longer on a busy machine

# What no role may: each could take over the server, empty it, listen in, or fill its memory.
NOBODY = [
    "ACL SETUSER web +@all",
    "BGREWRITEAOF",
    "CLIENT KILL TYPE normal",
    "CLIENT NO-EVICT on",
    "CLIENT PAUSE 1000",
    "CLIENT TRACKING ON BCAST",
    "COMMAND",
    "COMMAND DOCS",
    "CONFIG REWRITE",
    "CONFIG SET maxmemory 1",
    "COPY stillroom:{0}:clock stillroom:bans",
    "DEBUG SLEEP 1",
    "ECHO x",
    "EVAL x 0",
    "EVAL_RO x 0",
    "FAILOVER",
    "FCALL x 0",
    "FLUSHALL",
    "FLUSHDB",
    "FUNCTION LOAD x",
    "KEYS *",
    "MIGRATE h 1 k 0 1",
    "MODULE LOAD x",
    "MONITOR",
    "MOVE stillroom:bans 1",
    "PSUBSCRIBE *",
    "PUBLISH anywhere x",
    "RANDOMKEY",
    "REPLICAOF h 1",
    "RESTORE stillroom:bans 0 x",
    "SAVE",
    "SCRIPT FLUSH",
    "SHUTDOWN",
    "SORT stillroom:bans",
    "SUBSCRIBE x",
    "SWAPDB 0 1",
]
# Except these, each for its reason.
BUT = {
    ("ops", "KEYS *"),  # reads every key's name anyway
    ("ops", "RANDOMKEY"),
    ("sentinel", "CLIENT KILL TYPE normal"),  # of the clients of a primary that was demoted
    ("sentinel", "CONFIG REWRITE"),  # so that a server which starts again follows whom it followed
}
# What a role can't do, each for its reason.
NOT_THEIRS = [
    ("web", "BRPOP stillroom.refresh 1"),  # an app takes no tasks,
    ("web", "LPUSH stillroom.refresh x"),  # orders them as `producer`,
    ("web", "DEL stillroom.refresh"),
    ("web", "XADD stillroom:health * a b"),  # sees how all are, and tells no lies about it,
    ("web", "XADD stillroom:dead-letters * a b"),
    ("web", "ZADD stillroom:workers 1 x"),
    ("web", "HSET stillroom:unacked x y"),
    ("web", "PUBLISH /0.stillroom.pidbox x"),
    ("web", "SCAN 0"),  # and never looks through the keyspace
    ("producer", "LRANGE stillroom.refresh 0 -1"),  # others' orders are not read,
    ("producer", "GET stillroom:{0}:e:product:1"),
    ("producer", "LPUSH stillroom:{0}:todo x"),  # no list is made where none belongs,
    ("producer", "LPUSH stillroom:bans x"),
    ("producer", "SADD _kombu.binding.other.queue x"),  # another app's bindings are not ours,
    ("producer", "HSET stillroom:unacked x y"),
    ("producer", "PUBLISH /0.stillroom.pidbox x"),  # no worker is stopped
    ("worker", "HSET stillroom:{s00}:s:forged _u admin"),  # no session is made by a worker,
    ("worker", "SET stillroom:{s00}:s:forged x"),
    ("worker", "SET stillroom:{s00}:u:forged x"),
    ("worker", "RENAME stillroom:{0}:l:x stillroom:{s00}:s:forged"),
    ("worker", "LPUSH stillroom:{0}:todo x"),  # no message makes it push to what is no queue,
    ("worker", "LPUSH stillroom:{0}:clock x"),
    ("worker", "LPUSH stillroom:bans x"),
    ("worker", "LPUSH stillroom:abuse x"),
    ("worker", "LPUSH stillroom:abuse:groups x"),
    ("worker", "LPUSH stillroom:{rl:ip:203.0.113.7}:!ban x"),
    ("worker", "LPUSH stillroom:{s00}:x x"),
    ("worker", "LPUSH stillroom:unacked x"),
    ("worker", "LPUSH stillroom:dead-letters x"),
    ("worker", "RPUSH stillroom:{0}:todo x"),
    ("worker", "BRPOP stillroom:bans:times 1"),  # or take from it,
    ("worker", "BRPOP stillroom:{0}:todo 1"),
    (
        "worker",
        "LPUSH other.queue x",
    ),  # and another app's queues, bindings and workers are not ours
    ("worker", "BRPOP other.queue 1"),
    ("worker", "HSET unacked x y"),
    ("worker", "ZADD unacked_index 1 x"),
    ("worker", "SADD _kombu.binding.other.queue x"),
    ("worker", "PUBLISH /0.celery.pidbox x"),
    ("worker", "PSUBSCRIBE /0.celery.pidbox"),
    ("beat", "BRPOP stillroom.maintenance 1"),
    ("beat", "LPUSH stillroom.refresh x"),
    ("beat", "LPUSH stillroom:bans x"),
    ("beat", "GET stillroom:{0}:clock"),
    ("flower", "GET stillroom:{0}:e:product:1"),  # tasks are watched, not what they work on
    ("flower", "HGETALL stillroom:{s00}:s:x"),
    ("flower", "LPUSH stillroom:bans x"),
    ("flower", "PUBLISH /0.celery.pidbox x"),
    ("flower", "HGET unacked x"),
    ("health", "GET stillroom:{0}:clock"),
    ("health", "CONFIG GET *"),
    ("health", "SCRIPT KILL"),
    ("web", "SCRIPT KILL"),
    ("worker", "SCRIPT KILL"),
    ("replica", "GET stillroom:{0}:clock"),  # copies all there is, and does nothing else
    ("replica", "SLAVEOF h 1"),
    ("sentinel", "GET stillroom:{0}:clock"),
    ("sentinel", "CONFIG SET maxmemory 1"),
    ("sentinel", "PUBLISH /0.stillroom.pidbox x"),
    ("ops", "DEL stillroom:{0}:clock"),  # a look changes nothing
    ("ops", "PUBLISH /0.stillroom.pidbox x"),
]


@pytest.fixture(scope="module", params=SERVERS)
def company(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Company]:
    """Let every role do its work once, all at the same time."""
    with company_at_work(tmp_path_factory.mktemp("secrets"), binary_of(request)) as company:
        yield company


def test_everybody_could_work(company: Company) -> None:
    """Worker, beat, Flower, the app and people did all they do, and the server refused none of it."""
    refused = [(entry["username"], entry["object"]) for entry in company.admin.acl_log()]
    assert refused == []


@pytest.mark.parametrize("role", [role for role in roles() if role not in ELSEWHERE])
def test_a_role_may_do_what_it_does_and_no_more(company: Company, role: str) -> None:
    """The commands in users.acl are those that were heard, in both directions.

    Not for `ops`: a person may look at any key, and the server tells no listener of commands that look at itself.
    """
    seldom = SELDOM.get(role, set())
    may, did = granted(company.acl)[role] - seldom, company.witness.of(role) - seldom
    assert did - may == set(), "these are missing"
    assert may - did == set(), "nobody needs these"


@pytest.mark.parametrize(
    ("role", "command"),
    [
        *NOT_THEIRS,
        *((role, no) for role in roles() for no in NOBODY if (role, no) not in BUT),
    ],
)
def test_a_role_may_not_do_the_others_work(company: Company, role: str, command: str) -> None:
    """The server refuses a role the work of the others and allows its own."""
    assert may(company, "web", "GET stillroom:{0}:clock")
    assert not may(company, role, command)


def may(company: Company, user: str, command: str) -> bool:
    """Return whether the server allows the command; an unknown one is allowed to nobody."""
    try:
        said = company.admin.execute_command("ACL DRYRUN", user, *command.split())
    except redis.ResponseError as error:
        return "not found" not in str(error)
    return bool(said == b"OK")


def test_a_right_that_is_missing_is_told_from_an_outage(company: Company) -> None:
    """An act that a role may not do is told as such, whether a command or a script was refused."""
    with Stillroom(company.settings("worker")) as room:
        with pytest.raises(RedisUnavailable) as in_a_script:
            room.sessions.create("forged")
    with Stillroom(company.settings("web")) as room:
        with pytest.raises(RedisUnavailable) as in_a_command:
            room.state.run(room.dead_letters.add("message", "{}", "a lie"))
    assert in_a_script.value.lacks_right, in_a_script.value
    assert in_a_command.value.lacks_right, in_a_command.value
    assert not RedisUnavailable("timeout").lacks_right
    company.admin.acl_log_reset()


def test_a_worker_pushes_to_queues_and_nothing_else(company: Company) -> None:
    """A worker may push to these lists only; every other key of the server is refused."""
    queues = [
        "stillroom.refresh",
        "stillroom.refresh\x06\x163",
        "stillroom.maintenance",
        "w@h.stillroom.pidbox",
    ]
    for key in queues:
        assert company.admin.execute_command("ACL DRYRUN", "worker", "LPUSH", key, "x") == b"OK"
    found = set(company.admin.scan_iter(count=1_000))
    assert len(found) > 20
    for key in found:
        is_queue = (
            key.startswith((b"stillroom.refresh", b"stillroom.maintenance")) or b"pidbox" in key
        )
        for user in ("worker", "producer", "beat", "flower"):
            for command in ("LPUSH", "RPUSH"):
                said = company.admin.execute_command("ACL DRYRUN", user, command, key, "x")
                assert said != b"OK" or is_queue or key == b"stillroom:bans:times", (user, key)


def test_somebody_may_end_a_script_that_does_not_end(company: Company) -> None:
    """`ops` may end a script of any role that does not end and holds up everybody."""
    with company.client("flower") as flower, company.client("ops") as ops:
        flower.connection_pool.connection_kwargs["socket_timeout"] = 60
        endless = flower.script_load("while true do end")
        company.admin.config_set("busy-reply-threshold", 100)
        caller = threading.Thread(target=lambda: refused(flower, endless), daemon=True)
        caller.start()
        until(lambda: is_busy(ops), "the script to be called endless")
        assert ops.script_kill()
        caller.join(10)
        assert ops.ping()


def refused(client: Any, script: str) -> None:
    with suppress(redis.RedisError):
        client.evalsha(script, 0)


def is_busy(client: Any) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return "BUSY" in str(error)
    return False


def test_nobody_comes_in_without_their_password(company: Company) -> None:
    """A connection with no password, a wrong one or another role's is refused."""
    for user, password in [
        (None, None),
        ("default", ""),
        ("web", "wrong"),
        ("web", company.password("worker")),
    ]:
        with redis.Redis.from_url(company.server.url, username=user, password=password) as client:
            with pytest.raises(redis.AuthenticationError):
                client.ping()


@pytest.mark.parametrize("binary", SERVERS, indirect=True)
def test_a_restart_finds_what_was_written(binary: str | None, tmp_path: Path) -> None:
    """After a restart the server finds all that was written, for which Redis 7.0 needs rights of its own user."""
    with server_with_roles(tmp_path, binary, appendonly=True) as server:
        with Stillroom(settings_of(server, tmp_path, "web")) as room:
            session = room.sessions.create("u1", {"cart": [7]}, tags=["mobile"])
            server.restart()
            until(lambda: has_read_its_file(server), "the server")
            found = room.sessions.get(session.token)
            assert found is not None
            assert found.data == {"cart": [7]}


def has_read_its_file(server: EmbeddedServer) -> bool:
    try:
        return bool(admin(server).ping())
    except redis.exceptions.BusyLoadingError:
        return False


@pytest.fixture
def binary(request: pytest.FixtureRequest) -> str | None:
    return binary_of(request)
