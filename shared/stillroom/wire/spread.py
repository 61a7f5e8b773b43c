"""A batch over several nodes of a Redis Cluster: the wire of the state, where that is on a cluster.

The cache's batches belong to one slot each (see cluster.py). Those of the state may touch several: a list of a
user's sessions asks all shards, and counts ride with whatever is sent. So a batch is split by the node that has
each key's slot; in asyncio the parts are sent at the same time, in a thread one after the other. Each part keeps
its order, and nothing is promised between parts. A node that does not answer costs the replies of its part alone:
they are errors in their places (`NodeAway`), in a RedisRefused.

Commands without a key go where the command beside them goes. SCRIPT and WAIT go to each node of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.settings import Settings
from stillroom.wire.aio import AsyncWire, side_by_side
from stillroom.wire.breaker import Breaker
from stillroom.wire.cluster import AsyncClusterWire, Breakers, ClusterWire, ShardWire
from stillroom.wire.explain import explained, source_of
from stillroom.wire.outcome import NodeAway, refusal
from stillroom.wire.server import Command, ReplyError, Server, name_of, words_of
from stillroom.wire.topology import (
    KEYLESS,
    SLOTS,
    Address,
    Topology,
    named,
    named_in,
    on_its_way,
    settled,
    slot_of,
)

EVERYWHERE = frozenset({b"SCRIPT", b"WAIT"})
KEY_IS_SECOND = frozenset({b"XGROUP", b"XINFO", b"OBJECT"})
STREAMS = frozenset({b"XREADGROUP", b"XREAD"})


class AtSlot(tuple[bytes, ...]):
    """A command without a key, for the node that has a slot."""

    slot: int

    def __new__(cls, slot: int, words: Sequence[bytes]) -> Self:
        command = super().__new__(cls, words)
        command.slot = slot
        return command


class NodeOfState(NamedTuple):
    """A node that has slots of the state."""

    address: str  # host and port
    slot: int  # one of its slots
    slots: int  # how many it has
    breaker: Breaker


def key_of(command: Command) -> bytes | None:
    """Return the key that says which slot a command belongs to; None for a command without a key."""
    words = words_of(command)
    name = _bytes(words[0])
    if name in KEYLESS:
        return None
    if name == b"EVALSHA":
        return _bytes(words[3]) if int(words[2]) else None
    if name in STREAMS:
        return _bytes(words[words.index(b"STREAMS") + 1])
    return _bytes(words[2 if name in KEY_IS_SECOND else 1])


def _bytes(word: bytes | str) -> bytes:
    return word if isinstance(word, bytes) else word.encode()


def placed(commands: Sequence[Command], home: int) -> list[int | None]:
    """Return the slot of each command; None for those that go to each node of the batch.

    A command without a key has the slot of the command before it, or else of the next one, or else `home`.
    """
    keys = [key_of(command) for command in commands]
    slots = [None if key is None else slot_of(key) for key in keys]
    for place, command in enumerate(commands):
        if type(command) is AtSlot:
            slots[place] = command.slot
    following = next((slot for slot in slots if slot is not None), home)
    found: list[int | None] = []
    for command, slot in zip(commands, slots, strict=True):
        if slot is not None:
            following = slot
        everywhere = slot is None and name_of(command) in EVERYWHERE
        found.append(None if everywhere else following)
    return found


class Trip:
    """One batch on its way: which part goes to which node, and what came back."""

    def __init__(self, commands: Sequence[Command], topology: Topology, home: int) -> None:
        self._commands = commands
        self._topology = topology
        self._slots = placed(commands, home)
        self._replies: list[Any] = [None] * len(commands)
        self._failures: list[RedisUnavailable] = []
        self._has_answer = False
        self._everywhere = [n for n, slot in enumerate(self._slots) if slot is None]
        self._home = home

    def parts(self) -> list[tuple[Address, list[int]]]:
        """Return each node and the places of the commands that it gets."""
        nodes: dict[Address, list[int]] = {}
        for place, slot in enumerate(self._slots):
            if slot is None:
                continue
            try:
                nodes.setdefault(self._topology.owner(slot), []).append(place)
            except RedisUnavailable as error:
                self._topology.doubt(slot, error)
                self._fail([place], error)
        if len(self._everywhere) == len(self._slots):  # scripts for whichever node needs them next
            self._topology.owner(self._home)
            nodes = {node: [] for node in self._topology.owners}
        return self._with_everywhere(nodes)

    def moved_parts(self) -> list[tuple[Address, list[int]]]:
        """Return the nodes that were named by nodes that do not have a slot any more, and what they are asked."""
        named: dict[int, Address] = {}
        for place, reply in enumerate(self._replies):
            slot = self._slots[place]
            if slot is not None and (address := named_in(reply)) is not None:
                named[slot] = self._topology.moved(slot, address)
        nodes: dict[Address, list[int]] = {}
        for place, slot in enumerate(self._slots):
            if slot in named:
                nodes.setdefault(named[slot], []).append(place)
        return self._with_everywhere(nodes)

    def _with_everywhere(self, nodes: dict[Address, list[int]]) -> list[tuple[Address, list[int]]]:
        return [(node, sorted([*places, *self._everywhere])) for node, places in nodes.items()]

    def batch(self, places: Sequence[int]) -> list[Command]:
        return [self._commands[place] for place in places]

    def answered(self, places: Sequence[int], replies: Sequence[Any]) -> None:
        """Take in a node's replies, errors among them."""
        self._has_answer = True
        for place, reply in zip(places, replies, strict=True):
            is_of_all = self._slots[place] is None
            said = _both(self._replies[place], reply) if is_of_all else reply
            self._replies[place] = on_its_way(said)

    def failed(self, places: Sequence[int], error: RedisUnavailable) -> None:
        """Take in that a node did not answer, or refused as a whole; or what it said to each command."""
        first = next((slot for n in places if (slot := self._slots[n]) is not None), None)
        if first is not None:
            self._topology.doubt(first, error)
        if isinstance(error, RedisRefused) and len(error.replies) == len(places):
            self.answered(places, error.replies)
        else:
            self._fail(places, error)

    def _fail(self, places: Sequence[int], error: RedisUnavailable) -> None:
        self._failures.append(error)
        for place in places:
            self._replies[place] = NodeAway(error)

    def result(self) -> list[Any]:
        """Return the replies. Raises RedisUnavailable where no node answered, RedisRefused where one did."""
        if self._failures and not self._has_answer:
            raise self._failures[0]
        if any(isinstance(reply, ReplyError) for reply in self._replies):
            raise refusal([settled(reply) for reply in self._replies])
        return self._replies


def _both(one: Any, other: Any) -> Any:
    """Return the reply of all nodes to SCRIPT or WAIT: an error of any of them; the fewest replicas."""
    if one is None or isinstance(other, ReplyError):
        return other
    if isinstance(one, ReplyError):
        return one
    return min(one, other) if isinstance(one, int) else one


class StateServer:
    """The nodes as the one server that the state's operations know. Its clock is that of the node of `home`.

    It labels counts and decides nothing: what is decided is decided by the node that has the key.
    """

    watch = None
    primary = None

    def __init__(self, settings: Settings, home: bytes, probe: bytes) -> None:
        self.settings = settings
        self.probe = probe
        self.name = "Redis"
        self.home = slot_of(home)
        self.nodes: ClusterWire | AsyncClusterWire | None = None
        self._unmet = Server(settings, settings.redis_url, self.name, is_node=True)
        self._source = source_of(settings, "redis_url", settings.redis_url)

    @property
    def _node(self) -> Server:
        nodes = self.nodes
        if nodes is None or not nodes.topology.owners:
            return self._unmet
        try:
            return nodes.at(nodes.topology.owner(self.home)).server
        except RedisUnavailable:
            return self._unmet

    @property
    def run(self) -> bytes:
        return self._node.run

    def now_ms(self) -> int:
        return self._node.now_ms()

    def now_us(self) -> int:
        return self._node.now_us()

    def ask_time(self) -> None:
        """Ask each node for its time with its next batch."""
        for wire in [] if self.nodes is None else self.nodes.wires:
            wire.server.ask_time()

    def doubt_clock(self) -> None:
        """See Server.doubt_clock. Which node it was is not known here."""
        for wire in [] if self.nodes is None else self.nodes.wires:
            wire.server.doubt_clock()

    def described(self) -> list[NodeOfState]:
        """Return the nodes that have slots, as far as they are known."""
        nodes = self.nodes
        if nodes is None:
            return []
        return [
            NodeOfState(named(address), slots[0], len(slots), nodes.at(address).breaker)
            for address, slots in sorted(nodes.topology.shares.items())
        ]

    def explain(self, failure: RedisUnavailable) -> RedisUnavailable:
        return explained(failure, self._source)


class StateBreakers(Breakers):
    """The nodes' breakers as one: open when all of them are, for one node alone keeps nothing from the others."""

    @property
    def is_open(self) -> bool:
        wires = list(self._wires.values())
        return bool(wires) and all(wire.breaker.is_open for wire in wires)


class SpreadWire(ClusterWire):
    """The state's cluster for threads and greenlets."""

    def __init__(self, server: StateServer) -> None:
        url, slots = server.settings.redis_url, range(SLOTS)
        self.state = server
        super().__init__(
            *(server.settings, url, "Redis", slots, "redis_url"),
            followed=[server.home],
            probe=server.probe,
        )
        server.nodes = self
        self.breaker = StateBreakers(self._wires)

    @property
    def server(self) -> Any:
        return self.state

    def execute(
        self,
        commands: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
    ) -> list[Any]:
        """See Wire.execute, and above."""
        how = {"idempotent": idempotent, "timed": timed}
        return _execute(self, self.shards[0], commands, left, how)


class SpreadThreadsWire:
    """The wire of an asyncio room for whoever has no event loop."""

    def __init__(self, cluster: AsyncSpreadWire) -> None:
        self._cluster = cluster
        self._asking = cluster.shards_for_threads[0]

    @property
    def server(self) -> Any:
        return self._cluster.state

    @property
    def breaker(self) -> Breakers:
        return self._cluster.breaker

    def execute(
        self,
        commands: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
    ) -> list[Any]:
        """See SpreadWire.execute."""
        how = {"idempotent": idempotent, "timed": timed}
        return _execute(self._cluster, self._asking, commands, left, how)


def _execute(
    cluster: SpreadWire | AsyncSpreadWire,
    asking: ShardWire[Any],
    commands: Sequence[Command],
    left: float,
    how: dict[str, bool],
) -> list[Any]:
    deadline = time.monotonic() + left
    if cluster.topology.is_to_be_asked_for():
        asking.ask(deadline)
    trip = Trip(commands, cluster.topology, cluster.state.home)

    def send(parts: Iterable[tuple[Address, list[int]]]) -> None:
        for address, places in parts:
            try:
                wire = asking.at(address)
                replies = wire.execute(trip.batch(places), deadline - time.monotonic(), **how)
            except RedisUnavailable as error:
                trip.failed(places, error)
            else:
                trip.answered(places, replies)

    send(trip.parts())
    send(trip.moved_parts())
    return trip.result()


class AsyncSpreadWire(AsyncClusterWire):
    """The state's cluster for asyncio."""

    def __init__(self, server: StateServer) -> None:
        url, slots = server.settings.redis_url, range(SLOTS)
        self.state = server
        super().__init__(
            *(server.settings, url, "Redis", slots, "redis_url"),
            followed=[server.home],
            probe=server.probe,
        )
        server.nodes = self
        self.breaker = StateBreakers(self._wires)
        self.for_threads = SpreadThreadsWire(self)

    @property
    def server(self) -> Any:
        return self.state

    async def execute(
        self,
        commands: Sequence[Command],
        left: float,
        *,
        idempotent: bool = True,
        timed: bool = False,
    ) -> list[Any]:
        """See SpreadWire.execute. The parts are sent at the same time."""
        how = {"idempotent": idempotent, "timed": timed}
        deadline = time.monotonic() + left
        if self.topology.is_to_be_asked_for():
            deadline = await self.shards[0].ask(deadline)
        trip = Trip(commands, self.topology, self.state.home)

        async def send(address: Address, places: list[int]) -> None:
            try:
                wire: AsyncWire = self.at(address)
                left = deadline - time.monotonic()
                replies = await wire.execute(trip.batch(places), left, **how)
            except RedisUnavailable as error:
                trip.failed(places, error)
            else:
                trip.answered(places, replies)

        for parts in (trip.parts, trip.moved_parts):
            found = parts()
            if len(found) == 1:
                await send(*found[0])
            elif found:
                await side_by_side(send(*part) for part in found)
        return trip.result()
