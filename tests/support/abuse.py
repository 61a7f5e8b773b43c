"""Write events by hand, at any time, and read the results."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

CLIENT = "203.0.113.9"
COUNTS = "*:abuse:c:*"
# Of events in one millisecond: Redis itself may number some in between.
_places = count(1_000, 1_000)


def put(client: Any, room: Any, kind: str, ago: float = 0.0, **fields: str) -> bytes:
    """Add an event as it would have been written `ago` seconds ago. Older ones first: a stream only grows."""
    seconds, micros = client.time()
    ms = int(seconds * 1000 + micros / 1000 - ago * 1000)
    name: bytes = client.xadd(room.keys.abuse, {"kind": kind, **fields}, id=f"{ms}-{next(_places)}")
    return name


def texts_in(client: Any, stream: bytes) -> list[dict[str, str]]:
    """Return the fields of each entry of a stream, as text."""
    return [
        {name.decode(): value.decode() for name, value in fields.items()}
        for _, fields in client.xrange(stream)
    ]


def patterns(client: Any, room: Any) -> list[dict[str, str]]:
    """Return the stream of patterns."""
    return texts_in(client, room.keys.abuse_log)


def rules_found(client: Any, room: Any) -> list[str]:
    return [pattern["rule"] for pattern in patterns(client, room)]


def lines(caplog: Any) -> list[dict[str, Any]]:
    """Return the log lines of patterns, each parsed from its JSON."""
    texts = [r.getMessage() for r in caplog.records if r.getMessage().startswith("abuse.pattern ")]
    return [json.loads(text.removeprefix("abuse.pattern ")) for text in texts]


def ban_of(client: Any, room: Any, subject: str = CLIENT) -> dict[str, Any] | None:
    text = client.get(room.keys.ban(subject))
    return None if text is None else json.loads(text)


def pending(client: Any, room: Any) -> int:
    """Return how many events were read and not acknowledged."""
    return int(client.xpending(room.keys.abuse, "workers")["pending"])


def leave_behind(client: Any, room: Any, deliveries: int = 1, count: int = 100) -> list[bytes]:
    """Read events as a worker that died: delivered that often, the last time two minutes ago."""
    return abandon(client, room, read(client, room, count), deliveries)


def read(client: Any, room: Any, count: int = 100) -> list[bytes]:
    """Read events as a worker does, and do nothing with them."""
    make_group(client, room)
    reply = client.xreadgroup("workers", "worker", {room.keys.abuse: ">"}, count=count)
    return [name for _, entries in reply for name, _ in entries]


def abandon(client: Any, room: Any, names: list[bytes], deliveries: int = 1) -> list[bytes]:
    """Mark these events as read that often by a worker that has been silent for two minutes."""
    if names:
        about = {"idle": 120_000, "retrycount": deliveries, "force": True, "justid": True}
        client.xclaim(room.keys.abuse, "workers", "worker", 0, names, **about)
    return names


def make_group(client: Any, room: Any) -> None:
    if not client.exists(room.keys.abuse) or not client.xinfo_groups(room.keys.abuse):
        client.xgroup_create(room.keys.abuse, "workers", "0", mkstream=True)


def assert_bounded(client: Any) -> None:
    """Check that every key has a TTL or a length: counts and patterns expire, and the streams are cut."""
    bounded = (b":abuse", b":abuse:log", b":abuse:aside", b":agreed")
    for key in client.keys("*"):
        if not key.endswith(bounded):
            assert client.ttl(key) > 0, key


def counts(client: Any) -> dict[str, int]:
    """Return the counts: rule and group → how many members."""
    return {key.decode(): client.zcard(key) for key in client.keys(COUNTS)}


def aside(client: Any, room: Any) -> list[dict[str, str]]:
    """Return the dead letters among the events."""
    return texts_in(client, room.keys.abuse_aside)


def end_ban(client: Any, room: Any) -> None:
    """Let the client's ban expire."""
    client.delete(room.keys.ban(CLIENT))


def forget_what_was_said(client: Any) -> None:
    """Let the windows of all reported patterns be over."""
    for key in client.keys("*:abuse:seen:*"):
        client.delete(key)


ARMED = """
[rules.hammer]
shadow = false
[rules.credential_stuffing]
shadow = false
[rules.scanner]
shadow = false
[rules.session_guessing]
shadow = false
[rules.ipv6_rotation]
shadow = false
[rules.card_testing]
kinds = ["card_declined"]
group_by = "ip"
threshold = 5
window = 600
"""
