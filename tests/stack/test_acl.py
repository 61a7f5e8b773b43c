"""Each role of the stack has a Redis user that can do its work, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import redis
from stillroom import Stillroom
from stillroom.cli.credentials import roles
from stillroom.embedded import EmbeddedServer
from tests.conftest import SERVERS, binary_of
from tests.support.celery_process import until
from tests.support.company import Company, company_at_work
from tests.support.roles import admin, granted, server_with_roles, settings_of

NOBODY = [
    "FLUSHALL",
    "KEYS *",
    "EVAL x 0",
    "FUNCTION LOAD x",
    "CONFIG SET maxmemory 1",
    "ACL SETUSER web +@all",
    "SHUTDOWN",
    "MONITOR",
]
# Rights for moments that no test can force.
SELDOM = {
    "web": {"slowlog|len"},  # heard by no listener: it only looks at the server itself
    "worker": {
        "slowlog|len",
        "hsetnx",  # a finding begins
        "xclaim",  # takes over the events of a worker that died
        "srem",  # takes its own mailbox away when it stops, if it is given the time
        "zrank",  # goes on behind an entry that stayed
        "zpopmin",  # forgets the oldest of too many counts
        "rpush",  # gives a message back that came as it was told to stop
        "unwatch",  # lets go of one that could not be given back
    },
    # Who is first gives back what a killed worker held; mostly a worker is.
    "flower": {
        "get",
        "hdel",
        "hget",
        "lpush",
        "set",
        "smembers",
        "unwatch",
        "watch",
        "zrange",
        "zrem",
    },
}
# What a role can't do, each for its reason.
NOT_THEIRS = [
    ("web", "BRPOP stillroom.refresh 1"),  # an app takes no tasks,
    ("web", "LPUSH stillroom.refresh x"),  # orders them as `producer`,
    ("web", "DEL stillroom.refresh"),
    ("web", "XADD stillroom:health * a b"),  # sees how all are, and tells no lies about it,
    ("web", "SCAN 0"),  # and never looks through the keyspace
    ("producer", "LRANGE stillroom.refresh 0 -1"),  # others' orders are not read,
    ("producer", "GET stillroom:{0}:e:product:1"),
    ("producer", "PUBLISH /0.celery.pidbox x"),  # no worker is stopped
    ("worker", "HSET stillroom:{s00}:s:forged _u admin"),  # no session is made by a worker,
    ("worker", "SET stillroom:{s00}:s:forged x"),
    ("worker", "RENAME stillroom:{0}:l:x stillroom:{s00}:s:forged"),
    ("beat", "BRPOP stillroom.maintenance 1"),
    ("beat", "LPUSH stillroom.refresh x"),
    ("beat", "GET stillroom:{0}:clock"),
    ("flower", "GET stillroom:{0}:e:product:1"),  # tasks are watched, not what they work on
    ("flower", "HGETALL stillroom:{s00}:s:x"),
    ("health", "GET stillroom:{0}:clock"),
    ("health", "CONFIG GET *"),
    ("ops", "DEL stillroom:{0}:clock"),  # a look changes nothing
    ("ops", "PUBLISH /0.celery.pidbox x"),
]


@pytest.fixture(scope="module", params=SERVERS)
def company(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Company]:
    """Everybody has done their work, once, all at the same time."""
    with company_at_work(tmp_path_factory.mktemp("secrets"), binary_of(request)) as company:
        yield company


def test_everybody_could_work(company: Company) -> None:
    """Worker, beat, Flower, the app and people did all they do, and the server refused none of it."""
    refused = [(entry["username"], entry["object"]) for entry in company.admin.acl_log()]
    assert refused == []


@pytest.mark.parametrize("role", [role for role in roles() if role != "ops"])
def test_a_role_may_do_what_it_does_and_no_more(company: Company, role: str) -> None:
    """The commands in users.acl are those that were heard, in both directions.

    Not for `ops`: a person may look at any key, and the server tells no listener of commands that look at itself.
    """
    seldom = SELDOM.get(role, set())
    may, did = granted(company.acl)[role] - seldom, company.witness.of(role) - seldom
    assert did - may == set(), "these are missing"
    assert may - did == set(), "nobody needs these"


@pytest.mark.parametrize(
    ("role", "command"), [*NOT_THEIRS, *((role, no) for role in roles() for no in NOBODY)]
)
def test_a_role_may_not_do_the_others_work(company: Company, role: str, command: str) -> None:
    """Asked, the server says no; of what the role does need it says yes."""

    def may(user: str, command: str) -> bool:
        said = company.admin.execute_command("ACL DRYRUN", user, *command.split())
        return bool(said == b"OK")

    assert may("web", "GET stillroom:{0}:clock")
    assert not may(role, command)


def test_nobody_comes_in_without_their_password(company: Company) -> None:
    """Not with none, not with a wrong one, not with somebody else's."""
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
    """The server reads its own file as a user too: Redis 7.0 threw scripts' writes away when it had no rights."""
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
