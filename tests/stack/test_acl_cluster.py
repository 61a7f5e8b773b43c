"""Each role can do its work where the state is on a cluster, and nothing else: its keys have other names there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import redis
from stillroom.cli.credentials import roles, write_secrets
from stillroom.embedded import EmbeddedServer
from stillroom.keys import HOMES, Keys
from tests.conftest import SERVERS, binary_of
from tests.support.cluster import RedisCluster
from tests.support.company import Company, do_all_work
from tests.support.roles import ADMIN, ELSEWHERE, SELDOM, Witness, granted, load_roles
from tests.support.spread_client import ClientOfAll, SpreadClient

pytestmark = [
    pytest.mark.timeout(500),  # everybody works for a minute, longer on a busy machine
    pytest.mark.any_server,  # what each kind of server asks of a role is seen in test_acl.py
]
ON_A_CLUSTER = {
    "STILLROOM_STATE_CLUSTER": "1",
    "REDIS_URL": "redis://state:6379",
    "STILLROOM_CACHE_URL": "redis://cache:6379",
    "STILLROOM_BROKER_URL": "redis://broker:6379",
}
HOME = HOMES[0x1F].decode()
# What a role can't do, each for its reason.
NOT_THEIRS = [
    ("web", "XADD stillroom:{one}:health * a b"),  # it sees how all are, and tells no lies,
    ("web", "XADD stillroom:{one}:dead-letters * a b"),
    ("web", "ZADD stillroom:{one}:workers 1 x"),
    ("web", "DEL stillroom:{one}:health"),
    ("web", "CLUSTER NODES"),  # asks where slots are, and no more,
    ("web", "CLUSTER FAILOVER"),
    ("web", "CLUSTER RESET"),
    ("web", "GET stillroom:bans"),  # has no key that nobody has on a cluster,
    ("web", "GET stillroom:{rl:ip:203.0.113.7}:few"),
    ("web", "GET other:{one}:bans"),  # and no other namespace's
    ("worker", "HSET stillroom:{s00}:s:forged _u admin"),  # no session is made by a worker,
    ("worker", "SET stillroom:{s00}:s:forged x"),
    ("worker", "LPUSH stillroom:{one}:bans x"),  # no list where none belongs,
    ("worker", "LPUSH stillroom:{one}:abuse x"),
    ("worker", f"LPUSH stillroom:{HOME}:abuse x"),
    ("worker", f"LPUSH stillroom:{HOME}{{rl:ip:203.0.113.7}}:!ban x"),
    ("worker", f"XADD stillroom:{HOME}:health * a b"),  # and nothing in shards but what they have
    ("worker", "CLUSTER SETSLOT 0 NODE x"),
    ("worker", "CLUSTER FORGET x"),
    ("worker", "MIGRATE h 1 k 0 1"),
    ("ops", "CLUSTER FAILOVER"),  # a look changes nothing
    ("ops", "CLUSTER SETSLOT 0 STABLE"),
    ("producer", "CLUSTER SLOTS"),  # they know only the broker, which is no cluster
    ("producer", "GET stillroom:{one}:bans"),
    ("beat", "CLUSTER SLOTS"),
    ("flower", "CLUSTER SLOTS"),
    ("flower", "HGETALL stillroom:{s00}:s:x"),
    ("health", "GET stillroom:{one}:agreed"),
]
LOOKS = [
    "CLUSTER INFO",
    "CLUSTER NODES",
    "CLUSTER SHARDS",
    "CLUSTER SLOTS",
    "CLUSTER KEYSLOT x",
    "READONLY",
]


class CompanyOfACluster(Company):
    """Three nodes with the state, and one server with the cache and the queues."""

    cluster: RedisCluster
    witnesses: list[Witness]  # one of each server

    def heard(self, role: str) -> set[str]:
        """Return the commands that a role has sent to any of the servers."""
        return set().union(*(witness.of(role) for witness in self.witnesses))

    @property
    def servers(self) -> list[Any]:
        """Return a client of each server, as the test's own user."""
        nodes = [self.cluster.client(node) for node in self.cluster.nodes]
        return [*nodes, self.others]

    others: Any


@pytest.fixture(scope="module", params=SERVERS)
def company(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CompanyOfACluster]:
    """Let every role do its work once, all at the same time."""
    with company_on_a_cluster(tmp_path_factory.mktemp("secrets"), binary_of(request)) as company:
        do_all_work(company)
        yield company


@contextmanager
def company_on_a_cluster(folder: Path, binary: str | None) -> Iterator[CompanyOfACluster]:
    """Start the servers, and load the roles on each of them."""
    with patch.dict(os.environ, ON_A_CLUSTER):
        write_secrets(folder)
    with (
        RedisCluster(binary=binary) as cluster,
        EmbeddedServer(binary=binary) as server,
        SpreadClient.from_url(cluster.url) as state,
        redis.Redis.from_url(server.url) as others,
    ):
        servers = (*cluster.nodes, server)
        for node in servers:
            load_roles(folder, node)
            let_admin_in(node)
        company = CompanyOfACluster(server, folder, ClientOfAll(state, others), cluster=cluster)
        company.others = others
        with ExitStack() as listening:
            company.witnesses = [listening.enter_context(Witness(node)) for node in servers]
            yield company


def let_admin_in(node: EmbeddedServer) -> None:
    """Give a node the test's user, who listens."""
    with redis.Redis.from_url(node.url) as client:
        client.execute_command("ACL", "SETUSER", ADMIN, "on", "nopass", "~*", "&*", "+@all")


def test_everybody_could_work(company: CompanyOfACluster) -> None:
    """Worker, beat, Flower, the app and people did all they do, and no node refused any of it."""
    refused = [client.execute_command("ACL", "LOG") for client in company.servers]
    assert refused == [[]] * 4


@pytest.mark.parametrize("role", [role for role in roles() if role not in ELSEWHERE])
def test_a_role_may_do_what_it_does_and_no_more(company: CompanyOfACluster, role: str) -> None:
    """The commands in the users.acl of a cluster are those that any of the servers heard, in both directions."""
    seldom = SELDOM.get(role, set())
    may, did = granted(company.acl)[role] - seldom, company.heard(role) - seldom
    assert did - may == set(), "these are missing"
    assert may - did == set(), "nobody needs these"


@pytest.mark.parametrize(("role", "command"), NOT_THEIRS)
def test_a_role_may_not_do_the_others_work(
    company: CompanyOfACluster, role: str, command: str
) -> None:
    """Each node refuses a role the work of the others, and allows its own."""
    for node in company.cluster.nodes:
        assert may(company, node, "web", f"XADD stillroom:{HOME}:abuse * a b")
        assert not may(company, node, role, command)


def test_a_role_may_use_all_shards(company: CompanyOfACluster) -> None:
    """An app and a worker may use the keys of each of the 64 shards."""
    keys, node = Keys("stillroom", state_in_cluster=True), company.cluster.nodes[0]
    for home in keys.homes:
        for key in (keys.abuse_at(home), keys.widths(home)):
            for role in ("web", "worker"):
                assert may(company, node, role, f"DEL {key.decode()}"), (role, key)


@pytest.mark.parametrize("command", LOOKS)
def test_a_person_may_look_at_the_cluster(company: CompanyOfACluster, command: str) -> None:
    """`ops` sees how the cluster is."""
    assert may(company, company.cluster.nodes[0], "ops", command)


def may(company: CompanyOfACluster, node: EmbeddedServer, user: str, command: str) -> bool:
    """Return whether the node allows the command; an unknown one is allowed to nobody."""
    client = company.cluster.client(node)
    try:
        said = client.execute_command("ACL", "DRYRUN", user, *command.split())
    except redis.ResponseError as error:
        return "not found" not in str(error)
    return bool(said == b"OK")
