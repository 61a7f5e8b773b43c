"""A clock that a test moves by hand: Redis can't be told the time, so what was written is made older instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import redis
from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument
from stillroom.keys import glob_literal, kind_of
from stillroom.moving import TIMES, moved
from stillroom.room import AsyncStillroom, Stillroom, living_rooms

HIT_BYTES = 11  # of a limit's log: 7 for the µs, 4 for the count
TIME_BYTES = 7
ANSWER_WITHIN = 10.0  # seconds: time can't be moved on a frozen server


class Clock:
    """`clock.advance(3600)`: an hour later, for what the room has in Redis and what this process remembers.

    All rooms of this process in the same namespace are moved, whichever face they have.

    Entries get stale and run out, leases and backoffs end, sessions idle away, quotas come back, bans are served,
    changes of limits end.
    What is ordered by a logical clock (invalidations, revocations) stays as it is. Not for use while others
    write.
    """

    def __init__(self, room: Stillroom | AsyncStillroom) -> None:
        self._room = room

    def advance(self, seconds: Duration) -> None:
        """Move it forward by `seconds`, or a timedelta: at least 0.001 s.

        Raises InvalidArgument for another number, and on a cluster.
        """
        try:
            seconds = seconds_of("seconds", seconds)
        except InvalidArgument as error:
            raise InvalidArgument(f"{error}: a clock is moved forward") from None
        settings = self._room.settings
        if settings.cluster or settings.state_cluster:
            one = "state" if settings.state_cluster else "cache"
            raise InvalidArgument(f"a clock moves one server's time, and the {one} is on a cluster")
        keys = self._room.keys
        named = {keys.orders: "orders", keys.limit_changes: "changes"}
        for client in self._clients():
            for key in self._keys(client):
                _shorten(client, key, seconds)
                if rewrite := REWRITES.get(named.get(key) or kind_of(key)):
                    rewrite(client, key, round(seconds * 1_000_000))
        self._forget(seconds)

    def _clients(self) -> Iterator[Any]:
        settings = self._room.settings
        for url in dict.fromkeys((settings.cache_server, settings.redis_url)):
            with redis.Redis.from_url(
                url, password=settings.password, socket_timeout=ANSWER_WITHIN
            ) as client:
                yield client

    def _keys(self, client: Any) -> list[bytes]:
        prefix = glob_literal(self._room.settings.namespace.encode())
        return list(client.scan_iter(match=prefix + b":*", count=1_000))

    def _forget(self, seconds: float) -> None:
        """Forget what this process remembers for a while, in each room of the namespace."""
        for room in {id(room): room for room in (self._room, *living_rooms)}.values():
            if room.settings.namespace == self._room.settings.namespace:
                _forget(room, seconds)


def _forget(room: Any, seconds: float) -> None:
    for shard in room.operations.cache.shards:
        shard.forget_asked()
    room.operations.limits._denials.reset()
    room.operations.limits._local.reset()
    room.operations.limits._changes.end_sooner(seconds)


def _shorten(client: Any, key: bytes, seconds: float) -> None:
    left = client.pttl(key)
    if left >= 0:
        client.pexpire(key, max(0, left - round(seconds * 1_000)))  # 0 deletes it


def _age_entry(client: Any, key: bytes, us: int) -> None:
    """Make an entry older: `1⇥<epoch>⇥<stamp>⇥<fresh until, ms>⇥…`"""
    fields = (client.get(key) or b"").split(b"\t", 4)
    if len(fields) == 5:
        fields[3] = b"%d" % max(0, int(fields[3]) - us // 1_000)
        client.set(key, b"\t".join(fields), keepttl=True)


def _age_session(client: Any, key: bytes, us: int) -> None:
    for field, text in client.hgetall(key).items():
        if field in TIMES:
            client.hset(key, field, moved(text, -us))


def _age_changes(client: Any, key: bytes, us: int) -> None:
    """Let changes of limits have been made earlier: seconds, in JSON without spaces (limit_change.lua)."""
    for limit, text in client.hgetall(key).items():
        change = json.loads(text)
        earlier = {name: change[name] - us / 1_000_000 for name in ("since", "until")}
        client.hset(key, limit, json.dumps(change | earlier, separators=(",", ":")))


def _age_scores(unit_us: int) -> Callable[[Any, bytes, int], None]:
    def age(client: Any, key: bytes, us: int) -> None:
        for member in client.zrange(key, 0, -1):
            client.zincrby(key, -(us // unit_us), member)

    return age


def _age_hits(client: Any, key: bytes, us: int) -> None:
    """Make a packed log of hits older: (last µs, count) of each entry."""
    log = client.get(key) or b""
    entries = [log[n : n + HIT_BYTES] for n in range(0, len(log), HIT_BYTES)]
    if entries:
        aged = [_earlier(entry[:TIME_BYTES], us) + entry[TIME_BYTES:] for entry in entries]
        client.set(key, b"".join(aged), keepttl=True)


def _earlier(time: bytes, us: int) -> bytes:
    return max(0, int.from_bytes(time, "big") - us).to_bytes(TIME_BYTES, "big")


# Keys that hold times besides their TTL, by kind.
REWRITES: dict[str, Callable[[Any, bytes, int], None]] = {
    "e": _age_entry,
    "i": _age_scores(1_000),
    "todo": _age_scores(1_000),
    "orders": _age_scores(1),
    "s": _age_session,
    "changes": _age_changes,
    "x": _age_scores(1),
    "limit": _age_hits,
    "slots": _age_scores(1),
    "waiters": _age_scores(1),
}
