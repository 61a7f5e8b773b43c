"""A real Redis Cluster of embedded servers: three primaries or as many as asked for, and replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import redis
from stillroom.embedded import EmbeddedServer
from stillroom.wire.topology import SLOTS, slot_of

NODES = 3
AGREED_WITHIN_S = 30.0
# Without an answer for this long a node is down, and its replica takes over.
NODE_TIMEOUT_MS = 1_000
# What a process waits for nodes where one is frozen. A node that is well answers in time, also on a busy machine.
HURRIED = {"connect_timeout": 0.5, "command_timeout": 0.5, "call_timeout": 0.75}


class RedisCluster:
    """A cluster, started with the `with` block, which begins once all slots are served."""

    def __init__(
        self, binary: str | None = None, replicas: int = 0, primaries: int = NODES
    ) -> None:
        options = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": str(NODE_TIMEOUT_MS),
            "repl-diskless-sync-delay": "0",
            "cluster-allow-replica-migration": "no",  # a node stays a primary without its last slot
        }
        count = primaries + replicas
        self._make = lambda: EmbeddedServer(binary=binary, options=options)
        self.nodes = [self._make() for _ in range(count)]
        self._primaries, self._replicas = primaries, replicas
        self._stack = ExitStack()
        self._clients: dict[EmbeddedServer, Any] = {}

    @property
    def url(self) -> str:
        """Return the URL of the first node."""
        return self.nodes[0].url

    def client(self, node: EmbeddedServer) -> Any:
        """Return a plain client of one node, with replies as the server gives them."""
        if node not in self._clients:
            client = self._stack.enter_context(redis.Redis.from_url(node.url, protocol=2))
            client.response_callbacks.clear()
            self._clients[node] = client
        return self._clients[node]

    def owner(self, key: bytes) -> EmbeddedServer:
        """Return the node that serves this key's slot."""
        return next(node for node in self.nodes if self._serves(node, slot_of(key)))

    def move(self, slot: int, target: EmbeddedServer) -> None:
        """Give a slot without keys to another node, as an operator's tool does at the end of a move."""
        for node in (target, *self.nodes):
            self.client(node).execute_command("CLUSTER SETSLOT", slot, "NODE", self.id_of(target))
        # Told of two moves in a row, a node may believe the first one, whose epoch it heard of last.
        self.await_that("all nodes see the same", lambda: len({*map(self._view, self.nodes)}) == 1)

    def reshard(self, slot: int, target: EmbeddedServer) -> None:
        """Move a slot and its keys to another node, as `redis-cli --cluster reshard` does."""
        old = next(node for node in self.nodes if self._serves(node, slot))
        begin_move(self, slot, old, target)
        while keys := self.keys_in(slot, old, 10):
            migrate(self, old, target, keys)
        self.move(slot, target)

    def promote(self, replica: EmbeddedServer, slot: int) -> None:
        """Have a replica take the place of its master, who loses nothing and follows it."""
        self.await_that("it is in step", lambda: self._is_in_step(replica))
        self.client(replica).execute_command("CLUSTER FAILOVER")
        self.await_that(
            "it alone has its master's slots",
            lambda: [node for node in self.nodes if self._serves(node, slot)] == [replica],
        )

    def keys_in(self, slot: int, node: EmbeddedServer, most: int = 100) -> list[bytes]:
        found: list[bytes] = self.client(node).execute_command("CLUSTER GETKEYSINSLOT", slot, most)
        return found

    def join(self, count: int) -> list[EmbeddedServer]:
        """Start new primaries, which have no slots yet. Return them."""
        assert self._replicas == 0, "nodes join a cluster without replicas"
        fresh = [self._make() for _ in range(count)]
        for node in fresh:
            self._stack.enter_context(node)
            epoch = len(self.nodes) + 1
            self.client(node).execute_command("CLUSTER SET-CONFIG-EPOCH", epoch)
            self.nodes.append(node)
            self.client(self.nodes[0]).execute_command("CLUSTER MEET", "127.0.0.1", node.port)
        self.await_that("all nodes meet", lambda: all(map(self._knows_all, self.nodes)))
        self.await_that("all slots are served", lambda: all(map(self._is_ready, self.nodes)))
        return fresh

    def leave(self, node: EmbeddedServer) -> None:
        """Take a node without slots out of the cluster, and end it."""
        gone = self.id_of(node)
        self.nodes.remove(node)
        for other in self.nodes:
            self.client(other).execute_command("CLUSTER FORGET", gone)
        node.kill()

    @contextmanager
    def frozen(self, *nodes: EmbeddedServer) -> Iterator[None]:
        """Freeze nodes while the block runs. The others serve what they have, however long that takes."""
        self._cover("no")
        try:
            for node in nodes:
                node.freeze()
            yield
        finally:
            for node in nodes:
                node.thaw()
            self._cover("yes")
            thawed_ms = int(time.time() * 1_000)
            # A node that wakes up serves at first, and then sees that it has not heard of the others for long.
            self.await_that(
                "all nodes have heard of each other since",
                lambda: all(self._has_heard_since(node, thawed_ms) for node in self.nodes),
            )
            self.await_that(
                "all slots are served again", lambda: all(map(self._is_ready, self.nodes))
            )

    def _cover(self, how: str) -> None:
        """Say whether all slots have to be served for any to be."""
        for node in self.nodes:
            self.client(node).config_set("cluster-require-full-coverage", how)

    def id_of(self, node: EmbeddedServer) -> str:
        return str(self.client(node).execute_command("CLUSTER MYID").decode())

    def flush(self) -> None:
        for node in self.nodes[: self._primaries]:
            self.client(node).flushall()
            self.client(node).script_flush()

    def await_that(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait until the nodes agree on the condition."""
        until = time.monotonic() + AGREED_WITHIN_S
        while not holds():
            assert time.monotonic() < until, f"the cluster did not come to this: {what}"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        try:
            self._form()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _form(self) -> None:
        for node in self.nodes:
            self._stack.enter_context(node)
        first, *others = [self.client(node) for node in self.nodes]
        for epoch, node in enumerate(self.nodes, 1):
            # Nodes with the same epoch settle it later, and slots that were moved meanwhile go back.
            self.client(node).execute_command("CLUSTER SET-CONFIG-EPOCH", epoch)
        bounds = [SLOTS * n // self._primaries for n in range(self._primaries + 1)]
        for client, begin, end in zip([first, *others], bounds, bounds[1:], strict=False):
            client.execute_command("CLUSTER ADDSLOTS", *range(begin, end))
        for node in self.nodes[1:]:
            first.execute_command("CLUSTER MEET", "127.0.0.1", node.port)
        self.await_that("all nodes meet", lambda: all(map(self._knows_all, self.nodes)))
        for number, node in enumerate(self.nodes[self._primaries :]):
            master = self.id_of(self.nodes[number])
            self.client(node).execute_command("CLUSTER REPLICATE", master)
        self.await_that("all slots are served", lambda: all(map(self._is_ready, self.nodes)))
        # One that never had its master's data may not take over.
        replicas = self.nodes[self._primaries :]
        self.await_that("replicas are in step", lambda: all(map(self._is_in_step, replicas)))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _knows_all(self, node: EmbeddedServer) -> bool:
        return len(self._lines(node)) == len(self.nodes)

    def _is_ready(self, node: EmbeddedServer) -> bool:
        info = self.client(node).execute_command("CLUSTER INFO").decode()
        lines = self._lines(node)
        replicas = sum(" slave " in line for line in lines)
        return "cluster_state:ok" in info and replicas == self._replicas

    def _has_heard_since(self, node: EmbeddedServer, ms: int) -> bool:
        """Return whether all others have answered this node since then (ms since 1970), and are up for it."""
        own = self.id_of(node)
        others = [words for line in self._lines(node) if (words := line.split())[0] != own]
        return all(int(words[5]) >= ms and "fail" not in words[2] for words in others)

    def _is_in_step(self, replica: EmbeddedServer) -> bool:
        info = self.client(replica).execute_command("INFO", "replication")
        return b"master_link_status:up" in info

    def _view(self, node: EmbeddedServer) -> frozenset[tuple[str, ...]]:
        """Return each node's view: its id, its epoch, its slots."""
        lines = [line.split() for line in self._lines(node)]
        return frozenset((words[0], words[6], *words[8:]) for words in lines)

    def _lines(self, node: EmbeddedServer) -> list[str]:
        text: str = self.client(node).execute_command("CLUSTER NODES").decode()
        return [
            line.replace("myself,", "") for line in text.splitlines() if "handshake" not in line
        ]

    def _serves(self, node: EmbeddedServer, slot: int) -> bool:
        for first, last, master, *_ in self.client(node).execute_command("CLUSTER SLOTS"):
            if first <= slot <= last:
                return bool(master[1] == node.port)
        return False


def begin_move(cluster: RedisCluster, slot: int, old: EmbeddedServer, new: EmbeddedServer) -> None:
    cluster.client(new).execute_command("CLUSTER SETSLOT", slot, "IMPORTING", cluster.id_of(old))
    cluster.client(old).execute_command("CLUSTER SETSLOT", slot, "MIGRATING", cluster.id_of(new))


def migrate(
    cluster: RedisCluster, old: EmbeddedServer, new: EmbeddedServer, keys: list[bytes]
) -> None:
    if keys:
        place = ("127.0.0.1", new.port, "", 0, 5_000, "KEYS")
        cluster.client(old).execute_command("MIGRATE", *place, *keys)


def give_away(
    cluster: RedisCluster, slot: int, old: EmbeddedServer, new: EmbeddedServer, keys: list[bytes]
) -> None:
    begin_move(cluster, slot, old, new)
    migrate(
        cluster,
        old,
        new,
        keys or cluster.client(old).execute_command("CLUSTER GETKEYSINSLOT", slot, 100),
    )
    cluster.move(slot, new)
