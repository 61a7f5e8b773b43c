"""A server with the stack's Redis users, and a record of the commands that each user sent."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

from redis.connection import AbstractConnection

import redis
from stillroom import Settings
from stillroom.cli.credentials import users, write_secrets
from stillroom.embedded import EmbeddedServer
from tests.support.cluster import RedisCluster
from tests.support.crowd import PATIENT

ADMIN = "admin"  # the test's own user: moves time, listens, judges
CONTAINERS = {
    "ACL",
    "CLIENT",
    "CLUSTER",
    "CONFIG",
    "LATENCY",
    "MEMORY",
    "OBJECT",
    "SCRIPT",
    "SLOWLOG",
    "XGROUP",
}
LOGIN = {"AUTH", "HELLO"}
CONNECTION = "@connection"  # what libraries say about themselves, by the name of its category
# Whose work is not done here: a person's looks at any key, and what three servers need is in test_three_servers.py.
ELSEWHERE = {"ops", "replica", "sentinel"}
# Rights for moments that no test can force.
SELDOM = {
    "web": {"slowlog|len"},  # heard by no listener: it only looks at the server itself
    "worker": {
        "slowlog|len",
        "hsetnx",  # a finding begins
        "xclaim",  # takes over the events of a worker that died
        "exists",  # lists sessions while none is revoked
        "srem",  # takes its own mailbox away when it stops, if it is given the time
        "zrank",  # goes on behind an entry that stayed
        "object|freq",  # looks which entries are read most, where more than one waits
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
        "rpush",
        "script|load",
        "set",
        "smembers",
        "unwatch",
        "watch",
        "zrange",
        "zrem",
    },
}


@contextmanager
def server_with_roles(
    folder: Path,
    binary: str | None,
    *,
    appendonly: bool = False,
    options: Mapping[str, str] = {},
    **places: Any,
) -> Iterator[EmbeddedServer]:
    """Start a server whose users are those of `stillroom secrets`, and the test's."""
    write_secrets(folder)
    acl = folder / "users.acl"
    acl.write_text(acl.read_text() + f"user {ADMIN} on nopass ~* &* +@all\n")
    given = {**options, "aclfile": str(acl)}
    with EmbeddedServer(binary=binary, options=given, appendonly=appendonly, **places) as server:
        yield server


def url_of(server: EmbeddedServer, role: str) -> str:
    return server.url.replace("://", f"://{role}@")


def environment_of(
    server: EmbeddedServer,
    folder: Path,
    role: str,
    broker: str = "",
    cluster: RedisCluster | None = None,
) -> dict[str, str]:
    """Return the environment that the stack gives a process of this role. `cluster`: where the state is on one."""
    patience = {f"STILLROOM_{name.upper()}": str(value) for name, value in PATIENT.items()}
    places = {} if cluster is None else on_cluster(server, cluster, role)
    names = {"redis_url": "REDIS_URL"}
    return patience | {
        "REDIS_URL": url_of(server, role),
        "REDIS_PASSWORD_FILE": str(folder / f"{role}_password"),
        "STILLROOM_BROKER_URL": url_of(server, broker or role),
        **{names.get(n, f"STILLROOM_{n.upper()}"): str(value) for n, value in places.items()},
    }


def on_cluster(server: EmbeddedServer, cluster: RedisCluster, role: str) -> dict[str, Any]:
    """Return the settings of a role whose state is on the cluster, and whose cache is on the server."""
    return {
        "redis_url": url_of(cluster.nodes[0], role),
        "cache_url": url_of(server, role),
        "state_cluster": True,
    }


def settings_of(
    server: EmbeddedServer,
    folder: Path,
    role: str,
    broker: str = "",
    cluster: RedisCluster | None = None,
    **changes: Any,
) -> Settings:
    """Return the settings of a room of this role in the test's process."""
    places = {} if cluster is None else on_cluster(server, cluster, role)
    given = {
        "redis_url": url_of(server, role),
        "broker_url": url_of(server, broker or role),
        "redis_password": (folder / f"{role}_password").read_text(),
    }
    return Settings(**PATIENT | given | places | changes)


def load_roles(folder: Path, node: EmbeddedServer) -> None:
    """Give a node that runs the users of an aclfile; its own default user stays for the test."""
    with redis.Redis.from_url(node.url) as client:
        for line in (folder / "users.acl").read_text().splitlines():
            _, name, *rules = line.split(" ")
            if name != "default":
                client.execute_command("ACL", "SETUSER", name, *_selectors_whole(rules))


def _selectors_whole(words: list[str]) -> Iterator[str]:
    """Yield rules, each selector in its brackets as one: ACL SETUSER takes it as one argument."""
    selector: list[str] = []
    for word in words:
        if word.startswith("(") or selector:
            selector.append(word)
            if word.endswith(")"):
                yield " ".join(selector)
                selector = []
        else:
            yield word


def admin(server: EmbeddedServer) -> Any:
    # Without a timeout: one that listens has nothing to hear for a while.
    return redis.Redis.from_url(url_of(server, ADMIN), password="any", socket_timeout=None)


def granted(acl: Path) -> dict[str, set[str]]:
    """Return what each user may do, by the words of the rules: commands, subcommands, and one category."""
    lines = (
        line.replace("(", " ").replace(")", " ").split()
        for line in users(acl.read_text().splitlines())
    )
    return {words[1]: {word[1:] for word in words[2:] if word.startswith("+")} for words in lines}


class Witness:
    """Listens to the server and writes down which user sent which command, those inside scripts included.

    The server names a command's connection, and tells whose it is only as long as the connection lives. So no
    connection of this process ends before its commands were heard; one of another process may, and is nobody's.
    """

    def __init__(self, server: EmbeddedServer) -> None:
        self._client = admin(server)
        self._monitor = self._client.monitor()
        self._users: dict[str, str] = {}
        self._last = ""  # whose script is running
        self._caught_up = threading.Event()
        self._catching_up = threading.Lock()
        self._hearing = patch.object(AbstractConnection, "disconnect", self._hearing_out())
        self.said: dict[str, set[str]] = defaultdict(set)

    def __enter__(self) -> Self:
        self._monitor.__enter__()
        self._connection_commands = {
            text.decode().partition("|")[0]
            for text in self._client.execute_command("ACL CAT connection")
        }
        threading.Thread(target=self._listen, name="witness", daemon=True).start()
        self._hearing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._hearing.stop()
        self._client.close()

    def _hearing_out(self) -> Callable[..., None]:
        """Return the end of a connection that waits until all its commands were heard."""
        end = AbstractConnection.disconnect

        def disconnect(connection: Any, *args: Any, **kwargs: Any) -> None:
            if connection._sock is not None and connection.username != ADMIN:
                self._catch_up()
            end(connection, *args, **kwargs)

        return disconnect

    def _catch_up(self) -> None:
        with self._catching_up, suppress(redis.RedisError):
            self._caught_up.clear()
            self._client.echo(ADMIN)
            assert self._caught_up.wait(10)

    def _listen(self) -> None:
        try:
            for event in self._monitor.listen():
                self._take(event)
        except (redis.RedisError, ValueError, OSError):
            return  # the server, or the test, has ended

    def _take(self, event: dict[str, Any]) -> None:
        words = event["command"].split(" ")
        if words == ["ECHO", ADMIN]:
            self._caught_up.set()
        command = words[0].upper()
        if event["client_type"] != "lua":
            address = f"{event['client_address']}:{event['client_port']}"
            if command in LOGIN:  # another connection may have had this port
                self._users.pop(address, None)
            self._last = self._user_at(address)
        if command in CONTAINERS:
            command += "|" + words[1].upper()
        self.said[self._last].add(command.lower())

    def _user_at(self, address: str) -> str:
        """Return the user of this connection, asked when it is first seen because it may be gone a moment later."""
        if address not in self._users:
            for client in self._clients():
                if client["user"] != "default":  # nobody is: this one is still logging in
                    self._users[client["addr"]] = client["user"]
        return self._users.get(address, "")

    def _clients(self) -> list[dict[str, str]]:
        """Return all connections, as soon as no script holds the server up."""
        while True:
            try:
                found: list[dict[str, str]] = self._client.client_list()
                return found
            except redis.ResponseError as error:
                if not str(error).startswith("BUSY"):
                    raise
            time.sleep(0.01)

    def of(self, user: str) -> set[str]:
        """Return the commands of a user; what a library says about its connection has one name."""
        return {
            CONNECTION if said.partition("|")[0] in self._connection_commands else said
            for said in self.said[user]
        }
