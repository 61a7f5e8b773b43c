"""Bans on a cluster: where one is decided, and where it holds.

What is decided about abuse (counts, levels, the ban itself) is in one slot, `{one}`. A check looks for bans in
the shard that has its address. So a ban is written there too: to one shard for an address or the network of a
client or site, to all for a wider network. It is written down where it is decided first; workers write it again now
and then, to shards that were away. On one server there is one key, and nothing to do here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

from stillroom.errors import RedisRefused
from stillroom.keys import Keys
from stillroom.operation import Operation, Pause
from stillroom.scripts import ban_end, ban_spread
from stillroom.subject import width_of
from stillroom.wire import Command

WIDTHS_LIMIT = 8  # of networks with bans that are not looked for anyway
PAGE = 100  # bans in one batch


def spread_bans(keys: Keys, subjects: Sequence[str]) -> Operation[None]:
    """Let the bans of these subjects hold wherever checks look for them. Raises RedisUnavailable.

    A shard that is away keeps none from the others.
    """
    if not keys.is_spread:
        return
    for start in range(0, len(subjects), PAGE):
        some = list(filter(_is_network, subjects[start : start + PAGE]))
        if not some:
            continue
        places = [(subject, home) for subject in some for home in keys.homes_of_ban(subject)]
        # Read before the bans, so that a ban which had been lifted by then is not among them.
        lifted, trouble = yield from _lifted(keys, places)
        asked: list[Command] = [(b"MGET", *map(keys.ban, some))]
        asked += [(b"PTTL", keys.ban(subject)) for subject in some]
        texts, *left = yield asked
        bans = {of: (text, ms) for of, text, ms in zip(some, texts, left, strict=True)}
        commands = [
            _spreading(keys, subject, home, text, ms, at or b"")
            for (subject, home), at in zip(places, lifted, strict=True)
            for text, ms in [bans[subject]]
            if text is not None and ms > 0 and not isinstance(at, Exception)
        ]
        if commands:
            yield commands
        if trouble is not None:
            raise trouble
        yield Pause(0)  # others first; and each page has its own deadline


def _lifted(
    keys: Keys, places: Sequence[tuple[str, bytes]]
) -> Operation[tuple[Sequence[Any], RedisRefused | None]]:
    """Return what each shard knows of the last lift of these subjects, and why some shards do not say."""
    asked = [(b"GET", keys.lifted_at(home, subject)) for subject, home in places]
    try:
        return (yield asked), None
    except RedisRefused as refused:
        if len(refused.replies) != len(asked):
            raise
        return refused.replies, refused


def end_bans(keys: Keys, subjects: Sequence[str], kept_ms: int) -> Operation[list[bool]]:
    """End the bans of these subjects in all shards. Returns whether each held anywhere. Raises RedisUnavailable."""
    if not keys.is_spread:
        return [False] * len(subjects)
    lift = f"{time.time() * 1_000:.3f}"  # another one each time; no clock is compared with it
    ends = [
        (
            number,
            ban_end([keys.ban_at(home, subject), keys.lifted_at(home, subject)], lift, kept_ms),
        )
        for number, subject in enumerate(subjects)
        for home in keys.homes_of_ban(subject)
    ]
    replies: Sequence[Any] = (yield [command for _, command in ends]) if ends else []
    held = {number for (number, _), reply in zip(ends, replies, strict=True) if reply}
    return [number in held for number in range(len(subjects))]


def _spreading(
    keys: Keys, subject: str, home: bytes, text: bytes, ms: int, lifted: bytes
) -> Command:
    own = [keys.ban_at(home, subject), keys.widths(home), keys.lifted_at(home, subject)]
    return ban_spread(own, text, ms, width_of(subject), lifted)


def _is_network(subject: str) -> bool:
    """Return whether this is an address or a network, and nothing that another program wrote into the index."""
    try:
        ip_network(subject)
    except ValueError:
        return False
    return True
