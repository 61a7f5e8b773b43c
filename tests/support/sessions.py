"""Read sessions in Redis and move their time by hand."""

from __future__ import annotations

from typing import Any

TIMES = ("_l", "_x", "_c")


def name_of(handle: str) -> bytes:
    return handle.partition("-")[2].encode()


def record_of(room: Any, handle: str) -> bytes:
    """Return the key of a session's record."""
    key: bytes = room.keys.sessions(int(handle[:2], 16), [name_of(handle)])[0]
    return key


def age(client: Any, room: Any, handle: str, seconds: float) -> None:
    """Make one session this much older: its record, and when the sweep looks at it."""
    key, us = record_of(room, handle), round(seconds * 1e6)
    for field in TIMES:
        if client.hexists(key, field):
            client.hincrby(key, field, -us)
    due = room.keys.due_sessions(int(handle[:2], 16))
    for member in client.zrange(due, 0, -1):
        if member.startswith(name_of(handle)):
            client.zincrby(due, -us, member)


def end_grace(client: Any, room: Any, handle: str) -> None:
    """Let the grace of a rotated name be over."""
    client.hset(record_of(room, handle), "_until", 1)


def break_records(client: Any, field: str) -> None:
    """Let no session with this field be read any more."""
    for key in client.keys("*"):
        if client.type(key) == b"hash" and client.hexists(key, field):
            client.hset(key, field, b'{"!":"UUID","v":"broken"}')


def sessions_keys(client: Any) -> list[bytes]:
    """Return the keys that the sessions left in Redis, without the clocks."""
    return [key for key in client.keys("*:{s*") if not key.endswith(b":clock")]


def age_all(client: Any, room: Any, seconds: float) -> None:
    """Make all sessions and all rotated names this much older."""
    us = round(seconds * 1e6)
    for key in client.keys("*:{s*}:s:*"):
        for field in (*TIMES, "_until"):
            if client.hexists(key, field):
                client.hincrby(key, field, -us)
    for shard in range(room.settings.session_shards):
        due = room.keys.due_sessions(shard)
        for member in client.zrange(due, 0, -1):
            client.zincrby(due, -us, member)
