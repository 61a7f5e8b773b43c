"""Which node of a Redis Cluster has a slot, and what its replies say of that.

A slot on its way (ASK, TRYAGAIN) or without a node (CLUSTERDOWN): Redis is away.
"""

from __future__ import annotations

import time
from binascii import crc_hqx
from collections.abc import Iterable, Sequence
from typing import Any

from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.wire.outcome import AWAY, NodeAway, refusal
from stillroom.wire.server import Command, ReplyError, name_of

SLOTS = 16_384
ASK_EVERY_S = 1.0
# What a script is told of a key that has gone ahead to another node.
NOT_LOCAL = "access a non local key"
UNNAMED = b"?"  # `cluster-preferred-endpoint-type hostname`, and the node has no `cluster-announce-hostname`
# Commands that may be sent without a key: any node answers them, each for itself.
KEYLESS = frozenset(
    {
        *(b"TIME", b"INFO", b"SLOWLOG", b"PING", b"CLUSTER", b"MEMORY"),
        *(b"SCAN", b"SCRIPT", b"WAIT"),
    }
)
OURS = ("pool", "budget")  # reasons that say nothing about a node

Address = tuple[str, int]


def slot_of(key: bytes) -> int:
    """Return the slot of a key: CRC16 of what stands between its first braces, or of all of it.

    >>> slot_of(b"{shard}.clock") == slot_of(b"a.{shard}.key") == slot_of(b"shard")
    True
    """
    begin = key.find(b"{") + 1
    end = key.find(b"}", begin)
    return crc_hqx(key[begin:end] if begin and end > begin else key, 0) % SLOTS


def named(address: Address) -> str:
    """Return a node as reports name it.

    >>> named(("10.0.0.7", 6379)), named(("2001:db8::7", 6379))
    ('10.0.0.7:6379', '[2001:db8::7]:6379')
    """
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Topology:
    """Which node has which of these slots. Threads may use it together: a change is one assignment."""

    def __init__(self, seed: Address, slots: Iterable[int]) -> None:
        self._seed = seed
        self._slots = tuple(slots)
        self._nodes: tuple[Address, ...] = ()
        self._owners: dict[int, Address] = {}
        self._suspect: Address | None = None
        self._is_doubted = True
        self._ask_at = 0.0  # time.monotonic(): not before

    def owner(self, slot: int) -> Address:
        """Return the node that has the slot. Raises RedisUnavailable if none has."""
        try:
            return self._owners[slot]
        except KeyError:
            raise RedisUnavailable("clusterdown", f"no node has slot {slot}") from None

    def __contains__(self, slot: int) -> bool:
        return slot in self._owners

    @property
    def owners(self) -> set[Address]:
        return set(self._owners.values())

    @property
    def nodes(self) -> tuple[Address, ...]:
        """Return the nodes that the cluster last named, replicas among them."""
        return self._nodes

    @property
    def shares(self) -> dict[Address, list[int]]:
        """Return the followed slots of each node that has any."""
        found: dict[Address, list[int]] = {}
        for slot, address in self._owners.items():
            found.setdefault(address, []).append(slot)
        return found

    def is_to_be_asked_for(self) -> bool:
        return self._is_doubted and time.monotonic() >= self._ask_at

    def whom_to_ask(self) -> list[Address]:
        """Return all nodes, the one in doubt last."""
        if self._owners:
            self._ask_at = time.monotonic() + ASK_EVERY_S
        nodes = dict.fromkeys([*self._nodes, self._seed])
        return sorted(nodes, key=lambda node: node == self._suspect)

    def learn(self, ranges: Sequence[Any], asked: Address) -> None:
        """Take in a reply to CLUSTER SLOTS: (first, last slot, master, replicas …), nodes as (host, port …).

        Raises RedisUnavailable where it names none: the node has come back without its files, and others may know.
        """
        if not ranges:
            raise RedisUnavailable("clusterdown", "a node that knows no slots is in no cluster")
        known = [(first, last, _address(master, asked)) for first, last, master, *_ in ranges]
        self._nodes = tuple(dict.fromkeys(_address(n, asked) for r in ranges for n in r[2:]))
        everywhere: dict[int, Address] = {}
        for first, last, node in known:
            everywhere.update(dict.fromkeys(range(first, last + 1), node))
        self._owners = {slot: everywhere[slot] for slot in self._slots if slot in everywhere}
        self._is_doubted = False

    def moved(self, slot: int, named: Address) -> Address:
        """Note that the owner said that another node has the slot (no host: its own). Returns that node.

        Where the other slots are by now has to be asked for.
        """
        node = named[0] or self.owner(slot)[0], named[1]
        self._owners = {**self._owners, slot: node}
        self._is_doubted = True
        return node

    def doubt(self, slot: int, error: RedisUnavailable) -> None:
        """Note that the owner of the slot did not answer, or can't: perhaps another has it by now."""
        is_its_fault = not isinstance(error, RedisRefused) or error.reason in AWAY
        if is_its_fault and error.reason not in OURS:
            self._suspect = self._owners.get(slot)
            self._is_doubted = True


class Moved:
    """The part of a batch that another node has to answer. Raises RedisRefused if there is none.

    All keys of a batch are in one slot. What has no key (TIME, SCAN, WAIT …) was answered by
    the wrong node: it goes along.
    """

    def __init__(self, batch: Sequence[Command], refused: RedisRefused) -> None:
        self._replies = [on_its_way(reply) for reply in refused.replies]
        moved = [n for n, reply in enumerate(self._replies) if _is_moved(reply)]
        if not moved:
            is_of_the_slot = any(isinstance(reply, NodeAway) for reply in self._replies)
            raise refusal(self._replies) if is_of_the_slot else refused
        keyless = [n for n, command in enumerate(batch) if name_of(command) in KEYLESS]
        self._places = sorted({*moved, *keyless})
        self.commands = [batch[place] for place in self._places]
        self.named = _named(self._replies[moved[0]])

    def merged(self, replies: Sequence[Any]) -> list[Any]:
        """Return all replies, with these in their places. Raises RedisRefused if one is an error."""
        for place, reply in zip(self._places, replies, strict=True):
            self._replies[place] = settled(on_its_way(reply))
        if any(isinstance(reply, ReplyError) for reply in self._replies):
            raise refusal(self._replies)
        return self._replies


def _address(node: Sequence[Any], asked: Address) -> Address:
    """Return the node's address.

    A node without a name of its own has the address that was asked. One that is to be known by a name that nobody
    gave it is called `?`, and its IP address stands behind.
    """
    host, port, *_ = node
    if host == UNNAMED:
        facts = list(node[3]) if len(node) > 3 else []
        host = dict(zip(facts[::2], facts[1::2], strict=False)).get(b"ip")
    return host.decode() if host else asked[0], int(port)


def named_in(reply: Any) -> Address | None:
    """Return the node that a reply says has the slot; None for a reply that says nothing of the kind."""
    return _named(reply) if _is_moved(reply) else None


def on_its_way(reply: Any) -> Any:
    """Return a reply; of a key that is between two nodes just now, that Redis is away for this moment.

    A script that finds a key of its shard gone has perhaps done a part of its work by then.
    """
    text = str(reply) if isinstance(reply, ReplyError) else ""
    is_cut_short = NOT_LOCAL in text
    if not (is_cut_short or text.startswith("ASK ")):
        return reply
    why = "the slot is on its way to another node"
    return NodeAway(RedisUnavailable("tryagain", why, may_be_done=is_cut_short))


def settled(reply: Any) -> Any:
    """Return what the node that was named has replied.

    Between two steps of a move it may name the first one again. Then neither has the slot, for this moment.
    """
    if not _is_moved(reply):
        return reply
    return ReplyError("TRYAGAIN two nodes send to each other for a slot that is on its way")


def _named(reply: Any) -> Address:
    host, _, port = str(reply).split()[-1].rpartition(":")
    return "" if host == UNNAMED.decode() else host, int(port)


def _is_moved(reply: Any) -> bool:
    return isinstance(reply, ReplyError) and str(reply).startswith("MOVED ")
