"""Read and write a cluster as tests do that know one server: its one stream of events, its one key of a ban."""

from __future__ import annotations

import re
from typing import Any

from redis.cluster import RedisCluster

from stillroom.keys import OF_THE_BROKER, Keys, banned_in, globs_on_a_cluster

_NOT_STATE = re.compile(rf"stillroom:(\{{\d|{'|'.join(OF_THE_BROKER)})")
KEYS = Keys("stillroom", state_in_cluster=True)
STREAMS = [KEYS.abuse_at(home) for home in KEYS.homes]


class SpreadClient(RedisCluster):  # type: ignore[misc]  # redis-py's has no types for this
    """Reads all streams of events as one, and writes an event to the stream of its address or user.

    A ban that is written or deleted where it is decided is written or deleted where it holds, too.
    """

    def close(self) -> None:
        nodes = self.get_nodes()
        super().close()
        for node in nodes:  # whose pools it leaves to the collector
            if node.redis_connection is not None:
                node.redis_connection.connection_pool.disconnect()

    def time(self, *_: Any, **__: Any) -> Any:
        node = self.get_primaries()[0]
        return self.get_redis_connection(node).time()

    def keys(self, pattern: Any = "*", **_: Any) -> Any:
        nodes = [self.get_redis_connection(node) for node in self.get_primaries()]
        return [key for node in nodes for key in node.keys(pattern)]

    # The streams

    def xadd(self, name: Any, fields: Any, **how: Any) -> Any:
        if not _is_events(name):
            return super().xadd(name, fields, **how)
        said = {_text(key): _text(value) for key, value in fields.items()}
        home = (
            KEYS.home("ip", said["ip"])
            if said.get("ip")
            else KEYS.home("user", said.get("user", ""))
        )
        return super().xadd(KEYS.abuse_at(home), fields, **how)

    def xrange(self, name: Any, *args: Any, **how: Any) -> Any:
        if not _is_events(name):
            return super().xrange(name, *args, **how)
        found = [
            entry
            for one in STREAMS
            for entry in super(SpreadClient, self).xrange(one, *args, **how)
        ]
        return sorted(found, key=lambda entry: tuple(map(int, entry[0].split(b"-"))))

    def xrevrange(self, name: Any, *args: Any, **how: Any) -> Any:
        if not _is_events(name):
            return super().xrevrange(name, *args, **how)
        return self.xrange(name)[::-1]

    def xlen(self, name: Any) -> Any:
        if not _is_events(name):
            return super().xlen(name)
        return sum(super(SpreadClient, self).xlen(one) for one in STREAMS)

    def xpending(self, name: Any, group: Any) -> Any:
        return {"pending": sum(self._pending(one, group) for one in STREAMS)}

    def _pending(self, stream: bytes, group: Any) -> int:
        return int(super().xpending(stream, group)["pending"]) if self._has_group(stream) else 0

    def xpending_range(self, name: Any, group: Any, *args: Any) -> Any:
        return [
            one
            for stream in filter(self._has_group, STREAMS)
            for one in super(SpreadClient, self).xpending_range(stream, group, *args)
        ]

    def xreadgroup(self, group: Any, consumer: Any, streams: Any, **how: Any) -> Any:
        found = []
        for stream in STREAMS:
            found += super().xreadgroup(group, consumer, {stream: ">"}, **how)
        return found

    def xclaim(
        self, name: Any, group: Any, consumer: Any, least: Any, names: Any, **how: Any
    ) -> Any:
        for stream in STREAMS:
            own = {entry for entry, _ in super().xrange(stream)}
            if some := [one for one in names if one in own]:
                super().xclaim(stream, group, consumer, least, some, **how)

    def xinfo_groups(self, name: Any) -> Any:
        return all(map(self._has_group, STREAMS))

    def xgroup_create(self, name: Any, group: Any, id: Any, **how: Any) -> Any:
        for stream in STREAMS:
            if not self._has_group(stream):
                super().xgroup_create(stream, group, id, mkstream=True)

    def xgroup_destroy(self, name: Any, group: Any) -> Any:
        for stream in filter(self._has_group, STREAMS):
            super().xgroup_destroy(stream, group)

    def xdel(self, name: Any, *names: Any) -> Any:
        streams = STREAMS if _is_events(name) else [name]
        return sum(super(SpreadClient, self).xdel(one, *names) for one in streams)

    def _has_group(self, stream: bytes) -> bool:
        return bool(super().exists(stream) and super().xinfo_groups(stream))

    # Keys

    def exists(self, *names: Any) -> Any:
        if len(names) == 1 and _is_events(names[0]):
            return sum(super(SpreadClient, self).exists(one) for one in STREAMS)
        return super().exists(*names)

    def set(self, name: Any, value: Any, **how: Any) -> Any:
        for key in _everywhere(name):
            super().set(key, value, **how)
        return super().set(name, value, **how)

    def delete(self, *names: Any) -> Any:
        for name in names:
            for key in _everywhere(name):
                super().delete(key)
        return super().delete(*names)


class ClientOfAll:
    """One client of a cluster that has the state, and of the server that has the cache and the queues.

    It takes the names that keys have where one server has them all.
    """

    def __init__(self, state: SpreadClient, others: Any) -> None:
        self._state, self._others = state, others

    def __getattr__(self, command: str) -> Any:
        def call(*args: Any, **how: Any) -> Any:
            key = _text(args[0]) if args else ""
            if not key.startswith("stillroom:") or _NOT_STATE.match(key):
                return getattr(self._others, command)(*args, **how)
            (glob, *_) = globs_on_a_cluster(key.removeprefix("stillroom:"))
            return getattr(self._state, command)(f"stillroom:{glob}", *args[1:], **how)

        return call


def _everywhere(name: Any) -> list[bytes]:
    """Return the keys where a ban holds, and those of the widths of bans."""
    key = name.encode() if isinstance(name, str) else name
    if key == KEYS.ban_widths:
        return [KEYS.widths(home) for home in KEYS.homes]
    if b"{one}{rl:ip:" in key and key.endswith(b":!ban"):
        subject = banned_in(key)
        return [KEYS.ban_at(home, subject) for home in KEYS.homes_of_ban(subject)]
    return []


def _is_events(name: Any) -> bool:
    return bool(name in (KEYS.abuse, KEYS.abuse.decode()))


def _text(part: Any) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else str(part)
