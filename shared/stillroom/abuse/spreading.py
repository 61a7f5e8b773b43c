"""Bans on a cluster: where one is decided, and where it holds.

What is decided about abuse (counts, levels, the ban itself) is in one slot, `{one}`. A check looks for bans in
the shard that has its address. So a ban is written there too: to one shard for an address or the network of a
client or site, to all for a wider network. It is written down where it is decided first; workers write it again now
and then, to shards that were away. On one server there is one key, and nothing to do here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stillroom.keys import Keys
from stillroom.operation import Operation, Pause
from stillroom.scripts import ban_end, ban_spread
from stillroom.subject import UNKNOWN, width_of
from stillroom.wire import Command

WIDTHS_LIMIT = 8  # of networks with bans that are not looked for anyway
PAGE = 100  # bans in one batch


def spread_bans(keys: Keys, subjects: Sequence[str]) -> Operation[None]:
    """Let the bans of these subjects hold wherever checks look for them. Raises RedisUnavailable."""
    if not keys.is_spread:
        return
    for start in range(0, len(subjects), PAGE):
        some = subjects[start : start + PAGE]
        asked: list[Command] = [(b"MGET", *map(keys.ban, some))]
        asked += [(b"PTTL", keys.ban(subject)) for subject in some]
        texts, *left = yield asked
        commands = [
            command
            for subject, text, ms in zip(some, texts, left, strict=True)
            if text is not None and ms > 0
            for command in _spreading(keys, subject, text, ms)
        ]
        if commands:
            yield commands
        yield Pause(0)  # others first; and each page has its own deadline


def end_bans(keys: Keys, subjects: Sequence[str], kept_ms: int) -> Operation[list[bool]]:
    """End the bans of these subjects in all shards, after they were lifted where they were decided.

    Returns whether each held anywhere. Raises RedisUnavailable.
    """
    if not keys.is_spread:
        return [False] * len(subjects)
    times = yield [(b"GET", keys.ban_lifted(subject)) for subject in subjects]
    ends = [
        (number, ban_end([keys.ban_at(home, subject), keys.lifted_at(home, subject)], at, kept_ms))
        for number, (subject, at) in enumerate(zip(subjects, times, strict=True))
        if at is not None
        for home in keys.homes_of_ban(subject)
    ]
    replies: Sequence[Any] = (yield [command for _, command in ends]) if ends else []
    held = {number for (number, _), reply in zip(ends, replies, strict=True) if reply}
    return [number in held for number in range(len(subjects))]


def _spreading(keys: Keys, subject: str, text: bytes, ms: int) -> Iterable[Command]:
    width = "" if subject == UNKNOWN else width_of(subject)
    for home in keys.homes_of_ban(subject):
        own = [keys.ban_at(home, subject), keys.widths(home), keys.lifted_at(home, subject)]
        yield ban_spread(own, text, ms, width, WIDTHS_LIMIT)
