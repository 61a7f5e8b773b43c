"""A Redis Cluster, by wires that follow their slot from node to node. topology.py says which node has it.

What a node says of the slots is asked for once, and again when a node says MOVED or does not answer, once a second
at the most. A batch belongs to one slot. Commands that were answered with MOVED were not carried out: they go to
the node that was named, once.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from stillroom.errors import FINAL, RedisRefused, RedisUnavailable
from stillroom.settings import Settings
from stillroom.wire.aio import AsyncWire, running_loop
from stillroom.wire.breaker import Breaker
from stillroom.wire.forks import reset_after_fork
from stillroom.wire.idle import IdleTimeout, Lateness
from stillroom.wire.server import Command, Server
from stillroom.wire.sync import Wire
from stillroom.wire.topology import Address, Moved, Topology, named

OF_SLOTS: list[Command] = [(b"CLUSTER", b"SLOTS")]


class _AnyWire(Protocol):
    """The part that Wire and AsyncWire have in common."""

    server: Server
    breaker: Breaker

    @property
    def connections(self) -> int: ...
    def ping(self, *, to_read: bool = False) -> None: ...
    def forget(self) -> None: ...


W = TypeVar("W", bound=_AnyWire)


class _Cluster(Generic[W]):
    """The nodes as one server: a room's `wire`. Batches go through the wires of `shards`."""

    _make: Callable[[Server], W]

    def __init__(
        self,
        settings: Settings,
        url: str,
        name: str,
        slots: Sequence[int],
        setting: str = "cache_url",
        *,
        followed: Sequence[int] | None = None,
        probe: bytes = b"",
    ) -> None:
        self.settings = settings
        self._probe = probe
        self._url = url
        self._name = name
        self._setting = setting
        self._followed = slots if followed is None else followed
        self._wires: dict[Address, W] = {}
        self._numbers = itertools.count(1)
        parts = urlsplit(url)
        self._seed = parts.hostname or "localhost", parts.port or 6379
        self.topology = Topology(self._seed, slots)
        self.breaker: Breakers = Breakers(self._wires)
        self._follow()
        self.reset()
        reset_after_fork(self)

    def _follow(self) -> None:
        """Make the wires of the shards."""
        raise NotImplementedError

    def reset(self) -> None:
        self._lock = threading.RLock()

    @property
    def server(self) -> Server:
        """Return the node that the settings name."""
        return self.at(self._seed).server

    @property
    def connections(self) -> int:
        """Return how many connections are open now, to all nodes."""
        return sum(wire.connections for wire in self.wires)

    @property
    def wires(self) -> list[W]:
        """Return the nodes that were spoken to."""
        return list(self._wires.values())

    def at(self, address: Address) -> W:
        """Return the wire to this node."""
        wire = self._wires.get(address)
        if wire is None:
            with self._lock:
                wire = self._wires.get(address) or self._new(address)
                self._wires[address] = wire
        return wire

    def learn(self, ranges: Sequence[Any], asked: Address) -> None:
        """Take in a reply to CLUSTER SLOTS, and forget the nodes that have left.

        Nobody would talk to one again, so its breaker would stay open: for a node that is gone all were away.
        """
        before = self._homes()
        self.topology.learn(ranges, asked)
        for _, node in self._homes() - before if before else ():
            self.at(node).server.leave()
        with self._lock:
            gone = [node for node in self._wires if self._has_left(node)]
            left = [self._wires.pop(node) for node in gone]
        for wire in left:
            wire.forget()

    def moved(self, slot: int, named: Address) -> W:
        """Return the wire to the node that has the slot now: see Topology.moved.

        A node that has come to a slot is asked anew who it is: it may have been a replica until now.
        """
        wire = self.at(self.topology.moved(slot, named))
        wire.server.leave()
        return wire

    def _homes(self) -> set[tuple[int, Address]]:
        """Return the slots that are followed, each with the node that has it."""
        return {
            (slot, self.topology.owner(slot)) for slot in self._followed if slot in self.topology
        }

    def _has_left(self, node: Address) -> bool:
        """Return whether the cluster no longer names this node.

        It may know the node of the settings by another address; that one stays for as long as it answers.
        """
        is_named = node == self._seed and not self._wires[node].breaker.is_open
        return node not in self.topology.nodes and not is_named

    def _new(self, address: Address) -> W:
        host, port = address
        url = at_address(self._url, host, port)
        name = f"{self._name}, node {next(self._numbers)}"
        is_found = address != self._seed
        server = Server(
            *(self.settings, url, name, self._setting),
            is_node=True,
            is_found=is_found,
            probe=self._probe,
        )
        wire = self._make(server)
        wire.breaker.recovered = self.breaker.recovered
        return wire


class ClusterWire(_Cluster[Wire]):
    """A cluster for threads and greenlets."""

    _make = Wire

    def _follow(self) -> None:
        self.shards = [ShardWire(self, slot, lambda wire: wire) for slot in self._followed]

    def ping(self, *, to_read: bool = False) -> None:
        """Ask where the slots are, and PING each node that has one. Raises RedisUnavailable.

        `to_read`: other nodes may have what is read, so one that is away is no error unless all are.
        """
        _ping(self, self.shards[0], to_read)

    def close(self) -> None:
        """See Wire.close."""
        for wire in self.wires:
            wire.close()


class AsyncClusterWire(_Cluster[AsyncWire]):
    """A cluster for asyncio."""

    _make = AsyncWire

    def _follow(self) -> None:
        # The question after the slots that is under way in each event loop.
        self.asked: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        self.shards = [AsyncShardWire(self, slot) for slot in self._followed]
        # The prober's, and whoever has no event loop.
        self.shards_for_threads = [ShardWire(self, slot, _for_threads) for slot in self._followed]

    def ping(self, *, to_read: bool = False) -> None:
        """See ClusterWire.ping; blocks, so it is for start-up."""
        _ping(self, self.shards_for_threads[0], to_read)

    async def close(self) -> None:
        """See AsyncWire.close."""
        await asyncio.gather(*(wire.close() for wire in self.wires))


class _Follower(Generic[W]):
    """The follower of one slot, which is the server to a body and the wire to a driver."""

    def __init__(self, cluster: _Cluster[W], slot: int) -> None:
        self._cluster = cluster
        self._topology = cluster.topology
        self.slot = slot

    @property
    def server(self) -> Server:
        """Return the node that has the slot, as far as is known."""
        try:
            return self._cluster.at(self._topology.owner(self.slot)).server
        except RedisUnavailable:
            return self._cluster.server

    @property
    def address(self) -> str:
        """Return that node's host and port; empty while none is known."""
        try:
            return named(self._topology.owner(self.slot))
        except RedisUnavailable:
            return ""

    @property
    def run(self) -> bytes:
        """Return the run id of that node: a slot that has moved is on another server."""
        return self.server.run

    @property
    def primary(self) -> str | None:
        return self.server.primary

    def now_ms(self) -> int:
        return self.server.now_ms()

    def ask_time(self) -> None:
        self.server.ask_time()

    def doubt_clock(self) -> None:
        self.server.doubt_clock()


class ShardWire(_Follower[W]):
    """Batches to whichever node has the slot. `pick` gives the blocking wire to a node."""

    def __init__(self, cluster: _Cluster[W], slot: int, pick: Callable[[W], Wire]) -> None:
        super().__init__(cluster, slot)
        self._pick = pick

    def execute(
        self,
        commands: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
    ) -> list[Any]:
        """See Wire.execute."""
        how = {"idempotent": idempotent, "timed": timed}
        deadline = time.monotonic() + left
        try:
            if self._topology.is_to_be_asked_for():
                self.ask(deadline)
            wire = self.at(self._topology.owner(self.slot))
            return wire.execute(commands, deadline - time.monotonic(), **how)
        except RedisRefused as refused:
            self._topology.doubt(self.slot, refused)
            moved = Moved(commands, refused)
        except RedisUnavailable as error:
            self._topology.doubt(self.slot, error)
            raise
        wire = self._pick(self._cluster.moved(self.slot, moved.named))
        left = deadline - time.monotonic()
        try:
            replies = wire.execute(moved.commands, left, **how)
        except RedisRefused as again:
            replies = again.replies
        return moved.merged(replies)

    def ask(self, deadline: float) -> None:
        """Learn where the slots are from the first node that answers. Raises RedisUnavailable if none is known."""
        failure = RedisUnavailable("refused", "no node answers")
        for address in self._topology.whom_to_ask():
            try:
                (ranges,) = self.at(address).execute(OF_SLOTS, deadline - time.monotonic())
                return self._cluster.learn(ranges, address)
            except RedisUnavailable as error:
                failure = _final_if_no_cluster(error, self._cluster.server)
        if not self._topology.owners:
            raise failure
        return None

    def at(self, address: Address) -> Wire:
        """Return the blocking wire to this node."""
        return self._pick(self._cluster.at(address))


class AsyncShardWire(_Follower[AsyncWire]):
    """Follow one shard of a cluster for asyncio. See ShardWire."""

    _cluster: AsyncClusterWire

    async def execute(
        self,
        commands: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
    ) -> list[Any]:
        """See Wire.execute."""
        how = {"idempotent": idempotent, "timed": timed}
        deadline = time.monotonic() + left
        try:
            if self._topology.is_to_be_asked_for():
                deadline = await self.ask(deadline)
            wire = self._cluster.at(self._topology.owner(self.slot))
            return await wire.execute(commands, deadline - time.monotonic(), **how)
        except RedisRefused as refused:
            self._topology.doubt(self.slot, refused)
            moved = Moved(commands, refused)
        except RedisUnavailable as error:
            self._topology.doubt(self.slot, error)
            raise
        wire = self._cluster.moved(self.slot, moved.named)
        left = deadline - time.monotonic()
        try:
            replies = await wire.execute(moved.commands, left, **how)
        except RedisRefused as again:
            replies = again.replies
        return moved.merged(replies)

    async def ask(self, deadline: float) -> float:
        """See ShardWire.ask. Tasks that want to know at the same time wait for one answer.

        Returns the deadline as the loop's own work has moved it.
        """
        loop, asked = running_loop(), self._cluster.asked
        question = asked.get(loop)
        if question is None:
            patience = self._cluster.settings.call_timeout
            question = asked[loop] = loop.create_task(self._ask(time.monotonic() + patience))
            question.add_done_callback(partial(_is_answered, asked, loop))
        try:
            async with IdleTimeout(Lateness(), deadline) as wait:
                await asyncio.shield(question)
        except TimeoutError:
            if not self._topology.owners:
                raise RedisUnavailable("timeout", "no node has said where the slots are") from None
        return wait.deadline

    async def _ask(self, deadline: float) -> None:
        failure = RedisUnavailable("refused", "no node answers")
        for address in self._topology.whom_to_ask():
            try:
                wire = self._cluster.at(address)
                (ranges,) = await wire.execute(OF_SLOTS, deadline - time.monotonic())
                return self._cluster.learn(ranges, address)
            except RedisUnavailable as error:
                failure = _final_if_no_cluster(error, self._cluster.server)
        if not self._topology.owners:
            raise failure
        return None


def _is_answered(
    asked: dict[asyncio.AbstractEventLoop, asyncio.Task[None]],
    loop: asyncio.AbstractEventLoop,
    question: asyncio.Task[None],
) -> None:
    del asked[loop]
    if not question.cancelled():
        question.exception()  # perhaps nobody waits for it any more, and asyncio would log it


class Breakers:
    """The nodes' breakers as one: open when one of them is."""

    def __init__(self, wires: dict[Address, Any]) -> None:
        self._wires = wires
        self.recovered: list[Callable[[], object]] = []  # called once after each outage of a node

    @property
    def is_open(self) -> bool:
        return bool(self._open())

    @property
    def reason(self) -> str:
        return next((breaker.reason for breaker in self._open()), "")

    @property
    def down_since(self) -> float | None:
        return min((b.down_since for b in self._open() if b.down_since is not None), default=None)

    def remind(self) -> None:
        """See Breaker.remind. The actions are all nodes', so one that is not away does for all."""
        breakers = [wire.breaker for wire in list(self._wires.values())]
        for breaker in [one for one in breakers if not one.is_open][:1]:
            breaker.remind()

    def _open(self) -> list[Breaker]:
        breakers = [wire.breaker for wire in list(self._wires.values())]
        return [breaker for breaker in breakers if breaker.is_open]


def at_address(url: str, host: str, port: int) -> str:
    """Return the URL with another host and port.

    >>> at_address("rediss://app:secret@seed:6379/0?x=1", "fd00::7", 7001)
    'rediss://app:secret@[fd00::7]:7001/0?x=1'
    """
    parts = urlsplit(url)
    who, at, _ = parts.netloc.rpartition("@")
    name = f"[{host}]" if ":" in host else host
    return urlunsplit(parts._replace(netloc=f"{who}{at}{name}:{port}"))


def _ping(cluster: _Cluster[Any], shard: ShardWire[Any], to_read: bool) -> None:
    settings = cluster.server.settings
    shard.ask(time.monotonic() + settings.connect_timeout + settings.command_timeout)
    failures: list[RedisUnavailable] = []
    for address in cluster.topology.owners:
        try:
            cluster.at(address).ping(to_read=to_read)
        except RedisUnavailable as error:
            if not to_read or error.reason in FINAL:
                raise
            failures.append(error)
    if len(failures) == len(cluster.topology.owners):
        raise failures[0]


def _final_if_no_cluster(error: RedisUnavailable, server: Server) -> RedisUnavailable:
    """Make the error final for a server in no cluster, because another attempt would find the same."""
    if "cluster support disabled" not in error.detail:
        return error
    return server.explain(RedisUnavailable("nocluster", error.detail))


def _for_threads(wire: AsyncWire) -> Wire:
    return wire.for_threads
