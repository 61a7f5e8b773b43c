"""Take the sessions and bans of one server or cluster along to another one, while the app goes on.

**A shard of the sessions is open on one server at a time.** It is shut where it comes from before its keys are
copied (session_shut.lua), and opened where it arrives when all of them are there. In between its sessions are
unavailable on both sides, and afterwards on the side that it has left. So the copy misses nothing that happens to a
session: a logout was done before it, or is refused, or is done on the other side after it.

The keys have the same names on a server and on a cluster, so they are copied as they are, with the rest of their
lifetimes. Times in them are of the old server's clock: where the two differ they are set by the difference.

| here         | there        | the shard                                                    |
|--------------|--------------|--------------------------------------------------------------|
| open         | any          | is here. It is marked `!arriving` there, `!left` here, copied|
| `!left`      | `!arriving`  | was being copied: again, from the beginning                  |
| `!left`      | open         | has arrived                                                  |
| `!arriving`  | open         | never left that server                                       |
| `!arriving`  | `!left`      | was being copied the other way: it is opened there again     |

So a move that broke off may be repeated, or turned back by moving the other way. Before that it may not go to a
third server: there a shard that has left for the second one is open, and empty. A shard that arrives replaces what
was there: it may be what another move has left behind. Sessions that are in use there are no such thing: whoever
confuses the two servers would end all of them. So they are replaced only where that is asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from stillroom.abuse.body import LONGEST_BY_HAND_S
from stillroom.agreed import FIELDS_LIMIT, Rule, this_process
from stillroom.errors import BanRefused, SettingsError, StillroomError
from stillroom.groups import groups
from stillroom.keys import Keys, glob_literal
from stillroom.operation import Kept, Operation
from stillroom.scripts import agree, session_arrive, session_shut
from stillroom.shown import plural
from stillroom.wire import Command, micros

log = logging.getLogger("stillroom")

SHARDS = range(256)  # all that a token may name, whatever processes have
LEFT, ARRIVING = b"!left", b"!arriving"
BITE = 100  # keys in one batch: a record may have 64 kB
SCANNED = 1_000  # keys that one SCAN looks at: about 0.2 ms of the server's
PAGE = 1_000  # members of an index
REMOVED = 500
LONGEST_MS = 366 * 86_400_000
SHARDS_AGREED = b"session_shards"
BANS = 10_000
FOLLOWS_MS = b"1000"  # within this time a replica that follows says so
LEAST_AHEAD_US = 1_000_000  # clocks that differ by less are alike
TIMES = {b"_c", b"_l", b"_x", b"_a", b"_until", b"_held"}  # of a record: see lua/lib/session.lua
TIMED_SETS = re.compile(rb"x$|x:|d:")  # whose scores are times; those of the others are stamps
FOREVER = 9_007_199_254_740_991
NOWHERE = b"!"  # no key of a shard has this name
Words = tuple[bytes, ...]
RUN = re.compile(rb"^run_id:(\w+)", re.MULTILINE)


class Side(NamedTuple):
    """One of the two servers: the names of its keys, and what runs an operation on it."""

    keys: Keys
    run: Callable[[Operation[Any]], Any]
    replicas: int = 0  # so many have to know that a shard is shut, or have what has arrived
    name: str = "the server"

    def ask(self, commands: Sequence[Command]) -> Sequence[Any]:
        replies: Sequence[Any] = self.run(_asking(commands))
        return replies

    def ask_for_good(self, commands: Sequence[Command]) -> None:
        """Return when so many replicas have what was done. Raises StillroomError if too few have it in time."""
        if not self.replicas:
            self.ask(commands)
        elif (found := self.run(_keeping(list(commands), self.replicas))) < self.replicas:
            raise StillroomError(
                f"{found} of {self.replicas} replicas (STILLROOM_REPLICAS) had it in time: move again"
            )


class Moving:
    """A move from `here` to `there`. No other one may run on either. Every method raises RedisUnavailable."""

    def __init__(self, here: Side, there: Side) -> None:
        self._here = here
        self._there = there
        self._left: list[int] = []

    def begin(self, *, replace: bool = False) -> int:
        """Shut the shards there that are to arrive. Return how many. Raises SettingsError, and shuts none then.

        From now on new processes may run: what has not arrived is unavailable to them, and not missing.
        `replace`: sessions that are in use there already end, as those of processes that began too early.
        """
        for side in (self._here, self._there):
            _try_to_scan(side)
            _try_to_keep(side)
        pairs = list(zip(_states(self._here), _states(self._there), strict=True))
        for shard, pair in enumerate(pairs):
            if pair in ((LEFT, LEFT), (ARRIVING, ARRIVING)):
                raise SettingsError(f"shard {shard} of the sessions is on neither of these servers")
        left = [
            shard
            for shard, (here, there) in enumerate(pairs)
            if here is None or (here, there) == (LEFT, ARRIVING)
        ]
        back = [shard for shard, pair in enumerate(pairs) if pair == (ARRIVING, LEFT)]
        both = [shard for shard, pair in enumerate(pairs) if pair == (None, None)]
        self._refuse_the_same(both[:1])
        if not replace:
            self._refuse_what_left_for_another(pairs.count((LEFT, None)), both)
            self._refuse_to_replace(both)
        self._tell_shards()
        self._left = left
        self._shut(self._there, left, ARRIVING)
        _open(self._there, back)
        return len(left)

    @property
    def left(self) -> int:
        """Return how many of the shards that were shut for this move have not arrived yet."""
        return len(self._left)

    def shards(self) -> Iterator[int]:
        """Move one shard after the other; yield how many keys each had.

        Raises StillroomError for a shard that came in part.
        """
        while self._left:
            copied = self._move(self._left[0])
            del self._left[0]
            yield copied

    def _refuse_the_same(self, shards: Sequence[int]) -> None:
        """Raise SettingsError where a shard that is shut there is shut here: it is one server, under two names."""
        if not shards:
            return
        self._there.ask(_shutting(self._there, shards, ARRIVING))
        here = _states(self._here, shards)
        self._there.ask(_opening(self._there, shards))
        if ARRIVING in here:
            raise SettingsError("both are the same server: there is nothing to move")

    def _refuse_what_left_for_another(self, left: int, both: Sequence[int]) -> None:
        """Raise SettingsError where a move to a third server broke off: what has left for that one is not there.

        A move to this server has shut all shards there before the first one left. So none is open on both sides.
        """
        if left and both:
            raise SettingsError(
                f"{plural(left, 'shard')} of the sessions left {self._here.name} for another server than "
                f"{self._there.name}, and would be lost: that move broke off. Turn it back first: the other way, "
                "from that server. If that server is gone, --replace ends the sessions of these shards"
            )

    def _refuse_to_replace(self, shards: Sequence[int]) -> None:
        """Raise SettingsError where sessions are in use there: perhaps they are to move, and not to be replaced."""
        here, there = sum(_sizes(self._here, shards)), sum(_sizes(self._there, shards))
        if there:
            raise SettingsError(
                f"sessions are in use on the server that is moved to: {there:,}, and {here:,} on the other one. "
                "Are the two confused? If processes began there too early, their sessions end with --replace"
            )

    def _tell_shards(self) -> None:
        """Let the new server know of as many shards as the old one: acts on all of a user's sessions ask all."""
        (known,) = self._here.ask([(b"HGET", self._here.keys.agreed, SHARDS_AGREED)])
        number, _, _ = (known or b"").partition(b"\t")
        if number.isdigit():
            about = SHARDS_AGREED, number, Rule.LARGEST.value
            agreed = self._there.keys.agreed
            self._there.ask([agree([agreed], this_process(), FIELDS_LIMIT, *about)])

    def _shut(self, side: Side, shards: Sequence[int], why: bytes) -> None:
        if shards:
            side.ask_for_good(_shutting(side, shards, why))

    def _move(self, shard: int) -> int:
        if _states(self._there, [shard]) != [ARRIVING]:
            raise _moved_already(shard)
        self._shut(self._here, [shard], LEFT)
        self._clear(shard)
        copied = self._copy(shard) if _has_keys(self._here, shard) else 0
        self._copy_revocations(shard)
        if _sizes(self._here, [shard]) != _sizes(self._there, [shard]):
            raise StillroomError(f"shard {shard} of the sessions did not arrive whole: move again")
        _open(self._there, [shard])
        return copied

    def _write(self, shard: int, commands: Iterable[Words]) -> None:
        """Write keys there. Raises StillroomError where the shard is open."""
        revocations = self._there.keys.revocations(shard)
        written = [session_arrive([revocations, key], name, *rest) for name, key, *rest in commands]
        if 0 in self._there.ask(written):
            raise _moved_already(shard)

    def _clear(self, shard: int) -> None:
        """Delete what an earlier move, or a process that was too early, has left there."""
        there, revocations = self._there, self._there.keys.revocations(shard)
        if _has_keys(there, shard):
            for keys in groups(_keys_of(there, shard), REMOVED):
                self._write(shard, [(b"UNLINK", key) for key in keys])
        for pairs in _members(there, revocations):
            self._write(shard, [(b"ZREM", revocations, *[member for member, _ in pairs])])

    def _copy(self, shard: int) -> int:
        copied, timed = 0, Timed(self._here.keys.shard(shard), self._ahead_us(shard))
        for keys in groups(_keys_of(self._here, shard), BITE):
            types = self._here.ask([(b"TYPE", key) for key in keys])
            known = [pair for pair in zip(keys, types, strict=True) if pair[1] in READS]
            self._copy_some(shard, known, timed)
            copied += len(known)
        return copied

    def _ahead_us(self, shard: int) -> int:
        """Return how far the clock there is ahead of the one here; 0 where they are alike."""
        here, there = _clock_us(self._here, shard), _clock_us(self._there, shard)
        return there - here if abs(there - here) >= LEAST_AHEAD_US else 0

    def _copy_some(self, shard: int, known: Sequence[tuple[bytes, bytes]], timed: Timed) -> None:
        """Copy keys whose types are known. A large index goes page by page: nothing changes it any more."""
        start = 0
        while known:
            asked = [
                command
                for key, kind in known
                for command in (READS[kind](key, start), (b"PTTL", key))
            ]
            replies = self._here.ask(asked)
            found = list(zip(known, replies[::2], replies[1::2], strict=True))
            writes = [
                one
                for (key, kind), value, ms in found
                for one in _writing(key, kind, timed.value(key, kind, value), ms)
            ]
            if writes:
                self._write(shard, writes)
            known = [one for one, value, _ in found if one[1] == ZSET and len(value) == 2 * PAGE]
            start += PAGE

    def _copy_revocations(self, shard: int) -> None:
        for pairs in list(_members(self._here, self._here.keys.revocations(shard))):
            words = [word for member, stamp in pairs for word in (stamp, member)]
            self._write(shard, [(b"ZADD", self._there.keys.revocations(shard), *words)])


def _moved_already(shard: int) -> StillroomError:
    """Return the error of a move that another one has overtaken while it stood still."""
    return StillroomError(
        f"shard {shard} of the sessions is moved already: another move has gone on with it"
    )


def _reading_set(key: bytes, start: int) -> Command:
    return (b"ZRANGE", key, b"%d" % start, b"%d" % (start + PAGE - 1), b"WITHSCORES")


HASH, ZSET, STRING = b"hash", b"zset", b"string"
# Not by DUMP and RESTORE: a server reads no DUMP of a newer one, so there would be no way back from an update.
READS: Mapping[bytes, Callable[[bytes, int], Command]] = {
    HASH: lambda key, _: (b"HGETALL", key),
    ZSET: _reading_set,
    STRING: lambda key, _: (b"GET", key),
}


class Timed(NamedTuple):
    """Sets the times in what is copied by how far the clock there is ahead."""

    prefix: bytes  # of the shard's keys
    ahead_us: int

    def value(self, key: bytes, kind: bytes, value: Any) -> Any:
        """Return the content of a key, with its times by the clock there."""
        if not self.ahead_us:
            return value
        if kind == HASH:
            fields = zip(value[::2], value[1::2], strict=True)
            return [w for f, v in fields for w in (f, self._time(v) if f in TIMES else v)]
        if kind == ZSET and TIMED_SETS.match(key, len(self.prefix)):
            scores = zip(value[::2], value[1::2], strict=True)
            return [word for member, score in scores for word in (member, self._time(score))]
        return value

    def _time(self, text: bytes) -> bytes:
        """Return a time by the clock there."""
        return moved(text, self.ahead_us)


def moved(text: bytes, us: int) -> bytes:
    """Return a time of a record so many µs later. 0 and 1 are none, nor is what never ends: they stay.

    >>> moved(b"1795986811246741", -1_000_000), moved(b"1", -1_000_000)
    (b'1795986810246741', b'1')
    """
    is_time = len(text) < 20 and text.isdigit() and 1 < int(text) < FOREVER
    return b"%d" % max(2, int(text) + us) if is_time else text


def _writing(key: bytes, kind: bytes, value: Any, ms: int) -> list[Words]:
    """Return the commands that write a key, or another page of it. A key that has expired meanwhile needs none."""
    if not value and value != b"":
        return []
    if kind == STRING:
        writes: list[Words] = [(b"SET", key, value)]
    elif kind == HASH:  # a script takes no more words than some thousands
        writes = [(b"HSET", key, *fields) for fields in groups(value, 2 * PAGE)]
    else:
        scored = zip(value[1::2], value[::2], strict=True)
        writes = [(b"ZADD", key, *[word for pair in scored for word in pair])]
    return [*writes, (b"PEXPIRE", key, b"%d" % (ms if ms > 0 else LONGEST_MS))]


def shut_shards(side: Side) -> tuple[int, int]:
    """Return how many shards have left this server, and how many are on their way to it, or were: a move broke off.

    Redis away: RedisUnavailable.
    """
    states = _states(side)
    return states.count(LEFT), states.count(ARRIVING)


def move_bans(
    here: Any,
    there: Any,
    run_here: Callable[[Operation[Any]], Any],
    run: Callable[[Operation[Any]], Any],
    keys: Keys,
) -> int:
    """Let the bans that are in force here hold there. Return how many were new there.

    `here`, `there`: each room's `abuse`. `run_here` runs an operation on the old server; `run` and `keys` are those
    of the new one. A ban lasts as long as it had left by the old server's clock, up to 30 days. A ban that is there
    already, or was lifted there, is left alone. A ban of a rule becomes an operator's there, for that rule.
    """
    known = {one.subject for one in there.bans(BANS)}
    count = 0
    for ban in here.bans(BANS):
        (lifted,) = run(_asking([(b"GET", keys.ban_lifted(ban.subject))]))
        if ban.subject in known or lifted is not None:
            continue
        try:
            left = min(ban.until - _now(run_here), LONGEST_BY_HAND_S)
            count += left >= 1 and bool(there.ban(ban.subject, left, ban.reason or ban.rule))
        except BanRefused as refused:
            log.warning("a ban is not taken along: %s", refused)
    return count


def _now(run: Callable[[Operation[Any]], Any]) -> float:
    (time,) = run(_asking([(b"TIME",)]))
    return micros(time) / 1e6


def _asking(commands: Sequence[Command]) -> Operation[list[Any]]:
    replies: list[Any] = yield commands
    return replies


def _keeping(commands: list[Command], replicas: int) -> Operation[int]:
    replies = yield Kept(commands, replicas)
    return int(replies.replicas)


def _clock_us(side: Side, shard: int) -> int:
    """Return the time of the server that has this shard: of a cluster's node, which the command before it names."""
    _, time = side.ask([(b"EXISTS", side.keys.revocations(shard)), (b"TIME",)])
    return micros(time)


def _try_to_scan(side: Side) -> None:
    """Find out whether this user may SCAN, and ask for the run, before anything is shut. Raises RedisRefused."""
    side.ask(_scanning(side, 0, b"0", 1))


def _try_to_keep(side: Side) -> None:
    """Find out whether a server has the replicas that acts wait for, before anything is shut.

    Of a cluster one node is asked. Raises SettingsError.
    """
    if not side.replicas:
        return
    look = (b"EXISTS", side.keys.revocations(SHARDS[0]))  # it says to which node WAIT goes
    _, found = side.ask([look, (b"WAIT", b"%d" % side.replicas, FOLLOWS_MS)])
    if found < side.replicas:
        raise SettingsError(
            f"{found} of {side.replicas} replicas (STILLROOM_REPLICAS) follow {side.name}. If the old server has "
            "another number of them, give it by --from-replicas"
        )


def _states(side: Side, shards: Sequence[int] = SHARDS) -> list[bytes | None]:
    """Return why each shard is shut; None for one that is open."""
    keys = [side.keys.revocations(shard) for shard in shards]
    replies = side.ask([(b"ZMSCORE", key, LEFT, ARRIVING) for key in keys]) if keys else []
    return [_why_shut(reply) for reply in replies]


def _why_shut(reply: Sequence[Any]) -> bytes | None:
    left, arriving = reply
    return LEFT if left is not None else ARRIVING if arriving is not None else None


def _shutting(side: Side, shards: Sequence[int], why: bytes) -> list[Command]:
    return [session_shut([side.keys.revocations(shard)], why) for shard in shards]


def _opening(side: Side, shards: Sequence[int]) -> list[Command]:
    return [(b"ZREM", side.keys.revocations(shard), LEFT, ARRIVING) for shard in shards]


def _open(side: Side, shards: Sequence[int]) -> None:
    if shards:
        side.ask_for_good(_opening(side, shards))


def _has_keys(side: Side, shard: int) -> bool:
    """Return whether a shard has sessions, or had: its clock lives longer than they."""
    known = side.keys.session_stamps(shard), side.keys.due_sessions(shard)
    return bool(side.ask([(b"EXISTS", *known)])[0])


def _sizes(side: Side, shards: Sequence[int]) -> list[int]:
    """Return how many sessions each shard has, with those that ended and were not swept."""
    if not shards:
        return []
    return [*map(int, side.ask([(b"ZCARD", side.keys.due_sessions(shard)) for shard in shards]))]


def _keys_of(side: Side, shard: int) -> Iterator[bytes]:
    """Yield the keys of a shard, but not that of its revocations, which says that it is shut.

    A SCAN sees all of them only where one run of one server answers it from its beginning to its end, and has all.
    Raises StillroomError, or RedisUnavailable, where the shard's slot is moved meanwhile or a replica takes over.
    """
    revocations = side.keys.revocations(shard)
    cursor, first = b"0", None
    while True:
        (cursor, found), _, about = side.ask(_scanning(side, shard, cursor, SCANNED))
        run = RUN.findall(about)
        if run != (first := first or run):
            raise StillroomError(
                f"another server than before has shard {shard} of the sessions: move again"
            )
        yield from (key for key in found if key != revocations)
        if cursor == b"0":
            return


def _scanning(side: Side, shard: int, cursor: bytes, count: int) -> list[Command]:
    """Return a SCAN for a shard's keys, and what tells whether this server has all of them.

    The command behind it says to which node of a cluster it goes. That key is nowhere, and a node that is giving
    the slot away refuses to say so.
    """
    prefix = side.keys.shard(shard)
    scan = (b"SCAN", cursor, b"MATCH", glob_literal(prefix) + b"*", b"COUNT", b"%d" % count)
    return [scan, (b"EXISTS", prefix + NOWHERE), (b"INFO", b"server")]


def _members(side: Side, key: bytes) -> Iterator[list[tuple[bytes, bytes]]]:
    """Yield what is revoked, with its stamps, some at a time."""
    (found,) = side.ask([(b"ZRANGE", key, b"0", b"-1", b"WITHSCORES")])
    pairs = [pair for pair in zip(found[::2], found[1::2], strict=True) if pair[0][:1] != b"!"]
    yield from groups(pairs, REMOVED)
