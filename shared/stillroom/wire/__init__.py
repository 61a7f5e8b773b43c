"""Commands in, replies out: leased connections, deadlines, one retry, a circuit breaker.

redis-py makes each connection (URL, TLS, ACL user, password); the wire then owns the socket: it packs a batch
once, writes it in one send and reads the replies with hiredis. Nothing here sleeps inside a request.
"""

from stillroom.wire.aio import AsyncWire, running_loop, side_by_side, to_its_end
from stillroom.wire.breaker import Breaker
from stillroom.wire.budget import (
    Budget,
    beside_all,
    leases_of_loads,
    load_begun,
    loading_since,
    time_left,
)
from stillroom.wire.cluster import (
    AsyncClusterWire,
    AsyncShardWire,
    Breakers,
    ClusterWire,
    ShardWire,
)
from stillroom.wire.forks import no_fork, reset_after_fork
from stillroom.wire.outcome import AWAY, NodeAway, refusal
from stillroom.wire.server import (
    IN_TIME,
    STEADY,
    Clock,
    Command,
    Server,
    micros,
    pack,
    pack_command,
    run_of,
    words_of,
)
from stillroom.wire.spread import (
    AsyncSpreadWire,
    AtSlot,
    SpreadThreadsWire,
    SpreadWire,
    StateServer,
)
from stillroom.wire.sync import Wire
from stillroom.wire.topology import slot_of

__all__ = [
    "AWAY",
    "IN_TIME",
    "STEADY",
    "AsyncClusterWire",
    "AsyncShardWire",
    "AsyncSpreadWire",
    "AsyncWire",
    "AtSlot",
    "Breaker",
    "Breakers",
    "Budget",
    "Clock",
    "ClusterWire",
    "Command",
    "NodeAway",
    "Server",
    "ShardWire",
    "SpreadThreadsWire",
    "SpreadWire",
    "StateServer",
    "Wire",
    "beside_all",
    "leases_of_loads",
    "load_begun",
    "loading_since",
    "micros",
    "no_fork",
    "pack",
    "pack_command",
    "refusal",
    "reset_after_fork",
    "run_of",
    "running_loop",
    "side_by_side",
    "slot_of",
    "time_left",
    "to_its_end",
    "words_of",
]
