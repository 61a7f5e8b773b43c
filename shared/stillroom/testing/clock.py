"""A clock that a test moves by hand: Redis can't be told the time, so what was written is made older instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import redis
from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument
from stillroom.keys import Keys, glob_literal, kind_of
from stillroom.misuse import refuse_other
from stillroom.moving import TIMES, moved
from stillroom.room import AsyncStillroom, Stillroom, living_rooms

HIT_BYTES = 11  # of a limit's log: 7 for the µs, 4 for the count
TIME_BYTES = 7
ANSWER_WITHIN = 10.0  # seconds: time can't be moved on a frozen server


class Clock:
    """`clock.advance(3600)`: an hour later, for what the room has in Redis and what this process remembers.

    All rooms of this process in the same namespace are moved, whichever face they have.

    Entries get stale and run out, leases and backoffs end, warm-ups are due, sessions idle away, devices are
    forgotten, quotas come back, bans are served, what a rule of abuse has counted leaves its window, changes of
    limits and pauses end.
    What is ordered by a logical clock (invalidations, revocations) stays as it is, and so do the history of health
    and events of abuse that no worker has read: `room.upkeep.scan_abuse()` reads them. Not for use while others
    write. Raises InvalidArgument for what is no room.
    """

    def __init__(self, room: Stillroom | AsyncStillroom) -> None:
        refuse_other("room", room, (Stillroom, AsyncStillroom), "a Stillroom or AsyncStillroom")
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
        us = round(seconds * 1_000_000)
        for client in self._clients():
            for key in self._keys(client):
                _shorten(client, key, seconds)
                self._age(client, key, us)
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

    def _age(self, client: Any, key: bytes, us: int) -> None:
        """Make what a key holds older, where it holds times."""
        kind = _kind(self._room.keys, key)
        if kind == "warm":
            loader = key.removeprefix(self._room.keys.warm(b""))
            _age_claim(client, key, us, self._period_of(loader.decode()))
            return
        _, rule = self._room.keys.of_rule(key)
        if kind == "count" and (window := self._row_of(rule)):
            _age_row(client, key, us, window)
        elif rewrite := REWRITES.get(kind):
            rewrite(client, key, us)

    def _period_of(self, loader: str) -> float:
        """Return how often this loader's warm-ups are due, seconds; 0 if no room here has it."""
        loaders = [room.cache.loaders for room in self._rooms()]
        warms = [known[loader].warm for known in loaders if loader in known.names()]
        return next((warm.every for warm in warms if warm is not None), 0.0)

    def _row_of(self, rule: str) -> int:
        """Return the windows of a rule that counts them in a row, seconds; 0 of any other."""
        rules = (one for room in self._rooms() for one in room.abuse.rules if one.name == rule)
        return next((one.window for one in rules if one.consecutive), 0)

    def _rooms(self) -> list[Any]:
        """Return the rooms of this process in the same namespace."""
        rooms = {id(room): room for room in (self._room, *living_rooms)}.values()
        own = self._room.settings.namespace
        return [room for room in rooms if room.settings.namespace == own]

    def _forget(self, seconds: float) -> None:
        """Forget what this process remembers for a while, in each room of the namespace."""
        for room in self._rooms():
            _forget(room, seconds)


def _forget(room: Any, seconds: float) -> None:
    for shard in room.operations.cache.shards:
        shard.forget_asked()
    room.operations.limits._denials.reset()
    room.operations.limits._local.reset()
    room.operations.limits._changes.end_sooner(seconds)
    room.operations.limits._bans.end_sooner(round(seconds * 1_000))
    room._pauses.look_again()


def _kind(keys: Keys, key: bytes) -> str:
    """Return what a key holds, where it holds times: see REWRITES."""
    if known := _named(keys).get(key) or keys.of_rule(key)[0]:
        return known
    kind = kind_of(key)
    return key.rpartition(b"!")[2].decode() if kind == "mark of a limit" else kind


def _named(keys: Keys) -> dict[bytes, str]:
    return {
        keys.orders: "orders",
        keys.limit_changes: "changes",
        keys.bans: "bans",
        keys.ban_times: "times of bans",
        keys.abuse_groups: "groups",
    }


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


def _age_ban(client: Any, key: bytes, us: int) -> None:
    if text := client.get(key):
        ban = json.loads(text)
        earlier = {name: ban[name] - us / 1_000_000 for name in ("since", "until")}
        client.set(key, json.dumps(ban | earlier, separators=(",", ":")), keepttl=True)


def _age_moment(client: Any, key: bytes, us: int) -> None:
    if text := client.get(key):
        client.set(key, int(text) - us // 1_000, keepttl=True)


def _age_times(client: Any, key: bytes, us: int) -> None:
    for number, text in enumerate(client.lrange(key, 0, -1)):
        client.lset(key, number, int(text) - us // 1_000)


def _age_seen(client: Any, key: bytes, us: int) -> None:
    """Let a pattern have been found earlier: fields with tabs between, two of them ms (abuse_judge.lua)."""
    fields = (client.get(key) or b"").split(b"\t")
    if len(fields) > 5:
        fields[4:6] = [b"%d" % max(0, int(field) - us // 1_000) for field in fields[4:6]]
        client.set(key, b"\t".join(fields), keepttl=True)


def _age_row(client: Any, key: bytes, us: int, window: int) -> None:
    """Let windows in a row have been earlier: number → when it had an event, ms."""
    passed = _passed(client, us, window)
    rows = client.zrange(key, 0, -1, withscores=True)
    earlier = {int(number) - passed: at - us // 1_000 for number, at in rows}
    if earlier and passed:
        left = client.pttl(key)
        client.delete(key)
        client.zadd(key, earlier)
        client.pexpire(key, left)


def _age_claim(client: Any, key: bytes, us: int, every: float) -> None:
    """Let a period of warm-ups have been claimed earlier: its number, a token, and until when it is held, ms."""
    if every and (text := client.get(key)):
        period, token, *until = text.split()
        numbers = [b"%d" % (int(one) - us // 1_000) for one in until]
        period = b"%d" % (int(period) - _passed(client, us, every))
        client.set(key, b" ".join([period, token, *numbers]), keepttl=True)


def _passed(client: Any, us: int, period: float) -> int:
    """Return how many periods of so many seconds, which are counted from 1970, begin in the time to come."""
    seconds, micros = client.time()
    now, length = seconds * 1_000_000 + micros, round(period * 1_000_000)
    return int((now + us) // length - now // length)


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
    "n": _age_scores(1_000),
    "q": _age_scores(1_000),
    "d": _age_scores(1),
    "ban": _age_ban,
    "lifted": _age_moment,
    "bans": _age_scores(1_000),
    "times of bans": _age_times,
    "count": _age_scores(1_000),
    "groups": _age_scores(1_000),
    "seen": _age_seen,
}
